"""Options: defaults, recipes, files, precedence, and all problems in one report."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from train.config import TrainConfig, load_config
from train.errors import ConfigError

ROOT = Path(__file__).parents[2]
NEEDED = {"store": "a.zarr", "out": "run"}


def test_general_defaults_are_those_of_the_specification():
    config = load_config({**NEEDED, "student": "timm:test_resnet"})
    expected = {
        "epochs": 100,
        "batch_size": 32,
        "learning_rate": 1e-4,
        "optimizer": "adamw",
        "lr_scheduler": "cosine",
        "weight_decay": 0.01,
        "grad_accum_steps": 1,
        "max_grad_norm": 1.0,
        "image_size": 224,
        "temperature": None,  # chosen for the logits
        "hard_label_weight": 0.5,
        "soft_label_weight": 0.5,
        "feature_loss_type": "mse",
        "align_feature": True,
        "precision": "auto",
        "lora_rank": 0,
        "lora_alpha": 16,
        "lora_dropout": 0.1,
        "lora_bias": "none",
        "num_classes": None,
    }
    assert {name: getattr(config, name) for name in expected} == expected


@pytest.mark.parametrize(
    ("student", "expected"),
    [
        ("resnet18", (1e-4, "adamw", 32, 0.01, "hybrid", "cosine", None, 224)),
        ("vit-tiny", (5e-5, "adamw", 64, 0.05, "hybrid", "mse", None, 224)),
        ("timm:resnet10t", (1e-4, "adamw", 32, 0.01, "hybrid", "mse", None, 224)),
        ("yolov8n", (1e-4, "auto", 16, 0.0005, "feature", "mse", None, 640)),
        ("unet/small", (1e-4, "adamw", 8, 0.01, "feature", "mse", None, 512)),
        ("lstm/small", (1e-4, "adamw", 32, 0.01, "feature", "cosine", None, 224)),
    ],
)
def test_recipes(student, expected):
    config = load_config({**NEEDED, "student": student})
    names = (
        "learning_rate optimizer batch_size weight_decay distillation_type feature_loss_type feature_weight"
    )
    assert tuple(getattr(config, name) for name in [*names.split(), "image_size"]) == expected
    assert not config.is_explicit("batch_size")


@pytest.mark.parametrize("suffix", ["yaml", "toml", "json"])
def test_option_over_file_over_recipe_over_default(tmp_path, suffix):
    texts = {
        "yaml": "learning-rate: 1.0E-3\nbatch_size: 7\nepochs: 5\n",
        "toml": "learning-rate = 1.0E-3\nbatch_size = 7\nepochs = 5\n",
        "json": '{"learning-rate": 1e-3, "batch_size": 7, "epochs": 5}',
    }
    file = tmp_path / f"options.{suffix}"
    file.write_text(texts[suffix])
    config = load_config({**NEEDED, "student": "vit-tiny", "epochs": 3, "temperature": None}, file)
    assert (config.epochs, config.batch_size, config.learning_rate) == (3, 7, 1e-3)
    assert (config.weight_decay, config.temperature) == (0.05, None)
    assert config.sources["epochs"] == "option"
    assert config.sources["batch_size"] == "file"
    assert config.sources["weight_decay"] == "recipe"
    assert "temperature" not in config.sources
    assert config.is_explicit("batch_size")
    assert not config.is_explicit("weight_decay")
    later = config.replace(batch_size=3)
    assert later.sources == config.sources


def test_all_problems_are_reported_together_with_the_nearest_names():
    with pytest.raises(ConfigError) as caught:
        load_config(
            {
                "student": "resnet19",
                "epocs": 3,
                "batch_size": 0,
                "lr_scheduler": "cosin",
                "learning_rate": "fast",
                "device": "gpu",
            }
        )
    text = str(caught.value)
    for part in (
        "STORE: missing",
        "--out: missing",
        "unknown student 'resnet19'",
        "resnet/resnet18",
        "unknown option epocs: did you mean epochs",
        "batch_size: should be greater than or equal to 1 (got 0)",
        "lr_scheduler: should be 'cosine', 'linear' or 'constant' (got cosin)",
        "learning_rate: should be a valid number (got fast)",
        "device: must be auto, cpu, cuda",
    ):
        assert part in text
    assert caught.value.exit_code == 2
    assert "\n" not in text


def test_contradictions_are_reported_together():
    with pytest.raises(ConfigError) as caught:
        load_config(
            {
                **NEEDED,
                "student": "resnet18",
                "resume": True,
                "overwrite": True,
                "pretrained": True,
                "student_path": "x.pt",
                "mixup_alpha": 1,
                "cutmix_alpha": 1,
                "hard_label_weight": 0,
                "soft_label_weight": 0,
                "control": True,
                "distillation_type": "none",
                "lora_alpha": 4,
                "task": "features",
                "boxes_from": "runs/detector",
                "labeled_share": 0.5,
            }
        )
    text = str(caught.value)
    for part in (
        "resume and overwrite",
        "pretrained and student_path",
        "mixup_alpha and cutmix_alpha",
        "both 0",
        "control and distillation_type none",
        "lora_alpha has no effect without --lora-rank",
        "boxes_from has no effect with task features, which learns no boxes: leave it out",
        "labeled_share has no effect with soft_label_weight 0",
    ):
        assert part in text


def test_a_broken_file_is_named(tmp_path):
    file = tmp_path / "options.yaml"
    file.write_text("- a\n- b\n")
    with pytest.raises(ConfigError, match=r"options.yaml: expected `name: value` lines, got list"):
        load_config({**NEEDED, "student": "resnet18"}, file)
    file.write_text("")
    with pytest.raises(ConfigError, match="got an empty file"):
        load_config({**NEEDED, "student": "resnet18"}, file)
    for path, reason in {tmp_path / "absent.yaml": "No such file", tmp_path: "Is a directory"}.items():
        with pytest.raises(ConfigError, match=rf"configuration {path}: cannot be read: {reason}"):
            load_config({**NEEDED, "student": "resnet18"}, path)


def test_configuration_is_frozen():
    config = load_config({**NEEDED, "student": "resnet18"})
    with pytest.raises(ValueError, match="frozen"):
        config.epochs = 4


def test_every_field_is_an_option_of_the_command():
    import inspect

    from commands.train import train

    offered = set(inspect.signature(train).parameters)
    assert set(TrainConfig.model_fields) - {"sources"} <= offered


def test_two_options_for_the_device_are_one_too_many():
    from commands.train import train

    with pytest.raises(ConfigError, match="--gpu-devices and --device both choose the devices"):
        train(store="x.zarr", gpu_devices="0", device="cpu")


@pytest.mark.slow
def test_command_line_reports_all_problems_and_takes_flags(tmp_path):
    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, str(ROOT / "cli.py"), "train", *arguments],
            capture_output=True,
            text=True,
            timeout=120,
        )

    wrong = run(
        "x.zarr", "--student", "resnet18", "--out", str(tmp_path / "r"), "--epochs", "0", "--batch-size", "x"
    )
    assert wrong.returncode == 2
    assert "epochs:" in wrong.stderr
    assert "batch_size:" in wrong.stderr
    assert wrong.stdout == ""
    missing = run("x.zarr", "--student", "resnet18", "--out", str(tmp_path / "r"), "--no-align-feature")
    assert missing.returncode == 1
    assert missing.stderr.startswith("error: ")
    assert "x.zarr" in missing.stderr


def test_options_survive_json():
    from train.config import config_to_json

    config = load_config({**NEEDED, "student": "resnet18", "ema_decay": 0.9})
    again = TrainConfig(**json.loads(json.dumps(config_to_json(config))))
    assert again == config
