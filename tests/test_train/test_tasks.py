"""Every task trains from a store and reports its metrics; metrics are right by hand."""

from __future__ import annotations

import json

import numpy as np
import pytest
import timm
import torch

from store.reader import open_store
from train.checkpoint import load_checkpoint, load_student_from_run
from train.data.batches import Batch
from train.data.clips import ClipReader, clip_places, gather_frames
from train.deliver.evaluate import evaluate_run
from train.distill.mixing import Mixing
from train.distill.projector import DistilledOutput
from train.errors import TrainError
from train.run import run_training
from train.tasks import TASKS, build_task


def batch_of(**values) -> Batch:
    count = len(values["weight"])
    return Batch(
        np.arange(count), torch.zeros(count, 1), np.zeros((count, 2, 3)), samples=float(count), **values
    )


@pytest.mark.parametrize("name", TASKS)
def test_every_task_honours_the_protocol(name):
    """A new task gets this test by its line in TASKS."""
    task = build_task(name, num_classes=3, label_smoothing=0.1)
    assert task.name == name
    torch.manual_seed(0)
    logits = torch.randn(4, 3, 6, 6) if name == "segmentation" else torch.randn(4, 3)
    logits.requires_grad_()
    batch = batch_of(weight=torch.tensor([1.0, 1, 1, 0]), labels=torch.tensor([0, 1, 2, 1]))
    batch.masks = torch.randint(0, 3, (4, 6, 6))
    output = DistilledOutput(logits, None, None)
    counts = task.counts(batch)
    loss = task.loss(output, batch, counts, None)
    if loss is not None:
        loss.backward()
        assert logits.grad[:3].abs().sum() > 0
        assert logits.grad[3].abs().sum() == 0, "padding has no influence"
    meter = task.new_meter(torch.device("cpu"))
    task.update(meter, output, batch)
    values = [value for key, value in task.metrics(meter).items() if not key.startswith("per_class")]
    assert all(0 <= value <= 1 for value in values)
    assert (loss is None) == (name == "features")


def test_classification_metrics_by_hand():
    task = build_task("classification", num_classes=3, label_smoothing=0.0)
    meter = task.new_meter(torch.device("cpu"))
    labels = torch.tensor([0, 0, 1, 2, -1, 1])
    predicted = torch.tensor([0, 1, 1, 1, 2, 0])
    weight = torch.tensor([1.0, 1, 1, 1, 1, 0])  # the fifth is unlabelled, the sixth padding
    logits = torch.nn.functional.one_hot(predicted, 3).float()
    task.update(meter, DistilledOutput(logits, None, None), batch_of(weight=weight, labels=labels))
    metrics = task.metrics(meter)
    assert metrics["top1"] == pytest.approx(2 / 4)
    assert metrics["top5"] == 1
    # F1 of class 0: P 1, R 1/2; class 1: P 1/3, R 1; class 2: 0.
    assert metrics["macro_f1"] == pytest.approx((2 / 3 + 2 / 4 + 0) / 3)


def test_unlabeled_halves_of_mixed_images_teach_nothing():
    """Each half counts with its own label; the normalizer is the same as without mixing."""
    task = build_task("classification", num_classes=3, label_smoothing=0.0)
    logits = torch.randn(4, 3, generator=torch.Generator().manual_seed(0)).requires_grad_()
    # The first is unlabeled, the last is padding.
    batch = batch_of(weight=torch.tensor([1.0, 1, 1, 0]), labels=torch.tensor([-1, 2, 1, 0]))
    mixing = Mixing(torch.tensor([1, 0, 3, 2]), torch.full((4,), 0.7))
    counts = task.counts(batch)
    loss = task.loss(DistilledOutput(logits, None, None), batch, counts, mixing)
    log = logits.log_softmax(1)
    # Image 0 shows 0.3 of sample 1, image 1 0.7 of itself, image 2 0.7 of itself, image 3 0.3 of sample 2.
    expected = -(0.3 * log[0, 2] + 0.7 * log[1, 2] + 0.7 * log[2, 1] + 0.3 * log[3, 1]) / 2
    torch.testing.assert_close(loss, expected)
    assert counts["hard"] == 2
    loss.backward()
    alone = batch_of(weight=torch.ones(4), labels=torch.full((4,), -1))
    nothing = task.loss(DistilledOutput(logits, None, None), alone, task.counts(alone), mixing)
    assert nothing.item() == 0.0


def test_segmentation_metrics_by_hand():
    task = build_task("segmentation", num_classes=3, label_smoothing=0.0)
    meter = task.new_meter(torch.device("cpu"))
    masks = torch.tensor([[[0, 0, 1, 255]], [[1, 1, 1, 1]]])
    predicted = torch.tensor([[[0, 1, 1, 0]], [[0, 0, 0, 0]]])
    logits = torch.nn.functional.one_hot(predicted, 3).permute(0, 3, 1, 2).float()
    batch = batch_of(weight=torch.tensor([1.0, 0.0]), masks=masks)
    task.update(meter, DistilledOutput(logits, None, None), batch)
    metrics = task.metrics(meter)
    assert metrics["miou"] == pytest.approx((1 / 2 + 1 / 2) / 2)
    assert metrics["pixel_accuracy"] == pytest.approx(2 / 3)
    assert "per_class_iou/2" not in metrics


