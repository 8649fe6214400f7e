"""`--distill-layers`: which maps of a student learn which layers of the teacher, for every family."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from store.reader import open_store
from train.checkpoint import load_checkpoint
from train.distill.levels import detector_levels, parse_levels
from train.errors import ConfigError
from train.run import run_training
from train.students.build import build_student

LAYERS = {8: (8, 5), 16: (4, 7)}  # side and width


def test_levels_name_the_teachers_layer() -> None:
    assert parse_levels("p3:8,P4: 16 ,p5:last") == {"P3": 8, "P4": 16, "P5": None}
    assert parse_levels("5:8,last") == {"5": 8, "LAST": None}


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("P3:first", "got P3:first"),
        ("P3:-1", "got P3:-1"),
        ("P3:8:9", "got P3:8:9"),
        (":8", "got :8"),
        (",", "got none"),
        ("P3:8,p3:16", "level P3 is named twice"),
    ],
)
def test_what_is_no_list_of_levels(text: str, part: str) -> None:
    with pytest.raises(ConfigError, match=part):
        parse_levels(text)


def test_levels_of_detectors() -> None:
    assert detector_levels(None, "yolov8/n") == {"P5": None}
    assert detector_levels(None, "yolov8/n", {23, 7, 15}) == {"P3": 7, "P4": 15, "P5": None}
    assert detector_levels(None, "yolov8/n", {3, 2}) == {"P3": 2, "P4": 3, "P5": None}
    assert detector_levels(None, "yolov8/n", {4}) == {"P3": 4, "P4": 4, "P5": None}
    assert detector_levels("P4", "yolov8/n", {7}) == {"P4": None}
    with pytest.raises(ConfigError, match="yolov8/n has no level P6, it has P3, P4, P5"):
        detector_levels("P6", "yolov8/n")


@pytest.mark.parametrize(
    ("name", "levels", "modules"),
    [
        ("timm:test_resnet", ("P4", "P2", "P5"), ("layer3", "layer1", "layer4")),
        ("timm:test_vit", ("4", "1", "LAST"), ("blocks.4", "blocks.1", "norm")),
        ("timm:test_efficientnet", ("P3", "P5"), ("blocks.2", "bn2")),
        ("unet/small", ("P2", "P4", "P0"), ("decoder.1", "encoder.4", "decoder.3")),
    ],
)
def test_levels_are_the_outputs_of_the_layers_that_they_name(
    name: str, levels: tuple[str, ...], modules: tuple[str, ...]
) -> None:
    torch.manual_seed(0)
    student = build_student(name, num_classes=3, image_size=96).eval()
    images = torch.randn(2, 3, 96, 96)
    plain = student(images)
    assert plain.levels == ()
    student.choose_levels(levels)
    model: Any = getattr(student, "model", student)
    seen: dict[str, torch.Tensor] = {}
    for module in modules:
        model.get_submodule(module).register_forward_hook(
            lambda _module, _inputs, output, module=module: seen.__setitem__(module, output)
        )
    out = student(images)
    assert torch.equal(out.logits, plain.logits)
    assert torch.equal(out.features, plain.features)
    for level, module, got in zip(levels, modules, out.levels, strict=True):
        expected = seen[module]
        if expected.ndim == 3:  # tokens, the class token first
            expected = expected[:, 1:].transpose(1, 2).unflatten(2, (6, 6))
        if expected.shape[-1] > 32:
            factor = 1 << (-(-expected.shape[-1] // 32) - 1).bit_length()  # a power of two
            expected = torch.nn.functional.avg_pool2d(expected, factor)
        assert got.shape[1] == student.level_width(level)
        assert torch.equal(got, expected)


@pytest.mark.parametrize(
    ("student", "text", "levels", "cells"),
    [
        ("timm:test_resnet", "p3:8,p4:16,p5:last", [("P3", 8), ("P4", 16)], True),
        ("timm:test_resnet", "p5:16", [("P5", 16)], False),
        ("timm:test_vit", "2:8,last", [("2", 8)], True),
        ("unet/small", "p1:8,p4:16", [("P1", 8), ("P4", 16)], False),
    ],
)
def test_each_level_learns_its_layer(
    make_store: Any,
    make_config: Any,
    monkeypatch: pytest.MonkeyPatch,
    student: str,
    text: str,
    levels: list[tuple[str, int]],
    cells: bool,
) -> None:
    """Targets are the layer's own, standardized and carried to the level's cells; heads have the layer's width."""
    from train.distill.objective import Objective

    seen: list[Any] = []
    plain = Objective.losses

    def losses(self: Objective, output: Any, batch: Any, targets: Any, *rest: Any) -> Any:
        terms = plain(self, output, batch, targets, *rest)
        seen.append((self, output, batch, targets, terms))
        return terms

    monkeypatch.setattr(Objective, "losses", losses)
    path = make_store(layers=LAYERS, masks=student.startswith("unet"))
    config = make_config(path, student=student, epochs=1, augment="none", distill_layers=text, image_size=64)
    run_training(config)
    split = open_store(path)["train"]
    objective, output, batch, targets, terms = seen[0]
    assert objective.plan.levels == tuple(levels)
    assert objective.plan.cells == cells == (output.cells is not None)
    assert terms["feature_loss"] > 0
    for (_, layer), mapped, (target, weight) in zip(levels, output.levels, targets.levels, strict=True):
        side, width = LAYERS[layer]
        assert mapped.shape == target.shape == (*weight.shape, width)
        name = f"features/grid@{layer}"
        stored = torch.from_numpy(split.gather(batch.rows, [name])[name]).float()
        standardized = (stored - torch.from_numpy(split.statistics[name].mean)) / torch.from_numpy(
            split.statistics[name].std
        )
        if target.shape[1] == side:
            torch.testing.assert_close(target, standardized, atol=1e-2, rtol=1e-2)
        elif target.shape[1] < side and side % target.shape[1] == 0:
            small = torch.nn.functional.adaptive_avg_pool2d(standardized.permute(0, 3, 1, 2), target.shape[1])
            torch.testing.assert_close(target, small.permute(0, 2, 3, 1), atol=1e-2, rtol=1e-2)
        assert (weight == batch.weight.view(-1, 1, 1)).all()
    heads = load_checkpoint(config.out / "last.pt")["training"]["level_heads"]
    widths = [value.shape[0] for key, value in heads.items() if key.endswith("bias")]
    assert widths == [LAYERS[layer][1] for _, layer in levels]


