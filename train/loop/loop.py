"""The one training loop: every task and every student but YOLOv8 goes through it."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields
from hashlib import blake2b
from itertools import islice
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from console.progress import Progress
from processes.stop import Stopped, StopRequest
from train.checkpoint import normalization
from train.config import TrainConfig
from train.data.batches import Balance, Batch, BatchLoader
from train.distill.calibration import Calibration, CalibrationState, other_terms
from train.distill.mixing import draw_mixing, mix_images
from train.distill.objective import Objective, Targets
from train.distill.projector import DistilledStudent
from train.distill.reference import TeacherReference
from train.errors import TrainError
from train.fit import is_validated, validation_interval
from train.loop.evaluate import evaluate
from train.loop.optimizer import WeightAverage
from train.loop.saving import StepGuard
from train.ranks import add_counts, sum_over_ranks, world_size
from train.students.base import Student

#: Steps on a GPU between two readings of their losses: each makes the CPU wait for the step before the newest.
READ_EVERY = 10


class NotFiniteError(TrainError):
    """A loss became NaN or infinite; the text names epoch, step and term."""


@dataclass
class TrainingState:
    """Where a run stands: saved in every `last.pt`, so that a resumed run takes the very next step.

    `epoch`: epochs finished; `step`: optimizer steps finished in the running one; `global_step`: in all.
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
    calibration: CalibrationState = field(default_factory=CalibrationState)
    distilled_epochs: int | None = None  # after which the distillation terms ended; None: they have not
    history: list[dict[str, Any]] = field(default_factory=list)

    def add_losses(self, losses: Mapping[str, float], samples: float) -> None:
        """Count the losses of a step of `samples` samples in the epoch's means."""
        self.samples += samples
        for name, value in losses.items():
            self.sums[name] = self.sums.get(name, 0.0) + value * samples

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
            self.stale_epochs = epoch - self.best_epoch
            return False
        self.best_value, self.best_epoch, self.stale_epochs = value, epoch, 0
        self.best_metrics, self.best_details = metrics, details
        return True

    def to_dict(self) -> dict[str, Any]:
        """Plain types, a copy."""
        return asdict(self)

    def restore(self, values: Mapping[str, Any]) -> None:
        """Become what `to_dict` gave; names that this version does not know are ignored."""
        known = {item.name for item in fields(self)} - {"calibration"}
        self.__dict__.update({name: value for name, value in values.items() if name in known})
        self.calibration = CalibrationState(**values.get("calibration", {}))


@dataclass
class Parts:
    """All that the loop is made of, built outside (`train.loop.assemble`)."""

    config: TrainConfig
    accelerator: Accelerator
    module: DistilledStudent
    wrapped: nn.Module
    optimizer: Any
    objective: Objective
    val_objective: Objective
    train_loader: BatchLoader
    val_loader: BatchLoader
    normalize: Callable[[Tensor], Tensor]
    guard: StepGuard
    progress: TrainingState
    average: WeightAverage | None
    stop: StopRequest
    #: What the teacher knows, where the terms may end, and the batches of labeled rows from then on.
    reference: TeacherReference | None = None
    labeled_alone: Balance | None = None
    validation_samples: int = 0
    #: Of a batch, on average. The task's loss is a mean over labeled samples: weighted by their share, one of them counts as
    #: much as in a batch of labeled ones. Otherwise the noise of two labeled samples would outweigh what the teacher says of thirty.
    labeled_share: float = 1.0

    @property
    def evaluated(self) -> Student:
        """The student that is evaluated and kept: the averaged one where there is one."""
        return self.module.student if self.average is None else self.average.student


