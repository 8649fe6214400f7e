"""Class folders, listing, keys, the validation cut."""

from __future__ import annotations

import json
import os
import shutil
import unicodedata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torchvision.datasets import ImageFolder

from extract.result import LEDGER
from extract.sources import listing as listing_module
from extract.sources.base import SourceError
from extract.sources.detect import open_source
from extract.sources.listing import list_files, make_key
from extract.sources.splitting import split_hash
from imaging.decode import ImageError, read_file
from store.reader import open_store
from tests.test_extract.extractions import extract
from tests.test_extract.source_datasets import picture, save

PICTURE = picture(0)


def in_validation(key: str, fraction: float) -> bool:
    return split_hash(key) < fraction * 2.0**64


def make(root: Path, *names: str) -> Path:
    for number, name in enumerate(names):
        save(root / name, picture(number))
    return root


def keys(source) -> dict[str, list[str]]:  # type: ignore[no-untyped-def]
    return {name: list(samples.keys) for name, samples in source.splits.items()}


def test_without_splits_all_images_are_cut_by_key(tmp_path: Path) -> None:
    root = make(tmp_path, *(f"{'ab'[n % 2]}/{n}.png" for n in range(60)))
    parts = keys(open_source(root, val_fraction=0.3))
    assert set(parts) == {"train", "val"}
    assert all(in_validation(key, 0.3) for key in parts["val"])
    assert not any(in_validation(key, 0.3) for key in parts["train"])
    assert len(parts["train"]) + len(parts["val"]) == 60


def test_new_images_move_none_of_the_old_ones(tmp_path: Path) -> None:
    root = make(tmp_path, *(f"{'ab'[n % 2]}/{n}.png" for n in range(40)))
    before = keys(open_source(root))
    for number in range(40):
        save(root / f"{'ab'[number % 2]}/0{number}.png", picture(1000 + number))
    after = keys(open_source(root))
    for name in before:
        assert set(before[name]) <= set(after[name])


def test_the_cut_is_close_to_the_fraction_and_frozen() -> None:
    names = [f"class/{n}.jpg" for n in range(20_000)]
    assert abs(sum(in_validation(name, 0.1) for name in names) / 20_000 - 0.1) < 0.01
    # Frozen: another rule would mix the splits of stores that exist.
    assert [n for n in range(60) if in_validation(f"class/{n}.jpg", 0.1)] == FROZEN_CUT


FROZEN_CUT = [8, 17, 28, 32, 40, 45, 47, 54, 57]