@pytest.mark.parametrize("exact_flip", [False, True])
def test_layers_of_views_belong_to_the_view_that_is_shown(
    make_store: Any, make_config: Any, monkeypatch: pytest.MonkeyPatch, exact_flip: bool
) -> None:
    """Recorded views, and mirror images: the layer's grid is that of what the student sees."""
    from train.data.views import AUGMENTATIONS, Augmentation
    from train.distill.objective import Objective

    seen: list[Any] = []
    plain = Objective.prepare

    def prepare(self: Objective, batch: Any) -> Any:
        targets = plain(self, batch)
        if self.plan.recorded or self.plan.exact_flip:
            seen.append((self, batch, targets))
        return targets

    monkeypatch.setattr(Objective, "prepare", prepare)
    monkeypatch.setitem(AUGMENTATIONS, "full", Augmentation(flip_probability=0.5))
    path = make_store(layers={8: (8, 5)}, views=2, exact_flip=exact_flip)
    run_training(make_config(path, epochs=1, distill_layers="p3:8,p5", image_size=64))
    split = open_store(path)["train"]
    assert seen
    for objective, batch, targets in seen:
        stored = split.gather(batch.rows, ["features/grid@8", "views/grid@8"])
        if exact_flip:
            mirrored = stored["views/grid@8"][:, 0]
            expected = np.where(batch.flipped[:, None, None, None], mirrored, stored["features/grid@8"])
        else:
            expected = stored["views/grid@8"][np.arange(len(batch)), batch.recorded]
        standardize = objective.standardizers["level0"]
        torch.testing.assert_close(
            targets.levels[0][0], standardize(torch.from_numpy(expected)), atol=1e-3, rtol=1e-3
        )


