"""The page itself: a jinja2 template with plotly's library and every picture inside."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
import plotly.graph_objects as go
import plotly.io
import plotly.offline
from markupsafe import Markup, escape

from train import metrics
from train.report.runs import Unfinished

TABLE_LIMIT = 2000


class Picture(NamedTuple):
    """A picture of the gallery: PNG or JPEG bytes, and what stands below it."""

    data: bytes
    caption: str

    @property
    def url(self) -> str:
        kind = "png" if self.data.startswith(b"\x89PNG") else "jpeg"
        return f"data:image/{kind};base64,{base64.b64encode(self.data).decode()}"


class LegendEntry(NamedTuple):
    """A class and its color in the pictures; None: it is not drawn."""

    name: str
    color: tuple[int, int, int] | None

    @property
    def css(self) -> str:
        return "transparent" if self.color is None else f"rgb{self.color}"


class Section(NamedTuple):
    title: str
    text: str
    figures: Sequence[go.Figure | None]
    pictures: Sequence[Picture] = ()
    wide: bool = False  # pictures that show more than one can tell from a small one
    legend: Sequence[LegendEntry] = ()


def render_page(
    title: str,
    subtitle: str,
    introduction: str,
    sections: Sequence[Section],
    rows: Sequence[dict[str, Any]],
    headlines: Sequence[str],
    unfinished: Sequence[Unfinished],
) -> str:
    """The whole HTML text; it loads nothing from anywhere."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["marked"] = marked
    columns = shown_columns(rows, headlines)
    return environment.get_template("page.html.j2").render(
        title=title,
        subtitle=subtitle,
        introduction=introduction,
        sections=[
            (section, [figure_html(f) for f in section.figures if f is not None]) for section in sections
        ],
        headings=[metrics.heading_of(name) for name in columns],
        rows=[[cell(name, row) for name in columns] for row in rows[:TABLE_LIMIT]],
        hidden_rows=max(0, len(rows) - TABLE_LIMIT),
        unfinished=unfinished,
        plotly_library=plotly.offline.get_plotlyjs(),
    )


def shown_columns(rows: Sequence[dict[str, Any]], headlines: Sequence[str]) -> list[str]:
    """Columns with at least one value, the headline metrics early."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    filled = [name for name in names if any(row.get(name) is not None for row in rows)]
    if not any(row.get("control") for row in rows):
        filled = [name for name in filled if name != "control"]
    several = len({row.get("sweep") for row in rows}) > 1
    lead = [name for name in ("run", *headlines, "gain_over_control", "sweep") if name in filled]
    shown = [*lead, *(name for name in filled if name not in lead)]
    return shown if several else [name for name in shown if name != "sweep"]


def cell(name: str, row: Mapping[str, Any]) -> dict[str, Any]:
    """What is shown and what is sorted by."""
    value = row.get(name)
    if value is None:
        return {"text": "", "sort": ""}
    if isinstance(value, bool):
        return {"text": "yes" if value else "", "sort": int(value)}
    if isinstance(value, float):
        text = metrics.shown_in_table(name, row)
        return {"text": text, "sort": value}
    if isinstance(value, int):
        return {"text": str(value) if name == "seed" else f"{value:,}", "sort": value}
    return {"text": str(value), "sort": str(value)}


def marked(text: str) -> Markup:
    """Text with its `commands` set as code; all else is escaped."""
    parts = str(escape(text)).split("`")
    return Markup("".join(f"<code>{part}</code>" if index % 2 else part for index, part in enumerate(parts)))


def figure_html(figure: go.Figure) -> str:
    return str(
        plotly.io.to_html(
            figure,
            include_plotlyjs=False,
            full_html=False,
            config={"responsive": True, "displayModeBar": False},
            default_width="100%",
        )
    )
