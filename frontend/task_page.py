"""Task: one training as it runs and what came of it: curves, log, evaluation, predictions, files, settings."""

from __future__ import annotations

import asyncio
import json
import shlex
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import quote

from nicegui import Client, background_tasks, ui

from backend.server.database import TaskState
from backend.server.document import document_of
from backend.server.errors import NotFoundError, TaskError
from backend.server.events import Change
from backend.server.logs import LOG_FILE
from backend.server.logs import follow as follow_lines
from backend.server.results import (
    compare_with_control,
    draw_predictions,
    drawn_predictions,
    export_onnx,
    list_downloads,
    metric_of,
    read_records,
    read_summary,
)
from backend.server.schemas import TaskView
from backend.server.tasks import ACTIVE, STARTABLE, Tasks
from frontend.charts import loss_chart, metric_chart, rate_chart
from frontend.layout import (
    button,
    count_text,
    duration,
    element,
    empty,
    empty_panel,
    fact,
    frame,
    icon_button,
    link,
    metric_label,
    notice,
    page_texts,
    panel,
    size_text,
    text,
)
from frontend.live import follow, with_spinner
from frontend.messages import translate
from frontend.new_task_page import command_text
from frontend.tasks_page import STOPPABLE, ProgressBar, TaskActions
from frontend.texts import Texts

TABS = ("overview", "log", "evaluation", "predictions", "files", "settings")
SHOWN_LINES, TAIL_BYTES = 1000, 100_000
DETAILS = (
    "parameters",
    "macs",
    "latency_ms",
    "images_per_second",
    "wall_time_s",
    "peak_rss_mb",
    "peak_gpu_mb",
)


def build(client: Client, tasks: Tasks, task_id: str) -> None:
    """Raises NotFoundError."""
    texts = page_texts(client)
    task = tasks.read(task_id)
    with frame(texts, client, task.task_name or task.task_id, "tasks"):
        TaskPage(texts, client, tasks, task)


def build_missing(client: Client) -> None:
    """The page for a task that does not exist, or was deleted."""
    texts = page_texts(client)
    with (
        frame(texts, client, texts("page.missing"), "tasks"),
        empty_panel("search_off", texts("page.missing"), texts("page.missing.next")),
    ):
        button(texts("nav.tasks"), lambda: ui.navigate.to("/"))


