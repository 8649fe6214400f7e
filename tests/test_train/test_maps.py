"""Soft class maps: their geometry, what of them is learned, and U-Nets that learn rows without a mask from them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from imaging.geometry import View
from store.format import MASK
from store.reader import open_store
from tests.test_train.runs import records
from tests.test_train.test_sweep_controls import built
from train.checkpoint import load_checkpoint
from train.data.batches import Batch
from train.data.images import ImageReader
from train.distill.objective import SURE, DistillationPlan, Objective, Targets, map_cells
from train.distill.projector import DistilledOutput
from train.distill.resolve import resolve_logits
from train.errors import ConfigError, TrainError
from train.phase_one import phase_one_key
from train.run import run_training
from train.tasks import build_task


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
    targets = prepare(stored, views, weight=[1.0, 1.0, 0.0])
    assert targets.mask is not None
    assert targets.mask.shape == (3, image_size, image_size)
    assert (targets.mask[0, :, :8] == 1).all()
    assert (targets.mask[0, :, 8:] == 0).all()
    assert (targets.mask[1, :, 8:] == 1).all()
    assert (targets.mask[2] == 255).all(), "padding has no influence"
    assert targets.counts["logit"] == 2 * image_size**2
    assert targets.counts["maps"] == 2
    cropped = prepare(stored, views, weight=[1.0, 1.0, 1.0])
    assert cropped.mask is not None
    assert (cropped.mask[2] == 1).all()


def test_unsure_cells_and_images_with_a_mask_are_left_out() -> None:
    """A class that is less probable than SURE is not learned, and no map replaces what a mask shows."""
    stored = np.zeros((8, 8, 2), np.uint8)
    for column, probability in enumerate((SURE - 0.05, SURE + 0.05)):
        stored[:, 4 * column : 4 * column + 4] = np.round(-16 * np.log([probability, 1 - probability]))
    views = np.tile(View.identity().matrix, (2, 1, 1))
    masks = torch.full((2, 16, 16), 255, dtype=torch.uint8)
    masks[1, 0, 0] = 1
    targets = prepare(stored, views, weight=[1.0, 1.0], masks=masks)
    assert targets.mask is not None
    assert (targets.mask[0, :, :8] == 255).all()
    assert (targets.mask[0, :, 8:] == 0).all()
    assert (targets.mask[1] == 255).all()


def test_a_map_is_learned_as_a_mask_is() -> None:
    """The term is the task's own loss, cross-entropy + Dice, on what the map is sure of."""
    column = np.repeat(np.arange(2), 4)
    stored = np.tile(np.where(np.eye(2, dtype=bool)[column], 0, 255).astype(np.uint8), (8, 1, 1))
    views = np.tile(View.identity().matrix, (1, 1, 1))
    targets = prepare(stored, views, weight=[1.0])
    logits = torch.randn(1, 2, 16, 16, generator=torch.Generator().manual_seed(0))
    output = DistilledOutput(logits, None, None)
    nothing, unlabeled = objective_of(1), batch_of(stored, views, [1.0])
    term = nothing.losses(output, unlabeled, targets, targets.counts)["logit_loss"]
    truth = torch.from_numpy(np.repeat(column, 2).astype(np.uint8)).expand(1, 16, 16)
    labeled = replace(unlabeled, masks=truth.contiguous())
    expected = nothing.task.loss(output, labeled, nothing.task.counts(labeled), None)
    assert term == pytest.approx(float(expected), rel=1e-5)


def objective_of(rows: int) -> Objective:
    task = build_task("segmentation", num_classes=2, label_smoothing=0.0)
    return Objective(
        task,
        DistillationPlan(maps="probe"),
        weights={"hard_loss": 1.0, "logit_loss": 1.0},
        teacher_views=np.tile(View.identity().matrix, (rows, 1, 1)),
    )


def batch_of(
    stored: np.ndarray, views: np.ndarray, weight: list[float], masks: torch.Tensor | None = None
) -> Batch:
    """Images of 16 pixels, each with the same stored map, without masks unless given."""
    count = len(weight)
    if masks is None:
        masks = torch.full((count, 16, 16), 255, dtype=torch.uint8)
    return Batch(
        rows=np.arange(count),
        images=torch.zeros(count, 16, 16, 3, dtype=torch.uint8),
        views=views,
        weight=torch.tensor(weight),
        samples=sum(weight),
        masks=masks,
        features={"maps/probe": torch.from_numpy(np.tile(stored, (count, 1, 1, 1)))},
    )


