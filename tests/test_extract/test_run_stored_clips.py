"""`--images jpeg` for clips: the store alone is enough to train from, to audit and to look at."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from extract.verify import audit_store
from imaging.clips import read_clip_frames, sample_frame_indices
from store.reader import open_store
from tests.test_extract.extractions import extract
from tests.test_extract.test_run_targets import picture
from tests.test_extract.test_source_media import levels_of, write_video
from train.config import load_config
from train.data.clips import ClipReader, clip_places
from train.data.images import DataError
from train.run import run_training

FRAMES = 3


@pytest.fixture
def clips(tmp_path: Path) -> Path:
    """Two classes of frame folders, of 2 to 7 JPEG frames and one PNG frame."""
    root = tmp_path / "clips"
    for label, base in (("up", 0), ("down", 50)):
        for clip in range(4):
            folder = root / label / f"clip{clip}"
            folder.mkdir(parents=True)
            for frame in range(2 + clip + base // 25):
                picture(base + 10 * clip + frame).save(folder / f"{frame:03d}.jpg")
    return root


def stored_reader(store: Path, split: str = "train") -> ClipReader:
    opened = open_store(store)
    return ClipReader(opened[split], None, *clip_places(opened[split], opened.manifest))


def test_the_store_s_frames_are_those_of_the_files(extract_options: dict[str, Any], clips: Path) -> None:
    extract(extract_options, data=str(clips), source="clips", frames=FRAMES, images="jpeg", val_fraction=0)
    store = extract_options["out"]
    reader = stored_reader(store)
    split = reader.split
    files = ClipReader(split, clips, reader.places, reader.frames_per_row)
    files.stored = False
    for row in range(len(split)):
        ours, theirs = reader.read(row), files.read(row)
        assert len(ours) == FRAMES
        assert all(np.array_equal(one, other) for one, other in zip(ours, theirs, strict=True))
    # Two frames of a clip of two are three places: each file is stored once, byte for byte.
    row = list(split.keys).index("up/clip0")
    data = bytes(split.ragged([row], "images/encoded/values")[0])
    taken = dict.fromkeys(sample_frame_indices(2, FRAMES).tolist())
    assert data == b"".join((clips / "up/clip0" / f"{number:03d}.jpg").read_bytes() for number in taken)


def trained_weights(store: Path, out: Path, **options: Any) -> dict[str, torch.Tensor]:
    settings = {"epochs": 1, "image_size": 32, "batch_size": 4, "workers": 0, "device": "cpu", **options}
    run_training(load_config({"store": str(store), "student": "lstm/small", "out": out, **settings}))
    weights: dict[str, torch.Tensor] = torch.load(out / "best.pt", weights_only=True)["model_state_dict"]
    return weights


@pytest.mark.slow
def test_a_store_without_its_data_set_trains_the_same_student(
    extract_options: dict[str, Any], clips: Path, tmp_path: Path
) -> None:
    stores = {}
    for images in ("none", "jpeg"):
        stores[images] = tmp_path / f"{images}.zarr"
        options = {"out": str(stores[images]), "images": images, "val_fraction": 0.25}
        extract(extract_options, data=str(clips), source="clips", frames=FRAMES, **options)
    from_files = trained_weights(stores["none"], tmp_path / "files")
    shutil.move(clips, tmp_path / "moved")
    with pytest.raises(DataError, match="--images jpeg so that the store is enough"):
        trained_weights(stores["none"], tmp_path / "lost")
    alone = trained_weights(stores["jpeg"], tmp_path / "alone")
    assert all(torch.equal(alone[name], value) for name, value in from_files.items())

    from train.report.build import build_report

    text = build_report([tmp_path / "alone"], None, samples=2).path.read_text()
    assert text.count("data:image/jpeg;base64,") == 2


def test_frames_of_a_video_are_stored_as_jpeg(extract_options: dict[str, Any], tmp_path: Path) -> None:
    root = tmp_path / "videos"
    levels = write_video(root / "train/walk/a.mp4", 20)
    write_video(root / "train/run/b.avi", 2)
    (root / "train/run/c.mp4").write_bytes(b"no video")
    options = {"frames": 4, "images": "jpeg", "val_fraction": 0, "max_bad": "50%"}
    extract(extract_options, data=str(root), source="clips", **options)
    reader = stored_reader(extract_options["out"])
    keys = list(reader.split.keys)
    frames = reader.read(keys.index("train/walk/a.mp4"))
    np.testing.assert_allclose(levels_of(frames), [levels[i] for i in (2, 7, 12, 17)], atol=4)
    exact = read_clip_frames(root / "train/walk/a.mp4", 4)
    for stored, true in zip(frames, exact, strict=True):
        assert np.abs(np.asarray(stored, int) - np.asarray(true, int)).mean() < 2
    assert len(reader.read(keys.index("train/run/b.avi"))) == 4
    with pytest.raises(DataError, match="the store holds 0"):
        reader.read(keys.index("train/run/c.mp4"))
    # Fewer places than the store has: evenly spread; more: an error that says what to do.
    reader.places[:] = 2
    two = levels_of(reader.read(keys.index("train/walk/a.mp4")))
    np.testing.assert_allclose(two, [levels_of(frames)[i] for i in (1, 3)])
    reader.places[:] = 9
    with pytest.raises(DataError, match="9 frames are wanted, the store holds 4"):
        reader.read(keys.index("train/walk/a.mp4"))


def test_qwen_s_pairs_are_stored_and_audited_without_the_data_set(
    extract_options: dict[str, Any], clips: Path, tmp_path: Path, tiny_teacher_folder: Path
) -> None:
    options = {"data": str(clips), "source": "clips", "frames": 2, "val_fraction": 0, "image_size": 56}
    options |= {"teacher": "qwen2.5-vl", "teacher_path": str(tiny_teacher_folder), "images": "jpeg"}
    extract(extract_options, **options)
    store = open_store(extract_options["out"])
    spans = store["train"].read("images/frames")
    assert spans.shape == (len(store["train"]), 4, 2)
    shutil.move(clips, tmp_path / "moved")
    audit = audit_store(extract_options["out"], str(tiny_teacher_folder), samples=4, device="cpu")
    assert audit.samples == 4
    assert not audit.findings
    first = stored_reader(extract_options["out"]).read(0)
    assert len(first) == 4
    assert all(isinstance(frame, Image.Image) for frame in first)
