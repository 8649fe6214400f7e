"""The demo's last lines: what the student gained from the teacher, in words, from what the report has measured."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

from commands.verdict import CEILINGS
from store.format import MEASURED_FILE

WIDTH = 38  # characters of the first column


class Comparison(NamedTuple):
    """The same student on the labels alone and with the teacher: the metric's value by seed. `alone` may be empty."""

    metric: str
    samples: int
    alone: Mapping[int, float]
    taught: Mapping[int, float]


def comparison_lines(store: Path, sweep: Path) -> list[str]:
    """What a sweep of one student with controls shows, for people. `cli report` has written `results.csv`."""
    compared = read_results(sweep / "results.csv")
    return describe(compared, probe_result(store, compared.metric))


def read_results(path: Path) -> Comparison:
    """The rows of a report's `results.csv`: one for each seed, with and without the teacher."""
    from train.metrics import headline_of

    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    metric = headline_of(name for name, value in rows[0].items() if value)
    if metric is None:
        raise ValueError(f"{path}: no metric among {', '.join(rows[0])}")
    values: dict[bool, dict[int, float]] = {True: {}, False: {}}
    for row in rows:
        values[row["control"] == "True"][int(row["seed"])] = float(row[metric])
    return Comparison(metric, int(rows[0]["validation_samples"]), values[True], values[False])


def probe_result(store: Path, metric: str) -> float | None:
    """What a probe of the teacher's features reached on the validation split; None where it has no such metric."""
    path = store / MEASURED_FILE
    measured = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    value = measured.get(CEILINGS.get(metric, ""))
    return None if value is None else float(value)


def describe(compared: Comparison, probe: float | None) -> list[str]:
    """A title, a line for each side, and what the difference means."""
    from train.metrics import label_of

    metric = compared.metric
    rows = [("the student with the teacher", compared.taught)]
    if compared.alone:
        rows.insert(0, ("the same student on the labels alone", compared.alone))
    lines = [
        f"On {compared.samples:,} validation samples, {label_of(metric)} of the best epoch of each training:"
    ]
    if probe is not None:
        lines.append("  " + "probe of the teacher's features".ljust(WIDTH) + shown(metric, probe))
    for name, values in rows:
        seeds = ", ".join(f"seed {seed}: {shown(metric, values[seed])}" for seed in sorted(values))
        lines.append(f"  {name.ljust(WIDTH)}{shown(metric, fmean(values.values()))}  ({seeds})")
    return [*lines, verdict(compared)] if compared.alone else lines


def verdict(compared: Comparison) -> str:
    """Whether the teacher helped, and how sure that is: only a gain with every seed counts as one."""
    from train.metrics import is_share

    gains = {seed: compared.taught[seed] - compared.alone[seed] for seed in sorted(compared.taught)}
    mean = fmean(gains.values())
    points = is_share(compared.metric)

    def text(gain: float) -> str:
        return f"{100 * gain:+.1f} points" if points else f"{gain:+.4f}"

    each = f"{text(mean)} (" + ", ".join(f"seed {seed}: {text(gain)}" for seed, gain in gains.items()) + ")"
    if min(gains.values()) > 0:
        words = f"With the teacher the student is better: {each}."
    elif max(gains.values()) <= 0:
        words = f"With the teacher the student is not better: {each}."
    else:
        words = f"The seeds disagree, so no gain is shown: {each}."
    return words if len(gains) > 1 else f"{words} One seed shows little."


def shown(metric: str, value: float) -> str:
    from train.metrics import is_share

    return f"{100 * value:.1f} %" if is_share(metric) else f"{value:.4f}"
