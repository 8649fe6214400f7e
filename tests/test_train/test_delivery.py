"""Export, prediction and quantization of a student that was really trained (briefly)."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from PIL import Image

from files.writing import OutputError
from processes.stop import Stopped
from store.reader import open_store
from tests.test_train.runs import cli, trained
from train.checkpoint import load_student_from_run
from train.data.images import ImageReader
from train.deliver.draw import mask_image
from train.deliver.export import export_student
from train.deliver.files import BadFile, find_clips, find_images
from train.deliver.inputs import sample_inputs
from train.deliver.model import METADATA_KEY, ModelCard, OnnxModel, open_model, open_student
from train.deliver.predict import Prediction, predict_files, to_image
from train.deliver.prediction_files import PredictionWriter
from train.errors import DeliveryError


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    folder = tmp_path / "pictures"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for index in range(3):
        Image.fromarray(rng.integers(0, 255, (40, 60, 3), dtype=np.uint8)).save(folder / f"{index}.png")
    return folder


def test_onnx_has_dynamic_batch_and_its_card_and_equals_pytorch(run_folder: Path) -> None:
    exported = export_student(run_folder, "onnx")
    assert exported.max_abs_difference <= exported.tolerance
    assert exported.checked_images == 8
    onnx.checker.check_model(str(exported.path))
    session = onnxruntime.InferenceSession(str(exported.path))
    assert isinstance(session.get_inputs()[0].shape[0], str)
    student, card = open_student(run_folder)
    inputs = sample_inputs(run_folder, card, 5)
    for count in (1, 2, 5):
        (got,) = session.run(None, {"images": inputs[:count]})
        with torch.no_grad():
            expected = student(torch.from_numpy(inputs[:count])).logits.numpy()
        np.testing.assert_allclose(got, expected, atol=exported.tolerance)
    stored = ModelCard.from_json(session.get_modelmeta().custom_metadata_map[METADATA_KEY], "file")
    assert stored == card
    assert stored.class_names == ("red", "green", "blue")


def test_torch_export_is_checked_too(run_folder: Path) -> None:
    exported = export_student(run_folder, "torch-export")
    program = torch.export.load(str(exported.path))
    assert program.module()(torch.zeros(7, 3, 32, 32)).shape == (7, 3)


def test_an_export_that_differs_is_not_written(run_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = OnnxModel.outputs

    def shifted(self: OnnxModel, batch: Any) -> dict[str, Any]:
        return {name: value + 1 for name, value in real(self, batch).items()}

    monkeypatch.setattr(OnnxModel, "outputs", shifted)
    with pytest.raises(DeliveryError, match=r"differ by 1\b.* not written"):
        export_student(run_folder, "onnx")
    assert not list(run_folder.glob("*.onnx*"))
    assert not list(run_folder.glob(".*partial*"))


def test_lora_is_merged_before_export(make_store: Any, run_folder: Path, tmp_path: Path) -> None:
    weights = run_folder / "best.pt"
    run = trained(make_store("other.zarr", seed=1), tmp_path / "lora", lora_rank=2, student_path=weights)
    exported = export_student(run, "onnx")
    student, _ = load_student_from_run(run)
    _, card = open_student(run)
    inputs = sample_inputs(run, card, 4)
    with torch.no_grad():
        expected = student(torch.from_numpy(inputs)).logits.numpy()
    np.testing.assert_allclose(OnnxModel(exported.path).run(inputs), expected, atol=1e-4)
    names = {node.name for node in onnx.load(str(exported.path)).graph.initializer}
    assert not [name for name in names if "lora" in name]


def test_pytorch_and_onnx_predict_the_same(run_folder: Path, pictures: Path) -> None:
    exported = export_student(run_folder, "onnx")
    ours = [p.record for p in predict_files(run_folder, [str(pictures)]) if isinstance(p, Prediction)]
    theirs = [p.record for p in predict_files(exported.path, [str(pictures)]) if isinstance(p, Prediction)]
    assert len(ours) == 3
    for one, other in zip(ours, theirs, strict=True):
        assert one["file"] == other["file"]
        assert [c["class"] for c in one["top"]] == [c["class"] for c in other["top"]]
        assert sum(c["probability"] for c in one["top"]) == pytest.approx(1, abs=1e-5)


@pytest.mark.slow
def test_sixteen_bit_images_are_read_by_the_stores_rule(make_store: Any, tmp_path: Path) -> None:
    """The manifest's bit depth reaches stage two, the checkpoint and the ONNX file: 235 of 65535 is not black."""
    store = make_store(images="none")
    root = json.loads((store / "zarr.json").read_text())
    root["attributes"]["preprocessing"]["options"] = {"bit_depth": 8}
    (store / "zarr.json").write_text(json.dumps(root))
    run = trained(store, tmp_path / "run")
    narrow = np.random.default_rng(0).integers(0, 235, (40, 60), dtype=np.uint8)
    Image.fromarray(narrow).save(tmp_path / "narrow.png")
    Image.fromarray(narrow.astype(np.uint16)).save(tmp_path / "wide.png")
    exported = export_student(run, "onnx")
    for model in (run, exported.path):
        found = predict_files(model, [str(tmp_path / "narrow.png"), str(tmp_path / "wide.png")])
        narrow_top, wide_top = (item.record["top"] for item in found)
        assert narrow_top == wide_top
    opened = open_store(store)
    reader = ImageReader(opened["train"], tmp_path, opened.manifest.preprocessing)
    reader.file_bytes = lambda row: (tmp_path / "wide.png").read_bytes()  # type: ignore[method-assign]
    assert np.array_equal(np.asarray(reader.read(0, 32).image)[..., 0], narrow)


