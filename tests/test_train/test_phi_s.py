"""`--standardize phi-s`: a rotation and one scale, after which every dimension has variance 1."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from store.format import FRAMES, GRID, POOLED
from store.reader import open_store
from tests.test_train.several_teachers import add_teacher
from train.checkpoint import load_checkpoint
from train.deliver.model import ModelCard
from train.distill.objective import build_standardizer
from train.distill.phi_s import covariance_of, hadamard, rotate_and_scale, rotation_of
from train.errors import TrainError
from train.run import run_training
from train.run_folder import ROTATIONS


@pytest.mark.parametrize(
    "order",
    [
        1,
        2,
        4,
        12,
        20,
        24,
        28,
        36,
        64,
        192,
        384,
        448,
        640,
        768,
        1024,
        1088,
        1152,
        1280,
        1408,
        1536,
        1664,
        1792,
    ],
)
def test_hadamard_matrices_of_the_widths_of_teachers(order: int) -> None:
    matrix = hadamard(order)
    np.testing.assert_allclose(np.abs(matrix), order**-0.5, rtol=1e-12)
    np.testing.assert_allclose(matrix @ matrix.T, np.eye(order), atol=1e-11)


@pytest.mark.parametrize("order", [3, 10, 250])
def test_a_width_without_a_known_matrix_is_one_line(order: int) -> None:
    with pytest.raises(TrainError, match=f"no Hadamard matrix of order {order} .*--standardize channel"):
        hadamard(order)


@pytest.mark.parametrize("width", [12, 64, 384])
def test_variances_are_1_and_errors_keep_their_proportions(width: int) -> None:
    rng = np.random.default_rng(width)
    mix = rng.normal(size=(width, width)) * np.exp(2 * rng.normal(size=width))
    covariance = mix @ mix.T
    rotation = rotate_and_scale(covariance)
    after = rotation @ covariance @ rotation.T
    np.testing.assert_allclose(np.diag(after), 1.0, rtol=1e-10)
    scale = np.sqrt(np.trace(covariance) / width)
    np.testing.assert_allclose(rotation @ rotation.T * scale**2, np.eye(width), atol=1e-10)
    # An error has the same size in either space, whatever its direction; per channel it has not.
    errors = rng.normal(size=(100, width)) * np.exp(rng.normal(size=width))
    sizes = np.linalg.norm(errors @ rotation.T, axis=1) * scale
    np.testing.assert_allclose(sizes, np.linalg.norm(errors, axis=1), rtol=1e-9)


def test_constant_features_become_zeros() -> None:
    assert not rotate_and_scale(np.zeros((12, 12))).any()


@pytest.mark.parametrize("array", [POOLED, GRID])
@pytest.mark.parametrize("teacher", ["synthetic", "second"])
def test_targets_of_a_store_have_variance_1(
    teacher: str, array: str, make_store: Any, tmp_path: Path
) -> None:
    split = open_store(add_teacher(make_store(train=200, val=0), invalid=(5,))).of_teacher(teacher)["train"]
    standardize = build_standardizer(split, array, array, tmp_path / "kept")
    rows = np.flatnonzero(split.valid)
    targets = standardize(torch.from_numpy(split.gather(rows, [array])[array]))
    flat = targets.flatten(0, -2).double()
    assert flat.mean(0).abs().max() < 1e-2
    torch.testing.assert_close(
        flat.var(0, correction=0), torch.ones(flat.shape[1]).double(), atol=5e-3, rtol=0
    )
    # Off-diagonal terms are mixed by the Hadamard matrix, not removed: this is no whitening.
    plain = build_standardizer(split, array, array)(torch.from_numpy(split.gather(rows, [array])[array]))
    assert not torch.allclose(plain, targets, atol=0.1)


def test_a_rotation_is_kept_and_read_again(make_store: Any, tmp_path: Path) -> None:
    split = open_store(add_teacher(make_store(train=60))).of_teacher("second")["train"]
    first = rotation_of(split, GRID, tmp_path / "kept")
    (file,) = (tmp_path / "kept").iterdir()
    assert file.name == "teachers-second-features-grid.npy"
    np.save(file, first[::-1])
    np.testing.assert_array_equal(rotation_of(split, GRID, tmp_path / "kept"), first[::-1])


def test_frames_of_clips(clip_store: Path) -> None:
    split = open_store(clip_store)["train"]
    values = np.concatenate(split.ragged(np.arange(6), FRAMES)).astype(np.float64) * split.scale[FRAMES]
    expected = np.cov(values.T, bias=True)
    np.testing.assert_allclose(covariance_of(split, FRAMES), expected, rtol=1e-3, atol=1e-5)


def test_a_run_with_rotated_targets(make_store: Any, make_config: Any, tmp_path: Path) -> None:
    store = add_teacher(make_store(train=48))
    config = make_config(store, teachers="synthetic,second", standardize="phi-s", epochs=1)
    summary = run_training(config)
    kept = {file.name: file.read_bytes() for file in (tmp_path / "run" / ROTATIONS).iterdir()}
    arrays = [f"features-{kind}.npy" for kind in ("grid", "pooled")]
    assert sorted(kept) == [*arrays, *(f"teachers-second-{array}" for array in arrays)]
    assert summary["epochs_done"] == 1
    assert ModelCard.of_checkpoint(load_checkpoint(tmp_path / "run" / "best.pt")).standardize == "phi-s"
    again = make_config(store, teachers="synthetic,second", standardize="phi-s", epochs=2, resume=True)
    assert run_training(again)["epochs_done"] == 2
    assert kept == {file.name: file.read_bytes() for file in (tmp_path / "run" / ROTATIONS).iterdir()}
