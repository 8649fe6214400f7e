"""A store follows its data set: afterwards it is what a fresh extraction gives, and only new bytes were encoded."""

from __future__ import annotations

import csv
import json
import shutil
import sqlite3
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from extract.run import ExtractResult
from store.reader import Store, open_store
from store.verify import verify_store
from tests.test_extract.extractions import extract, files_of
from tests.test_extract.source_datasets import WRITERS, Dataset, picture, png, save


class Follower:
    """Extracts one data set again and again into one store, and compares it with fresh extractions."""

    def __init__(self, options: dict[str, Any], dataset: Dataset) -> None:
        self.dataset = dataset
        self.options = {
            **options,
            "data": str(dataset.path),
            "source": dataset.kind,
            "source_options": dataset.options,
            "shard_rows": 4,
            "frames": 2,
            "val_fraction": 0,
        }

    @property
    def store(self) -> Store:
        return open_store(self.options["out"])

    def extract(self, **changes: Any) -> ExtractResult:
        return extract(self.options, **changes)

    def fresh(self, **changes: Any) -> Store:
        out = Path(self.options["out"]).with_name("fresh")
        shutil.rmtree(out, ignore_errors=True)
        extract({**self.options, "out": out}, **changes)
        return open_store(out)

    def check(self, **changes: Any) -> None:
        """The store is right, and equal to a fresh one key by key."""
        assert verify_store(self.options["out"]) == []
        assert_equal_stores(self.store, self.fresh(**changes))
        assert self.extract(**changes).encoded == 0
        assert not (Path(self.options["out"]) / ".work").exists()


def assert_equal_stores(store: Store, fresh: Store) -> None:
    for name in ("class_names", "task", "data_root", "grid", "views", "images"):
        assert getattr(store.manifest, name) == getattr(fresh.manifest, name), name
    assert {spec.name: spec for spec in store.manifest.arrays} == {
        spec.name: spec for spec in fresh.manifest.arrays
    }
    assert set(store.splits) == set(fresh.splits)
    for split in fresh.splits:
        have, expected = store[split], fresh[split]
        assert sorted(have.keys) == sorted(expected.keys)
        rows = have.rows_of(expected.keys)
        for spec in fresh.manifest.arrays:
            if spec.ragged:
                pairs = zip(
                    have.ragged(rows, spec.name), expected.ragged(range(len(rows)), spec.name), strict=True
                )
                for one, other in pairs:
                    assert_same_values(spec.name, one, other, have, expected)
            else:
                one = have.gather(rows, [spec.name])[spec.name]
                assert_same_values(spec.name, one, expected.read(spec.name), have, expected)
        for name, statistics in expected.statistics.items():
            assert have.statistics[name].count == statistics.count
            np.testing.assert_allclose(have.statistics[name].mean, statistics.mean, rtol=5e-3, atol=5e-3)


def assert_same_values(name: str, one: np.ndarray, other: np.ndarray, have: Any, expected: Any) -> None:
    if name in expected.scale:  # batches of another size change the last bits, another calibration the scale
        one, other = (
            one.astype(np.float32) * have.scale[name],
            other.astype(np.float32) * expected.scale[name],
        )
        np.testing.assert_allclose(one, other, rtol=5e-3, atol=5e-3, err_msg=name)
    elif name.startswith("logits/"):
        np.testing.assert_allclose(one, other, atol=5e-2, err_msg=name)  # of features that agree as above
    else:
        np.testing.assert_array_equal(one, other, err_msg=name)


@pytest.fixture
def follower(extract_options: dict[str, Any], tmp_path: Path, request: pytest.FixtureRequest) -> Follower:
    kind = getattr(request, "param", "folder")
    return Follower(extract_options, WRITERS[kind](tmp_path / "data"))


# -- every way in which a data set can change, layout by layout -----------------------------------------


@dataclass
class Case:
    """A change of the data set below a root, and what must come of it."""

    kind: str
    name: str
    change: Callable[[Path], None]
    encoded: int
    counts: dict[str, int] = field(default_factory=dict)


def edit_yolo(root: Path) -> None:
    (root / "labels/train/1.txt").write_text("2 0.5 0.5 0.25 0.5\n")
    (root / "labels/train/0.txt").write_text("0 0.5 0.5 0.5 0.5\n")  # it had no boxes and no file
    (root / "labels/val/8.txt").unlink()


def rename_yolo_classes(root: Path) -> None:
    text = (root / "data.yaml").read_text()
    (root / "data.yaml").write_text(text.replace("bird", "sparrow") + "  3: whale\n")


