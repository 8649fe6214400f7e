"""The distillation term of YOLO students: what it compares, how it is scaled, and that it changes nothing else."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from store.reader import open_store
from tests.test_train.yolo_runs import make_config
from train.distill.projector import TargetStandardizer

pytest.importorskip("ultralytics")
WIDTH = 6


def one_image_targets(grid: np.ndarray) -> Any:
    """Targets of a single square image with the stored `grid` [g, g, D]."""
    from train.yolo.targets import TeacherTargets

    return TeacherTargets(
        lambda rows, _flipped, _device: torch.from_numpy(grid[None].repeat(len(rows), 0)),
        np.array([[64, 64]]),
        TargetStandardizer(np.zeros(grid.shape[-1]), np.ones(grid.shape[-1])),
        resize="squash",
        teacher_size=(64, 64),
    )


def shifted_batch(images: int) -> dict[str, Tensor]:
    """Training images of 64 pixels whose left half shows the right half of the source; the rest shows nothing."""
    from train.yolo.geometry import UNIT_SQUARE, Placement, packed_placements

    rows, values = packed_placements([Placement(0, UNIT_SQUARE * 64 - (32, 0))], 64, 64)
    return {
        "img": torch.zeros(images, 3, 64, 64),
        "source_rows": torch.from_numpy(rows).repeat(images, 1),
        "source_placements": torch.from_numpy(values).repeat(images, 1, 1),
        "bboxes": torch.tensor([[0.125, 0.5, 0.2, 0.9]]),
        "batch_idx": torch.zeros(1),
        "cls": torch.zeros(1, 1),
    }


def build_distillation(**settings: Any) -> Any:
    from train.yolo.model import Distillation

    options: dict[str, Any] = {"kind": "mse", "foreground": 1.0, "align": False, "align_head": "linear"}
    weights = {"hard_weight": 1.0, "soft_weight": 1.0}
    return Distillation({"P5": WIDTH}, {"P5": WIDTH}, **{**options, **weights, **settings})


def test_each_level_learns_its_own_layer() -> None:
    """Layers of different widths: the distance is 0 where each level's map is what its own layer says."""
    from train.yolo.model import Distillation

    noise = np.random.default_rng(1)
    grids = {"P3": noise.normal(size=(4, 4, 3)), "P5": noise.normal(size=(2, 2, WIDTH))}
    targets = {level: one_image_targets(grid.astype(np.float32)) for level, grid in grids.items()}
    widths = {"P3": 3, "P5": WIDTH}
    weights = {"hard_weight": 1.0, "soft_weight": 1.0, "foreground": 1.0}
    term = Distillation(widths, widths, kind="mse", align=False, align_head="linear", **weights)
    batch = shifted_batch(2)
    maps = [
        targets["P3"].at(batch, 8, 8)[0].permute(0, 3, 1, 2),
        torch.zeros(2, 1, 4, 4),
        targets["P5"].at(batch, 2, 2)[0].permute(0, 3, 1, 2),
    ]
    assert term(maps, batch, targets) == 0
    assert term([maps[0] + 1, *maps[1:]], batch, targets) == pytest.approx(0.5)


@pytest.fixture
def grid() -> np.ndarray:
    return np.random.default_rng(0).normal(size=(4, 4, WIDTH)).astype(np.float32)


def maps_of(values: Tensor) -> list[Tensor]:
    """P3, P4, P5, of which only P5 is distilled here."""
    return [torch.zeros(0), torch.zeros(0), values]


@pytest.mark.parametrize("kind", ["mse", "cosine", "smooth_l1"])
def test_cells_outside_every_image_have_no_influence(grid: np.ndarray, kind: str) -> None:
    values = torch.randn(2, WIDTH, 4, 4, requires_grad=True)
    distillation, targets, batch = build_distillation(kind=kind), one_image_targets(grid), shifted_batch(2)
    loss = distillation(maps_of(values), batch, {"P5": targets})
    loss.backward()
    assert values.grad is not None
    assert torch.equal(values.grad[..., 2:], torch.zeros(2, WIDTH, 4, 2))  # no source on the right
    assert (values.grad[..., :2].abs().amax(1) > 0).all()
    with torch.no_grad():
        changed = values.clone()
        changed[..., 2:] = float("nan")
        assert torch.equal(distillation(maps_of(changed), batch, {"P5": targets}), loss)


