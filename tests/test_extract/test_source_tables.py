"""Tables: CSV and Parquet."""

from __future__ import annotations

import csv
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
    png,
    save,
    write_csv,
)


def table(root: Path, header: str, *rows: str, name: str = "table.csv") -> Path:
    root.mkdir(parents=True, exist_ok=True)
    save(root / "a.png", picture(0))
    save(root / "b.png", picture(1))
    (root / name).write_text("\n".join([header, *rows]) + "\n")
    return root / name


def test_table_with_a_row_per_box(tmp_path: Path) -> None:
    file = table(
        tmp_path,
        "image_path,xmin,ymin,xmax,ymax,label",
        "a.png,1,2,3,4,tree",
        "b.png,,,,,",
        "a.png,5,6,7.5,8,bush",
    )
    source = open_source(file, val_fraction=0)
    assert (source.task, source.class_names) == ("detection", ("bush", "tree"))
    assert [sample.key for sample in source.splits["train"]] == ["a.png", "b.png"]
    np.testing.assert_array_equal(boxes(only(source)).values, [[1, 2, 3, 4], [5, 6, 7.5, 8]])
    assert boxes(only(source)).classes.tolist() == [1, 0]
    assert boxes(only(source, 1)).values.shape == (0, 4)


def test_table_labels_keys_and_delimiters(tmp_path: Path) -> None:
    file = table(tmp_path, "key;file_name;label", "x;a.png;2", "y;b.png;", name="metadata.csv")
    source = open_source(tmp_path, val_fraction=0)
    assert source.kind == "table"
    assert [(s.key, s.label) for s in source.splits["train"]] == [("x", 2), ("y", None)]
    assert source.class_names == ("0", "1", "2")
    named = open_source(file, val_fraction=0, class_names=["p", "q", "r"])
    assert named.class_names == ("p", "q", "r")


def test_one_table_per_split(tmp_path: Path) -> None:
    table(tmp_path, "path,label", "a.png,x", name="train.csv")
    table(tmp_path, "path,label", "b.png,y", name="valid.csv")
    source = open_source(tmp_path)
    assert {name: list(part.keys) for name, part in source.splits.items()} == {
        "train": ["a.png"],
        "val": ["b.png"],
    }
    assert source.class_names == ("x", "y")


@pytest.mark.parametrize(
    ("header", "rows", "message"),
    [
        ("name,label", ["a.png,x"], "no image column among name, label"),
        ("path,label", ["a.png,x", "../../etc/passwd,x"], "table.csv:3: .*is outside"),
        ("path,label", ["a.png,x", "b.png"], "table.csv:3: expected 2 columns, found fewer"),
        ("path,label", ["a.png,x,y"], "table.csv:2: expected 2 columns, found more"),
        ("path,label", ["a.png,x", ",x"], "table.csv:3: the image is ''"),
        ("path,label", ["a.png,x", "a.png,x"], "keys occur more than once"),
        ("path,label", ["a.png,-1"], "table.csv:2: label -1 is negative"),
        ("path,label", ["a.png,x", "b.png,3"], "partly names"),
        ("path,boxes,classes", ['a.png,"[[1,2,3]]",[0]'], "table.csv:2: box .* is not four numbers"),
        ("path,boxes,classes", ['a.png,"[[1,2,3,4]]",[]'], "table.csv:2: 1 boxes, but 0 classes"),
        ("path,boxes,classes", ['a.png,"[[1,2",[0]'], "table.csv:2: .* is not JSON"),
        ("path,split", ["a.png,tr ain!"], "table.csv:2: split 'tr ain!'"),
        ("path,xmin,ymin,xmax,ymax,label", ["a.png,1,2,x,4,t"], "table.csv:2: box .* not four numbers"),
        ("path,label", [], "the table has no rows"),
    ],
)
def test_table_errors_name_file_and_line(tmp_path: Path, header: str, rows: list[str], message: str) -> None:
    with pytest.raises(SourceError, match=message):
        open_source(table(tmp_path, header, *rows))


def test_numbers_and_names_in_a_csv(tmp_path: Path) -> None:
    assert open_source(table(tmp_path / "1", "path,label", "a.png,1.0", "b.png,0")).class_names == ("0", "1")
    assert open_source(table(tmp_path / "2", "path,label", "a.png,007", "b.png,010")).class_names == (
        "007",
        "010",
    )
    named = open_source(
        table(tmp_path / "3", "path,label", "a.png,7", "b.png,5"), class_names=["5", "7"], val_fraction=0
    )
    assert [sample.label for sample in named.splits["train"]] == [1, 0]


def test_parquet_damage(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    cells = [{"bytes": png(picture(0)), "path": None}, {"bytes": None, "path": None}]
    pq.write_table(pa.table({"image": cells, "label": [0, 1]}), tmp_path / "x.parquet")
    samples = open_source(tmp_path / "x.parquet", val_fraction=0).splits["train"]
    assert samples[0].read() == png(picture(0))
    with pytest.raises(ImageError, match="no image bytes"):
        samples[1].read()
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 nonsense")
    with pytest.raises(SourceError, match="cannot be read as Parquet"):
        open_source(tmp_path / "bad.parquet")


def test_a_csv_field_with_a_newline_keeps_line_numbers_right(tmp_path: Path) -> None:
    dataset = write_csv(tmp_path)
    with Path(dataset.path).open("a", newline="") as file:
        csv.writer(file).writerow(["pictures/1.png", "two\nlines", "train", "[[9,9,1,1]]", "[0]"])
    with pytest.raises(AnnotationError, match=r"table\.csv:14: box"):
        open_source(dataset.path)
