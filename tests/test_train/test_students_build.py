"""Every student of the table: builds, runs both ways, has the published number of parameters."""

from __future__ import annotations

import copy
import socket
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

from train.students import timm_student
from train.students.base import Student, StudentError
from train.students.build import build_student, rebuild_student
from train.students.catalog import (
    count_macs,
    input_shape,
    kept_measurements,
    list_students,
    measure_all,
    measure_student,
)
from train.students.families import all_student_names

# Published: torchvision (ResNet), Steiner et al. 2021 (ViT-Ti, B, L at 16), Ronneberger et al. 2015 with batch norm.
PUBLISHED_PARAMETERS = {
    "resnet/resnet18": (1000, 11_689_512),
    "resnet/resnet34": (1000, 21_797_672),
    "resnet/resnet50": (1000, 25_557_032),
    "resnet/resnet101": (1000, 44_549_160),
    "vit/vit-tiny": (1000, 5_717_416),
    "vit/vit-base": (1000, 86_567_656),
    "vit/vit-large": (1000, 304_326_632),
    "unet/small": (2, 7_763_000),
    "unet/medium": (2, 17_460_000),
    "unet/large": (2, 31_037_000),
}
PUBLISHED_GMACS = {
    "resnet/resnet18": 1.82,
    "resnet/resnet50": 4.1,
    "vit/vit-tiny": 1.26,
    "vit/vit-base": 17.58,
}
MEASURED_LSTM = {"lstm/small": 30e6, "lstm/medium": 40.7e6, "lstm/large": 74.7e6}

# name, image size, options: small enough to run in a moment.
QUICK: list[Any] = [
    ("resnet/resnet18", 48, {}),
    ("vit/vit-tiny", 48, {"depth": 2}),
    ("unet/small", 41, {}),
]
THOROUGH: list[Any] = [
    ("unet/small", 32, {}),
    ("lstm/small", 32, {}),
    ("lstm/small", 32, {"freeze_encoder": True, "attention_pooling": True}),
    ("timm:mobilenetv4_conv_small", 64, {}),
    ("timm:convnext_atto", 64, {}),
    ("timm:mixer_s32_224", 64, {}),
]
RUNNABLE = [*QUICK, *(pytest.param(*row, marks=pytest.mark.slow) for row in THOROUGH)]
BIG = ("vit/vit-base", "vit/vit-large", "lstm/medium", "lstm/large", "unet/large")


def on_meta(name: str, num_classes: int, **options: Any) -> Student:
    with torch.device("meta"):
        return build_student(name, num_classes=num_classes, **options)


def example(student: Student, batch: int = 2) -> Tensor:
    shape = list(input_shape(student))
    shape[0] = batch
    if len(shape) == 5:
        shape[1] = 3
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", PUBLISHED_PARAMETERS)
def test_parameter_counts_are_the_published_ones(name: str) -> None:
    classes, published = PUBLISHED_PARAMETERS[name]
    student = on_meta(name, classes, image_size=224)
    assert student.parameter_count() == pytest.approx(published, rel=0.02)


@pytest.mark.parametrize("name", MEASURED_LSTM)
def test_clip_students_count_encoder_and_both_lstm_layers(name: str) -> None:
    assert on_meta(name, 400).parameter_count() == pytest.approx(MEASURED_LSTM[name], rel=0.01)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.slow) if name in BIG else name
        for name in [*PUBLISHED_PARAMETERS, *MEASURED_LSTM]
    ],
)
def test_every_size_runs_forward_and_backward_without_memory(name: str) -> None:
    student = on_meta(name, 7, image_size=64)
    images = torch.empty(2, *input_shape(student)[1:], device="meta")
    output = student(images)
    (output.logits.float().mean() + output.features.float().mean()).backward()
    assert output.logits.shape[:2] == (2, 7)
    assert all(p.grad is not None for p in student.parameters())


