"""The pipeline from files to a store: rows, resume, refusal, appending."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from extract.plan import DifferentStore
from extract.teachers import load_teacher
from store.reader import open_store
from tests.test_extract.extractions import extract, files_of, interrupt, true_features


class TestStore:
    def test_each_row_holds_the_teachers_answer_for_its_own_image(
        self, extract_options: dict[str, Any]
    ) -> None:
        result = extract(extract_options, grid="native")
        assert (result.complete, result.bad, result.encoded) == (True, 0, 60)
        store = open_store(extract_options["out"])
        teacher = load_teacher(
            "timm:test_efficientnet", extract_options["teacher_path"], device="cpu", image_size=64
        )
        train = store["train"]
        pooled, grid = true_features(store, "train"), true_features(store, "train", "features/grid")
        for row in (0, 17, len(train) - 1):
            image = Image.open(Path(extract_options["data"]) / train.keys[row]).convert("RGB")
            expected = teacher.encode([image])
            np.testing.assert_allclose(pooled[row], expected.pooled[0], rtol=2e-3, atol=2e-3)
            np.testing.assert_allclose(grid[row], expected.grid[0], rtol=2e-3, atol=2e-3)
            other = teacher.encode([image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)])
            assert np.abs(pooled[row] - other.pooled[0].numpy()).max() > 0.02

    def test_labels_sizes_and_content_belong_to_the_key(self, extract_options: dict[str, Any]) -> None:
        from extract.sources.base import content_digest

        extract(extract_options)
        store = open_store(extract_options["out"])
        assert store.manifest.class_names == tuple("0123456789")
        assert store.manifest.license == "apache-2.0"
        for split in store.splits:
            part = store[split]
            labels, sizes, content = (part.read(n) for n in ("targets/label", "sizes", "content"))
            for row, key in enumerate(part.keys):
                assert store.manifest.class_names[labels[row]] == key.split("/")[0]
                data = (Path(extract_options["data"]) / key).read_bytes()
                assert content[row].tobytes() == content_digest(data)
            assert (sizes == 40).all()

    def test_worker_processes_give_the_same_store_as_a_thread(self, extract_options: dict[str, Any]) -> None:
        extract(extract_options)
        one = files_of(extract_options["out"])
        extract(extract_options, workers=2, overwrite=True)
        assert files_of(extract_options["out"]) == one

    @pytest.mark.parametrize("images", ["jpeg", "raw"])
    def test_stored_images_make_the_store_enough(self, extract_options: dict[str, Any], images: str) -> None:
        from imaging.decode import decode_image

        extract(extract_options, images=images)
        train = open_store(extract_options["out"])["train"]
        original = Image.open(Path(extract_options["data"]) / train.keys[3]).convert("RGB")
        if images == "jpeg":
            stored = decode_image(train.ragged([3], "images/encoded/values")[0].tobytes())
        else:
            stored = Image.fromarray(train.gather([3], ["images/raw"])["images/raw"][0]).resize((40, 40))
        difference = np.asarray(stored, np.float32) - np.asarray(original, np.float32)
        assert np.abs(difference).mean() < 4
        assert (
            np.abs(np.asarray(stored.transpose(Image.Transpose.ROTATE_90), np.float32) - original).mean() > 8
        )

    def test_jpeg_files_are_stored_byte_for_byte(
        self, extract_options: dict[str, Any], tmp_path: Path
    ) -> None:
        data = tmp_path / "photos"
        data.mkdir()
        for number in range(4):
            image = Image.new("RGB", (90, 60), (number * 60, 10, 90))
            image.save(data / f"{number}.jpg")
        extract(extract_options, data=str(data), images="jpeg", val_fraction=0)
        train = open_store(extract_options["out"])["train"]
        stored = train.ragged(range(4), "images/encoded/values")
        assert [item.tobytes() for item in stored] == [(data / key).read_bytes() for key in train.keys]

    def test_recorded_views_show_what_their_geometry_says(self, extract_options: dict[str, Any]) -> None:
        from imaging.geometry import View

        extract(extract_options, views=2, grid="native")
        store = open_store(extract_options["out"])
        train = store["train"]
        teacher = load_teacher(
            "timm:test_efficientnet", extract_options["teacher_path"], device="cpu", image_size=64
        )
        geometry = train.gather([5], ["views/geometry"])["views/geometry"][0]
        stored = true_features(store, "train", "views/pooled")[5]
        image = Image.open(Path(extract_options["data"]) / train.keys[5]).convert("RGB")
        for view in range(2):
            pixels = torch.from_numpy(np.array(View(geometry[view]).render(image, 64))).permute(2, 0, 1)[None]
            expected = teacher.encode(pixels.contiguous()).pooled[0]
            np.testing.assert_allclose(stored[view], expected, rtol=2e-3, atol=2e-3)
        assert not np.allclose(geometry[0], geometry[1])
        assert train.specs["views/grid"].row_shape == (2, 2, 2, 256)

    def test_letterbox_padding_is_left_out_of_the_mean(
        self, extract_options: dict[str, Any], tmp_path: Path
    ) -> None:
        data = tmp_path / "wide"
        data.mkdir()
        noise = np.random.default_rng(0).integers(0, 255, (64, 128, 3), dtype=np.uint8)
        Image.fromarray(noise).save(data / "wide.png")
        extract(
            extract_options, data=str(data), resize="letterbox", grid="native", image_size=128, val_fraction=0
        )
        store = open_store(extract_options["out"])
        grid, pooled = true_features(store, "train", "features/grid")[0], true_features(store, "train")[0]
        assert grid.shape == (4, 4, 256)
        np.testing.assert_allclose(pooled, grid[1:3].mean(axis=(0, 1)), rtol=5e-3, atol=5e-3)
        assert np.abs(pooled - grid.mean(axis=(0, 1))).max() > 0.01


class TestResume:
    @pytest.mark.parametrize("views", [1, "flip"])
    def test_an_interrupted_run_ends_up_bit_identical(
        self, extract_options: dict[str, Any], views: int | str
    ) -> None:
        extract(extract_options, shard_rows=16, grid="native", views=views, images="jpeg")
        whole = files_of(extract_options["out"])
        shutil.rmtree(extract_options["out"])
        options = {**extract_options, "shard_rows": 16, "grid": "native", "views": views, "images": "jpeg"}
        stopped = interrupt(options, rows=24)
        assert stopped.exit_code == 143
        assert f"cli extract {options['data']} --out {options['out']}" in str(stopped)
        committed = int(str(stopped).split("stopped: ")[1].split(" of ")[0])
        assert 24 <= committed < 60
        result = extract(options)
        assert result.encoded == 60 - committed
        assert files_of(extract_options["out"]) == whole

    def test_a_complete_store_is_left_alone(self, extract_options: dict[str, Any]) -> None:
        extract(extract_options)
        before = files_of(extract_options["out"])
        assert extract(extract_options).encoded == 0
        assert files_of(extract_options["out"]) == before

    @pytest.mark.parametrize(
        ("changes", "text"),
        [
            ({"image_size": 96}, "preprocessing.image_size is 64, asked for 96"),
            ({"resize": "letterbox"}, "preprocessing.resize is squash, asked for letterbox"),
            ({"grid": 1}, "grid is None, asked for 1"),
            ({"images": "raw"}, "images is none, asked for raw"),
            ({"teacher": "timm:test_resnet", "teacher_path": None}, "teacher.name is timm:test_efficientnet"),
        ],
    )
    def test_other_options_are_refused_with_the_fields_that_differ(
        self, extract_options: dict[str, Any], changes: dict[str, Any], text: str, tmp_path: Path
    ) -> None:
        import timm

        extract(extract_options)
        before = files_of(extract_options["out"])
        if "teacher" in changes:
            torch.save(timm.create_model("test_resnet").state_dict(), tmp_path / "resnet.pth")
            changes = {**changes, "teacher_path": str(tmp_path / "resnet.pth")}
        with pytest.raises(DifferentStore) as error:
            extract(extract_options, **changes)
        assert text in str(error.value)
        assert "--overwrite" in str(error.value)
        assert files_of(extract_options["out"]) == before

    def test_touched_files_with_the_same_bytes_are_accepted(
        self, extract_options: dict[str, Any], tmp_path: Path
    ) -> None:
        data = tmp_path / "data"
        shutil.copytree(extract_options["data"], data)
        extract(extract_options, data=str(data))
        for file in data.rglob("*.png"):
            file.touch()
        assert extract(extract_options, data=str(data)).encoded == 0

    def test_overwrite_spares_what_is_no_store(self, extract_options: dict[str, Any], tmp_path: Path) -> None:
        from extract.config import ConfigError

        precious = tmp_path / "precious"
        precious.mkdir()
        (precious / "thesis.tex").write_text("")
        with pytest.raises(ConfigError, match="deletes stores only"):
            extract(extract_options, out=precious, overwrite=True)
        assert (precious / "thesis.tex").exists()

    def test_new_images_are_appended_and_encoded_alone(
        self, extract_options: dict[str, Any], tmp_path: Path
    ) -> None:
        data = tmp_path / "data"
        shutil.copytree(extract_options["data"], data)
        options = {**extract_options, "data": str(data), "shard_rows": 16}
        extract(options)
        store = open_store(options["out"])
        before = {split: (list(store[split].keys), true_features(store, split)) for split in store.splits}
        for number in range(20):
            name = data / str(number % 10) / f"{'a' if number % 2 else 'z'}{number}.png"
            Image.new("RGB", (40, 40), (number * 12, 90, 0)).save(name)
        assert extract(options).encoded == 20
        store = open_store(options["out"])
        assert sum(len(store[split]) for split in store.splits) == 80
        for split, (keys, features) in before.items():
            assert list(store[split].keys)[: len(keys)] == keys
            np.testing.assert_array_equal(true_features(store, split)[: len(keys)], features)
            labels = store[split].read("targets/label")
            assert [str(label) for label in labels] == [key.split("/")[0] for key in store[split].keys]
        assert extract(options).encoded == 0
