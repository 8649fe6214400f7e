"""From options and a store to a `TrainingJob`: data, network, devices. Everything that does not fit is an error."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from console.devices import core_share, device_index, find_device
from console.output import get_logger
from store.format import stored_layers
from store.reader import Store
from store.summary import unlabeled_rows
from train.checkpoint import load_checkpoint
from train.config import TrainConfig
from train.data.splits import fit_batch
from train.distill.levels import detector_levels
from train.distill.objective import other_teacher
from train.distill.projector import head_states, take_over_head
from train.distill.resolve import chosen_teachers, further_config
from train.errors import ConfigError
from train.fit import validation_interval
from train.fonts import register_with_matplotlib
from train.lora import apply_lora_options
from train.run_folder import RunFolder, rotations_folder
from train.students.families import FAMILIES, parse_student_name
from train.students.weights import load_phase_one
from train.students.yolo import YoloStudent, build_network, level_widths, student_spec
from train.yolo.dataset import DetectionSplit, add_found_boxes, open_split
from train.yolo.model import LEVELS, Distillation, DistilledDetectionModel, level_of, plain_detector
from train.yolo.options import (
    clip_norm,
    parse_settings,
    ultralytics_arguments,
)

log = get_logger("train")


def ignore(trainer: Any) -> None:
    """The default callback."""


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
    def validation_interval(self) -> int:
        """Epochs between two validations; a step sums as many batches as the nominal batch has."""
        batches = self.batches_per_epoch
        return validation_interval(
            self.config.validate_every,
            steps=-(-batches // max(1, round(self.arguments["nbs"] / self.config.batch_size))),
            train_samples=len(self.splits["train"].records),
            val_samples=len(self.splits["val"].records),
        )

    @property
    def trainable_parameters(self) -> int:
        """How many numbers learn, alignment heads included; counted once the trainer is set up."""
        return sum(p.numel() for p in self.student.network.parameters() if p.requires_grad)


def build_job(config: TrainConfig, run: Path, store: Store, state: dict[str, Any] | None) -> TrainingJob:
    """The job of a configuration; the caller sets its callbacks. `state`: what is resumed from, or None.

    Raises ConfigError or TrainError for what does not fit.
    """
    store = chosen_teachers(config, store)[0]
    size = parse_student_name(config.student).size
    names = class_names(config, store)
    devices = device_arguments(config)
    mixes = parse_settings(config.yolo_settings).get("mixup")  # two images in one pixel
    splits = open_splits(config, store, 2 if mixes else 1)
    if config.boxes_from is not None:
        splits["train"] = add_found_boxes(run, store, config.train_split, splits["train"])
    elif not config.pretrain_epochs and unlabeled_rows(store[config.train_split], "boxes").any():
        log.info("--pretrain-epochs N would learn the features of the images without boxes first")
    config = fit_batch(config, len(splits["train"].records), log.info)
    arguments = (
        ultralytics_arguments(config, len(splits["train"].records))
        | {"model": FAMILIES["yolov8"].sizes[size]}
        | devices
        | plots(config, names)
    )
    student = build_trained_student(config, store, splits, len(names), RunFolder(run).phase_one())
    check_frozen(arguments.get("freeze"), student.network)
    trainable = {name for name, value in student.network.named_parameters() if value.requires_grad}
    return TrainingJob(
        config=config,
        run=run,
        arguments=arguments,
        class_names=names,
        splits=splits,
        student=student,
        trainable=trainable if config.lora_rank else None,
        clip_norm=clip_norm(config),
        workers=worker_count(config, arguments),
        bit_depth=store.manifest.preprocessing.bit_depth,
        state=state,
    )


def open_splits(config: TrainConfig, store: Store, sources_per_cell: int) -> dict[str, DetectionSplit]:
    """The training and validation data, under ultralytics' names for them."""
    first, *others = chosen_teachers(config, store)
    return {
        mode: open_split(
            first,
            name,
            image_size=config.image_size,
            data_root=config.data_root,
            distil=config.distillation_type != "none",
            statistics_of=config.train_split,
            sources_per_cell=sources_per_cell,
            layers=levels_of(config, first),
            others=[(other, levels_of(further_config(config), other)) for other in others],
            rotations=rotations_folder(config),
        )
        for mode, name in (("train", config.train_split), ("val", config.val_split))
    }


def levels_of(config: TrainConfig, store: Store) -> dict[str, int | None]:
    """The distilled levels and the layer that each learns, from `--distill-layers` or what is stored."""
    stored = stored_layers(store[config.train_split].names)
    return detector_levels(config.distill_layers, config.student, stored)


def build_trained_student(
    config: TrainConfig,
    store: Store,
    splits: dict[str, DetectionSplit],
    num_classes: int,
    phase_one: Path | None,
) -> YoloStudent:
    """The student as it trains: local weights or those of phase one, LoRA, and unless it is a control the alignment heads.

    Initial weights are a function of the seed alone; heads are drawn after them and do not change them.
    """
    torch.manual_seed(config.seed)
    size = parse_student_name(config.student).size
    network = build_network(size, num_classes, DistilledDetectionModel)
    student = YoloStudent(network, student_spec(network, size, num_classes, config.image_size))
    if config.student_path is not None:
        loaded = student.load_local_weights(config.student_path)
        log.info(
            "weights of %s; initialized randomly: %s",
            loaded.origin,
            ", ".join(loaded.reinitialized) or "none",
        )
    initial = None if phase_one is None else load_checkpoint(phase_one)
    if initial is not None:
        load_phase_one(student, initial)
    report = apply_lora_options(student, config.model_dump(), trained=False)
    if report is not None:
        log.info(
            "LoRA on %d layers: %s of %s parameters learn",
            len(report.targets),
            f"{report.trainable_parameters:,}",
            f"{report.total_parameters:,}",
        )
    if config.distillation_type != "none":
        attach_teacher(config, network, store, splits)
        if initial is not None and levels_of(config, store).get("P5", "absent") is None:
            for number, state in enumerate(head_states(initial)):
                name = f"{other_teacher(number - 1) if number else ''}P5"
                if name in network.distillation.heads:
                    take_over_head(network.distillation.heads[name], {"alignment_head": state})
    return student


