"""`--layers`: several depths of a teacher from one pass, each with its own grid, width, scale and statistics."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from commands.store import convert_paths
from extract.config import load_config
from extract.run import run_extraction
from extract.teachers import TeacherError, load_teacher
from extract.teachers.qwen_vl import QwenVLTeacher
from extract.verify import audit_store
from store.errors import DistillError
from store.format import GRID
from store.reader import open_store
from store.summary import describe_store
from store.verify import verify_store


def load(name: str, path: Path | None = None, **options: Any) -> Any:
    options = {"device": "cpu", "dtype": "float32", **options}
    torch.manual_seed(0)
    return load_teacher(name, path and str(path), **options)


@pytest.mark.parametrize("family", ["full", "qwen3-vl", "qwen3.5"])
def test_qwens_layers_are_the_residual_streams_of_transformers(
    family: str, sharp_checkpoints: dict[str, Path], noise: torch.Generator
) -> None:
    """Put into raster order as the last layer is: the last block, named by its number, must equal it."""
    from transformers import AutoImageProcessor, AutoModelForImageTextToText

    name = "qwen2.5-vl" if family == "full" else family
    folder = sharp_checkpoints[family]
    depth = 2 if family == "full" else 3
    teacher = load(name, folder, layers="0,last," + str(depth - 1))
    assert isinstance(teacher, QwenVLTeacher)
    assert [layer.number for layer in teacher.layers] == [0, depth - 1]
    side = 112 if family == "full" else 128  # one window, so that both are in the order of 2 × 2 blocks
    images = torch.randint(0, 256, (2, 3, side, side), dtype=torch.uint8, generator=noise)
    out = teacher.encode(images)
    assert torch.equal(out.layers[depth - 1], out.grid)
    visual = AutoModelForImageTextToText.from_pretrained(folder).eval().model.visual
    seen: list[torch.Tensor] = []
    visual.blocks[0].register_forward_hook(lambda _module, _inputs, output: seen.append(output))
    processed = AutoImageProcessor.from_pretrained(folder)(
        images=list(images), do_resize=False, return_tensors="pt"
    )
    with torch.inference_mode():
        visual(processed["pixel_values"], grid_thw=processed["image_grid_thw"])
    h, width = out.grid.shape[1], out.grid.shape[-1]
    blocks = seen[0].view(2, h // 2, h // 2, 2, 2, width).permute(0, 1, 3, 2, 4, 5)
    expected = blocks.reshape(2, h, h, width)
    assert (out.layers[0] - expected).abs().max() <= 1e-4
    assert (out.layers[0] - out.grid).abs().max() > 1.0
    assert teacher.layer_sizes(side, side) == {0: (h, h), depth - 1: (h, h)}


@pytest.mark.parametrize(
    ("name", "layers", "numbers"),
    [
        ("test_vit", "auto", (0, 2, 3)),
        ("test_efficientnet", "auto", (2, 3)),
        ("test_convnext", "2,0", (0, 2)),
    ],
)
def test_timms_layers_are_those_of_forward_intermediates(
    name: str, layers: str, numbers: tuple[int, ...], noise: torch.Generator
) -> None:
    teacher = load(f"timm:{name}", layers=layers, random_weights=True, image_size=160)
    assert tuple(layer.number for layer in teacher.layers) == numbers
    images = torch.randint(0, 256, (2, 3, 160, 160), dtype=torch.uint8, generator=noise)
    out = teacher.encode(images)
    mean, std = teacher.mean, teacher.std
    with torch.inference_mode():
        maps = teacher.model.forward_intermediates(
            (images - mean) / std, indices=list(numbers), intermediates_only=True
        )
    for layer, expected in zip(teacher.layers, maps, strict=True):
        got = out.layers[layer.number]
        assert torch.allclose(got, expected.permute(0, 2, 3, 1), atol=1e-4)
        assert got.shape == (2, *teacher.layer_sizes(160, 160)[layer.number], layer.width)
    plain = load(f"timm:{name}", random_weights=True, image_size=160).encode(images)
    assert torch.allclose(plain.grid, out.grid, atol=1e-5)
    assert torch.allclose(plain.pooled, out.pooled, atol=1e-5)


@pytest.mark.parametrize(
    ("family", "changes", "expected"),
    [
        ("qwen2.5-vl", {"fullatt_block_indexes": [1, 3, 5], "depth": 6}, (1, 3)),
        ("qwen3-vl", {"deepstack_visual_indexes": [5, 11, 17], "depth": 24}, (5, 11, 17)),
        ("qwen3.5", {"depth": 24}, (5, 11, 17)),
    ],
)
def test_auto_takes_what_each_family_names(
    family: str, changes: dict[str, Any], expected: tuple[int, ...], tmp_path: Path
) -> None:
    import json
    from dataclasses import replace

    from extract.teachers.qwen_config import FAMILIES, automatic_layers

    (tmp_path / "config.json").write_text(json.dumps({"vision_config": changes}))
    fields = {key: tuple(value) if isinstance(value, list) else value for key, value in changes.items()}
    fields.pop("deepstack_visual_indexes", None)
    assert automatic_layers(tmp_path, replace(FAMILIES[family].tower, **fields)) == expected


@pytest.mark.parametrize(
    ("name", "layers", "problem"),
    [
        ("timm:test_vit", "6", r"--layers 6: timm:test_vit has 6 layers, 0 to 5; got 6"),
        ("timm:test_vit", "p3", r"'p3' is no layer; expected numbers, `last`, or auto"),
        ("timm:test_vit", "-1", r"'-1' is no layer"),
    ],
)
def test_layers_that_do_not_exist(name: str, layers: str, problem: str) -> None:
    with pytest.raises(TeacherError, match=problem):
        load(name, layers=layers, random_weights=True)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, digit_folder: Path, timm_weights: Path) -> dict[str, Any]:
    """A store with stages of stride 8 and 16 beside the last one's 32."""
    options = {
        "data": str(digit_folder),
        "out": tmp_path_factory.mktemp("layers") / "store",
        "teacher": "timm:test_efficientnet",
        "teacher_path": str(timm_weights),
        "image_size": 96,
        "batch_size": 8,
        "workers": 0,
        "device": "cpu",
        "layers": "auto",
        "grid": "native",
    }
    run_extraction(load_config(options))
    return options


