"""The feature term's weight is found from gradients, and the terms end where the student knows more than the teacher."""

from __future__ import annotations

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import zarr
from torch import nn

from processes.stop import Stopped
from store.reader import open_store
from tests.test_train.test_resume import StopAfter, records
from tests.test_train.test_sweep_controls import built
from train.checkpoint import load_checkpoint
from train.distill.calibration import MEASUREMENTS, SHARE, Calibration, CalibrationState, measurements_of
from train.distill.losses import feature_loss
from train.distill.objective import DistillationPlan
from train.distill.reference import TeacherReference, accuracy_of, teacher_reference
from train.distill.resolve import logit_temperature
from train.loop.loop import Loop
from train.run import run_training


def test_the_weight_gives_the_feature_gradient_its_share():
    torch.manual_seed(0)
    body, head, projector = nn.Linear(6, 5), nn.Linear(5, 3), nn.Linear(5, 8)
    state = CalibrationState()
    calibration = Calibration(lambda: state, body.parameters(), steps=1000)
    images, target = torch.randn(4, 6), torch.randn(4, 8)
    hidden = body(images)
    hard, feature = head(hidden).square().mean(), feature_loss("mse", projector(hidden), target)
    calibration.add(feature, hard)
    calibration.finish()
    assert state.count == 1
    (state.weight * feature).backward(retain_graph=True)
    found = body.weight.grad.norm()
    body.weight.grad = None
    hard.backward()
    torch.testing.assert_close(found, SHARE * body.weight.grad.norm())


def test_micro_batches_add_up_to_the_step():
    torch.manual_seed(0)
    body, images, target = nn.Linear(6, 5), torch.randn(4, 6), torch.randn(4, 5)
    weights = []
    for parts in ([slice(0, 4)], [slice(0, 1), slice(1, 4)]):
        state = CalibrationState()
        calibration = Calibration(lambda state=state: state, body.parameters(), steps=1)
        for part in parts:
            hidden = body(images[part])
            calibration.add(
                feature_loss("mse", hidden, target[part], normalizer=4.0), hidden.square().sum() / 20
            )
        calibration.finish()
        weights.append(state.weight)
    assert weights[0] == pytest.approx(weights[1], rel=1e-5)


def test_steps_without_a_task_gradient_do_not_count():
    body, state = nn.Linear(2, 2), CalibrationState()
    calibration = Calibration(lambda: state, body.parameters(), steps=1000)
    hidden = body(torch.ones(1, 2))
    calibration.add(feature_loss("mse", hidden, torch.ones(1, 2)), hidden.sum() * 0)
    calibration.finish()
    calibration.add(feature_loss("mse", hidden, torch.ones(1, 2)), None)
    calibration.finish()
    assert (state.count, state.weight) == (0, 1.0)
    assert calibration.measures


def test_at_most_two_percent_of_the_steps_are_measured():
    assert [measurements_of(steps) for steps in (1, 99, 100, 399, 400, 10**6)] == [
        1,
        1,
        2,
        7,
        8,
        MEASUREMENTS,
    ]


def lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    "options",
    [
        {"student": "timm:test_resnet"},
        {"student": "timm:test_vit", "feature_loss_type": "cosine"},
        {"student": "unet/small"},
    ],
)
def test_a_run_finds_its_weight_and_a_number_wins(make_store, make_config, options):
    store = make_store(masks=options["student"] == "unet/small", logits=True)
    config = make_config(store, **options, epochs=1)
    summary = run_training(config)
    found = summary["distillation"]["feature_weight"]
    assert found > 0
    assert found != 1.0
    assert lines(config.out)[0]["feature_weight"] == pytest.approx(found)
    given = make_config(store, **options, epochs=1, feature_weight=3.0, overwrite=True)
    assert run_training(given)["distillation"]["feature_weight"] == 3.0
    assert "feature_weight" not in lines(config.out)[0]


def test_a_resumed_run_keeps_the_weight_that_was_found(tmp_path, make_store, make_config):
    options = {
        "store": make_store(train=27, logits=True),
        "batch_size": 6,
        "epochs": 2,
        "distill_until": "end",
    }
    run_training(make_config(**options, out=tmp_path / "whole"))
    for looks in (2, 3, 1000):
        try:
            run_training(make_config(**options, out=tmp_path / "parts", resume=True), stop=StopAfter(looks))
        except Stopped:
            continue
    assert records(tmp_path / "whole") == records(tmp_path / "parts")
    assert load_checkpoint(tmp_path / "parts/last.pt")["training"]["progress"]["calibration"]["count"] == 1


def test_label_free_training_has_nothing_to_balance(make_store, make_config):
    config = make_config(make_store(), task="features", epochs=1)
    assert run_training(config)["distillation"]["feature_weight"] == 1.0


@pytest.mark.parametrize("soft", [0.5, 0.0])
def test_without_a_soft_term_the_labeled_rows_alone_are_shown(make_store, make_config, soft):
    store = make_store(unlabelled=tuple(range(2, 8)))
    (labeled,) = np.nonzero(open_store(store)["train"].read("targets/label") >= 0)
    assert 0 < len(labeled) < 24
    batches = built(make_config(store, soft_label_weight=soft, batch_size=8)).parts.train_loader.batches
    shown = {item.row for batch in batches for item in batch}
    assert shown == (set(range(24)) if soft else set(labeled))


