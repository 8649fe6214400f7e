"""What can go wrong while a store follows its data set: kills, stops, changes in between, full disks."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from extract.config import load_config
from extract.follow.version import NoSpace
from extract.run import run_extraction
from processes.stop import StopRequest
from store.reader import open_store
from store.verify import verify_store
from tests.test_extract.extractions import extract, files_of, interrupt
from tests.test_extract.source_datasets import WRITERS, picture, save
from tests.test_extract.test_run_follow import Follower, edit_yolo

CALLS = ("write", "writev", "fsync", "replace", "rename", "link", "unlink", "rmdir", "mkdir", "ftruncate")


@pytest.fixture
def follower(extract_options: dict[str, Any], tmp_path: Path) -> Follower:
    return Follower(extract_options, WRITERS["yolo"](tmp_path / "data"))


def change(root: Path) -> None:
    """Boxes, a removed, a renamed, two new images and one with other bytes."""
    edit_yolo(root)
    (root / "images/train/3.png").unlink()
    (root / "images/train/4.png").rename(root / "images/train/44.png")
    (root / "labels/train/4.txt").rename(root / "labels/train/44.txt")
    save(root / "images/train/90.png", picture(90))
    save(root / "images/val/91.png", picture(91))
    save(root / "images/train/5.png", picture(92))


def die_at_call(options: dict[str, Any], number: int) -> None:
    """Run an extraction in a process that ends, as kill -9 would end it, just before its n-th change of the disk."""
    calls = 0

    def counted(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls >= number:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)

        return call

    for name in CALLS:
        setattr(os, name, counted(getattr(os, name)))
    extract(options)


def kill_at(options: dict[str, Any], number: int) -> bool:
    """Whether the extraction was killed: False when it ended before its n-th call."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["extract.run", "timm", "extract.teachers.timm_encoder"])
    process = context.Process(target=die_at_call, args=(options, number))
    process.start()
    process.join(120)
    assert process.exitcode in (0, -signal.SIGKILL)
    return process.exitcode != 0


def kill_at_many_calls(follower: Follower, tmp_path: Path, first: int, step: int) -> int:
    """Kill one run at call `first`, the next at `first` + step, … until a run ends by itself; resume each of them."""
    out = Path(follower.options["out"])
    follower.extract()
    shutil.copytree(out, tmp_path / "before")
    change(tmp_path / "data")
    follower.extract()
    undisturbed = files_of(out)
    number = first
    while True:
        shutil.rmtree(out)
        shutil.copytree(tmp_path / "before", out)
        killed = kill_at(follower.options, number)
        follower.extract()
        assert files_of(out) == undisturbed, f"killed at call {number}"
        assert not (out / ".work").exists()
        if not killed:
            return (number - first) // step
        number += step


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_kill_at_any_moment_changes_nothing(follower: Follower, tmp_path: Path) -> None:
    step = int(os.environ.get("CRASH_STEP", "101"))
    assert kill_at_many_calls(follower, tmp_path, 2, step) >= 4
    follower.check()