def test_a_store_holds_every_layer_with_its_own_scale_and_statistics(made: dict[str, Any]) -> None:
    store = open_store(made["out"])
    split = store["train"]
    shapes = {f"{GRID}@2": (12, 12, 32), f"{GRID}@3": (6, 6, 48), GRID: (3, 3, 256)}
    for name, shape in shapes.items():
        assert split.specs[name].row_shape == shape
        values = split.true_values(np.flatnonzero(split.valid), name).reshape(-1, shape[-1])
        assert np.isfinite(values).all()
        np.testing.assert_allclose(split.statistics[name].mean, values.mean(0), rtol=1e-2, atol=1e-3)
        assert split.scale[name].shape == (shape[-1],)
    assert store.manifest.options["layers"] == {"2": 12, "3": 6}
    assert verify_store(made["out"]) == []
    found = audit_store(made["out"], made["teacher_path"], samples=6, device="cpu")
    assert found.findings == []
    assert set(shapes) <= set(describe_store(made["out"])["splits"]["train"]["arrays"])


def test_conversions_keep_every_layer(made: dict[str, Any], tmp_path: Path) -> None:
    store = open_store(made["out"])["train"]
    rows = np.arange(4)
    convert_paths(str(made["out"]), str(tmp_path / "one.h5"), zstd=False, int8=False, pca=None)
    convert_paths(str(tmp_path / "one.h5"), str(tmp_path / "back"), zstd=False, int8=False, pca=None)
    back = open_store(tmp_path / "back")["train"]
    costs = convert_paths(str(made["out"]), str(tmp_path / "small"), zstd=False, int8=True, pca=None)
    small = open_store(tmp_path / "small")["train"]
    for name in (f"{GRID}@2", f"{GRID}@3"):
        assert (back.gather(rows, [name])[name] == store.gather(rows, [name])[name]).all()
        assert small.specs[name].encoding == "int8"
        close = np.abs(small.true_values(rows, name) - store.true_values(rows, name)).max()
        assert close < 0.1 * np.abs(store.true_values(rows, name)).max()
    assert {f"{GRID}@2", GRID} <= {cost.array for cost in costs}


def test_a_store_with_other_layers_is_refused(made: dict[str, Any]) -> None:
    with pytest.raises(DistillError, match="layers"):
        run_extraction(load_config({**made, "layers": "2,last"}))
    with pytest.raises(DistillError, match="--layers stores grids"):
        run_extraction(load_config({**made, "grid": 0}))


@pytest.mark.slow
def test_a_smaller_grid_keeps_the_ratio_of_the_layers(extract_options: dict[str, Any]) -> None:
    options = {**extract_options, "image_size": 96, "layers": "3", "grid": 2, "views": 2}
    run_extraction(load_config(options))
    specs = open_store(extract_options["out"])["train"].specs
    assert specs[f"{GRID}@3"].row_shape == (4, 4, 48)
    assert specs["views/grid@3"].row_shape == (2, 4, 4, 48)