def test_other_students_learn_the_last_layer_by_default(make_store: Any, make_config: Any) -> None:
    """A store with several layers trains as one without them."""
    weights = []
    for number, layers in enumerate((None, LAYERS)):
        store = make_store(f"{number}.zarr", layers=layers)
        config = make_config(store, out=store.with_suffix(".run"), epochs=1)
        run_training(config)
        weights.append(load_checkpoint(config.out / "best.pt")["model_state_dict"])
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_an_interrupted_run_of_several_levels_equals_a_whole_one(
    make_store: Any, make_config: Any, tmp_path: Any
) -> None:
    from processes.stop import Stopped
    from tests.test_train.test_resume import StopAfter, assert_same_run

    options = {"distill_layers": "p3:8,p5:16", "epochs": 2, "ema_decay": 0.9}
    store = make_store(layers=LAYERS)
    run_training(make_config(store, **options, out=tmp_path / "whole"))
    with pytest.raises(Stopped):
        run_training(make_config(store, **options, out=tmp_path / "parts"), stop=StopAfter(2))
    run_training(make_config(store, **options, out=tmp_path / "parts", resume=True))
    assert_same_run(tmp_path / "whole", tmp_path / "parts")
    one, other = (
        load_checkpoint(tmp_path / run / "last.pt")["training"]["level_heads"] for run in ("whole", "parts")
    )
    assert len(one) == 4
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize(
    ("student", "text", "levels", "cells"),
    [
        ("timm:test_resnet", None, (), True),
        ("unet/small", None, (("P0", None),), True),
        ("yolov8/n", None, (("P3", 8), ("P4", 16)), True),
        ("yolov8/n", "p4:16", (("P3", None), ("P4", 16)), True),
        ("yolov8/n", "p5:16", (("P3", None), ("P4", None), ("P5", 16)), False),
    ],
)
def test_what_label_free_students_learn(
    make_store: Any, make_config: Any, student: str, text: str | None, levels: Any, cells: bool
) -> None:
    """YOLOv8's phase one teaches the whole neck."""
    from train.distill.resolve import resolve_features

    path = make_store(layers=LAYERS)
    config = make_config(path, student=student, task="features", distill_layers=text)
    built = build_student(student, num_classes=0, image_size=32)
    plan = resolve_features(config, open_store(path)["train"], "features", built, [])
    assert (plan.pooled, plan.cells, plan.levels) == (True, cells, levels)
    built.choose_levels([level for level, _ in plan.levels])
    maps = built(torch.zeros(2, 3, 32, 32)).levels
    assert [each.shape[1] for each in maps] == [built.level_width(level) for level, _ in levels]


def test_label_free_unets_rest_what_no_level_needs(make_store: Any, make_config: Any) -> None:
    path = make_store(layers=LAYERS)
    config = make_config(path, student="unet/small", task="features", epochs=1, distill_layers="p3:8,p4")
    before = build_student("unet/small", num_classes=0, image_size=32)
    run_training(config)
    student = build_student("unet/small", num_classes=0, image_size=32, student_path=config.out)
    student.choose_levels(("P3",))
    student.rest_levels()
    frozen = {name for name, value in student.named_parameters() if not value.requires_grad}
    assert {name.split(".")[1] for name in frozen} == {"1", "2", "3"}
    assert not any(name.startswith("encoder") for name in frozen)
    assert before.parameter_count() == student.parameter_count()


@pytest.mark.parametrize(
    ("made", "options", "part"),
    [
        ({}, {"distill_layers": "p9"}, r"timm:test_resnet has no level P9, it has P1, P2, P3, P4, P5"),
        ({}, {"distill_layers": "p3:9"}, r"has no layer 9, it has 8, 16, last: extract with --layers 9"),
        (
            {"layers": None},
            {"distill_layers": "p3:8"},
            r"has no layer 8, it has last: extract with --layers 8",
        ),
        ({"layers": None, "grid": 0}, {"distill_layers": "p3"}, r"needs a store with a grid"),
        ({}, {"distill_layers": "p3", "feature_target": "pooled"}, r"--feature-target auto, grid or both"),
        ({}, {"distill_layers": "p3", "feature_loss_type": "relation"}, r"other than relation"),
        (
            {},
            {"distill_layers": "p3:8", "task": "features", "feature_target": "grid"},
            r"nothing would teach the layers behind it: add P5",
        ),
        (
            {},
            {"distill_layers": "p3", "student": "timm:test_vit"},
            r"has no level P3, it has 0, 1, 2, 3, 4, 5, LAST",
        ),
        (
            {},
            {"distill_layers": "p3", "student": "lstm/small"},
            r"distill_layers is an option of resnet, vit, timm",
        ),
    ],
)
def test_what_cannot_be_distilled(
    make_store: Any, make_config: Any, made: dict[str, Any], options: dict[str, Any], part: str
) -> None:
    store = make_store(**{"layers": LAYERS, **made})
    with pytest.raises(ConfigError, match=part):
        run_training(make_config(store, **options))
