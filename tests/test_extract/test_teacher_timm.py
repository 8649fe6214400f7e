"""The timm teacher: weights by name or by order, real labels through the real preprocessing, clear refusals."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file

from extract.teachers import CheckpointError, TeacherError, load_teacher
from extract.teachers.timm_encoder import TimmTeacher

SMALL = "test_efficientnet"


def load(path: Path | None, name: str = SMALL, **options: Any) -> TimmTeacher:
    teacher = load_teacher(
        f"timm:{name}", path and str(path), **{"device": "cpu", "dtype": "float32", **options}
    )
    assert isinstance(teacher, TimmTeacher)
    return teacher


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    torch.manual_seed(3)
    return timm.create_model(SMALL).eval()


@pytest.fixture
def images() -> torch.Tensor:
    return torch.randint(
        0, 256, (2, 3, 96, 128), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )


def expected_grid(model: torch.nn.Module, images: torch.Tensor) -> torch.Tensor:
    """By timm's own means: its configuration's mean and std, forward_features."""
    config = timm.data.resolve_model_data_config(model)
    mean, std = (torch.tensor(config[key]).view(3, 1, 1) for key in ("mean", "std"))
    with torch.inference_mode():
        return model.forward_features((images / 255 - mean) / std).permute(0, 2, 3, 1)  # type: ignore[operator]


@pytest.mark.parametrize(
    "layout", ["by name", "wrapped", "from DDP", "in order", "safetensors", "other head", "old"]
)
def test_every_usual_layout_loads(
    layout: str, model: torch.nn.Module, images: torch.Tensor, tmp_path: Path
) -> None:
    state = dict(model.state_dict())
    file = tmp_path / "weights.pth"
    if layout == "wrapped":
        torch.save({"epoch": 3, "state_dict": state}, file)
    elif layout == "from DDP":
        torch.save({f"module.{name}": value for name, value in state.items()}, file)
    elif layout == "in order":
        torch.save({f"tensor_{index}": value for index, value in enumerate(state.values())}, file)
    elif layout == "safetensors":
        file = tmp_path / "weights.safetensors"
        save_file(state, file)
    elif layout == "other head":
        head = {"classifier.weight": torch.zeros(7, 256), "classifier.bias": torch.zeros(7)}
        torch.save(state | head, file)
    elif layout == "old":
        torch.save({name: value for name, value in state.items() if "num_batches" not in name}, file)
    else:
        torch.save(state, file)
    teacher = load(file)
    assert torch.allclose(teacher.encode(images).grid, expected_grid(model, images), atol=1e-5)
    assert not teacher.spec.random_weights


def test_pretrained_weights_in_timms_order_recognise_real_photos(
    pretrained_teacher_weights: Path, asset_path: Callable[[str], Path]
) -> None:
    """The ordered-values file: 18 of 20 ImageNet photos, label in the file name; pooled is what the head reads."""
    teacher = load(pretrained_teacher_weights, "tf_efficientnet_lite2", image_size=260)
    assert (teacher.spec.width, teacher.grid_size(260, 260)) == (1280, (9, 9))
    assert teacher.preprocessing.mean == teacher.preprocessing.std == (0.5, 0.5, 0.5)  # pixel / 127.5 − 1
    files = sorted((asset_path("foolbox") / "foolbox" / "data").glob("imagenet_*.jpg"))
    labels = torch.tensor([int(file.stem.rpartition("_")[2]) for file in files])
    photos = [Image.open(file) for file in files]
    pooled = teacher.encode(photos).pooled
    with torch.inference_mode():
        answers = teacher.model.classifier(pooled).argmax(dim=1)  # type: ignore[operator]
    assert (answers == labels).sum() >= 18
    assert (answers == labels.roll(1)).sum() <= 4


def test_any_size_works(pretrained_teacher_weights: Path) -> None:
    teacher = load(pretrained_teacher_weights, "tf_efficientnet_lite2", image_size=224)
    grids = {size: teacher.grid_size(*size) for size in [(224, 224), (260, 260), (320, 192), (33, 33)]}
    assert grids == {(224, 224): (7, 7), (260, 260): (9, 9), (320, 192): (10, 6), (33, 33): (2, 2)}


def test_vision_transformers_are_built_for_the_size() -> None:
    assert load(None, "test_vit", image_size=96, random_weights=True).grid_size(96, 96) == (6, 6)
    with pytest.raises(TeacherError, match="cannot encode 64×64 pixels"):
        load(None, "vit_tiny_patch16_224", image_size=96, random_weights=True).encode(
            torch.zeros(1, 3, 64, 64, dtype=torch.uint8)
        )


def test_maps_with_the_channels_last_are_understood() -> None:
    """Swin gives [B, h, w, D]: the cell under the object changes most."""
    teacher = load(None, "swin_tiny_patch4_window7_224", random_weights=True)
    images = torch.full((2, 3, 224, 224), 128, dtype=torch.uint8)
    images[1, :, 32 * 5 : 32 * 6, 32 : 32 * 2] = 255
    grid = teacher.encode(images).grid
    assert grid.shape == (2, 7, 7, 768)
    assert int((grid[1] - grid[0]).norm(dim=-1).argmax()) == 5 * 7 + 1


def test_frame_pairs_are_qwens(model: torch.nn.Module, tmp_path: Path) -> None:
    torch.save(model.state_dict(), tmp_path / "weights.pth")
    with pytest.raises(TeacherError, match="takes single frames"):
        load(tmp_path / "weights.pth").encode(torch.zeros(1, 2, 3, 64, 64, dtype=torch.uint8))


def test_models_without_a_grid_are_refused() -> None:
    with pytest.raises(TeacherError, match=r"MlpMixer gives features \[1, 49, 512\], which are no grid"):
        load(None, "mixer_s32_224", random_weights=True)


class Payload:
    """Unpickled without care, this would write a file."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.write_text, (self.target, "executed"))


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (None, "no such file; expected a state dict"),
        (b"", "weights cannot be read: it is empty"),
        (b"<html>not found</html>", "weights cannot be read: not a file of torch.save"),
        ([1, 2], "holds list, expected a state dict"),
        ({"epoch": 3}, "holds dict, expected a state dict"),
        ({}, "does not fit timm:test_efficientnet: .* got nothing; is it another model"),
        (
            {"conv_stem.weight": torch.zeros(1)},
            r"first conv_stem.weight: expected \[24, 3, 3, 3\], got \[1\]",
        ),
    ],
)
def test_weights_that_do_not_fit_are_refused(content: Any, problem: str, tmp_path: Path) -> None:
    file = tmp_path / "weights.pth"
    if isinstance(content, bytes):
        file.write_bytes(content)
    elif content is not None:
        torch.save(content, file)
    with pytest.raises(CheckpointError, match=problem) as caught:
        load(file)
    assert "\n" not in str(caught.value)


