"""The figures of a report, as plotly figures."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import plotly.graph_objects as go

from train.metrics import gain_text, is_share, text_of
from train.metrics import label_of as metric_label
from train.report.runs import CONTROL_SUFFIX, Collection, Difference, FinishedRun, label_of, pareto_front

# Okabe and Ito's palette, distinguishable for color-blind readers; its blue is lighter here, so that it is visible on black as well.
COLORS = ("#2B83D0", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#8C8C00", "#7A7A7A")
GRAY = "#7A7A7A"
# Summary fields that quality is drawn against, and the words of the axis.
COSTS = {
    "parameters": "parameters",
    "macs": "multiply-accumulates per image",
    "latency_ms": "latency, ms per image",
    "wall_time_s": "training time, s",
}
LOG_FROM = 4  # costs that differ by more are shown on a logarithmic axis
COUNTED_CLASSES = 15  # a confusion matrix of more has its counts in the tooltips alone
LONGEST_NAME = 24
FEW_EPOCHS = 20  # so many points of a curve are marked
LEGEND_LIMIT = 12  # more lines than this are named in the tooltips alone
SMALLEST_GAIN = {True: 0.005, False: 0.0005}  # half the axis at least, for shares and for other numbers


def color(index: int) -> str:
    return COLORS[index % len(COLORS)]


def scatter(collection: Collection, cost: str, ceilings: dict[str, float]) -> go.Figure | None:
    """Quality against one cost, Pareto front marked; None when no run states that cost."""
    metric = collection.headline
    runs = [run for run in collection.runs if run.summary.get(cost) and metric in run.metrics]
    if not runs:
        return None
    figure = go.Figure()
    groups: dict[tuple[str, bool], list[FinishedRun]] = defaultdict(list)
    for run in runs:
        groups[(run.group, run.is_control)].append(run)
    colors = {group: color(index) for index, group in enumerate(dict.fromkeys(run.group for run in runs))}
    for (group, is_control), members in groups.items():
        figure.add_scatter(
            x=[float(run.summary[cost]) for run in members],
            y=[run.metrics[metric] for run in members],
            mode="markers",
            name=f"{group}, control" if is_control else f"{group}, distilled",
            text=[f"{run.name}<br>{text_of(metric, run.metrics[metric])}" for run in members],
            hovertemplate="%{text}<br>%{x:,.4g}<extra></extra>",
            marker={
                "size": 11,
                "symbol": "circle-open" if is_control else "circle",
                "color": colors[group],
                "line": {"width": 2, "color": colors[group]},
            },
        )
    points = [(float(run.summary[cost]), run.metrics[metric]) for run in runs]
    front = [points[index] for index in pareto_front(points)]
    figure.add_scatter(
        x=[x for x, _ in front],
        y=[y for _, y in front],
        mode="lines+markers",
        name="Pareto front",
        line={"dash": "dot", "width": 2, "color": GRAY, "shape": "hv"},
        marker={"size": 18, "symbol": "circle-open", "color": GRAY},
        hoverinfo="skip",
    )
    add_ceilings(figure, ceilings, metric)
    costs = [x for x, _ in points]
    figure = finish(figure, COSTS[cost], metric)
    if max(costs) > LOG_FROM * min(costs):
        ticks = log_ticks(min(costs), max(costs))
        figure.update_xaxes(
            type="log",
            tickvals=ticks,
            ticktext=[f"{tick:,.6g}" if tick < 10_000 else compact(int(tick)) for tick in ticks],
        )
    if max(costs) < 1.05 * min(costs):  # one student: its size is no axis to zoom into
        figure.update_xaxes(range=[0.5 * min(costs), 1.5 * max(costs)])
    figure.update_yaxes(range=value_range(metric, [*(y for _, y in points), *ceilings.values()]))
    return figure


def add_ceilings(figure: go.Figure, ceilings: dict[str, float], metric: str) -> None:
    """A dashed line for each, named at its right end: the highest above its line, the others below."""
    ordered = sorted(ceilings.items(), key=lambda item: -item[1])
    for index, (name, value) in enumerate(ordered):
        figure.add_hline(
            y=value,
            line={"dash": ("dash", "longdash", "dashdot")[index % 3], "width": 1, "color": GRAY},
            annotation_text=f"{name} {text_of(metric, value)}",
            annotation_position="top right" if index == 0 else "bottom right",
        )


def value_range(metric: str, values: Sequence[float]) -> list[float]:
    """An axis around the values with room at both ends; of shares not beyond 0 and 1."""
    low, high = min(values), max(values)
    room = max(0.02, 0.15 * (high - low))
    return [max(low - room, -0.02), min(high + room, 1.02)] if is_share(metric) else [low - room, high + room]


def curves(collection: Collection, name: str, *, phase_one: bool = False) -> go.Figure | None:
    """One value of metrics.jsonl over the epochs, a line a run; repetitions and their controls share a color."""
    figure = go.Figure()
    several = len({run.group for run in collection.runs}) > 1
    names = {
        run.folder: f"{run.group}: {label_of(run)}" if several else label_of(run) for run in collection.runs
    }
    bases = dict.fromkeys(name.removesuffix(CONTROL_SUFFIX) for name in names.values())
    colors = {base: color(index) for index, base in enumerate(bases)}
    seen: set[str] = set()
    lines = {run.folder: run.phase_one if phase_one else run.records for run in collection.runs}
    epochs = max((len(records) for records in lines.values()), default=0)
    for run in collection.runs:
        records = lines[run.folder]
        points = [(record["epoch"], record[name]) for record in records if record.get(name) is not None]
        if not points:
            continue
        label = names[run.folder]
        figure.add_scatter(
            x=[x for x, _ in points],
            y=[y for _, y in points],
            mode="lines+markers" if epochs <= FEW_EPOCHS else "lines",
            name=label,
            legendgroup=label,
            showlegend=label not in seen,
            text=[f"{run.name}<br>epoch {x}: {text_of(name, y)}" for x, y in points],
            hovertemplate="%{text}<extra></extra>",
            line={
                "color": colors[label.removesuffix(CONTROL_SUFFIX)],
                "dash": "dot" if run.is_control else "solid",
            },
        )
        seen.add(label)
    if not seen:
        return None
    figure = finish(figure, "epoch", name)
    figure.update_xaxes(dtick=max(1, math.ceil(epochs / 8)))
    figure.update_layout(showlegend=len(seen) <= LEGEND_LIMIT)
    if name == collection.headline:
        figure.update_yaxes(range=value_range(name, [y for trace in figure.data for y in trace.y]))
    return figure


def gain_bars(differences: Sequence[Difference], metric: str) -> go.Figure | None:
    """Mean gain over the control with its 95 % interval."""
    if not differences:
        return None
    ordered = sorted(differences, key=lambda item: item.mean)
    figure = go.Figure()
    figure.add_bar(
        x=[item.mean for item in ordered],
        y=[f"{item.label}<br>{item.pairs} pair{'s' if item.pairs > 1 else ''}" for item in ordered],
        orientation="h",
        marker={"color": [COLORS[2] if item.mean >= 0 else COLORS[3] for item in ordered]},
        error_x={
            "type": "data",
            "symmetric": True,
            "color": GRAY,
            "array": [0.0 if item.high is None else item.high - item.mean for item in ordered],
        },
        text=[gain_text(metric, item.mean) for item in ordered],
        textposition="none",
        hovertemplate="%{y}<br>%{text}<extra></extra>",
    )
    figure.add_vline(x=0, line={"width": 1, "color": GRAY})
    figure = finish(figure, f"gain in {metric_label(metric)}", None)
    ends = [end for item in ordered for end in (item.mean, item.low, item.high) if end is not None]
    low, high = gain_range(ends, SMALLEST_GAIN[is_share(metric)])
    ticks = even_ticks(low, high)
    figure.update_xaxes(
        range=[low, high], tickvals=ticks, ticktext=[tick_text(metric, tick) for tick in ticks]
    )
    figure.update_layout(height=160 + 44 * len(ordered), showlegend=False)
    figure.update_yaxes(automargin=True)
    return figure


def gain_range(ends: Sequence[float], smallest: float) -> tuple[float, float]:
    """An axis that holds zero and all `ends`, and is never so narrow that noise fills it."""
    low, high = min(0.0, *ends), max(0.0, *ends)
    room = 0.1 * max(high - low, smallest)
    return min(low - room, -smallest), max(high + room, smallest)


def even_ticks(low: float, high: float) -> list[float]:
    """About six round numbers from `low` to `high`, zero among them."""
    rough = (high - low) / 6
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough)
    return [round(index * step, 12) for index in range(math.ceil(low / step), math.floor(high / step) + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """1, 2 and 5 times the powers of ten around `low` and `high`; only the powers where they are many."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    factors = (1, 2, 5) if len(powers) <= 4 else (1,)
    return [factor * 10.0**power for power in powers for factor in factors]


