"""What cannot work is refused with one line that says what to do; what is saved stays intact."""

from __future__ import annotations

import json
import os
import weakref
from typing import Any

import pytest
import torch

from store.errors import DistillError
from store.reader import open_store
from train.checkpoint import CheckpointError, load_checkpoint, load_student_from_run, save_checkpoint
from train.errors import ConfigError, TrainError
from train.events import Event, TrainingFailed
from train.loop import loop
from train.loop import trainer as loop_trainer
from train.loop.machine import OutOfMemoryError, is_out_of_memory
from train.run import run_training


def refused(config: Any, *parts: str) -> None:
    with pytest.raises(DistillError) as caught:
        run_training(config)
    text = str(caught.value)
    assert "\n" not in text
    for part in parts:
        assert part in text, text


@pytest.mark.parametrize(
    ("store_options", "options", "parts"),
    [
        ({"grid": 0}, {"feature_target": "grid"}, ("has no grid", "extract with --grid")),
        ({"grid": 0}, {"augment": "full"}, ("no grid that could follow", "--grid 7 or --views")),
        ({}, {"distillation_type": "logit"}, ("no teacher logits", "cli probe")),
        ({}, {"views": "recorded"}, ("extract with --views",)),
        ({"logits": True}, {"teacher_logits": "zero-shot"}, ("has probe",)),
        ({"labels": False}, {}, ("classification needs class labels", "no targets", "--task features")),
        ({}, {"student": "unet/small"}, ("segmentation needs class masks", "has labels")),
        ({}, {"task": "segmentation"}, ("learns classification or features",)),
        ({}, {"num_classes": 2}, ("num_classes 2", "has 3 classes")),
        ({}, {"align_feature": False}, ("24 wide", "--align-feature")),
        ({"one_class": True}, {}, ("one class only", "--task features")),
        ({}, {"batch_size": 25}, ("larger than split train (24 samples)", "--batch-size 24")),
        ({"val": 0}, {}, ("no split val, it has train", "--val-split, or extract with --val-fraction")),
        ({}, {"device": "cuda"}, ("device cuda", "--device cpu")),
        ({}, {"precision": "fp16"}, ("fp16 needs a CUDA GPU",)),
        (
            {},
            {"batch_size": 1, "student": "resnet18"},
            ("batch_size 1, image_size 32", "larger --batch-size"),
        ),
        ({}, {"student": "timm:test_vit", "image_size": 40}, ("not a multiple", "patch 16")),
        ({}, {"student": "timm:test_rasnet"}, ("no model", "test_resnet")),
        ({}, {"lora_rank": 4}, ("random", "--student-path")),
        ({}, {"task": "features", "control": True}, ("nothing to compare",)),
        ({}, {"task": "features", "distillation_type": "none"}, ("leaves nothing",)),
        ({}, {"freeze_encoder": True}, ("option of lstm students",)),
        ({}, {"yolo_settings": "mosaic=1"}, ("option of yolov8 students",)),
        ({}, {"mixup_alpha": 0.2, "task": "features"}, ("works for classification",)),
        ({}, {"mixup_alpha": 0.2, "feature_loss_type": "relation"}, ("no relation",)),
        ({}, {"cutmix_alpha": 1.0}, ("feature_target pooled, or MixUp",)),
        ({}, {"student": "lstm/small"}, ("holds single images", "--source clips")),
        ({}, {"tracker": "wandb"}, ("pip install", "wandb")),
    ],
)
def test_refused_with_the_next_step(make_store, make_config, store_options, options, parts, monkeypatch):
    if options.get("tracker"):
        monkeypatch.setitem(__import__("sys").modules, "wandb", None)
    refused(make_config(make_store(**store_options), **options), *parts)


def test_no_store(tmp_path, make_config):
    refused(make_config(tmp_path / "none.zarr"), "none.zarr")


def test_missing_and_changed_images_are_named(make_store, make_config, tmp_path):
    store = make_store(images="none")
    key = open_store(store)["train"].keys[5]
    path = tmp_path / "store.zarr.images" / key
    data = path.read_bytes()
    path.write_bytes(data + b" ")
    refused(make_config(store), key, "content hash differs")
    path.unlink()
    refused(make_config(store), key, "cannot be read", "--data-root")  # a failed start is no run


@pytest.mark.parametrize("workers", [0, 1])
def test_an_error_in_a_worker_is_still_one_line(make_store, make_config, tmp_path, workers):
    store = make_store(images="none")
    (tmp_path / "store.zarr.images" / open_store(store)["train"].keys[5]).write_bytes(b"")
    refused(make_config(store, workers=workers), "train/0005.png")


def test_a_larger_num_classes_widens_the_head_and_says_so(make_store, make_config):
    summary = run_training(make_config(make_store(), num_classes=10, epochs=1))
    assert summary["num_classes"] == 10
    assert any("10 classes, the data 3" in note for note in summary["notes"])
    student, content = load_student_from_run(make_config(make_store("b.zarr")).out)
    assert student.spec.num_classes == 10
    assert content["class_names"] == ["red", "green", "blue"]


