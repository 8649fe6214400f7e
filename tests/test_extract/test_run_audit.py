"""`cli verify --teacher-path` and `cli inspect --pictures` on stores made by the pipeline."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from commands.pictures import principal_colors, write_pictures
from extract.config import load_config
from extract.run import run_extraction
from extract.verify import NoImages, audit_store, cosines
from store.errors import StoreError


@pytest.fixture
def made(extract_options: dict[str, Any], tmp_path: Path) -> dict[str, Any]:
    """A store with grids, made from a copy of the digits."""
    shutil.copytree(extract_options["data"], tmp_path / "data")
    options = {**extract_options, "data": str(tmp_path / "data"), "grid": "native"}
    run_extraction(load_config(options))
    return options


def audit(options: dict[str, Any], **changes: Any) -> Any:
    arguments = {"samples": 12, "device": "cpu", **changes}
    return audit_store(options["out"], str(options["teacher_path"]), **arguments)


def test_cells_that_are_zero_in_both_agree() -> None:
    """A teacher that ends in a ReLU has such cells; beside any other value, zero is a difference."""
    zero, one = np.zeros((1, 2, 3), np.float32), np.ones((1, 2, 3), np.float32)
    assert cosines(zero, zero) == 1
    assert cosines(one, zero) == 0
    mixed = np.concatenate([zero[:, :1], one[:, :1]], axis=1)
    assert cosines(mixed, mixed) == pytest.approx(1)
    assert cosines(mixed, one) == 0


class TestAudit:
    def test_a_true_store_passes(self, made: dict[str, Any]) -> None:
        found = audit(made)
        assert found.findings == []
        assert found.samples == 12
        assert found.pooled >= 0.9999
        assert found.grid >= 0.9999

    def test_flipped_images_are_found_and_named(self, made: dict[str, Any]) -> None:
        for file in Path(made["data"]).rglob("*.png"):
            with Image.open(file) as image:
                image.transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(file)
        found = audit(made)
        assert len({finding.split(":")[0] for finding in found.findings}) == 12
        assert ".png: features/" in found.findings[0]

    def test_recorded_views_are_compared_too(self, made: dict[str, Any], tmp_path: Path) -> None:
        options = {**made, "out": tmp_path / "views", "views": 2, "seed": 5}
        run_extraction(load_config(options))
        assert audit(options).findings == []
        for file in Path(made["data"]).rglob("*.png"):
            with Image.open(file) as image:
                image.transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(file)
        found = {finding.split(": ")[1].split()[0] for finding in audit(options).findings}
        assert found == {"features/pooled", "features/grid", "views/pooled", "views/grid"}

    def test_another_teachers_weights_are_found(self, made: dict[str, Any], tmp_path: Path) -> None:
        import timm
        import torch

        torch.manual_seed(9)
        torch.save(timm.create_model("test_efficientnet").state_dict(), tmp_path / "other.pth")
        found = audit({**made, "teacher_path": tmp_path / "other.pth"})
        assert found.findings[0].startswith("teacher: fingerprint")

    def test_a_data_set_that_moved_is_asked_for(self, made: dict[str, Any], tmp_path: Path) -> None:
        Path(made["data"]).rename(tmp_path / "elsewhere")
        with pytest.raises(NoImages, match="--data"):
            audit(made)
        assert audit(made, data=str(tmp_path / "elsewhere")).findings == []

    def test_a_data_set_that_needs_options_is_opened_with_them(
        self, extract_options: dict[str, Any], tmp_path: Path
    ) -> None:
        for part in ("one", "two"):
            shutil.copytree(extract_options["data"], tmp_path / "data" / part)
        splits = {"data": str(tmp_path / "data"), "split": {"train": "one", "val": "two"}}
        options = {**extract_options, **splits, "source": "folder", "source_options": {"labelled": "true"}}
        run_extraction(load_config(options))
        found = audit(options)
        assert (found.samples, found.findings) == (12, [])

    def test_images_in_the_store_are_enough(self, extract_options: dict[str, Any], tmp_path: Path) -> None:
        data = tmp_path / "photos"
        data.mkdir()
        generator = np.random.default_rng(0)
        for number in range(5):
            pixels = generator.integers(0, 255, (6, 6, 3), dtype=np.uint8)
            Image.fromarray(pixels).resize((80, 80)).save(data / f"{number}.jpg")
        options = {**extract_options, "data": str(data), "images": "jpeg"}
        run_extraction(load_config(options))
        shutil.rmtree(data)
        found = audit(options)
        assert (found.samples, found.findings) == (5, [])


class TestPictures:
    def test_one_for_each_sample_and_an_overview(self, made: dict[str, Any], tmp_path: Path) -> None:
        files = write_pictures(made["out"], tmp_path / "pictures", 5)
        assert len(files) == 6
        with Image.open(files[0]) as picture:
            assert picture.size == (448, 224)  # image and grid
            assert len(picture.getcolors(1 << 20)) > 4

    def test_equal_tokens_have_equal_colours(self) -> None:
        tokens = np.random.default_rng(0).normal(size=(3, 32)).astype(np.float32)
        where = np.array([[[0, 1], [2, 0]]])
        colours = principal_colors(tokens[where])
        assert (colours[0, 0, 0] == colours[0, 1, 1]).all()
        assert (colours[0, 0, 0] != colours[0, 0, 1]).any()

    def test_a_store_without_grids_shows_images_and_their_classes(
        self, extract_options: dict[str, Any], tmp_path: Path
    ) -> None:
        run_extraction(load_config(extract_options))
        files = write_pictures(extract_options["out"], tmp_path / "pictures", 6)
        names = {file.name.partition("-")[0] for file in files[:-1]}
        assert names == {"train", "val"}, "samples of every split"
        with Image.open(files[0]) as picture:
            assert picture.size == (224, 224)
            assert np.asarray(picture)[-16:].max() > 150, "the class's name, white on a dark band"

    def test_without_grids_and_images_it_says_how_to_get_them(
        self, extract_options: dict[str, Any], digit_folder: Path, tmp_path: Path
    ) -> None:
        data = shutil.copytree(digit_folder, tmp_path / "moved")
        run_extraction(load_config({**extract_options, "data": str(data)}))
        shutil.rmtree(data)
        with pytest.raises(StoreError, match="--images jpeg or --grid 16"):
            write_pictures(extract_options["out"], tmp_path / "pictures")