class TaskPage:
    """The whole page. `apply` takes a change; parts that are costly are made again only when they may differ."""

    def __init__(self, texts: Texts, client: Client, tasks: Tasks, task: TaskView) -> None:
        self.texts, self.client, self.tasks, self.task = texts, client, tasks, task
        self.folder = Path(task.output_dir)
        follow(client, tasks, task.task_id, self.apply)
        self.task = tasks.read(task.task_id)
        self.make_head()
        self.make_facts()
        with element("div", "tabs"):
            self.make_tabs(texts, client)
        ui.timer(1.0, self.tick)
        self.show(everything=True)

    def make_tabs(self, texts: Texts, client: Client) -> None:
        with ui.tabs().props("align=left inline-label no-caps mobile-arrows outside-arrows") as tabs:
            for name in TABS:
                ui.tab(name, label=texts(f"task.{name}"))
        with ui.tab_panels(tabs, value="overview", animated=False, on_change=self.tab_changed):
            with ui.tab_panel("overview"):
                self.curves = Curves(texts, self.folder)
            with ui.tab_panel("log"):
                self.log = LogView(texts, client, self)
            with ui.tab_panel("evaluation"):
                self.evaluation = element("div", "stack")
            with ui.tab_panel("predictions"):
                self.predictions = element("div", "stack")
            with ui.tab_panel("files"):
                self.files = element("div", "stack")
            with ui.tab_panel("settings"), element("div", "stack"):
                self.fill_settings()

    def tab_changed(self, event: Any) -> None:
        if event.value == "log":
            self.log.to_end()

    # -- the head ------------------------------------------------------------------------------------------

    def make_head(self) -> None:
        with element("div", "head"):
            with element("div", "head-text"):
                with link("/", "small muted back"):
                    text(f"← {self.texts('nav.tasks')}", "span")
                with element("div", "line title-line"):
                    text(self.task.task_name or self.task.task_id, "h1")
                    self.state = text("", "span", "state").props('role="status" aria-live="polite"')
            self.buttons = element("div", "buttons")
        self.failure = element("div")

    def fill_buttons(self) -> None:
        actions = TaskActions(self.texts, self.tasks, self.task, self.reload)
        state = self.task.state
        self.buttons.clear()
        with self.buttons:
            if state in STARTABLE:
                name = "action.resume" if self.task.attempt else "action.start"
                button(self.texts(name), actions.start, "primary", "play_arrow")
            if state in STOPPABLE:
                button(self.texts("action.stop"), actions.stop, "plain", "stop")
            if state == TaskState.CREATED:
                button(self.texts("action.edit"), actions.edit, "plain", "edit")
            button(self.texts("action.clone"), actions.clone, "plain", "content_copy")
            if state not in ACTIVE:
                icon_button("delete_outline", self.texts("action.delete"), actions.ask_to_delete)

    def reload(self) -> None:
        """After an action of this page: the change itself comes as an event; a deleted task leaves the page."""
        try:
            self.task = self.tasks.read(self.task.task_id)
        except NotFoundError:
            ui.navigate.to("/")
            return
        self.show()

    def make_facts(self) -> None:
        with element("section", "panel padded"):
            self.bar = ProgressBar(self.texts)
            with element("dl", "facts"):
                with element("div", "large"):
                    self.best_label = text("", "dt")
                    self.best = text("", "dd")
                self.left = fact(self.texts("task.left"), "", "large")
                self.time = fact(self.texts("task.time"), "", "large")
                fact(self.texts("column.student"), self.task.student_model)
                fact(self.texts("task.teacher"), self.task.teacher_model or self.task.teacher_path or "–")
                fact(self.texts("column.data"), self.task.dataset_id)

    # -- changes -------------------------------------------------------------------------------------------

    def apply(self, change: Change) -> None:
        if change.task is None:
            ui.navigate.to("/")
            return
        self.task = change.task
        self.show()

    def tick(self) -> None:
        """Times pass, and files change, without an event."""
        if self.task.state in ACTIVE:
            self.time.set_text(duration(self.texts, self.seconds()))
            self.curves.show(self.task)

    shown_state = ""
    shown_files: Any = None

    def show(self, everything: bool = False) -> None:
        task, texts = self.task, self.texts
        self.bar.show(task)
        self.left.set_text(duration(texts, task.time_left))
        self.time.set_text(duration(texts, self.seconds()))
        self.curves.show(task, force=everything)
        metric = self.curves.metric
        self.best_label.set_text(texts("task.best", metric=metric) if metric else texts("task.best.none"))
        self.best.set_text(texts("none") if task.best_accuracy is None else f"{task.best_accuracy:.2f}%")
        if task.state != self.shown_state or everything:
            self.shown_state = task.state
            self.state.set_text(texts.or_word(f"state.{task.state}", task.state))
            self.state.classes(replace=f"state {task.state}")
            self.fill_buttons()
            self.fill_failure()
            self.fill_evaluation()
            self.fill_predictions()
        files = [(path.name, path.stat().st_size) for path in list_downloads(self.folder)]
        if files != self.shown_files or everything:
            self.shown_files = files
            self.fill_files(files)

    def seconds(self) -> float | None:
        if self.task.started_at is None:
            return None
        end = (
            self.task.ended_at if self.task.state not in ACTIVE and self.task.ended_at else datetime.now(UTC)
        )
        return (end - self.task.started_at).total_seconds()

    def fill_failure(self) -> None:
        failed = bool(self.task.error_message) and self.task.state in (TaskState.FAILED, TaskState.LOST)
        self.failure.clear()
        self.failure.set_visibility(failed)
        if failed:
            with self.failure, notice("bad", self.texts("task.failed")):
                text(translate(self.texts, str(self.task.error_message)), "p", "small")
                if self.task.attempt and read_records(self.folder):
                    text(self.texts("task.resumes"), "p", "small muted")

    # -- evaluation ----------------------------------------------------------------------------------------

    def fill_evaluation(self) -> None:
        self.evaluation.clear()
        summary = read_summary(self.folder)
        with self.evaluation:
            if not summary:
                self.fill_reported()
                return
            self.fill_control(summary)
            self.fill_metrics(summary)
            self.fill_classes(summary.get("per_class") or {})

    def fill_reported(self) -> None:
        """What the training process reported, where its folder is not on this machine."""
        reported = self.tasks.evaluations(self.task.task_id)
        if not reported:
            with empty_panel("fact_check", self.texts("eval.empty"), self.texts("eval.empty.next")):
                pass
            return
        values = reported[0].model_dump(include={"precision", "recall", "f1_score", "map50", "map95"})
        with panel(self.texts("task.evaluation")), element("dl", "facts"):
            for name, value in values.items():
                if value is not None:
                    fact(name, f"{value:.2%}", "large")

    def fill_control(self, summary: dict[str, Any]) -> None:
        compared = compare_with_control(summary)
        with panel(self.texts("eval.control.title")):
            if compared is None:
                text(self.texts("eval.control.none"), "p", "muted")
                return
            difference = compared.difference
            direction = "up" if difference > 0 else "down" if difference < 0 else ""
            shares = metric_of(compared.metric).kind == "share"
            number = f"{100 * difference:+.2f}" if shares else f"{difference:+.4f}"
            gain = self.texts("eval.points", value=number) if shares else number
            text(gain.replace("-", "−"), "div", f"gain {direction}")
            shown = {
                name: f"{value:.2%}" if shares else f"{value:.4f}"
                for name, value in (("student", compared.student), ("control", compared.control))
            }
            text(
                self.texts("eval.control.text", metric=metric_label(self.texts, compared.metric), **shown),
                "p",
                "muted",
            )

    def fill_metrics(self, summary: dict[str, Any]) -> None:
        metrics = {name: value for name, value in (summary.get("metrics") or {}).items() if value is not None}
        control = (summary.get("control") or {}).get("metrics") or {}
        count = summary.get("validation_samples")
        with element("div", "charts"):
            with element("section", "panel padded"):
                with element("div"):
                    text(self.texts("task.evaluation"), "h2")
                    if count is not None:
                        text(self.texts("eval.samples", count=f"{count:,}"), "p", "muted small")
                with element("table", "table flush"):
                    with element("thead"), element("tr"):
                        text(self.texts("eval.metric"), "th")
                        text(self.texts("eval.student"), "th", "right")
                        if control:
                            text(self.texts("eval.control"), "th", "right")
                    with element("tbody"):
                        for name, value in metrics.items():
                            with element("tr"):
                                text(metric_label(self.texts, name), "td")
                                text(metric_text(name, value), "td", "right number")
                                if control:
                                    text(metric_text(name, control.get(name)), "td", "right number")
            with panel(self.texts("eval.cost")), element("dl", "facts"):
                for name in DETAILS:
                    if summary.get(name) is not None:
                        fact(metric_label(self.texts, name), metric_text(name, summary[name]))

    def fill_classes(self, per_class: dict[str, Any]) -> None:
        tables = {name: values for name, values in per_class.items() if isinstance(values, dict) and values}
        if not tables:
            flat = {name: value for name, value in per_class.items() if isinstance(value, (int, float))}
            tables = {"": flat} if flat else {}
        if not tables:
            return
        classes = list(dict.fromkeys(name for values in tables.values() for name in values))
        with panel(self.texts("eval.per_class")), element("div", "scroll-x"), element("table", "table flush"):
            with element("thead"), element("tr"):
                text(self.texts("eval.class"), "th")
                for name in tables:
                    text(metric_label(self.texts, name) if name else self.texts("eval.value"), "th", "right")
            with element("tbody"):
                for name in classes:
                    with element("tr"):
                        text(name, "td")
                        for values in tables.values():
                            value = values.get(name)
                            text("–" if value is None else f"{value:.2%}", "td", "right number")

    # -- predictions and files -----------------------------------------------------------------------------

    def fill_predictions(self) -> None:
        self.predictions.clear()
        drawn = drawn_predictions(self.folder)
        with self.predictions:
            if drawn:
                text(self.texts("pred.lead"), "p", "muted small")
                with element("div", "pictures"):
                    for item in drawn:
                        with element("figure"):
                            picture = ui.image(item.file).props("no-spinner fit=contain ratio=1")
                            picture._props["alt"] = item.caption
                            text(item.caption, "figcaption")
            elif read_summary(self.folder):
                with empty_panel("image_search", self.texts("pred.ready"), self.texts("pred.ready.next")):
                    button(self.texts("pred.draw"), self.draw, "primary")
            else:
                with empty_panel("image_search", self.texts("pred.empty"), self.texts("pred.empty.next")):
                    pass

    async def draw(self) -> None:
        work = draw_predictions(self.folder)
        if await with_spinner(self.texts, self.predictions, "pred.drawing", work) is not None:
            self.fill_predictions()

    def fill_files(self, files: list[tuple[str, int]]) -> None:
        self.files.clear()
        names = [name for name, _ in files]
        with self.files, element("section", "panel"):
            if not files:
                with empty("folder_open", self.texts("files.empty"), self.texts("files.empty.next")):
                    pass
                return
            with element("table", "table"):
                with element("thead"), element("tr"):
                    text(self.texts("files.name"), "th")
                    text(self.texts("files.size"), "th", "right")
                    text("", "th")
                with element("tbody"):
                    for name, size in files:
                        with element("tr"):
                            text(name, "td", "mono")
                            text(size_text(size), "td", "right number")
                            with element("td", "actions"):
                                label = self.texts("files.download", name=name)
                                with link(self.file_url(name), "download").props("download") as anchor:
                                    anchor._props["aria-label"] = label
                                    ui.icon("download").props('aria-hidden="true"')
            self.export = element("div", "pages")
            with self.export:
                text(f"{self.texts('files.folder')}: {self.folder}", "span", "muted small grow path")
                if "best.pt" in names and not any(name.endswith(".onnx") for name in names):
                    button(self.texts("files.onnx"), self.make_onnx)

    def file_url(self, name: str) -> str:
        return f"/model-distillation/tasks/{quote(self.task.task_id)}/files/{quote(name)}"

    async def make_onnx(self) -> None:
        made = await with_spinner(self.texts, self.export, "files.exporting", export_onnx(self.folder))
        if made is not None:
            self.show()

    def fill_settings(self) -> None:
        with panel(self.texts("new.json")):
            content = json.dumps(document_of(self.task), indent=2, ensure_ascii=False)
            text(content, "pre", "command tall").props('tabindex="0"')
        with panel(self.texts("new.command")):
            try:
                words = self.tasks.command(self.task.task_id)
                text(command_text(words), "pre", "command tall").props('tabindex="0"')
                with element("div", "line"):
                    button(
                        self.texts("copy"),
                        lambda: ui.clipboard.write(shlex.join(words)),
                        "plain",
                        "content_copy",
                    )
            except TaskError as error:
                text(translate(self.texts, str(error)), "p", "muted")


