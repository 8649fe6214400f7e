"""A trained student is measured, and trained further, as it was trained: its preprocessing, its own head."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from store.reader import open_store
from tests.test_train.runs import trained
from train.checkpoint import load_checkpoint
from train.deliver.evaluate import evaluate_run
from train.deliver.inputs import run_options
from train.deliver.model import open_student
from train.deliver.quantize import build_finetuning

STUDENT = "timm:test_resnet"


def test_the_loss_of_another_split_is_not_called_a_validation_loss(make_store: Any, tmp_path: Path) -> None:
    store = make_store()
    run = trained(store, tmp_path / "run")
    metrics = evaluate_run(run, store, split="train", device="cpu", workers=0)["metrics"]
    assert metrics["loss"] > 0
    assert not [name for name in metrics if name.startswith("val_")]


def set_preprocessing(store: Path, **values: Any) -> None:
    path = store / "zarr.json"
    root = json.loads(path.read_text())
    root["attributes"]["preprocessing"].update(values)
    path.write_text(json.dumps(root))


def test_the_student_s_resize_policy_wins(make_store: Any, tmp_path: Path, train_log: Any) -> None:
    """The same wide images in two stores: what the store's teacher was shown does not matter to the student."""
    letterboxed = make_store("letterbox.zarr", aspect=3, resize="letterbox")
    squashed = make_store("squash.zarr", aspect=3)
    run = trained(letterboxed, tmp_path / "run", epochs=3)
    train_log.clear()
    own = evaluate_run(run, letterboxed, device="cpu", workers=0)
    assert "are shown as in training" not in train_log.text
    other = evaluate_run(run, squashed, device="cpu", workers=0)
    assert other["metrics"] == own["metrics"]
    assert (
        "squash.zarr was made with --resize squash, the student was trained with letterbox" in train_log.text
    )


def test_the_student_s_bit_depth_wins(make_store: Any, tmp_path: Path, monkeypatch: Any) -> None:
    store = make_store()
    run = trained(store, tmp_path / "run")
    set_preprocessing(store, options={"bit_depth": 12})
    seen = set()
    monkeypatch.setattr("train.data.images.decode", spy_on_depth(seen))
    evaluate_run(run, store, device="cpu", workers=0)
    assert seen == {16}


def spy_on_depth(seen: set[int]) -> Any:
    from imaging.decode import decode

    def spy(data: Any, **options: Any) -> Any:
        seen.add(options["bit_depth"])
        return decode(data, **options)

    return spy


@pytest.mark.parametrize("old_format", [False, True])
def test_fine_tuning_takes_the_student_and_its_head_from_one_checkpoint(
    make_store: Any, tmp_path: Path, old_format: bool
) -> None:
    """The best epoch's student, and the head of that epoch; checkpoints without a head fall back to last.pt."""
    path = make_store("letterbox.zarr", aspect=3, resize="letterbox")
    run = trained(path, tmp_path / "run")
    best, last = (load_checkpoint(run / name) for name in ("best.pt", "last.pt"))
    last["alignment_head"] = {name: value + 1 for name, value in last["alignment_head"].items()}
    torch.save(last, run / "last.pt")
    if old_format:
        best["alignment_head"] = None
        torch.save(best, run / "best.pt")
    student, card = open_student(run)
    squashed = make_store("squash.zarr", aspect=3)
    config = run_options(run).replace(store=squashed)
    with build_finetuning(run, config, open_store(squashed), student, card, 1, 1e-5) as tuning:
        expected = (last if old_format else best)["alignment_head"]
        for name, value in tuning.parts.module.projector.state_dict().items():
            assert torch.equal(value, expected[name])
        assert tuning.parts.train_loader.loader.dataset.settings.policy == "letterbox"
        assert tuning.parts.val_loader.loader.dataset.settings.policy == "letterbox"


@pytest.mark.parametrize("old_format", [False, True])
def test_fine_tuning_takes_the_heads_of_all_levels(make_store: Any, tmp_path: Path, old_format: bool) -> None:
    path = make_store(layers={8: (8, 5)})
    run = trained(path, tmp_path / "run", distill_layers="p3:8,p5")
    expected = load_checkpoint(run / "last.pt")["training"]["level_heads"]
    if old_format:
        best = load_checkpoint(run / "best.pt")
        del best["level_heads"]
        torch.save(best, run / "best.pt")
    student, card = open_student(run)
    with build_finetuning(run, run_options(run), open_store(path), student, card, 1, 1e-5) as tuning:
        assert tuning.parts.module.level_heads
        for name, value in tuning.parts.module.level_heads.state_dict().items():
            assert torch.equal(value, expected[name])
