"""Parts of a task that its runs from start to end do not show."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from backend.task.configs import StageConfigs
from backend.task.errors import OptionError
from backend.task.request import read_request
from backend.task.stages import TaskPipeline, check_data, check_student, is_complete, make_folder
from extract.run import run_extraction
from processes.stop import Stopped, StopRequest
from tests.test_backend.platform_data import make_class_folders
from tests.test_backend.platform_site import Site
from tests.test_backend.senders import Told
from train.errors import TrainError


class StopAtOnce:
    """An observer of an extraction that stops it as soon as it has begun."""

    def __init__(self, stop: StopRequest) -> None:
        self.stop = stop

    def progress(self, done: int, total: int, message: str) -> None:
        self.stop.set()


@pytest.mark.parametrize(
    ("options", "part"),
    [
        ({"student_path": "WEIGHTS"}, "w.pt"),
        ({"student_model": "timm:no_such_model"}, "no_such_model"),
        ({"student_path": "GOOD", "lora_rank": 4, "lora_target_modules": "nothing"}, "nothing"),
    ],
)
def test_a_student_that_cannot_be_is_refused_before_the_extraction(
    options: dict[str, object], part: str, words: Callable[..., list[str]], tmp_path: Path
) -> None:
    import torch

    from train.students.build import build_student

    (tmp_path / "w.pt").write_bytes(b"not weights")
    torch.save(build_student("timm:test_vit", num_classes=2).state_dict(), tmp_path / "good.pt")
    files = {"WEIGHTS": tmp_path / "w.pt", "GOOD": tmp_path / "good.pt"}
    given = {name: files.get(str(value), value) for name, value in options.items()}
    line = words(**({"student_model": "timm:test_vit", "cache_dir": tmp_path / "cache"} | given))
    task = TaskPipeline(read_request(line), Told(), StopRequest())
    make_folder("cache_dir", task.cache.root)
    with pytest.raises(TrainError, match=part):
        task.features()
    assert not list((tmp_path / "cache").glob("*.zarr"))


def problem_of_data(line: list[str]) -> str:
    configs = StageConfigs(read_request(line))
    store = Path("features.zarr")
    with pytest.raises(OptionError) as caught:
        check_data(configs.extract_config(store), configs.train_config(store))
    return str(caught.value)


def test_too_few_classes_are_refused_before_the_extraction(
    words: Callable[..., list[str]], shop: Site
) -> None:
    """The back end sends 10 whatever the data is: a data set with more must not be extracted first."""
    assert problem_of_data(words(num_classes=1)) == (
        f"--num_classes: {shop.datasets}/花 has 2 classes, got 1: raise it, or leave it out"
    )


def test_splits_without_val_are_refused_before_the_extraction(site: Site) -> None:
    folder = make_class_folders(site.datasets / "other")
    (folder / "val").rename(folder / "test")
    text = problem_of_data(site.words(dataset_id="other"))
    assert text.startswith(f"--dataset_id: {folder} has the splits test, train, expected train and val")


@pytest.mark.parametrize("data", ["花", "one-split", "boxes", "masks"])
def test_data_that_fits(data: str, words: Callable[..., list[str]]) -> None:
    students = {"boxes": "yolov8n", "masks": "unet/small"}
    configs = StageConfigs(read_request(words(dataset_id=data, student_model=students.get(data, "resnet18"))))
    store = Path("features.zarr")
    check_data(configs.extract_config(store), configs.train_config(store).replace(num_classes=10))


@pytest.mark.slow
@pytest.mark.parametrize("student", ["vit-tiny", "yolov8n", "unet/small", "lstm/small"])
def test_a_student_without_a_number_of_classes_is_fine(
    student: str, words: Callable[..., list[str]], tmp_path: Path
) -> None:
    line = words(student_model=student, num_classes=None, image_size=64)
    check_student(StageConfigs(read_request(line)).train_config(tmp_path / "features.zarr"))


@pytest.mark.slow
def test_an_unfinished_store_of_another_precision_does_not_block_the_cache(
    words: Callable[..., list[str]], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """As when a task on a GPU (bfloat16) was stopped and the next one runs on the CPU."""
    task = TaskPipeline(read_request(words()), Told(), StopRequest())
    store, stop = tmp_path / "features.zarr", StopRequest()
    other = task.configs.extract_config(store).model_copy(update={"dtype": "bfloat16"})
    with pytest.raises(Stopped):
        run_extraction(other, [StopAtOnce(stop)], stop)
    assert store.exists()
    assert not is_complete(store)
    caplog.set_level("WARNING", "qwen_distill")
    task.extract(store)
    assert is_complete(store)
    assert "replacing a store that was never finished" in caplog.text
    assert "bfloat16" in caplog.text


@pytest.mark.slow
def test_a_detector_on_two_processes_reports_each_epoch_once(
    words: Callable[..., list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tests.test_train.yolo_ranks import CpuRanksTrainer
    from train.yolo import trainer

    monkeypatch.setattr(trainer, "StoreTrainer", CpuRanksTrainer)
    line = words(dataset_id="boxes", student_model="yolov8n", epochs=2, image_size=64, batch_size=4)
    told = Told()
    summary = TaskPipeline(read_request(line), told, StopRequest()).run()
    assert summary["epochs_done"] == 2
    assert told.epochs() == [1, 2]
    assert told.paths()
    assert set(told.paths()) == {str(tmp_path / "out" / "best_model.pt")}