class Loop:
    """Trains epoch by epoch. The caller saves: `run` yields after every epoch, with the epoch's record.

    Losses are read late. On a GPU a step only queues kernels, and `.item()` would make the CPU wait until the queue is
    empty: the GPU would then idle while the CPU queues the next step. So each step's losses are copied to the host
    behind its kernels (`StepLosses.of`) and stay in `unread`; `settle` reads all but the newest every `READ_EVERY` steps.
    Before anything is saved, and at the end of an epoch, everything is read, so a loss that is not finite never reaches
    a checkpoint. On a CPU nothing is queued, and each step's losses are read before its weights change.
    """

    def __init__(self, parts: Parts) -> None:
        self.parts = parts
        self.display: Progress | None = None
        self.save_within_epoch: Callable[[], None] = lambda: None
        self.device = parts.accelerator.device
        self.groups = group_sizes(len(parts.train_loader.batches.slices), parts.config.grad_accum_steps)
        self.total_steps = len(self.groups) * parts.config.epochs
        self.warmup = warmup_steps(parts.config.warmup_epochs, len(self.groups), self.total_steps)
        self.validation_interval = validation_interval(
            parts.config.validate_every,
            steps=len(self.groups),
            train_samples=len(parts.train_loader.batches.rows),
            val_samples=len(parts.val_loader.batches.rows),
        )
        self.task_weight = parts.objective.weights["hard_loss"]
        self.calibration = self.build_calibration()
        self.stop_seen = False
        self.lap_started = 0.0
        self.unread: list[StepLosses] = []
        self.reads_late = self.device.type == "cuda"

    def run(self) -> Iterator[dict[str, Any]]:
        """Yield one record per epoch; `progress` counts an epoch as finished once the caller has taken it.

        A resumed run starts within an epoch, with the step after the last finished one.
        """
        parts, progress, patience = self.parts, self.parts.progress, self.parts.config.early_stopping_patience
        self.set_weights()
        while progress.epoch < parts.config.epochs:
            if patience is not None and progress.stale_epochs >= patience:
                return
            started = time.monotonic()
            if sizes := self.groups[progress.step :]:
                batches = parts.train_loader.epoch(progress.epoch, start=sum(self.groups[: progress.step]))
                parts.wrapped.train()
                self.lap_started = time.monotonic()
                for size in sizes:
                    self.step(list(islice(batches, size)))
                    self.check_stop()
                    self.save_within_epoch()
                    # Saving is not training: its time does not count, what it waited for in `settle` does.
                    self.lap_started = time.monotonic()
                with parts.guard.lock:
                    self.settle()
            metrics = self.validate() if self.validates() else {}
            losses = {name: value for name, value in metrics.items() if name.startswith("val_")}
            check_finite(losses, f"the validation of epoch {progress.epoch + 1}")
            yield self.record(metrics, time.monotonic() - started)

    def step(self, group: list[Batch]) -> None:
        """One optimizer step over the micro-batches of `group`, on the device: forward, backward, clip, step.

        The gradient is exactly that of the mean over all samples of the step, however they are split into ranks and
        micro-batches. For that, what each term is divided by is summed over all of them *before* the first forward
        pass: ranks and micro-batches may hold different numbers of labeled samples, visible cells or padding, and a
        mean of their means would weigh these differently. Every loss is then this micro-batch's part of the mean, and
        parts are added, by `backward` over micro-batches and by DDP over ranks. DDP divides that sum by the number of
        ranks, hence the factor `world_size()`. Gradients are exchanged once, in the last backward pass (`no_sync`).
        """
        parts, config, progress = self.parts, self.parts.config, self.parts.progress
        samples = sum(batch.samples for batch in group)
        targets = [parts.objective.prepare(batch) for batch in group]
        counts = add_counts([target.counts for target in targets])
        totals: dict[str, Tensor] = {}
        calibration = self.calibration if self.calibration and self.calibration.measures else None
        parts.module.runs_compiled = calibration is None  # compiled code can be differentiated once
        for index, batch in enumerate(group):
            last = index == len(group) - 1
            with contextlib.nullcontext() if last else parts.accelerator.no_sync(parts.wrapped):
                terms = self.forward(batch, targets[index], counts, index)
                if calibration and "feature_loss" in terms:
                    calibration.add(terms["feature_loss"], other_terms(terms, self.unweighted))
                parts.accelerator.backward(terms["loss"] * world_size())
            for name, value in terms.items():
                totals[name] = totals[name] + value.detach() if name in totals else value.detach()
        norm = None
        if config.max_grad_norm:
            norm = parts.accelerator.clip_grad_norm_(parts.module.parameters(), config.max_grad_norm)
        losses = self.sum_losses(totals, samples, norm)
        if not self.reads_late:
            losses.read()
        with parts.guard.update():  # weights, optimizer state and progress change together
            for settings in parts.optimizer.param_groups:
                settings["lr"] = self.learning_rate(progress.global_step)
            parts.optimizer.step()
            parts.optimizer.zero_grad()
            if parts.average is not None:
                parts.average.update(parts.module.student)
            if calibration:
                calibration.finish()
                self.set_weights()
            progress.step += 1
            progress.global_step += 1
            progress.seconds += self.lap()
            self.unread.append(losses)
            if not self.reads_late:
                self.settle()
            elif len(self.unread) > READ_EVERY:
                self.settle(leave=1)
        if self.display is not None:
            self.display.advance(int(samples) * parts.accelerator.num_processes)

    def build_calibration(self) -> Calibration | None:
        """What finds the feature term's weight; None where it was given, or nothing else is learned."""
        parts = self.parts
        if not parts.objective.plan.features or parts.config.feature_weight is not None:
            return None
        student = parts.module.student
        # Not the task head's; wrappers and LoRA put names in front.
        prefixes = tuple(f".{prefix}" for prefix in student.head_prefixes)
        body = [p for name, p in student.named_parameters() if not any(x in f".{name}" for x in prefixes)]
        # The state is looked up at each use: resuming replaces it.
        return Calibration(lambda: parts.progress.calibration, body, self.total_steps)

    def unweighted(self, name: str) -> float:
        """A term's weight relative to the task's of labeled batches, without hard_label_weight and soft_label_weight."""
        return self.parts.config.logit_weight if name == "logit_loss" else self.parts.labeled_share

    def set_weights(self) -> None:
        """Use what the calibration has found so far; once the distillation terms have ended, weights of 0."""
        parts = self.parts
        changed = {"hard_loss": self.task_weight * parts.labeled_share}
        if self.calibration is not None:
            changed["feature_loss"] = parts.config.soft_label_weight * parts.progress.calibration.weight
        if parts.progress.distilled_epochs is not None:
            changed = {"hard_loss": self.task_weight, "feature_loss": 0.0, "logit_loss": 0.0}
            # The rows without labels have nothing to teach any more.
            parts.train_loader.batches.balance = parts.labeled_alone or parts.train_loader.batches.balance
        for objective in (parts.objective, parts.val_objective):
            objective.weights |= changed

    def end_distillation_when_beaten(self, metrics: Mapping[str, float]) -> bool:
        """End the distillation terms, from the next epoch on, once the student is better than the teacher's probe.

        The decision depends on metrics alone and is part of the run's state. Call it before `finish_epoch`.
        """
        reference, progress = self.parts.reference, self.parts.progress
        if reference is None or progress.distilled_epochs is not None or reference.metric not in metrics:
            return False
        if not reference.is_beaten(metrics[reference.metric], self.parts.validation_samples):
            return False
        progress.distilled_epochs = progress.epoch + 1
        self.set_weights()
        return True

    def forward(
        self, batch: Batch, targets: Targets, counts: Mapping[str, Tensor], index: int
    ) -> dict[str, Tensor]:
        """Losses of micro-batch `index`. Dropout depends on (seed, epoch, step) only, so any step can be repeated."""
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

    def sum_losses(self, totals: Mapping[str, Tensor], samples: float, norm: Tensor | None) -> StepLosses:
        """Sum the step's losses and samples over all ranks, in one exchange; a stop of any rank stops all.

        `norm`: of the gradients, which DDP has summed already: left out where the loss scaler handles infinities.
        """
        progress = self.parts.progress
        values = torch.stack([value.float() for value in totals.values()]).double()
        # Filled on the device: a copy of two numbers from the host would be one more thing to wait for.
        known = [samples, float(self.parts.stop.requested)]
        filled = [torch.full((1,), value, dtype=values.dtype, device=self.device) for value in known]
        if norm is not None and self.parts.accelerator.scaler is None:
            filled.append(norm.detach().double().view(1))
        where = f"epoch {progress.epoch + 1}, step {progress.step + 1}"
        return StepLosses.of(where, tuple(totals), sum_over_ranks(torch.cat([values, *filled])))

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

    def lap(self) -> float:
        """Seconds since the last call. On a GPU a step only queues work: the sum is right, not each part."""
        now = time.monotonic()
        seconds, self.lap_started = now - self.lap_started, now
        return seconds

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
        if self.stop_seen or (self.parts.accelerator.num_processes == 1 and self.parts.stop.requested):
            raise Stopped("stopped", self.parts.stop.exit_code)

    def validates(self) -> bool:
        """Whether the running epoch ends with a validation."""
        return is_validated(self.parts.progress.epoch + 1, self.validation_interval, self.parts.config.epochs)

    def validate(self) -> dict[str, float]:
        """Metrics on the validation split, of the averaged weights where there are any."""
        parts, module = self.parts, self.parts.module
        if parts.average is not None:
            module = DistilledStudent(
                parts.evaluated,
                module.projector,
                cells=module.wants_cells,
                pooled=module.wants_pooled,
                level_heads=list(module.level_heads),
                others=list(module.others),
            )
        return evaluate(
            module,
            parts.val_loader.epoch(0),
            parts.val_objective,
            self.device,
            parts.normalize,
            parts.accelerator.autocast,
            self.check_stop,
        )

    def record(self, metrics: dict[str, float], seconds: float) -> dict[str, Any]:
        """The epoch's line of metrics.jsonl; without `metrics` where it was not validated."""
        progress = self.parts.progress
        means = {name: total / max(progress.samples, 1.0) for name, total in progress.sums.items()}
        return {
            "epoch": progress.epoch + 1,
            "train_loss": means.pop("loss"),
            **dict.fromkeys(("hard_loss", "feature_loss", "logit_loss")),
            **means,
            "val_loss": metrics.pop("val_loss", None),
            **metrics,
            **({"feature_weight": progress.calibration.weight} if self.calibration is not None else {}),
            "learning_rate": self.learning_rate(progress.global_step - 1),
            "epoch_time_s": round(seconds, 3),
        }


