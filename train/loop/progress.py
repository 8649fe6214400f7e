"""Where a run stands: saved in every `last.pt`, so that a resumed run takes the very next step."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields
from typing import Any


@dataclass
class Progress:
    """`epoch`: epochs finished; `step`: optimizer steps finished in the running one; `global_step`: in all.

    `sums`: Σ value · samples of each loss over the running epoch; `seconds`: training time of the running epoch;
    `history`: the lines of metrics.jsonl.
    """

    epoch: int = 0
    step: int = 0
    global_step: int = 0
    samples: float = 0.0
    sums: dict[str, float] = field(default_factory=dict)
    seconds: float = 0.0
    wall_time_s: float = 0.0
    trained_samples: float = 0.0
    trained_seconds: float = 0.0
    best_epoch: int = 0
    best_value: float | None = None
    best_metrics: dict[str, float] = field(default_factory=dict)
    best_details: dict[str, float] = field(default_factory=dict)
    stale_epochs: int = 0
    history: list[dict[str, Any]] = field(default_factory=list)

    def add_step(self, seconds: float) -> None:
        """Count one finished optimizer step."""
        self.step += 1
        self.global_step += 1
        self.seconds += seconds

    def add_losses(self, losses: dict[str, float], samples: float) -> None:
        """Count the losses of a step of `samples` samples in the epoch's means."""
        self.samples += samples
        for name, value in losses.items():
            self.sums[name] = self.sums.get(name, 0.0) + value * samples

    def mean_losses(self) -> dict[str, float]:
        """The running epoch's mean of each loss over its samples."""
        return {name: total / max(self.samples, 1.0) for name, total in self.sums.items()}

    def finish_epoch(self, record: dict[str, Any]) -> None:
        """The running epoch is validated; the next begins."""
        self.history.append(record)
        self.epoch += 1
        self.trained_samples += self.samples
        self.trained_seconds += self.seconds
        self.step, self.samples, self.seconds, self.sums = 0, 0.0, 0.0, {}

    def note_value(
        self, value: float, epoch: int, metrics: dict[str, float], details: dict[str, float]
    ) -> bool:
        """Remember the best epoch; True when `value` (higher is better) is the best so far."""
        if self.best_value is not None and not value > self.best_value:
            self.stale_epochs += 1
            return False
        self.best_value, self.best_epoch, self.stale_epochs = value, epoch, 0
        self.best_metrics, self.best_details = metrics, details
        return True

    def to_dict(self) -> dict[str, Any]:
        """Plain types, a copy."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Progress:
        known = {item.name for item in fields(cls)}
        return cls(**{name: value for name, value in values.items() if name in known})