def remove_yolo_class(root: Path) -> None:
    """The last class goes: labels that name it become wrong, as they would be in a fresh extraction."""
    text = (root / "data.yaml").read_text()
    (root / "data.yaml").write_text(text.replace("  2: dog\n", ""))


def add_boxes_outside(root: Path) -> None:
    """Stores keep the part of a box inside the image, and drop a box without any."""
    (root / "labels/train/1.txt").write_text("1 0.9 0.5 0.5 0.5\n2 1.5 1.5 0.2 0.2\n")


def edit_coco(root: Path) -> None:
    file = root / "annotations/instances_train2017.json"
    content = json.loads(file.read_text())
    content["annotations"][0]["bbox"] = [1, 1, 5, 5]
    content["categories"][0]["id"] = 90  # another order of the classes
    for annotation in content["annotations"]:
        if annotation["category_id"] == 7:
            annotation["category_id"] = 90
    file.write_text(json.dumps(content))
    other = root / "annotations/instances_val2017.json"
    other.write_text(
        other.read_text().replace('"id": 7,', '"id": 90,').replace('"category_id": 7,', '"category_id": 90,')
    )


def edit_voc(root: Path) -> None:
    file = root / "Annotations/000001.xml"
    file.write_text(file.read_text().replace("<name>cat</name>", "<name>lynx</name>"))


def edit_masks(root: Path) -> None:
    Image.fromarray(np.full((16, 24), 2, np.uint8)).save(root / "train/masks/2.png")


def break_mask(root: Path) -> None:
    Image.fromarray(np.full((3, 3), 1, np.uint8)).save(root / "train/masks/2.png")


def edit_csv(root: Path) -> None:
    rows = list(csv.reader((root / "table.csv").open(newline="")))
    rows[1][1], rows[2][1] = "dog", ""
    rows[3][3], rows[3][4] = "[[0, 0, 4, 4]]", '["bird"]'
    with (root / "table.csv").open("w", newline="") as file:
        csv.writer(file).writerows(rows[:-1])  # and the last one goes


def edit_hdf5(root: Path) -> None:
    import h5py

    from extract.sources.hdf5 import _open

    _open.cache_clear()  # this process holds the file open
    with h5py.File(root / "data.h5", "a") as file:
        file["train/labels"][0] = 2
        file["val/images"][1] = 255 - file["val/images"][1]


