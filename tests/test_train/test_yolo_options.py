"""Our options in ultralytics' terms, and those that it cannot follow."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from console.options import options_of
from store.reader import open_store
from tests.test_train.yolo_data import make_store, scenes
from train.config import TrainConfig
from train.distill.levels import detector_levels
from train.errors import ConfigError

pytest.importorskip("ultralytics")

from train.yolo.options import (
    check_options,
    clip_norm,
    parse_settings,
    ultralytics_arguments,
)


def make_config(**options: Any) -> TrainConfig:
    return TrainConfig(**{"store": Path("s.zarr"), "student": "yolov8/n", "out": Path("run"), **options})


def test_the_recipe_keeps_ultralytics_own_defaults() -> None:
    arguments = ultralytics_arguments(make_config(), 10_000)
    assert arguments["optimizer"] == "auto"
    assert arguments["weight_decay"] == 0.0005
    assert arguments["imgsz"] == 640
    assert arguments["nbs"] == 64
    assert arguments["warmup_epochs"] == 3
    assert arguments["cos_lr"] is False
    assert not {"mosaic", "momentum", "lrf"} & arguments.keys()
    assert clip_norm(make_config()) == 10
    assert detector_levels(make_config().distill_layers, "yolov8/n") == {"P5": None}


@pytest.mark.parametrize(
    ("images", "epochs", "nominal", "warmup"),
    [(205, 10, 20, 1.0), (205, 100, 64, 3.0), (205, 1, 16, 0.1), (118_000, 3, 64, 0.3)],
)
def test_a_short_run_takes_more_steps_and_warms_up_for_a_tenth(
    images: int, epochs: int, nominal: int, warmup: float
) -> None:
    arguments = ultralytics_arguments(make_config(epochs=epochs), images)
    assert arguments["nbs"] == nominal
    assert arguments["warmup_epochs"] == pytest.approx(warmup)
    asked = ultralytics_arguments(make_config(epochs=epochs, grad_accum_steps=4, warmup_epochs=3), images)
    assert (asked["nbs"], asked["warmup_epochs"]) == (64, 3)


def test_explicit_options_are_mapped() -> None:
    config = make_config(
        batch_size=4,
        grad_accum_steps=3,
        max_grad_norm=0.5,
        lr_scheduler="constant",
        warmup_epochs=1,
        optimizer="adamw",
        early_stopping_patience=7,
        augment="none",
        distill_layers="p3, P5",
        yolo_settings="mosaic=0.25,degrees=10",
    )
    arguments = ultralytics_arguments(config, 10_000)
    assert arguments["nbs"] == 12
    assert arguments["lrf"] == 1.0
    assert arguments["cos_lr"] is False
    assert arguments["optimizer"] == "AdamW"
    assert arguments["momentum"] == 0.9
    assert arguments["patience"] == 7
    assert arguments["hsv_s"] == 0
    assert arguments["mosaic"] == 0.25  # a setting wins over the summary option
    assert arguments["degrees"] == 10
    assert clip_norm(config) == 0.5
    assert clip_norm(make_config(max_grad_norm=0)) == float("inf")
    assert detector_levels(config.distill_layers, config.student) == {"P3": None, "P5": None}


@pytest.mark.parametrize(
    ("option", "text"),
    [
        ({"temperature": 2.0}, "temperature"),
        ({"ema_decay": 0.99}, "always averages weights"),
        ({"label_smoothing": 0.1}, "label_smoothing"),
        ({"gradient_checkpointing": True}, "gradient_checkpointing"),
        ({"compile": True}, "compile"),
        ({"dropout": 0.1}, "dropout"),
        ({"views": "recorded"}, "recorded views cannot be replayed"),
        ({"distillation_type": "logit"}, "distillation_type logit"),
        ({"feature_loss_type": "relation"}, "mse, cosine or smooth_l1"),
        ({"image_size": 100}, "not a multiple of 32.*use 96"),
        ({"task": "segmentation"}, "task segmentation"),
        ({"feature_target": "pooled"}, "feature_target pooled"),
    ],
)
def test_options_that_cannot_be_followed_are_errors(option: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        check_options(make_config(**option))


def test_defaults_and_hybrid_are_accepted() -> None:
    check_options(make_config())
    check_options(make_config(distillation_type="hybrid"))


# Options that a YOLO training follows; every other one must be refused when it is asked for.
FOLLOWED = [
    "align_feature",
    "align_head",
    "augment",
    "auto_batch",
    "batch_size",
    "boxes_from",
    "cache_dir",
    "cache_gb",
    "checkpoint_interval",
    "checkpoint_minutes",
    "control",
    "control_only",
    "data_root",
    "deterministic",
    "device",
    "distill_layers",
    "distill_loss_type",
    "distillation_type",
    "early_stopping_patience",
    "epochs",
    "feature_loss_type",
    "feature_target",
    "feature_weight",
    "foreground_weight",
    "grad_accum_steps",
    "hard_label_weight",
    "image_size",
    "learning_rate",
    "lora_alpha",
    "lora_bias",
    "lora_dropout",
    "lora_rank",
    "lora_target_modules",
    "lr_scheduler",
    "max_grad_norm",
    "num_classes",
    "optimizer",
    "out",
    "overwrite",
    "precision",
    "pretrain_cache",
    "pretrain_epochs",
    "pretrain_image_size",
    "pretrain_learning_rate",
    "resume",
    "seed",
    "soft_label_weight",
    "sources",
    "standardize",
    "store",
    "student",
    "student_path",
    "task",
    "teachers",
    "tracker",
    "train_split",
    "val_split",
    "validate_every",
    "warmup_epochs",
    "weight_decay",
    "workers",
    "yolo_settings",
]


def test_every_option_is_followed_or_refused() -> None:
    refused = [
        name
        for name, item in options_of(TrainConfig).items()
        if "yolov8" in item.not_for or (item.students and "yolov8" not in item.students)
    ]
    assert sorted([*FOLLOWED, *refused]) == sorted(TrainConfig.model_fields)


def test_all_problems_come_together() -> None:
    with pytest.raises(ConfigError, match=r"ema_decay.*image_size 100"):
        check_options(make_config(ema_decay=0.9, image_size=100))


@pytest.mark.parametrize(
    "text",
    [
        "nonsense=1",
        "mosaic",
        "save_dir=x",
        "device=0",
        "fraction=0.5",
        "single_cls=true",
        "mosaic=2",
        "plots=maybe",
        "box=none",
        "freeze=[0,1",
    ],
)
def test_settings_are_checked(text: str) -> None:
    with pytest.raises(ConfigError, match="yolo_settings"):
        parse_settings(text)


def test_settings_are_read_as_ultralytics_reads_them() -> None:
    found = parse_settings("lrf=1e-3, scale=(0.5,1.5),freeze=[0,1],plots=False,rect=true")
    assert found == {"lrf": 1e-3, "scale": (0.5, 1.5), "freeze": [0, 1], "plots": False, "rect": True}


@pytest.mark.parametrize("freeze", [23, -1, [30], "head", [*range(23)]])
def test_frozen_layers_exist_and_leave_some_to_learn(freeze: Any) -> None:
    from train.students.yolo import build_network
    from train.yolo.job import check_frozen

    with torch.device("meta"):
        network = build_network("n", 2)
    check_frozen(22, network)
    check_frozen([0, 5], network)
    with pytest.raises(ConfigError, match=r"freeze=.*0 to 22"):
        check_frozen(freeze, network)


def test_cpu_has_no_distributed_training() -> None:
    from train.yolo.job import device_arguments

    with pytest.raises(ConfigError, match="not on several"):
        device_arguments(make_config(device="cpu,cpu"))
    assert device_arguments(make_config(device="cpu")) == {"device": "cpu", "amp": False}
    for precision in ("fp16", "bf16"):
        with pytest.raises(ConfigError, match=f"precision {precision} on cpu"):
            device_arguments(make_config(device="cpu", precision=precision))


def test_classes_may_be_more_than_the_store_has_but_not_fewer(tmp_path: Path) -> None:
    from train.yolo.job import class_names

    store = open_store(make_store(tmp_path / "s", {"train": scenes(2, 1)}))
    assert class_names(make_config(num_classes=3), store) == ("red", "green", "class_2")
    with pytest.raises(ConfigError, match="num_classes 1"):
        class_names(make_config(num_classes=1), store)


def optimizer_of(store: Path, out: Path, iterations: int, chosen: Any = None, **options: Any) -> Any:
    """The optimizer that a training of that many steps gets, and ultralytics' arguments then."""
    from train.yolo.job import build_job
    from train.yolo.trainer import StoreTrainer

    config = make_config(store=store, out=out, image_size=64, device="cpu", **options)
    trainer = StoreTrainer(build_job(config, out, open_store(store), None))
    if chosen is not None:
        trainer.job.state = {"chosen": chosen}
    arguments = trainer.args
    network = trainer.job.student.network
    return trainer.build_optimizer(
        network, arguments.optimizer, arguments.lr0, arguments.momentum, 5e-4, iterations
    ), arguments


