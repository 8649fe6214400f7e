"""Every layout through the whole extraction: the store holds each key's own targets and picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from extract.config import load_config
from extract.run import run_extraction
from imaging.masks import decode_mask
from store.reader import open_store
from tests.test_extract.extractions import preprocess
from tests.test_extract.source_datasets import WRITERS, png

BOXES = ["targets/boxes/values", "targets/boxes/classes"]


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(WRITERS))
def test_the_store_holds_the_targets_of_each_key(
    name: str, tmp_path: Path, extract_options: dict[str, Any]
) -> None:
    dataset = WRITERS[name](tmp_path / "data set")
    clips = name.startswith("clip")
    options: dict[str, Any] = {
        **extract_options,
        "data": str(dataset.path),
        "source_options": dataset.options,
        "frames": 2,
        "images": "none" if clips else "raw",
        "grid": 0,
    }
    run_extraction(load_config(options))
    store = open_store(options["out"])
    names = store.manifest.class_names
    assert tuple(names) == dataset.class_names
    assert set(store.splits) == set(dataset.truth)
    for split_name, truths in dataset.truth.items():
        split = store[split_name]
        assert sorted(split.keys) == sorted(truths)
        assert split.valid.all()
        rows = np.arange(len(split))
        for row, key in zip(rows, split.keys, strict=True):
            truth = truths[key]
            if not clips:
                pixels = split.gather([row], ["images/raw"])["images/raw"][0]
                expected = preprocess(png(truth.pixels), options["image_size"]).pixels
                np.testing.assert_array_equal(pixels, expected.transpose(1, 2, 0))
                assert split.gather([row], ["sizes"])["sizes"][0].tolist() == [24, 16]
            if truth.label is not None:
                label = split.gather([row], ["targets/label"])["targets/label"][0]
                assert names[label] == truth.label
            if truth.boxes is not None:
                values, classes = (split.ragged([row], array)[0] for array in BOXES)
                np.testing.assert_allclose(
                    values, np.reshape([b for b, _ in truth.boxes], (-1, 4)), atol=1e-4
                )
                assert [names[number] for number in classes] == [box_name for _, box_name in truth.boxes]
            if truth.mask is not None:
                (encoded,) = split.ragged([row], "targets/mask/values")
                np.testing.assert_array_equal(decode_mask(np.asarray(encoded).tobytes()), truth.mask)
