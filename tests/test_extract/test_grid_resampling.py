"""The stored grid: exact area averages, and stores that were made by the older rule."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from extract.encode import resample_grid
from extract.plan import DifferentStore
from extract.verify import audit_store
from store.reader import open_store
from tests.test_extract.extractions import extract, interrupt, true_features

FINE = 3360  # a multiple of every side below


@pytest.mark.parametrize(
    ("h", "w", "side"), [(16, 16, 7), (16, 16, 5), (16, 20, 8), (7, 12, 4), (3, 3, 2), (16, 16, 15)]
)
def test_each_cell_is_the_mean_over_its_part_of_the_image(h: int, w: int, side: int) -> None:
    """Against the plain definition: every teacher cell drawn as many equal points, averaged part by part."""
    grid = torch.randn(2, h, w, 3, generator=torch.Generator().manual_seed(0))
    rows, columns = (torch.arange(FINE) * cells // FINE for cells in (h, w))
    along_rows = grid.double()[:, rows].view(2, side, FINE // side, w, 3).mean(dim=2)
    expected = along_rows[:, :, columns].view(2, side, side, FINE // side, 3).mean(dim=3)
    assert torch.allclose(resample_grid(grid, side).double(), expected, atol=1e-6)


@pytest.mark.parametrize("side", [3, 7, 11, 15])
def test_a_cell_is_nearer_to_its_center_than_by_adaptive_pooling(side: int) -> None:
    """A linear ramp tells where a cell's mean is. Less than a teacher's cell cannot be told apart."""
    positions = (torch.arange(16) + 0.5) / 16
    ramp = positions[None, :, None, None].expand(1, 16, 16, 1)
    centers = (torch.arange(side) + 0.5) / side
    area, adaptive = (
        float((resample_grid(ramp, side, area=area)[0, :, 0, 0] - centers).abs().max())
        for area in (True, False)
    )
    assert area < 0.4 * adaptive
    assert area < 0.1 / 16


@pytest.mark.parametrize("side", [1, 2, 4, 8, 16, 20])
def test_sides_that_divide_the_teachers_keep_their_bits(side: int) -> None:
    grid = torch.randn(2, 16, 16, 3, generator=torch.Generator().manual_seed(0))
    assert torch.equal(resample_grid(grid, side), resample_grid(grid, side, area=False))


def test_the_image_mean_is_kept() -> None:
    grid = torch.randn(2, 16, 16, 3, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(resample_grid(grid, 7).mean(dim=(1, 2)), grid.mean(dim=(1, 2)), atol=1e-6)


def test_resampling_runs_on_a_device_without_data() -> None:
    assert resample_grid(torch.zeros(2, 16, 16, 3, device="meta"), 7).device.type == "meta"


class TestStores:
    """The teacher sees 2 × 2 cells at 64 pixels; 96 pixels give 3 × 3, which 2 does not divide."""

    @pytest.fixture
    def options(self, extract_options: dict[str, Any]) -> dict[str, Any]:
        return {**extract_options, "image_size": 96, "grid": 2}

    @pytest.fixture
    def old_rule(self, monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
        """Extraction as it was: adaptive pooling, nothing recorded."""
        monkeypatch.setattr("extract.plan.averages_unevenly", lambda *sizes: False)
        monkeypatch.setattr("extract.encode.averages_unevenly", lambda *sizes: False)
        return monkeypatch

    def test_the_rule_is_recorded_where_it_matters(self, options: dict[str, Any]) -> None:
        extract(options)
        store = open_store(options["out"])
        assert store.manifest.options["grid_resampling"] == "area"
        extract(options, out=Path(options["out"]).with_name("native"), grid="native")
        assert "grid_resampling" not in open_store(Path(options["out"]).with_name("native")).manifest.options

    def test_the_stored_grid_is_the_area_average(self, options: dict[str, Any]) -> None:
        extract(options)
        extract(options, out=Path(options["out"]).with_name("native"), grid="native")
        native = torch.from_numpy(
            true_features(open_store(Path(options["out"]).with_name("native")), "train", "features/grid")
        )
        fine = F.interpolate(native.permute(0, 3, 1, 2), scale_factor=2, mode="nearest")
        expected = F.avg_pool2d(fine, 3).permute(0, 2, 3, 1).numpy()
        stored = true_features(open_store(options["out"]), "train", "features/grid")
        np.testing.assert_allclose(stored, expected, rtol=5e-3, atol=5e-3)

    def test_a_store_begun_by_the_old_rule_is_not_mixed(
        self, options: dict[str, Any], old_rule: pytest.MonkeyPatch
    ) -> None:
        interrupt(options, rows=16)
        old_rule.undo()
        with pytest.raises(DifferentStore, match=r"grid_resampling.*--overwrite"):
            extract(options)

    def test_a_complete_store_of_the_old_rule_opens_and_verifies(
        self, options: dict[str, Any], old_rule: pytest.MonkeyPatch
    ) -> None:
        extract(options)
        old_rule.undo()
        assert open_store(options["out"]).manifest.options == {}
        audit = audit_store(options["out"], options["teacher_path"], device="cpu", samples=4)
        assert audit.findings == []
