"""Curves of a run as options of Apache ECharts (bundled with NiceGUI), in colors that both themes can show."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from backend.server.results import headline_of, metric_of
from frontend.layout import metric_label
from frontend.texts import Texts

COLORS = ("#4f74f0", "#e08a3c", "#2f9e72", "#a66bd4", "#d45b77", "#4aa3b5")
AXIS = "#8b95a5"
LINES = "rgba(139, 149, 165, 0.22)"
LOSSES = ("train_loss", "val_loss", "hard_loss", "feature_loss", "logit_loss")

Records = Sequence[Mapping[str, Any]]


def loss_chart(texts: Texts, records: Records) -> dict[str, Any]:
    """The losses that the run has; the weighted ones first."""
    names = [name for name in LOSSES if any(number(record.get(name)) is not None for record in records)]
    # A single term is the whole loss: one line is enough.
    if sum(name in names for name in LOSSES[2:]) == 1:
        names = [name for name in names if name in LOSSES[:2]]
    return line_chart(texts, [(texts(f"loss.{name}"), points(records, name)) for name in names])


def metric_chart(texts: Texts, records: Records) -> tuple[str, dict[str, Any]]:
    """The label of the metric that counts, and its curve (shares in percent)."""
    name = headline_of(
        [key for record in records for key, value in record.items() if number(value) is not None]
    )
    if name is None:
        return texts("chart.metric"), line_chart(texts, [])
    metric = metric_of(name)
    factor = 100.0 if metric.kind == "share" else 1.0
    unit = "%" if metric.kind == "share" else ""
    curve = [[epoch, round(value * factor, 4)] for epoch, value in points(records, name)]
    label = metric_label(texts, name)
    return label, line_chart(texts, [(label, curve)], unit)


def rate_chart(texts: Texts, records: Records) -> dict[str, Any]:
    return line_chart(texts, [(texts("chart.rate"), points(records, "learning_rate"))])


def line_chart(
    texts: Texts, curves: Sequence[tuple[str, list[list[float]]]], unit: str = ""
) -> dict[str, Any]:
    legend_height = 20 if len(curves) < 2 else 40 if len(curves) < 4 else 64
    return {
        "color": list(COLORS),
        "animation": False,
        "textStyle": {"fontFamily": "inherit"},
        "grid": {"left": 4, "right": 16, "top": legend_height, "bottom": 28, "containLabel": True},
        "legend": {
            "show": len(curves) > 1,
            "top": 4,
            "left": 0,
            "icon": "roundRect",
            "itemWidth": 14,
            "itemHeight": 3,
            "itemGap": 14,
            "textStyle": {"color": AXIS, "fontSize": 12},
        },
        "tooltip": {"trigger": "axis", "confine": True, "textStyle": {"fontSize": 12}},
        "xAxis": {
            "type": "value",
            "name": texts("chart.epoch"),
            "nameLocation": "middle",
            "nameGap": 26,
            "nameTextStyle": {"color": AXIS, "fontSize": 12},
            "minInterval": 1,
            "min": 1,
            "max": "dataMax",
            "axisLabel": {"color": AXIS, "hideOverlap": True},
            "axisLine": {"lineStyle": {"color": LINES}},
            "axisTick": {"show": False},
            "splitLine": {"show": False},
        },
        "yAxis": {
            "type": "value",
            "scale": True,
            "splitNumber": 4,
            "axisLabel": {"color": AXIS, "formatter": f"{{value}}{unit}"},
            "axisLine": {"show": False},
            "axisTick": {"show": False},
            "splitLine": {"lineStyle": {"color": LINES}},
        },
        "series": [
            {
                "type": "line",
                "name": name,
                "data": curve,
                "showSymbol": len(curve) < 30,
                "symbolSize": 5,
                "lineStyle": {"width": 2},
            }
            for name, curve in curves
        ],
    }


def points(records: Records, name: str) -> list[list[float]]:
    """[epoch, value] of the epochs that have a number of this name."""
    found = []
    for record in records:
        value = number(record.get(name))
        if value is not None and number(record.get("epoch")) is not None:
            found.append([float(record["epoch"]), value])
    return found


def number(value: Any) -> float | None:
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else None
