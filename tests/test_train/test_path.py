"""CONTRIBUTING.md says how a stored feature becomes a loss: a training step goes that way."""

from __future__ import annotations

from tests.paths import described_path, first_missing, traced_calls
from train.run import run_training


def test_a_training_step_follows_the_described_path(make_store, make_config):
    config = make_config(make_store(), student="timm:test_vit", epochs=1)
    path = described_path("From feature to loss")
    calls = traced_calls(lambda: run_training(config), path)
    assert len(path) >= 8
    assert first_missing(path, calls) is None
    assert first_missing(path[::-1], calls) is not None
