"""YOLO trainings with LoRA, other losses, and on data or machines that do not fit; evaluation."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from store.errors import DistillError
from tests.test_train.yolo_data import Row, make_store, scenes
from tests.test_train.yolo_runs import (
    Listener,
    make_config,
    metrics_of,
)
from train.checkpoint import load_checkpoint, load_student_from_run
from train.errors import ConfigError, TrainError
from train.loop.machine import OutOfMemoryError
from train.run import run_training
from train.run_folder import RunFolder

pytest.importorskip("ultralytics")


def test_lora_leaves_base_weights_as_they_were(
    yolo_run: tuple[Path, Listener],
    yolo_store: Path,
    tmp_path: Path,
    train_log: pytest.LogCaptureFixture,
) -> None:
    folder, _ = yolo_run
    out = tmp_path / "out"
    options = {
        "lora_rank": 2,
        "student_path": folder / "best.pt",
        "epochs": 1,
        "learning_rate": 0.1,
        "optimizer": "sgd",
    }
    summary = run_training(make_config(yolo_store, out, **options))
    start = load_checkpoint(folder / "best.pt")["model_state_dict"]
    live = load_checkpoint(out / "last.pt")["training"]["model"]
    learning = ("model.22.", "distillation.")  # the Detect head and the alignment heads
    statistics = ("running_mean", "running_var", "num_batches_tracked")
    base = {
        name.replace(".base_layer.", "."): value
        for name, value in live.items()
        if "lora_" not in name and not name.startswith(learning) and not name.endswith(statistics)
    }
    assert len(base) == 3 * 45  # 45 convolutions outside the head, with weight and bias of their batch norm
    for name, value in base.items():
        assert torch.equal(value, start[f"network.{name}"]), name
    adapters = [value for name, value in live.items() if "lora_B" in name]
    assert sum(float(value.abs().sum()) for value in adapters) > 0
    assert summary["trainable_parameters"] < 0.5 * summary["parameters"]
    assert "LoRA on 45 layers: " in train_log.text
    assert f"weights of {folder / 'best.pt'}; initialized randomly: none" in train_log.text
    merged = load_checkpoint(out / "best.pt")["model_state_dict"]
    assert merged.keys() == start.keys()
    assert not torch.equal(merged["network.model.1.conv.weight"], start["network.model.1.conv.weight"])
    student, _ = load_student_from_run(out)
    assert student(torch.zeros(1, 3, 64, 64)).logits is not None


def test_lora_is_merged_in_what_is_validated_and_warns_of_nothing(
    yolo_run: tuple[Path, Listener],
    yolo_store: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    from ultralytics.engine.validator import BaseValidator

    validated: list[set[str]] = []
    plain = BaseValidator.__call__

    def call(self: Any, trainer: Any = None, model: Any = None) -> Any:
        if trainer is not None:
            validated.append(set(trainer.ema.ema.state_dict()))
        return plain(self, trainer, model)

    monkeypatch.setattr(BaseValidator, "__call__", call)
    options = {"lora_rank": 2, "student_path": yolo_run[0] / "best.pt", "epochs": 1}
    run_training(make_config(yolo_store, tmp_path / "out", **options))
    (names,) = validated
    assert not [name for name in names if "lora" in name or "base_layer" in name]
    assert [name for name in names if name.startswith("distillation.")]
    assert "requires_grad" not in "".join(capfd.readouterr())


@pytest.mark.parametrize("kind", ["cosine", pytest.param("smooth_l1", marks=pytest.mark.slow)])
def test_feature_losses_and_foreground_weights(yolo_store: Path, tmp_path: Path, kind: str) -> None:
    options = {"feature_loss_type": kind, "foreground_weight": 4.0, "epochs": 1, "distill_layers": "P3"}
    run_training(make_config(yolo_store, tmp_path / "out", **options))
    assert metrics_of(tmp_path / "out")[0]["feature_loss"] > 0


def flattened(content: Any, name: str = "") -> dict[str, torch.Tensor]:
    """Every tensor in nested dictionaries, by the path to it."""
    if isinstance(content, torch.Tensor):
        return {name: content}
    if not isinstance(content, dict):
        return {}
    parts = (flattened(value, f"{name}/{key}") for key, value in content.items())
    return {key: value for part in parts for key, value in part.items()}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("chosen", "expected"),
    [
        ("p3:8,p5:last", {"P3": {(5,)}, "P4": set(), "P5": {(12,)}}),
        (None, {"P3": {(5,)}, "P4": {(5,)}, "P5": {(12,)}}),
    ],
)
def test_levels_that_learn_different_layers(
    tmp_path: Path, chosen: str | None, expected: dict[str, set[tuple[int, ...]]]
) -> None:
    """By default a store's layers are those of P3, P4 and P5."""
    rows = {"train": scenes(12, 0), "val": scenes(6, 1)}
    store = make_store(tmp_path / "store", rows, layers={8: (16, 5)})
    options = {"epochs": 2, "distill_layers": chosen}
    run_training(make_config(store, tmp_path / "out", **options))
    assert all(record["feature_loss"] > 0 for record in metrics_of(tmp_path / "out"))
    saved = flattened(load_checkpoint(tmp_path / "out" / "last.pt"))
    widths = {
        level: {tuple(value.shape)[:1] for name, value in saved.items() if f"heads.{level}." in name}
        for level in ("P3", "P4", "P5")
    }
    assert widths == expected


