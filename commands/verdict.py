"""`cli probe STORE --student S`: a short control, and whether the teacher can be expected to help this student.

The control is the student that is trained later, without the teacher, for a twenty-fifth of the epochs: with the probe
that stays below 5 % of the training's cost. The teacher's
ceiling is what the probe reaches on the same validation rows (rows that it never saw).
"""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

#: The share of the planned epochs that the control is trained for.
SHARE = 0.04
#: The figure of the probe that bounds each metric of a student. A detector's mAP has none: the probe predicts no boxes.
CEILINGS = {"top1": "probe_top1", "miou": "probe_miou"}
#: Which part of the gap between control and ceiling distilled students have closed in our studies, least and most.
CLOSED = (1 / 3, 5 / 6)
#: Standard errors that a gap must exceed.
CERTAIN = 2.0


@dataclass(frozen=True)
class Verdict:
    """Numbers as fractions of 1. `ceiling` and `expected_gain` (least and most) are None where no probe bounds the metric.

    standard_error: of the control's metric, from the number of validation samples. cost_share: time of probe and control over
    the estimated time of the training.
    """

    student: str
    metric: str
    ceiling: float | None
    control: float
    control_epochs: int
    epochs: int
    validation_samples: int
    standard_error: float
    expected_gain: tuple[float, float] | None
    verdict: Literal["likely", "unlikely", "unclear"]
    reason: str
    cost_share: float


def judge_student(
    store: str, student: str, probed: Mapping[str, Any], probe_seconds: float, options: Mapping[str, Any]
) -> Verdict:
    """Train the control and compare. `options`: of `cli train`; those that are None are absent.

    Raises what a training raises.
    """
    from train.config import load_config
    from train.run import run_training

    given = {name: value for name, value in options.items() if value is not None}
    with tempfile.TemporaryDirectory(prefix="qwen-distill-control-") as folder:
        asked = {"store": store, "student": student, "out": Path(folder) / "run", **given}
        planned = load_config(asked).epochs
        epochs = max(1, round(SHARE * planned))
        began = time.monotonic()
        summary = run_training(load_config({**asked, "epochs": epochs, "control_only": True}))
        seconds = time.monotonic() - began
    metric = next((name for name in (*CEILINGS, "map50_95") if name in summary["metrics"]), "")
    return compare(
        summary["student"],
        metric,
        ceiling=probed.get(CEILINGS.get(metric, "")),
        control=summary["metrics"][metric],
        epochs=(epochs, planned),
        samples=summary["validation_samples"],
        # The epochs of a control of few labeled rows are shorter than those of the training, so this share is an upper bound.
        cost_share=(probe_seconds + seconds) / max(planned * seconds / epochs, 1e-9),
    )


def compare(
    student: str,
    metric: str,
    *,
    ceiling: float | None,
    control: float,
    epochs: tuple[int, int],
    samples: int,
    cost_share: float,
) -> Verdict:
    """The verdict from the numbers; see `Verdict`."""
    error = math.sqrt(max(control * (1 - control), 0.01) / max(samples, 1))
    gain, word = None, "unclear"
    if ceiling is None:
        reason = (
            f"no probe bounds {metric}: compare objectness and class accuracy of the cells with your needs"
        )
    else:
        gap = ceiling - control
        least, most = CLOSED[0] * max(0.0, gap - CERTAIN * error), CLOSED[1] * max(0.0, gap)
        gain = (least, most)
        if gap > CERTAIN * error:
            word = "likely"
            reason = f"the teacher's features know {100 * gap:.1f} points more than the control so far"
        elif gap < -CERTAIN * error:
            word = "unlikely"
            reason = f"the control is {-100 * gap:.1f} points above the teacher's ceiling after {epochs[0]} of {epochs[1]} epochs"
        else:
            reason = f"the difference of {100 * gap:+.1f} points is within the uncertainty of {samples} validation samples"
    return Verdict(
        student=student,
        metric=metric,
        ceiling=ceiling,
        control=control,
        control_epochs=epochs[0],
        epochs=epochs[1],
        validation_samples=samples,
        standard_error=error,
        expected_gain=gain,
        verdict=word,  # type: ignore[arg-type]
        reason=reason,
        cost_share=cost_share,
    )


def verdict_lines(verdict: Mapping[str, Any]) -> list[str]:
    """The verdict for people, also in the report."""
    from train.metrics import label_of, text_of

    metric = verdict["metric"]
    ceiling = "none" if verdict["ceiling"] is None else text_of(metric, verdict["ceiling"])
    lines = [
        f"{label_of(metric)}: teacher's ceiling {ceiling}, control of {verdict['student']} so far "
        f"{text_of(metric, verdict['control'])} ± {100 * verdict['standard_error']:.1f} "
        f"({verdict['control_epochs']} of {verdict['epochs']} epochs, {verdict['validation_samples']:,} samples)"
    ]
    if verdict["expected_gain"] is not None:
        least, most = verdict["expected_gain"]
        lines.append(
            f"expected gain: {100 * least:.1f} to {100 * most:.1f} points, if the control stays where it is"
        )
    lines.append(f"will the teacher help: {verdict['verdict']}, {verdict['reason']}")
    lines.append(
        f"this answer took {100 * verdict['cost_share']:.1f}% of the training's estimated time, or less"
    )
    return lines
