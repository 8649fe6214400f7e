"""The figures of a report, as plotly figures."""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import plotly.graph_objects as go

from train.report.collect import Collection, Run
from train.report.compare import CONTROL_SUFFIX, Difference, label_of, pareto_front

# Okabe and Ito's palette, told apart by colour-blind readers; its blue is lighter here, to be seen on black, too.
COLOURS = ("#2B83D0", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#8C8C00", "#7A7A7A")
COSTS = {
    "parameters": "parameters",
    "macs": "multiply-accumulates per image",
    "latency_ms": "latency, ms per image",
    "wall_time_s": "training time, s",
}
PERCENT = ",.1%"
LOG_FROM = 4  # costs that differ by more are shown on a logarithmic axis
COUNTED_CLASSES = 15  # a confusion matrix of more has its counts in the tooltips alone
LONGEST_NAME = 24
FEW_EPOCHS = 20  # so many points of a curve are marked


def colour(index: int) -> str:
    return COLOURS[index % len(COLOURS)]


def scatter(collection: Collection, cost: str, ceilings: dict[str, float]) -> go.Figure | None:
    """Quality against one cost, Pareto front marked; None when no run states that cost."""
    metric = collection.headline
    runs = [run for run in collection.runs if run.summary.get(cost) and metric in run.metrics]
    if not runs:
        return None
    figure = go.Figure()
    groups: dict[tuple[str, bool], list[Run]] = defaultdict(list)
    for run in runs:
        groups[(run.group, run.is_control)].append(run)
    colours = {group: colour(index) for index, group in enumerate(dict.fromkeys(run.group for run in runs))}
    for (group, is_control), members in groups.items():
        figure.add_scatter(
            x=[float(run.summary[cost]) for run in members],
            y=[run.metrics[metric] for run in members],
            mode="markers",
            name=f"{group}, control" if is_control else f"{group}, distilled",
            text=[run.name for run in members],
            hovertemplate="%{text}<br>%{x:,.4g}<br>%{y:.1%}<extra></extra>",
            marker={
                "size": 11,
                "symbol": "circle-open" if is_control else "circle",
                "color": colours[group],
                "line": {"width": 2, "color": colours[group]},
            },
        )
    points = [(float(run.summary[cost]), run.metrics[metric]) for run in runs]
    front = [points[index] for index in pareto_front(points)]
    figure.add_scatter(
        x=[x for x, _ in front],
        y=[y for _, y in front],
        mode="lines+markers",
        name="Pareto front",
        line={"dash": "dot", "width": 2, "color": "#7A7A7A", "shape": "hv"},
        marker={"size": 18, "symbol": "circle-open", "color": "#7A7A7A"},
        hoverinfo="skip",
    )
    places = itertools.cycle(("top left", "bottom right"))  # two lines may lie on one another
    for (name, value), place in zip(ceilings.items(), places, strict=False):
        line = {"dash": "dash", "width": 1, "color": "#7A7A7A"}
        figure.add_hline(y=value, line=line, annotation_text=name, annotation_position=place)
    costs = [x for x, _ in points]
    logarithmic = max(costs) > LOG_FROM * min(costs)
    figure = finish(figure, COSTS[cost], metric, log_x=logarithmic)
    if max(costs) < 1.05 * min(costs):  # one student: its size is no axis to zoom into
        figure.update_xaxes(range=[0.5 * min(costs), 1.5 * max(costs)])
    figure.update_yaxes(range=share_range([*(y for _, y in points), *ceilings.values()]))
    return figure


def share_range(values: Sequence[float]) -> list[float]:
    """An axis around shares of one: room at both ends, but not beyond 0 and 1."""
    low, high = min(values), max(values)
    room = max(0.02, 0.15 * (high - low))
    return [max(low - room, -0.02), min(high + room, 1.02)] if high <= 1 else [low - room, high + room]


def curves(collection: Collection, name: str) -> go.Figure | None:
    """One value of metrics.jsonl over the epochs, a line a run; repetitions and their controls share a colour."""
    figure = go.Figure()
    several = len({run.group for run in collection.runs}) > 1
    names = {
        run.folder: f"{run.group}: {label_of(run)}" if several else label_of(run) for run in collection.runs
    }
    bases = dict.fromkeys(name.removesuffix(CONTROL_SUFFIX) for name in names.values())
    colours = {base: colour(index) for index, base in enumerate(bases)}
    seen: set[str] = set()
    epochs = max((len(run.records) for run in collection.runs), default=0)
    for run in collection.runs:
        points = [(record["epoch"], record[name]) for record in run.records if record.get(name) is not None]
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
            text=[run.name] * len(points),
            hovertemplate="%{text}<br>epoch %{x}: %{y:.4g}<extra></extra>",
            line={
                "color": colours[label.removesuffix(CONTROL_SUFFIX)],
                "dash": "dot" if run.is_control else "solid",
            },
        )
        seen.add(label)
    if not seen:
        return None
    figure = finish(figure, "epoch", name, percent=name == collection.headline)
    figure.update_xaxes(dtick=max(1, math.ceil(epochs / 8)))
    if name == collection.headline:
        figure.update_yaxes(range=share_range([y for trace in figure.data for y in trace.y]))
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
        marker={"color": [COLOURS[2] if item.mean >= 0 else COLOURS[3] for item in ordered]},
        error_x={
            "type": "data",
            "symmetric": True,
            "color": "#7A7A7A",
            "array": [0.0 if item.high is None else item.high - item.mean for item in ordered],
        },
        hovertemplate="%{y}<br>%{x:+.1%}<extra></extra>",
    )
    figure.add_vline(x=0, line={"width": 1, "color": "#7A7A7A"})
    figure = finish(figure, f"gain in {metric}", None)
    figure.update_xaxes(tickformat="+,.1%")
    figure.update_layout(height=160 + 44 * len(ordered), showlegend=False)
    figure.update_yaxes(automargin=True)
    return figure


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
    for size, letter in ((1_000_000, "M"), (1_000, "k")):
        if count >= size:
            share = count / size
            return f"{share:.1f}{letter}" if share < 9.95 else f"{share:.0f}{letter}"
    return str(count)