def test_a_recipes_batch_shrinks_to_a_small_split(make_store, make_config):
    summary = run_training(make_config(make_store(train=5), batch_size=None, epochs=1))
    assert summary["batch_size"] == 5


def test_without_a_grid_crops_are_mild_and_the_config_says_why(make_store, make_config):
    config = make_config(make_store(grid=0), epochs=1)
    run_training(config)
    resolved = json.loads((config.out / "config.json").read_text())["resolved"]
    assert resolved["augment"] == "mild"
    assert any("without a stored grid" in note for note in resolved["notes"])
    assert resolved["distilled"] == {
        "pooled": True, "cells": False, "grid": False, "recorded": False, "frames": False, "logits": None,
        "maps": None, "exact_flip": False, "levels": [],
    }  # fmt: skip
    config = make_config(make_store("grid.zarr"), epochs=1, overwrite=True)
    run_training(config)
    resolved = json.loads((config.out / "config.json").read_text())["resolved"]
    assert (resolved["augment"], resolved["distilled"]["cells"]) == ("full", True)


def test_nan_names_epoch_step_and_term_and_keeps_the_checkpoint(make_store, make_config, monkeypatch):
    plain = loop.Loop.forward

    def forward(self: Any, *arguments: Any) -> Any:
        losses = plain(self, *arguments)
        if self.parts.progress.global_step == 4:
            losses["feature_loss"] = losses["feature_loss"] * float("nan")
            losses["loss"] = losses["loss"] + losses["feature_loss"]
        return losses

    monkeypatch.setattr(loop.Loop, "forward", forward)
    config = make_config(make_store())
    events: list[Event] = []
    with pytest.raises(loop.NotFiniteError, match="feature_loss became nan in epoch 2, step 2"):
        run_training(config, [events.append])
    failed = events[-1]
    assert isinstance(failed, TrainingFailed)
    assert (failed.kind, failed.exit_code) == ("NotFiniteError", 1)
    assert failed.message.startswith("feature_loss became nan in epoch 2")
    last = load_checkpoint(config.out / "last.pt")
    assert last["epoch"] == 1
    assert all(torch.isfinite(value).all() for value in last["model_state_dict"].values())


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({}, "gradient norm became nan in epoch 2, step 3"),
        ({"max_grad_norm": 0}, "val_[a-z_]+ became nan in the validation of epoch 2"),
    ],
)
def test_gradients_that_are_not_finite_reach_no_checkpoint(
    make_store, make_config, monkeypatch, options, text
):
    """The loss of the epoch's last step is finite, its gradient is not: sqrt(0 · weight)."""
    plain = loop.Loop.forward

    def forward(self: Any, *arguments: Any) -> Any:
        losses = plain(self, *arguments)
        if self.parts.progress.global_step == 5:
            weight = next(self.parts.module.student.parameters())
            losses["loss"] = losses["loss"] + (weight.sum() * 0).sqrt()
        return losses

    monkeypatch.setattr(loop.Loop, "forward", forward)
    config = make_config(make_store(), **options)
    with pytest.raises(loop.NotFiniteError, match=text):
        run_training(config)
    last = load_checkpoint(config.out / "last.pt")
    assert last["epoch"] == 1
    assert all(torch.isfinite(value).all() for value in last["model_state_dict"].values())


