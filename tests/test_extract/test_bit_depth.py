"""16-bit gray images are scaled by one recorded rule for the whole data set."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from extract.config import ConfigError, load_config
from extract.plan import DifferentStore
from extract.run import ExtractResult, run_extraction
from extract.verify import audit_store
from store.reader import open_store


def extract(options: dict[str, Any], **changes: Any) -> ExtractResult:
    return run_extraction(load_config({**options, **changes}))


def microscopy(root: Path, largest: int) -> Path:
    """Twelve 16-bit pictures of bright spots on black, in two classes of brightness."""
    rng = np.random.default_rng(0)
    for number in range(12):
        pixels = np.zeros((40, 40), np.uint16)
        y, x = rng.integers(0, 30, 2)
        pixels[y : y + 10, x : x + 10] = largest - number
        file = root / "ab"[number % 2] / f"{number}.tif"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(file)
    return root


def stored_pixels(options: dict[str, Any]) -> np.ndarray:
    return open_store(options["out"])["train"].read("images/raw")


def test_microscopy_with_small_values_is_not_black(
    extract_options: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    options = {**extract_options, "data": str(microscopy(tmp_path / "cells", 235)), "images": "raw"}
    extract(options)
    assert open_store(options["out"]).manifest.preprocessing.bit_depth == 8
    assert stored_pixels(options).max() > 200
    assert "the largest value of 12 sampled ones is 235: --bit-depth 8, 255 is white" in caplog.text
    # The rule is the store's: brighter images that come later do not change it.
    Image.fromarray(np.full((40, 40), 4000, np.uint16)).save(tmp_path / "cells" / "a" / "bright.tif")
    extract(options)
    assert open_store(options["out"]).manifest.preprocessing.bit_depth == 8
    assert audit_store(Path(options["out"]), options["teacher_path"], samples=13, device="cpu").findings == []
    with pytest.raises(DifferentStore, match="bit_depth"):
        extract(options, bit_depth=12)


@pytest.mark.parametrize(
    ("largest", "asked", "depth"),
    [(1000, "auto", 10), (4000, "auto", 12), (60_000, "auto", 16), (235, "full", 16)],
)
def test_the_rule_is_the_smallest_depth_that_holds_the_sample(
    extract_options: dict[str, Any], tmp_path: Path, largest: int, asked: str, depth: int
) -> None:
    options = {**extract_options, "data": str(microscopy(tmp_path / "cells", largest)), "images": "raw"}
    extract(options, bit_depth=asked)
    assert open_store(options["out"]).manifest.preprocessing.bit_depth == depth
    assert (stored_pixels(options).max() > 100) == (asked == "auto")


def test_depths_that_do_not_exist_are_refused() -> None:
    with pytest.raises(ConfigError, match="bit_depth: must be auto, full"):
        load_config({"data": "x", "out": "y", "bit_depth": 24})