@pytest.mark.parametrize(("name", "size", "options"), RUNNABLE)
class TestEveryStudent:
    """A new student gets every check by one line in RUNNABLE."""

    def test_output_is_as_the_spec_says(self, name: str, size: int, options: dict[str, Any]) -> None:
        student = build_student(name, num_classes=5, image_size=size, **options)
        output = student(example(student))
        spec = student.spec
        assert output.logits is not None
        assert output.logits.shape[:2] == (2, 5)
        assert (
            output.features.shape[{"map": 1, "sequence": 2, "vector": 1}[spec.feature_kind]]
            == spec.feature_width
        )
        if spec.task == "segmentation":
            assert output.logits.shape[2:] == (size, size)
        if spec.feature_kind == "map":
            assert output.features.shape[-1] == pytest.approx(size / (spec.feature_stride or 0), abs=0.6)
        assert output.logits.isfinite().all()

    def test_gradients_reach_every_trained_parameter(
        self, name: str, size: int, options: dict[str, Any]
    ) -> None:
        student = build_student(name, num_classes=5, image_size=size, **options).train()
        output = student(example(student))
        (output.logits.square().mean() + output.features.square().mean()).backward()
        silent = [n for n, p in student.named_parameters() if p.requires_grad and p.grad is None]
        assert silent == []
        assert not any(p.grad is not None for p in student.parameters() if not p.requires_grad)

    def test_state_and_spec_rebuild_the_same_student(
        self, name: str, size: int, options: dict[str, Any]
    ) -> None:
        student = build_student(name, num_classes=5, image_size=size, **options).eval()
        again = rebuild_student(student.spec.to_dict()).eval()
        again.load_state_dict(copy.deepcopy(student.state_dict()), strict=True)
        images = example(student)
        torch.testing.assert_close(again(images), student(images))

    def test_without_a_head_there_are_features_only(
        self, name: str, size: int, options: dict[str, Any]
    ) -> None:
        student = build_student(name, num_classes=None, image_size=size, **options).train()
        output = student(example(student))
        assert output.logits is None
        assert student.spec.task == "features"
        assert not any(key.startswith(student.head_prefixes) for key in student.state_dict())

    def test_gradient_checkpointing_changes_memory_only(
        self, name: str, size: int, options: dict[str, Any]
    ) -> None:
        student = build_student(name, num_classes=5, image_size=size, **options).eval()
        images = example(student)
        plain = gradients(student, images)
        try:
            student.set_gradient_checkpointing()
        except StudentError:
            pytest.skip("timm offers none for this model")
        for name_, gradient in gradients(student, images).items():
            torch.testing.assert_close(gradient, plain[name_], rtol=1e-4, atol=1e-6)


def gradients(student: Student, images: Tensor) -> dict[str, Tensor]:
    student.zero_grad()
    student(images).logits.square().mean().backward()
    return {n: p.grad.clone() for n, p in student.named_parameters() if p.grad is not None}


def test_checkpointing_saves_activations() -> None:
    student = build_student("vit-tiny", num_classes=2, image_size=64)
    counts = []
    for enable in (False, True):
        student.set_gradient_checkpointing(enable)
        sizes: list[int] = []

        def pack(tensor: Tensor, sizes: list[int] = sizes) -> Tensor:
            sizes.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            student(example(student)).logits.sum()
        counts.append(sum(sizes))
    assert counts[1] < counts[0] / 2


def test_catalog_lists_measured_students_with_recipes() -> None:
    rows = {
        row["name"]: row
        for row in list_students(["resnet18", "resnet50", "vit-tiny", "vit-base", "lstm/small"])
    }
    for name, published in PUBLISHED_GMACS.items():
        assert rows[name]["macs"] == pytest.approx(published * 1e9, rel=0.02)
        assert rows[name]["parameters"] == PUBLISHED_PARAMETERS[name][1]
        assert rows[name]["recipe"]["image_size"] == 224
    assert rows["lstm/small"]["task"] == "sequence"
    assert rows["lstm/small"]["input_shape"] == [1, 16, 3, 224, 224]
    assert rows["resnet/resnet18"]["distilled_layer"].startswith("last stage")


def test_macs_by_hand() -> None:
    student = on_meta("unet/small", 3, image_size=32)
    first = 32 * 32 * 9 * (3 * 32 + 32 * 32)
    assert count_macs(student) > first
    tiny = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.Flatten(), nn.Linear(4 * 64, 5))
    assert count_macs(tiny, (1, 3, 8, 8)) == 64 * 9 * 3 * 4 + 256 * 5  # type: ignore[arg-type]