def prepare(
    stored: np.ndarray, views: np.ndarray, weight: list[float], masks: torch.Tensor | None = None
) -> Targets:
    objective, batch = objective_of(len(weight)), batch_of(stored, views, weight, masks)
    batch.transport = objective.transport(batch)
    return objective.prepare(batch)


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
        assert "val_logit_loss" not in last, "the validation is about masks"

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

    def test_where_every_image_has_a_mask_maps_teach_nothing(self, make_store: Any, make_config: Any) -> None:
        store = make_store(masks=True, maps=True, labels=False)
        with pytest.raises(ConfigError, match="has a mask, and soft class maps teach those without one"):
            run_training(make_config(store, **self.options(distillation_type="logit")))
        notes: list[str] = []
        split = open_store(store)["train"]
        config = make_config(store, **self.options())
        assert resolve_logits(config, "hybrid", "segmentation", split, notes) == {}
        assert "hybrid uses the feature term alone" in notes[0]

    @pytest.mark.parametrize(
        ("unmasked", "kind"),
        [
            (frozenset(), {"distillation_type": "hybrid"}),
            (keys(4, 24), {"distillation_type": "hybrid"}),
            (keys(4, 24), {}),  # the default, with which phase two learns features alone
        ],
    )
    def test_phase_one_learns_the_maps_of_every_image(
        self, make_store: Any, make_config: Any, unmasked: set[str], kind: dict[str, str]
    ) -> None:
        """No mask is used there, but the head is trained, and phase two goes on with it."""
        store = make_store(masks=True, maps=True, labels=False, unmasked=unmasked)
        config = make_config(store, **self.options(**kind, pretrain_epochs=2, learning_rate=1e-12))
        summary = run_training(config)
        first, second, last = (json.loads(line) for line in (config.out / "metrics.jsonl").open())
        assert [line.get("phase") for line in (first, second, last)] == ["pretrain", "pretrain", None]
        assert second["logit_loss"] > 0
        assert bool(last["logit_loss"]) is bool(unmasked and kind)
        assert summary["pretrain"]["metrics"]["miou"] is not None
        before = load_checkpoint(config.out / "pretrain/best.pt")["model_state_dict"]
        after = load_checkpoint(config.out / "best.pt")["model_state_dict"]
        assert torch.allclose(before["head.weight"], after["head.weight"], atol=1e-6)

    @pytest.mark.parametrize(
        ("maps", "options", "unmasked_shown"),
        [
            (True, {}, False),
            (True, {"pretrain_epochs": 1}, False),
            (True, {"labeled_share": 0.5}, True),
            (True, {"distillation_type": "hybrid"}, True),  # their maps are learned
            (False, {"distillation_type": "hybrid"}, False),  # there are none
        ],
    )
    def test_images_without_a_mask_are_left_out_where_no_map_is_learned(
        self, make_store: Any, make_config: Any, maps: bool, options: dict[str, Any], unmasked_shown: bool
    ) -> None:
        store = make_store(masks=True, maps=maps, labels=False, unmasked=keys(4, 24))
        run = built(make_config(store, **self.options(**options)))
        shown = {item.row for batch in run.parts.train_loader.batches for item in batch}
        assert shown >= set(range(4))
        assert (len(shown) > 4) is unmasked_shown
        (note,) = [text for text in run.notes if "have no mask" in text]
        assert ("they are left out" in note) is not unmasked_shown

    def test_phase_one_uses_no_mask(self, make_store: Any, make_config: Any, tmp_path: Path) -> None:
        """Stores that differ in masks alone give the same phase one."""
        weights = []
        for number, unmasked in enumerate((keys(4, 24), keys(8, 24))):
            store = make_store(masks=True, maps=True, labels=False, unmasked=unmasked, name=f"{number}.zarr")
            options = self.options(distillation_type="hybrid", pretrain_epochs=1, out=tmp_path / str(number))
            run_training(make_config(store, **options))
            weights.append(load_checkpoint(tmp_path / str(number) / "pretrain/best.pt")["model_state_dict"])
        assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())

    def test_phase_one_of_other_maps_is_another(self, make_store: Any, make_config: Any) -> None:
        store = open_store(make_store(masks=True, maps=True, labels=False))
        options = self.options(distillation_type="hybrid", pretrain_epochs=1)
        hybrid = make_config(store.path, **options)
        features = make_config(store.path, **{**options, "distillation_type": "feature"})
        before, other = phase_one_key(hybrid, store), phase_one_key(features, store)
        assert before != other
        assert phase_one_key(make_config(store.path, **self.options(pretrain_epochs=1)), store) == before
        (shard,) = (path for path in (store.path / "train/maps/probe").rglob("c/*/*/*/*") if path.is_file())
        content = bytearray(shard.read_bytes())
        content[0] ^= 1
        shard.write_bytes(content)
        changed = open_store(store.path)
        assert phase_one_key(hybrid, changed) != before
        assert phase_one_key(features, changed) == other

    def test_no_mask_at_all_is_one_line(self, make_store: Any, make_config: Any) -> None:
        store = make_store(masks=True, maps=True, labels=False, unmasked=keys(0, 24))
        with pytest.raises(TrainError, match="split train has no masks"):
            run_training(make_config(store, **self.options()))
