"""One YOLOv8 training as data: what the trainer, its ranks and the summary are given."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from train.config import TrainConfig
from train.students.yolo import YoloStudent
from train.yolo.model import plain_detector
from train.yolo.records import DetectionSplit


def ignore(trainer: Any) -> None:
    """The callback of a job that nobody watches."""


@dataclass
class TrainingJob:
    """One training, as the trainer sees it.

    `student.network` is what trains; `splits` are by name (train, val). `trainable`: names of the network's
    parameters that learn, None for all. `state` is what `training_state` gave, when resuming.
    `epoch_finished(trainer)` is called when an epoch is validated and its ultralytics files are written,
    `batch_finished(trainer)` after each batch, `training_finished(trainer)` at the very end.
    """

    config: TrainConfig
    run: Path
    arguments: dict[str, Any]
    class_names: tuple[str, ...]
    splits: dict[str, DetectionSplit]
    student: YoloStudent
    clip_norm: float
    workers: int
    bit_depth: int  # of 16-bit gray images, as the store was made
    trainable: set[str] | None = None
    state: dict[str, Any] | None = None
    epoch_finished: Callable[[Any], None] = ignore
    batch_finished: Callable[[Any], None] = ignore
    training_finished: Callable[[Any], None] = ignore

    def detector(self, network: Any) -> Any:
        """A copy of `network` (live or EMA) as ultralytics' plain model: no heads, LoRA merged."""
        return plain_detector(self.merged(network))

    def merged(self, network: Any) -> Any:
        """`network` itself, or with LoRA a copy whose adapters are merged into the weights; heads stay."""
        if not self.config.lora_rank:
            return network
        from train.lora import merge_lora

        merged: Any = merge_lora(YoloStudent(network, self.student.spec))
        return merged.network

    def freeze(self, network: Any) -> None:
        """Freeze again what does not learn; the trainer's set-up makes every parameter trainable."""
        for name, parameter in network.named_parameters():
            if self.trainable is not None and name not in self.trainable:
                parameter.requires_grad_(False)

    @property
    def batches_per_epoch(self) -> int:
        """Of all processes together; the last batch may be smaller."""
        return -(-len(self.splits["train"].records) // self.config.batch_size)

    @property
    def trainable_parameters(self) -> int:
        """How many numbers learn, alignment heads included; counted once the trainer is set up."""
        return sum(p.numel() for p in self.student.network.parameters() if p.requires_grad)
