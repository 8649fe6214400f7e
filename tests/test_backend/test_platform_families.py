"""All five families of students, and every kind of data, through the platform's door from start to end."""

from __future__ import annotations

import io
import json
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from store.reader import open_store
from tests.test_backend.platform_data import COLOURS, pictures
from tests.test_backend.platform_process import run_platform
from tests.test_backend.platform_server import PlatformServer
from tests.test_backend.platform_site import Site

Words = Callable[..., list[str]]

# What the back end sends whatever the student is.
HARD_CODED: dict[str, object] = {
    "task_type": "classification",
    "num_classes": 10,
    "distillation_type": "hybrid",
    "temperature": 3.0,
    "hard_label_weight": 0.3,
    "soft_label_weight": 0.7,
    "lora_rank": 16,
    "grad_accum_steps": 1,
    "max_grad_norm": 1.0,
}


def summary_of(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / "summary.json").read_text("utf-8"))
    return content


@pytest.mark.slow
@pytest.mark.parametrize(
    ("student", "data", "metrics", "note"),
    [
        ("resnet18", "花", {"top1", "top5", "macro_f1"}, "lora_rank 16: left off"),
        ("vit-tiny", "花", {"top1", "top5", "macro_f1"}, "lora_rank 16: left off"),
        ("yolov8n", "boxes", {"map50", "map50_95"}, "task_type classification does not fit yolov8/n"),
        (
            "unet/small",
            "masks",
            {"miou", "pixel_accuracy"},
            "task_type classification does not fit unet/small",
        ),
        ("lstm/small", "clips", {"top1", "top5", "macro_f1"}, "lora_rank 16: left off"),
    ],
)
def test_every_family_with_what_the_back_end_hard_codes(
    student: str,
    data: str,
    metrics: set[str],
    note: str,
    words: Words,
    platform: PlatformServer,
    tmp_path: Path,
) -> None:
    import torch

    line = words(
        platform,
        **HARD_CODED,
        student_model=student,
        dataset_id=data,
        image_size=64,
        batch_size=4,
        epochs=1,
        clip_frames=4,
        student_path="/nowhere/at/all",
    )
    ended = run_platform(line)
    assert ended.code == 0, ended.text
    assert not any("\r" in text or "\x1b" in text for text in ended.lines)
    summary = summary_of(tmp_path / "out")
    assert metrics <= summary["metrics"].keys()
    notes = summary["platform"]["notes"]
    assert any(text.startswith(note) for text in notes)
    assert any("no weights at student_path" in text for text in notes)
    assert platform.kinds()[-2:] == ["evaluations", "complete"]
    evaluation = platform.of("evaluations")[0].body
    expected = (
        ("map50", "map95", "precision", "recall")
        if student == "yolov8n"
        else ("precision", "recall", "f1Score")
    )
    assert all(0 <= evaluation[name] <= 1 for name in expected)
    assert len(platform.of("history")) == 1
    best = torch.load(tmp_path / "out" / "best_model.pt", weights_only=True)
    assert {"epoch", "model_state_dict", "accuracy", "config"} <= best.keys()


@pytest.mark.slow
@pytest.mark.parametrize("family", ["qwen3-vl", "qwen3.5"])
def test_every_family_of_teachers(
    family: str, words: Words, platform: PlatformServer, shop: Site, tmp_path: Path
) -> None:
    """The platform names a folder of the models root; what it is follows from its config.json."""
    from extract.teachers.tiny import make_tiny_teacher

    make_tiny_teacher(shop.models / family, depth=1, family=family)
    ended = run_platform(words(platform, teacher_model=family, image_size=70, batch_size=4, epochs=1))
    assert ended.code == 0, ended.text
    assert platform.kinds()[-2:] == ["evaluations", "complete"]
    store = json.loads((tmp_path / "out" / "config.json").read_text("utf-8"))["store"]
    manifest = open_store(store["path"]).manifest
    assert (manifest.teacher.name, manifest.preprocessing.image_size) == (family, 64)


