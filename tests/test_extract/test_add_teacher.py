"""`--add-teacher NAME`: several teachers in one store, each with features, scales, statistics and validity of its own."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from commands.store import convert_paths
from extract.config import ConfigError, load_config
from extract.result import ExtractResult, resume_command
from extract.run import run_extraction
from extract.verify import audit_store
from processes.stop import Stopped, StopRequest
from store import teachers as store_teachers
from store.errors import DistillError, StoreError
from store.format import GRID, POOLED
from store.reader import open_store
from store.replicate import replicate_store
from store.summary import describe_store
from store.verify import verify_store

SECOND = "teachers/second/"


def extract(options: dict[str, Any], **changes: Any) -> ExtractResult:
    return run_extraction(load_config({**options, **changes}))


def second(qwen: Path) -> dict[str, Any]:
    """The options of the further teacher: another family, image size, grid and batch size."""
    return {
        "add_teacher": "second",
        "teacher": "qwen2.5-vl",
        "teacher_path": str(qwen),
        "image_size": 56,
        "grid": 2,
        "batch_size": 5,
    }


def contents(path: Path) -> dict[str, bytes]:
    """The files of a store that are part of it."""
    parts = {file.relative_to(path).as_posix(): file for file in path.rglob("*") if file.is_file()}
    return {
        name: file.read_bytes() for name, file in parts.items() if not name.startswith((".work", ".extract"))
    }


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory, digit_folder: Path, timm_weights: Path) -> dict[str, Any]:
    """Options of a store of one teacher, with recorded views and an image that cannot be read; it is made already."""
    data = tmp_path_factory.mktemp("several") / "data"
    for number, file in enumerate(sorted(digit_folder.rglob("*.png"))[::3]):
        copy = data / file.relative_to(digit_folder)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(file.read_bytes() if number else b"no image")
    options = {
        "data": str(data),
        "out": data.parent / "store",
        "teacher": "timm:test_efficientnet",
        "teacher_path": str(timm_weights),
        "image_size": 64,
        "grid": 2,
        "views": 2,
        "batch_size": 8,
        "shard_rows": 8,
        "workers": 0,
        "device": "cpu",
        "max_bad": "5",
    }
    extract(options)
    return options


@pytest.fixture(scope="module")
def both(
    first: dict[str, Any], micro_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    """The same store with a second teacher."""
    out = tmp_path_factory.mktemp("both") / "store"
    shutil.copytree(first["out"], out)
    options = {**first, "out": out}
    extract(options, **second(micro_checkpoint))
    return options


def test_a_second_teacher_is_what_a_store_of_its_own_holds(
    both: dict[str, Any], first: dict[str, Any], micro_checkpoint: Path, tmp_path: Path
) -> None:
    own = {key: value for key, value in second(micro_checkpoint).items() if key != "add_teacher"}
    extract(first, **own, out=tmp_path / "alone")
    alone, store = open_store(tmp_path / "alone"), open_store(both["out"])
    seen = store.of_teacher("second")
    assert seen.manifest.teacher == alone.manifest.teacher
    assert seen.manifest.preprocessing == alone.manifest.preprocessing
    assert seen.manifest.grid == 2
    assert seen.manifest.views == 2
    assert seen.fingerprint != store.fingerprint == open_store(first["out"]).fingerprint
    for name, split in alone.items():
        rows = seen[name].rows_of(split.keys)
        for array in (POOLED, GRID, "views/pooled", "views/grid"):
            stored = store[name].gather(rows, [SECOND + array])[SECOND + array]
            np.testing.assert_array_equal(stored, seen[name].gather(rows, [array])[array])
            expected = split.true_values(np.arange(len(split)), array)
            got = seen[name].true_values(rows, array)
            np.testing.assert_allclose(got, expected, rtol=2e-3, atol=2e-3)
            for kind in ("mean", "std"):
                ours = getattr(store[name].statistics[SECOND + array], kind)
                np.testing.assert_allclose(ours, getattr(split.statistics[array], kind), rtol=1e-2, atol=1e-3)
        np.testing.assert_array_equal(seen[name].valid[rows], split.valid)
    assert sum(int((~split.valid).sum()) for split in seen.values()) == 1
    assert verify_store(both["out"]) == []
    audit = audit_store(both["out"], str(micro_checkpoint), samples=4, device="cpu", name="second")
    assert audit.findings == []
    assert audit.samples == 4
    assert audit_store(both["out"], both["teacher_path"], samples=4, device="cpu").findings == []


def test_the_first_teacher_stays_as_it_was(both: dict[str, Any], first: dict[str, Any]) -> None:
    before, after = contents(first["out"]), contents(both["out"])
    changed = {name for name, data in before.items() if after[name] != data}
    assert changed == {"zarr.json", ".commits/train.json", ".commits/val.json"}
    assert all("/teachers" in name for name in after.keys() - before.keys())
    assert not (both["out"] / ".work").exists()
    again = extract(both)
    assert again.encoded == 0
    assert again.changes is None
    assert again.teachers == ["timm:test_efficientnet", "second"]
    described = describe_store(both["out"])
    assert described["manifest"]["teachers"]["second"]["teacher"]["name"] == "qwen2.5-vl"
    assert SECOND + POOLED in described["splits"]["train"]["arrays"]


@pytest.mark.parametrize("killed_at", ["encoding", "publishing", "publishing late"])
def test_an_interrupted_addition_leaves_the_store_usable_and_goes_on(
    killed_at: str,
    both: dict[str, Any],
    first: dict[str, Any],
    micro_checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out = tmp_path / "store"
    shutil.copytree(first["out"], out)
    options = {**first, "out": out, **second(micro_checkpoint)}
    with monkeypatch.context() as patch:
        if killed_at == "encoding":
            stop = StopRequest()

            class StopAfterOne:
                def progress(self, done: int, total: int, message: str) -> None:
                    if done:
                        stop.set()

            with pytest.raises(
                Stopped, match=f"committed in {out}. Go on with: .*--out {out}.*--add-teacher second"
            ):
                run_extraction(load_config(options), [StopAfterOne()], stop)
        else:
            name = "write_json" if killed_at == "publishing" else "drop_addition"

            def die(*arguments: object) -> None:
                raise KeyboardInterrupt

            patch.setattr(store_teachers, name, die)
            with pytest.raises(KeyboardInterrupt):
                extract(options)
    store = open_store(out)
    assert store["train"].gather([1], [POOLED])[POOLED].shape == (1, 256)
    if killed_at == "encoding":
        assert "teacher second" in describe_store(out)["pending"]
        assert verify_store(out) == []
    result = extract(options)
    assert result.complete
    assert result.store == str(out)
    assert contents(out) == contents(both["out"])
    assert verify_store(out) == []


def test_conversions_and_copies_keep_or_leave_out_a_teacher(both: dict[str, Any], tmp_path: Path) -> None:
    store = open_store(both["out"])
    convert_paths(str(both["out"]), str(tmp_path / "one.h5"), zstd=False, int8=False, pca=None)
    convert_paths(str(tmp_path / "one.h5"), str(tmp_path / "back"), zstd=False, int8=False, pca=None)
    back = open_store(tmp_path / "back")
    assert back.manifest.teachers == store.manifest.teachers
    for name, split in store.items():
        for array in split.names:
            np.testing.assert_array_equal(back[name].read(array), split.read(array))
        for array, statistics in split.statistics.items():
            np.testing.assert_array_equal(back[name].statistics[array].mean, statistics.mean)
    assert verify_store(tmp_path / "back") == []
    costs = convert_paths(str(both["out"]), str(tmp_path / "small"), zstd=False, int8=True, pca=None)
    assert {GRID, SECOND + GRID} <= {cost.array for cost in costs}
    assert min(cost.cosine_mean or 0 for cost in costs) > 0.99
    assert verify_store(tmp_path / "small") == []

    replicate_store(str(both["out"]), str(tmp_path / "all"))
    assert open_store(tmp_path / "all").manifest == store.manifest
    replicate_store(str(both["out"]), str(tmp_path / "one"), [SECOND + POOLED, "features"])
    one = open_store(tmp_path / "one")
    assert SECOND + GRID not in one["train"].names
    assert SECOND + "valid" in one["train"].names
    assert list(one.manifest.teachers) == ["second"]
    assert verify_store(tmp_path / "one") == []
    replicate_store(str(both["out"]), str(tmp_path / "none"), ["features", "targets"])
    none = open_store(tmp_path / "none")
    assert none.manifest.teachers == {}
    assert not any(name.startswith("teachers") for name in none["train"].names)
    assert verify_store(tmp_path / "none") == []


def test_a_remote_store_shows_both(both: dict[str, Any]) -> None:
    import fsspec

    memory = fsspec.filesystem("memory")
    memory.put(str(both["out"]), "/several.zarr", recursive=True)
    remote, local = open_store("memory://several.zarr"), open_store(both["out"])
    rows = np.arange(3)
    for name in ("second", local.manifest.teacher.name):
        there, here = remote.of_teacher(name)["train"], local.of_teacher(name)["train"]
        np.testing.assert_array_equal(there.gather(rows, [GRID])[GRID], here.gather(rows, [GRID])[GRID])
        np.testing.assert_array_equal(there.valid, here.valid)


def test_a_teacher_can_be_encoded_again(both: dict[str, Any], micro_checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "store"
    shutil.copytree(both["out"], out)
    extract({**both, "out": out, **second(micro_checkpoint)}, grid=4, overwrite=True)
    store = open_store(out)
    assert store["train"].specs[SECOND + GRID].row_shape[:2] == (4, 4)
    assert verify_store(out) == []
    before = open_store(both["out"])
    np.testing.assert_array_equal(store["train"].read(GRID), before["train"].read(GRID))


def test_what_cannot_be_added(
    both: dict[str, Any], first: dict[str, Any], micro_checkpoint: Path, tmp_path: Path
) -> None:
    more = second(micro_checkpoint)
    with pytest.raises(StoreError, match=r"has a teacher 'second' already .*--overwrite"):
        extract({**both, **more})
    with pytest.raises(StoreError, match="no teacher 'third'; it has timm:test_efficientnet, second"):
        open_store(both["out"]).of_teacher("third")
    with pytest.raises(ConfigError, match="--views 1: the store has 2"):
        extract({**first, **more}, views=1)
    options = {key: value for key, value in first.items() if key != "teacher"}
    with pytest.raises(ConfigError, match="say which model it is"):
        load_config({**options, "add_teacher": "second"})
    with pytest.raises(ConfigError, match="images has no effect with add_teacher"):
        load_config({**first, **more, "images": "jpeg"})
    for name in ("a/b", "../x", ".x", "a,b"):
        with pytest.raises(ConfigError, match="add_teacher: must be a name"):
            load_config({**first, **more, "add_teacher": name})
    with pytest.raises(StoreError, match="no such store"):
        extract({**first, **more}, out=tmp_path / "nothing")

    incomplete = tmp_path / "incomplete"
    shutil.copytree(first["out"], incomplete)
    root = json.loads((incomplete / "zarr.json").read_bytes())
    root["attributes"]["complete"] = False
    (incomplete / "zarr.json").write_text(json.dumps(root))
    with pytest.raises(StoreError, match="incomplete"):
        extract({**first, **more}, out=incomplete)


def test_other_images_are_refused(first: dict[str, Any], micro_checkpoint: Path, tmp_path: Path) -> None:
    data, out = tmp_path / "data", tmp_path / "store"
    shutil.copytree(first["data"], data)
    shutil.copytree(first["out"], out)
    options = {**first, "data": str(data), "out": out}
    extract(options)  # the store's data set has moved
    more = {**options, **second(micro_checkpoint)}
    files = sorted(data.rglob("*.png"))
    changed = files[-1]
    before = changed.read_bytes()
    changed.write_bytes(files[-2].read_bytes())
    with pytest.raises(DistillError, match="the data set has changed: 1 changed"):
        extract(more)
    assert not (out / ".work").exists()

    changed.write_bytes(before)

    class ChangeWhileItRuns:
        """Another image takes the place of one that is not encoded yet."""

        def progress(self, done: int, total: int, message: str) -> None:
            changed.write_bytes(files[-2].read_bytes())

    with pytest.raises(StoreError, match="1 images have other bytes now"):
        run_extraction(load_config(more), [ChangeWhileItRuns()])
    assert open_store(out).manifest.teachers == {}
    assert verify_store(out) == []
    changed.write_bytes(before)
    extract(more, overwrite=True)
    assert list(open_store(out).manifest.teachers) == ["second"]

    changed.write_bytes(files[-2].read_bytes())
    with pytest.raises(StoreError, match=r"further teachers \(second\) does not follow it"):
        extract(options)
    assert open_store(out).manifest.complete


def test_the_resume_command_names_teacher_and_store(first: dict[str, Any], micro_checkpoint: Path) -> None:
    from extract.addition import begin_addition

    command = resume_command(begin_addition(load_config({**first, **second(micro_checkpoint)})))
    assert f"--out {first['out']} " in f"{command} "
    assert "--add-teacher second" in command
    assert "--teacher qwen2.5-vl" in command
    assert ".work" not in command


@pytest.mark.slow
def test_several_devices_add_a_teacher(
    both: dict[str, Any], first: dict[str, Any], micro_checkpoint: Path, tmp_path: Path
) -> None:
    out = tmp_path / "store"
    shutil.copytree(first["out"], out)
    extract({**first, "out": out, **second(micro_checkpoint)}, device="cpu,cpu")
    assert contents(out) == contents(both["out"])