def test_a_malicious_file_is_not_executed(tmp_path: Path) -> None:
    torch.save({"conv_stem.weight": Payload(tmp_path / "trace")}, tmp_path / "weights.pth")
    with pytest.raises(CheckpointError, match="weights cannot be read: it holds more than weights"):
        load(tmp_path / "weights.pth")
    assert not (tmp_path / "trace").exists()


def test_weights_of_another_model_are_refused(tmp_path: Path) -> None:
    torch.save(timm.create_model("test_resnet").state_dict(), tmp_path / "weights.pth")
    with pytest.raises(CheckpointError, match="is it another model"):
        load(tmp_path / "weights.pth")


def test_the_fingerprint_is_of_the_loaded_weights(model: torch.nn.Module, tmp_path: Path) -> None:
    state = dict(model.state_dict())
    torch.save(state, tmp_path / "named.pth")
    torch.save({f"t{index}": value for index, value in enumerate(state.values())}, tmp_path / "ordered.pth")
    state["blocks.1.0.conv_exp.weight"] = state["blocks.1.0.conv_exp.weight"] * 1.001
    torch.save(state, tmp_path / "changed.pth")
    named, ordered, changed = (
        load(tmp_path / f"{name}.pth").spec for name in ("named", "ordered", "changed")
    )
    assert named.fingerprint == ordered.fingerprint != changed.fingerprint


def test_no_hub_is_explained_at_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # nobody listens
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(
        CheckpointError, match=r"timm:resnet18: no weights from .*HF_ENDPOINT.*--teacher-path FILE"
    ):
        load(None, "resnet18")
