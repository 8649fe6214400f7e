"""Soft class maps of stores with masks: out of fold, for every row, through the store's own commits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from extract.cells import NoTargets, fine_side, grids_of, plan_fit, read_cells
from extract.config import load_config
from extract.logits import probe_store
from extract.maps import class_shares, class_shares_of, confusion, encode_maps, mean_iou, read_masks
from extract.run import run_extraction
from store import format as names
from store.errors import DistillError
from store.hdf5 import hdf5_to_store, store_to_hdf5
from store.reader import open_store
from store.summary import describe_store
from store.transfer import pack_store
from store.verify import verify_store
from tests.test_extract.extractions import files_of

SIDE = 64


def write_scenes(
    root: Path, count: int, *, random_labels: bool = False, spots: bool = False, unlabeled: int = 0
) -> Path:
    """Noise with a bright half on one of four sides, class 1.

    `random_labels`: whole masks of a random class instead; `spots`: six bright squares of 8 pixels instead of a half.
    """
    generator = np.random.default_rng(0)
    for number in range(count):
        split = "train" if number < 0.75 * count else "val"
        pixels = generator.integers(0, 90, (SIDE, SIDE, 3), np.uint8)
        mask = np.zeros((SIDE, SIDE), np.uint8)
        half = np.s_[:, : SIDE // 2] if number % 2 else np.s_[: SIDE // 2]
        if number % 4 > 1:
            half = tuple(
                slice(SIDE // 2, None) if part != slice(None) else part for part in np.index_exp[half]
            )
        places = [half] if not spots else []
        for y, x in generator.integers(0, SIDE - 8, (6 * spots, 2)):
            places.append(np.s_[y : y + 8, x : x + 8])
        for place in places:
            pixels[place] = np.maximum(pixels[place], pixels[place] % 90 + 130)
            mask[place] = 1
        if random_labels:
            mask[:] = generator.integers(2)
        for kind, picture in (("images", pixels), ("masks", mask)):
            if kind == "masks" and number < unlabeled:
                continue
            file = root / kind / split / f"{number:03d}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(picture).save(file)
    (root / "classes.txt").write_text("dark\nbright\n")
    return root


@pytest.fixture
def mask_options(extract_options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A grid of 4 × 4 and short fits."""
    from extract import cells

    for name, value in {"STEPS": 40, "BATCH_CELLS": 256, "LEARNING_RATE": 1e-2}.items():
        monkeypatch.setattr(cells, name, value)
    return {**extract_options, "image_size": 128, "grid": "native"}


def extract(options: dict[str, Any], **changes: Any) -> Any:
    return run_extraction(load_config({**options, **changes}))


def log_p(store: Path, split: str) -> np.ndarray:
    return open_store(store)[split].read("maps/probe").astype(np.float32) / -names.MAP_STEPS


def test_maps_are_written_for_every_row_and_the_grids_are_measured(
    mask_options: dict[str, Any], tmp_path: Path
) -> None:
    data = write_scenes(tmp_path / "scenes", 40)
    result = extract(mask_options, data=str(data), logits="probe")
    assert result.probe is not None
    assert result.probe["array"] == "maps/probe"
    assert result.probe["out_of_fold_miou"] > 0.7
    assert result.probe["probe_miou"] > 0.7
    assert result.probe["measured_on"] == "val"
    store = open_store(mask_options["out"])
    grid = store["train"].specs[names.GRID].row_shape[0]
    for split in store.splits:
        maps = log_p(mask_options["out"], split)
        assert maps.shape == (len(store[split]), fine_side(grid), fine_side(grid), 2)
        np.testing.assert_allclose(np.exp(maps).sum(-1), 1, atol=0.04)  # a step of 1/16 in log p
    assert verify_store(mask_options["out"]) == []
    assert store.manifest.added == ("maps/probe",)


