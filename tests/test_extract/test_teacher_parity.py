"""`cli teachers --check`: what it prints for a checkpoint that is read right, and for one that is not."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from commands.extract import teachers
from extract.teachers import CheckpointError, TeacherError
from extract.teachers.parity import check_teacher
from extract.teachers.vision_tower import MLP


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three smooth pictures, one file that is damaged and one that is no image."""
    folder = tmp_path_factory.mktemp("photos")
    noise = np.random.default_rng(0)
    for number in range(3):
        small = Image.fromarray(noise.integers(0, 256, (9, 12, 3), dtype=np.uint8))
        small.resize((160, 120), Image.Resampling.BICUBIC).save(folder / f"{number}.png")
    (folder / "a.jpg").write_bytes(b"\xff\xd8 no image")
    (folder / "notes.txt").write_text("no image")
    return folder


@pytest.mark.parametrize("family", ["full", "qwen3-vl", "qwen3.5"])
def test_a_qwen_checkpoint_is_read_as_transformers_reads_it(
    family: str, sharp_checkpoints: dict[str, Path], photos: Path
) -> None:
    name = "qwen2.5-vl" if family == "full" else family
    found = check_teacher(name, str(sharp_checkpoints[family]), photos, device="cpu", image_size=224)
    assert found.same
    assert found.reference.startswith("transformers ")
    assert (found.images, found.tokens) == (3, 3 * (256 if family == "full" else 196))
    assert 0 < found.max_difference <= 1e-4 < 1 < found.largest_value


@pytest.mark.parametrize("name", ["test_efficientnet", "test_vit"])
def test_a_timm_file_is_read_as_timm_reads_it(name: str, photos: Path, tmp_path: Path) -> None:
    import timm

    torch.manual_seed(0)
    torch.save(timm.create_model(name).state_dict(), tmp_path / "weights.pth")
    found = check_teacher(
        f"timm:{name}", str(tmp_path / "weights.pth"), photos, device="cpu", image_size=160, count=2
    )
    assert found.same
    assert found.images == 2
    assert found.max_difference <= 1e-4 * found.largest_value


def test_a_difference_is_an_error_with_the_image(
    sharp_qwen3: Path, photos: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def another_activation(self: MLP, x: torch.Tensor) -> torch.Tensor:
        hidden = torch.nn.functional.relu(self.linear_fc1(x))
        return self.linear_fc2(hidden)  # type: ignore[no-any-return]

    monkeypatch.setattr(MLP, "forward", another_activation)
    with pytest.raises(TeacherError, match=r"features differ from those of transformers .*\.png"):
        teachers(check=str(sharp_qwen3), teacher="qwen3-vl", images=photos, samples=2, device="cpu")
    assert "cosine of a token" in capsys.readouterr().out


def test_what_is_missing_is_named(sharp_qwen3: Path, photos: Path, tmp_path: Path) -> None:
    with pytest.raises(TeacherError, match="--check needs --images FOLDER"):
        teachers(check=str(sharp_qwen3), teacher="qwen3-vl")
    with pytest.raises(TeacherError, match="no such folder"):
        check_teacher("qwen3-vl", str(sharp_qwen3), tmp_path / "nowhere", device="cpu")
    with pytest.raises(TeacherError, match="none of its files is an image"):
        check_teacher("qwen3-vl", str(sharp_qwen3), tmp_path, device="cpu")
    for name in ("config.json", "model.safetensors"):
        shutil.copy(sharp_qwen3 / name, tmp_path)
    (tmp_path / "config.json").write_text(
        (tmp_path / "config.json").read_text().replace('"qwen3_vl_vision"', '"never_heard_of"')
    )
    with pytest.raises(CheckpointError, match=r"transformers [\d.]+ does not load its vision tower"):
        check_teacher("qwen3-vl", str(tmp_path), photos, device="cpu")
