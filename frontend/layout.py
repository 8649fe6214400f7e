"""What every page has: colors, header, navigation, language; and the small parts that pages are built of."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from nicegui import Client, ui

from backend.server.results import metric_of
from frontend.texts import Texts, preferred_language

STYLE = Path(__file__).with_name("style.css")
#: Cookies, so that no account is needed: they hold nothing but the choice.
LANGUAGE_COOKIE, THEME_COOKIE = "distill_language", "distill_theme"
COOKIE_AGE_S = 31_536_000
PAGES = (("tasks", "/", "list_alt"), ("stores", "/stores", "dataset"), ("compare", "/compare", "insights"))
MARK = (
    '<svg width="24" height="24" viewBox="0 0 24 24" fill="none" stroke="currentColor" stroke-width="2" aria-hidden="true">'
    '<circle cx="9" cy="12" r="6.5"/><circle cx="18.5" cy="12" r="3.2" fill="currentColor" stroke="none"/></svg>'
)


def page_texts(client: Client) -> Texts:
    """The texts in the language of the visitor."""
    request = client.request
    accepted = request.headers.get("accept-language", "")
    return Texts(preferred_language(request.cookies.get(LANGUAGE_COOKIE), accepted))


@contextmanager
def frame(texts: Texts, client: Client, title: str, current: str = "") -> Iterator[None]:
    """The header, then the main part, into which the caller's elements go."""
    theme = client.request.cookies.get(THEME_COOKIE)
    ui.dark_mode({"dark": True, "light": False}.get(str(theme)))
    ui.colors(primary="#3358d4", positive="#16794c", negative="#c0322b", warning="#93600a")
    ui.page_title(f"{title} · {texts('product')}")
    ui.add_head_html(f'<script>document.documentElement.lang = "{texts.html_language}"</script>')
    ui.add_css(STYLE.read_text(encoding="utf-8"))
    main = element("div", "main").props('id="main" tabindex="-1"')
    with element("header", "bar") as header, element("div", "bar-inner"):
        ui.link(texts("skip"), "#main").classes("skip")
        with link("/", "brand").props(f'aria-label="{texts("product")}"'):
            ui.html(MARK, sanitize=False)
            text(texts("product"), "span")
        with element("nav", "nav").props(f'aria-label="{texts("product")}"'):
            for name, path, icon in PAGES:
                with link(path).props(f'aria-label="{texts(f"nav.{name}")}"') as item:
                    ui.icon(icon).props('aria-hidden="true"')
                    text(texts(f"nav.{name}"), "span")
                if name == current:
                    item.props('aria-current="page"')
        language_button(texts)
        theme_button(texts, theme)
    header.move(target_index=0)
    with main:
        yield


def language_button(texts: Texts) -> None:
    other = "zh" if texts.language == "en" else "en"
    button = ui.button(texts("language"), on_click=lambda: choose(LANGUAGE_COOKIE, other), color=None)
    button.props(f'flat dense no-caps aria-label="{texts("language.hint")}"').classes("quiet")


def theme_button(texts: Texts, theme: str | None) -> None:
    """Light or dark; before the first choice the system's."""
    is_dark = theme == "dark"
    icon, hint = ("light_mode", "theme.light") if is_dark else ("dark_mode", "theme.dark")
    other = "light" if is_dark else "dark"
    button = ui.button(icon=icon, on_click=lambda: choose(THEME_COOKIE, other), color=None)
    button.props(f'flat dense round aria-label="{texts(hint)}"').classes("quiet")


def choose(cookie: str, value: str) -> None:
    """Remember the choice in the browser and load the page again with it."""
    ui.run_javascript(
        f'document.cookie = "{cookie}={value}; path=/; max-age={COOKIE_AGE_S}; samesite=strict"; location.reload()'
    )


# -- parts ------------------------------------------------------------------------------------------------


def element(tag: str, classes: str = "") -> ui.element:
    return ui.element(tag).classes(classes)


