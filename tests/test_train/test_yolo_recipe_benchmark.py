"""benchmarks/detection_recipe.py runs end to end."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.detection_recipe import KINDS, main

pytest.importorskip("ultralytics")


@pytest.mark.slow
def test_all_three_trainings_are_measured_on_the_same_images(yolo_store: Path, tmp_path: Path) -> None:
    words = ["--data", str(yolo_store), "--epochs", "1", "--image-size", "64", "--work", str(tmp_path)]
    found = main(words)
    assert sorted(row["kind"] for row in found["runs"]) == sorted(KINDS)
    assert all(0 <= row["map50"] <= 1 and row["seconds"] > 0 for row in found["runs"])
    for split in ("train", "val"):
        images, labels = (
            sorted((tmp_path / "yolo" / kind / split).iterdir()) for kind in ("images", "labels")
        )
        assert [path.stem for path in images] == [path.stem for path in labels]
    again = main(words)  # finished trainings are not repeated
    assert {row["seconds"] for row in again["runs"]} == {row["seconds"] for row in found["runs"]}