class StepLosses(NamedTuple):
    """The losses of one step, float64 `values` by name, then samples, stop, and the gradient's norm where it is known.

    `values` are being copied to the host; `arrived` (None on a CPU) is the event after which they are complete.
    """

    where: str
    names: tuple[str, ...]
    values: Tensor
    arrived: torch.cuda.Event | None

    @classmethod
    def of(cls, where: str, names: tuple[str, ...], values: Tensor) -> StepLosses:
        """Queue the copy to the host now: a copy that is queued when it is read would wait for all later steps."""
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


def check_finite(values: Mapping[str, float], where: str) -> None:
    """Raise NotFiniteError that names the term and `where` (epoch and step)."""
    bad = [name for name, value in values.items() if not math.isfinite(value)]
    if bad:
        named = [name for name in bad if name != "loss"] or bad
        raise NotFiniteError(
            f"{named[0]} became {values[named[0]]} in {where}: training stopped, the last good checkpoint is kept; "
            "start another run with a lower --learning-rate, a longer --warmup-epochs or --precision fp32 "
            "(--student-path with this run's last.pt continues from its weights)"
        )


def group_sizes(batches: int, grad_accum_steps: int) -> list[int]:
    """How many micro-batches each optimizer step of an epoch sums; the last step takes what is left."""
    full, rest = divmod(batches, grad_accum_steps)
    return [grad_accum_steps] * full + ([rest] if rest else [])


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


def derive_seed(*parts: int) -> int:
    """A seed for torch from numbers such as (seed, epoch, step)."""
    digest = blake2b("/".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def build_normalizer(student: Student, device: torch.device) -> Callable[[Tensor], Tensor]:
    """uint8 images channel-last → float32 channel-first, with the student's mean and standard deviation."""
    published_mean, published_std = normalization(student)
    mean, std = (
        255 * torch.tensor(published_mean, device=device),
        255 * torch.tensor(published_std, device=device),
    )

    def normalize(images: Tensor) -> Tensor:
        """uint8 [..., S, S, 3] → float32 [..., 3, S, S]; on a GPU a view of channel-last memory."""
        normal = (images - mean).div_(std).movedim(-1, -3)
        return normal if device.type == "cuda" else normal.contiguous()

    return normalize
