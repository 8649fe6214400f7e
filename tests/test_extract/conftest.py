"""Teachers that several tests of stage one share: made once a session, by transformers itself."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch


@pytest.fixture(scope="session")
def tiny_teacher_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `cli make-tiny-teacher` writes: two blocks, the second attends to the whole image."""
    from extract.teachers.tiny import make_tiny_teacher

    return make_tiny_teacher(tmp_path_factory.mktemp("tiny") / "teacher")


@pytest.fixture(scope="session")
def micro_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The published layout with two narrow blocks: a few hundred kilobytes, for tests of files and not of features."""
    from extract.teachers.qwen_transformers import save_random_checkpoint
    from extract.teachers.tiny import TINY_TEXT, tiny_vision

    folder = tmp_path_factory.mktemp("micro") / "checkpoint"
    vision = {**tiny_vision(2), "hidden_size": 64, "intermediate_size": 40, "num_heads": 2}
    save_random_checkpoint(folder, vision=vision, text=TINY_TEXT, seed=2)
    return folder


@pytest.fixture(scope="session")
def sharp_checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Small checkpoints whose weights are large enough for attention to look somewhere.

    Of Qwen2.5-VL, two blocks of the published width: `full`: the second attends to the whole image; `windows`: none
    does. `qwen3-vl` and `qwen3.5`: three narrow blocks with heads of the published 72.
    """
    from extract.teachers.qwen_transformers import save_random_checkpoint
    from extract.teachers.tiny import TINY_TEXT, tiny_vision

    folders = {}
    for name, full in {"full": [1], "windows": []}.items():
        vision = {**tiny_vision(2), "fullatt_block_indexes": full}
        vision |= {"initializer_range": 0.03, "intermediate_size": 684}  # a fifth of the MLP: quicker
        folders[name] = tmp_path_factory.mktemp("sharp") / name
        save_random_checkpoint(folders[name], vision=vision, text=TINY_TEXT, seed=1)
    for name in ("qwen3-vl", "qwen3.5"):
        vision = {**tiny_vision(3, name), "initializer_range": 0.06, "hidden_size": 288, "num_heads": 4}
        vision |= {"intermediate_size": 1076}
        folders[name] = tmp_path_factory.mktemp("sharp") / name
        save_random_checkpoint(folders[name], vision=vision, text=TINY_TEXT, seed=1, family=name)
    for folder in folders.values():
        move_biases_and_norms(folder / "model.safetensors")
    return folders


@pytest.fixture(scope="session")
def sharp_qwen3(sharp_checkpoints: dict[str, Path]) -> Path:
    """A small Qwen3-VL checkpoint, of the shared ones."""
    return sharp_checkpoints["qwen3-vl"]


def move_biases_and_norms(file: Path) -> None:
    """Add noise to the tower's biases and norm weights: transformers begins with zeros and ones, which hide mistakes."""
    from safetensors.torch import load_file, save_file

    noise = torch.Generator().manual_seed(3)
    tensors = load_file(file)
    for name, tensor in tensors.items():
        if "visual." in name and tensor.dim() == 1:
            tensors[name] = tensor + 0.1 * torch.randn(tensor.shape, generator=noise)
    file.unlink()
    save_file(tensors, file, metadata={"format": "pt"})


@pytest.fixture
def noise() -> torch.Generator:
    """A seeded source of random pixels."""
    return torch.Generator().manual_seed(0)


@pytest.fixture(scope="session")
def digit_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 real scans of digits as PNG in ten class folders. Tests that change files copy it first."""
    import numpy as np
    from PIL import Image
    from sklearn.datasets import load_digits

    root = tmp_path_factory.mktemp("digits") / "digits"
    digits = load_digits()
    for number in range(60):
        file = root / str(digits.target[number]) / f"{number:03d}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        scan = Image.fromarray((digits.images[number] * 15.9).astype(np.uint8))
        scan.resize((40, 40), Image.Resampling.BICUBIC).save(file)
    return root


@pytest.fixture(scope="session")
def timm_weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Seeded weights of timm's smallest convolutional model: a teacher that encodes in milliseconds.

    Its batch norms have seen noise, so that features are of size one and tell images apart.
    """
    import timm

    torch.manual_seed(0)
    model = timm.create_model("test_efficientnet").train()
    with torch.no_grad():
        for _ in range(30):
            model(torch.randn(8, 3, 64, 64))
    file = tmp_path_factory.mktemp("weights") / "test_efficientnet.pth"
    torch.save(model.state_dict(), file)
    return file


@pytest.fixture
def extract_options(digit_folder: Path, timm_weights: Path, tmp_path: Path) -> dict[str, object]:
    """Options of a fast extraction of `digit_folder` to `tmp_path/store`, decoding in a thread."""
    return {
        "data": str(digit_folder),
        "out": tmp_path / "store",
        "teacher": "timm:test_efficientnet",
        "teacher_path": str(timm_weights),
        "image_size": 64,
        "batch_size": 8,
        "workers": 0,
        "device": "cpu",
    }
