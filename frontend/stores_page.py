"""Stores: the teacher features that are cached, what they are worth, how they look, and whether they are sound."""

from __future__ import annotations

import hashlib
from collections.abc import Awaitable, Callable
from typing import Any

from nicegui import Client, ui

from backend.server.stores import (
    StoreSummary,
    describe_store,
    draw_pictures,
    list_stores,
    measure_store,
    summarize,
    verify_store,
)
from backend.server.tasks import Tasks
from frontend.layout import (
    button,
    element,
    empty_panel,
    fact,
    frame,
    heading,
    metric_label,
    notice,
    page_texts,
    size_text,
    text,
)
from frontend.live import with_spinner
from frontend.texts import Texts

SHOWN_FINDINGS = 20


async def build(client: Client, tasks: Tasks) -> None:
    texts = page_texts(client)
    output_root = tasks.settings.output_root
    found = list_stores(output_root)
    with frame(texts, client, texts("stores.title"), "stores"):
        with heading(texts("stores.title"), texts("stores.lead")):
            pass
        if not found:
            with empty_panel("dataset", texts("stores.empty"), texts("stores.empty.next", root=output_root)):
                button(texts("nav.new"), lambda: ui.navigate.to("/new"), "primary", "add")
        for store in found:
            StoreCard(texts, tasks, store)


class StoreCard:
    """One store: what it holds, and the actions that read it."""

    def __init__(self, texts: Texts, tasks: Tasks, store: StoreSummary) -> None:
        self.texts, self.store = texts, store
        self.output_root = tasks.settings.output_root
        with element("section", "panel padded") as card:
            card._props["data-store"] = store.name
            with element("div", "line"):
                with element("div", "grow"):
                    text(title_of(store), "h2", "path")
                    text(store.name, "p", "muted small mono path")
                if store.problem:
                    text(texts("stores.incomplete"), "span", "state FAILED")
                else:
                    name, tone = ("complete", "COMPLETED") if store.complete else ("incomplete", "STOPPED")
                    text(texts(f"stores.{name}"), "span", f"state {tone}")
            if store.problem:
                with notice("bad"):
                    text(store.problem, "p", "small")
                return
            self.facts = element("dl", "facts")
            self.fill_facts()
            with element("div", "line buttons"):
                if store.complete:
                    self.action("stores.pictures", "grain", self.show_pictures)
                    self.action("stores.verify", "verified_user", self.verify)
                    if store.classes:
                        self.action("stores.measure", "straighten", self.measure)
                self.action("stores.details", "list", self.show_details)
            self.result = element("div", "stack")
            self.result.set_visibility(False)

    def action(self, name: str, icon: str, handler: Callable[[], Awaitable[None]]) -> None:
        button(self.texts(name), handler, "plain", icon)

    def fill_facts(self) -> None:
        texts, store = self.texts, self.store
        self.facts.clear()
        with self.facts:
            teacher = store.teacher + (f" ({texts('stores.random')})" if store.random_weights else "")
            fact(texts("stores.teacher"), teacher)
            rows = " + ".join(f"{count:,} {name}" for name, count in store.rows.items())
            fact(texts("stores.rows"), rows or texts("none"))
            fact(texts("stores.size"), size_text(store.bytes))
            fact(texts("stores.classes"), f"{store.classes:,}")
            grid = f"{store.grid} × {store.grid}" if store.grid else texts("stores.grid.none")
            fact(texts("stores.grid"), grid)
            if store.accuracies:
                for name, value in store.accuracies.items():
                    fact(metric_label(texts, name), f"{value:.1%}")
            else:
                fact(texts("stores.accuracy"), texts("stores.accuracy.none"))

    async def run(self, words: str, work: Awaitable[Any]) -> Any:
        self.result.set_visibility(True)
        return await with_spinner(self.texts, self.result, words, work)

    async def show_pictures(self) -> None:
        folder = self.output_root / ".pages" / "stores" / digest(self.store.name)
        files = await self.run("stores.drawing", draw_pictures(self.store.path, folder))
        if files is None:
            return
        with self.result:
            text(self.texts("stores.pictures.lead"), "p", "muted small")
            with element("div", "pictures wide" if self.store.grid else "pictures"):
                for file in files[:-1]:
                    with element("figure"):
                        picture = ui.image(file).props("no-spinner")
                        picture._props["alt"] = file.stem
                        text(file.stem, "figcaption")

    async def verify(self) -> None:
        found = await self.run("stores.verifying", verify_store(self.store.path))
        if found is None:
            return
        with self.result:
            if found["ok"]:
                with notice("good", self.texts("stores.sound")):
                    skipped = (found.get("data") or {}).get("skipped")
                    if skipped:
                        text(str(skipped), "p", "small muted")
                return
            findings = found["findings"]
            name = "stores.findings.one" if len(findings) == 1 else "stores.findings"
            with notice("bad", self.texts(name, count=len(findings))):
                for finding in findings[:SHOWN_FINDINGS]:
                    text(f"{finding['path']}: {finding['problem']}", "p", "small")

    async def measure(self) -> None:
        if await self.run("stores.measuring", measure_store(self.store.path)) is not None:
            self.store = summarize(self.store.path, self.output_root)
            self.fill_facts()
            self.result.set_visibility(False)

    async def show_details(self) -> None:
        described = await self.run("working", describe_store(self.store.path))
        if described is None:
            return
        with self.result:
            for warning in described.get("warnings", []):
                with notice("note"):
                    text(warning, "p", "small")
            for name, split in described["splits"].items():
                text(f"{name} · {split['rows']:,}", "h3")
                self.fill_arrays(split["arrays"])

    def fill_arrays(self, arrays: dict[str, Any]) -> None:
        texts = self.texts
        with element("div", "scroll-x"), element("table", "table flush"):
            with element("thead"), element("tr"):
                for heading_name in ("stores.array", "stores.shape", "stores.type"):
                    text(texts(heading_name), "th")
                text(texts("stores.size"), "th", "right")
            with element("tbody"):
                for name, array in arrays.items():
                    with element("tr"):
                        text(name, "td", "mono")
                        text(" × ".join(map(str, array["shape"])), "td", "number")
                        text(array["dtype"], "td")
                        text(size_text(array["bytes"]), "td", "right number")


def title_of(store: StoreSummary) -> str:
    """The data set's name and the teacher's image size: what tells the stores of a cache apart."""
    data = store.data.rstrip("/").rpartition("/")[2] or store.name
    return f"{data} · {store.image_size} px" if store.image_size else data


def digest(name: str) -> str:
    return hashlib.blake2b(name.encode(), digest_size=8).hexdigest()