def short_names(names: Sequence[str]) -> list[str]:
    """Names for an axis: long ones are cut, and kept apart by their number where that makes them equal."""
    cut = [name if len(name) <= LONGEST_NAME else name[: LONGEST_NAME - 1] + "…" for name in names]
    return [name if cut.count(name) == 1 else f"{name} ({index})" for index, name in enumerate(cut)]


def class_bars(class_names: Sequence[str], values: Sequence[float], what: str) -> go.Figure:
    """One bar a class, worst first."""
    order = sorted(range(len(values)), key=lambda index: values[index])
    figure = go.Figure(
        go.Bar(
            x=[class_names[index] for index in order],
            y=[values[index] for index in order],
            marker={"color": COLOURS[0]},
            hovertemplate="%{x}<br>%{y:.1%}<extra></extra>",
        )
    )
    figure = finish(figure, "class", what)
    figure.update_xaxes(type="category")
    figure.update_yaxes(range=[0, 1.02])
    return figure


def finish(
    figure: go.Figure, x_title: str, metric: str | None, log_x: bool = False, percent: bool = True
) -> go.Figure:
    """What all figures share: titles, transparent ground (the page has the colour), room for the legend."""
    figure.update_layout(
        xaxis_title=x_title,
        yaxis_title=metric,
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        margin={"l": 60, "r": 16, "t": 40, "b": 50},
        height=420,
        legend={"orientation": "h", "y": -0.25},
        hoverlabel={"namelength": -1},
    )
    grid: dict[str, Any] = {"gridcolor": "rgba(128,128,128,0.25)", "zerolinecolor": "rgba(128,128,128,0.5)"}
    figure.update_xaxes(**grid, type="log" if log_x else None)
    figure.update_yaxes(**grid, tickformat=PERCENT if metric and percent else None)
    return figure
