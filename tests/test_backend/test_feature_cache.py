"""The shared cache: what names a store, who waits for whom, and what a digest depends on."""

from __future__ import annotations

import json
import os
import sqlite3
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from backend.task.errors import PlatformError
from backend.task.feature_cache import (
    FeatureCache,
    cache_key,
    digest_folder,
    digest_source,
    teacher_digest,
)
from backend.task.stages import make_folder
from processes.stop import Stopped, StopRequest

ROOT = Path(__file__).resolve().parents[2]


def fill(folder: Path, **files: str) -> Path:
    for name, text in files.items():
        path = folder / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder


def test_equal_data_has_one_digest_wherever_it_lies(tmp_path: Path) -> None:
    one = fill(tmp_path / "one", train__a__1="x", train__b__1="y")
    two = fill(tmp_path / "two", train__b__1="y", train__a__1="x")
    assert digest_folder(one, tmp_path / "memo") == digest_folder(two, tmp_path / "memo")


@pytest.mark.parametrize("change", ["content", "name", "added", "removed"])
def test_any_change_of_the_data_changes_the_digest(tmp_path: Path, change: str) -> None:
    data = fill(tmp_path / "data", a__1="x", a__2="y")
    before = digest_folder(data, tmp_path / "memo")
    if change == "content":
        (data / "a/1").write_text("X")
        os.utime(data / "a/1", ns=(1, 1))  # even when the clock is set back
    elif change == "name":
        (data / "a/1").rename(data / "a/3")
    elif change == "added":
        fill(data, a__3="z")
    else:
        (data / "a/1").unlink()
    assert digest_folder(data, tmp_path / "memo") != before


@pytest.mark.parametrize(
    ("file", "old", "new"),
    [
        ("labels/train/1.txt", "0 0.5", "1 0.5"),
        ("data.yaml", "cat", "lynx"),
        ("annotations/train.json", '"bbox": [1', '"bbox": [2'),
        ("Annotations/1.xml", "<xmin>1", "<xmin>2"),
    ],
)
def test_corrected_annotations_are_another_data_set(tmp_path: Path, file: str, old: str, new: str) -> None:
    """So that no task trains from features with the old targets."""
    data = fill(
        tmp_path / "data",
        **{
            "images__train__1": "x",
            "labels__train__1.txt": "0 0.5 0.5 0.5 0.5",
            "data.yaml": "names: [cat]",
            "annotations__train.json": '{"bbox": [1, 1, 2, 2]}',
            "Annotations__1.xml": "<xmin>1</xmin>",
        },
    )
    before = digest_folder(data, tmp_path / "memo")
    text = (data / file).read_text()
    assert old in text
    (data / file).write_text(text.replace(old, new))
    assert digest_folder(data, tmp_path / "memo") != before


@pytest.mark.parametrize("change", ["none", "class name", "one of many boxes", "label", "image"])
def test_rows_of_a_database_count_with_class_names_and_all_their_boxes(tmp_path: Path, change: str) -> None:
    """A renamed class keeps its number, and numpy's text of a long array leaves out its middle."""
    from extract.sources.detect import open_source

    boxes = [{"box": [number, 0, number + 1, 1], "class": "cat"} for number in range(600)]
    rows = [("a", b"image", "cat", boxes), ("b", b"other", "dog", [])]

    def digest() -> str:
        path = tmp_path / "data.sqlite"
        with sqlite3.connect(path) as connection:
            connection.execute(
                "CREATE TABLE IF NOT EXISTS t (key TEXT, image BLOB, label TEXT, annotation TEXT)"
            )
            connection.execute("DELETE FROM t")
            values = [(key, image, label, json.dumps(found)) for key, image, label, found in rows]
            connection.executemany("INSERT INTO t VALUES (?, ?, ?, ?)", values)
        connection.close()
        return digest_source(open_source(f"sqlite:///{path}", query="SELECT * FROM t", val_fraction=0))

    before = digest()
    if change == "class name":
        rows[1] = ("b", b"other", "dogs", [])
    elif change == "one of many boxes":
        boxes[300]["box"] = [300, 0, 301.5, 1]
    elif change == "label":
        rows[1] = ("b", b"other", "cat", [])
    elif change == "image":
        rows[1] = ("b", b"changed", "dog", [])
    assert (digest() == before) == (change == "none")


def test_what_other_programs_leave_does_not_count(tmp_path: Path) -> None:
    data = fill(tmp_path / "data", a__1="x")
    before = digest_folder(data, tmp_path / "memo")
    fill(data, **{"labels.cache": "ultralytics", ".DS_Store": "mac", "a__Thumbs.db": "windows"})
    assert digest_folder(data, tmp_path / "memo") == before