def check_frozen(freeze: Any, network: Any) -> None:
    """ultralytics' `freeze` must name layers, and leave some to learn. Raises ConfigError when it does not."""
    if freeze is None:
        return
    count = len(network.model)
    layers = range(freeze) if isinstance(freeze, int) else freeze
    known = isinstance(layers, (range, list)) and all(layer in range(count) for layer in layers)
    if not known or (isinstance(freeze, int) and freeze < 0) or len(set(layers)) == count:
        raise ConfigError(
            f"yolo_settings freeze={freeze}: expected how many of the first layers to freeze, 0 to {count - 1}, or a "
            f"list of some of the layers 0 to {count - 1}, such as freeze=[0,1,2]"
        )


def attach_teacher(
    config: TrainConfig, network: Any, store: Store, splits: dict[str, DetectionSplit]
) -> None:
    train, val = splits["train"].targets, splits["val"].targets
    assert train is not None
    assert val is not None
    widths = dict(zip(LEVELS, level_widths(network), strict=True))
    distillation = Distillation(
        {level: widths[level_of(level)] for level in train.by_level},
        {level: targets.standardizer.gain.numel() for level, targets in train.by_level.items()},
        kind=config.feature_loss_type,
        hard_weight=config.hard_label_weight,
        soft_weight=config.soft_label_weight
        * (1.0 if config.feature_weight is None else config.feature_weight),
        foreground=config.foreground_weight,
        align=config.align_feature,
        align_head=config.align_head,
        batches=0
        if config.feature_weight is not None
        else config.epochs * -(-len(splits["train"].records) // config.batch_size),
    )
    network.attach(distillation, (train, val))


def class_names(config: TrainConfig, store: Store) -> tuple[str, ...]:
    """The store's class names, widened to `num_classes` when that is larger.

    Raises ConfigError when it is smaller.
    """
    names = tuple(store.manifest.class_names)
    wanted = config.num_classes if config.num_classes is not None else len(names)
    if wanted < len(names):
        raise ConfigError(
            f"num_classes {wanted}, but {config.store} has {len(names)} classes: leave the option out, or raise it"
        )
    if wanted > len(names):
        log.warning("num_classes %d: the head gets %d classes that have no data", wanted, wanted - len(names))
    return names + tuple(f"class_{index}" for index in range(len(names), wanted))


def device_arguments(config: TrainConfig) -> dict[str, Any]:
    """`device` and `amp` in ultralytics' form. Raises ConfigError for what the machine does not have."""
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    devices = [find_device(name, gpus, ConfigError) for name in config.devices]
    kinds = {name.partition(":")[0] for name in devices}
    if len(devices) > 1 and kinds != {"cuda"}:
        raise ConfigError(
            f"device {config.device}: ultralytics trains on several GPUs, not on several {'/'.join(sorted(kinds))} "
            "devices; use one"
        )
    if kinds == {"cuda"}:
        indices = ",".join(str(device_index(name)) for name in devices)
        return {"device": indices, "amp": cuda_precision(config.precision)}
    if config.precision in ("fp16", "bf16"):
        raise ConfigError(
            f"precision {config.precision} on {devices[0]}: ultralytics has it on CUDA GPUs only; use fp32"
        )
    return {"device": devices[0], "amp": False}


def cuda_precision(precision: str) -> bool | str:
    """ultralytics' `amp`: bf16 where the device has it, else fp16 with loss scaling."""
    has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    if precision == "auto":
        return "bf16" if has_bf16 else True
    if precision == "bf16" and not has_bf16:
        raise ConfigError("precision bf16: this GPU does not have it; use fp16 or auto")
    choices: dict[str, bool | str] = {"fp32": False, "bf16": "bf16", "fp16": True}
    return choices[precision]


def plots(config: TrainConfig, names: Sequence[str]) -> dict[str, Any]:
    """Plots are off where polars is missing, which ultralytics draws them with: `{"plots": False}`, else empty.

    Raises ConfigError when plots were asked for.
    """
    if importlib.util.find_spec("polars") is not None:
        register_with_matplotlib(names)
        return {}
    wanted = parse_settings(config.yolo_settings).get("plots")
    if wanted:
        raise ConfigError(
            "yolo_settings plots=true: ultralytics draws plots with polars, which is not installed"
        )
    if wanted is None:
        log.info("no plots in RUN/ultralytics: polars is not installed (pip install polars)")
    return {"plots": False}


def worker_count(config: TrainConfig, arguments: dict[str, Any]) -> int:
    """Loader processes: as asked; ultralytics' 8 at most on GPUs, and on CPUs, as it does, none."""
    if config.workers is not None:
        return config.workers
    return 0 if arguments["device"] in ("cpu", "mps") else min(8, core_share())