def test_the_store_is_readable_until_the_switch(
    follower: Follower, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    follower.extract()
    fingerprint = follower.store.fingerprint
    change(tmp_path / "data")
    from extract.follow import version as follow

    seen = []
    publish = follow.publish_version
    monkeypatch.setattr(
        follow, "publish_version", lambda path: (seen.append(open_store(path).fingerprint), publish(path))
    )
    follower.extract()
    assert len(seen) > 1  # each look at the data set, and the switch itself
    assert set(seen) == {fingerprint}
    assert follower.store.fingerprint != fingerprint


def stop_when(monkeypatch: pytest.MonkeyPatch, name: str, stop: StopRequest) -> None:
    """Request a stop just before `extract.follow.version` calls one of its functions."""
    from extract.follow import version as follow

    function = getattr(follow, name)

    def stopped(*args: Any, **kwargs: Any) -> Any:
        stop.set()
        return function(*args, **kwargs)

    monkeypatch.setattr(follow, name, stopped)


@pytest.mark.parametrize("moment", ["plan_rows", "write_version"])
def test_a_stopped_run_goes_on(
    follower: Follower, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    from processes.stop import Stopped

    follower.extract()
    before = follower.store.fingerprint
    change(tmp_path / "data")
    stop = StopRequest()
    with monkeypatch.context() as patch:
        stop_when(patch, moment, stop)
        with pytest.raises(Stopped, match=r"committed in .*Go on with: cli extract"):
            run_extraction(load_config(follower.options), (), stop)
    assert follower.store.fingerprint == before
    assert verify_store(follower.options["out"]) == []
    follower.extract()
    follower.check()


class TestChangesWhileItIsIncomplete:
    def test_removed_files_do_not_stop_the_first_extraction(self, follower: Follower, tmp_path: Path) -> None:
        """What was encoded is not lost: the plan is finished, then the store follows."""
        options = {**follower.options, "batch_size": 2}
        interrupt(options, rows=4)
        committed = 11 - extract_rows_left(Path(options["out"]))
        change(tmp_path / "data")
        result = extract(options)
        assert result.complete
        assert result.bad == 0
        assert result.encoded <= 11 - committed + 3
        follower.check(batch_size=2)

    @pytest.mark.slow
    def test_class_names_may_change_too(self, follower: Follower, tmp_path: Path) -> None:
        options = {**follower.options, "batch_size": 2}
        interrupt(options, rows=4)
        text = (tmp_path / "data/data.yaml").read_text()
        (tmp_path / "data/data.yaml").write_text(text.replace("bird", "finch"))
        extract(options)
        follower.check(batch_size=2)

    def test_a_second_change_comes_after_the_first(
        self, follower: Follower, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Rows of the first change are encoded and wait; the second adds, removes and changes some of them."""
        from processes.stop import Stopped

        follower.extract()
        root = tmp_path / "data"
        change(root)
        stop = StopRequest()
        with monkeypatch.context() as patch:
            stop_when(patch, "write_version", stop)
            with pytest.raises(Stopped):
                run_extraction(load_config(follower.options), (), stop)
        save(root / "images/train/93.png", picture(93))
        (root / "images/val/91.png").unlink()
        assert follower.extract().encoded == 1  # 93: what the first change needed is there already
        follower.check()

    @pytest.mark.slow
    def test_encoded_rows_whose_files_changed_again_are_encoded_again(
        self,
        follower: Follower,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        from processes.stop import Stopped

        follower.extract()
        root = tmp_path / "data"
        change(root)
        stop = StopRequest()
        with monkeypatch.context() as patch:
            stop_when(patch, "write_version", stop)
            with pytest.raises(Stopped):
                run_extraction(load_config(follower.options), (), stop)
        for number in (190, 191):  # the second time a run is stopped at the same place
            save(root / "images/train/90.png", picture(number))
            stop = StopRequest()
            with monkeypatch.context() as patch:
                stop_when(patch, "write_version", stop)
                with pytest.raises(Stopped):
                    run_extraction(load_config(follower.options), (), stop)
        (root / "data.yaml").write_text((root / "data.yaml").read_text().replace("bird", "finch"))
        save(root / "images/train/90.png", picture(192))
        assert follower.extract().encoded == 1  # of three new ones, the two others are not encoded again
        follower.check()

    @pytest.mark.slow
    def test_a_change_that_is_taken_back_leaves_nothing(
        self, follower: Follower, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from processes.stop import Stopped

        follower.extract()
        before = files_of(follower.options["out"])
        save(tmp_path / "data/images/train/90.png", picture(90))
        stop = StopRequest()
        with monkeypatch.context() as patch:
            stop_when(patch, "write_version", stop)
            with pytest.raises(Stopped):
                run_extraction(load_config(follower.options), (), stop)
        (tmp_path / "data/images/train/90.png").unlink()
        assert follower.extract().changes is None
        assert files_of(follower.options["out"]) == before


def extract_rows_left(path: Path) -> int:
    from store.job import count_committed, features_job

    job = features_job(path)
    assert job is not None
    return sum(end - first for _, first, end in job.units()) - count_committed(path, job)


def test_a_disk_without_room_is_an_error_before_anything_is_written(
    follower: Follower, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    follower.extract()
    before = files_of(follower.options["out"])
    change(tmp_path / "data")
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: usage)
        with pytest.raises(
            NoSpace, match=r"needs about .* MB beside the old one, 0 MB are free: free some space"
        ):
            follower.extract()
    assert files_of(follower.options["out"]) == before


def test_a_range_of_shards_leaves_changes_alone_and_says_so(
    follower: Follower, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    follower.extract()
    before = files_of(follower.options["out"])
    change(tmp_path / "data")
    assert follower.extract(shard_range="0:").encoded == 0
    assert "the data set has changed: " in caplog.text
    assert "Run the same command without --shard-range: the store follows it" in caplog.text
    assert files_of(follower.options["out"]) == before


def test_targets_that_come_later_get_their_arrays(extract_options: dict[str, Any], tmp_path: Path) -> None:
    """A folder without classes, sorted into classes later: renamed files, and labels that the store did not have."""
    root = tmp_path / "data"
    for number in range(6):
        save(root / f"{number}.png", picture(number))
    options = {**extract_options, "data": str(root), "val_fraction": 0, "source": "folder"}
    extract(options)
    assert "targets/label" not in open_store(options["out"])["train"].names
    for number in range(6):
        target = root / ("even" if number % 2 == 0 else "odd") / f"{number}.png"
        target.parent.mkdir(exist_ok=True)
        (root / f"{number}.png").rename(target)
    result = extract(options)
    assert result.encoded == 0
    store = open_store(options["out"])
    assert store.manifest.class_names == ("even", "odd")
    assert store.manifest.task == "classification"
    labels = store["train"].read("targets/label")
    assert [store.manifest.class_names[label] for label in labels] == [
        key.split("/")[0] for key in store["train"].keys
    ]
    assert verify_store(options["out"]) == []


def test_boxes_that_come_later_need_a_grid_that_is_not_there(
    extract_options: dict[str, Any], tmp_path: Path
) -> None:
    from extract.plan import DifferentStore

    root = tmp_path / "data"
    table = root / "table.csv"
    root.mkdir()
    for number in range(4):
        save(root / f"{number}.png", picture(number))
    options = {**extract_options, "data": str(table), "val_fraction": 0}
    table.write_text("path\n" + "".join(f"{n}.png\n" for n in range(4)))
    extract(options)
    table.write_text(
        "path,boxes,classes\n" + "".join(f'{n}.png,"[[0, 0, 4, 4]]","[""cat""]"\n' for n in range(4))
    )
    with pytest.raises(DifferentStore, match=r"grid is None, asked for 2\. --grid 0 keeps what is stored"):
        extract(options)
    assert extract(options, grid=0).encoded == 0
    boxes = open_store(options["out"])["train"].ragged(range(4), "targets/boxes/values")
    assert [box.tolist() for box in boxes] == [[[0, 0, 4, 4]]] * 4
    assert np.isfinite(open_store(options["out"])["train"].read("features/pooled")).all()


@pytest.mark.slow
def test_what_is_being_encoded_is_shown_and_can_be_shared(follower: Follower, tmp_path: Path) -> None:
    """`cli inspect` counts the new samples; `--shard-range` encodes some of them, and the rest of it comes after."""
    from store.summary import describe_store

    options = {**follower.options, "batch_size": 2}
    extract(options)
    for number in range(90, 97):
        save(tmp_path / f"data/images/train/{number}.png", picture(number))
    interrupt(options, rows=2)
    pending = describe_store(options["out"])["pending"]["new samples"]
    assert 2 <= pending["train"][0] < pending["train"][1] == 7
    result = extract(options, shard_range="1:")
    assert result.encoded == 3  # shards of four rows: the second has three
    assert extract(options).encoded == 7 - 3 - pending["train"][0]
    follower.check(batch_size=2)


def test_what_a_killed_switch_leaves_is_found_and_deleted(follower: Follower, tmp_path: Path) -> None:
    from store.verify import repair_store

    follower.extract()
    work = Path(follower.options["out"]) / ".work"
    for name in ("next", "replaced"):  # the switch is done, its cleaning up is not
        (work / name / "train").mkdir(parents=True)
    findings = [Path(finding.path).name for finding in verify_store(follower.options["out"])]
    assert sorted(findings) == ["next", "replaced"]
    assert len(repair_store(follower.options["out"])) == 2
    assert verify_store(follower.options["out"]) == []
    (work / "next").mkdir(parents=True, exist_ok=True)
    follower.extract()
    assert not work.exists()