def test_unchanged_files_are_not_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = fill(tmp_path / "data", **{f"a__{i}": str(i) for i in range(20)})
    from backend.task import feature_cache

    before = digest_folder(data, tmp_path / "memo")
    fill(data, a__new="n")
    read: list[Path] = []
    original = feature_cache.file_digest

    def noted(path: Path) -> str:
        read.append(path)
        return original(path)

    monkeypatch.setattr(feature_cache, "file_digest", noted)
    after = digest_folder(data, tmp_path / "memo")
    assert after != before
    assert read == [data / "a/new"]


def test_a_damaged_memo_costs_time_only(tmp_path: Path) -> None:
    data = fill(tmp_path / "data", a__1="x")
    before = digest_folder(data, tmp_path / "memo")
    (memo,) = (tmp_path / "memo").iterdir()
    memo.write_bytes(b"\xff\x00garbage\x00zzz")
    assert digest_folder(data, tmp_path / "memo") == before


def test_a_linked_loop_ends(tmp_path: Path) -> None:
    data = fill(tmp_path / "data", a__1="x")
    (data / "a" / "loop").symlink_to(data)
    (data / "dead").symlink_to(tmp_path / "nowhere")
    assert digest_folder(data, tmp_path / "memo")


def test_a_stop_ends_the_reading(tmp_path: Path) -> None:
    data = fill(tmp_path / "data", **{f"a__{i}": str(i) for i in range(50)})

    def stop() -> None:
        raise Stopped("now", 143)

    with pytest.raises(Stopped):
        digest_folder(data, tmp_path / "memo", stop)


def test_of_a_teacher_only_the_vision_files_count(tmp_path: Path) -> None:
    index = {"weight_map": {"visual.a": "1.safetensors", "lm_head.b": "2.safetensors"}}
    teacher = fill(
        tmp_path / "qwen",
        **{"config.json": "{}", "model.safetensors.index.json": json.dumps(index)},
        **{"1.safetensors": "vision", "2.safetensors": "language", "README.md": "r", "tokenizer.json": "t"},
    )

    def digest() -> str:
        return teacher_digest(teacher, tmp_path / "memo", lambda: None)

    before = digest()
    fill(teacher, **{"2.safetensors": "other", "README.md": "other", "tokenizer.json": "other"})
    assert digest() == before
    fill(teacher, **{"1.safetensors": "other!"})
    assert digest() != before


def test_the_key_depends_on_every_part() -> None:
    parts = {"weights": "a", "data": {"all": "b"}, "image_size": 224}
    keys = {cache_key(parts), *(cache_key({**parts, name: "other"}) for name in parts)}
    assert len(keys) == 4


HOLDER = """
import sys
from pathlib import Path
from backend.task.stages import make_folder
from backend.task.feature_cache import FeatureCache
from processes.stop import StopRequest
with FeatureCache(Path(sys.argv[1])).lock("k", "task 1", StopRequest()):
    print("held", flush=True)
    sys.stdin.readline()
"""


def start_holder(root: Path) -> subprocess.Popen[str]:
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(root)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    return holder


def test_the_second_task_waits_and_says_for_whom(tmp_path: Path) -> None:
    holder = start_holder(tmp_path)
    said: list[str] = []

    def waiting(text: str) -> None:
        said.append(text)
        assert holder.stdin is not None
        holder.stdin.close()  # only a waiting second task lets the first one go on

    with FeatureCache(tmp_path).lock("k", "task 2", StopRequest(), waiting):
        assert holder.wait(10) == 0
    assert len(said) == 1
    assert "task 1, process" in said[0]


def test_the_lock_of_a_killed_task_is_free(tmp_path: Path) -> None:
    holder = start_holder(tmp_path)
    holder.kill()
    holder.wait()
    said: list[str] = []
    with FeatureCache(tmp_path).lock("k", "task 2", StopRequest(), said.append):
        pass
    assert said == []


def test_a_waiting_task_can_be_stopped(tmp_path: Path) -> None:
    holder = start_holder(tmp_path)
    stop = StopRequest()
    threading.Timer(0.1, stop.set).start()
    with pytest.raises(Stopped) as caught, FeatureCache(tmp_path).lock("k", "task 2", stop):
        pass
    holder.kill()
    holder.wait()
    assert caught.value.exit_code == 143


def test_other_keys_do_not_wait(tmp_path: Path) -> None:
    cache = FeatureCache(tmp_path)
    with cache.lock("a", "task 1", StopRequest()), cache.lock("b", "task 2", StopRequest()):
        pass


def test_a_cache_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(PlatformError, match=r"--cache_dir: .*file"):
        make_folder("cache_dir", tmp_path / "file" / "cache")