CLIPS = {"student": "lstm/small", "frame_encoder": "resnet10t", "image_size": 32, "batch_size": 3}


@pytest.mark.parametrize(
    ("options", "unlabeled_shown", "note"),
    [
        ({}, False, "they are left out; --pretrain-epochs N learns their features first"),
        ({"control_only": True}, False, "they are left out"),
        ({"labeled_share": 0.5}, True, "they are learned from the teacher alone"),
        ({"hard_label_weight": 0.0}, True, "they are learned from the teacher alone"),
        (
            {"distillation_type": "none"},
            False,
            "they are left out; --pretrain-epochs N learns their features first",
        ),
    ],
)
def test_clips_without_a_label_are_left_out_of_phase_two(
    clip_store, make_config, options, unlabeled_shown, note
):
    zarr.open_array(store=clip_store / "train/targets/label", mode="r+")[:3] = -1
    store = open_store(clip_store)["train"]
    (labeled,) = np.nonzero(store.read("targets/label") >= 0)
    run = built(make_config(clip_store, **CLIPS, **options), control=options.get("control_only", False))
    batches = run.parts.train_loader.batches
    shown = {item.row for batch in batches for item in batch}
    assert shown >= set(labeled)
    assert bool(shown - set(labeled)) is unlabeled_shown
    assert [text for text in run.notes if "have no label" in text] == [
        f"3 samples of train have no label: {note}"
    ]


def test_phase_one_learns_clips_without_a_label(clip_store, make_config, train_log):
    zarr.open_array(store=clip_store / "train/targets/label", mode="r+")[:3] = -1
    run_training(make_config(clip_store, **CLIPS, pretrain_epochs=1, epochs=1))
    note = "3 samples of train have no label: phase one learned their features, this phase leaves them out"
    assert note in train_log.text
    assert "they are left out; " not in train_log.text


def test_a_control_of_a_training_on_the_teacher_alone_sees_labeled_clips_alone(clip_store, make_config):
    zarr.open_array(store=clip_store / "train/targets/label", mode="r+")[:3] = -1
    (labeled,) = np.nonzero(open_store(clip_store)["train"].read("targets/label") >= 0)
    run = built(make_config(clip_store, **CLIPS, hard_label_weight=0.0), control=True)
    assert {item.row for batch in run.parts.train_loader.batches for item in batch} == set(labeled)


def test_a_recipes_share_of_labels_is_no_contradiction(clip_store, make_config):
    assert make_config(clip_store, **CLIPS, soft_label_weight=0.0).labeled_share == 1.0


@pytest.mark.parametrize(
    "options", [{}, {"labeled_share": 0.125}, {"soft_label_weight": 0.0}, {"control_only": True}]
)
def test_a_labeled_sample_counts_as_much_among_unlabeled_ones(make_store, make_config, options):
    """Its cross-entropy is divided by the samples of the batch, not by the few labeled ones among them."""
    store = make_store(unlabelled=tuple(range(2, 8)), logits=True)
    parts = built(make_config(store, batch_size=8, hard_label_weight=0.4, **options)).parts
    Loop(parts).set_weights()
    labeled = open_store(store)["train"].read("targets/label") >= 0
    shares = [labeled[[item.row for item in batch]].mean() for batch in parts.train_loader.batches]
    whole = parts.objective.weights["hard_loss"] / np.mean(shares)
    alone = built(make_config(make_store("all.zarr"), batch_size=8, hard_label_weight=0.4, **options)).parts
    assert whole == pytest.approx(alone.objective.weights["hard_loss"])


def test_the_temperature_suits_the_logits(make_store, make_config):
    """1 for a probe's, which are fitted to be probabilities; a given one wins."""
    store = make_store(logits=True)
    for given, logits, expected in (
        (None, "probe", 1.0),
        (None, "zero-shot", 4.0),
        (2.5, "probe", 2.5),
        (None, None, 4.0),
    ):
        config = make_config(store, temperature=given)
        assert logit_temperature(config, DistillationPlan(logits=logits)) == expected
    assert built(make_config(store)).parts.objective.temperature == 1.0
    assert run_training(make_config(store, epochs=1))["distillation"]["temperature"] == 1.0


# Do no harm --------------------------------------------------------------------------------------------------------


def test_beaten_means_by_more_than_chance():
    reference = TeacherReference("top1", 0.68, 50)
    assert not reference.is_beaten(0.70, 180)
    assert reference.is_beaten(0.80, 180)
    assert not TeacherReference("top1", 0.833, 3068).is_beaten(0.75, 341)


def test_the_reference_is_what_the_logits_know_of_labeled_rows(make_store):
    split = open_store(make_store(logits=True, unlabelled=(0, 1, 2)))["train"]
    labels, values = split.read("targets/label"), split.read("logits/probe")
    known = labels >= 0
    reference = accuracy_of(split, "logits/probe")
    assert 0 < reference.samples == known.sum() < 24
    assert reference.value == pytest.approx(np.mean(values[known].argmax(1) == labels[known]))


