"""ultralytics' DetectionTrainer on a store, with our checkpoints, our resume and the distillation term.

What is replaced: where data comes from, when the optimizer steps (so that an epoch ends with no gradients pending
and can be resumed from), and what is written. The recipe itself (loss, augmentations, warm-up, schedule, EMA,
validator, plots, results.csv) is ultralytics' own.
"""

from __future__ import annotations

import csv
import math
import random
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ultralytics.data.build import InfiniteDataLoader
from ultralytics.models.yolo.detect import DetectionTrainer
from ultralytics.utils import RANK, YAML
from ultralytics.utils.torch_utils import unwrap_model

from console.output import get_logger
from files.writing import publish
from train.data.batches import start_worker
from train.errors import TrainError
from train.fit import is_validated
from train.yolo.dataset import StoreDataset
from train.yolo.geometry import SOURCE_ROWS
from train.yolo.job import TrainingJob
from train.yolo.recorder import METRICS, restore_state

log = get_logger("train")
ULTRALYTICS_FOLDER = "ultralytics"
OOM_RETRIES = 3  # how often ultralytics' loop halves the batch
READ_EVERY = 10  # optimizer steps on a GPU between two looks at their gradient norms


class StoreTrainer(DetectionTrainer):  # type: ignore[misc]
    """See the module's text. Build it with the job to do; `train()` runs it."""

    # ultralytics fills these during its set-up, and annotates them as what they are before it.
    model: Any
    optimizer: Any
    scaler: Any
    ema: Any
    loss: Any
    fitness: Any
    metrics: Any

    def __init__(
        self,
        job: TrainingJob | None = None,
        *,
        cfg: Any = None,
        overrides: dict[str, Any] | None = None,
        _callbacks: Any = None,
    ) -> None:
        """`cfg`, `overrides`, `_callbacks`: how ultralytics' DDP launcher builds the trainer in each process it starts;
        the job is then read back from the run folder's config.json.
        """
        if job is None:
            from train.yolo.ddp import job_of_rank

            job = job_of_rank(Path((overrides or {})["project"]))
        self.job = job
        if job.state is not None and RANK == -1:
            drop_later_rows(job.run / ULTRALYTICS_FOLDER / "results.csv", job.state["epoch"] + 1)
        overrides = {**job.arguments, "project": str(job.run.resolve()), "name": ULTRALYTICS_FOLDER}
        super().__init__(overrides=overrides)
        self.args.workers = job.workers  # on CPUs ultralytics sets 0
        if self.wdir.is_dir() and not any(self.wdir.iterdir()):
            self.wdir.rmdir()
        self.wdir = self.save_dir
        self.last, self.best = self.wdir / "last.pt", self.wdir / "best.pt"
        self.batches_done = self.batches_pending = 0
        self.unread: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.train_seconds = 0.0
        self.validated = False  # in the running epoch
        self.evaluating_export = False
        self.export_metrics: dict[str, float] = {}

    # Data ------------------------------------------------------------------------------------------------------

    def get_dataset(self) -> dict[str, Any]:
        """ultralytics' description of the data; it reads the final validation's names from the file."""
        names = dict(enumerate(self.job.class_names))
        described = {"path": str(self.save_dir), "train": ".", "val": ".", "names": names}
        file = self.save_dir / "data.yaml"
        YAML.save(file, described)
        self.args.data = str(file)
        return {"train": "train", "val": "val", "names": names, "nc": len(names), "channels": 3}

    def build_dataset(self, img_path: str, mode: str = "train", batch: int | None = None) -> StoreDataset:
        split = self.job.splits[mode]
        return StoreDataset(
            split.records,
            split.read_image,
            follow_sources=split.targets is not None,
            imgsz=self.args.imgsz,
            batch_size=batch,
            augment=mode == "train",
            hyp=self.args,
            rect=self.args.rect or mode == "val",
            single_cls=self.args.single_cls or False,
            stride=max(int(torch.as_tensor(unwrap_model(self.model).stride).max()), 32),
            pad=0.0 if mode == "train" else 0.5,
            data=self.data,
        )

    def get_dataloader(
        self, dataset_path: str, batch_size: int = 16, rank: int = 0, mode: str = "train"
    ) -> Any:
        loader = super().get_dataloader(dataset_path, batch_size, rank, mode)
        loader.worker_init_fn = start_seeded_worker
        if mode == "train":
            loader.__class__ = ReadingAhead
            loader.targets = self.job.splits["train"].targets
        return loader

    def preprocess_batch(self, batch: dict[str, Any]) -> dict[str, Any]:
        """ultralytics' own preprocessing; the teacher's grids are being read already, or are from now on."""
        targets = self.job.splits["train"].targets
        if targets is not None and SOURCE_ROWS in batch:
            targets.prefetch(batch)
        processed: dict[str, Any] = super().preprocess_batch(batch)
        return processed

    # Model -----------------------------------------------------------------------------------------------------

    def get_model(self, cfg: Any = None, weights: Any = None, verbose: bool = True) -> Any:
        network = self.job.student.network
        if self.job.trainable is not None:
            # The trainer would do it, with a warning for every layer; `_build_train_pipeline` freezes again.
            network.requires_grad_(True)
        return self.set_model_names_for_load(network)

    def _build_train_pipeline(self) -> None:
        """Called right after the trainer has made every frozen parameter trainable."""
        self.job.freeze(unwrap_model(self.model))
        for split in self.job.splits.values():
            if split.targets is not None:
                split.targets.to(self.device)
        try:
            super()._build_train_pipeline()
        except ValueError as error:
            raise TrainError(
                f"batch_size {self.batch_size}, image_size {self.args.imgsz}: {error}"
            ) from error

    def build_optimizer(
        self,
        model: Any,
        name: str = "auto",
        lr: float = 0.001,
        momentum: float = 0.9,
        decay: float = 1e-5,
        iterations: float = 1e5,
    ) -> Any:
        """ultralytics' optimizer. For `auto` it chooses by steps and classes; a learning rate that was given stays.

        A resumed run keeps the choice, also when more epochs would change it.
        """
        if name != "auto":
            return super().build_optimizer(model, name, lr, momentum, decay, iterations)
        if chosen := (self.job.state or {}).get("chosen"):
            vars(self.args).update(chosen)
            return super().build_optimizer(model, chosen["optimizer"], chosen["lr0"], 0.9, decay)
        optimizer = super().build_optimizer(model, name, lr, momentum, decay, iterations)
        if self.job.config.is_explicit("learning_rate"):
            for group in optimizer.param_groups:  # MuSGD has groups with a multiple of the rate
                group["lr"] *= lr / self.args.lr0
            self.args.lr0 = lr
        if RANK in (-1, 0):
            log.info(
                "optimizer auto: %s, learning rate %g for %d classes",
                self.args.optimizer,
                self.args.lr0,
                self.data["nc"],
            )
        return optimizer

    def check_resume(self, overrides: Any) -> None:
        """There is no ultralytics checkpoint to resume from; `resume` makes it keep its folder and results.csv."""
        self.resume = self.args.resume = self.job.state is not None

    def resume_training(self, ckpt: Any) -> None:
        """From our own full-precision state; ultralytics' resume would start from a half-precision EMA."""
        if self.job.state is not None:
            restore_state(self, self.job.state)

    # Loop ------------------------------------------------------------------------------------------------------

    def _do_train(self) -> None:
        before = self.job.state
        if before is None or not (before["stopped_early"] or before["epoch"] + 1 >= self.epochs):
            super()._do_train()
            return
        self._setup_train()  # interrupted after the last epoch: only the final validation is left
        self.epoch = self.start_epoch - 1
        self.train_time_start = 0.0
        self.final_eval()

    def _model_train(self) -> None:
        """An epoch begins: everything random in it depends on seed and epoch alone."""
        super()._model_train()
        self.validated = False
        self.args.val = is_validated(self.epoch + 1, self.job.validation_interval, self.epochs)
        # Each rank of DDP augments differently.
        sequence = np.random.SeedSequence([self.job.config.seed, self.epoch, max(RANK, 0)])
        seed = int(sequence.generate_state(1)[0])
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)
        self.train_loader.dataset.start_epoch(seed)
        self.train_loader.generator.manual_seed(seed)
        self.train_loader.reset()
        self.batches_done = self.batches_pending = 0
        self.epoch_began = time.perf_counter()

    def on_train_epoch_end(self) -> None:
        self.check_finite()  # waits for the device, so that the time is that of the whole epoch
        self.train_seconds = time.perf_counter() - self.epoch_began

    def optimizer_step(self) -> None:
        """The loop asks for a step here; `on_train_batch_end` decides, so that no step spans two epochs."""

    def on_train_batch_start(self) -> None:
        # The loop halves the batch by itself after running out of memory, unless it has tried often enough.
        if not self.job.config.auto_batch:
            self._oom_retries = OOM_RETRIES

    def on_train_batch_end(self) -> None:
        self.batches_done += 1
        self.batches_pending += 1
        if self.batches_pending >= self.accumulate or self.batches_done == len(self.train_loader):
            self.take_step()
        self.job.batch_finished(self)

    def take_step(self) -> None:
        """ultralytics' `optimizer_step` with our clipping norm."""
        self.batches_pending = 0
        self.scaler.unscale_(self.optimizer)
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), max_norm=self.job.clip_norm)
        # With loss scaling an overflow is ordinary: the scaler skips the step.
        if not self.scaler.is_enabled():
            self.unread.append((norm, self.loss.detach()))
        if len(self.unread) >= (READ_EVERY if self.device.type == "cuda" else 1):
            self.check_finite()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        if self.ema:
            self.ema.update(self.model)

    def check_finite(self) -> None:
        """Read the gradient norms of the last steps; the host waits for the device.

        Raises TrainError for the first one that is not finite, before anything of the epoch is saved.
        """
        steps, self.unread = self.unread, []
        for norm, loss in steps:
            if not torch.isfinite(norm):
                raise not_finite("gradient" if torch.isfinite(loss) else "loss", self.epoch)

    def run_callbacks(self, event: str) -> None:
        """ultralytics' callbacks, and our method of that name when there is one."""
        super().run_callbacks(event)
        handler = getattr(self, event, None)
        if handler is not None:
            handler()

    def on_fit_epoch_end(self) -> None:
        if not self.evaluating_export and RANK in (-1, 0):
            self.job.epoch_finished(self)

    def validate(self) -> Any:
        """ultralytics' validation of the EMA, LoRA merged: what is measured is what is saved."""
        self.validated = True
        with self.ema_replaced_by(self.job.merged):
            return super().validate()

    # Files -----------------------------------------------------------------------------------------------------

    @property
    def is_best(self) -> bool:
        return self.validated and bool(self.best_fitness == self.fitness)

    def save_model(self) -> bool:
        """Nothing after each epoch: the recorder calls `write_checkpoints` after the last one."""
        return False

    def write_checkpoints(self, best: Mapping[str, Any]) -> None:
        """ultralytics' last.pt of now, and its best.pt of `best`, the content of our best.pt: its own plain models."""
        with self.ema_replaced_by(self.job.detector), self.replacing_checkpoints():
            super().save_model()
            checkpoint = torch.load(self.last, map_location="cpu", weights_only=False)  # written just now
            half = torch.finfo(torch.half).max
            checkpoint["ema"].load_state_dict(
                {
                    name.removeprefix("network."): value.clamp(-half, half)
                    if value.is_floating_point()
                    else value
                    for name, value in best["model_state_dict"].items()
                }
            )
            measured = {METRICS[name]: value for name, value in best["metrics"].items()}
            checkpoint |= {"epoch": best["epoch"] - 1, "train_metrics": measured}
            torch.save(checkpoint, self.best)

    def read_results_csv(self) -> dict[str, list[float]]:
        """results.csv by columns, for ultralytics' checkpoints; its own reader needs polars (52 MB) for this alone."""
        if not self.csv.exists():
            return {}
        with self.csv.open(encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
        return {name: [float(row[name]) for row in rows] for name in rows[0]} if rows else {}

    def final_eval(self) -> None:
        """ultralytics strips best.pt and last.pt of what only training needs, and validates best.pt."""
        self.evaluating_export = True
        try:
            if RANK == -1:
                with self.replacing_checkpoints(copy=True):
                    super().final_eval()
            else:
                super().final_eval()
        finally:
            self.evaluating_export = False
        self.export_metrics = {name: float(value) for name, value in (self.metrics or {}).items()}
        if RANK in (-1, 0):
            self.job.training_finished(self)

    @contextmanager
    def ema_replaced_by(self, change: Callable[[Any], Any]) -> Iterator[None]:
        """Inside, the averaged model is what `change` makes of it."""
        live = self.ema.ema
        self.ema.ema = change(live)
        try:
            yield
        finally:
            self.ema.ema = live

    @contextmanager
    def replacing_checkpoints(self, copy: bool = False) -> Iterator[None]:
        """Inside, ultralytics writes partial files (`copy`: of the present ones), which then take their places.

        ultralytics writes in place; killed in the middle of it, a run could not be finished any more.
        """
        last, best = self.last, self.best
        partial = {file: file.with_name(f"partial-{file.name}") for file in (last, best)}
        for file, written in partial.items():
            written.unlink(missing_ok=True)
            if copy and file.exists():
                shutil.copyfile(file, written)
        self.last, self.best = partial[last], partial[best]
        try:
            yield
            for file, written in partial.items():
                if written.exists():
                    publish(written, file)
        finally:
            self.last, self.best = last, best

    def _handle_nan_recovery(self, epoch: int) -> bool:
        """Nothing of such an epoch is saved. ultralytics would go back to its half-precision EMA, silently, and the
        epoch's seed would bring it here again.
        """
        if self.loss is not None and not bool(torch.isfinite(self.loss).all()):
            raise not_finite("loss", epoch)
        if not all(math.isfinite(value) for value in (self.metrics or {}).values()):
            raise not_finite("validation loss", epoch)
        return False


class ReadingAhead(InfiniteDataLoader):  # type: ignore[misc]
    """ultralytics' loader, one batch ahead: the grids of a batch are read while the one before is trained on.

    Without targets too, so that a control draws its random numbers in the same order.
    """

    targets: Any = None

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        waiting = None
        for batch in super().__iter__():
            if self.targets is not None and SOURCE_ROWS in batch:
                self.targets.prefetch(batch)
            if waiting is not None:
                yield waiting
            waiting = batch
        if waiting is not None:
            yield waiting


def close_loaders(trainer: Any) -> None:
    """End loader workers here, not at the interpreter's exit, where torch would complain about them."""
    for name in ("train_loader", "test_loader"):
        loader = getattr(trainer, name, None)
        if loader is not None:
            loader.close()


def not_finite(what: str, epoch: int) -> TrainError:
    return TrainError(
        f"the {what} is not finite in epoch {epoch + 1}, nothing of which is saved: start again with a lower "
        "--learning-rate, a longer --warmup-epochs or --precision fp32, and --overwrite"
    )


def start_seeded_worker(worker: int) -> None:
    """Loader workers: ultralytics' seeds, and signals left to the training process."""
    from ultralytics.data.build import seed_worker

    seed_worker(worker)
    start_worker(worker)


def drop_later_rows(file: Path, epochs: int) -> None:
    """Keep results.csv's header and its rows of the first `epochs` epochs: a resumed run writes the others again."""
    if not file.exists():
        return
    header, *rows = file.read_text(encoding="utf-8").splitlines()
    kept = [row for row in rows if int(row.split(",", 1)[0]) <= epochs]
    file.write_text("\n".join([header, *kept]) + "\n", encoding="utf-8")
