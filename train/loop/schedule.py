"""Learning rate as a function of the step."""

from __future__ import annotations

import math


def warmup_steps(warmup_epochs: float, steps_per_epoch: int, total_steps: int) -> int:
    """Length of the linear warm-up: as asked, but at most a fifth of the run."""
    return min(round(warmup_epochs * steps_per_epoch), total_steps // 5)


def learning_rate_at(step: int, *, total: int, warmup: int, kind: str, peak: float) -> float:
    """The rate of optimizer step `step` (from 0) of `total`.

    It rises linearly to `peak` during the `warmup` steps; cosine and linear then reach 0 exactly when the last
    step is done (step `total`), so the last step itself still learns.
    """
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = min(1.0, (step - warmup) / max(1, total - warmup))
    if kind == "cosine":
        return peak * 0.5 * (1 + math.cos(math.pi * progress))
    return peak * (1 - progress) if kind == "linear" else peak
