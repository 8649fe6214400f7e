"""Recorded views (`extract --views`) in training: replayed exactly as they were encoded."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch

from store.reader import open_store
from train.run import run_training


@pytest.mark.parametrize("grid", [0, 4])
def test_recorded_views_are_replayed_exactly(make_store, make_config, monkeypatch, grid):
    """Image, target and geometry of a step all belong to the same recorded view."""
    from train.distill.objective import Objective

    seen: list[Any] = []
    plain = Objective.prepare

    def prepare(self: Objective, batch: Any) -> Any:
        targets = plain(self, batch)
        if self.plan.recorded:
            seen.append((batch, targets, self))
        return targets

    monkeypatch.setattr(Objective, "prepare", prepare)
    path = make_store(views=2, grid=grid)
    config = make_config(path, augment="none", epochs=3)
    run_training(config)
    split = open_store(path)["train"]
    geometry = split.read("views/geometry")
    chosen = set()
    for batch, targets, objective in seen:
        assert np.array_equal(batch.views, geometry[batch.rows, batch.recorded])
        chosen |= set(zip(batch.rows.tolist(), batch.recorded.tolist(), strict=True))
        name = "views/grid" if grid else "views/pooled"
        stored = split.gather(batch.rows, [name])[name][np.arange(len(batch)), batch.recorded]
        values = torch.from_numpy(stored).float()
        if grid:
            values = values.mean((1, 2))
        torch.testing.assert_close(
            targets.pooled, objective.standardizers["pooled"](values), atol=1e-4, rtol=1e-4
        )
    assert len(chosen) > 24, "both views of many samples were shown"
    resolved = json.loads((config.out / "config.json").read_text())["resolved"]
    assert resolved["distilled"]["recorded"] is True


def test_recorded_view_shows_the_crop_itself(make_store):
    from train.data.batches import Item
    from train.data.images import ImageReader, ImageViews, ViewSettings
    from train.data.views import AUGMENTATIONS

    store = open_store(make_store(views=2))
    reader = ImageReader(store["train"], None, store.manifest.preprocessing)
    whole = np.asarray(reader.read(3, 32).image)
    expected = [whole[:16, :16], whole[16:, 16:][:, ::-1]]
    settings = ViewSettings(
        image_size=16, policy="squash", augmentation=AUGMENTATIONS["none"], seed=0, recorded_views=2
    )
    shown = [ImageViews(reader, settings).show(Item(epoch, 3, 1.0)) for epoch in range(6)]
    assert {sample["recorded"] for sample in shown} == {0, 1}
    for sample in shown:
        assert np.array_equal(sample["image"], expected[sample["recorded"]])
