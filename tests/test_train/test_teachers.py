"""`--teachers a,b`: features of several teachers, a head for each, losses in equal parts."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from processes.stop import Stopped, StopRequest
from store.errors import StoreError
from store.reader import open_store
from tests.test_train.several_teachers import add_teacher
from train.checkpoint import load_checkpoint
from train.data.splits import resolve_data, resolve_task
from train.distill.projector import Aligned
from train.errors import ConfigError
from train.events import EpochEnded, Event
from train.loop.assemble import Built, build_training
from train.loop.machine import build_accelerator
from train.run import run_training

BOTH = "synthetic,second"


def build(config: Any) -> Built:
    store, *others = [open_store(config.store).of_teacher(name) for name in config.teacher_names]
    data = resolve_data(config, store, resolve_task(config), others)
    return build_training(config, store, data, build_accelerator(config), StopRequest())


@pytest.mark.parametrize("target", ["auto", "pooled", "both"])
def test_the_loss_is_the_mean_of_the_teachers(target: str, make_store: Any, make_config: Any) -> None:
    store = add_teacher(make_store())
    terms: dict[str, float] = {}
    for names in (BOTH, "synthetic", "second"):
        built = build(make_config(store, teachers=names, feature_target=target, augment="full"))
        parts = built.parts
        if names == BOTH:
            state, heads = parts.module.student.state_dict(), list(parts.module.others)
            first = parts.module.projector.state_dict()
        else:
            parts.module.student.load_state_dict(state)
            parts.module.projector.load_state_dict(
                first if names == "synthetic" else heads[0].projector.state_dict()
            )
        module = parts.module.eval()
        batch = next(parts.train_loader.epoch(0))
        targets = parts.objective.prepare(batch)
        output = module(parts.normalize(batch.images))
        losses = parts.objective.losses(output, batch, targets, targets.counts)
        terms[names] = float(losses["feature_loss"].detach())
        assert "hard_loss" in losses
    assert terms[BOTH] == pytest.approx((terms["synthetic"] + terms["second"]) / 2, rel=1e-5)
    assert terms["synthetic"] != pytest.approx(terms["second"], rel=1e-2)
    assert heads[0].projector.layers.out_features == 20


def test_targets_of_each_teacher_are_standardized_and_follow_the_view(
    make_store: Any, make_config: Any
) -> None:
    store = add_teacher(make_store(train=64))
    parts = build(
        make_config(store, teachers=BOTH, augment="none", batch_size=64, feature_target="both")
    ).parts
    batch = next(parts.train_loader.epoch(0))
    targets = parts.objective.prepare(batch)
    for found, width in ((targets, 24), (targets.others[0], 20)):
        cells = found.cells.flatten(0, 2)
        assert cells.shape[-1] == width
        assert cells.mean(0).abs().max() < 0.2
        assert found.pooled.shape == (64, width)


def weights(run: Path) -> dict[str, torch.Tensor]:
    last, best = load_checkpoint(run / "last.pt"), load_checkpoint(run / "best.pt")
    found = {**last["model_state_dict"], **last["training"]["others"]}
    found |= {f"head.{name}": value for name, value in last["alignment_head"].items()}
    return found | {f"best.{name}": value for name, value in best["others"].items()}


def test_an_interrupted_run_equals_an_uninterrupted_one(
    make_store: Any, make_config: Any, tmp_path: Path
) -> None:
    store = add_teacher(make_store(), invalid=(3,))
    options = {"teachers": BOTH, "epochs": 2, "align_head": "mlp"}
    whole = make_config(store, out=tmp_path / "whole", **options)
    summary = run_training(whole)
    stop = StopRequest()

    def stop_after_one(event: Event) -> None:
        if isinstance(event, EpochEnded) and event.record["epoch"] == 1:
            stop.set()

    halved = make_config(store, out=tmp_path / "halved", **options)
    with pytest.raises(Stopped):
        run_training(halved, [stop_after_one], stop)
    resumed = run_training(make_config(store, out=tmp_path / "halved", resume=True, **options))
    before, after = weights(tmp_path / "whole"), weights(tmp_path / "halved")
    assert before.keys() == after.keys()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert resumed["metrics"] == summary["metrics"]

    assert summary["store"]["teachers"] == {"synthetic": "0", "second": "print of second"}
    recorded = json.loads((tmp_path / "whole" / "config.json").read_text())
    assert recorded["options"]["teachers"] == BOTH
    assert list(recorded["resolved"]["other_teachers"]) == ["second"]
    assert any("1 of 24 samples of train" in note for note in summary["notes"])
    with pytest.raises(ConfigError, match="other options than the run was started with: teachers"):
        run_training(
            make_config(store, out=tmp_path / "halved", resume=True, **{**options, "teachers": "second"})
        )


@pytest.mark.parametrize(
    ("student", "options"),
    [
        ("unet/small", {}),
        ("timm:test_vit", {"feature_loss_type": "relation", "image_size": 32}),
        ("timm:test_resnet", {"task": "features"}),
        ("timm:test_resnet", {"pretrain_epochs": 1}),
    ],
)
def test_students_of_every_kind_learn_from_both(
    student: str, options: dict[str, Any], make_store: Any, make_config: Any, tmp_path: Path
) -> None:
    store = add_teacher(make_store(masks=student == "unet/small"))
    summary = run_training(make_config(store, student=student, teachers=BOTH, epochs=1, **options))
    assert list(summary["store"]["teachers"]) == ["synthetic", "second"]
    others = load_checkpoint(tmp_path / "run" / "best.pt")["others"]
    assert {name.partition(".")[0] for name in others} == {"0"}


def test_clips_learn_from_both(clip_store: Path, make_config: Any, tmp_path: Path) -> None:
    summary = run_training(
        make_config(add_teacher(clip_store), student="lstm/small", teachers=BOTH, epochs=1, batch_size=3)
    )
    assert list(summary["store"]["teachers"]) == ["synthetic", "second"]
    record = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[0])
    assert record["feature_loss"] > 0


def test_a_further_teacher_alone(make_store: Any, make_config: Any, tmp_path: Path) -> None:
    store = add_teacher(make_store(logits=True))
    summary = run_training(make_config(store, teachers="second", epochs=1))
    assert summary["store"]["teacher"] == "other"
    assert summary["store"]["teachers"] == {"second": "print of second"}
    best = load_checkpoint(tmp_path / "run" / "best.pt")
    assert best["teacher"] == "print of second"
    assert best["alignment_head"]["layers.weight"].shape[0] == 20


@pytest.mark.parametrize(
    ("options", "error", "problem"),
    [
        ({"teachers": "third"}, StoreError, "no teacher 'third'; it has synthetic, second"),
        ({"teachers": "second,second"}, ConfigError, "a teacher is named twice"),
        ({"teachers": BOTH, "distillation_type": "logit"}, ConfigError, "learns no features: name one"),
    ],
)
def test_bad_choices(
    options: dict[str, Any],
    error: type[Exception],
    problem: str,
    make_store: Any,
    make_config: Callable[..., Any],
) -> None:
    store = add_teacher(make_store(logits=True))
    with pytest.raises(error, match=problem):
        run_training(make_config(store, **options))


def test_alignment_is_that_of_each_head(make_store: Any, make_config: Any) -> None:
    parts = build(make_config(add_teacher(make_store()), teachers="second+synthetic")).parts
    batch = next(parts.train_loader.epoch(0))
    output = parts.module.eval()(parts.normalize(batch.images))
    assert isinstance(output.others[0], Aligned)
    assert output.cells.shape[-1] == 20
    assert output.others[0].cells.shape[-1] == 24


def test_the_report_names_teachers_where_the_first_is_not_alone(tmp_path: Path) -> None:
    from train.report.build import teachers_text
    from train.report.runs import Collection, FinishedRun

    def run(name: str, *teachers: str) -> FinishedRun:
        store = {"teacher": "qwen2.5-vl", "teachers": dict.fromkeys(teachers, "print")}
        return FinishedRun("sweep", name, tmp_path, {"store": store}, {}, [], False, {})

    assert teachers_text(Collection([run("a", "qwen2.5-vl")], [])) == ""
    text = teachers_text(Collection([run("a", "qwen2.5-vl"), run("b", "qwen2.5-vl", "dino")], []))
    assert text == "Teachers: a: qwen2.5-vl; b: qwen2.5-vl, dino."
