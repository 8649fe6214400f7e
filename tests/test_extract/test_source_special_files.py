"""Pipes, sockets, devices and folders under the name of a file of a data set: none is opened, none hangs."""

from __future__ import annotations

import json
import os
import shutil
import socket
from pathlib import Path
from typing import Any

import pytest

from backend.task.feature_cache import digest_folder
from extract.result import LEDGER
from extract.sources.base import SourceError
from extract.sources.detect import open_source
from imaging.decode import ImageError
from tests.test_extract.extractions import extract
from tests.test_extract.source_datasets import WRITERS

pytestmark = pytest.mark.timeout(60)


def make_pipe(path: Path) -> None:
    os.mkfifo(path)


def link_to_zero(path: Path) -> None:
    path.symlink_to("/dev/zero")


def make_socket(path: Path) -> None:
    folder = os.open(path.parent, os.O_RDONLY)  # the name of a socket is at most 107 bytes
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(f"/proc/self/fd/{folder}/{path.name}")
    os.close(folder)


SPECIAL = {"pipe": make_pipe, "zero": link_to_zero, "socket": make_socket, "folder": Path.mkdir}

# Layout → a file that its samples or annotations are read from.
FILES = {
    "folder": ["train/cat/1.png"],
    "yolo": ["images/train/1.png", "labels/train/1.txt", "data.yaml"],
    "coco": ["train2017/1.png", "annotations/instances_val2017.json"],
    "voc": ["JPEGImages/000001.png", "Annotations/000001.xml", "ImageSets/Main/train.txt"],
    "masks": ["train/images/1.png", "train/masks/1.png"],
    "clips": ["train/cat/clip1/0002.png"],
    "hdf5": ["data.h5"],
    "csv": ["pictures/1.png", "table.csv"],
    "parquet": ["data/val-00000-of-00001.parquet"],
}


@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind, names in FILES.items() for name in names])
@pytest.mark.parametrize("special", SPECIAL)
def test_every_layout_reports_it(tmp_path: Path, kind: str, name: str, special: str) -> None:
    dataset = WRITERS[kind](tmp_path)
    (tmp_path / name).unlink()
    SPECIAL[special](tmp_path / name)
    problems: list[str] = []
    try:
        source = open_source(dataset.path, dataset.kind, **dataset.options)
    except (SourceError, ImageError) as error:
        problems.append(str(error))
    else:
        for sample in (sample for samples in source.splits.values() for sample in samples):
            try:
                sample.read()
                sample.read_boxes((24, 16))
                sample.read_mask((24, 16))
                if sample.frames is not None:
                    sample.read_clip(3)
            except (SourceError, ImageError) as error:
                problems.append(str(error))
    if special == "folder" and not problems:
        # A folder is listed, not opened: no sample and no annotation has its name.
        assert name not in {key for samples in source.splits.values() for key in samples.keys}
        return
    assert problems
    assert all("\n" not in problem for problem in problems)


@pytest.mark.parametrize("name", ["classes.txt", "ImageSets/Segmentation/train.txt"])
def test_lists_of_masks(tmp_path: Path, name: str) -> None:
    WRITERS["masks"](tmp_path)
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    make_pipe(tmp_path / name)
    with pytest.raises(SourceError, match="cannot be read: not a regular file"):
        open_source(tmp_path, "masks")
    (tmp_path / name).unlink()
    (tmp_path / name).write_bytes(b"\xff\xfe")
    with pytest.raises(SourceError, match="not UTF-8 text"):
        open_source(tmp_path, "masks")


def test_a_pipe_beside_a_folder_does_not_stop_its_recognition(tmp_path: Path) -> None:
    WRITERS["folder"](tmp_path)
    for name in ("a.json", "b.yaml", "c.h5"):
        make_pipe(tmp_path / name)
        link_to_zero(tmp_path / f"zero-{name}")
    assert open_source(tmp_path).kind == "folder"


@pytest.mark.parametrize("name", ["clip.mp4", "clip.avi"])
def test_a_video_that_is_a_pipe(tmp_path: Path, name: str) -> None:
    make_pipe(tmp_path / name)
    (samples,) = open_source(tmp_path, "clips", val_fraction=0).splits.values()
    with pytest.raises(ImageError, match="not a regular file"):
        samples[0].read_clip(2)
    with pytest.raises(ImageError, match="not a regular file"):
        samples[0].read()


def test_an_extraction_has_them_as_bad_samples(extract_options: dict[str, Any], tmp_path: Path) -> None:
    data = tmp_path / "data"
    shutil.copytree(extract_options["data"], data)
    files = sorted(data.rglob("*.png"))[:4]
    for file, make in zip(files, SPECIAL.values(), strict=True):
        file.unlink()
        make(file)
    result = extract({**extract_options, "data": str(data)}, max_bad=3)
    assert (result.bad, result.rows) == (3, 59)  # the folder has no row: it is not a file
    lines = [json.loads(line) for line in (Path(extract_options["out"]) / LEDGER).read_text().splitlines()]
    assert {line["reason"] for line in lines} == {"cannot be read: not a regular file"}
    assert {line["key"] for line in lines} == {str(file.relative_to(data)) for file in files[:3]}


def test_the_digest_of_a_data_set_never_opens_them(tmp_path: Path) -> None:
    data = tmp_path / "data"
    WRITERS["folder"](data)
    before = digest_folder(data, tmp_path / "memo")
    for name, make in SPECIAL.items():
        make(data / f"train/cat/{name}.png")
    after = digest_folder(data, tmp_path / "memo")
    assert after != before
    assert digest_folder(data, tmp_path / "memo") == after