def tick_text(metric: str, value: float) -> str:
    if value == 0:
        return "±0"
    return f"{100 * value:+.4g}%" if is_share(metric) else f"{value:+.4g}"


def confusion(matrix: Sequence[Sequence[int]], class_names: Sequence[str], title: str) -> go.Figure:
    """Rows are true classes, columns predicted ones: colored by the share of the row, with the counts."""
    shares = [[value / max(sum(row), 1) for value in row] for row in matrix]
    names = short_names(class_names)
    few = len(names) <= COUNTED_CLASSES
    figure = go.Figure(
        go.Heatmap(
            z=shares,
            x=names,
            y=names,
            customdata=[list(row) for row in matrix],
            text=[[compact(value) if value else "" for value in row] for row in matrix] if few else None,
            texttemplate="%{text}" if few else None,
            colorscale="Blues",
            zmin=0,
            zmax=1,
            hovertemplate="true %{y}<br>predicted %{x}<br>%{customdata:,} (%{z:.1%} of the row)<extra></extra>",
            colorbar={"tickformat": ".0%"},
        )
    )
    figure = finish(figure, "predicted", None)
    figure.update_layout(title=title, height=min(900, 300 + 24 * len(names)))
    figure.update_yaxes(title="true", autorange="reversed", type="category", automargin=True)
    figure.update_xaxes(type="category", automargin=True)
    return figure