@pytest.mark.slow
def test_one_split_is_cut_and_logits_join_cached_features(
    words: Words, platform: PlatformServer, tmp_path: Path
) -> None:
    """A second task with hybrid distillation uses the features of the first and adds the logits it needs."""
    options: dict[str, object] = {
        "dataset_id": "one-split",
        "epochs": 1,
        "batch_size": 4,
        "cache_dir": tmp_path / "c",
    }
    first = run_platform(words(platform, **options, val_fraction=0.4))
    assert first.code == 0, first.text
    assert 0 < platform.of("evaluations")[0].body["evalSampleCount"] < 24
    options |= {"distillation_type": "hybrid", "output_dir": tmp_path / "second", "val_fraction": 0.4}
    second = run_platform(words(platform, **options))
    assert second.code == 0, second.text
    assert "features: taken from the cache" in second.text
    assert len(list((tmp_path / "c").glob("*.zarr"))) == 1
    records = [json.loads(line) for line in (tmp_path / "second" / "metrics.jsonl").read_text().splitlines()]
    assert records[0]["logit_loss"] is not None
    assert platform.of("history")[-1].body["softLoss"] is not None


@pytest.mark.slow
def test_validation_from_another_data_set(words: Words, platform: PlatformServer) -> None:
    ended = run_platform(words(platform, dataset_id="one-split", val_dataset_id="花", epochs=1))
    assert ended.code == 0, ended.text
    evaluation = platform.of("evaluations")[0].body
    assert (evaluation["evalDatasetId"], evaluation["evalSampleCount"]) == ("花", 8)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "part"),
    [
        ({"num_classes": 1}, "num_classes"),
        ({"batch_size": 999}, "batch_size 999 is larger than"),
        ({"student_path": "WEIGHTS"}, "w.pt"),
        ({"align_feature": "False"}, "align"),
    ],
)
def test_what_cannot_work_is_reported_in_one_line(
    options: dict[str, object], part: str, words: Words, platform: PlatformServer, tmp_path: Path
) -> None:
    if options.get("student_path"):
        (tmp_path / "w.pt").write_bytes(b"not weights")
        options = {"student_path": tmp_path / "w.pt"}
    ended = run_platform(words(platform, **options))
    assert ended.code in (1, 2), ended.text
    assert "Traceback" not in ended.text
    assert part in ended.lines[-1]
    assert ended.lines[-1].startswith("error: ")
    assert part in platform.of("error")[0].query["errorMessage"]
    assert "complete" not in platform.kinds()


def fill_table(execute: Callable[[str, tuple[Any, ...]], Any], mark: str) -> None:
    """Forty pictures as blobs, of two data sets."""
    for number, (label, picture, _) in enumerate(pictures(3, 40)):
        buffer = io.BytesIO()
        picture.save(buffer, "PNG")
        row = (number, 9 if number < 32 else 10, buffer.getvalue(), list(COLOURS)[label])
        execute(f"INSERT INTO image VALUES ({mark}, {mark}, {mark}, {mark})", row)


QUERY = "SELECT id AS `key`, content AS image, class_name AS label FROM image WHERE dataset = :dataset_id"


@pytest.mark.slow
def test_a_data_set_in_sqlite(words: Words, platform: PlatformServer, shop: Site, tmp_path: Path) -> None:
    path = shop.datasets / "images.db"
    with sqlite3.connect(path) as connection:
        connection.execute(
            "CREATE TABLE IF NOT EXISTS image (id INTEGER, dataset INTEGER, content BLOB, class_name TEXT)"
        )
        connection.execute("DELETE FROM image")
        fill_table(connection.execute, "?")
    options: dict[str, object] = {
        "dataset_id": 9,
        "dataset_url": f"sqlite:///{path}",
        "epochs": 1,
        "batch_size": 4,
    }
    ended = run_platform(words(platform, **options, dataset_query=QUERY, val_fraction=0.3))
    assert ended.code == 0, ended.text
    assert "sql data set" in ended.text
    assert 0 < platform.of("evaluations")[0].body["evalSampleCount"] < 32
    again = run_platform(
        words(platform, **options, dataset_query=QUERY, val_fraction=0.3, output_dir=tmp_path / "again")
    )
    assert "features: taken from the cache" in again.text
