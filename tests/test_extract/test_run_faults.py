"""What goes wrong in an extraction: bad images, memory that runs out, a device that is not there."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from extract.result import LEDGER, TooManyBad
from store.reader import open_store
from tests.test_extract.extractions import extract, true_features


class TestBadImages:
    @pytest.fixture
    def broken(self, extract_options: dict[str, Any], tmp_path: Path) -> dict[str, Any]:
        """The digits with two files that are no images."""
        data = tmp_path / "data"
        shutil.copytree(extract_options["data"], data)
        files = sorted(data.rglob("*.png"))
        files[10].write_bytes(b"")
        files[20].write_bytes(files[20].read_bytes()[:100])
        return {
            **extract_options,
            "data": str(data),
            "bad": [str(files[n].relative_to(data)) for n in (10, 20)],
        }

    def test_they_keep_their_rows_and_go_to_the_ledger(self, broken: dict[str, Any]) -> None:
        bad = broken.pop("bad")
        result = extract(broken, max_bad=2, grid="native", images="jpeg", views=1)
        assert (result.bad, result.rows) == (2, 60)
        store = open_store(broken["out"])
        lines = [json.loads(line) for line in (Path(broken["out"]) / LEDGER).read_text().splitlines()]
        assert sorted(line["key"] for line in lines) == sorted(bad)
        assert {line["reason"].split(":")[0].split(" (")[0] for line in lines} == {
            "empty file",
            "cannot be decoded",
        }
        for line in lines:
            part = store[line["split"]]
            assert not part.valid[line["row"]]
            assert part.keys[line["row"]] == line["key"]
            assert np.isnan(true_features(store, line["split"])[line["row"]]).all()
            assert np.isfinite(true_features(store, line["split"])[part.valid]).all()

    def test_more_than_allowed_end_the_run_and_a_higher_limit_goes_on(self, broken: dict[str, Any]) -> None:
        broken.pop("bad")
        with pytest.raises(TooManyBad, match="--max-bad 1% allows 1"):
            extract(broken)
        assert (Path(broken["out"]) / LEDGER).exists()
        with pytest.raises(TooManyBad):
            extract(broken)
        assert extract(broken, max_bad="5%").complete

    @pytest.mark.parametrize("devices", ["cpu", pytest.param("cpu,cpu", marks=pytest.mark.slow)])
    def test_the_same_command_again_ends_as_well_when_nothing_is_left_to_encode(
        self, broken: dict[str, Any], devices: str
    ) -> None:
        broken.pop("bad")
        for device in ("cpu", devices):
            with pytest.raises(TooManyBad, match="2 bad images, --max-bad 1% allows 1"):
                extract(broken, batch_size=64, device=device)
        assert extract(broken, batch_size=64, max_bad=2).complete

    def test_an_image_with_more_pixels_than_the_limit_is_bad(
        self, extract_options: dict[str, Any], tmp_path: Path
    ) -> None:
        for name, side in (("small", 20), ("large", 60)):
            (tmp_path / "data").mkdir(exist_ok=True)
            Image.new("RGB", (side, side)).save(tmp_path / "data" / f"{name}.png")
        extract(extract_options, data=str(tmp_path / "data"), max_pixels=500, max_bad=1, val_fraction=0)
        train = open_store(extract_options["out"])["train"]
        assert dict(zip(train.keys, train.valid.tolist(), strict=True)) == {
            "small.png": True,
            "large.png": False,
        }

    def test_they_do_not_change_their_neighbours(
        self, broken: dict[str, Any], extract_options: dict[str, Any]
    ) -> None:
        broken.pop("bad")
        extract(broken, max_bad=2)
        damaged = open_store(broken["out"])
        extract(extract_options, out=Path(extract_options["out"]).with_name("sound"))
        sound = open_store(Path(extract_options["out"]).with_name("sound"))
        for split in sound.splits:
            assert list(sound[split].keys) == list(damaged[split].keys)
            valid = damaged[split].valid
            expected, got = true_features(sound, split)[valid], true_features(damaged, split)[valid]
            np.testing.assert_allclose(got, expected, rtol=2e-3, atol=1e-3)


class TestOutOfMemory:
    def test_the_batch_is_halved_and_it_says_so(
        self,
        extract_options: dict[str, Any],
        monkeypatch: pytest.MonkeyPatch,
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        from extract.teachers.timm_encoder import TimmTeacher

        extract(extract_options, out=Path(extract_options["out"]).with_name("roomy"))
        encode = TimmTeacher.encode

        def tight(self: Any, images: Any, **kwargs: Any) -> Any:
            if len(images) > 3:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return encode(self, images, **kwargs)

        monkeypatch.setattr(TimmTeacher, "encode", tight)
        with caplog.at_level("WARNING", "qwen_distill"):
            result = extract(extract_options)
        assert result.halved == [4, 2]
        assert "going on with batches of 2" in caplog.text
        record = Path(extract_options["out"]) / ".extract" / "out_of_memory.jsonl"
        assert [json.loads(line)["batch_size"] for line in record.read_text().splitlines()] == [4, 2]
        tight_store, roomy = (
            open_store(Path(extract_options["out"]).with_name(name)) for name in ("store", "roomy")
        )
        np.testing.assert_allclose(
            true_features(tight_store, "train"), true_features(roomy, "train"), rtol=2e-3, atol=1e-3
        )

    def test_the_parts_are_the_batch_in_order(self) -> None:
        """What encoding and zero-shot scoring share."""
        from extract.encode import AdaptiveBatch

        batch = AdaptiveBatch(8, torch.device("cpu"), 64)

        def work(some: slice) -> list[int]:
            rows = list(range(10))[some]
            if len(rows) > 3:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return rows

        assert batch.run(10, work) == [[0, 1], [2, 3], [4, 5], [6, 7], [8, 9]]
        assert batch.halved == [4, 2]
        assert batch.limit == 2  # once halved it stays so

    def test_one_image_that_does_not_fit_is_an_error_with_advice(
        self, extract_options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from extract.encode import OutOfMemory
        from extract.teachers.timm_encoder import TimmTeacher

        plain = TimmTeacher.encode

        def full(self: Any, images: Any, **kwargs: Any) -> Any:
            if isinstance(images, torch.Tensor) and not images.any():  # the black image of loading
                return plain(self, images, **kwargs)
            raise torch.OutOfMemoryError("CUDA out of memory")

        monkeypatch.setattr(TimmTeacher, "encode", full)
        with pytest.raises(OutOfMemory, match=r"one image of 64 pixels.*smaller --image-size"):
            extract(extract_options)

    def test_a_teacher_that_does_not_fit_is_an_error_with_advice(
        self, extract_options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from extract.teachers import TeacherError
        from extract.teachers.timm_encoder import TimmTeacher

        def full(self: Any, values: Any) -> Any:
            raise torch.OutOfMemoryError("CUDA out of memory")

        monkeypatch.setattr(TimmTeacher, "run_model", full)
        with pytest.raises(TeacherError, match=r"one image of 64 pixels.*smaller --image-size"):
            extract(extract_options)


def test_cuda_is_never_replaced_by_the_cpu(extract_options: dict[str, Any]) -> None:
    from extract.teachers import TeacherError

    if torch.cuda.is_available():
        pytest.skip("this machine has CUDA")
    with pytest.raises(TeacherError, match="device cuda:7 is not there"):
        extract(extract_options, device="cuda:7")
    assert not Path(extract_options["out"]).exists()