def metric_text(name: str, value: Any) -> str:
    """A number of a run with its unit."""
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return "–"
    kind = metric_of(name).kind
    if kind == "share":
        return f"{value:.2%}"
    if kind == "count":
        return f"{value:,.0f}" if value < 1e5 else count_text(value)
    units = {"milliseconds": " ms", "seconds": " s", "megabytes": " MB"}
    return f"{value:,.4g}{units.get(kind, '')}"


class Curves:
    """The charts, from the run's metrics.jsonl; drawn again when an epoch was added."""

    def __init__(self, texts: Texts, folder: Path) -> None:
        self.texts, self.folder = texts, folder
        self.metric = ""
        self.epochs = -1
        self.hint = ""
        self.container = element("div", "stack")

    def show(self, task: TaskView, force: bool = False) -> None:
        records = read_records(self.folder)
        hint = "chart.empty.running" if task.state in ACTIVE else "chart.empty.pending"
        if not records:
            if hint != self.hint or force:
                self.hint, self.epochs = hint, 0
                self.container.clear()
                with self.container, empty_panel("show_chart", self.texts("chart.empty"), self.texts(hint)):
                    pass
            return
        if len(records) == self.epochs and not force:
            return
        first = self.epochs <= 0 or force
        self.epochs, self.hint = len(records), ""
        self.metric, metric = metric_chart(self.texts, records)
        options = (loss_chart(self.texts, records), metric, rate_chart(self.texts, records))
        if first:
            self.make(options)
            return
        self.title.set_text(self.metric)
        for chart, new in zip(self.charts, options, strict=True):
            chart.options.clear()
            chart.options.update(new)

    def make(self, options: tuple[dict[str, Any], ...]) -> None:
        self.container.clear()
        self.charts = []
        with self.container, element("div", "charts"):
            for title, option in zip(("chart.loss", "", "chart.rate"), options, strict=True):
                with element("section", "panel"):
                    made = text(self.texts(title) if title else self.metric, "h3")
                    if not title:
                        self.title = made
                    self.charts.append(ui.echart(option, renderer="svg").classes("chart"))


