"""`cli evaluate` for YOLOv8 students: ultralytics' validator on a split of any store with boxes."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from store.reader import open_store
from train.config import load_config
from train.data.splits import warn_of_measured_split
from train.errors import TrainError
from train.students.base import Student
from train.students.offline import prepare_ultralytics


def evaluate_yolo(
    run: Path,
    store: str | Path,
    student: Student,
    content: Mapping[str, Any],
    *,
    split: str = "val",
    batch_size: int = 16,
    device: str = "auto",
    workers: int | None = None,
    data_root: Path | None = None,
) -> dict[str, Any]:
    """`student, task, split, samples, metrics, per_class, run, store` of a run's best student on a split.

    `student`, `content`: of the run's checkpoint; of an exported ONNX file (`run`), ultralytics opens the file itself.

    Raises TrainError when the store has other classes than the student, or no boxes.
    """
    prepare_ultralytics()
    from train.yolo.dataset import open_split
    from train.yolo.job import device_arguments
    from train.yolo.recorder import METRICS, name_precisions

    opened = open_store(store)
    check_same_classes(tuple(opened.manifest.class_names), tuple(content["class_names"]), store, run)
    size = student.spec.image_size
    data = open_split(opened, split, image_size=size, data_root=data_root, distil=False)
    warn_of_measured_split(str(store), opened, split, "detection")
    options = {"store": store, "student": student.spec.name, "out": run, "device": device}
    config = load_config(options)
    exported = run.suffix == ".onnx"
    network: Any = str(run) if exported else student.network
    names = dict(enumerate(content["class_names"]))
    with tempfile.TemporaryDirectory() as scratch:
        validator = build_validator(
            data,
            names,
            Path(scratch),
            image_size=size,
            batch_size=batch_size,
            device=str(device_arguments(config)["device"]),
            workers=workers or 0,
        )
        if not exported:
            network.names, network.args = names, vars(validator.args)
            network.float().eval()
        with torch.inference_mode():
            stats = validator(model=network)
    box = validator.metrics.box
    return {
        "student": student.spec.name,
        "task": "detection",
        "split": split,
        "samples": len(data.records),
        "metrics": {name: float(stats[key]) for name, key in METRICS.items()},
        "per_class": name_precisions(box, list(names.values())),
        "run": str(run),
        "store": str(store),
    }


def check_same_classes(ours: tuple[str, ...], theirs: tuple[str, ...], store: str | Path, run: Path) -> None:
    if theirs[: len(ours)] != ours:
        raise TrainError(
            f"{store} has classes {', '.join(ours[:5])}, the student of {run} knows {', '.join(theirs[:5])}: evaluate on "
            "a store with the same classes in the same order"
        )


def build_validator(
    data: Any,
    names: dict[int, str],
    folder: Path,
    *,
    image_size: int,
    batch_size: int,
    device: str,
    workers: int,
) -> Any:
    """ultralytics' DetectionValidator on the records of a split, writing into `folder`."""
    from ultralytics.cfg import get_cfg
    from ultralytics.data.build import build_dataloader
    from ultralytics.models.yolo.detect import DetectionValidator
    from ultralytics.utils import YAML

    from train.yolo.dataset import StoreDataset
    from train.yolo.trainer import start_seeded_worker

    description = {"path": str(folder), "train": ".", "val": ".", "names": names}
    YAML.save(folder / "data.yaml", description)
    arguments = get_cfg(
        overrides={
            "task": "detect",
            "mode": "val",
            "data": str(folder / "data.yaml"),
            "imgsz": image_size,
            "batch": batch_size,
            "device": device,
            "workers": workers,
            "plots": False,
            "rect": True,
            "verbose": False,
        }
    )
    dataset = StoreDataset(
        data.records,
        data.read_image,
        follow_sources=False,
        imgsz=image_size,
        batch_size=batch_size,
        augment=False,
        hyp=arguments,
        rect=True,
        stride=32,
        pad=0.5,
        data={"names": names, "nc": len(names), "channels": 3},
    )
    loader = build_dataloader(dataset, batch_size, workers, shuffle=False, device=torch.device("cpu"))
    loader.worker_init_fn = start_seeded_worker
    return DetectionValidator(dataloader=loader, save_dir=folder, args=arguments)