def test_the_term_is_the_mean_distance_to_the_teacher_under_each_cell(grid: np.ndarray) -> None:
    values = torch.randn(1, WIDTH, 4, 4)
    loss = build_distillation()(maps_of(values), shifted_batch(1), {"P5": one_image_targets(grid)})
    under = torch.from_numpy(grid)[:, 2:]  # the source's right half, seen in the left two columns
    assert loss == pytest.approx(float((values[0].permute(1, 2, 0)[:, :2] - under).square().mean()), rel=1e-5)


def test_foreground_weights_are_weights_of_the_mean(grid: np.ndarray) -> None:
    values = torch.randn(1, WIDTH, 4, 4)
    batch, targets = shifted_batch(1), one_image_targets(grid)
    found = build_distillation(foreground=3.0)(maps_of(values), batch, {"P5": targets})
    difference = values[0].permute(1, 2, 0)[:, :2] - torch.from_numpy(grid)[:, 2:]
    distance = difference.square().mean(-1)  # [4, 2]: the box covers the first column
    expected = (3 * distance[:, 0].sum() + distance[:, 1].sum()) / (3 * 4 + 4)
    assert found == pytest.approx(float(expected), rel=1e-5)


def test_mixed_precision_leaves_the_geometry_exact(grid: np.ndarray) -> None:
    """Autocast would round the products that place cells to eight bits."""
    from train.yolo.geometry import Placement, packed_placements

    corners = np.array([[-7.3, 3.1], [52.9, -11.7], [70.2, 55.4], [4.6, 66.8]])
    rows, values = packed_placements([Placement(0, corners)], 64, 64)
    batch = {
        "source_rows": torch.from_numpy(rows)[None],
        "source_placements": torch.from_numpy(values)[None],
    }
    targets = one_image_targets(grid)
    exact = targets.at(batch, 8, 8)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = targets.at(batch, 8, 8)
    assert all(torch.equal(*pair) for pair in zip(exact, mixed, strict=True))


# In the network --------------------------------------------------------------------------------------------------


def arguments() -> SimpleNamespace:
    from ultralytics.cfg import get_cfg

    return get_cfg(overrides={"imgsz": 64})


def distilled_network(targets: Any, **settings: Any) -> Any:
    from train.students.yolo import build_network, level_widths
    from train.yolo.model import DistilledDetectionModel
    from train.yolo.targets import LevelTargets

    torch.manual_seed(0)
    network = build_network("n", 2, DistilledDetectionModel)
    network.args = arguments()
    widths = level_widths(network)
    from train.yolo.model import Distillation

    options: dict[str, Any] = {"kind": "mse", "foreground": 1.0, "align": True, "align_head": "linear"}
    weights = {"hard_weight": 0.25, "soft_weight": 3.0}
    network.attach(
        Distillation({"P5": widths[2]}, {"P5": WIDTH}, **options, **weights, **settings),
        (LevelTargets({"P5": targets}),) * 2,
    )
    return network


def test_the_term_is_scaled_and_listed_as_ultralytics_does_with_its_own(grid: np.ndarray) -> None:
    """Its `DistillationModel` appends the term, times the batch size, to the losses and names it dis_loss."""
    from ultralytics.nn.distill_model import DistillationModel

    from train.students.yolo import build_network

    batch = shifted_batch(3)
    network = distilled_network(one_image_targets(grid)).train()
    loss, items = network(batch)
    detached = {name: float(value) for name, value in items.items()}
    scaled = [0.25 * 3 * detached[name] for name in ("box_loss", "cls_loss", "dfl_loss")]
    assert loss.tolist() == pytest.approx([*scaled, 3.0 * 3 * detached["dis_loss"]], rel=1e-4)

    plain = [build_network("n", 2) for _ in range(2)]
    for model in plain:
        model.args = arguments()
    theirs = DistillationModel(teacher_model=plain[0], student_model=plain[1]).train()
    their_loss, their_items = theirs(batch)
    assert list(items) == list(their_items)
    assert loss.shape == their_loss.shape
    assert float(their_loss[-1].detach()) == pytest.approx(3 * float(their_items["dis_loss"]), rel=1e-4)


def test_distilled_and_control_start_from_the_same_weights(yolo_store: Path, tmp_path: Path) -> None:
    from train.yolo.job import build_job

    networks = [
        build_job(
            make_config(yolo_store, tmp_path, distillation_type=kind), tmp_path, open_store(yolo_store), None
        ).student.network.state_dict()
        for kind in ("feature", "none")
    ]
    distilled = {name: value for name, value in networks[0].items() if not name.startswith("distillation.")}
    assert distilled.keys() == networks[1].keys()
    assert all(torch.equal(value, networks[1][name]) for name, value in distilled.items())
