"""A trained student as a module: `load_student`, and the folder that timm opens."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torch import nn

from files.writing import OutputError
from tests.test_train.runs import cli, trained
from train import load_student
from train.deliver.export import export_student
from train.deliver.predict import Prediction, predict_files
from train.errors import DeliveryError


def photo(side: tuple[int, int] = (60, 40)) -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 255, (side[1], side[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def test_a_student_is_a_module_that_predicts_as_the_command_does(run_folder: Path, tmp_path: Path) -> None:
    photo().save(tmp_path / "photo.png")
    model = load_student(run_folder)
    assert type(model).__mro__[1] is nn.Module
    assert not model.training
    assert model.class_names == ("red", "green", "blue")
    with torch.inference_mode():
        scores = model(model.preprocess(Image.open(tmp_path / "photo.png"))[None]).softmax(1)[0]
    (expected,) = predict_files(run_folder, [str(tmp_path / "photo.png")])
    assert isinstance(expected, Prediction)
    best = expected.record["top"][0]
    assert model.class_names[scores.argmax()] == best["class"]
    assert scores.max().item() == pytest.approx(best["probability"], abs=1e-5)


def test_preprocess_reads_images_as_training_did(run_folder: Path, tmp_path: Path) -> None:
    """Rotated by EXIF, transparent, gray: as the files are decoded."""
    model = load_student(run_folder)
    turned = Image.Exif()
    turned[0x0112] = 6
    image = photo()
    image.save(tmp_path / "turned.png", exif=turned)
    upright = image.transpose(Image.Transpose.ROTATE_270)
    torch.testing.assert_close(
        model.preprocess(Image.open(tmp_path / "turned.png")), model.preprocess(upright)
    )
    white = Image.new("RGB", image.size, "white")
    clear = image.copy()
    clear.putalpha(0)
    torch.testing.assert_close(model.preprocess(clear), model.preprocess(white))
    assert model.preprocess(image.convert("L")).shape == (3, 32, 32)
    again = pickle.loads(pickle.dumps(model.preprocess))  # noqa: S301  # for the workers of a DataLoader
    torch.testing.assert_close(again(image), model.preprocess(image))
    with pytest.raises(DeliveryError, match="takes one PIL image, got a list"):
        model.preprocess([image])


def test_what_cannot_be_loaded_is_named(tmp_path: Path, run_folder: Path) -> None:
    with pytest.raises(DeliveryError, match="nothing: no such run or file"):
        load_student(tmp_path / "nothing")
    (run_folder / "summary.json").unlink()
    with pytest.raises(DeliveryError, match="has not finished"):
        load_student(str(run_folder))


@pytest.mark.slow
def test_a_student_of_clips_takes_frames(clip_store: Path, tmp_path: Path) -> None:
    model = load_student(trained(clip_store, tmp_path / "lstm", student="lstm/small", batch_size=3))
    frames = model.preprocess([photo(), photo()])
    assert frames.shape == (2, 3, 32, 32)
    assert model(frames[None]).shape == (1, len(model.class_names))
    with pytest.raises(DeliveryError, match="takes a clip"):
        model.preprocess(photo())


def test_a_label_free_student_gives_embeddings(make_store: Any, tmp_path: Path) -> None:
    model = load_student(trained(make_store(), tmp_path / "run", task="features"))
    embedding, features, aligned = model(model.preprocess(photo())[None])
    assert embedding.shape[0] == features.shape[0] == aligned.shape[0] == 1


# -- the folder that timm opens ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("student", "resize", "size"),
    [
        ("timm:test_resnet", "squash", 32),
        ("timm:test_vit", "letterbox", 64),
        ("timm:test_vit2", "center-crop", 96),
    ],
)
def test_timm_opens_an_exported_folder(
    make_store: Any, tmp_path: Path, student: str, resize: str, size: int
) -> None:
    """The same logits, classes and, up to the rounding of two resizers, the same preprocessing."""
    run = trained(make_store(resize=resize), tmp_path / "run", student=student, image_size=size)
    exported = export_student(run, "timm", tmp_path / "hub")
    assert exported.max_abs_difference <= exported.tolerance
    assert {file.name for file in exported.path.iterdir()} == {
        "README.md",
        "config.json",
        "model.safetensors",
    }
    assert exported.size_bytes == sum(file.stat().st_size for file in exported.path.iterdir())
    ours = load_student(run)
    model: Any = timm.create_model(f"local-dir:{exported.path}", pretrained=True).eval()
    inputs = ours.preprocess(photo())[None]
    with torch.inference_mode():
        torch.testing.assert_close(model(inputs), ours(inputs))
    assert tuple(model.pretrained_cfg["label_names"]) == ours.class_names
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model), is_training=False)
    large = photo((240, 240)).resize((90, 60), Image.Resampling.BICUBIC)  # smooth: no resizer's aliasing
    theirs = transform(large)
    assert theirs.shape == ours.preprocess(large).shape
    inside = (slice(None), slice(size // 3, 2 * size // 3))  # a letterbox is padded with other colors
    difference = (theirs - ours.preprocess(large))[inside].abs().mean()
    assert difference < 0.05


def test_a_label_free_student_has_no_timm_folder(make_store: Any, tmp_path: Path) -> None:
    features = trained(make_store(), tmp_path / "run", task="features")
    with pytest.raises(DeliveryError, match=r"test_resnet learned features alone; .*use --format onnx"):
        export_student(features, "timm")


def test_an_own_student_has_no_timm_folder(make_store: Any, tmp_path: Path) -> None:
    unet = trained(make_store(masks=True), tmp_path / "unet", student="unet/small", batch_size=4)
    done = cli("export", unet, "--format", "timm")
    assert done.returncode == 1
    assert done.stderr.startswith("error: --format timm: unet/small is not a timm model")
    assert done.stderr.count("\n") == 1


def test_a_folder_of_an_earlier_export_is_replaced_and_a_file_is_not(
    run_folder: Path, tmp_path: Path
) -> None:
    out = tmp_path / "hub"
    first = json.loads((export_student(run_folder, "timm", out).path / "config.json").read_text())
    (out / "notes.txt").write_text("mine")
    (out / "config.json").write_text("{}")
    export_student(run_folder, "timm", out)
    assert json.loads((out / "config.json").read_text()) == first
    assert (out / "notes.txt").read_text() == "mine"
    assert not list(tmp_path.glob(".partial-*"))
    shutil.rmtree(out)
    out.write_text("a file")
    with pytest.raises(OutputError, match="hub: is a file, expected a folder"):
        export_student(run_folder, "timm", out)
    assert out.read_text() == "a file"
