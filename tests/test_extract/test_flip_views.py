"""`--views flip`: the teacher's exact answer to the mirror image beside the plain one, and what training makes of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from commands.store import convert_paths, verify
from extract.config import ConfigError, load_config
from extract.run import run_extraction
from extract.teachers import load_teacher
from extract.verify import audit_store, teacher_of
from imaging.geometry import View, resize_view
from store.errors import DistillError
from store.reader import Store, open_store
from store.summary import describe_store
from tests.test_extract.extractions import true_features

MIRROR = Image.Transpose.FLIP_LEFT_RIGHT
NAMES = ("pooled", "grid", "grid@2", "grid@3")


@pytest.fixture(scope="module")
def made(
    tmp_path_factory: pytest.TempPathFactory, digit_folder: Path, timm_weights: Path
) -> dict[str, dict[str, Any]]:
    """Options of two complete stores of wide pictures: `flip` and `plain`, letterboxed, with further layers."""
    root = tmp_path_factory.mktemp("flips")
    for file in digit_folder.rglob("*.png"):
        wide = root / "data" / file.relative_to(digit_folder)
        wide.parent.mkdir(parents=True, exist_ok=True)
        Image.open(file).resize((80, 52), Image.Resampling.BICUBIC).save(wide)
    options = {
        "data": str(root / "data"),
        "teacher": "timm:test_efficientnet",
        "teacher_path": str(timm_weights),
        "image_size": 96,
        "resize": "letterbox",
        "batch_size": 8,
        "workers": 0,
        "device": "cpu",
        "layers": "auto",
        "grid": "native",
        "images": "jpeg",
    }
    both = {"flip": {**options, "views": "flip"}, "plain": options}
    both = {name: {**chosen, "out": root / name} for name, chosen in both.items()}
    for chosen in both.values():
        run_extraction(load_config(chosen))
    return both


def stored_of(made: dict[str, dict[str, Any]], name: str = "flip") -> Store:
    return open_store(made[name]["out"])


def test_the_stored_view_is_the_teachers_answer_to_the_mirror_image(made: dict[str, dict[str, Any]]) -> None:
    store = stored_of(made)
    train = store["train"]
    teacher = teacher_of(store, made["flip"]["teacher_path"], "cpu")
    for row in (0, 31):
        image = Image.open(Path(made["flip"]["data"]) / train.keys[row]).convert("RGB")
        for shown, kind in ((image, "features"), (image.transpose(MIRROR), "views")):
            out = teacher.encode([shown])
            expected = {
                "pooled": out.pooled,
                "grid": out.grid,
                "grid@2": out.layers[2],
                "grid@3": out.layers[3],
            }
            for name in NAMES:
                values = true_features(store, "train", f"{kind}/{name}")[row].reshape(expected[name][0].shape)
                np.testing.assert_allclose(values, expected[name][0], rtol=5e-3, atol=5e-3)
        base = resize_view("letterbox", image.size, 96)
        geometry = train.gather([row], ["views/geometry"])["views/geometry"][0]
        assert np.array_equal(geometry[0], base.compose(View.flip()).matrix)
    assert train.specs["views/grid@2"].row_shape == (1, 12, 12, 32)
    carried = true_features(store, "train", "features/grid")[:, :, ::-1]
    assert np.abs(true_features(store, "train", "views/grid")[:, 0] - carried).mean() > 0.02


def test_the_plain_part_is_that_of_a_store_without_views(made: dict[str, dict[str, Any]]) -> None:
    flip, plain = stored_of(made), stored_of(made, "plain")
    for split in plain.splits:
        rows = np.arange(len(plain[split]))
        assert list(flip[split].keys) == list(plain[split].keys)
        for name in (f"features/{name}" for name in NAMES):
            left, right = (store[split].gather(rows, [name])[name] for store in (flip, plain))
            assert np.array_equal(left, right)
            assert np.array_equal(flip[split].scale[name], plain[split].scale[name])
    specs = flip["train"].specs
    for name in NAMES:
        assert specs[f"views/{name}"].row_bytes == specs[f"features/{name}"].row_bytes


@pytest.mark.slow
def test_verify_inspect_and_conversions_treat_it_like_the_rest(
    made: dict[str, dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = made["flip"]
    verify(str(options["out"]), teacher_path=options["teacher_path"], samples=8, device="cpu", json=True)
    report = json.loads(capsys.readouterr().out)
    assert report["ok"]
    found = {item["view"]: item for item in report["teacher"]["fidelity"]}
    assert [view for view, item in found.items() if item["exact"]] == ["flip"]
    assert found["flip"]["mean"] > found["none"]["mean"] - 0.02
    verify(str(options["out"]), teacher_path=options["teacher_path"], samples=4, device="cpu")
    assert "flip (exact)" in capsys.readouterr().out
    carried = made["plain"]
    verify(str(carried["out"]), teacher_path=carried["teacher_path"], samples=8, device="cpu", json=True)
    plain = {item["view"]: item for item in json.loads(capsys.readouterr().out)["teacher"]["fidelity"]}
    assert plain["flip"]["mean"] < found["flip"]["mean"] - 0.05
    store = stored_of(made)["train"]
    arrays = describe_store(options["out"])["splits"]["train"]["arrays"]
    names = [f"views/{name}" for name in NAMES]
    assert {*names, "views/geometry"} <= set(arrays)
    assert all(store.statistics[name].count for name in names)
    convert_paths(str(options["out"]), str(tmp_path / "one.h5"), zstd=False, int8=False, pca=None)
    convert_paths(str(tmp_path / "one.h5"), str(tmp_path / "back"), zstd=False, int8=False, pca=None)
    convert_paths(str(options["out"]), str(tmp_path / "small"), zstd=False, int8=True, pca=None)
    back, small = open_store(tmp_path / "back"), open_store(tmp_path / "small")
    assert back.manifest.exact_flip
    assert small.manifest.exact_flip
    rows = np.arange(5)
    for name in names:
        assert (back["train"].gather(rows, [name])[name] == store.gather(rows, [name])[name]).all()
        values = store.true_values(rows, name)
        assert np.abs(small["train"].true_values(rows, name) - values).max() < 0.1 * np.abs(values).max()


def test_a_damaged_mirror_image_is_found(made: dict[str, dict[str, Any]], tmp_path: Path) -> None:
    """The mirror images of other pictures: a store made from mirrored files, whose plain part was exchanged."""
    options = {**made["flip"], "out": tmp_path / "store", "data": str(tmp_path / "data")}
    for file in Path(made["flip"]["data"]).rglob("*.png"):
        target = tmp_path / "data" / file.relative_to(made["flip"]["data"])
        target.parent.mkdir(parents=True, exist_ok=True)
        Image.open(file).save(target)
    run_extraction(load_config(options))
    for file in Path(options["data"]).rglob("*.png"):
        Image.open(file).transpose(Image.Transpose.FLIP_TOP_BOTTOM).save(file)
    found = audit_store(options["out"], options["teacher_path"], samples=4, device="cpu")
    arrays = {finding.split(": ")[1].split()[0] for finding in found.findings}
    assert {f"views/{name}" for name in NAMES} <= arrays


def test_the_store_is_not_continued_with_other_views(made: dict[str, dict[str, Any]]) -> None:
    for views in (0, 1):
        with pytest.raises(DistillError, match="was made with other options"):
            run_extraction(load_config({**made["flip"], "views": views}))


@pytest.mark.parametrize("views", ["mirror", 65, -1])
def test_views_that_there_are_not(views: Any, made: dict[str, dict[str, Any]]) -> None:
    with pytest.raises(ConfigError, match="flip"):
        load_config({**made["flip"], "views": views})


# -- training --------------------------------------------------------------------------------------------


def train(store: Path, out: Path, monkeypatch: pytest.MonkeyPatch, **options: Any) -> list[Any]:
    """Batches and targets of a short training."""
    from train.config import load_config as load_train_config
    from train.distill.objective import Objective
    from train.run import run_training

    seen: list[Any] = []
    plain = Objective.prepare

    def prepare(self: Objective, batch: Any) -> Any:
        targets = plain(self, batch)
        if self.plan.exact_flip:
            seen.append((batch, targets))
        return targets

    monkeypatch.setattr(Objective, "prepare", prepare)
    chosen = {"store": store, "out": out, "student": "timm:test_resnet", "batch_size": 8, "image_size": 96}
    chosen |= {"epochs": 1, "device": "cpu", "workers": 0, "feature_loss_type": "mse", **options}
    run_training(load_train_config(chosen))
    return seen


@pytest.mark.parametrize("grid", ["native", 0])
def test_the_target_of_a_flipped_sample_is_the_encoding_of_the_flipped_image(
    made: dict[str, dict[str, Any]], grid: str | int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from train.data.views import AUGMENTATIONS, Augmentation
    from train.distill.projector import TargetStandardizer

    options = made["flip"]
    if grid == 0:
        options = {**options, "out": tmp_path / "pooled", "grid": 0, "layers": "", "resize": "squash"}
        run_extraction(load_config(options))
    monkeypatch.setitem(AUGMENTATIONS, "full", Augmentation(flip_probability=0.5))
    seen = train(options["out"], tmp_path / "run", monkeypatch)
    store = open_store(options["out"])
    teacher = load_teacher(
        "timm:test_efficientnet",
        options["teacher_path"],
        device="cpu",
        image_size=96,
        resize=options["resize"],
    )
    assert {bool(value) for batch, _ in seen for value in batch.flipped} == {True, False}
    standardize = {
        name: TargetStandardizer(found.mean, found.std) for name, found in store["train"].statistics.items()
    }
    for batch, targets in seen[:3]:
        for row, flipped, pooled, *cells in zip(
            batch.rows,
            batch.flipped,
            targets.pooled,
            *([] if targets.cells is None else [targets.cells, targets.cell_weight]),
            strict=True,
        ):
            image = Image.open(Path(options["data"]) / store["train"].keys[row]).convert("RGB")
            shown = teacher.encode([image.transpose(MIRROR) if flipped else image])
            if not cells:
                expected = standardize["features/pooled"](shown.pooled)
                assert torch.nn.functional.cosine_similarity(pooled, expected[0], dim=0) > 0.999
                continue
            target, weight = cells
            covered = weight > 0.99
            expected = standardize["features/grid"](shown.grid)[0]
            assert covered.any()
            cosines = torch.nn.functional.cosine_similarity(target, expected, dim=-1)[covered]
            assert cosines.min() > 0.999
    resolved = json.loads((tmp_path / "run/config.json").read_text())["resolved"]
    assert resolved["distilled"]["exact_flip"] is True
    assert resolved["augment"] == ("full" if grid else "mild with flips")
