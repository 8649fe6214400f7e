"""What the platform's settings become in the two configurations."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from backend.task.configs import StageConfigs
from backend.task.errors import OptionError
from backend.task.request import read_request
from tests.test_backend.platform_data import make_class_folders, make_clips, make_masks, make_yolo
from tests.test_backend.platform_site import Site
from train.config import TrainConfig

OUT = Path("features.zarr")


def mapping(site: Site, student: str, **options: object) -> StageConfigs:
    named: dict[str, Any] = {"student_model": student, "student_model_type": None, "student_model_size": None}
    return StageConfigs(read_request(site.words(**(named | options))))


def train(site: Site, student: str, **options: object) -> TrainConfig:
    return mapping(site, student, **options).train_config(OUT)


BACK_END = {
    "task_type": "classification",
    "num_classes": 10,
    "image_size": 224,
    "epochs": 50,
    "batch_size": 16,
    "learning_rate": "2.0E-4",
    "optimizer": "adam",
    "lr_scheduler": "linear",
    "weight_decay": 0.05,
    "grad_accum_steps": 2,
    "max_grad_norm": 0.5,
    "distillation_type": "hybrid",
    "temperature": 3.0,
    "hard_label_weight": 0.3,
    "soft_label_weight": 0.7,
    "feature_loss_type": "cosine",
    "align_feature": "False",
    "distill_loss_type": "kl_div",
    "auto_save_checkpoint": "True",
    "checkpoint_interval": 5,
}


def test_every_setting_of_the_back_end_arrives(site: Site) -> None:
    config = train(site, "resnet50", **BACK_END)
    expected = {
        "student": "resnet/resnet50",
        "task": "classification",
        "num_classes": 10,
        "image_size": 224,
        "epochs": 50,
        "batch_size": 16,
        "learning_rate": 2e-4,
        "optimizer": "adam",
        "lr_scheduler": "linear",
        "weight_decay": 0.05,
        "grad_accum_steps": 2,
        "max_grad_norm": 0.5,
        "distillation_type": "hybrid",
        "temperature": 3.0,
        "hard_label_weight": 0.3,
        "soft_label_weight": 0.7,
        "feature_loss_type": "cosine",
        "align_feature": False,
        "checkpoint_interval": 5,
        "device": "cuda:0",
        "out": site.output / "7",
        "data_root": site.datasets / "flowers",
        "resume": False,
    }
    assert {name: getattr(config, name) for name in expected} == expected


@pytest.mark.parametrize(
    ("student", "expected"),
    [
        ("resnet18", {"learning_rate": 1e-4, "batch_size": 32, "distillation_type": "hybrid"}),
        ("vit-tiny", {"learning_rate": 5e-5, "batch_size": 64, "weight_decay": 0.05}),
        (
            "yolov8n",
            {
                "optimizer": "auto",
                "lr_scheduler": "linear",
                "image_size": 640,
                "distillation_type": "feature",
            },
        ),
        (
            "unet/small",
            {"optimizer": "adamw", "batch_size": 8, "image_size": 512, "feature_loss_type": "mse"},
        ),
        ("lstm/small", {"optimizer": "adamw", "feature_loss_type": "cosine", "distillation_type": "feature"}),
        ("timm:mobilenetv3_small_050", {"distillation_type": "hybrid", "image_size": 224, "lora_rank": 0}),
    ],
)
def test_the_recipe_fills_what_was_not_said(site: Site, student: str, expected: dict[str, Any]) -> None:
    config = train(site, student)
    assert {name: getattr(config, name) for name in expected} == expected
    assert config.num_classes is None  # the data's


@pytest.mark.parametrize(
    ("student", "options", "expected"),
    [
        ("resnet50", {}, {"image_size": 224, "grid": 0, "logits": "probe"}),
        ("resnet50", {"distillation_type": "feature"}, {"grid": 0, "logits": "none"}),
        ("resnet50", {"distillation_type": "logit"}, {"logits": "probe"}),
        ("resnet50", {"task_type": "features"}, {"logits": "none"}),
        ("resnet50", {"image_size": 100}, {"image_size": 112}),
        ("resnet50", {"image_size": 16}, {"image_size": 28}),
        ("resnet50", {"image_size": 70}, {"image_size": 84}),
        ("resnet50", {"image_size": 640}, {"image_size": 448}),
        ("resnet50", {"image_size": 640, "teacher_image_size": 616}, {"image_size": 616}),
        ("yolov8n", {}, {"image_size": 448, "grid": "auto", "logits": "none"}),
        ("unet/small", {"image_size": 256}, {"image_size": 252, "grid": "auto"}),
        ("lstm/small", {}, {"source": "clips", "grid": 0, "logits": "none"}),
    ],
)
def test_extraction_is_derived_from_the_student(
    site: Site, student: str, options: dict[str, Any], expected: dict[str, Any]
) -> None:
    features = mapping(site, student, **options).features()
    assert {name: features.get(name) for name in expected} == expected


def test_stage_one_accepts_it(site: Site) -> None:
    config = mapping(site, "yolov8n", gpu_devices="0,1").extract_config(Path("out.zarr"))
    assert config.data == str(site.datasets / "flowers")
    assert (config.image_size, config.grid, config.device) == (448, "auto", "cuda:0,cuda:1")


def test_hybrid_without_class_logits_becomes_feature_and_is_said(site: Site) -> None:
    made = mapping(site, "unet/small", distillation_type="hybrid", temperature=3.0)
    assert made.distillation == "feature"
    assert made.notes == [
        "distillation_type hybrid: segmentation has no class logits, features alone are distilled"
    ]
    assert made.train_config(Path("s")).is_explicit("temperature") is False


def test_logits_alone_without_class_logits_are_an_error(site: Site) -> None:
    with pytest.raises(OptionError, match="--distillation_type: detection has no class logits"):
        mapping(site, "yolov8n", distillation_type="logit")


def test_lora_on_random_weights_is_left_off_and_said(site: Site) -> None:
    made = mapping(site, "resnet50", lora_rank=16, lora_alpha=32, student_path=site.models / "resnet50")
    config = made.train_config(Path("s"))
    assert config.lora_rank == 0
    assert made.notes[-1] == "lora_rank 16: left off, the student starts from random weights"
    assert not config.is_explicit("lora_alpha")


def test_lora_on_given_weights_stays(site: Site) -> None:
    (site.models / "w.pt").write_bytes(b"x")
    options = {"lora_rank": 16, "lora_dropout": 0.2, "lora_target_modules": "qkv, proj", "lora_bias": "all"}
    config = train(site, "vit-tiny", student_path=site.models / "w.pt", **options)
    assert (config.lora_rank, config.lora_dropout, config.lora_bias) == (16, 0.2, "all")
    assert config.lora_target_modules == "qkv,proj"
    assert config.student_path == site.models / "w.pt"


def keys_of(made: StageConfigs) -> dict[str, list[str]]:
    from extract.plan import open_data

    return {name: list(samples.keys) for name, samples in open_data(made.extract_config(OUT)).splits.items()}


@pytest.mark.parametrize(
    ("student", "make"),
    [
        ("resnet18", make_class_folders),
        ("yolov8n", make_yolo),
        ("unet/small", make_masks),
        ("lstm/small", make_clips),
    ],
)
def test_training_and_validation_from_two_data_sets(
    site: Site, student: str, make: Callable[..., Path]
) -> None:
    """Each gives its own split of that name, whatever the layout."""
    make(site.datasets / "one", train=6, val=2)
    make(site.datasets / "two", train=4, val=3)
    keys = keys_of(mapping(site, student, dataset_id="one", val_dataset_id="two"))
    assert {name: len(found) for name, found in keys.items()} == {"train": 6, "val": 3}


def test_a_data_set_of_one_split_validates_another(site: Site) -> None:
    make_class_folders(site.datasets / "one", train=6, val=2)
    make_class_folders(site.datasets / "two", train=4, val=0)
    keys = keys_of(mapping(site, "resnet18", dataset_id="one", val_dataset_id="two"))
    assert {name: len(found) for name, found in keys.items()} == {"train": 6, "val": 4}


def test_one_split_is_cut_by_content(site: Site) -> None:
    """Names do not matter: copies are on the side of their originals, and renamed files stay where they were."""
    folder = make_class_folders(site.datasets / "one", train=24, val=0)
    for path in sorted(folder.rglob("*.png")):
        shutil.copy(path, path.with_name(f"copy of {path.name}"))
    keys = keys_of(mapping(site, "resnet18", dataset_id="one", val_fraction=0.4))
    sides = {name: {Path(key).name for key in found} for name, found in keys.items()}
    assert all(sides.values())
    assert all(len(found) % 2 == 0 for found in keys.values())
    assert all(f"copy of {name}" in sides[side] for side in sides for name in sides[side] if name[0] != "c")


def test_a_run_in_the_output_folder_is_resumed(site: Site) -> None:
    (site.output / "7").mkdir(parents=True)
    (site.output / "7" / "last.pt").write_bytes(b"x")
    assert train(site, "resnet50").resume


def test_several_devices_reach_both_stages(site: Site) -> None:
    made = mapping(site, "resnet50", gpu_devices="cpu,cpu")
    assert made.train_config(Path("s")).devices == ["cpu", "cpu"]
    assert made.extract_config(Path("o")).devices == ["cpu"]