def test_the_recipe_chooses_the_optimizer_as_ultralytics_does(yolo_store: Path, tmp_path: Path) -> None:
    few, arguments = optimizer_of(yolo_store, tmp_path / "few", 40)
    assert type(few).__name__ == "AdamW"
    rate = round(0.002 * 5 / (4 + 2), 6)  # two classes
    assert {group["lr"] for group in few.param_groups} == {rate}
    assert (arguments.optimizer, arguments.lr0, arguments.warmup_bias_lr) == ("AdamW", rate, 0.0)
    many, _ = optimizer_of(yolo_store, tmp_path / "many", 10_001)
    assert type(many).__name__ == "MuSGD"
    assert {group["lr"] for group in many.param_groups} == {0.01, 0.03}


def test_a_given_learning_rate_stays_with_the_chosen_optimizer(yolo_store: Path, tmp_path: Path) -> None:
    few, arguments = optimizer_of(yolo_store, tmp_path / "few", 40, learning_rate=0.003)
    assert type(few).__name__ == "AdamW"
    assert [group["lr"] for group in few.param_groups] == pytest.approx([0.003] * 3)
    assert arguments.lr0 == 0.003
    many, _ = optimizer_of(yolo_store, tmp_path / "many", 10_001, learning_rate=0.003)
    assert {round(group["lr"], 6) for group in many.param_groups} == {0.003, 0.009}


def test_a_resumed_run_keeps_the_chosen_optimizer(yolo_store: Path, tmp_path: Path) -> None:
    chosen = {"optimizer": "AdamW", "lr0": 0.001667, "warmup_bias_lr": 0.0}
    optimizer, arguments = optimizer_of(yolo_store, tmp_path / "run", 10_001, chosen)
    assert type(optimizer).__name__ == "AdamW"
    assert {group["lr"] for group in optimizer.param_groups} == {0.001667}
    assert arguments.warmup_bias_lr == 0.0


def test_platform_options_keep_their_meaning(yolo_store: Path, tmp_path: Path) -> None:
    optimizer, _ = optimizer_of(yolo_store, tmp_path / "run", 40, learning_rate=1e-3, optimizer="sgd")
    assert type(optimizer).__name__ == "SGD"
    assert {group["lr"] for group in optimizer.param_groups} == {1e-3}


def test_only_yolo_students_choose_an_optimizer() -> None:
    with pytest.raises(ValueError, match="optimizer auto: only yolov8 students have it, not resnet/resnet18"):
        make_config(student="resnet18", optimizer="auto")
