"""Soft class maps: the loss by hand, their geometry, and U-Nets that learn rows without a mask from them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from imaging.geometry import View
from store.format import MASK
from store.reader import open_store
from tests.test_train.runs import records
from train.data.batches import Batch
from train.data.images import ImageReader
from train.distill.losses import confidence, map_loss
from train.distill.objective import DistillationPlan, Objective, map_cells
from train.errors import ConfigError, TrainError
from train.run import run_training
from train.tasks import build_task


def test_map_loss_compares_the_mean_over_a_cells_pixels() -> None:
    """KL(target ‖ mean probability), by numpy."""
    torch.manual_seed(0)
    student, target = torch.randn(2, 3, 4, 4), torch.randn(2, 2, 2, 3).log_softmax(-1)
    weight = torch.rand(2, 2, 2)
    probabilities = student.softmax(1).numpy()
    mean = probabilities.reshape(2, 3, 2, 2, 2, 2).mean(axis=(3, 5)).transpose(0, 2, 3, 1)
    goal = target.exp().numpy()
    divergence = (goal * np.log(goal / mean)).sum(-1)
    expected = (divergence * weight.numpy()).sum() / weight.numpy().sum()
    assert float(map_loss(student, target, weight)) == pytest.approx(expected, rel=1e-5)


def test_cells_without_weight_may_hold_nan_and_a_wider_head_is_allowed() -> None:
    student = torch.zeros(1, 4, 2, 2, requires_grad=True)
    target = torch.full((1, 2, 2, 3), float("nan"))
    target[0, 0, 0] = torch.tensor([1.0, 1e-9, 1e-9]).log()
    weight = torch.tensor([[[1.0, 0.0], [0.0, 0.0]]])
    loss = map_loss(student, target, weight)
    loss.backward()
    assert loss.item() == pytest.approx(np.log(4), rel=1e-4)
    assert student.grad is not None
    assert torch.isfinite(student.grad).all()
    assert student.grad[0, 0, 0, 0] < 0 < student.grad[0, 3, 0, 0]


def test_confidence_is_zero_for_a_uniform_distribution() -> None:
    both = torch.tensor([[0.25] * 4, [1 - 3e-9, 1e-9, 1e-9, 1e-9]]).log()
    assert confidence(both).tolist() == pytest.approx([0, 1], abs=1e-5)


@pytest.mark.parametrize(
    ("image_size", "side", "cells"), [(96, 24, 24), (128, 24, 32), (50, 24, 25), (16, 24, 16)]
)
def test_cells_are_whole_pixels(image_size: int, side: int, cells: int) -> None:
    assert map_cells(image_size, side) == cells


def test_maps_move_with_the_view() -> None:
    """Crop and flip: what the target says of a place is what the map says of the place in the image."""
    side, image_size = 8, 16
    column = np.zeros((side, side), np.uint8)
    column[:, :4] = 1  # class 1 on the left half of the image
    stored = np.where(np.eye(2, dtype=bool)[column], 0, 255).astype(np.uint8)
    views = np.stack([View.identity().matrix, View.flip().matrix, View.crop(0, 0, 0.5, 0.5).matrix])
    task = build_task("segmentation", num_classes=2, label_smoothing=0.0)
    objective = Objective(
        task, DistillationPlan(maps="probe"), teacher_views=np.tile(View.identity().matrix, (3, 1, 1))
    )
    batch = Batch(
        rows=np.arange(3),
        images=torch.zeros(3, image_size, image_size, 3, dtype=torch.uint8),
        views=views,
        weight=torch.tensor([1.0, 1.0, 0.0]),
        samples=2,
        masks=torch.full((3, image_size, image_size), 255, dtype=torch.uint8),
        features={"maps/probe": torch.from_numpy(np.tile(stored, (3, 1, 1, 1)))},
    )
    batch.transport = objective.transport(batch)
    targets = objective.prepare(batch)
    assert targets.logits is not None
    assert targets.logit_weight is not None
    classes = targets.logits.argmax(-1)
    assert (classes[0, :, :4] == 1).all()
    assert (classes[0, :, 4:] == 0).all()
    assert (classes[1, :, 4:] == 1).all()
    assert (classes[2] == 1).all()
    assert targets.logit_weight[2].sum() == 0, "padding has no influence"
    assert targets.logit_weight[0, 0, 0] == pytest.approx(1, abs=1e-3)


def keys(first: int, last: int) -> set[str]:
    """Keys of training rows `first` to `last` - 1."""
    return {f"train/{row:04d}.png" for row in range(first, last)}


class TestMixedStore:
    """Some rows have a mask, others none: they are learned from the maps, never as background."""

    def options(self, **changes: Any) -> dict[str, Any]:
        return {"student": "unet/small", "epochs": 1, **changes}

    def test_rows_without_a_mask_are_ignored_by_the_task(self, make_store: Any) -> None:
        store = open_store(make_store(masks=True, labels=False, unmasked=keys(1, 2)))
        reader = ImageReader(store["train"], None, store.manifest.preprocessing)
        assert reader.read_mask(0) is not None
        assert reader.read_mask(1) is None
        assert len(store["train"].ragged([1], MASK)[0]) == 0

    def test_they_are_learned_from_the_maps(
        self, make_store: Any, make_config: Any, train_log: pytest.LogCaptureFixture
    ) -> None:
        store = make_store(masks=True, maps=True, labels=False, unmasked=keys(4, 24))
        config = make_config(store, **self.options(distillation_type="hybrid"))
        summary = run_training(config)
        assert summary["complete"]
        assert "have no mask: they are learned from the teacher alone" in train_log.text
        last = records(config)[-1]
        assert last["logit_loss"] > 0
        assert last["val_logit_loss"] > 0

    @pytest.mark.slow
    def test_a_map_teaches_what_no_mask_does(self, make_store: Any, make_config: Any, tmp_path: Path) -> None:
        """One labeled row, which lacks two of three classes: only the maps know them."""
        store = make_store(
            train=40, masks=True, maps=True, labels=False, unmasked=keys(1, 40), name="few.zarr"
        )
        common = self.options(epochs=6, learning_rate=3e-3, batch_size=4, augment="none")
        taught = run_training(
            make_config(store, out=tmp_path / "taught", distillation_type="logit", **common)
        )
        alone = run_training(make_config(store, out=tmp_path / "alone", control_only=True, **common))
        assert taught["metrics"]["miou"] > alone["metrics"]["miou"] + 0.1

    def test_maps_are_missing(self, make_store: Any, make_config: Any) -> None:
        store = make_store(masks=True, labels=False)
        with pytest.raises(ConfigError, match="has no soft class maps: run `cli probe"):
            run_training(make_config(store, **self.options(distillation_type="logit")))

    def test_no_mask_at_all_is_one_line(self, make_store: Any, make_config: Any) -> None:
        store = make_store(masks=True, maps=True, labels=False, unmasked=keys(0, 24))
        with pytest.raises(TrainError, match="split train has no masks"):
            run_training(make_config(store, **self.options()))