def loss_nan(kind: str, rows: torch.Tensor, *_: Any) -> torch.Tensor:
    return rows.sum() * float("nan")


def gradient_nan(kind: str, rows: torch.Tensor, *_: Any) -> torch.Tensor:
    return (rows.sum() * 0).sqrt()  # 0, whose gradient is 0 · infinity


def validation_nan(kind: str, rows: torch.Tensor, *_: Any) -> torch.Tensor:
    return rows.sum() * (1e-6 if torch.is_grad_enabled() else float("nan"))


@pytest.mark.parametrize(
    ("term", "what"),
    [(loss_nan, "loss"), (gradient_nan, "gradient"), (validation_nan, "validation loss")],
)
def test_what_is_not_finite_stops_the_run_and_saves_nothing(
    yolo_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, term: Any, what: str
) -> None:
    from train.yolo import model

    monkeypatch.setattr(model, "feature_loss", term)
    with pytest.raises(TrainError, match=f"the {what} is not finite in epoch 1, nothing of which is saved"):
        run_training(make_config(yolo_store, tmp_path / "out"))
    assert not (tmp_path / "out" / "last.pt").exists()


def exhaust_memory_above(limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from train.yolo.model import Distillation

    plain = Distillation.forward

    def forward(self: Any, maps: Any, batch: Any, targets: Any) -> Any:
        if self.training and len(batch["img"]) > limit:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return plain(self, maps, batch, targets)

    monkeypatch.setattr(Distillation, "forward", forward)


def test_out_of_memory_ends_with_advice(
    yolo_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    exhaust_memory_above(2, monkeypatch)
    with pytest.raises(OutOfMemoryError, match=r"half the --batch-size.*\(batch_size 4\)"):
        run_training(make_config(yolo_store, tmp_path / "out"))


@pytest.mark.slow
def test_auto_batch_halves_until_it_fits_also_for_the_control(
    yolo_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    exhaust_memory_above(2, monkeypatch)
    out = tmp_path / "out"
    options = {"auto_batch": True, "control": True, "epochs": 1, "grad_accum_steps": 1}
    summary = run_training(make_config(yolo_store, out, **options, yolo_settings="plots=false"))
    assert summary["batch_size"] == 2
    control = json.loads((out / "control" / "config.json").read_text())["resolved"]["ultralytics"]
    assert (control["batch"], control["nbs"]) == (2, 4)  # the main run halved 4, accumulating to 4 as before


@pytest.mark.slow
def test_auto_batch_gives_up_when_nothing_fits(
    yolo_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    exhaust_memory_above(0, monkeypatch)
    with pytest.raises(OutOfMemoryError):
        run_training(make_config(yolo_store, tmp_path / "out", auto_batch=True))


def test_a_last_batch_of_one_tiny_image_is_an_error(tmp_path: Path) -> None:
    store = make_store(tmp_path / "s", {"train": scenes(5, 0), "val": scenes(2, 1)})
    with pytest.raises(TrainError, match=r"batch_size 4, image_size 32: final batch=1.*change batch"):
        run_training(make_config(store, tmp_path / "out", image_size=32))


@pytest.mark.slow
def test_images_without_any_box_train_with_a_warning(
    tmp_path: Path, train_log: pytest.LogCaptureFixture
) -> None:
    """As in ultralytics: backgrounds alone teach the class scores that there is nothing; plots included."""
    empty = [(image, boxes[:0], classes[:0]) for image, boxes, classes in scenes(4, 0)]
    store = make_store(tmp_path / "s", {"train": empty, "val": empty[:2]})
    summary = run_training(make_config(store, tmp_path / "out", epochs=1, yolo_settings="plots=true"))
    assert summary["metrics"]["map50"] == 0
    assert "train: no image has a box" in train_log.text


def test_inside_torchrun_it_says_who_starts_the_processes(
    yolo_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOCAL_RANK", "0")
    with pytest.raises(ConfigError, match=r"without torchrun .* --device cuda:0,cuda:1"):
        run_training(make_config(yolo_store, tmp_path / "out"))


def test_an_explicit_batch_larger_than_the_split_is_an_error(yolo_store: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="batch_size 64 is larger than split train"):
        run_training(make_config(yolo_store, tmp_path / "out", batch_size=64))


@pytest.fixture(scope="module")
def learned_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, dict[str, Any]]:
    """A store, the folder of a training that finds objects in it, and the training's summary."""
    folder = tmp_path_factory.mktemp("learned")
    store = make_store(folder / "s.zarr", {"train": scenes(64, 0), "val": scenes(16, 1)})
    options = {
        "optimizer": "adamw",
        "learning_rate": 2e-3,
        "epochs": 15,
        "image_size": 96,
        "warmup_epochs": 1,
    }
    settings = "plots=false,nbs=4,close_mosaic=4"
    return (
        store,
        folder / "out",
        run_training(make_config(store, folder / "out", **options, yolo_settings=settings)),
    )


@pytest.mark.slow
def test_a_student_learns_and_evaluation_finds_what_the_training_measured(
    learned_run: tuple[Path, Path, dict[str, Any]],
) -> None:
    from train.deliver.evaluate import evaluate_run

    store, out, summary = learned_run
    assert summary["metrics"]["map50"] > 0.3
    records = metrics_of(out)
    assert records[-1]["feature_loss"] < 0.5 * records[0]["feature_loss"]
    found = evaluate_run(out, store, split="val", batch_size=8, device="cpu")
    assert found["samples"] == 16
    for name, value in summary["exported"].items():
        assert found["metrics"][name] == pytest.approx(value, abs=0.02)
    assert found["per_class"].keys() == {"red", "green"}


def unlabeled(rows: list[Row]) -> list[Row]:
    """The same images as ones without a label file."""
    return [(image, np.zeros((1, 4), np.float32), np.array([-1], np.int32)) for image, _, _ in rows]


@pytest.mark.slow
def test_a_trained_detector_labels_images_without_boxes(
    learned_run: tuple[Path, Path, dict[str, Any]], tmp_path: Path, train_log: pytest.LogCaptureFixture
) -> None:
    from train.yolo.dataset import FoundBoxes

    _, detector, _ = learned_run
    hidden = scenes(12, 5)
    splits = {"train": [*unlabeled(hidden[:6]), *scenes(4, 6), *unlabeled(hidden[6:])], "val": scenes(8, 1)}
    out = tmp_path / "out"
    config = make_config(
        make_store(tmp_path / "mixed.zarr", splits), out, epochs=1, boxes_from=detector, control=True
    )
    run_training(config)
    found, truth = FoundBoxes.read(out), dict(zip([*range(6), *range(10, 16)], hidden, strict=True))
    assert f"{len(found.rows)} boxes of confidence {float(found.confidence):.2f} or more" in train_log.text
    assert set(found.rows.tolist()) <= truth.keys(), "labeled images keep their boxes"
    centers, halves = found.boxes[:, :2], found.boxes[:, 2:] / 2
    corners = np.concatenate([centers - halves, centers + halves], axis=1)
    right = 0
    for row, box, label in zip(found.rows.tolist(), corners, found.classes, strict=True):
        image, boxes, classes = truth[row]
        overlaps = [overlap(box * np.tile(image.shape[1::-1], 2), true) for true in boxes]
        best = int(np.argmax(overlaps))
        right += overlaps[best] > 0.5 and classes[best] == label
    assert right > 0.6 * len(found.rows) > 0
    learned = 4 + len(np.unique(found.rows))
    for folder in (out, out / "control"):
        assert RunFolder(folder).read_resolved()["train_images"] == learned
    assert (out / "boxes.npz").read_bytes() == (out / "control/boxes.npz").read_bytes()


def overlap(one: np.ndarray, other: np.ndarray) -> float:
    """Intersection over union of two boxes (corners)."""
    sides = np.clip(np.minimum(one[2:], other[2:]) - np.maximum(one[:2], other[:2]), 0, None)
    both = float(np.prod(sides))
    return both / float(np.prod(one[2:] - one[:2]) + np.prod(other[2:] - other[:2]) - both)


def test_what_cannot_label_images_is_one_line(
    yolo_store: Path, yolo_run: tuple[Path, Listener], run_folder: Path, tmp_path: Path
) -> None:
    folder, _ = yolo_run
    splits = {"train": [*unlabeled(scenes(2, 5)), *scenes(4, 6)], "val": scenes(4, 1)}
    store = make_store(tmp_path / "mixed.zarr", splits)
    other = make_store(tmp_path / "other.zarr", splits, names=("cat", "dog"))
    for data, detector, problem in (
        (yolo_store, folder, "every image of .* is labeled: leave the option out"),
        (store, run_folder, "its task is classification, expected a run of a YOLOv8 student"),
        (store, tmp_path / "gone", "not a run folder|no such"),
        (other, folder, "has classes cat, dog, the student of .* knows red, green"),
        (
            store,
            folder,
            "it finds none of the objects of split val, so it cannot label images: train it longer",
        ),
    ):
        with pytest.raises(DistillError, match=problem):
            run_training(make_config(data, tmp_path / "out", epochs=1, boxes_from=detector, overwrite=True))


def test_evaluation_wants_the_same_classes(yolo_run: tuple[Path, Listener], tmp_path: Path) -> None:
    from train.deliver.evaluate import evaluate_run

    folder, _ = yolo_run
    other = make_store(tmp_path / "other.zarr", {"val": scenes(2, 3)}, names=("cat", "dog"))
    with pytest.raises(TrainError, match=r"has classes cat, dog, the student .* knows red, green"):
        evaluate_run(folder, other, device="cpu")
    assert (
        evaluate_run(folder, make_store(tmp_path / "s.zarr", {"val": scenes(2, 3)}), device="cpu")["samples"]
        == 2
    )


@pytest.mark.slow
def test_a_run_that_detects_nothing_gets_a_hint(
    yolo_store: Path, tmp_path: Path, train_log: pytest.LogCaptureFixture
) -> None:
    run_training(make_config(yolo_store, tmp_path / "out", epochs=4, learning_rate=1e-9, optimizer="sgd"))
    assert "mAP50-95 is still 0 after 2 of 4 epochs" in train_log.text