@pytest.fixture
def weak_teacher(monkeypatch):
    """A teacher whose probe knows nothing: any student is better soon."""
    monkeypatch.setattr(
        "train.loop.assemble.teacher_reference",
        lambda *arguments: TeacherReference("top1", 0.0, 10**9),
    )


def test_the_terms_end_where_the_student_knows_more(make_store, make_config, weak_teacher, train_log):
    store = make_store(train=32, val=64, logits=True, unlabelled=(7,))
    config = make_config(store, epochs=6, batch_size=8)
    summary = run_training(config)
    ended = summary["distillation"]["ended_after_epoch"]
    assert ended == 2, "the first validation: 64 samples are validated after two epochs of 32"
    assert (
        "better than a probe of the teacher's features (0.00%): the distillation terms end" in train_log.text
    )
    before, after = lines(config.out)[:ended], lines(config.out)[ended:]
    for line in before:
        task, teacher = 0.5 * 28 / 32 * line["hard_loss"], line["feature_loss"] + line["logit_loss"]
        assert line["train_loss"] > task + 0.5 * teacher > task
    for line in after:
        assert line["train_loss"] == pytest.approx(0.5 * line["hard_loss"], rel=1e-5)
    assert summary["distillation"]["teacher"] == {"top1": 0.0}


def test_the_end_is_the_same_after_a_resume(tmp_path, make_store, make_config, weak_teacher):
    options = {"store": make_store(train=16, val=32, logits=True), "epochs": 5, "batch_size": 8}
    run_training(make_config(**options, out=tmp_path / "whole"))
    for looks in (20, 1000):
        try:
            run_training(make_config(**options, out=tmp_path / "parts", resume=True), stop=StopAfter(looks))
        except Stopped:
            continue
    assert records(tmp_path / "whole") == records(tmp_path / "parts")


def test_distill_until_end_keeps_the_terms(make_store, make_config, weak_teacher):
    config = make_config(make_store(logits=True), epochs=2, distill_until="end")
    assert run_training(config)["distillation"]["ended_after_epoch"] is None


def test_only_a_better_student_ends_them(make_store, make_config):
    """The synthetic teacher's logits are right nearly always."""
    summary = run_training(make_config(make_store(logits=True), epochs=2))
    assert summary["distillation"]["teacher"]["top1"] > 0.9
    assert summary["distillation"]["ended_after_epoch"] is None


def test_the_probe_of_cells_is_compared_with_the_mean_iou(make_store):
    from store.format import MEASURED_FILE

    path = make_store(masks=True)
    store = open_store(path)
    assert teacher_reference(store, store["val"], store["train"], "miou", None) is None
    (path / MEASURED_FILE).parent.mkdir(exist_ok=True)
    (path / MEASURED_FILE).write_text(json.dumps({"probe_miou": 0.4}))
    assert teacher_reference(store, store["val"], store["train"], "miou", None).value == 0.4


def test_the_probe_is_measured_on_the_rows_that_measure_the_student(make_store):
    """With few labels, out of fold on the training split looks worse than the probe that teaches the unlabeled rows."""
    store = open_store(make_store(train=24, val=8, logits=True))
    reference = teacher_reference(store, store["val"], store["train"], "top1", "probe")
    assert reference == accuracy_of(store["val"], "logits/probe")
    assert reference is not None
    assert reference.samples == 8


@pytest.mark.slow
def test_yolo_finds_its_weight_too(tmp_path, yolo_store):
    pytest.importorskip("ultralytics")
    from tests.test_train.yolo_runs import make_config as yolo_config

    run_training(yolo_config(yolo_store, tmp_path / "run", epochs=1))
    state = load_checkpoint(tmp_path / "run/last.pt")["training"]["model"]
    count, logarithms = state["distillation.calibration"].tolist()
    assert count == 1
    assert math.isfinite(logarithms)
    weight = 0.5 * SHARE * math.exp(logarithms)
    (line,) = lines(tmp_path / "run")
    assert line["train_loss"] == pytest.approx(
        0.5 * line["hard_loss"] + weight * line["feature_loss"], rel=0.05
    )


def test_a_module_keeps_its_gradients_when_it_is_measured():
    """`feature_loss` changes what it saved in its backward pass, which can run once: measuring must not use it up."""
    student = torch.randn(3, 4, requires_grad=True)
    loss = feature_loss("cosine", student, torch.randn(3, 4))
    state = SimpleNamespace(count=0, log_ratio=0.0)
    Calibration(lambda: state, [], steps=1).add(loss, student.sum())
    loss.backward()
    assert student.grad.isfinite().all()


def test_the_printed_summary_says_that_the_terms_ended():
    from commands.train import distillation_phrase

    ended = {"distillation": {"ended_after_epoch": 4, "teacher": {"top1": 0.66}}}
    assert "ended after epoch 4" in distillation_phrase(ended)
    assert "top-1 accuracy 66.00%" in distillation_phrase(ended)
    assert distillation_phrase({"distillation": {"ended_after_epoch": None}}) is None
    assert distillation_phrase({}) is None
