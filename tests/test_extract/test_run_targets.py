"""Data sets with boxes, masks and frames through the pipeline, and decoders that die."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from PIL import Image

from extract.config import ConfigError, load_config
from extract.decode import pool
from extract.run import ExtractResult, run_extraction
from extract.teachers import load_teacher
from store.reader import open_store


def extract(options: dict[str, Any], **changes: Any) -> ExtractResult:
    return run_extraction(load_config({**options, **changes}))


def true_features(split: Any, name: str) -> np.ndarray:
    return split.gather(np.arange(len(split)), [name])[name].astype(np.float32) * split.scale[name]


def picture(seed: int, size: tuple[int, int] = (90, 60)) -> Image.Image:
    noise = np.random.default_rng(seed).integers(0, 255, (6, 9, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC)


@pytest.fixture
def coco(tmp_path: Path) -> Path:
    """Four pictures with 0 to 3 boxes in COCO's JSON."""
    root = tmp_path / "coco"
    (root / "images").mkdir(parents=True)
    images, annotations = [], []
    for number in range(4):
        picture(number).save(root / "images" / f"{number}.jpg")
        images.append({"id": number, "file_name": f"{number}.jpg", "width": 90, "height": 60})
        for box in range(number):
            annotations.append(
                {
                    "id": len(annotations),
                    "image_id": number,
                    "category_id": 7 + box % 2,
                    "bbox": [box * 10, 5, 8, 20],
                    "area": 160,
                    "iscrowd": 0,
                }
            )
    categories = [{"id": 7, "name": "tree"}, {"id": 8, "name": "house"}]
    (root / "annotations.json").write_text(
        json.dumps({"images": images, "annotations": annotations, "categories": categories})
    )
    return root


def test_boxes_are_stored_with_their_image_and_bring_a_grid(
    extract_options: dict[str, Any], coco: Path
) -> None:
    extract(extract_options, data=str(coco), source="coco", val_fraction=0)
    store = open_store(extract_options["out"])
    train = store["train"]
    assert store.manifest.class_names == ("tree", "house")
    assert store.manifest.grid == 2  # `auto`: 16, but the teacher has no more than this at 64 pixels
    boxes = train.ragged(range(4), "targets/boxes/values")
    classes = train.ragged(range(4), "targets/boxes/classes")
    for row, key in enumerate(train.keys):
        number = int(Path(key).stem)
        assert boxes[row].tolist() == [[box * 10, 5, box * 10 + 8, 25] for box in range(number)]
        assert classes[row].tolist() == [box % 2 for box in range(number)]
        assert train.read("sizes")[row].tolist() == [90, 60]


def test_masks_are_stored_as_png_of_classes(extract_options: dict[str, Any], tmp_path: Path) -> None:
    import io

    root = tmp_path / "masks"
    for folder in ("images", "masks"):
        (root / folder).mkdir(parents=True)
    for number in range(3):
        picture(number).save(root / "images" / f"{number}.jpg")
        mask = np.full((60, 90), number, np.uint8)
        mask[:10] = 255
        Image.fromarray(mask).save(root / "masks" / f"{number}.png")
    extract(extract_options, data=str(root), source="masks", val_fraction=0)
    train = open_store(extract_options["out"])["train"]
    for row, (key, data) in enumerate(
        zip(train.keys, train.ragged(range(3), "targets/mask/values"), strict=True)
    ):
        mask = np.asarray(Image.open(io.BytesIO(data.tobytes())))
        assert mask.shape == (60, 90)
        assert set(np.unique(mask).tolist()) == {int(Path(key).stem), 255}, row