class Text(ui.element):
    """An element with one text that can be changed."""

    def __init__(self, tag: str, content: str) -> None:
        super().__init__(tag)
        self._text = content

    def set_text(self, content: str) -> None:
        if content != self._text:
            self._text = content
            self.update()


def text(content: str, tag: str = "div", classes: str = "") -> Text:
    """A piece of text; `content` is never read as HTML."""
    made = Text(tag, content)
    made.classes(classes)
    return made


def link(path: str, classes: str = "") -> ui.element:
    return ui.element("a").props(f'href="{path}"').classes(classes)


def button(
    label: str, on_click: Callable[..., Any], kind: str = "plain", icon: str | None = None
) -> ui.button:
    """`kind`: primary, plain, quiet or danger."""
    made = ui.button(label, on_click=on_click, icon=icon, color=None)
    return made.props("unelevated no-caps" if kind in ("primary", "plain") else "flat no-caps").classes(kind)


def icon_button(icon: str, label: str, on_click: Callable[..., Any], kind: str = "quiet") -> ui.button:
    """A button without words: `label` is what a screen reader says, and the tooltip."""
    made = ui.button(icon=icon, on_click=on_click, color=None).props("flat dense round").classes(kind)
    made._props["aria-label"] = label
    with made:
        ui.tooltip(label)
    return made


@contextmanager
def heading(title: str, lead: str = "") -> Iterator[None]:
    """A page's title; what the caller adds stands at its right."""
    with element("div", "head"):
        with element("div", "head-text"):
            text(title, "h1")
            if lead:
                text(lead, "p", "muted")
        with element("div", "buttons"):
            yield


@contextmanager
def panel(title: str = "", lead: str = "") -> Iterator[ui.element]:
    with element("section", "panel padded") as made:
        if title:
            with element("div"):
                text(title, "h2")
                if lead:
                    text(lead, "p", "muted small")
        yield made


@contextmanager
def empty(icon: str, title: str, next_step: str) -> Iterator[None]:
    """What stands where there is nothing yet: what it is, and what to do next."""
    with element("div", "empty"):
        ui.icon(icon).props('aria-hidden="true"')
        text(title, "h2")
        text(next_step, "p")
        yield


@contextmanager
def empty_panel(icon: str, title: str, next_step: str) -> Iterator[None]:
    """The same in a panel of its own."""
    with element("section", "panel"), empty(icon, title, next_step):
        yield


@contextmanager
def notice(kind: str, title: str = "") -> Iterator[None]:
    """`kind`: bad, good or note."""
    icons = {"bad": "error_outline", "good": "check_circle", "note": "info_outline"}
    with element("div", f"notice {kind}").props('role="status"'):
        ui.icon(icons[kind]).props('aria-hidden="true"')
        with element("div"):
            if title:
                text(title, "h3")
            yield


def fact(label: str, value: str, classes: str = "") -> Text:
    """One of a `dl.facts`; the value's element, which can be changed."""
    with element("div", classes):
        text(label, "dt")
        return text(value, "dd")


def metric_label(texts: Texts, name: str) -> str:
    return texts.or_word(f"metric.{name}", metric_of(name).label)


def duration(texts: Texts, seconds: float | None) -> str:
    """`3 min 20 s`; a dash for what is not known."""
    if seconds is None:
        return texts("none")
    whole = max(0, round(seconds))
    minutes, s = divmod(whole, 60)
    hours, m = divmod(minutes, 60)
    days, h = divmod(hours, 24)
    if days:
        return texts("duration.d", d=days, h=h)
    if hours:
        return texts("duration.h", h=h, m=m)
    return texts("duration.m", m=m, s=s) if minutes else texts("duration.s", s=s)


def size_text(count: int) -> str:
    """Bytes with a decimal unit: 23.4 MB."""
    value = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.3g} {unit}"
        value /= 1000
    return f"{value:.3g} TB"


def count_text(count: float | None) -> str:
    """11.7 M, 1.81 G: parameters and multiply-accumulates."""
    if count is None:
        return "–"
    for limit, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if count >= limit:
            return f"{count / limit:.3g} {unit}"
    return f"{count:.0f}"