def test_segmentation_run(make_store, make_config):
    config = make_config(make_store(masks=True, train=16, val=6), student="unet/small", control=True)
    summary = run_training(config)
    assert set(summary["metrics"]) >= {"miou", "pixel_accuracy"}
    assert summary["num_classes"] == 4
    assert set(summary["per_class"]) <= {"background", "red", "green", "blue"}
    assert "miou" in summary["control"]["difference"]
    measured = evaluate_run(config.out, config.store, device="cpu", workers=0)
    assert measured["metrics"]["miou"] == pytest.approx(summary["metrics"]["miou"], abs=1e-6)
    assert measured["per_class"] == pytest.approx(summary["per_class"])


@pytest.mark.slow
def test_clip_run(clip_store, make_config):
    config = make_config(clip_store, student="lstm/small", batch_size=3, epochs=1, workers=2)
    summary = run_training(config)
    assert summary["task"] == "sequence"
    assert {"top1", "macro_f1", "cosine"} <= set(summary["metrics"])
    line = json.loads((config.out / "metrics.jsonl").read_text())
    assert line["feature_loss"] > 0
    assert line["logit_loss"] is None


def test_clips_see_the_frames_that_the_teacher_saw(clip_store):
    store = open_store(clip_store)
    split = store["train"]
    places, per_row = clip_places(split, store.manifest)
    assert places.tolist() == [2, 3, 2, 3, 2, 3]
    assert per_row == 2
    reader = ClipReader(split, clip_store.parent / "clips", places, per_row)
    assert [len(reader.read(row)) for row in (0, 1)] == [4, 6]
    lengths = torch.tensor([4, 6])
    found = gather_frames(split, np.array([0, 1]), lengths)
    stored = split.ragged(np.array([0, 1]), "features/frames/values")
    expected = torch.from_numpy(stored[0])[[0, 0, 1, 1]]
    assert torch.equal(found["frames"][0, :4], expected), "a pair's row repeats for both of its frames"
    assert found["frame_mask"].tolist() == [[1, 1, 1, 1, 0, 0], [1] * 6]
    (clip_store.parent / "clips" / split.keys[2] / "0.png").write_bytes(b"other")
    with pytest.raises(TrainError, match=r"clip train/clip2: changed since the store was made"):
        reader.read(2)


def test_label_free_run_starts_a_later_one(make_store, make_config, tmp_path):
    config = make_config(make_store("plain.zarr", labels=False), task="features", out=tmp_path / "free")
    summary = run_training(config)
    assert "cosine" in summary["metrics"]
    assert "knn_top1" not in summary["metrics"]
    # The backbone is a plain timm model's, by its own names.
    state = load_checkpoint(config.out / "best.pt")["model_state_dict"]
    plain = timm.create_model("test_resnet", num_classes=0)
    plain.load_state_dict(state, strict=True)
    later = make_config(
        make_store("labelled.zarr"), student_path=config.out / "best.pt", out=tmp_path / "later", epochs=1
    )
    assert run_training(later)["metrics"]["top1"] >= 0
    started = json.loads((later.out / "config.json").read_text())["resolved"]["initial_weights"]
    assert started.endswith("best.pt")


@pytest.mark.slow
def test_label_free_run_with_labels_reports_knn_and_probe(make_store, make_config):
    summary = run_training(make_config(make_store(train=40, val=20), task="features", epochs=3))
    assert summary["num_classes"] == 0
    assert 0 <= summary["metrics"]["knn_top1"] <= 1
    assert summary["metrics"]["probe_top1"] > 0.5, "features of three plain colours tell the classes apart"


def test_evaluate_gives_the_best_epochs_metrics(make_store, make_config):
    config = make_config(make_store(logits=True, val=13), ema_decay=0.5, epochs=3)
    summary = run_training(config)
    measured = evaluate_run(config.out, config.store, device="cpu", workers=0, batch_size=4)
    assert measured["samples"] == 13
    assert measured["metrics"]["top1"] == pytest.approx(summary["metrics"]["top1"])
    assert measured["metrics"]["macro_f1"] == pytest.approx(summary["metrics"]["macro_f1"])
    student, _ = load_student_from_run(config.out)
    assert not student.training


def test_evaluate_refuses_other_classes(make_store, make_config):
    config = make_config(make_store(), epochs=1)
    run_training(config)
    other = make_store("other.zarr", masks=True)
    with pytest.raises(TrainError, match="other classes than the student was trained on"):
        evaluate_run(config.out, other, device="cpu")
    with pytest.raises(
        TrainError, match="this student was trained for classification: name a store for that"
    ):
        evaluate_run(config.out, make_store("unlabelled.zarr", labels=False), device="cpu")
    with pytest.raises(TrainError, match=r"no split foo, it has train, val: name one with --split$"):
        evaluate_run(config.out, config.store, split="foo", device="cpu")


@pytest.mark.slow
def test_distillation_helps_where_labels_are_few(make_store, make_config):
    """Not a benchmark: with one label in eight the stored features must carry the student."""
    store = make_store(train=64, val=48, unlabelled=tuple(range(1, 8)))
    summary = run_training(
        make_config(store, epochs=6, control=True, augment="photometric", learning_rate=3e-3, seed=1)
    )
    assert summary["metrics"]["top1"] > 0.5
    assert summary["metrics"]["cosine"] > 0.2
