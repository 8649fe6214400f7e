"""Stores with the teacher's answer to mirror images (`extract --views flip`) in training."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch

from imaging.geometry import View, flips_horizontally
from store.reader import open_store
from tests.test_train.conftest import MIRROR_SHIFT, WIDTH
from train.checkpoint import load_checkpoint
from train.errors import ConfigError
from train.run import run_training


@pytest.mark.parametrize(
    ("view", "flips"),
    [
        (View.identity(), False),
        (View.flip(), True),
        (View.crop(0.2, 0.1, 0.8, 0.9).compose(View.flip()), True),
        (View.affine(angle_degrees=40).compose(View.flip()), True),
        (View.affine(angle_degrees=40), False),
        (View.affine(angle_degrees=180), False),
        (View.flip(horizontal=False, vertical=True), False),
        (View.flip(vertical=True), False),
    ],
)
def test_which_views_are_horizontal_flips(view: View, flips: bool) -> None:
    assert flips_horizontally(view.matrix) == flips
    assert flips_horizontally(view.matrix[None]).tolist() == [flips]


def run_and_see(config: Any, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """(batch, targets, objective) of each training step."""
    from train.distill.objective import Objective

    seen: list[Any] = []
    plain = Objective.prepare

    def prepare(self: Objective, batch: Any) -> Any:
        targets = plain(self, batch)
        if self is not None and batch.flipped is not None:
            seen.append((batch, targets, self))
        return targets

    monkeypatch.setattr(Objective, "prepare", prepare)
    run_training(config)
    return seen


@pytest.mark.parametrize("scaled", [False, True])
def test_flipped_samples_learn_the_mirror_images_features(
    make_store: Any, make_config: Any, monkeypatch: pytest.MonkeyPatch, scaled: bool
) -> None:
    """Crops and flips: the target is the plain store's, and for flipped samples more by what the mirror image has more."""
    # Scales of the two arrays differ, as their calibration batches may.
    wide = np.exp2(np.arange(WIDTH) % 3)
    scales = {"features/grid": np.ones(WIDTH), "views/grid": wide} if scaled else None
    path = make_store(exact_flip=True, scales=scales, grid=4)
    options = {"augment": "full", "epochs": 2, "feature_target": "both"}
    seen = run_and_see(make_config(path, **options), monkeypatch)
    flipped = np.concatenate([batch.flipped for batch, *_ in seen])
    assert 5 < flipped.sum() < len(flipped) - 5
    split = open_store(path)["train"]
    for batch, targets, objective in seen:
        gain = objective.standardizers["cells"].gain
        from train.distill.transport import apply_transport, relate_views, transport_weights

        geometry = relate_views(batch.views, objective.teacher_views[batch.rows])
        plain = torch.from_numpy(split.gather(batch.rows, ["features/grid"])["features/grid"]).float()
        carried = apply_transport(plain, transport_weights(geometry, *objective.cell_shape, (4, 4)))
        more = torch.from_numpy(batch.flipped[:, None, None, None] * MIRROR_SHIFT).float()
        expected = carried.cells * gain - objective.standardizers["cells"].shift + more * gain
        inside = carried.weight > 0
        assert torch.equal(inside, targets.cell_weight > 0)
        torch.testing.assert_close(
            targets.cells[inside], expected[inside].clamp(-30, 30), atol=2e-2, rtol=2e-2
        )
    assert json.loads((make_config(path).out / "config.json").read_text())["resolved"]["distilled"][
        "exact_flip"
    ]


def test_pooled_targets_follow_flips(
    make_store: Any, make_config: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a grid, a flip is what the store has a target for; a crop stays mild."""
    path = make_store(exact_flip=True, grid=0)
    config = make_config(path)
    seen = run_and_see(config, monkeypatch)
    split = open_store(path)["train"]
    assert any(batch.flipped.any() for batch, *_ in seen)
    for batch, targets, objective in seen:
        plain = split.gather(batch.rows, ["features/pooled"])["features/pooled"]
        mirrored = split.gather(batch.rows, ["views/pooled"])["views/pooled"][:, 0]
        stored = np.where(batch.flipped[:, None], mirrored, plain)
        assert torch.equal(targets.pooled, objective.standardizers["pooled"](torch.from_numpy(stored)))
    resolved = json.loads((config.out / "config.json").read_text())["resolved"]
    assert resolved["augment"] == "mild with flips"


def test_views_random_carries_grids_as_without_mirror_images(
    make_store: Any, make_config: Any, tmp_path: Any
) -> None:
    plain, flip = make_store("plain.zarr"), make_store("flip.zarr", exact_flip=True)
    weights = []
    for number, (store, views) in enumerate([(plain, "auto"), (flip, "random"), (flip, "auto")]):
        config = make_config(store, out=tmp_path / str(number), views=views, epochs=1)
        run_training(config)
        weights.append(load_checkpoint(config.out / "best.pt")["model_state_dict"])
    equal = [all(torch.equal(weights[0][name], one[name]) for name in one) for one in weights]
    assert equal == [True, True, False]


def test_recorded_views_and_mirror_images_are_not_the_same(make_store: Any, make_config: Any) -> None:
    with pytest.raises(ConfigError, match=r"has mirror images \(--views flip\), which --views auto uses"):
        run_training(make_config(make_store(exact_flip=True), views="recorded"))


def test_a_copy_without_the_mirror_images_carries_grids(
    make_store: Any, make_config: Any, tmp_path: Any
) -> None:
    from store.replicate import replicate_store

    path = make_store(exact_flip=True)
    replicate_store(str(path), str(tmp_path / "copy"), ["features", "targets", "images"])
    config = make_config(tmp_path / "copy", epochs=1)
    run_training(config)
    resolved = json.loads((config.out / "config.json").read_text())["resolved"]
    assert resolved["distilled"]["exact_flip"] is False


def test_phase_ones_of_stores_with_and_without_mirror_images_are_told_apart(
    make_store: Any, make_config: Any
) -> None:
    from train.phase_one import phase_one_key

    stores = [
        make_store("plain.zarr"),
        make_store("flip.zarr", exact_flip=True),
        make_store("none.zarr", grid=0),
    ]
    keys = {phase_one_key(make_config(stores[0], pretrain_epochs=1), open_store(path)) for path in stores}
    assert len(keys) == 3
    assert len({open_store(path).fingerprint for path in stores}) < 3