class TestClips:
    @pytest.fixture
    def clips(self, tmp_path: Path) -> Path:
        """Two classes of frame folders; the frames of a clip differ."""
        root = tmp_path / "clips"
        for label, base in (("up", 0), ("down", 50)):
            for clip in range(2):
                folder = root / label / f"clip{clip}"
                folder.mkdir(parents=True)
                for frame in range(8):
                    picture(base + 10 * clip + frame).save(folder / f"{frame:03d}.jpg")
        return root

    def test_each_frame_has_a_row_and_pooled_is_their_mean(
        self, extract_options: dict[str, Any], clips: Path
    ) -> None:
        extract(extract_options, data=str(clips), source="clips", frames=4, val_fraction=0)
        store = open_store(extract_options["out"])
        train = store["train"]
        scale = train.scale["features/frames/values"]
        frames = [
            item.astype(np.float32) * scale for item in train.ragged(range(4), "features/frames/values")
        ]
        assert [item.shape for item in frames] == [(4, 256)] * 4
        pooled = true_features(train, "features/pooled")
        np.testing.assert_allclose(pooled, np.stack(frames).mean(axis=1), rtol=5e-3, atol=5e-3)
        teacher = load_teacher(
            "timm:test_efficientnet", extract_options["teacher_path"], device="cpu", image_size=64
        )
        taken = [1, 3, 5, 7]  # the middle frames of four segments of eight
        folder = clips / train.keys[0]
        images = [Image.open(folder / f"{number:03d}.jpg").convert("RGB") for number in taken]
        expected = teacher.encode(images).pooled.numpy()
        np.testing.assert_allclose(frames[0], expected, rtol=5e-3, atol=5e-3)
        assert np.abs(frames[0] - expected[::-1]).max() > 0.05

    def test_qwen_sees_pairs_of_frames(
        self, extract_options: dict[str, Any], clips: Path, tiny_teacher_folder: Path
    ) -> None:
        options = {"data": str(clips), "source": "clips", "frames": 3, "val_fraction": 0, "image_size": 56}
        options |= {"teacher": "qwen2.5-vl", "teacher_path": str(tiny_teacher_folder)}
        extract(extract_options, **options)
        train = open_store(extract_options["out"])["train"]
        (rows,) = train.ragged([0], "features/frames/values")
        assert rows.shape == (3, 1280)
        teacher = load_teacher("qwen2.5-vl", str(tiny_teacher_folder), device="cpu", image_size=56)
        from extract.decode.sample import Encoding, decode_samples
        from extract.sources.detect import open_source

        sample = open_source(clips, "clips", val_fraction=0).splits["train"][0]
        pixels = np.zeros((1, 6, 3, 56, 56), np.uint8)
        decode_samples(Encoding(image_size=56, resize="squash", frames=3, pair=2), [sample], pixels)
        expected = teacher.encode(torch.from_numpy(pixels[:, 2:4])).pooled[0].numpy()
        true = rows[1].astype(np.float32) * train.scale["features/frames/values"]
        np.testing.assert_allclose(true, expected, rtol=5e-3, atol=1e-4 * np.abs(expected).max())

    @pytest.mark.parametrize(
        ("changes", "text"),
        [
            ({"views": 2}, "--views needs images"),
            ({"views": "flip"}, "--views needs images"),
            ({"images": "raw"}, "--images jpeg stores their frames"),
        ],
    )
    def test_what_clips_cannot_have_is_refused(
        self, extract_options: dict[str, Any], clips: Path, changes: dict[str, Any], text: str
    ) -> None:
        with pytest.raises(ConfigError, match=text):
            extract(extract_options, data=str(clips), source="clips", **changes)


class KillDecoders:
    """An observer that kills all decoding processes once, after the first batches."""

    def __init__(self) -> None:
        self.killed = 0

    def progress(self, done: int, total: int, message: str) -> None:
        if done >= 8 and not self.killed:
            for child in psutil.Process().children():
                if "spawn_main" in " ".join(child.cmdline()):
                    os.kill(child.pid, signal.SIGKILL)
                    self.killed += 1


@pytest.mark.slow
def test_decoders_that_die_are_started_again(extract_options: dict[str, Any]) -> None:
    extract(extract_options)
    expected = true_features(open_store(extract_options["out"])["train"], "features/pooled")
    shutil.rmtree(extract_options["out"])
    killer = KillDecoders()
    result = run_extraction(load_config({**extract_options, "workers": 2}), [killer])
    assert killer.killed == 2
    assert (result.complete, result.bad) == (True, 0)
    got = true_features(open_store(extract_options["out"])["train"], "features/pooled")
    np.testing.assert_array_equal(got, expected)


@pytest.mark.slow
def test_decoders_that_do_not_start_are_no_fault_of_the_images(
    extract_options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without telling the two apart every image would be called bad."""
    monkeypatch.setattr(pool, "begin_worker", os._exit)  # what a worker runs first: here it ends it
    with pytest.raises(pool.DecodingFailed, match="end before they decode anything"):
        run_extraction(load_config({**extract_options, "workers": 2}))
    assert not (extract_options["out"] / "bad_images.jsonl").exists()
