"""`cli evaluate` for YOLOv8 students: ultralytics' validator on a split of any store with boxes."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from store.reader import Store
from train.config import TrainConfig
from train.data.splits import warn_of_measured_split
from train.errors import TrainError
from train.students.base import Student
from train.students.offline import prepare_ultralytics


def evaluate_yolo(
    config: TrainConfig, store: Store, student: Student, content: Mapping[str, Any]
) -> dict[str, Any]:
    """`samples, metrics, per_class` of a run's best student on `val_split`.

    `student`, `content`: of the checkpoint in `out`; of an exported ONNX file (`out`), ultralytics opens the file itself.

    Raises TrainError when the store has other classes than the student, or no boxes.
    """
    prepare_ultralytics()
    from train.yolo.dataset import open_split
    from train.yolo.recorder import METRICS, name_precisions

    run, split = config.out, config.val_split
    check_same_classes(tuple(store.manifest.class_names), tuple(content["class_names"]), config.store, run)
    data = open_split(store, split, image_size=config.image_size, data_root=config.data_root, distil=False)
    warn_of_measured_split(config.store, store, split, "detection")
    exported = run.suffix == ".onnx"
    network: Any = str(run) if exported else student.network
    names = dict(enumerate(content["class_names"]))
    with tempfile.TemporaryDirectory() as scratch:
        validator, stats = validate(config, data, network, names, Path(scratch))
    return {
        "samples": len(data.records),
        "metrics": {name: float(stats[key]) for name, key in METRICS.items()},
        "per_class": name_precisions(validator.metrics.box, list(names.values())),
    }


def check_same_classes(ours: tuple[str, ...], theirs: tuple[str, ...], store: str, run: Path) -> None:
    if theirs[: len(ours)] != ours:
        raise TrainError(
            f"{store} has classes {', '.join(ours[:5])}, the student of {run} knows {', '.join(theirs[:5])}: evaluate on "
            "a store with the same classes in the same order"
        )


def validate(
    config: TrainConfig, data: Any, network: Any, names: dict[int, str], folder: Path
) -> tuple[Any, dict[str, Any]]:
    """ultralytics' validator after its run on the records of a split, and the statistics; `network`: or an ONNX file's path."""
    validator = build_validator(config, data, names, folder)
    if not isinstance(network, str):
        network.names, network.args = names, vars(validator.args)
        network.float().eval()
    with torch.inference_mode():
        return validator, validator(model=network)


def build_validator(config: TrainConfig, data: Any, names: dict[int, str], folder: Path) -> Any:
    """ultralytics' DetectionValidator on the records of a split, writing into `folder`."""
    from ultralytics.cfg import get_cfg
    from ultralytics.data.build import build_dataloader
    from ultralytics.models.yolo.detect import DetectionValidator
    from ultralytics.utils import YAML

    from train.yolo.dataset import StoreDataset
    from train.yolo.job import device_arguments
    from train.yolo.trainer import start_seeded_worker

    description = {"path": str(folder), "train": ".", "val": ".", "names": names}
    YAML.save(folder / "data.yaml", description)
    arguments = get_cfg(
        overrides={
            "task": "detect",
            "mode": "val",
            "data": str(folder / "data.yaml"),
            "imgsz": config.image_size,
            "batch": config.batch_size,
            "device": str(device_arguments(config)["device"]),
            "workers": config.workers or 0,
            "plots": False,
            "rect": True,
            "verbose": False,
        }
    )
    dataset = StoreDataset(
        data.records,
        data.read_image,
        follow_sources=False,
        imgsz=config.image_size,
        batch_size=config.batch_size,
        augment=False,
        hyp=arguments,
        rect=True,
        stride=32,
        pad=0.5,
        data={"names": names, "nc": len(names), "channels": 3},
    )
    loader = build_dataloader(
        dataset, config.batch_size, config.workers or 0, shuffle=False, device=torch.device("cpu")
    )
    loader.worker_init_fn = start_seeded_worker
    return DetectionValidator(dataloader=loader, save_dir=folder, args=arguments)