@pytest.mark.parametrize("group", [None, True])
def test_copies_stay_on_one_side(tmp_path: Path, group: bool | None) -> None:
    """By default and by content; one copy is labeled otherwise than its original."""
    for number in range(80):
        save(tmp_path / "ab"[number % 2] / f"{number}.png", picture(number // 4))
    source = open_source(tmp_path, val_fraction=0.4, group_duplicates=group)
    content = {name: {sample.read() for sample in samples} for name, samples in source.splits.items()}
    assert content["train"]
    assert content["val"]
    assert not content["train"] & content["val"]
    if group is None:
        assert source.notes == (
            "60 of 80 samples are exact copies of others: each is in the split of its original",
        )
    plain = open_source(tmp_path, val_fraction=0.4, group_duplicates=False).splits
    assert {s.read() for s in plain["train"]} & {s.read() for s in plain["val"]}


def test_files_of_different_size_are_not_read_to_find_copies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only equal sizes are looked into, and only equal blocks lead to whole reads."""
    rng = np.random.default_rng(0)
    for number in range(40):
        data = rng.bytes(20_000) if number % 2 else rng.bytes(30_000 + number)
        (tmp_path / f"{number}.png").write_bytes(data)
    (tmp_path / "copy.png").write_bytes((tmp_path / "1.png").read_bytes())
    read: list[str] = []

    def note(path: Path, *limits: int) -> bytes:
        read.append(Path(path).name)
        return read_file(path)

    monkeypatch.setattr("extract.sources.base.read_file", note)
    source = open_source(tmp_path, val_fraction=0.3)
    assert sorted(read) == ["1.png", "copy.png"]
    assert len(source) == 41


def test_every_class_is_in_both_splits(tmp_path: Path) -> None:
    """20 classes of four images: by the hash alone most would have none in val."""
    names = [f"{number:02d}/{member}.png" for number in range(20) for member in range(4)]
    root = make(tmp_path, *names, "single/0.png")
    parts = keys(open_source(root, val_fraction=0.1))
    alone = {key.partition("/")[0] for key in names if in_validation(key, 0.1)}
    assert len(alone) < 15
    for name in parts:
        assert {key.partition("/")[0] for key in parts[name]} >= {f"{number:02d}" for number in range(20)}
    assert "single/0.png" in parts["train"] or in_validation("single/0.png", 0.1)
    everything = keys(open_source(root, val_fraction=0.999))
    assert {key.partition("/")[0] for key in everything["train"]} >= {f"{number:02d}" for number in range(20)}


def test_a_new_image_moves_at_most_one_other_of_its_class(tmp_path: Path) -> None:
    root = make(tmp_path, *(f"{name}/{n}.png" for name in "abcdef" for n in range(6)))
    before = keys(open_source(root))
    for number in range(60):
        save(root / f"a/new{number}.png", picture(1000 + number))
    after = keys(open_source(root))
    moved = set(before["val"]) - set(after["val"])
    assert len(moved) <= 1
    assert all(key.startswith("a/") for key in moved)
    assert {key for key in after["val"] if "new" not in key} <= set(before["val"])


def test_recorded_splits_win_over_the_rule(tmp_path: Path) -> None:
    """A store keeps its splits: also for copies that are new, whose originals are in it."""
    root = make(tmp_path, *(f"{'ab'[n % 2]}/{n}.png" for n in range(40)))
    parts = keys(open_source(root, val_fraction=0.3))
    recorded = {"train": set(parts["val"]), "val": set(parts["train"][:5])}  # the other way round
    original = parts["train"][0]
    (root / "a/zzz.png").write_bytes((root / original).read_bytes())
    again = keys(open_source(root, val_fraction=0.3, recorded=lambda: recorded))
    assert recorded["train"] <= set(again["train"])
    assert recorded["val"] | {"a/zzz.png"} <= set(again["val"])


def test_val_fraction_zero_keeps_one_split(tmp_path: Path) -> None:
    assert set(keys(open_source(make(tmp_path, "a/1.png", "b/2.png"), val_fraction=0))) == {"train"}


def test_valid_and_validation_mean_val(tmp_path: Path) -> None:
    root = make(tmp_path, "Training/a/1.png", "valid/a/1.png", "valid/b/2.png", "test/a/3.png")
    source = open_source(root)
    assert keys(source) == {
        "train": ["Training/a/1.png"],
        "test": ["test/a/3.png"],
        "val": ["valid/a/1.png", "valid/b/2.png"],
    }
    assert source.class_names == ("a", "b")
    assert [sample.label for sample in source.splits["val"]] == [0, 1]


def test_two_names_for_one_split_are_an_error(tmp_path: Path) -> None:
    root = make(tmp_path, "val/a/1.png", "valid/a/1.png")
    with pytest.raises(SourceError, match="name the same split twice"):
        open_source(root)


def test_class_names_are_sorted_by_code_point_as_torchvision_does(tmp_path: Path) -> None:
    root = make(tmp_path, "10/a.png", "9/a.png", "b/a.png", "B/a.png", "é/a.png")
    source = open_source(root, val_fraction=0)
    assert source.class_names == ("10", "9", "B", "b", "é") == tuple(ImageFolder(str(root)).classes)
    labels = {sample.key: sample.label for sample in source.splits["train"]}
    assert labels == {"10/a.png": 0, "9/a.png": 1, "B/a.png": 2, "b/a.png": 3, "é/a.png": 4}


@pytest.mark.parametrize("names", [("1.png", "2.JPG"), ("pictures/1.png", "pictures/x/2.png")])
def test_unlabelled_folders(tmp_path: Path, names: tuple[str, ...]) -> None:
    source = open_source(make(tmp_path, *names), val_fraction=0)
    assert source.task == "features"
    assert source.class_names == ()
    assert [sample.label for sample in source.splits["train"]] == [None, None]


def test_labels_can_be_forbidden_and_demanded(tmp_path: Path) -> None:
    root = make(tmp_path, "a/1.png", "b/1.png")
    assert open_source(root, labelled=False).class_names == ()
    assert open_source(make(tmp_path / "one", "a/1.png"), labelled=True).class_names == ("a",)


def test_options_may_be_texts_of_a_command_line(tmp_path: Path) -> None:
    root = make(tmp_path, "a/1.png", "b/1.png")
    assert open_source(root, labelled="false").class_names == ()
    with pytest.raises(SourceError, match="option labelled: got 'maybe', expected true or false"):
        open_source(root, labelled="maybe")
    with pytest.raises(SourceError, match="no option 'labeled': did you mean 'labelled'"):
        open_source(root, labeled="false")
    (tmp_path / "t.csv").write_text("path,label\na/1.png,y\n")
    assert open_source(tmp_path / "t.csv", class_names="x, y").class_names == ("x", "y")


def test_images_beside_class_folders_are_an_error(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"1 images are beside the class folders .* 'stray.png'"):
        open_source(make(tmp_path, "a/1.png", "b/1.png", "stray.png"))


def test_empty_and_missing_folders(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="no images in"):
        open_source(tmp_path)
    with pytest.raises(SourceError, match="does not exist"):
        open_source(tmp_path / "gone")


def test_hidden_and_other_files_are_left_out(tmp_path: Path) -> None:
    root = make(tmp_path, "a/1.png", "b/2.png", "a/.3.png", ".cache/4.png", "__MACOSX/a/1.png")
    (root / "a/Thumbs.db").write_bytes(b"x")
    assert keys(open_source(root, val_fraction=0)) == {"train": ["a/1.png", "b/2.png"]}


def test_linked_files_and_folders_are_followed(tmp_path: Path) -> None:
    pool = make(tmp_path / "pool", "1.png", "2.png")
    root = make(tmp_path / "root", "a/1.png")
    (root / "b").symlink_to(pool)
    (root / "a/linked.png").symlink_to(pool / "1.png")
    source = open_source(root, val_fraction=0)
    assert keys(source) == {"train": ["a/1.png", "a/linked.png", "b/1.png", "b/2.png"]}
    assert [len(sample.read()) > 0 for sample in source.splits["train"]] == [True] * 4


def test_link_loops_end(tmp_path: Path) -> None:
    root = make(tmp_path, "a/1.png", "b/1.png")
    (root / "a/up").symlink_to(root)
    (root / "b/self").symlink_to(root / "b")
    (root / "a/x.png").symlink_to("x.png")
    (root / "b/broken.png").symlink_to("gone.png")
    for name in "cdefgh":  # every folder links to every other: no loop is needed for endless work
        (root / name).mkdir()
    for name in "cdefgh":
        for other in "cdefgh":
            (root / name / other).symlink_to(root / other)
    found = list_files(root, [".png"])
    assert found[:2] == ["a/1.png", "a/x.png"]
    samples = {s.key: s for s in open_source(root, "folder", val_fraction=0).splits["train"]}
    for bad in ("a/x.png", "b/broken.png"):
        with pytest.raises(ImageError, match="cannot be read"):
            samples[bad].read()


def test_pipes_and_folders_named_like_images_do_not_block(tmp_path: Path) -> None:
    root = make(tmp_path, "a/1.png", "b/1.png")
    os.mkfifo(root / "a/pipe.png")
    (root / "b/folder.png").mkdir()
    samples = {s.key: s for s in open_source(root, val_fraction=0).splits["train"]}
    assert set(samples) == {"a/1.png", "a/pipe.png", "b/1.png"}
    with pytest.raises(ImageError, match="not a regular file"):
        samples["a/pipe.png"].read()


def test_unreadable_folder_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = make(tmp_path, "a/1.png", "secret/1.png")
    scandir = os.scandir

    def refuse(path: object) -> object:  # root may read everything, so the refusal is played
        if "secret" in str(path):
            raise PermissionError(13, "Permission denied")
        return scandir(path)  # type: ignore[call-overload]

    monkeypatch.setattr(listing_module.os, "scandir", refuse)
    with pytest.raises(SourceError, match=r"secret.* cannot be listed: Permission denied"):
        open_source(root, "folder")


def test_keys_are_nfc_and_bytes_beyond_utf8_are_escaped(tmp_path: Path) -> None:
    decomposed = unicodedata.normalize("NFD", "ä/über.png")
    root = make(tmp_path, decomposed, "b/1.png")
    (root / "b" / os.fsdecode(b"\xff.png")).write_bytes(b"x")
    source = open_source(root, val_fraction=0)
    assert sorted(keys(source)["train"]) == ["b/1.png", "b/\\xff.png", "ä/über.png"]
    assert source.class_names == ("b", "ä")
    for sample in source.splits["train"]:
        sample.key.encode("utf-8")
        assert sample.read()


def test_names_that_differ_in_unicode_form_only_are_an_error(tmp_path: Path) -> None:
    root = make(tmp_path, "a/é.png", "b/1.png", unicodedata.normalize("NFD", "a/é.png"))
    with pytest.raises(SourceError, match=r"1 keys occur more than once .* 'a/é.png'"):
        open_source(root)
    assert make_key("plain/x.png") == "plain/x.png"


def test_named_splits_unite_their_classes(tmp_path: Path) -> None:
    make(tmp_path / "one", "b/1.png", "c/1.png")
    make(tmp_path / "two", "a/1.png", "c/9.png")
    source = open_source(tmp_path, split={"train": "one", "val": "two"})
    assert source.class_names == ("a", "b", "c")
    labels = {name: [(s.key, s.label) for s in part] for name, part in source.splits.items()}
    assert labels == {
        "train": [("one/b/1.png", 1), ("one/c/1.png", 2)],
        "val": [("two/a/1.png", 0), ("two/c/9.png", 2)],
    }
    elsewhere = open_source(tmp_path / "one", split={"train": ".", "val": str(tmp_path / "two")})
    assert keys(elsewhere) == {
        "train": ["train/b/1.png", "train/c/1.png"],
        "val": ["val/a/1.png", "val/c/9.png"],
    }


def test_a_selection_is_lazy_about_files_that_vanish(tmp_path: Path) -> None:
    root = make(tmp_path, "a/1.png", "b/1.png")
    samples = open_source(root, val_fraction=0).splits["train"]
    (root / "a/1.png").unlink()
    with pytest.raises(ImageError, match="No such file"):
        samples[0].read()
    assert np.array_equal(PICTURE, picture(0))


def test_class_folders_named_like_splits_are_warned_of(tmp_path: Path) -> None:
    """With a third folder beside them, `train` and `val` are taken as classes: probably not what was meant."""
    root = make(tmp_path, "train/1.png", "val/2.png", "extra/3.png", "trainannot/x.jpg", "valannot/y.jpg")
    source = open_source(root)
    assert source.class_names == ("extra", "train", "trainannot", "val", "valannot")
    (warning,) = source.warnings
    assert warning.startswith(
        "4 of 5 class folders are named like splits or masks (train, val, trainannot, valannot)"
    )
    assert "--split train=train --split val=val" in warning
    assert "--source masks" in warning
    assert open_source(make(tmp_path / "plain", "cat/1.png", "dog/2.png", "mask/3.png")).warnings == ()


def test_a_data_set_whose_folder_is_not_utf_8(extract_options: dict[str, Any], tmp_path: Path) -> None:
    data = Path(os.fsdecode(os.fsencode(tmp_path) + b"/data\xff"))
    shutil.copytree(extract_options["data"], data)
    for number, file in enumerate(sorted(data.rglob("*.png"))[:3]):
        file.rename(file.with_name(os.fsdecode(b"scan\xe9%d.png" % number)))
    (data / os.fsdecode(b"0/bad\xfe.png")).write_bytes(b"")
    assert extract({**extract_options, "data": str(data)}, max_bad=1).rows == 61
    store = open_store(extract_options["out"])
    assert store.manifest.data_root == str(tmp_path / r"data\xff")
    (bad,) = (json.loads(line) for line in (extract_options["out"] / LEDGER).read_text("utf-8").splitlines())
    assert bad["key"] == r"0/bad\xfe.png"
    assert len(open_source(store.manifest.data_root)) == len(open_source(data)) > 0
    assert extract({**extract_options, "data": str(data)}, max_bad=1).encoded == 0
