"""Outputs in places that cannot be written: one line that names the place, for every command, and nothing is replaced."""

from __future__ import annotations

import os
import socket
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from files.writing import OutputError, check_writable, whole_file

PLACES = ("/proc/x", "/sys/x", "FILE/x", "LONG", "FIFO", "SOCKET")


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Path]]:
    """A data set, a store of it, a run, and places that are no place for a file."""
    from tests.test_train.runs import trained

    folder = tmp_path_factory.mktemp("places")
    (folder / "FILE").write_text("")
    os.mkfifo(folder / "FIFO")
    server = socket.socket(socket.AF_UNIX)
    server.bind(str(folder / "SOCKET"))
    store = folder / "store.zarr"
    make_small_store(store)
    yield {"folder": folder, "store": store, "run": trained(store, folder / "run")}
    server.close()


def make_small_store(path: Path) -> None:
    from store.create import create_store
    from store.finalize import finalize_store
    from store.format import Manifest, Preprocessing, TeacherSpec, feature_arrays, image_arrays, target_arrays
    from store.keys import Plan
    from tests.test_train.conftest import WIDTH, write_split

    manifest = Manifest(
        teacher=TeacherSpec(name="synthetic", fingerprint="0", layer="colours", width=WIDTH),
        preprocessing=Preprocessing(image_size=32),
        class_names=("red", "green", "blue"),
        images="jpeg",
    )
    arrays = feature_arrays(WIDTH) + target_arrays(label=True) + image_arrays("jpeg", 32)
    keys = {split: [f"{split}/{row}.png" for row in range(8)] for split in ("train", "val")}
    create_store(path, manifest, Plan(keys, batch_rows=8, shard_rows=64), arrays)
    settings: dict[str, Any] = {
        "side": 32,
        "grid": 0,
        "labels": True,
        "masks": False,
        "logits": False,
        "maps": 0,
        "images": "jpeg",
        "one_class": None,
        "unlabelled": (),
        "views": 0,
        "seed": 0,
        "aspect": 1,
        "exact_flip": False,
    }
    for split in keys:
        write_split(path, split, 8, settings, None)
    finalize_store(path)


def commands(parts: dict[str, Path], out: str) -> list[list[str]]:
    store, run = str(parts["store"]), str(parts["run"])
    return [
        ["extract", str(parts["folder"]), "--out", out, "--teacher-path", "x", "--device", "cpu"],
        ["train", store, "--student", "timm:test_resnet", "--out", out],
        ["sweep", store, "--students", "timm:test_resnet", "--out", out],
        ["report", run, "--out", out + ".html"],
        ["export", run, "--out", out],
        ["predict", run, str(parts["folder"]), "--out", out],
        ["convert", store, out + ".h5"],
        ["convert", store, out, "--zstd"],
        ["make-tiny-teacher", out],
        ["inspect", store, "--pictures", out],
        ["demo", "--out", out],
    ]


@pytest.mark.parametrize("place", PLACES)
def test_every_command_refuses_it_in_one_line(
    parts: dict[str, Path], place: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from cli import main

    folder = parts["folder"]
    out = place if place.startswith("/") else str(folder / ("n" * 300 if place == "LONG" else place))
    for arguments in commands(parts, out):
        if place in ("FIFO", "SOCKET") and out not in arguments:
            continue  # FIFO.html is a name like any other
        monkeypatch.setattr("sys.argv", ["cli", *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
        told = capsys.readouterr().err.strip().splitlines()
        assert ended.value.code in (1, 2), arguments
        assert told[-1].startswith("error: "), arguments
        assert len(told[-1]) < 600, arguments
        assert not [line for line in told if "Traceback" in line], arguments
    assert stat.S_ISFIFO((folder / "FIFO").stat().st_mode)
    assert stat.S_ISSOCK((folder / "SOCKET").stat().st_mode)


@pytest.mark.parametrize("address", ["s3://bucket/out", "gs://bucket/out", "memory://out"])
def test_a_url_is_not_taken_for_a_local_folder(
    parts: dict[str, Path],
    address: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """pathlib makes a folder named `s3:` of it, without a word."""
    from cli import main

    monkeypatch.chdir(tmp_path)
    for arguments in commands(parts, address):
        if arguments[0] in ("extract", "convert"):
            continue  # which write to URLs
        monkeypatch.setattr("sys.argv", ["cli", *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
        told = capsys.readouterr().err.strip().splitlines()
        assert ended.value.code in (1, 2), arguments
        assert told[-1].startswith("error: "), arguments
        assert address in told[-1], arguments
        assert "local path" in told[-1], arguments
        assert not list(tmp_path.iterdir()), arguments


def test_a_folder_named_like_a_scheme_is_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("s3:").mkdir()
    check_writable(Path("s3:/bucket"), "--out")


def test_a_device_is_not_replaced_by_a_file(tmp_path: Path) -> None:
    """Renaming a finished file to /dev/null, as root, would take it from the whole machine."""
    os.mkfifo(tmp_path / "pipe")
    for place in (tmp_path / "pipe", tmp_path / "link"):
        if place.name == "link":
            place.symlink_to("/dev/null")
        with pytest.raises(OutputError, match="is a device, pipe or socket"):
            check_writable(place, "--out")
        with pytest.raises(OutputError, match="is a device, pipe or socket"), whole_file(place):
            pass
    assert stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode)


@pytest.mark.parametrize("name", ["nu\0l", "n" * 300])
def test_names_that_no_file_can_have(tmp_path: Path, name: str) -> None:
    from train.errors import TrainError
    from train.run_folder import make_folder

    with pytest.raises(OutputError, match="cannot be written: "):
        check_writable(tmp_path / name, "--out")
    with pytest.raises(TrainError, match="cannot be created: "):
        make_folder(tmp_path / name)
