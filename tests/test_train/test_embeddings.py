"""Label-free students are exported, predict embeddings and are evaluated; the ONNX file agrees with PyTorch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from store.reader import open_store
from tests.test_train.runs import trained
from train.deliver.evaluate import evaluate_run
from train.deliver.export import export_student
from train.deliver.model import ModelCard, OnnxModel, TorchModel, open_student
from train.deliver.prediction_files import EmbeddingFiles
from train.errors import DeliveryError

TOLERANCE = 1e-4  # both runtimes compute in float32


@pytest.fixture
def free_run(make_store: Any, tmp_path: Path) -> Path:
    return trained(make_store(train=40, val=20), tmp_path / "free", task="features")


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for number in range(3):
        pixels = np.random.default_rng(number).integers(0, 255, (40, 60, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
    (folder / "broken.png").write_bytes(b"no image")
    return folder


def test_a_label_free_student_is_exported_and_evaluated_as_it_is(free_run: Path, tmp_path: Path) -> None:
    store = tmp_path / "store.zarr"
    exported = export_student(free_run, "onnx")
    assert exported.max_abs_difference <= exported.tolerance
    model = OnnxModel(exported.path)
    assert model.output_names == ["embedding", "features", "aligned"]
    outputs = model.outputs(np.zeros((5, 3, 32, 32), np.float32))
    np.testing.assert_allclose(outputs["features"].mean((2, 3)), outputs["embedding"], atol=1e-5)
    ours = evaluate_run(free_run, store, device="cpu", workers=0)
    theirs = evaluate_run(exported.path, store, workers=0)
    assert set(ours["metrics"]) == {"pooled_cosine", "knn_top1", "probe_top1"}
    assert ours["metrics"] == pytest.approx(theirs["metrics"], abs=TOLERANCE)
    # Computed from its parts: the head of the checkpoint on the embedding, against the standardized stored row.
    student, card = open_student(free_run)
    split = open_store(store)["val"]
    found = TorchModel(student, card, torch.device("cpu")).outputs(np.zeros((1, 3, 32, 32), np.float32))
    assert found["aligned"].shape == (1, open_store(store).manifest.teacher.width)
    assert ours["samples"] == int(split.valid.sum())


@pytest.mark.slow
def test_a_label_free_student_is_a_torch_program_too(free_run: Path) -> None:
    exported = export_student(free_run, "torch-export")
    outputs = torch.export.load(str(exported.path)).module()(torch.zeros(7, 3, 32, 32))
    assert [len(output) for output in outputs] == [7, 7, 7]
    assert outputs[0].shape == (7, open_student(free_run)[0].spec.feature_width)


def test_the_cosine_is_that_of_aligned_embeddings_and_standardized_teacher_rows(
    make_store: Any, tmp_path: Path
) -> None:
    """A run that distills pooled rows measures the same number itself, at its best epoch."""
    store = make_store(grid=0, labels=False)
    run = trained(store, tmp_path / "free", task="features")
    metrics = evaluate_run(run, store, device="cpu", workers=0)["metrics"]
    summary = json.loads((run / "summary.json").read_text())
    assert set(metrics) == {"pooled_cosine"}, "no labels: no k-NN, no probe"
    assert metrics["pooled_cosine"] == pytest.approx(summary["metrics"]["cosine"], abs=TOLERANCE)


def test_another_teacher_has_no_cosine(make_store: Any, free_run: Path, tmp_path: Path) -> None:
    other = make_store("other.zarr", train=20, val=10)
    root = json.loads((other / "zarr.json").read_text())
    root["attributes"]["teacher"]["fingerprint"] = "another"
    (other / "zarr.json").write_text(json.dumps(root))
    metrics = evaluate_run(free_run, other, device="cpu", workers=0)["metrics"]
    assert set(metrics) == {"knn_top1", "probe_top1"}


def test_embeddings_are_written_with_their_keys(
    free_run: Path, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import typer

    from commands.deliver import predict

    out = tmp_path / "out"
    with pytest.raises(typer.Exit):  # a file could not be read
        predict(free_run, [str(pictures)], out)
    printed = capsys.readouterr()
    assert (
        f"3 files predicted, 1 skipped: predictions.jsonl and embeddings (.npy, .parquet) in {out}"
        in printed.err
    )
    matrix, table = np.load(out / "embeddings.npy"), pq.read_table(out / "embeddings.parquet")
    files = [str(pictures / f"{number}.png") for number in range(3)]
    assert table["key"].to_pylist() == files
    assert [
        json.loads(line)["file"] for line in (out / "predictions.jsonl").read_text().splitlines()
    ] == files
    assert matrix.dtype == np.float32
    np.testing.assert_array_equal(matrix, np.array(table["embedding"].to_pylist(), np.float32))
    with pytest.raises(typer.Exit):
        predict(free_run, [str(pictures)])
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    np.testing.assert_array_equal(np.array([line["embedding"] for line in lines], np.float32), matrix)


def test_long_embedding_files_are_written_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("train.deliver.prediction_files.ROWS_AT_ONCE", 4)
    rows = np.random.default_rng(0).normal(size=(11, 3)).astype(np.float32)
    with EmbeddingFiles(tmp_path) as files:
        assert [files.add(str(n), row) for n, row in enumerate(rows)] == list(range(11))
    np.testing.assert_array_equal(np.load(tmp_path / "embeddings.npy"), rows)
    assert pq.read_table(tmp_path / "embeddings.parquet").num_rows == 11
    stop_after_rows(EmbeddingFiles(tmp_path), rows)
    np.testing.assert_array_equal(np.load(tmp_path / "embeddings.npy"), rows)  # the earlier files are whole
    assert sorted(path.name for path in tmp_path.iterdir()) == ["embeddings.npy", "embeddings.parquet"]


def stop_after_rows(files: EmbeddingFiles, rows: Any) -> None:
    try:
        with files:
            for row in rows:
                files.add("x", row + 1)
            raise KeyboardInterrupt
    except KeyboardInterrupt:
        pass


@pytest.mark.slow
def test_exported_classifiers_are_evaluated_as_their_runs(run_folder: Path, tmp_path: Path) -> None:
    store = tmp_path / "store.zarr"
    exported = export_student(run_folder, "onnx")
    ours = evaluate_run(run_folder, store, device="cpu", workers=0)
    theirs = evaluate_run(exported.path, store, workers=0)
    assert theirs["metrics"] == pytest.approx(ours["metrics"], abs=TOLERANCE)
    assert theirs["per_class"] == pytest.approx(ours["per_class"], abs=TOLERANCE)
    assert (theirs["task"], theirs["samples"], theirs["student"]) == (
        ours["task"],
        ours["samples"],
        ours["student"],
    )
    with pytest.raises(DeliveryError, match="ONNX files are measured on the CPU"):
        evaluate_run(exported.path, store, device="cuda")
    with pytest.raises(DeliveryError, match="no such file"):
        evaluate_run(tmp_path / "none.onnx", store)


def test_commands_end_with_the_next_one_on_stderr(
    run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from commands.deliver import export
    from commands.train import evaluate

    file, store = tmp_path / "student.onnx", tmp_path / "store.zarr"
    export(run_folder, out=file, json=True)
    printed = capsys.readouterr()
    assert json.loads(printed.out)["path"] == str(file)
    assert f"next: cli evaluate {file} STORE, or cli predict {file} INPUTS" in printed.err
    for run, after in (
        (run_folder, f"cli export {run_folder}, or cli quantize"),
        (file, f"cli predict {file}"),
    ):
        evaluate(run, str(store), device="cpu", workers=0, json=True)
        printed = capsys.readouterr()
        assert json.loads(printed.out)["samples"] == 8
        assert f"next: {after}" in printed.err


@pytest.mark.parametrize(
    "changed",
    [
        {"student": 3},
        {"image_size": "wide"},
        {"image_size": 10**9},
        {"mean": [1]},
        {"task": "x"},
        {"class_names": 1},
    ],
)
def test_a_damaged_model_card_is_one_line(changed: dict[str, Any]) -> None:
    card = ModelCard(
        student="timm:x",
        task="features",
        class_names=("a",),
        image_size=32,
        resize="squash",
        mean=(0, 0, 0),
        std=(1, 1, 1),
    )
    text = json.loads(card.to_json())
    assert ModelCard.from_json(json.dumps({**text, "of_a_newer_version": 1}), "m.onnx") == card
    for damaged in (json.dumps({**text, **changed}), "{", "[]", "{}"):
        with pytest.raises(DeliveryError, match="metadata is damaged: export the student again"):
            ModelCard.from_json(damaged, "m.onnx")


def test_an_exported_file_is_not_exported_again(tmp_path: Path) -> None:
    with pytest.raises(DeliveryError, match="an exported file already; name the run folder"):
        export_student(tmp_path / "model.onnx", "onnx", tmp_path / "other.onnx")


@pytest.mark.slow
def test_exported_segmenters_are_evaluated_as_their_runs(make_store: Any, tmp_path: Path) -> None:
    store = make_store(masks=True)
    run = trained(store, tmp_path / "run", student="unet/small", task="segmentation")
    exported = export_student(run, "onnx")
    ours = evaluate_run(run, store, device="cpu", workers=0)
    theirs = evaluate_run(exported.path, store, workers=0)
    assert theirs["metrics"] == pytest.approx(ours["metrics"], abs=1e-3)


@pytest.mark.slow
def test_exported_detectors_are_evaluated_as_their_runs(
    yolo_run: tuple[Path, Any], yolo_store: Path, tmp_path: Path
) -> None:
    exported = export_student(yolo_run[0], "onnx", tmp_path / "yolo.onnx")
    ours = evaluate_run(yolo_run[0], yolo_store, device="cpu", workers=0, batch_size=4)
    theirs = evaluate_run(exported.path, yolo_store, workers=0, batch_size=4)
    assert theirs["samples"] == ours["samples"]
    assert theirs["metrics"] == pytest.approx(ours["metrics"], abs=5e-3)


@pytest.mark.slow
def test_int8_files_are_evaluated_and_agree_with_quantize(make_store: Any, tmp_path: Path) -> None:
    pytest.importorskip("torchao")
    from train.deliver.quantize import QuantizeOptions, quantize_student

    store = make_store(train=40, val=20)
    run = trained(store, tmp_path / "run", epochs=2)
    summary = quantize_student(run, str(store), None, QuantizeOptions(calibration=16))
    for row in summary["models"]:
        found = evaluate_run(Path(summary["path"]) / row["file"], store, workers=0)
        assert found["metrics"]["top1"] == pytest.approx(row["top1"])


@pytest.mark.slow
def test_label_free_clip_students_predict_embeddings(clip_store: Path, tmp_path: Path) -> None:
    from train.deliver.predict import predict_files

    run = trained(clip_store, tmp_path / "free", student="lstm/small", task="features", batch_size=2)
    metrics = evaluate_run(run, clip_store, device="cpu", workers=0)["metrics"]
    assert set(metrics) == {"pooled_cosine", "knn_top1", "probe_top1"}
    found: list[Any] = list(predict_files(run, [str(tmp_path / "clips/val")]))
    assert len(found) == 6
    assert {item.embedding.ndim for item in found} == {1}