def edit_parquet(root: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    file = root / "data/train-00000-of-00001.parquet"
    table = pq.read_table(file).to_pylist()
    table[0]["label"] = "dog"
    table[2]["image"]["bytes"] = png(picture(77))
    pq.write_table(pa.Table.from_pylist(table), file, row_group_size=3)


def edit_sqlite(root: Path) -> None:
    with sqlite3.connect(root / "data.sqlite") as connection:
        connection.execute("UPDATE photos SET label = 'dog' WHERE name = 'img-000'")
        connection.execute("UPDATE photos SET a = '[]' WHERE name = 'img-001'")
        connection.execute("DELETE FROM photos WHERE name = 'img-002'")
    connection.close()


def move_boxes_outside(root: Path) -> None:
    rows = list(csv.reader((root / "table.csv").open(newline="")))
    rows[3][3], rows[3][4] = "[[-5, 0, 4, 400], [90, 90, 99, 99]]", '["bird", "cat"]'
    with (root / "table.csv").open("w", newline="") as file:
        csv.writer(file).writerows(rows)


def relabel_clip(root: Path) -> None:
    (root / "train/bird/clip0").rename(root / "train/cat/clip0")


def change_frame(root: Path) -> None:
    save(root / "train/bird/clip0/0002.png", picture(99))


CASES = [
    Case("folder", "removed", lambda root: (root / "train/bird/0.png").unlink(), 0, {"removed": 1}),
    Case(
        "folder",
        "renamed",
        lambda root: (root / "train/bird/0.png").rename(root / "train/bird/zero.png") and None,
        0,
        {"renamed": 1, "removed": 0},
    ),
    Case(
        "folder",
        "corrected class",
        lambda root: (root / "train/bird/0.png").rename(root / "train/dog/0.png") and None,
        0,
        {"renamed": 1},
    ),
    Case(
        "folder",
        "copied",
        lambda root: shutil.copy(root / "train/bird/0.png", root / "val/dog/copy.png") and None,
        0,
        {"copied": 1},
    ),
    Case("folder", "new", lambda root: save(root / "train/cat/new.png", picture(70)), 1, {"new": 1}),
    Case(
        "folder",
        "other bytes",
        lambda root: save(root / "train/bird/0.png", picture(71)),
        1,
        {"changed": 1},
    ),
    Case(
        "folder",
        "new class",
        lambda root: save(root / "train/ant/1.png", picture(72)),
        1,
        {"new": 1, "relabeled": 0},
    ),
    Case(
        "folder",
        "renamed class",
        lambda root: [(root / s / "bird").rename(root / s / "zebra") for s in ("train", "val")] and None,
        0,
        {"renamed": 4},
    ),
    Case("folder", "no val", lambda root: shutil.rmtree(root / "val"), 0, {"removed": 4}),
    Case("yolo", "boxes", edit_yolo, 0, {"relabeled": 3}),
    Case("yolo", "boxes outside", add_boxes_outside, 0, {"relabeled": 1}),
    Case("yolo", "classes", rename_yolo_classes, 0, {}),
    Case("yolo", "a class less", remove_yolo_class, 0, {}),
    Case("coco", "boxes and order", edit_coco, 0, {"relabeled": 1}),
    Case("voc", "names", edit_voc, 0, {"relabeled": 1}),
    Case("masks", "mask", edit_masks, 0, {"relabeled": 1}),
    Case("masks", "broken mask", break_mask, 0, {"relabeled": 1}),
    Case("csv", "labels and boxes", edit_csv, 0, {"relabeled": 3, "removed": 1}),
    Case("csv", "boxes outside", move_boxes_outside, 0, {"relabeled": 1}),
    Case("hdf5", "label and image", edit_hdf5, 1, {"relabeled": 1, "changed": 1}),
    Case("parquet", "label and image", edit_parquet, 1, {"relabeled": 1, "changed": 1}),
    Case("sqlite", "rows", edit_sqlite, 0, {"relabeled": 2, "removed": 1}),
    Case("clips", "class", relabel_clip, 0, {"renamed": 1}),
    Case("clips", "frame", change_frame, 1, {"changed": 1}),
]

# The others run with the slow tests: each is three extractions.
QUICK = {
    ("folder", "removed"),
    ("yolo", "boxes outside"),
    ("yolo", "a class less"),
    ("masks", "broken mask"),
    ("csv", "labels and boxes"),
    ("clips", "frame"),
}


@pytest.mark.parametrize(
    ("follower", "case"),
    [
        pytest.param(
            case.kind,
            case,
            id=f"{case.kind}: {case.name}",
            marks=() if (case.kind, case.name) in QUICK else pytest.mark.slow,
        )
        for case in CASES
    ],
    indirect=["follower"],
)
def test_the_store_becomes_what_a_fresh_extraction_gives(
    follower: Follower, case: Case, tmp_path: Path
) -> None:
    follower.extract(max_bad="50%")
    before = follower.store.fingerprint
    case.change(tmp_path / "data")
    result = follower.extract(max_bad="50%")
    assert result.encoded == case.encoded
    assert result.changes is not None
    assert {name: result.changes[name] for name in case.counts} == case.counts
    assert result.changes["encode"] == 0  # nothing is left to encode
    assert follower.extract(max_bad="50%").changes is None
    assert follower.store.fingerprint != before
    follower.check(max_bad="50%")


# -- the rules ------------------------------------------------------------------------------------------


def keys_of(follower: Follower, split: str = "train") -> list[str]:
    return list(follower.store[split].keys)


def features_of(follower: Follower) -> dict[str, bytes]:
    return {
        key: part.gather([row], ["features/pooled"])["features/pooled"].tobytes()
        for part in follower.store.values()
        for row, key in enumerate(part.keys)
    }


class CountingTeacher:
    """Counts the images that the teacher is given; loading one tries it on black images, which do not count."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from extract.teachers.timm_encoder import TimmTeacher

        self.images = 0
        encode = TimmTeacher.encode

        def counted(teacher: Any, images: Any, **options: Any) -> Any:
            self.images += sum(bool(image.any()) for image in images)
            return encode(teacher, images, **options)

        monkeypatch.setattr(TimmTeacher, "encode", counted)


def test_the_teacher_sees_new_bytes_only(
    follower: Follower, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    follower.extract()
    before = features_of(follower)
    root, teacher = tmp_path / "data", CountingTeacher(monkeypatch)
    (root / "train/bird/0.png").rename(root / "train/cat/renamed.png")
    (root / "train/cat/1.png").unlink()
    shutil.copy(root / "train/dog/2.png", root / "val/dog/copy.png")
    save(root / "val/cat/new.png", picture(80))
    save(root / "train/bird/3.png", picture(81))
    assert follower.extract().encoded == 2
    assert teacher.images == 2
    after = features_of(follower)
    same = {"train/cat/renamed.png": "train/bird/0.png", "val/dog/copy.png": "train/dog/2.png"}
    for key, data in after.items():
        if key not in ("val/cat/new.png", "train/bird/3.png"):
            assert data == before[same.get(key, key)], key
    follower.check()


def test_rows_stay_where_they_are_and_holes_are_filled(follower: Follower, tmp_path: Path) -> None:
    follower.extract()
    root, before = tmp_path / "data", keys_of(follower)
    (root / before[1]).unlink()
    (root / before[3]).rename(root / "train/cat/renamed.png")
    save(root / "train/ant/a.png", picture(80))
    save(root / "train/ant/b.png", picture(81))
    follower.extract()
    after = keys_of(follower)
    assert after == [
        before[0],
        "train/ant/a.png",
        before[2],
        "train/cat/renamed.png",
        *before[4:],
        "train/ant/b.png",
    ]
    for key in before[4:6]:
        (root / key).unlink()
    follower.extract()
    assert keys_of(follower) == [
        *after[:4],
        after[6],
        after[7],
    ]  # the last rows fill the holes, in their order
    follower.check()


def test_relabeling_alone_gives_the_files_of_a_fresh_extraction(
    extract_options: dict[str, Any], tmp_path: Path
) -> None:
    follower = Follower(extract_options, WRITERS["yolo"](tmp_path / "data"))
    follower.extract()
    edit_yolo(tmp_path / "data")
    follower.extract()
    follower.fresh()
    have, expected = (files_of(tmp_path / name) for name in ("store", "fresh"))
    assert have.keys() == expected.keys()
    assert [name for name in have if have[name] != expected[name]] == []


def test_a_recorded_view_belongs_to_its_key(follower: Follower, tmp_path: Path) -> None:
    """Under another name an image has other views: nothing of it can be reused, and that is what happens."""
    follower.extract(views=1)
    (tmp_path / "data/train/bird/0.png").rename(tmp_path / "data/train/bird/zero.png")
    result = follower.extract(views=1)
    assert (result.encoded, result.changes and result.changes["new"]) == (1, 1)
    follower.check(views=1)


@pytest.mark.slow
@pytest.mark.parametrize("images", ["jpeg", "raw"])
def test_stored_images_come_along(follower: Follower, tmp_path: Path, images: str) -> None:
    follower.extract(images=images)
    root = tmp_path / "data"
    (root / "train/cat/1.png").unlink()
    (root / "train/bird/0.png").rename(root / "val/bird/zero.png")
    save(root / "train/bird/3.png", picture(81))
    assert follower.extract(images=images).encoded == 1
    follower.check(images=images)


class TestBadImages:
    def test_a_repaired_image_is_encoded(self, follower: Follower, tmp_path: Path) -> None:
        file = tmp_path / "data/train/bird/0.png"
        data = file.read_bytes()
        file.write_bytes(data[:50])
        assert follower.extract().bad == 1
        file.write_bytes(data)
        result = follower.extract()
        assert (result.encoded, result.bad) == (1, 0)
        assert not (Path(follower.options["out"]) / "bad_images.jsonl").exists()
        follower.check()

    @pytest.mark.slow
    def test_an_image_that_breaks_becomes_a_bad_row(self, follower: Follower, tmp_path: Path) -> None:
        follower.extract()
        (tmp_path / "data/train/bird/0.png").write_bytes(b"")
        result = follower.extract()
        assert (result.encoded, result.bad) == (1, 1)
        follower.check()

    def test_one_that_could_not_be_read_is_tried_again(self, follower: Follower, tmp_path: Path) -> None:
        """The right to read changes neither size nor time: here a link leads nowhere, then to the file."""
        file, kept = tmp_path / "data/train/bird/0.png", tmp_path / "kept.png"
        file.rename(kept)
        file.symlink_to(tmp_path / "nothing.png")
        assert follower.extract().bad == 1
        assert follower.extract().encoded == 0
        kept.rename(tmp_path / "nothing.png")
        assert follower.extract().encoded == 1
        follower.check()

    def test_a_corrected_annotation_makes_a_row_good(
        self, extract_options: dict[str, Any], tmp_path: Path
    ) -> None:
        follower = Follower(extract_options, WRITERS["masks"](tmp_path / "data"))
        mask = tmp_path / "data/train/masks/2.png"
        data = mask.read_bytes()
        break_mask(tmp_path / "data")
        assert follower.extract().bad == 1
        mask.write_bytes(data)
        result = follower.extract()
        assert (result.encoded, result.bad) == (1, 0)
        follower.check()

    @pytest.mark.slow
    def test_all_bad_ones_are_tried_again_when_every_file_is_read(self, follower: Follower) -> None:
        assert follower.extract(max_pixels=10, max_bad="100%").bad == 11
        assert follower.extract().encoded == 0
        result = follower.extract(check_content=True)
        assert (result.encoded, result.bad) == (11, 0)
        follower.check()

    def test_repaired_ones_do_not_count_against_the_limit(self, follower: Follower, tmp_path: Path) -> None:
        from extract.result import TooManyBad

        files = [tmp_path / "data/train/bird" / name for name in ("0.png", "3.png", "6.png")]
        data = [file.read_bytes() for file in files]
        for file in files:
            file.write_bytes(b"")
        with pytest.raises(TooManyBad, match="--max-bad 1% allows 1"):
            follower.extract()
        for file, content in zip(files[:2], data, strict=False):
            file.write_bytes(content)
        files[2].unlink()
        assert follower.extract().complete
        follower.check()


def test_bytes_that_changed_under_the_same_size_and_time_need_a_full_check(
    follower: Follower, tmp_path: Path
) -> None:
    import os

    file = tmp_path / "data/train/bird/0.png"
    follower.extract()
    status, data = file.stat(), bytearray(file.read_bytes())
    data[-20] ^= 1  # in the checksum of the last chunk: the same length
    file.write_bytes(data)
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert follower.extract().changes is None
    changes = follower.extract(check_content=True).changes
    assert changes is not None
    assert changes["changed"] == 1


def test_touched_and_moved_files_change_nothing(follower: Follower, tmp_path: Path) -> None:
    follower.extract()
    before = files_of(follower.options["out"])
    for file in (tmp_path / "data").rglob("*.png"):
        file.touch()
    result = follower.extract()
    assert (result.encoded, result.changes) == (0, None)
    assert files_of(follower.options["out"]) == before
    (tmp_path / "data").rename(tmp_path / "moved")
    follower.options["data"] = str(tmp_path / "moved")
    assert follower.extract().changes is None
    assert follower.store.manifest.data_root == str(tmp_path / "moved")


def test_a_store_of_an_older_version_follows_too(extract_options: dict[str, Any], tmp_path: Path) -> None:
    """It recorded neither the annotations' files nor how the data set was cut."""
    follower = Follower(extract_options, WRITERS["yolo"](tmp_path / "data"))
    follower.extract()
    notes = Path(follower.options["out"]) / ".extract"
    for file in notes.glob("annotations-*"):
        file.unlink()
    (notes / "source.json").write_text(json.dumps({"split": {}, "options": {}}))
    before = files_of(follower.options["out"])
    assert follower.extract().changes is None
    assert files_of(follower.options["out"]) == before
    assert list(notes.glob("annotations-*"))
    edit_yolo(tmp_path / "data")
    assert follower.extract().encoded == 0
    follower.check()


class TestLogits:
    def test_those_of_a_probe_are_dropped_or_made_again(
        self, follower: Follower, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        from extract.result import note_probe, read_measured

        follower.extract(logits="probe")
        note_probe(Path(follower.options["out"]), {"probe_top1": 0.5, "knn_top1": 0.5})
        (tmp_path / "data/train/bird/0.png").rename(tmp_path / "data/train/dog/0.png")
        assert follower.extract(logits="probe").probe is not None
        follower.check(logits="probe")
        note_probe(Path(follower.options["out"]), {"probe_top1": 0.5, "knn_top1": 0.5})
        (tmp_path / "data/train/dog/0.png").unlink()
        caplog.clear()
        follower.extract()
        assert "logits/probe dropped, because labels or images have changed" in caplog.text
        assert "logits/probe" not in follower.store["train"].names
        assert read_measured(Path(follower.options["out"]))["probe_top1"] is None

    @pytest.mark.slow
    def test_zero_shot_scores_stay_while_images_and_class_names_do(
        self, follower: Follower, tmp_path: Path
    ) -> None:
        from extract.logits import write_logits

        follower.extract()
        path = Path(follower.options["out"])
        scores = {
            name: np.arange(len(part) * 3, dtype=np.float32).reshape(-1, 3)
            for name, part in follower.store.items()
        }
        write_logits(path, "zero-shot", 3, lambda split: iter([scores[split]]))
        (tmp_path / "data/train/bird/0.png").rename(tmp_path / "data/train/dog/0.png")
        follower.extract()
        train = follower.store["train"]
        row = train.keys.find("train/dog/0.png")
        assert train.read("logits/zero-shot")[row].tolist() == [0, 1, 2]
        assert verify_store(path) == []
        save(tmp_path / "data/train/dog/new.png", picture(80))
        follower.extract()
        assert "logits/zero-shot" not in follower.store["train"].names