def exhaust_memory_above(limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = loop.Loop.forward

    def forward(self: Any, batch: Any, *arguments: Any) -> Any:
        if len(batch) > limit:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return plain(self, batch, *arguments)

    monkeypatch.setattr(loop.Loop, "forward", forward)


def test_out_of_memory_ends_with_advice_in_order(make_store, make_config, monkeypatch):
    exhaust_memory_above(2, monkeypatch)
    with pytest.raises(OutOfMemoryError) as caught:
        run_training(make_config(make_store()))
    text = str(caught.value)
    places = [
        text.index(word) for word in ("--batch-size", "--grad-accum-steps", "--image-size", "smaller student")
    ]
    assert places == sorted(places)
    assert "--auto-batch" in text


def test_auto_batch_halves_until_it_fits_and_keeps_the_steps(make_store, make_config, monkeypatch):
    exhaust_memory_above(2, monkeypatch)
    summary = run_training(make_config(make_store(), auto_batch=True, control=True))
    assert (summary["batch_size"], summary["grad_accum_steps"]) == (2, 4)
    assert summary["epochs_done"] == 2
    assert "top1" in summary["control"]["difference"]


def test_auto_batch_lets_go_of_what_ran_out_of_memory(make_store, make_config, monkeypatch):
    exhaust_memory_above(2, monkeypatch)
    plain, built = loop_trainer.build_training, []

    def build(*arguments: Any, **options: Any) -> Any:
        assert [module() for module in built] == [None] * len(built), "an earlier attempt is still in memory"
        result = plain(*arguments, **options)
        built.append(weakref.ref(result.parts.module))
        return result

    monkeypatch.setattr(loop_trainer, "build_training", build)
    run_training(make_config(make_store(), auto_batch=True, epochs=1))
    assert len(built) == 3


def test_a_run_that_shrank_its_batch_resumes_with_the_same_command(make_store, make_config, monkeypatch):
    small = {"store": make_store("small.zarr", train=5), "batch_size": None}
    run_training(make_config(**small, epochs=1))
    assert run_training(make_config(**small, epochs=2, resume=True))["batch_size"] == 5
    exhaust_memory_above(2, monkeypatch)
    halved = {"store": make_store(), "out": make_config(make_store("b.zarr")).out.parent / "halved"}
    run_training(make_config(**halved, batch_size=5, auto_batch=True, epochs=1))
    before = load_checkpoint(halved["out"] / "last.pt")["training"]["progress"]["history"]
    summary = run_training(make_config(**halved, batch_size=5, auto_batch=True, epochs=2, resume=True))
    assert (summary["batch_size"], summary["grad_accum_steps"], summary["epochs_done"]) == (2, 2, 2)
    after = load_checkpoint(halved["out"] / "last.pt")["training"]["progress"]["history"]
    assert after[: len(before)] == before, "the first epoch was not trained again"


def test_disk_full_while_saving_keeps_the_previous_checkpoint(tmp_path, monkeypatch):
    path = tmp_path / "last.pt"
    good = {"format": 1, "student": {}, "model_state_dict": {"w": torch.ones(3)}}
    save_checkpoint(path, good)

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CheckpointError, match=r"No space left on device; the previous last.pt is intact"):
        save_checkpoint(path, {**good, "model_state_dict": {"w": torch.zeros(3)}})
    assert torch.equal(load_checkpoint(path)["model_state_dict"]["w"], torch.ones(3))
    assert [item.name for item in tmp_path.iterdir() if "partial" in item.name] == []


def test_a_really_full_disk(make_store, make_config, monkeypatch):
    """torch.save itself fails in the middle of a file."""
    config = make_config(make_store())
    # The second epoch is not the best: last.pt alone is written, over the one that is there.
    monkeypatch.setattr(loop.TrainingState, "note_value", lambda state, value, epoch, *rest: epoch == 1)
    plain, calls = torch.save, []

    def save(content: Any, file: Any) -> None:
        calls.append(content)
        if len(calls) > 2:
            # As torch does it: its own error hides that of the file.
            try:
                file.write(b"half a file")
                raise OSError(28, "No space left on device")
            except OSError:
                raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 768")  # noqa: B904
        plain(content, file)

    monkeypatch.setattr(torch, "save", save)
    with pytest.raises(CheckpointError, match="cannot be saved: No space left on device; the previous"):
        run_training(config)
    assert load_checkpoint(config.out / "last.pt")["epoch"] == 1


@pytest.mark.parametrize(("content", "words"), [(b"", "not a readable"), (b"junk" * 50, "not a readable")])
def test_damaged_checkpoints(tmp_path, content, words):
    (tmp_path / "best.pt").write_bytes(content)
    with pytest.raises(CheckpointError, match=words):
        load_student_from_run(tmp_path)
    with pytest.raises(CheckpointError, match="no such checkpoint"):
        load_checkpoint(tmp_path / "other.pt")
    torch.save({"weights": torch.ones(2)}, tmp_path / "best.pt")
    with pytest.raises(CheckpointError, match="not a checkpoint of this program"):
        load_student_from_run(tmp_path)


def test_checkpoints_that_would_run_code_are_not_loaded(tmp_path):
    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            return (os.mkdir, (str(tmp_path / "pwned"),))

    torch.save({"model_state_dict": {}, "student": {}, "format": 1, "x": Evil()}, tmp_path / "best.pt")
    with pytest.raises(CheckpointError):
        load_checkpoint(tmp_path / "best.pt")
    assert not (tmp_path / "pwned").exists()


def test_other_runtime_errors_are_not_taken_for_memory():
    assert not is_out_of_memory(RuntimeError("shape mismatch"))
    assert is_out_of_memory(RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"))


def test_error_types():
    assert issubclass(ConfigError, TrainError)
    assert ConfigError.exit_code == 2
    assert TrainError.exit_code == 1


@pytest.mark.parametrize("key", ["../secret.png", "/etc/passwd", "a/../../b.png"])
def test_keys_cannot_lead_out_of_the_data_root(tmp_path, key):
    from train.data.images import DataError, path_of

    with pytest.raises(DataError, match="leads out of the data set's root"):
        path_of(key, tmp_path)
    assert path_of("a/b..png", tmp_path) == tmp_path / "a/b..png"


def test_a_store_may_be_a_url():
    from train.config import load_config

    config = load_config({"store": "s3://bucket/flowers.zarr", "student": "resnet18", "out": "run"})
    assert config.store == "s3://bucket/flowers.zarr"