class LogView:
    """The end of the log, followed while the task runs; a restarted task is followed again."""

    def __init__(self, texts: Texts, client: Client, page: TaskPage) -> None:
        self.page, self.path = page, page.folder / LOG_FILE
        with element("div", "stack"):
            self.nothing = element("section", "panel")
            with self.nothing, empty("notes", texts("log.empty"), texts("log.empty.next")):
                pass
            self.view = ui.log(max_lines=SHOWN_LINES).classes("log").props('tabindex="0" role="log"')
            self.view._props["aria-label"] = texts("task.log")
            with element("div", "line"):
                url = f"/model-distillation/tasks/{quote(page.task.task_id)}/log"
                self.download = link(url, "small").props(f'download="{page.task.task_id}.log"')
                with self.download:
                    text(texts("log.download"), "span")
        self.set_filled(False)
        running = background_tasks.create(self.listen(client), name=f"log {page.task.task_id}")
        client.on_delete(running.cancel)

    async def listen(self, client: Client) -> None:
        while True:
            lines_of = follow_lines(self.path, lambda: self.page.task.state not in ACTIVE, TAIL_BYTES)
            async for lines in lines_of:
                with client:
                    self.push(lines)
            while self.page.task.state not in ACTIVE:
                await asyncio.sleep(0.5)
            with client:
                self.view.clear()

    def push(self, lines: list[str]) -> None:
        if lines:
            self.set_filled(True)
            self.view.push("\n".join(lines))

    def to_end(self) -> None:
        """A log that was filled while it was hidden stands at its beginning."""
        self.page.client.run_javascript(
            f"setTimeout(() => getElement({self.view.id})?.$refs.qRef?.setScrollPercentage('vertical', 1), 50)"
        )

    def set_filled(self, filled: bool) -> None:
        self.view.set_visibility(filled)
        self.download.set_visibility(filled)
        self.nothing.set_visibility(not filled)
