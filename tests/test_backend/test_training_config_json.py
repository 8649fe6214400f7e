"""The training_config JSON: every field of the contract, flat and nested, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from backend.task.errors import OptionError
from backend.task.parsing import read_training_config


def read(content: dict[str, Any]) -> dict[str, Any]:
    arguments = read_training_config(json.dumps(content))
    arguments.check()
    assert arguments.warnings == []
    return arguments.values


def problem(content: dict[str, Any]) -> str:
    arguments = read_training_config(json.dumps(content))
    with pytest.raises(OptionError) as caught:
        arguments.check()
    assert "\n" not in str(caught.value)
    return str(caught.value)


FLAT = {
    "taskId": 12,
    "taskName": "花卉",
    "teacherModel": "qwen2.5-vl-8b",
    "studentModel": "resnet50",
    "datasetId": 3,
    "valDatasetId": "4",
    "totalEpochs": 50,
    "batchSize": 16,
    "learningRate": 0.0002,
    "temperature": 3.0,
    "alpha": 0.7,
    "loraRank": 8,
    "loraAlpha": 32,
    "loraDropout": 0.05,
    "optimizer": "SGD",
    "lrScheduler": "linear",
    "weightDecay": 0.05,
    "gradAccumSteps": 2,
    "maxGradNorm": 0.5,
    "gpuDevices": [0, 1],
    "autoSaveCheckpoint": True,
    "checkpointInterval": 5,
    "studentModelType": "resnet",
    "studentModelSize": "resnet50",
    "taskType": "classification",
    "numClasses": 10,
    "imageSize": 192,
    "distillationType": "feature",
    "featureLossType": "cosine",
    "alignFeature": False,
}


def test_every_flat_field_of_the_contract() -> None:
    assert read(FLAT) == {
        "task_id": "12",
        "task_name": "花卉",
        "teacher_model": "qwen2.5-vl-8b",
        "student_model": "resnet50",
        "dataset_id": "3",
        "val_dataset_id": "4",
        "epochs": 50,
        "batch_size": 16,
        "learning_rate": 0.0002,
        "temperature": 3.0,
        "soft_label_weight": 0.7,
        "hard_label_weight": 0.3,
        "lora_rank": 8,
        "lora_alpha": 32.0,
        "lora_dropout": 0.05,
        "optimizer": "sgd",
        "lr_scheduler": "linear",
        "weight_decay": 0.05,
        "grad_accum_steps": 2,
        "max_grad_norm": 0.5,
        "gpu_devices": "0,1",
        "auto_save_checkpoint": True,
        "checkpoint_interval": 5,
        "student_model_type": "resnet",
        "student_model_size": "resnet50",
        "task_type": "classification",
        "num_classes": 10,
        "image_size": 192,
        "distillation_type": "feature",
        "feature_loss_type": "cosine",
        "align_feature": False,
    }


NESTED: dict[str, dict[str, Any]] = {
    "teacherModelConfig": {"modelPath": "/models/qwen", "quantization": "none"},
    "studentModelConfig": {"initMethod": "pretrained", "pretrainPath": "/models/resnet50.pt"},
    "loraAdvancedConfig": {"targetModules": ["qkv", "proj"], "layers": "all", "biasTrain": "lora_only"},
    "distillationAdvancedConfig": {
        "hardLabelWeight": 0.4,
        "softLabelWeight": 0.6,
        "lossType": "kl_div",
        "intermediateLayers": [],
        "attentionDistill": False,
    },
}
NESTED_MEANING = {
    "teacher_path": "/models/qwen",
    "pretrained": True,
    "student_path": "/models/resnet50.pt",
    "lora_target_modules": "qkv,proj",
    "lora_bias": "lora_only",
    "hard_label_weight": 0.4,
    "soft_label_weight": 0.6,
    "distill_loss_type": "kl_div",
}


def test_every_nested_field_of_the_contract() -> None:
    assert read(NESTED) == NESTED_MEANING


def test_the_nested_fields_may_be_flat() -> None:
    flat = {name: value for part in NESTED.values() for name, value in part.items()}
    assert read(flat) == NESTED_MEANING


def test_the_record_of_a_task_with_its_config_as_text() -> None:
    record = {"taskId": "a", "totalEpochs": 7, "trainingConfig": json.dumps({"optimizer": "adam", **NESTED})}
    assert read(record) == {"task_id": "a", "epochs": 7, "optimizer": "adam", **NESTED_MEANING}


def test_weights_win_over_alpha() -> None:
    assert read({"alpha": 0.7, "distillationAdvancedConfig": {"softLabelWeight": 0.2}}) == {
        "soft_label_weight": 0.2,
        "hard_label_weight": 0.3,
    }


def test_a_feature_loss_as_loss_type() -> None:
    assert read({"lossType": "smooth-l1"}) == {"feature_loss_type": "smooth_l1"}


def test_descriptions_are_said_to_be_unused() -> None:
    arguments = read_training_config('{"teacherModelConfig": {"paramSize": "8B"}, "newField": 1}')
    assert arguments.warnings == [
        "unknown field newField in training_config: ignored",
        "training_config teacherModelConfig.paramSize '8B' is a description only: not used",
    ]


@pytest.mark.parametrize(
    ("content", "name"),
    [
        ({"distillationAdvancedConfig": {"intermediateLayers": [3, 6]}}, "intermediateLayers"),
        ({"distillationAdvancedConfig": {"attentionDistill": True}}, "attentionDistill"),
        ({"teacherModelConfig": {"quantization": "int8"}}, "quantization"),
        ({"loraAdvancedConfig": {"layers": [1, 2]}}, "layers"),
        ({"loraAdvancedConfig": {"layers": "last4"}}, "layers"),
        ({"learningRate": "fast"}, "learningRate"),
        ({"learningRate": True}, "learningRate"),
        ({"totalEpochs": 1.5}, "totalEpochs"),
        ({"taskId": {"a": 1}}, "taskId"),
        ({"gpuDevices": [{"a": 1}]}, "gpuDevices"),
        ({"studentModelConfig": {"initMethod": "xavier"}}, "initMethod"),
        ({"loraAdvancedConfig": "yes"}, "loraAdvancedConfig"),
        ({"distillationAdvancedConfig": {"lossType": "hinge"}}, "lossType"),
        ({"alpha": 1.5}, "alpha"),
    ],
)
def test_bad_fields_are_refused_by_name(content: dict[str, Any], name: str) -> None:
    assert name in problem(content).partition(":")[0]


@pytest.mark.parametrize(
    "field",
    ["datasetsRoot", "apiBaseUrl", "outputDir", "cacheDir", "platformConfig", "datasetUrl", "modelsRoot"],
)
def test_the_web_form_cannot_move_roots_and_urls(field: str) -> None:
    arguments = read_training_config(json.dumps({field: "/etc"}))
    assert arguments.values == {}
    assert arguments.warnings == [f"unknown field {field} in training_config: ignored"]


@pytest.mark.parametrize(
    "text",
    ["{", "{} {}", '{"a": NaN}', '{"a":' * 100_000, '{"a": Infinity}', '{"epochs": 1' + "0" * 5000 + "}"],
)
def test_broken_json_is_one_line(text: str) -> None:
    with pytest.raises(OptionError) as caught:
        read_training_config(text).check()
    assert "training_config" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file(write: Callable[[str, str], Path]) -> None:
    path = write("config.json", '\ufeff{"totalEpochs": 3}')
    assert read_training_config(str(path)).values == {"epochs": 3}


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=r"cannot read .*No such file"):
        read_training_config(str(tmp_path / "none.json"))


def test_a_file_that_is_no_object(write: Callable[[str, str], Path]) -> None:
    with pytest.raises(OptionError, match="expected a JSON object"):
        read_training_config(str(write("config.json", "[1]")))