def test_the_probe_sees_every_stored_layer(mask_options: dict[str, Any], tmp_path: Path) -> None:
    """Cells of the last layer are 32 pixels wide, an object of a few pixels is found in an earlier layer's."""
    data = write_scenes(tmp_path / "scenes", 40, spots=True)
    last = extract(mask_options, data=str(data), logits="probe").probe
    options = {**mask_options, "out": tmp_path / "layers", "layers": "2,last"}
    both = extract(options, data=str(data), logits="probe").probe
    assert last is not None
    assert both is not None
    assert both["out_of_fold_miou"] > last["out_of_fold_miou"] + 0.05
    split = open_store(options["out"])["train"]
    assert grids_of(split) == [names.GRID, names.layer_grid(2)]
    widths = [split.specs[name].row_shape[-1] for name in grids_of(split)]
    cells = read_cells(split, np.arange(3), both["side"])
    assert cells.shape == (3, both["side"], both["side"], sum(widths))
    assert split.read("maps/probe").shape[1] == both["side"]


def test_wide_features_take_fewer_cells(
    mask_options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Several layers must not multiply the memory of a fit."""
    from extract import cells

    extract({**mask_options, "layers": "2,last"}, data=str(write_scenes(tmp_path / "scenes", 12)))
    plan = plan_fit(open_store(mask_options["out"]), "mask", 0)
    width = sum(plan.train.specs[name].row_shape[-1] for name in grids_of(plan.train))
    monkeypatch.setattr(cells, "FIT_VALUES", 100 * width)
    found = cells.sample_cells(
        plan, lambda rows: class_shares_of(plan, plan.train, rows), lambda goal: goal.sum(-1) > 0
    )
    assert found.features.shape == (100 // len(plan.labeled) * len(plan.labeled), width)


@pytest.mark.parametrize(
    ("grids", "side"),
    [((12,), 24), ((12, 24), 24), ((12, 48), 36), ((4,), 16), ((16, 16), 32), ((40, 40), 40)],
)
def test_maps_are_a_multiple_of_the_last_grid_and_not_coarser_than_the_others(
    grids: tuple[int, ...], side: int
) -> None:
    assert fine_side(*grids) == side


def test_no_rows_map_knows_its_mask(mask_options: dict[str, Any], tmp_path: Path) -> None:
    """Masks of one random class each: what a probe that saw them would know, these do not."""
    data = write_scenes(tmp_path / "scenes", 60, random_labels=True)
    result = extract(mask_options, data=str(data), logits="probe").probe
    assert result is not None
    assert result["out_of_fold_cell_miou"] < 0.45  # of two equally frequent classes, chance is 1/3


def test_a_second_run_gives_the_same(mask_options: dict[str, Any], tmp_path: Path) -> None:
    extract(mask_options, data=str(write_scenes(tmp_path / "scenes", 12)))
    first = probe_store(mask_options["out"])
    before = log_p(mask_options["out"], "train")
    assert probe_store(mask_options["out"]) == first
    np.testing.assert_array_equal(log_p(mask_options["out"], "train"), before)


@pytest.mark.slow
def test_a_killed_probe_resumes_to_the_same_maps(
    mask_options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from extract import cells, maps

    extract(mask_options, data=str(write_scenes(tmp_path / "scenes", 12)))
    probe_store(mask_options["out"])
    expected = log_p(mask_options["out"], "train")
    monkeypatch.setattr(cells, "BLOCK_ROWS", 4)
    finish = maps.finalize_store

    def killed(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(maps, "finalize_store", killed)
    with pytest.raises(KeyboardInterrupt):
        probe_store(mask_options["out"])
    monkeypatch.setattr(maps, "finalize_store", finish)
    probe_store(mask_options["out"])
    np.testing.assert_array_equal(log_p(mask_options["out"], "train"), expected)


@pytest.mark.slow
def test_maps_go_with_the_store_into_other_forms(mask_options: dict[str, Any], tmp_path: Path) -> None:
    """HDF5 and back: the same files; compressed and int8 copies: the same maps. `cli inspect` lists them."""
    extract(mask_options, data=str(write_scenes(tmp_path / "scenes", 12)), logits="probe")
    store = Path(mask_options["out"])
    store_to_hdf5(store, tmp_path / "store.h5")
    hdf5_to_store(tmp_path / "store.h5", tmp_path / "back.zarr")
    assert files_of(tmp_path / "back.zarr") == files_of(store)
    pack_store(store, tmp_path / "small.zarr", zstd=True, int8=True)
    for split in ("train", "val"):
        np.testing.assert_array_equal(log_p(tmp_path / "small.zarr", split), log_p(store, split))
    entry = describe_store(store)["splits"]["train"]["arrays"]["maps/probe"]
    assert (entry["dtype"], entry["shape"][0], entry["shape"][-1]) == ("uint8", 9, 2)


def test_an_unknown_device_is_an_error(mask_options: dict[str, Any], tmp_path: Path) -> None:
    extract(mask_options, data=str(write_scenes(tmp_path / "scenes", 12)))
    with pytest.raises(DistillError, match="unknown device 'gpu'"):
        probe_store(mask_options["out"], device="gpu")


def test_a_changed_data_set_drops_the_maps(
    mask_options: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data = write_scenes(tmp_path / "scenes", 12)
    extract(mask_options, data=str(data), logits="probe")
    Image.fromarray(np.zeros((SIDE, SIDE), np.uint8)).save(data / "masks/train/000.png")
    extract(mask_options, data=str(data))
    assert "maps/probe" not in open_store(mask_options["out"])["train"].names
    assert "maps/probe dropped" in caplog.text


def test_fewer_masks_than_classes_are_an_error(mask_options: dict[str, Any], tmp_path: Path) -> None:
    data = write_scenes(tmp_path / "scenes", 12)
    (data / "classes.txt").write_text("\n".join(f"class {number}" for number in range(20)))
    extract(mask_options, data=str(data))
    with pytest.raises(NoTargets, match="9 of 9 rows of train are labeled, a probe of 20 classes needs 20"):
        probe_store(mask_options["out"])


def test_a_store_without_a_grid_is_an_error(mask_options: dict[str, Any], tmp_path: Path) -> None:
    extract({**mask_options, "grid": 0}, data=str(write_scenes(tmp_path / "scenes", 12)))
    with pytest.raises(NoTargets, match="needs a stored grid: extract with --grid 16"):
        probe_store(mask_options["out"])


def test_letterbox_padding_has_no_class(mask_options: dict[str, Any], tmp_path: Path) -> None:
    data = tmp_path / "wide"
    for number in range(4):
        for kind, value in (("images", 90), ("masks", number % 2)):
            file = data / kind / "train" / f"{number}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.full((32, 64), value + (number if kind == "images" else 0), np.uint8)).save(
                file
            )
    (data / "classes.txt").write_text("a\nb\n")
    extract(mask_options, data=str(data), resize="letterbox", val_fraction=0)
    store = open_store(mask_options["out"])
    plan = plan_fit(store, "mask", 0)
    masks = read_masks(plan, store["train"], np.arange(4))
    padding = masks.shape[1] // 4
    assert (masks[:, :padding] == 255).all()
    assert (masks[:, -padding:] == 255).all()
    assert (masks[1, padding:-padding] == 1).all()


def test_class_shares_are_the_histogram_of_each_cell() -> None:
    mask = np.full((1, 4, 4), 255, np.uint8)
    mask[0, :2, :2] = [[0, 1], [1, 2]]
    mask[0, 2:, 2:] = 2
    shares = class_shares(mask, 2, 3)[0]
    assert shares[0, 0].tolist() == [0.25, 0.5, 0.25]
    assert shares[1, 1].tolist() == [0, 0, 1]
    assert shares[0, 1].sum() == 0


def test_stored_maps_are_log_probabilities_in_steps() -> None:
    stored = encode_maps(torch.tensor([[0.9, 0.1 - 1e-9, 1e-9]]).log())
    assert stored.dtype == np.uint8
    np.testing.assert_allclose(np.exp(stored / -names.MAP_STEPS), [[0.9, 0.1, 1.2e-7]], rtol=0.04)


def test_mean_iou_counts_classes_that_occur() -> None:
    truth, predicted = torch.tensor([0, 0, 1, 255]), torch.tensor([0, 1, 1, 2])
    counts = confusion(truth, predicted, 3)
    assert mean_iou(counts) == pytest.approx(0.5)  # 1/2 and 1/2; class 2 does not occur
