"""What `train.run` gives to a trainer (`train.loop.trainer`, `train.yolo.fit`), and what it gets back."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

from processes.stop import StopDeadline
from store.reader import Store
from train.config import TrainConfig
from train.events import EventStream
from train.run_folder import RunFolder
from train.students.base import Student


@dataclass(frozen=True)
class FitRequest:
    """One training: of the student, of its control (the same on the task loss alone, at weight 1), or phase one.

    `asked` are the options as they were given, which a resumed run is compared with; `config` may have smaller batches.
    """

    config: TrainConfig
    asked: TrainConfig
    folder: RunFolder
    events: EventStream
    deadline: StopDeadline
    control: bool
    pretraining: bool = False


@dataclass(frozen=True)
class FitResult:
    """A finished training. `config` has the batches that it ended with.

    `details` are the fields of summary.json that only one of the trainers has.
    """

    config: TrainConfig
    student: Student
    num_classes: int
    validation_samples: int
    epochs_done: int
    best_epoch: int
    metrics: dict[str, float]
    per_class: dict[str, float | None]
    trainable_parameters: int
    wall_time_s: float
    images_per_second: float | None
    details: dict[str, Any] = field(default_factory=dict)


class Trainer(Protocol):
    """Built with a configuration; building it checks the options and opens the store."""

    config: TrainConfig
    store: Store
    task: str
    #: Of the running training, for messages.
    batch_size: int

    def fit(self, request: FitRequest) -> FitResult:
        """Train to the end in the folder, from the start or from its last.pt.

        Raises Stopped after a signal, and RuntimeError or MemoryError when the device has too little memory.
        """

    def reduce_batch(self, config: TrainConfig, folder: RunFolder) -> TrainConfig | None:
        """The configuration to try next when memory ran out; None when there is none."""


def validation_interval(
    validate_every: int | None, *, steps: int, train_samples: int, val_samples: int
) -> int:
    """Epochs between two validations of a training with `steps` optimizer steps an epoch.

    The default keeps at least as much training time between validations as a validation takes: a sample costs no more to
    validate than to train on. It follows from the sizes alone and not from measured times, so that a resumed run, a control and a
    repeated run validate after the same epochs, and choose their best among as many.
    """
    if validate_every is not None:
        return max(1, -(-validate_every // steps))
    return max(1, -(-val_samples // max(train_samples, 1)))


def is_validated(epoch: int, interval: int, epochs: int) -> bool:
    """Whether `epoch` (from 1) of `epochs` ends with a validation; the last one always does."""
    return epoch % interval == 0 or epoch == epochs
