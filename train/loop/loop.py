"""The one training loop: every task and every student but YOLOv8 goes through it."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, fields
from hashlib import blake2b
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from console.progress import Progress as ProgressDisplay
from console.stop import Stopped, StopRequest
from train.config import TrainConfig
from train.data.batches import Batch, BatchLoader, group_sizes
from train.distill.mixing import draw_mixing, mix_images
from train.distill.objective import Objective, add_counts
from train.distill.projector import DistilledStudent
from train.errors import TrainError
from train.loop.evaluate import evaluate
from train.loop.optimizer import WeightAverage
from train.loop.saving import StepGuard
from train.ranks import sum_over_ranks, world_size


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


#: Steps on a GPU between two readings of their losses: each makes the CPU wait for the step before the newest.
READ_EVERY = 10


class NotFiniteError(TrainError):
    """A loss became NaN or infinite; the text names epoch, step and term."""


@dataclass
class Parts:
    """All that the loop is made of, built outside (train.run)."""

    config: TrainConfig
    accelerator: Accelerator
    module: DistilledStudent
    wrapped: nn.Module
    optimizer: Any
    objective: Objective
    val_objective: Objective
    train_loader: BatchLoader
    val_loader: BatchLoader
    normalize: Any
    guard: StepGuard
    progress: Progress
    average: WeightAverage | None
    stop: StopRequest


class Loop:
    """Trains epoch by epoch. The caller saves: `run` yields after every epoch, with the epoch's record.

    Losses stay on a GPU for a few steps, because reading them makes the CPU wait for it; `settle` reads them.
    """

    def __init__(self, parts: Parts) -> None:
        self.parts = parts
        self.display: ProgressDisplay | None = None
        self.save_within_epoch: Callable[[], None] = lambda: None
        self.device = parts.accelerator.device
        self.groups = group_sizes(len(parts.train_loader.batches.slices), parts.config.grad_accum_steps)
        self.total_steps = len(self.groups) * parts.config.epochs
        self.warmup = warmup_steps(parts.config.warmup_epochs, len(self.groups), self.total_steps)
        self.stop_seen = False
        self.lap_started = 0.0
        self.unread: list[StepLosses] = []
        self.reads_late = self.device.type == "cuda"

    def run(self) -> Iterator[dict[str, Any]]:
        """Yield one record per epoch; `progress` counts an epoch as finished once the caller has taken it."""
        progress, patience = self.parts.progress, self.parts.config.early_stopping_patience
        while progress.epoch < self.parts.config.epochs:
            if patience is not None and progress.stale_epochs >= patience:
                return
            started = time.monotonic()
            self.train_epoch()
            metrics = self.validate()
            losses = {name: value for name, value in metrics.items() if name.startswith("val_")}
            check_finite(losses, f"the validation of epoch {progress.epoch + 1}")
            yield self.record(metrics, time.monotonic() - started)

    def train_epoch(self) -> None:
        """The steps of the running epoch that are not done yet."""
        progress, loader = self.parts.progress, self.parts.train_loader
        sizes = self.groups[progress.step :]
        if not sizes:
            return
        batches = loader.epoch(progress.epoch, start=sum(self.groups[: progress.step]))
        self.parts.wrapped.train()
        self.lap_started = time.monotonic()
        for size in sizes:
            self.step([next(batches) for _ in range(size)])
            self.check_stop()
            self.save_within_epoch()
            # Saving is not training: its time does not count, what it waited for in `settle` does.
            self.lap_started = time.monotonic()
        with self.parts.guard.lock:
            self.settle()

    def lap(self) -> float:
        """Seconds since the last call. On a GPU a step only queues work: the sum is right, not each part."""
        now = time.monotonic()
        seconds, self.lap_started = now - self.lap_started, now
        return seconds

    def step(self, group: list[Batch]) -> None:
        """One optimizer step over the micro-batches of `group`."""
        parts, samples = self.parts, sum(batch.samples or 0.0 for batch in group)
        group = [batch.to(self.device) for batch in group]
        targets = [parts.objective.prepare(batch) for batch in group]
        counts = add_counts([parts.objective.counts(*pair) for pair in zip(group, targets, strict=True)])
        totals: dict[str, Tensor] = {}
        for index, batch in enumerate(group):
            last = index == len(group) - 1
            with contextlib.nullcontext() if last else parts.accelerator.no_sync(parts.wrapped):
                terms = self.forward(batch, targets[index], counts, index)
                # DDP averages gradients over ranks; the parts of the loss are to be added.
                parts.accelerator.backward(terms["loss"] * world_size())
            for name, value in terms.items():
                totals[name] = totals[name] + value.detach() if name in totals else value.detach()
        losses = self.share(totals, samples, self.clip())
        if not self.reads_late:
            losses.read()
        self.update(losses, samples)

    def forward(self, batch: Batch, targets: Any, counts: dict[str, Tensor], index: int) -> dict[str, Tensor]:
        """Losses of one micro-batch. Dropout depends on (seed, epoch, step) only, so any step can be repeated."""
        parts, config, progress = self.parts, self.parts.config, self.parts.progress
        torch.manual_seed(
            derive_seed(config.seed, progress.epoch, progress.step, index, parts.accelerator.process_index)
        )
        images, mixing = parts.normalize(batch.images), None
        if config.mixup_alpha or config.cutmix_alpha:
            mixing, box = draw_mixing(config.mixup_alpha, config.cutmix_alpha, images)
            images = mix_images(images, mixing, box)
        output = parts.wrapped(images, batch.lengths) if batch.lengths is not None else parts.wrapped(images)
        return parts.objective.losses(output, batch, targets, counts, mixing)

    def clip(self) -> Tensor | None:
        """Clip the gradients; their norm, None without clipping or where the loss scaler looks after infinities."""
        parts, config = self.parts, self.parts.config
        if not config.max_grad_norm:
            return None
        norm = parts.accelerator.clip_grad_norm_(parts.module.parameters(), config.max_grad_norm)
        return norm if parts.accelerator.scaler is None else None

    def share(self, totals: dict[str, Tensor], samples: float, norm: Tensor | None) -> StepLosses:
        """Sum the step's losses and samples over all ranks, in one exchange; a stop of any rank stops all."""
        progress, names = self.parts.progress, tuple(totals)
        values = torch.stack([value.float() for value in totals.values()]).double()
        # Filled on the device: a copy of two numbers from the host would be one more thing to wait for.
        known = [samples, float(self.parts.stop.requested)]
        filled = [torch.full((1,), value, dtype=values.dtype, device=self.device) for value in known]
        if norm is not None:
            filled.append(norm.detach().double().view(1))
        where = f"epoch {progress.epoch + 1}, step {progress.step + 1}"
        return StepLosses.of(where, names, sum_over_ranks(torch.cat([values, *filled])))

    def settle(self, leave: int = 0) -> None:
        """Count the losses of the last steps but `leave` in the epoch's means. The caller holds the guard's lock.

        Reading waits for the device, so this is where the time of its work is counted.
        Raises NotFiniteError for the first step whose loss is not finite.
        """
        if len(self.unread) <= leave:
            return
        while len(self.unread) > leave:
            losses, samples, stop = self.unread[0].read()
            self.parts.progress.add_losses(losses, samples)
            self.stop_seen = self.stop_seen or stop
            del self.unread[0]
        self.parts.progress.seconds += self.lap()

    def update(self, losses: StepLosses, samples: float) -> None:
        """Step, average; weights and progress change together."""
        parts, progress = self.parts, self.parts.progress
        rate = self.learning_rate(progress.global_step)
        with parts.guard.update():
            for group in parts.optimizer.param_groups:
                group["lr"] = rate
            parts.optimizer.step()
            parts.optimizer.zero_grad()
            if parts.average is not None:
                parts.average.update(parts.module.student)
            progress.add_step(self.lap())
            self.unread.append(losses)
            if not self.reads_late:
                self.settle()
            elif len(self.unread) > READ_EVERY:
                # The newest step stays unread: waiting for it would leave the GPU without work.
                self.settle(leave=1)
        if self.display is not None:
            self.display.advance(int(samples) * world_size())

    def learning_rate(self, step: int) -> float:
        config = self.parts.config
        return learning_rate_at(
            step,
            total=self.total_steps,
            warmup=self.warmup,
            kind=config.lr_scheduler,
            peak=config.learning_rate,
        )

    def check_stop(self) -> None:
        """Raise when a stop was asked for; the last finished step is what gets saved."""
        if self.stop_seen or (world_size() == 1 and self.parts.stop.requested):
            raise Stopped("stopped", self.parts.stop.exit_code)

    def validate(self) -> dict[str, float]:
        """Metrics on the validation split, of the averaged weights where there are any."""
        parts, module = self.parts, self.parts.module
        if parts.average is not None:
            averaged: Any = parts.average.student
            module = DistilledStudent(
                averaged, module.projector, cells=module.wants_cells, pooled=module.wants_pooled
            )
        batches = parts.val_loader.epoch(0)
        return evaluate(
            module,
            batches,
            parts.val_objective,
            self.device,
            parts.normalize,
            parts.accelerator.autocast,
            self.check_stop,
        )

    def record(self, metrics: dict[str, float], seconds: float) -> dict[str, Any]:
        """The epoch's line of metrics.jsonl."""
        progress = self.parts.progress
        means = progress.mean_losses()
        return {
            "epoch": progress.epoch + 1,
            "train_loss": means.pop("loss"),
            **dict.fromkeys(("hard_loss", "feature_loss", "logit_loss")),
            **means,
            "val_loss": metrics.pop("val_loss", None),
            **metrics,
            "learning_rate": self.learning_rate(progress.global_step - 1),
            "epoch_time_s": round(seconds, 3),
        }


