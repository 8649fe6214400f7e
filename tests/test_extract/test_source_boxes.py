"""Layouts with boxes: the forms they come in, and errors that name file and line."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from extract.sources.base import AnnotationError, SourceError
from extract.sources.detect import open_source
from imaging.decode import ImageError
from tests.test_extract.source_datasets import (
    boxes,
    only,
    picture,
    save,
    voc_xml,
    write_coco,
    write_voc,
    write_yolo,
)


def yolo(root: Path, yaml: str, label: str = "1 0.5 0.5 0.5 0.25\n", image: str = "images/a.png") -> Path:
    save(root / image, picture(0))
    file = root / (image.replace("images/", "labels/").removesuffix(".png") + ".txt")
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(label)
    (root / "data.yaml").write_text(yaml)
    return root


NAMES = "names: [cat, dog]\n"


def test_yolo_boxes_scale_with_the_image(tmp_path: Path) -> None:
    sample = only(open_source(yolo(tmp_path, NAMES + "train: images\n"), val_fraction=0))
    np.testing.assert_allclose(boxes(sample).values, [[6, 6, 18, 10]])
    np.testing.assert_allclose(boxes(sample, (240, 1600)).values, [[60, 600, 180, 1000]])
    assert boxes(sample).classes.tolist() == [1]


@pytest.mark.parametrize(
    "text",
    [
        "path: .\ntrain: images\n",
        "path: {root}\ntrain: images\n",
        "train: {root}/images\n",
        "train: ../images\n",
        "train: ./images\nval:\n",
        "train: [images]\n",
        "train: list.txt\n",
        "train: lists/dotted.txt\n",
        "train: lists/absolute.txt\n",
    ],
)
def test_yolo_finds_images_however_they_are_named(tmp_path: Path, text: str) -> None:
    root = yolo(tmp_path / "set", NAMES + text.format(root=tmp_path / "set"))
    (root / "lists").mkdir()
    (root / "list.txt").write_text("images/a.png\n\nimages/a.png\n")
    (root / "lists/dotted.txt").write_text("./../images/a.png\n")
    (root / "lists/absolute.txt").write_text(f"{root}/images/a.png\n")
    source = open_source(root, val_fraction=0)
    assert only(source).key == "images/a.png"
    assert boxes(only(source)).classes.tolist() == [1]
    assert len(source) == 1


def test_yolo_labels_follow_the_last_images_folder_or_lie_beside(tmp_path: Path) -> None:
    nested = yolo(tmp_path / "images" / "set", NAMES + "train: images\n", image="images/train/images/a.png")
    assert only(open_source(nested, val_fraction=0)).boxes.path.endswith("/images/train/labels/a.txt")  # type: ignore[union-attr]
    beside = yolo(tmp_path / "beside", NAMES + "train: .\n", image="a.png")
    assert boxes(only(open_source(beside, val_fraction=0))).classes.tolist() == [1]


def test_yolo_names_as_dictionary_or_count(tmp_path: Path) -> None:
    root = yolo(tmp_path, "names: {1: dog, 0: cat}\ntrain: images\n")
    assert open_source(root).class_names == ("cat", "dog")
    (root / "data.yaml").write_text("nc: 2\ntrain: images\n")
    assert open_source(root).class_names == ("0", "1")


def test_yolo_polygons_give_their_bounds_and_copies_count_once(tmp_path: Path) -> None:
    lines = "0 0.25 0.25 0.5 0.25 0.5 0.75 0.25 0.5\n1 0.5 0.5 0.5 0.25\n1 0.5 0.5 0.5 0.25\n\n"
    sample = only(open_source(yolo(tmp_path, NAMES + "train: images\n", lines), val_fraction=0))
    np.testing.assert_allclose(boxes(sample).values, [[6, 4, 12, 12], [6, 6, 18, 10]])


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("0 0.5 0.5 0.5", "4 numbers: expected 5"),
        ("0 0.5 0.5 0.5 0.5 0.5", "6 numbers: expected 5"),
        ("2 0.5 0.5 0.5 0.5", r"class 2, but there are 2 names \(0 to 1\)"),
        ("-1 0.5 0.5 0.5 0.5", "class -1"),
        ("0.5 0.5 0.5 0.5 0.5", "class 0.5"),
        ("0 12 7 24 14", "coordinates are fractions of the image's sides, not pixels"),
        ("0 nan 0.5 0.5 0.5", "must be finite"),
        ("cat 0.5 0.5 0.5 0.5", "expected numbers"),
    ],
)
def test_yolo_bad_lines_are_named(tmp_path: Path, line: str, message: str) -> None:
    root = yolo(tmp_path, NAMES + "train: images\n", f"0 0.5 0.5 0.5 0.5\n{line}\n")
    with pytest.raises(AnnotationError, match=rf"labels/a\.txt:2: .*{message}"):
        boxes(only(open_source(root, val_fraction=0)))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("names: [a]\ntrain: ../../etc\n", r"'../../etc' is outside the data set's root"),
        ("names: [a]\ntrain: /etc\n", "'/etc' is outside"),
        ("names: [a]\ntrain: escape.txt\n", r"escape\.txt:2: .*is outside"),
        ("names: [a]\npath: gone\ntrain: images\n", "`path: gone` means .* not a folder"),
        ("names: [a]\ntrain: gone\n", "neither a folder nor a list"),
        ("names: [a, a]\ntrain: images\n", "class names occur twice: a"),
        ("names: {0: a, 2: b}\ntrain: images\n", r"class numbers are \[0, 2\], expected 0 to 1"),
        ("names: [a]\nnc: 2\ntrain: images\n", "nc is 2, but there are 1 names"),
        ("names: [a]\ntrain: images\nval: images\nvalid: images\n", "split 'val' is given twice"),
        ("names: [a]\n", "no images in any split"),
        ("names: [a]\ntrain: {x: 1}\n", "expected a folder, a text file"),
        ("names: [a\n", "cannot be read as yaml"),
    ],
)
def test_yolo_bad_yaml_is_explained(tmp_path: Path, text: str, message: str) -> None:
    root = yolo(tmp_path, text)
    (root / "escape.txt").write_text("images/a.png\n../../etc/passwd\n")
    with pytest.raises(SourceError, match=message):
        open_source(root / "data.yaml")


def test_yolo_listed_image_that_is_gone_is_a_bad_image(tmp_path: Path) -> None:
    root = yolo(tmp_path, NAMES + "train: list.txt\n")
    (root / "list.txt").write_text("images/a.png\nimages/gone.png\n")
    with pytest.raises(ImageError, match="No such file"):
        only(open_source(root, val_fraction=0), 1).read()


def test_yolo_labels_without_a_yaml_are_not_passed_over(tmp_path: Path) -> None:
    (yolo(tmp_path, NAMES) / "data.yaml").unlink()
    with pytest.raises(SourceError, match=r"text files in labels/ but no data\.yaml"):
        open_source(tmp_path)
    assert open_source(tmp_path, "folder").task == "features"


def test_annotations_made_to_exhaust_memory_or_stack(tmp_path: Path) -> None:
    bomb = "a: &a [x, x, x, x, x, x, x, x]\n" + "".join(
        f"{chr(98 + n)}: &{chr(98 + n)} [{', '.join(['*' + chr(97 + n)] * 8)}]\n" for n in range(12)
    )
    with pytest.raises(SourceError, match=r"aliases \(\*name\) repeat so much") as raised:
        open_source(yolo(tmp_path / "1", bomb + "names: *m\ntrain: images\n"))
    assert len(str(raised.value)) < 500
    for number, names in enumerate(['["' + "n" * 3_000_000 + '", 7, [1]]', "{" + "x, " * 50_000 + "y: 1}"]):
        with pytest.raises(SourceError) as raised:
            open_source(yolo(tmp_path / f"long{number}", f"names: {names}\ntrain: images\n") / "data.yaml")
        assert len(str(raised.value)) < 2_100
    with pytest.raises(SourceError, match="cannot be read as yaml"):
        open_source(yolo(tmp_path / "2", "names: " + "[" * 5000) / "data.yaml")
    (tmp_path / "deep.json").write_text('{"images": ' + "[" * 100_000)
    with pytest.raises(AnnotationError, match="not JSON"):
        open_source(tmp_path / "deep.json")
    entities = "".join(f'<!ENTITY e{n + 1} "{f"&e{n};" * 10}">' for n in range(9))
    save(tmp_path / "3/a.png", picture(0))
    xml = f'<?xml version="1.0"?><!DOCTYPE x [<!ENTITY e0 "ha">{entities}]><annotation>&e9;</annotation>'
    (tmp_path / "3/a.xml").write_text(xml)
    with pytest.raises(AnnotationError, match="not XML"):
        open_source(tmp_path / "3")


def test_two_yaml_files_are_ambiguous(tmp_path: Path) -> None:
    root = yolo(tmp_path, NAMES + "train: images\n")
    (root / "other.yaml").write_text(NAMES)
    with pytest.raises(SourceError, match=r"several data-set yaml files \(data.yaml, other.yaml\)"):
        open_source(root)


def test_the_same_image_in_two_splits_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"1 keys occur more than once .*'images/a\.png'"):
        open_source(yolo(tmp_path, NAMES + "train: images\nval: images\n"))


def edit_coco(root: Path, change) -> Path:  # type: ignore[no-untyped-def]
    write_coco(root)
    file = root / "annotations/instances_train2017.json"
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))
    return root


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda c: c["annotations"][0].update(image_id=999),
            "annotation 1000: image_id 999 is not among the images",
        ),
        (lambda c: c["annotations"][1].update(category_id=5), "annotation 1001: category_id 5 is not among"),
        (lambda c: c["annotations"][0].update(bbox=[1, 2, 3]), r"annotation 1000: bbox \[1, 2, 3\]"),
        (
            lambda c: c["annotations"][0].update(bbox=[1, 2, -3, 4]),
            "annotation 1000: box .* ends before it begins",
        ),
        (lambda c: c["images"].append(c["images"][0]), "image id 10 occurs twice"),
        (lambda c: c["images"][1].update(file_name="../../../etc/passwd"), "image 11: .*is outside"),
        (lambda c: c["images"][1].pop("file_name"), "file_name is None, expected a text"),
        (lambda c: c["categories"][0].update(name="fish"), "elsewhere 'fish'|is 'fish', elsewhere 'bird'"),
    ],
)
def test_coco_errors_name_file_and_annotation(tmp_path: Path, change, message: str) -> None:  # type: ignore[no-untyped-def]
    root = edit_coco(tmp_path / "coco", change)
    with pytest.raises(SourceError, match=message) as caught:
        open_source(root, "coco")
    assert "instances_" in str(caught.value)


def test_coco_without_its_lists_is_no_coco(tmp_path: Path) -> None:
    root = edit_coco(tmp_path / "coco", lambda content: content.pop("annotations"))
    with pytest.raises(AnnotationError, match="no list 'annotations'"):
        open_source(root / "annotations/instances_train2017.json")
    (root / "annotations/instances_train2017.json").write_text('{"images": [1,}')
    with pytest.raises(AnnotationError, match=r"not JSON: .*line 1 column"):
        open_source(root / "annotations/instances_train2017.json")


def test_coco_clips_boxes_and_leaves_out_crowds_and_empty_ones(tmp_path: Path) -> None:
    def change(content: dict) -> None:  # type: ignore[type-arg]
        image, category = content["images"][0]["id"], content["categories"][2]["id"]
        content["annotations"] = [
            {"id": n, "image_id": image, "category_id": category, "bbox": box, "iscrowd": crowd}
            for n, (box, crowd) in enumerate([([20, 10, 9, 9], 0), ([0, 0, 5, 5], 1), ([1, 1, 0, 3], 0)])
        ]

    source = open_source(edit_coco(tmp_path / "coco", change))
    samples = {sample.key: sample for sample in source.splits["train"]}
    np.testing.assert_array_equal(boxes(samples["train2017/0.png"]).values, [[20, 10, 24, 16]])
    assert boxes(samples["train2017/0.png"]).classes.tolist() == [2]
    assert source.notes == ("instances_train2017.json: 1 boxes without area inside their image left out",)


def test_coco_as_roboflow_writes_it_and_as_one_file(tmp_path: Path) -> None:
    write_coco(tmp_path / "coco")
    for split, ours in {"train": "train", "valid": "val"}.items():
        target = tmp_path / "robo" / split
        target.mkdir(parents=True)
        for file in (tmp_path / f"coco/{ours}2017").iterdir():
            file.rename(target / file.name)
        (tmp_path / f"coco/annotations/instances_{ours}2017.json").rename(target / "_annotations.coco.json")
    source = open_source(tmp_path / "robo")
    assert (source.kind, {name: len(part) for name, part in source.splits.items()}) == (
        "coco",
        {"train": 7, "val": 4},
    )
    assert source.splits["val"].keys[0].startswith("valid/")
    single = open_source(tmp_path / "robo/train/_annotations.coco.json", val_fraction=0)
    assert len(single) == 7
    assert single.splits["train"][0].read()


def test_coco_says_where_it_looked_for_images(tmp_path: Path) -> None:
    write_coco(tmp_path / "coco")
    (tmp_path / "coco/train2017").rename(tmp_path / "coco/elsewhere")
    with pytest.raises(SourceError, match=r"not found in .*pass images=FOLDER"):
        open_source(tmp_path / "coco")


def test_voc_flat_and_mirrored_forms(tmp_path: Path) -> None:
    for place in ("flat/{}.{}", "mirror/{1}s/{0}.{1}", "splits/train/{}.{}"):
        save(tmp_path / place.replace("{1}s", "images").format("a", "png"), picture(0))
        xml = tmp_path / place.replace("{1}s", "annotations").format("a", "xml")
        xml.parent.mkdir(parents=True, exist_ok=True)
        xml.write_text(voc_xml([((2, 3, 10, 12), "tree")]))
    for name in ("flat", "mirror", "splits"):
        source = open_source(tmp_path / name, val_fraction=0)
        assert (source.kind, source.class_names) == ("voc", ("tree",))
        np.testing.assert_array_equal(boxes(only(source)).values, [[2, 3, 10, 12]])


def test_voc_options(tmp_path: Path) -> None:
    save(tmp_path / "a.png", picture(0))
    hard = voc_xml([((2, 3, 10, 12), "tree")]).replace("<difficult>0", "<difficult>1")
    both = hard.replace(
        "</annotation>", voc_xml([((0, 0, 5, 5), "bush")])[len("<annotation><filename>x.png</filename>") :]
    )
    (tmp_path / "a.xml").write_text(both)
    assert open_source(tmp_path).class_names == ("bush",)
    source = open_source(tmp_path, difficult=True, one_based=False, val_fraction=0)
    assert source.class_names == ("bush", "tree")
    np.testing.assert_array_equal(boxes(only(source)).values, [[3, 4, 10, 12], [1, 1, 5, 5]])


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("<name>dog</name>", "<name> </name>", "object 1: has no name"),
        ("<xmin>3</xmin>", "<xmin>x</xmin>", "object 1: box .* is not four numbers"),
        ("<xmin>3</xmin>", "<xmin>99</xmin>", "object 1: box .* ends before it begins"),
        ("<bndbox>", "<box>", "not XML: mismatched tag: line 1"),
    ],
)
def test_voc_errors_name_file_and_object(tmp_path: Path, old: str, new: str, message: str) -> None:
    write_voc(tmp_path)
    file = tmp_path / "Annotations/000005.xml"
    assert old in file.read_text()
    file.write_text(file.read_text().replace(old, new, 1))
    with pytest.raises(AnnotationError, match=f"000005.xml: .*{message}|000005.xml: {message}"):
        open_source(tmp_path)


def test_voc_list_with_an_unknown_image(tmp_path: Path) -> None:
    write_voc(tmp_path)
    (tmp_path / "ImageSets/Main/val.txt").write_text("000007\nnothing\n")
    with pytest.raises(AnnotationError, match=r"val.txt:2: no image JPEGImages/nothing"):
        open_source(tmp_path)


def test_yolo_cut_of_a_missing_val_is_by_key(tmp_path: Path) -> None:
    dataset = write_yolo(tmp_path)
    yaml = tmp_path / "data.yaml"
    yaml.write_text(yaml.read_text().replace("val: images/val\n", ""))
    first = open_source(dataset.path, val_fraction=0.5)
    assert {name: list(part.keys) for name, part in first.splits.items()} == {
        name: list(part.keys) for name, part in open_source(dataset.path, val_fraction=0.5).splits.items()
    }
    assert set(first.splits) == {"train", "val"}


def test_every_class_of_boxes_is_in_both_splits(tmp_path: Path) -> None:
    """One common class and ten rare ones, two images each: the hash alone leaves most of them out of val."""
    names = [f"c{number}" for number in range(11)]
    (tmp_path / "data.yaml").write_text(f"train: images\nnames: [{', '.join(names)}]\n")
    for number in range(20):
        save(tmp_path / f"images/{number}.png", picture(number))
        label = tmp_path / f"labels/{number}.txt"
        label.parent.mkdir(exist_ok=True)
        label.write_text(f"0 0.5 0.5 0.5 0.5\n{1 + number // 2} 0.5 0.5 0.25 0.25\n")
    splits = open_source(tmp_path, val_fraction=0.1).splits
    for samples in splits.values():
        found = {int(number) for sample in samples for number in sample.read_boxes((24, 16)).classes}
        assert found == set(range(11))
    assert len(splits["val"]) == 10


def test_voc_images_without_an_annotation_are_counted(tmp_path: Path) -> None:
    write_voc(tmp_path)
    assert open_source(tmp_path).notes == ()
    (tmp_path / "Annotations/000003.xml").unlink()
    source = open_source(tmp_path)
    assert source.notes == (
        "1 of 11 images have no XML file (first: JPEGImages/000003.png): taken as images without objects (source option "
        "unlabeled=true: as not labeled)",
    )
    assert len(source) == 11