def compact(count: int) -> str:
    """A count in at most five characters: 950, 9.5k, 95k, 9.5M."""
    for size, letter in ((1_000_000_000, "G"), (1_000_000, "M"), (1_000, "k")):
        if count >= size:
            share = count / size
            return (f"{share:.1f}" if share < 9.95 else f"{share:.0f}").removesuffix(".0") + letter
    return str(count)


def short_names(names: Sequence[str]) -> list[str]:
    """Names for an axis: long ones are cut, and kept apart by their number where that makes them equal."""
    cut = [name if len(name) <= LONGEST_NAME else name[: LONGEST_NAME - 1] + "…" for name in names]
    return [name if cut.count(name) == 1 else f"{name} ({index})" for index, name in enumerate(cut)]


def class_bars(class_names: Sequence[str], values: Sequence[float], what: str) -> go.Figure:
    """One bar a class, worst first; `what` is a share of one."""
    order = sorted(range(len(values)), key=lambda index: values[index])
    names = short_names(class_names)
    figure = go.Figure(
        go.Bar(
            x=[names[index] for index in order],
            y=[values[index] for index in order],
            marker={"color": COLORS[0]},
            hovertemplate="%{x}<br>%{y:.1%}<extra></extra>",
        )
    )
    figure = finish(figure, "class", None)
    figure.update_xaxes(type="category", automargin=True)
    figure.update_yaxes(title=what, range=[0, 1.02], tickformat=".0%")
    return figure


def finish(figure: go.Figure, x_title: str, metric: str | None) -> go.Figure:
    """What all figures share: titles, transparent ground (the page has the color), room for the legend.

    `metric` names the vertical axis and its format; None leaves both to the figure.
    """
    figure.update_layout(
        xaxis_title=x_title,
        yaxis_title=metric and metric_label(metric),
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        margin={"l": 60, "r": 16, "t": 40, "b": 50},
        height=420,
        legend={"orientation": "h", "y": -0.25},
        hoverlabel={"namelength": -1},
    )
    grid: dict[str, Any] = {"gridcolor": "rgba(128,128,128,0.25)", "zerolinecolor": "rgba(128,128,128,0.5)"}
    figure.update_xaxes(**grid)
    figure.update_yaxes(**grid, tickformat=",.1%" if metric and is_share(metric) else None)
    return figure