class StepLosses(NamedTuple):
    """The losses of one step, float64 `values` by name, then samples, stop, and the gradient's norm where it is known.

    `values` are on their way to the host; `arrived` (None on a CPU) tells when they are there.
    """

    where: str
    names: tuple[str, ...]
    values: Tensor
    arrived: torch.cuda.Event | None

    @classmethod
    def of(cls, where: str, names: tuple[str, ...], values: Tensor) -> StepLosses:
        """Queue the copy to the host. Copied only when it is read, it would wait for the steps queued since."""
        if values.device.type != "cuda":
            return cls(where, names, values, None)
        host, arrived = values.to("cpu", non_blocking=True), torch.cuda.Event(blocking=True)
        arrived.record(torch.cuda.current_stream(values.device))
        return cls(where, names, host, arrived)

    def read(self) -> tuple[dict[str, float], float, bool]:
        """Losses by name, samples, and whether a rank was asked to stop. Raises NotFiniteError."""
        if self.arrived is not None:
            self.arrived.synchronize()
        found = self.values.tolist()
        values = dict(zip(self.names, found, strict=False))
        check_finite(values, self.where)
        samples, stop, *norm = found[len(self.names) :]
        # A finite loss may have gradients that are not; the weights must not take them.
        for value in norm:
            check_finite({"gradient norm": value}, self.where)
        return values, samples, stop > 0


def check_finite(values: dict[str, float], where: str) -> None:
    """Raise NotFiniteError that names the term and `where` (epoch and step)."""
    bad = [name for name, value in values.items() if value - value != 0]
    if bad:
        named = [name for name in bad if name != "loss"] or bad
        raise NotFiniteError(
            f"{named[0]} became {values[named[0]]} in {where}: training stopped, the last good checkpoint is kept; "
            "start another run with a lower --learning-rate, a longer --warmup-epochs or --precision fp32 "
            "(--student-path with this run's last.pt begins where it stood)"
        )


def derive_seed(*parts: int) -> int:
    """A seed for torch from numbers such as (seed, epoch, step)."""
    digest = blake2b("/".join(str(part) for part in parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
