"""Every layout passes the same tests: a new one gets them by adding a line to `source_datasets.WRITERS`."""

from __future__ import annotations

import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest

from extract.sources.base import Sample, Samples, Source, SourceError
from extract.sources.detect import detect_kind, open_source
from imaging.decode import decode_image
from imaging.masks import decode_mask
from tests.test_extract.source_datasets import WRITERS, Dataset


@pytest.fixture(params=sorted(WRITERS))
def dataset(request: pytest.FixtureRequest, tmp_path: Path) -> Dataset:
    return WRITERS[request.param](tmp_path / "data set")


def open_dataset(dataset: Dataset, **options: object) -> Source:
    return open_source(dataset.path, **dataset.options, **options)


def pixels_of(sample: Sample) -> np.ndarray:
    if sample.frames is not None:
        return np.asarray(sample.read_clip(1)[0].image)
    return np.asarray(decode_image(sample.read()))


def test_layout_is_detected(dataset: Dataset) -> None:
    assert detect_kind(dataset.path) == dataset.kind
    assert open_dataset(dataset).kind == dataset.kind


def test_splits_hold_exactly_the_expected_keys(dataset: Dataset) -> None:
    splits = open_dataset(dataset).splits
    assert {name: sorted(samples.keys) for name, samples in splits.items()} == {
        name: sorted(truth) for name, truth in dataset.truth.items()
    }


def test_each_key_has_its_own_picture_and_targets(dataset: Dataset) -> None:
    source = open_dataset(dataset)
    for split, samples in source.splits.items():
        for sample in samples:
            truth = dataset.truth[split][sample.key]
            np.testing.assert_array_equal(pixels_of(sample), truth.pixels)
            label = None if sample.label is None else source.class_names[sample.label]
            assert label == truth.label


def test_boxes_are_pixels_of_the_original(dataset: Dataset) -> None:
    source = open_dataset(dataset)
    for split, samples in source.splits.items():
        for sample in samples:
            truth = dataset.truth[split][sample.key].boxes
            boxes = sample.read_boxes((24, 16))
            if truth is None:
                assert boxes is None
                continue
            assert boxes is not None
            assert boxes.values.dtype == np.float32
            assert boxes.classes.dtype == np.int32
            np.testing.assert_allclose(
                boxes.values, np.reshape([box for box, _ in truth], (-1, 4)), atol=1e-4
            )
            assert [source.class_names[number] for number in boxes.classes] == [name for _, name in truth]


def test_masks_are_class_ids(dataset: Dataset) -> None:
    for split, samples in open_dataset(dataset).splits.items():
        for sample in samples:
            truth, mask = dataset.truth[split][sample.key].mask, sample.read_mask((24, 16))
            assert (truth is None) == (mask is None)
            if mask is not None:
                np.testing.assert_array_equal(decode_mask(mask), truth)


def test_class_names_are_those_of_all_splits(dataset: Dataset) -> None:
    assert open_dataset(dataset).class_names == dataset.class_names


def test_order_and_keys_are_the_same_every_time(dataset: Dataset) -> None:
    first, second = open_dataset(dataset).splits, open_dataset(dataset).splits
    assert {name: list(samples.keys) for name, samples in first.items()} == {
        name: list(samples.keys) for name, samples in second.items()
    }


@pytest.mark.parametrize("name", sorted(set(WRITERS) - {"sqlite"}))
def test_keys_do_not_depend_on_where_the_data_lies(name: str, tmp_path: Path) -> None:
    dataset = WRITERS[name](tmp_path / "data set")
    shutil.copytree(tmp_path / "data set", tmp_path / "moved")
    moved = tmp_path / "moved" / Path(dataset.path).relative_to(tmp_path / "data set")
    keys = [key for samples in open_source(moved, **dataset.options).splits.values() for key in samples.keys]
    assert sorted(keys) == sorted(key for truth in dataset.truth.values() for key in truth)


def test_samples_survive_pickling(dataset: Dataset) -> None:
    for split, samples in open_dataset(dataset).splits.items():
        sample = pickle.loads(pickle.dumps(samples[-1]))  # noqa: S301 - our own bytes
        assert sample.key == samples.keys[-1]
        np.testing.assert_array_equal(pixels_of(sample), dataset.truth[split][sample.key].pixels)


def test_content_is_the_same_every_time(dataset: Dataset) -> None:
    samples = open_dataset(dataset).splits["train"]
    first = [sample.read() for sample in samples]
    assert first == [sample.read() for sample in samples]
    assert len(set(first)) == len(first)


def test_progress_ends_at_the_number_of_samples_or_files(dataset: Dataset) -> None:
    seen: list[int] = []
    open_dataset(dataset, progress=seen.append)
    assert max(seen) >= 4


def test_unknown_option_is_named(dataset: Dataset) -> None:
    with pytest.raises(SourceError, match=f"source '{dataset.kind}' has no option 'nonsense'"):
        open_dataset(dataset, nonsense=1)


def test_index_out_of_range(dataset: Dataset) -> None:
    samples = open_dataset(dataset).splits["val"]
    with pytest.raises(IndexError, match=f"sample {len(samples)} of {len(samples)}"):
        samples[len(samples)]
    assert samples[-1].key == samples[len(samples) - 1].key
    assert [sample.key for sample in samples[1:3]] == list(samples.keys)[1:3]


def test_kinds_of_targets_are_those_of_all_samples_and_of_any_rows(dataset: Dataset) -> None:
    for samples in open_dataset(dataset, val_fraction=0.3).splits.values():
        assert samples.target_kinds() == Samples.target_kinds(samples)
        for rows in (np.array([], np.int64), np.array([2, 0], np.int64)):
            assert samples.target_kinds(rows) == Samples.target_kinds(samples, rows)
