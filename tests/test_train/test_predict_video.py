"""`cli predict` on video files: frames by number or by time, a summary, annotated videos."""

from __future__ import annotations

import json
import re
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from PIL import Image

from imaging.clips import iterate_frames
from imaging.decode import ImageError
from tests.test_train.conftest import COLOURS, draw_image
from tests.test_train.runs import cli, trained
from train.deliver.files import BadFile
from train.deliver.predict import Prediction, Sampling, VideoSummary, predict_files
from train.deliver.prediction_files import PredictionWriter
from train.errors import DeliveryError

RATE, FRAMES = 10, 12


def write_video(path: Path, frames: int = FRAMES, size: tuple[int, int] = (62, 48), rate: int = RATE) -> Path:
    """A red square for the first half, a blue one after."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=rate)
        stream.width, stream.height, stream.pix_fmt = *size, "yuv420p"
        stream.bit_rate = 4_000_000
        for number in range(frames):
            pixels, _ = draw_image(rng, 0 if number < frames // 2 else 2, 32)
            picture = Image.fromarray(pixels).resize(size)
            container.mux(stream.encode(av.VideoFrame.from_image(picture)))
        container.mux(stream.encode())
    return path


def read_back(path: Path) -> tuple[int, tuple[int, int], float]:
    """Frames, (width, height) and seconds of a video."""
    with av.open(str(path)) as container:
        frames = list(container.decode(container.streams.video[0]))
        rate = container.streams.video[0].average_rate
        assert rate is not None
        return len(frames), (frames[0].width, frames[0].height), len(frames) / float(rate)


@pytest.mark.parametrize(
    ("options", "numbers"),
    [
        ({}, list(range(FRAMES))),
        ({"every": 5}, [0, 5, 10]),
        ({"frames_per_second": 2.5}, [0, 4, 8]),
        ({"frames_per_second": 100.0}, list(range(FRAMES))),
    ],
)
def test_frames_are_chosen_by_number_or_by_time(tmp_path: Path, options: Any, numbers: list[int]) -> None:
    frames = list(iterate_frames(write_video(tmp_path / "a.mp4"), **options))
    assert [frame.number for frame in frames] == numbers
    assert [frame.time_s for frame in frames] == pytest.approx(
        [number / RATE for number in numbers], abs=1e-3
    )
    assert {frame.rate for frame in frames} == {Fraction(RATE)}
    assert frames[0].image.size == (62, 48)


def test_what_is_no_whole_video_is_an_error_after_its_frames(tmp_path: Path) -> None:
    video = write_video(tmp_path / "a.avi", frames=40)
    data = video.read_bytes()
    (tmp_path / "text.mp4").write_text("no video")
    with pytest.raises(ImageError, match="not a video"):
        next(iterate_frames(tmp_path / "text.mp4"))
    with pytest.raises(ImageError, match="cannot be read"):
        next(iterate_frames(tmp_path / "gone.mp4"))
    with pytest.raises(ImageError, match="too many pixels: frames of 62×48"):
        next(iterate_frames(video, max_pixels=100))
    starts = [match.start() for match in re.finditer(b"\x00\x00\x01\xb6", data)]
    hurt = bytearray(data)
    hurt[starts[20] : starts[21] - 16] = bytes(
        starts[21] - 16 - starts[20]
    )  # one picture, its container untouched
    video.write_bytes(bytes(hurt))
    frames, seen = iterate_frames(video), 0

    def read_on() -> None:
        nonlocal seen
        for _ in frames:
            seen += 1

    with pytest.raises(ImageError, match="video"):
        read_on()
    assert seen >= 20


@pytest.fixture
def classifier(make_store: Any, tmp_path: Path) -> Path:
    return trained(make_store(), tmp_path / "run")


def test_a_classifier_says_each_frame_and_the_mean(classifier: Path, tmp_path: Path) -> None:
    folder = tmp_path / "inputs"
    video = write_video(folder / "b.mp4")
    Image.fromarray(np.full((40, 40, 3), COLOURS[1], np.uint8)).save(folder / "a.png")
    (folder / "c.mp4").write_text("no video")
    out = tmp_path / "out"
    with PredictionWriter(out) as writer:
        items = list(predict_files(classifier, [str(folder)], batch_size=5, sampling=Sampling(every=2)))
        for item in items:
            if not isinstance(item, BadFile):
                writer.write(item)
    image, *frames, summary, bad = items
    assert isinstance(image, Prediction)
    assert image.video_rate is None
    assert [item.record["frame"] for item in frames] == [0, 2, 4, 6, 8, 10]  # type: ignore[union-attr]
    assert [item.record["time_s"] for item in frames] == [0, 0.2, 0.4, 0.6, 0.8, 1]  # type: ignore[union-attr]
    assert isinstance(summary, VideoSummary)
    assert summary.record["file"] == str(video)
    assert summary.record["frames"] == 6
    means: dict[str, list[float]] = {}
    for item in frames:
        for entry in item.record["top"]:  # type: ignore[union-attr]
            means.setdefault(entry["class"], []).append(entry["probability"])
    for entry in summary.record["top"]:
        assert entry["probability"] == pytest.approx(np.mean(means[entry["class"]]), abs=1e-5)
    assert isinstance(bad, BadFile)
    assert bad.file.endswith("c.mp4")
    lines = [json.loads(line) for line in (out / "predictions.jsonl").read_text().splitlines()]
    assert [line.get("video") for line in lines] == [None, *["b.mp4"] * 6, None]
    assert {path.name for path in out.iterdir()} == {"predictions.jsonl", "a.jpg", "b.mp4"}
    count, size, seconds = read_back(out / "b.mp4")
    assert (count, size) == (6, (62, 48))
    assert seconds == pytest.approx(FRAMES / RATE)


def test_masks_of_a_video_make_frames_of_one_size(make_store: Any, tmp_path: Path) -> None:
    run = trained(make_store(masks=True), tmp_path / "unet", student="unet/small")
    video = write_video(tmp_path / "inputs" / "b.mp4")
    items = list(predict_files(run, [str(video)], sampling=Sampling(frames_per_second=5)))
    assert len(items) == 6  # no summary: shares of frames have no mean that says more
    assert len({item.image.size for item in items if isinstance(item, Prediction)}) == 1


def test_an_interrupted_video_leaves_no_file_of_its_name(classifier: Path, tmp_path: Path) -> None:
    out, video = tmp_path / "out", write_video(tmp_path / "inputs" / "b.mp4")

    def interrupt() -> None:
        with PredictionWriter(out) as writer:
            for item in predict_files(classifier, [str(video)]):
                assert isinstance(item, Prediction)
                writer.write(item)
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupt()
    assert [path.name for path in out.iterdir()] == ["predictions.jsonl"]


def test_samplings_that_say_nothing_are_refused(classifier: Path, tmp_path: Path) -> None:
    Image.new("RGB", (40, 40)).save(tmp_path / "a.png")
    with pytest.raises(DeliveryError, match="--every and --fps both"):
        predict_files(classifier, [str(tmp_path / "a.png")], sampling=Sampling(2, 2.0))
    with pytest.raises(DeliveryError, match="--fps: chooses frames of videos, and no input is a video"):
        predict_files(classifier, [str(tmp_path / "a.png")], sampling=Sampling(None, 2.0))


@pytest.mark.slow
def test_a_student_of_clips_chooses_its_frames_itself(tmp_path: Path, clip_store: Path) -> None:
    run = trained(clip_store, tmp_path / "lstm", student="lstm/small", batch_size=3)
    clips = str(clip_store.parent / "clips" / "val")
    with pytest.raises(
        DeliveryError, match="--every: chooses frames of videos, and this student takes clips"
    ):
        predict_files(run, [clips], sampling=Sampling(2))


@pytest.mark.slow
def test_a_detector_draws_its_boxes_into_the_video(yolo_store: Path, tmp_path: Path) -> None:
    run = trained(yolo_store, tmp_path / "yolo", student="yolov8n", image_size=64)
    video = write_video(tmp_path / "inputs" / "b.mp4")
    done = cli("predict", run, video, "--out", tmp_path / "out", "--every", "4", "--confidence", "0.0001")
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert [(line["frame"], line["time_s"]) for line in lines] == [(0, 0), (4, 0.4), (8, 0.8)]
    assert all("boxes" in line for line in lines)
    assert read_back(tmp_path / "out" / "b.mp4")[0] == 3