def test_patches_that_do_not_divide_the_image_are_refused() -> None:
    with pytest.raises(StudentError, match=r"image_size 100 is not a multiple.*patch 16.*use 96 or 112"):
        build_student("vit-tiny", num_classes=2, image_size=100)


def test_unknown_timm_model_names_the_nearest() -> None:
    with pytest.raises(StudentError, match="mobilenetv4_conv_small"):
        build_student("timm:mobilenet4_conv_small", num_classes=2)


@pytest.mark.parametrize("name", ["unet/small", "lstm/small"])
def test_unknown_options_are_refused(name: str) -> None:
    with pytest.raises(StudentError, match="dropp"):
        build_student(name, num_classes=2, dropp=0.1)


@pytest.mark.parametrize("name", ["unet/small", "yolov8/n"])
def test_families_without_published_weights_refuse_pretrained(name: str) -> None:
    with pytest.raises(StudentError, match=f"no weights are published for {name}: .*--student-path"):
        build_student(name, num_classes=2, image_size=32, pretrained=True)


def test_pretrained_tries_the_hub_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A closed port stands for a machine without a network; the client alone would repeat for most of a minute."""
    from huggingface_hub import constants

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        endpoint = f"http://127.0.0.1:{free.getsockname()[1]}"
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    asked = []
    real = timm_student.hub_failure
    monkeypatch.setattr(timm_student, "hub_failure", lambda url: asked.append(url) or real(url))
    with pytest.raises(StudentError, match=r"does not answer.*--student-path FILE"):
        build_student("resnet18", num_classes=2, image_size=32, pretrained=True)
    assert asked == [endpoint]
    assert constants.HF_HUB_OFFLINE is False


@pytest.mark.slow
def test_kept_measurements_are_those_of_today() -> None:
    assert kept_measurements() == measure_all()


def test_kept_measurements_cover_all_fixed_students() -> None:
    names = {key.partition(" at ")[0] for key in kept_measurements()}
    assert names == {str(name) for name in all_student_names()}
    key = next(key for key in kept_measurements() if key.startswith("unet/small"))
    size, classes = (int(word) for word in key.replace(",", "").split() if word.isdigit())
    assert kept_measurements()[key] == measure_student("unet/small", classes, size)


def test_pretrained_says_what_to_do_when_there_is_no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*_: Any, **__: Any) -> None:
        raise OSError("Name or service not known")

    monkeypatch.setattr(
        timm, "create_model", lambda *a, pretrained=False, **k: unreachable() if pretrained else real(*a, **k)
    )
    with pytest.raises(StudentError, match=r"resnet18 could not be fetched.*--student-path"):
        build_student("resnet18", num_classes=2, image_size=32, pretrained=True)


real = timm.create_model


def test_timm_students_keep_timms_names() -> None:
    torch.manual_seed(0)
    student = build_student("vit-tiny", num_classes=None, image_size=32).eval()
    plain: Any = timm.create_model("vit_tiny_patch16_224", num_classes=0, img_size=32).eval()
    plain.load_state_dict(student.state_dict(), strict=True)
    images = torch.randn(2, 3, 32, 32)
    grid = student(images).features
    tokens = plain.forward_features(images)[:, 1:]
    torch.testing.assert_close(grid, tokens.transpose(1, 2).reshape(2, 192, 2, 2))


def test_layers_behind_the_features_rest_in_label_free_training() -> None:
    student = build_student("timm:mobilenetv4_conv_small", num_classes=None, image_size=64)
    student(example(student)).features.sum().backward()
    assert not student.get_parameter("model.conv_head.weight").requires_grad
    assert [n for n, p in student.named_parameters() if p.requires_grad and p.grad is None] == []


def test_map_features_are_in_raster_order() -> None:
    """A patch changed at row r, column c changes cell (r, c) of the grid most, for ViT and ResNet alike."""
    torch.manual_seed(0)
    student = build_student("vit-tiny", num_classes=None, image_size=64).eval()
    images = torch.randn(1, 3, 64, 64)
    changed = images.clone()
    changed[:, :, 16:32, 48:64] += 3.0
    with torch.no_grad():
        difference = (student(changed).features - student(images).features).norm(dim=1)[0]
    assert divmod(int(difference.argmax()), 4) == (1, 3)
