"""What a task cannot work with, found out before hours of extraction instead of after them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from backend.errors import OptionError, PlatformError
from console.devices import device_index

if TYPE_CHECKING:
    from extract.config import ExtractConfig
    from train.config import TrainConfig


def check_devices(devices: tuple[str, ...]) -> None:
    """Raises PlatformError for a GPU that is not there."""
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    missing = [
        name.removeprefix("cuda:") for name in devices if name != "cpu" and device_index(name) >= count
    ]
    if missing:
        raise PlatformError(
            f"--gpu_devices: GPU {', '.join(missing)} is not there, this machine shows {count} to PyTorch: "
            "choose others, or pass --gpu_devices cpu"
        )


def check_student(config: TrainConfig) -> None:
    """Build the student once, with its weights and adapters.

    Raises:
        ConfigError, StudentError, LoraError: what the training itself would raise.
    """
    from train.lora import apply_lora_options
    from train.students.build import build_student

    # Without a number the data's counts; a head of another size is drawn anew, so any will do here.
    classes = None if config.task == "features" else config.num_classes or 2
    student = build_student(
        config.student,
        num_classes=classes,
        image_size=config.image_size,
        student_path=config.student_path,
        pretrained=config.pretrained,
    )
    apply_lora_options(student, config.model_dump(), trained=False)


def check_data(extraction: ExtractConfig, training: TrainConfig) -> None:
    """List the data set: splits to train on and to validate on, and no more classes than the head is to have.

    Raises:
        OptionError: naming what the data set has.
        SourceError: when it cannot be read.
    """
    from extract.sources.detect import open_source

    # A missing split is cut later: that may take reading every file, and changes neither names nor classes.
    source = open_source(
        extraction.data,
        extraction.source,
        split=extraction.split or None,
        val_fraction=0.0,
        **extraction.source_options,
    )
    if len(source.parts) > 1 and not {"train", "val"} <= source.parts.keys():
        raise OptionError(
            f"--dataset_id: {source.root} has the splits {', '.join(sorted(source.parts))}, expected train and val: "
            "add what is missing, or name the data set that has val with --val_dataset_id"
        )
    classes, asked = len(source.class_names), training.num_classes
    if training.task != "features" and asked is not None and asked < classes:
        raise OptionError(
            f"--num_classes: {source.root} has {classes} classes, got {asked}: raise it, or leave it out"
        )
