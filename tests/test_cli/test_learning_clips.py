"""benchmarks/learning_clips.py: no frame is in two splits, and the folder is complete or not there."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from benchmarks import learning_clips
from benchmarks.learning_clips import BLOCKS, CLIPS, FRAMES, RECORDINGS, SIDE, Recording, write_clips
from benchmarks.learning_sets import DATA_SETS, lay_out
from extract.sources.detect import open_source
from imaging.clips import VIDEO_SUFFIXES
from tests.assets import ASSETS

COUNTS = {"train": 4, "val": 2, "test": 2}
TOTAL = 100


@pytest.fixture
def recordings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Recording]:
    """Two parts of a video whose frame t has the level t, and no light that hides it."""
    import av

    with av.open(str(tmp_path / "video.mkv"), "w") as container:
        stream = container.add_stream("ffv1", rate=25)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "bgr0"
        for number in range(TOTAL):
            frame = av.VideoFrame.from_ndarray(np.full((48, 64, 3), number, np.uint8), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    monkeypatch.setattr("tests.assets.asset", lambda name: tmp_path)
    monkeypatch.setattr(learning_clips, "LIGHT", (1.0, 1.0))
    return [
        Recording("left", "any", "video.mkv", (0.0, 0.0, 0.5, 1.0)),
        Recording("late", "any", "video.mkv", start=50),
    ]


def levels(clip: Path) -> list[int]:
    return [round(float(np.asarray(Image.open(file)).mean())) for file in sorted(clip.iterdir())]


def test_splits_are_blocks_of_time(recordings: list[Recording], tmp_path: Path) -> None:
    write_clips(tmp_path / "clips", recordings, COUNTS)
    seen: dict[str, set[int]] = {}
    for split, count in COUNTS.items():
        for recording in recordings:
            clips = sorted((tmp_path / "clips" / split / recording.name).iterdir())
            assert len(clips) == count
            for clip in clips:
                found = levels(clip)
                assert found == list(range(found[0], found[0] + FRAMES))
                assert found[0] >= recording.start
                seen.setdefault(f"{recording.name} {split}", set()).update(found)
            with Image.open(clips[0] / "00.jpg") as image:
                assert image.size == (SIDE, SIDE)
    for recording in recordings:
        train, val, test = (seen[f"{recording.name} {split}"] for split in COUNTS)
        assert max(train) < min(val)
        assert max(val) < min(test)


def test_clips_are_the_same_each_time(recordings: list[Recording], tmp_path: Path) -> None:
    for name in ("once", "again"):
        write_clips(tmp_path / name, recordings, COUNTS)
    once, again = (
        {file.relative_to(tmp_path / name): file.read_bytes() for file in (tmp_path / name).rglob("*.jpg")}
        for name in ("once", "again")
    )
    assert once == again


def test_some_clips_keep_their_label(recordings: list[Recording], tmp_path: Path) -> None:
    write_clips(tmp_path / "data/clips", recordings, COUNTS)
    source = open_source(
        lay_out("clips", tmp_path / "data", tmp_path / "few", 1, 0), DATA_SETS["clips"].source
    )
    assert source.task == "sequence"
    labels = {name: [sample.label for sample in split] for name, split in source.splits.items()}
    assert sorted(label for label in labels["train"] if label is not None) == [0, 1]
    assert labels["train"].count(None) == 2 * (COUNTS["train"] - 1)
    assert None not in labels["val"] + labels["test"]


def test_every_recording_has_a_pinned_asset_and_room_for_its_blocks() -> None:
    assert len({recording.name for recording in RECORDINGS}) == len(RECORDINGS)
    for recording in RECORDINGS:
        assert recording.asset in ASSETS
        assert Path(recording.video).suffix in VIDEO_SUFFIXES
    assert set(BLOCKS) == set(CLIPS)
