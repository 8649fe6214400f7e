"""Files whose names are not UTF-8: predicted, found from their keys, and named in valid Unicode everywhere."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from files.names import path_on_disk, printable
from files.writing import OutputError, check_writable
from train.data.images import path_of


def write_pictures(folder: bytes) -> Path:
    os.makedirs(folder)
    for number in range(2):
        pixels = np.random.default_rng(number).integers(0, 256, (32, 32, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(os.fsdecode(folder + b"/img\xe9%d.png" % number))
    with open(folder + b"/bad\xff.png", "wb") as file:
        file.write(b"no image")
    return Path(os.fsdecode(folder))


def test_names_are_shown_and_found_again(tmp_path: Path) -> None:
    folder = write_pictures(os.fsencode(tmp_path) + b"/data\xff")
    shown = printable(str(folder / os.fsdecode(b"img\xe90.png")))
    assert shown.endswith(r"data\xff/img\xe90.png")
    assert path_on_disk(Path(shown)).is_file()
    assert path_of(r"img\xe90.png", printable(str(folder))).is_file()
    assert path_on_disk(Path(r"gone\xff")) == Path(r"gone\xff")
    assert printable("ä\ud800") == r"ä\ud800"
    assert printable("plain") == "plain"


@pytest.mark.slow
def test_predict_writes_records_and_pictures(run_folder: Path, tmp_path: Path) -> None:
    folder = write_pictures(os.fsencode(tmp_path) + b"/data\xff")
    words = [sys.executable, "-m", "cli", "predict", str(run_folder), str(folder), "--device", "cpu"]
    done = subprocess.run([*words, "--out", str(tmp_path / "out")], capture_output=True, check=False)
    assert done.returncode == 1, done.stderr  # for the bad file
    assert b"Traceback" not in done.stderr
    assert rb"data\xff/bad\xff.png: not an image" in done.stderr
    records = [
        json.loads(line) for line in (tmp_path / "out/predictions.jsonl").read_text("utf-8").splitlines()
    ]
    assert [record["picture"] for record in records] == [r"img\xe90.jpg", r"img\xe91.jpg"]
    for record in records:
        assert (tmp_path / "out" / record["picture"]).is_file()
        assert record["file"] == printable(str(folder)) + "/" + record["picture"].replace(".jpg", ".png")
    printed = [json.loads(line)["file"] for line in done.stdout.decode("utf-8").splitlines()]
    assert printed == [record["file"] for record in records]
    done = subprocess.run([*words, "--json"], capture_output=True, check=False)
    answer: dict[str, Any] = json.loads(done.stdout.decode("utf-8"))
    assert [item["file"] for item in answer["predictions"]] == printed


def test_names_of_outputs_are_utf_8(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"--out .*r\\xff: cannot be written: the name is not UTF-8"):
        check_writable(tmp_path / "r\udcff", "--out")