def test_bad_files_are_named_in_their_place(run_folder: Path, pictures: Path) -> None:
    (pictures / "1.png").write_bytes(b"\x89PNG broken")
    results = list(predict_files(run_folder, [str(pictures)], batch_size=2))
    assert [isinstance(item, BadFile) for item in results] == [False, True, False]
    assert results[1].file.endswith("1.png")  # type: ignore[union-attr]


def test_what_cannot_be_delivered_is_one_line(
    make_store: Any,
    run_folder: Path,
    pictures: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from cli import main

    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    store = make_store("s.zarr")
    tried = {
        ("predict", run_folder, tmp_path / "empty"): "no image or video files in it",
        ("predict", run_folder, pictures, "--device", "gpu"): "expected auto, cpu, cuda or cuda:N",
        ("predict", tmp_path / "nothing", pictures): "no such run or file",
        ("predict", run_folder, pictures, "--out", tmp_path / "file/x"): "is a file, expected a folder",
        ("predict", run_folder, pictures, "--out", tmp_path / "file"): "is a file, expected a folder",
        ("predict", run_folder, pictures / "0.png", "--out", pictures): "0.png, an input, and pictures",
        ("export", tmp_path / "nothing"): "no such checkpoint",
        ("export", run_folder, "--out", tmp_path / "file/x.onnx"): "file is a file, expected a folder",
        ("export", run_folder, "--images", tmp_path / "empty"): "no image files in it",
        ("export", run_folder, "--out", tmp_path / "empty"): "is a folder, expected a file: name one in it",
        ("export", run_folder, "--images", tmp_path / "file"): "--images: " + str(tmp_path / "file"),
        ("export", run_folder, "--opset", "3"): "operator set 3",
        ("quantize", run_folder, tmp_path / "nothing.zarr"): "no such store",
        ("quantize", run_folder, store, "--split", "tset"): "no split tset, it has train, val",
        ("quantize", run_folder, store, "--out", tmp_path / "file"): "is a file, expected a folder",
        ("quantize", run_folder, store, "--epochs", "7"): "nothing is trained in --mode ptq",
        (
            "quantize",
            run_folder,
            store,
            "--mode=qat",
            "--learning-rate=-1",
        ): "-1.0: expected a number above 0",
        (
            "report",
            tmp_path / "empty",
        ): "nor a sweep (sweep.json), and none below it: name what `cli train --out`",
        ("report", run_folder, "--samples", "-3"): "--samples",
        ("report", run_folder, "--out", tmp_path / "r.csv"): "expected a file that ends in .html",
        ("inspect", store, "--pictures", tmp_path / "file"): "file: is a file, expected a folder",
    }
    for arguments, words in tried.items():
        monkeypatch.setattr("sys.argv", ["cli", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
        told = capsys.readouterr().err.strip().splitlines()
        assert ended.value.code in (1, 2), arguments
        assert told[-1].startswith("error: "), arguments
        assert words in told[-1], arguments
    assert sorted(path.name for path in pictures.iterdir()) == ["0.png", "1.png", "2.png"]


def test_a_still_is_no_clip(pictures: Path) -> None:
    with pytest.raises(DeliveryError, match=r"0\.png: a still image, and this student takes clips"):
        find_clips([str(pictures / "0.png")])


def test_a_record_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    picture = Image.new("RGB", (8, 8))
    with PredictionWriter(tmp_path / "out") as writer:
        writer.write(Prediction({"file": "0.png"}, picture))
        real = writer.records

        class Full:
            tell, truncate, close = real.tell, real.truncate, real.close

            def write(self, line: bytes) -> int | None:
                return real.write(line[:5])

        monkeypatch.setattr(writer, "records", Full())
        with pytest.raises(
            OutputError, match=r"predictions\.jsonl: cannot be written: No space left on device"
        ):
            writer.write(Prediction({"file": "1.png"}, picture))
    lines = (tmp_path / "out/predictions.jsonl").read_text().splitlines()
    assert [json.loads(line)["file"] for line in lines] == ["0.png"]


def test_ctrl_c_says_what_was_predicted(
    run_folder: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from commands.deliver import predict

    real = PredictionWriter.write

    def interrupted(self: PredictionWriter, prediction: Prediction) -> None:
        real(self, prediction)
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(PredictionWriter, "write", interrupted)
    with pytest.raises(Stopped, match=r"^stopped: 1 files done, in .*out; the same command") as caught:
        predict(run_folder, [str(pictures)], tmp_path / "out")
    assert caught.value.exit_code == 130
    assert len((tmp_path / "out/predictions.jsonl").read_text().splitlines()) == 1


def test_predict_ends_with_what_was_done_and_the_next_command(
    run_folder: Path, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from commands.deliver import predict

    predict(run_folder, [str(pictures)], tmp_path / "out")
    printed = capsys.readouterr()
    assert len(printed.out.splitlines()) == 3, "stdout is one line of JSON for each file"
    done = f"3 files predicted: predictions.jsonl and pictures in {tmp_path / 'out'}"
    assert printed.err.endswith(f"{done}\nnext: cli export {run_folder}\n")
    predict(run_folder, [str(pictures)])
    assert "next: the same command with --out FOLDER" in capsys.readouterr().err


@pytest.mark.slow
def test_predict_command_skips_bad_files_and_exits_1(
    run_folder: Path, pictures: Path, tmp_path: Path
) -> None:
    (pictures / "1.png").write_bytes(b"")
    done = cli("predict", run_folder, pictures, "--out", tmp_path / "out")
    assert done.returncode == 1
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert [Path(line["file"]).name for line in lines] == ["0.png", "2.png"]
    assert "1.png" in done.stderr
    assert "Traceback" not in done.stderr
    assert sorted(p.name for p in (tmp_path / "out").glob("*.jpg")) == ["0.jpg", "2.jpg"]
    good = cli("predict", run_folder, pictures / "0.png", "--json")
    assert good.returncode == 0
    assert len(json.loads(good.stdout)["predictions"]) == 1


def test_pictures_of_equal_names_stay_apart(run_folder: Path, pictures: Path, tmp_path: Path) -> None:
    other = tmp_path / "more"
    other.mkdir()
    (pictures / "0.png").rename(other / "1.png")
    items = [p for p in predict_files(run_folder, [str(pictures), str(other)]) if isinstance(p, Prediction)]
    for _ in range(2):  # a second call replaces what the first wrote
        with PredictionWriter(tmp_path / "out") as writer:
            for item in items:
                writer.write(item)
        records = [json.loads(line) for line in (tmp_path / "out/predictions.jsonl").open()]
        assert len(records) == len(items) == 3
        assert {record["picture"] for record in records} == {p.name for p in (tmp_path / "out").glob("*.jpg")}


def test_inputs_that_name_nothing_are_errors(tmp_path: Path, pictures: Path) -> None:
    with pytest.raises(DeliveryError, match="no such file"):
        find_images([str(tmp_path / "nothing.png")])
    (tmp_path / "empty").mkdir()
    with pytest.raises(DeliveryError, match="empty: no image files in it"):
        find_images([str(tmp_path / "empty")])
    with pytest.raises(DeliveryError, match="no such file or folder, and no match"):
        find_images([str(tmp_path / "*.jpg")])
    assert len(find_images([str(pictures / "*.png"), str(pictures)])) == 3


def test_unknown_and_unfinished_runs_are_one_clear_error(tmp_path: Path) -> None:
    with pytest.raises(DeliveryError, match="no such run"):
        open_model(tmp_path / "nothing")
    (tmp_path / "run").mkdir()
    with pytest.raises(Exception, match=r"no best\.pt") as caught:
        open_model(tmp_path / "run")
    assert getattr(caught.value, "exit_code", None) == 1


def test_an_unfinished_run_is_refused_and_its_best_epoch_can_be_named(run_folder: Path) -> None:
    (run_folder / "summary.json").unlink()
    with pytest.raises(DeliveryError, match=r"has not finished.*--resume.*best\.pt"):
        open_student(run_folder)
    assert open_student(run_folder / "best.pt")[1].class_names == ("red", "green", "blue")


@pytest.mark.slow
@pytest.mark.parametrize("opset", [5, 99])
def test_an_operator_set_that_cannot_be_made_is_an_error(run_folder: Path, opset: int) -> None:
    """torch's exporter would write another one and only log it."""
    with pytest.raises(DeliveryError, match=f"operator set {opset}: .*--opset 18"):
        export_student(run_folder, "onnx", opset=opset)
    assert not list(run_folder.glob("*.onnx"))


@pytest.mark.slow
def test_the_operator_set_is_the_one_asked_for(run_folder: Path) -> None:
    model = onnx.load(str(export_student(run_folder, "onnx", opset=18).path))
    assert [entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")] == [18]


@pytest.mark.slow
def test_clips_are_exported_and_predicted_as_they_were_trained(clip_store: Path, tmp_path: Path) -> None:
    run = trained(clip_store, tmp_path / "lstm", student="lstm/small", batch_size=3)
    exported = export_student(run, "onnx")
    assert exported.max_abs_difference <= exported.tolerance
    clips = clip_store.parent / "clips/val"
    results = [list(predict_files(model, [str(clips / "clip*")])) for model in (run, exported.path)]
    for ours, theirs in zip(*results, strict=True):
        assert isinstance(ours, Prediction)
        assert isinstance(theirs, Prediction)
        assert ours.record["frames"] == 6  # three pairs, as in the store
        assert [c["class"] for c in ours.record["top"]] == [c["class"] for c in theirs.record["top"]]
    assert len(results[0]) == 6
    (clips / "clip0/1.png").write_bytes(b"")
    (bad, *_) = predict_files(run, [str(clips)])
    assert isinstance(bad, BadFile)
    assert "1.png" in bad.reason


@pytest.mark.slow
def test_detectors_go_through_ultralytics_and_predict_the_same(tmp_path: Path, pictures: Path) -> None:
    from tests.test_train import yolo_data

    store = tmp_path / "boxes.zarr"
    splits = {"train": yolo_data.scenes(16, 0), "val": yolo_data.scenes(4, 1)}
    yolo_data.make_store(store, splits, resize="letterbox")
    run = trained(store, tmp_path / "yolo", student="yolov8n", image_size=64)
    exported = export_student(run, "onnx")
    assert exported.max_abs_difference <= exported.tolerance
    metadata = {item.key: item.value for item in onnx.load(str(exported.path)).metadata_props}
    assert metadata["names"] == "{0: 'red', 1: 'green'}"  # ultralytics' own entry
    assert ModelCard.from_json(metadata[METADATA_KEY], "file").task == "detection"
    results = [
        [
            item.record
            for item in predict_files(model, [str(pictures)], confidence=1e-4)
            if isinstance(item, Prediction)
        ]
        for model in (run, run / "best.pt", exported.path)
    ]
    assert [len(records) for records in results] == [3, 3, 3]
    assert any(record["boxes"] for record in results[0])
    assert results[1] == results[0]  # the same weights in the same runtime: every box, to the last digit
    # ONNX Runtime rounds otherwise, and after one epoch boxes have nearly equal scores, also those of the two classes of one
    # box: their order is chance. So what both are made of is compared, for every cell.
    assert all(record["boxes"] for record in results[2])
    raw = []
    for model in (run, exported.path):
        opened = open_model(model)
        pixels = np.stack([opened.card.render(Image.open(path)) for path in find_images([str(pictures)])])
        raw.append(opened.run(opened.card.normalize(pixels)))
    np.testing.assert_allclose(raw[0][:, :4], raw[1][:, :4], atol=0.05)  # pixels
    np.testing.assert_allclose(raw[0][:, 4:], raw[1][:, 4:], atol=1e-5)  # scores
    program = export_student(run, "torch-export")
    assert torch.export.load(str(program.path)).module()(torch.zeros(5, 3, 64, 64)).shape[:2] == (5, 6)
    with pytest.raises(DeliveryError, match="operator set 30: ultralytics makes 11 to 20"):
        export_student(run, "onnx", opset=30)


def test_a_foreign_onnx_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "foreign.onnx"
    torch.onnx.export(torch.nn.ReLU(), (torch.zeros(1, 3),), str(path), dynamo=True, verbose=False)
    with pytest.raises(DeliveryError, match="not exported by `cli export`"):
        open_model(path)


def test_segmentation_masks_come_back_in_the_picture_s_own_pixels(
    make_store: Any, pictures: Path, tmp_path: Path
) -> None:
    run = trained(make_store(masks=True), tmp_path / "unet", student="unet/small")
    (item, *_) = predict_files(run, [str(pictures)])
    assert isinstance(item, Prediction)
    assert item.mask is not None
    assert item.mask.size == (60, 40)
    assert item.image.width == 60
    assert item.image.height >= 40  # the legend is below the picture
    assert sum(item.record["shares"].values()) == pytest.approx(1)
    assert set(item.record["shares"]) <= {"background", "red", "green", "blue"}


def test_a_mask_is_carried_back_through_a_centre_crop() -> None:
    card = ModelCard(
        student="unet/small",
        task="segmentation",
        class_names=("a", "b"),
        image_size=8,
        resize="center-crop",
        mean=(0, 0, 0),
        std=(1, 1, 1),
    )
    classes = np.ones((8, 8), dtype=np.uint8)
    carried = np.asarray(mask_image(classes, card.view_of((16, 8)), (16, 8)))
    assert (carried[:, 4:12] == 1).all()
    assert (carried[:, :4] == 255).all()
    assert (carried[:, 12:] == 255).all()


def test_boxes_are_carried_back_through_a_letterbox() -> None:
    card = ModelCard(
        student="yolov8/n",
        task="detection",
        class_names=("a",),
        image_size=64,
        resize="letterbox",
        mean=(0, 0, 0),
        std=(1, 1, 1),
    )
    # A 128 x 64 image fills the middle half of the square's height.
    found = np.array([[16, 24, 48, 40, 0.9, 0]], dtype=np.float32)
    np.testing.assert_allclose(to_image(found, card, (128, 64))[0], [32, 16, 96, 48, 0.9, 0], atol=1e-4)
