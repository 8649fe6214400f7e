"""The loop by itself: schedule, accumulation, clipping, averaging, early stopping, mixing, compiling, trackers."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from store.reader import open_store
from tests.test_train.runs import records
from train.checkpoint import load_checkpoint
from train.data.batches import FeatureGatherer
from train.distill.mixing import draw_mixing, mix_images
from train.events import CheckpointSaved, EpochEnded, Event, TrainingFinished
from train.loop import loop, saving, trainer
from train.loop.optimizer import WeightAverage, parameter_groups
from train.loop.saving import StepGuard
from train.run import run_training

ROOT = Path(__file__).parents[2]


def test_accumulation_equals_one_large_batch(make_store, make_config, tmp_path):
    """Ragged groups, unlabelled samples: the counts are those of the whole group (a student without batch norm)."""
    store = make_store(train=27, logits=True, unlabelled=(2, 5))
    common = {"student": "timm:test_vit", "augment": "none", "max_grad_norm": 0.5}
    weights = []
    for name, size, steps in (("large", 12, 1), ("small", 3, 4)):
        config = make_config(
            store, **common, batch_size=size, grad_accum_steps=steps, out=tmp_path / name, optimizer="sgd"
        )
        run_training(config)
        weights += [records(config), load_checkpoint(config.out / "last.pt")]
    for left, right in zip(weights[0], weights[2], strict=True):
        for key in ("train_loss", "hard_loss", "feature_loss", "logit_loss"):
            assert left[key] == pytest.approx(right[key], abs=1e-5), key
    for name, value in weights[1]["model_state_dict"].items():
        torch.testing.assert_close(value, weights[3]["model_state_dict"][name], atol=1e-5, rtol=1e-4)


def test_clipping_covers_student_and_alignment_head(make_store, make_config, monkeypatch):
    norms: list[float] = []
    plain = loop.Loop.step

    def one_step(self: Any, group: Any) -> None:
        step = self.parts.optimizer.step

        def measured() -> None:
            gradients = [p.grad for p in self.parts.module.parameters() if p.grad is not None]
            norms.append(float(torch.stack([g.norm() for g in gradients]).norm()))
            assert self.parts.module.projector.layers.weight.grad.norm() > 0
            step()

        monkeypatch.setattr(self.parts.optimizer, "step", measured)
        plain(self, group)
        monkeypatch.setattr(self.parts.optimizer, "step", step)

    monkeypatch.setattr(loop.Loop, "step", one_step)
    run_training(make_config(make_store(), max_grad_norm=0.01, epochs=1))
    assert len(norms) == 3
    assert norms == pytest.approx([0.01] * 3, rel=1e-3)


def test_weight_decay_excludes_norms_biases_and_parameters_that_the_model_lists():
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.norm = nn.Linear(2, 3), nn.LayerNorm(3)
            self.token = nn.Parameter(torch.zeros(1, 1, 3))
            self.frozen = nn.Parameter(torch.zeros(3, 3), requires_grad=False)

        def no_weight_decay(self) -> set[str]:
            return {"token"}

    model = nn.ModuleDict({"student": Model()})
    decayed, spared = parameter_groups(model, 0.1)
    assert [p.shape for p in decayed["params"]] == [(3, 2)]
    assert (decayed["weight_decay"], spared["weight_decay"]) == (0.1, 0.0)
    assert len(spared["params"]) == 4


def test_average_follows_by_hand():
    student = nn.BatchNorm1d(1)
    average = WeightAverage(student, 0.5)  # type: ignore[arg-type]
    values = []
    with torch.no_grad():
        for weight in (3.0, 5.0):
            student.weight.fill_(weight)
            student.running_mean.fill_(weight)
            average.update(student)  # type: ignore[arg-type]
            values.append(float(average.student.weight))
    first = 1.0 + (1 - 2 / 11) * (3.0 - 1.0)
    second = first + (1 - 3 / 12) * (5.0 - first)
    assert values == pytest.approx([first, second])
    assert float(average.student.running_mean) == 5.0


def test_a_snapshot_has_the_buffers_of_the_last_finished_step():
    module = nn.BatchNorm1d(2)
    guard = StepGuard(module)
    with guard.update():
        module(torch.randn(8, 2))
    finished = {name: value.clone() for name, value in module.named_buffers()}
    module(torch.randn(8, 2) + 5)
    assert not torch.equal(module.running_mean, finished["running_mean"])
    guard.restore_buffers()
    for name, value in module.named_buffers():
        assert torch.equal(value, finished[name])


def test_a_snapshot_waits_for_a_checkpoint_that_is_being_written(make_store, make_config, monkeypatch):
    """A signal while a slow disk takes last.pt: two writers of one file would leave a mixture.

    The main thread waits in a listener meanwhile, since it must not be inside a step when the run continues afterwards:
    a snapshot puts buffers back that the step's backward pass needs.
    """
    plain_fit, plain_save = trainer.Training.fit, saving.save_checkpoint
    trainings, writers, most = [], [], []
    begun, may_end = threading.Event(), threading.Event()

    def fit(self):
        trainings.append(self)
        return plain_fit(self)

    def save(path, content):
        if path.name == "last.pt":
            writers.append(path)
            most.append(len(writers))
            begun.set()
            assert may_end.wait(60)
        plain_save(path, content)
        if path.name == "last.pt":
            writers.remove(path)

    def listener(event):
        if not isinstance(event, EpochEnded) or may_end.is_set():
            return
        assert begun.wait(60)  # the background thread writes last.pt of the first epoch
        snapshot = threading.Thread(target=trainings[0].snapshot)
        snapshot.start()
        snapshot.join(0.5)
        assert snapshot.is_alive()
        may_end.set()
        snapshot.join()
        trainings[0].parts.guard.lock.release()  # in the product the process ends here

    monkeypatch.setattr(trainer.Training, "fit", fit)
    monkeypatch.setattr(saving, "save_checkpoint", save)
    config = make_config(make_store())
    run_training(config, [listener])
    assert may_end.is_set()
    assert set(most) == {1}
    assert load_checkpoint(config.out / "last.pt")["epoch"] == 2


def test_early_stopping_counts_epochs_without_improvement(make_store, make_config, monkeypatch):
    plain = loop.Loop.validate
    tops = iter([0.5, 0.6, 0.6, 0.4, 0.9])
    monkeypatch.setattr(loop.Loop, "validate", lambda self: {**plain(self), "top1": next(tops)})
    config = make_config(make_store(), epochs=9, early_stopping_patience=2)
    summary = run_training(config)
    assert (summary["epochs_done"], summary["best_epoch"]) == (4, 2)
    assert summary["metrics"]["top1"] == 0.6
    assert load_checkpoint(config.out / "best.pt")["epoch"] == 2


def test_listeners_get_the_events_of_the_main_run_only(make_store, make_config):
    events: list[Event] = []

    def listener(event: Event) -> None:
        if isinstance(event, CheckpointSaved):
            assert event.path.exists()
        events.append(event)

    config = make_config(make_store(), control=True, checkpoint_interval=2)
    summary = run_training(config, [listener])
    assert [event.record["epoch"] for event in events if isinstance(event, EpochEnded)] == [1, 2]
    assert CheckpointSaved(config.out / "best.pt", 1, True) in events
    assert CheckpointSaved(config.out / "checkpoint_epoch_2.pt", 2, False) in events
    assert [event for event in events if isinstance(event, TrainingFinished)] == [TrainingFinished(summary)]


def test_control_has_the_same_weights_order_and_schedule_and_weight_one(make_store, make_config, monkeypatch):
    starts: list[dict[str, torch.Tensor]] = []
    orders: list[list[int]] = []
    weights: list[float] = []
    plain_init, plain_step = loop.Loop.__init__, loop.Loop.step

    def init(self: Any, parts: Any) -> None:
        plain_init(self, parts)
        starts.append({name: value.clone() for name, value in parts.module.student.state_dict().items()})
        orders.append([])
        weights.append(parts.objective.weights["hard_loss"])

    def step(self: Any, group: Any) -> None:
        orders[-1] += [int(row) for batch in group for row in batch.rows]
        plain_step(self, group)

    monkeypatch.setattr(loop.Loop, "__init__", init)
    monkeypatch.setattr(loop.Loop, "step", step)
    config = make_config(make_store(), control=True, hard_label_weight=0.3)
    run_training(config)
    assert orders[0] == orders[1]
    assert weights == [0.3, 1.0]
    assert all(torch.equal(value, starts[1][name]) for name, value in starts[0].items())
    assert [r["learning_rate"] for r in records(config)] == [
        json.loads(line)["learning_rate"]
        for line in (config.out / "control" / "metrics.jsonl").read_text().splitlines()
    ]
    resolved = json.loads((config.out / "control" / "config.json").read_text())["resolved"]
    assert resolved["distilled"] is None
    assert resolved["augment"] == "full", "images vary as in the distilled run"


def test_total_is_the_weighted_sum_of_its_terms(make_store, make_config):
    config = make_config(
        make_store(logits=True),
        hard_label_weight=0.3,
        soft_label_weight=0.9,
        feature_weight=2.0,
        logit_weight=0.25,
        epochs=1,
    )
    run_training(config)
    line = records(config)[0]
    expected = 0.3 * line["hard_loss"] + 0.9 * (2 * line["feature_loss"] + 0.25 * line["logit_loss"])
    assert line["train_loss"] == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("kind", ["mixup", "cutmix"])
def test_mixing_mixes_images_with_the_weights_of_the_losses(kind):
    torch.manual_seed(3)
    images = torch.arange(4.0).view(4, 1, 1, 1).expand(4, 3, 20, 20).contiguous()
    mixing, box = draw_mixing(1.0 if kind == "mixup" else 0.0, 0.0 if kind == "mixup" else 1.0, images)
    mixed = mix_images(images, mixing, box)
    partner = images[mixing.partner].mean((1, 2, 3))
    expected = mixing.weight * images.mean((1, 2, 3)) + (1 - mixing.weight) * partner
    torch.testing.assert_close(mixed.mean((1, 2, 3)), expected)
    assert (box is None) == (kind == "mixup")


@pytest.mark.parametrize(
    "options",
    [
        {"mixup_alpha": 0.4, "label_smoothing": 0.1},
        {"cutmix_alpha": 1.0, "feature_target": "pooled"},
        {"precision": "bf16", "optimizer": "sgd", "lr_scheduler": "linear"},
        {
            "deterministic": True,
            "gradient_checkpointing": True,
            "student": "timm:test_vit",
            "align_head": "mlp",
        },
        {"feature_loss_type": "relation", "optimizer": "adam", "lr_scheduler": "constant"},
        {"distillation_type": "none"},
        {"distillation_type": "logit"},
        {"feature_loss_type": "smooth_l1", "feature_target": "both"},
    ],
)
def test_options_run_and_losses_are_finite(make_store, make_config, options):
    config = make_config(make_store(logits=True), epochs=1, **options)
    run_training(config)
    line = records(config)[0]
    assert np.isfinite([line["train_loss"], line["val_loss"]]).all()
    assert (line["logit_loss"] is None) == (options.get("distillation_type") == "none")
    torch.use_deterministic_algorithms(False)


@pytest.mark.slow
def test_compiled_student(make_store, make_config, tmp_path):
    store = make_store()
    plain = make_config(store, epochs=1, out=tmp_path / "plain")
    compiled = make_config(store, epochs=1, out=tmp_path / "compiled", compile=True)
    for config in (plain, compiled):
        run_training(config)
    left, right = records(plain)[0], records(compiled)[0]
    assert left["train_loss"] == pytest.approx(right["train_loss"], rel=1e-3)
    assert load_checkpoint(plain.out / "best.pt")["model_state_dict"].keys() == (
        load_checkpoint(compiled.out / "best.pt")["model_state_dict"].keys()
    )


def test_features_are_gathered_by_row_into_reused_buffers(make_store):
    split = open_store(make_store(train=20))["train"]
    gatherer = FeatureGatherer(
        split, ["features/pooled", "features/grid"], depth=2, device=torch.device("cpu")
    )
    everything = split.gather(np.arange(20), ["features/pooled"])["features/pooled"]
    addresses = []
    for rows in ([3, 1, 7], [0, 19, 2], [5, 5, 6], [11, 4, 9]):
        found = gatherer.gather(np.array(rows))
        assert np.array_equal(found["features/pooled"].numpy(), everything[rows])
        addresses.append(found["features/grid"].data_ptr())
    assert addresses[2] != addresses[3]
    # After the first use of each, memory is not allocated again.
    for expected, rows in zip(addresses[2:], ([1, 2, 3], [4, 5]), strict=True):
        assert gatherer.gather(np.array(rows))["features/grid"].data_ptr() == expected


WITHOUT = """
import sys
sys.path.insert(0, {root!r})
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("transformers", "extract"):
            raise ImportError("not importable: " + name)
sys.meta_path.insert(0, Refuse())
from train.config import load_config
from train.run import run_training
from train.deliver.evaluate import evaluate_run
run_training(load_config(dict(store={store!r}, out={out!r}, student="timm:test_resnet", epochs=1, batch_size=8,
    image_size=32, device="cpu", workers=1, control=True)))
evaluate_run(__import__("pathlib").Path({out!r}), {store!r}, device="cpu", workers=0)
assert not {{"transformers", "extract", "peft"}} & set(sys.modules)
"""


@pytest.mark.slow
def test_without_transformers_and_without_stage_one(make_store, tmp_path):
    code = WITHOUT.format(root=str(ROOT), store=str(make_store(logits=True)), out=str(tmp_path / "run"))
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=240)
    assert result.returncode == 0, result.stderr[-2000:]
