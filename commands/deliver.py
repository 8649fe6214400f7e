"""`cli predict`, `cli export` and `cli quantize`."""

from __future__ import annotations

import math
import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from commands.options import AsJson


class ExportFormat(StrEnum):
    onnx = "onnx"
    torch_export = "torch-export"
    timm = "timm"


class QuantizeMode(StrEnum):
    ptq = "ptq"
    qat = "qat"


def predict(
    run: Annotated[Path, typer.Argument(help="A run folder, its best.pt, or an exported .onnx file.")],
    inputs: Annotated[list[str], typer.Argument(help="Images, videos, folders, globs (quoted) or clips.")],
    out: Annotated[
        Path | None, typer.Option(help="Write predictions.jsonl and pictures into this folder.")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Images a forward pass.")] = 16,
    confidence: Annotated[float, typer.Option(min=0, max=1, help="Detections below it are left out.")] = 0.25,
    every: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Of videos, every Nth frame. [default: all]")
    ] = None,
    fps: Annotated[
        float | None, typer.Option(min=0.001, help="Of videos, about so many frames of each second.")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    json_: Annotated[
        bool, typer.Option("--json", help="Print one JSON object instead of a line a file.")
    ] = False,
) -> None:
    """cli predict runs/resnet18 photos/ --out predictions

    Run a trained student on images, videos, folders, globs or clips. Each file is one line of JSON on stdout,
    each frame of a video one with its time in seconds; with --out also a picture (or an annotated video) with
    the label, boxes or mask drawn. A label-free student gives embeddings: numbers on stdout, or with --out
    embeddings.npy and embeddings.parquet. Files that cannot be read are named and skipped, and the exit code is
    then 1.
    """
    import contextlib
    import json

    from console.output import print_json
    from processes.stop import Stopped, StopRequest
    from train.deliver.files import BadFile
    from train.deliver.predict import Sampling, predict_files
    from train.deliver.prediction_files import PredictionWriter

    records: list[dict[str, Any]] = []
    bad: list[dict[str, str]] = []
    begun: set[str] = set()
    made = "pictures"
    found = predict_files(
        run,
        inputs,
        out=out,
        device=device,
        batch_size=batch_size,
        confidence=confidence,
        sampling=Sampling(every, fps),
    )
    with (
        StopRequest() as stop,
        PredictionWriter(out) if out is not None else contextlib.nullcontext() as writer,
    ):
        for item in found:
            file = item.file if isinstance(item, BadFile) else item.record["file"]
            if stop.requested:
                where = f", in {out}" if out is not None else ""
                done = len(begun - {file})  # a video's frames come one by one
                raise Stopped(
                    f"stopped: {done} files done{where}; the same command starts again", stop.exit_code
                )
            begun.add(file)
            if isinstance(item, BadFile):
                bad.append(item._asdict())
                print(f"skipped {item.file}: {item.reason}", file=sys.stderr, flush=True)
                continue
            if writer is not None:
                writer.write(item)
            if getattr(item, "embedding", None) is not None:
                made = "embeddings (.npy, .parquet)"
            record = printed_record(item, out)
            if json_:
                records.append(record)
            else:
                print(json.dumps(record, ensure_ascii=False), flush=True)
    if json_:
        print_json({"run": run, "predictions": records, "bad": bad})
    print(
        predict_summary(run, len(begun - {item["file"] for item in bad}), len(bad), out, made),
        file=sys.stderr,
        flush=True,
    )
    if bad:
        print(f"error: {len(bad)} files could not be read", file=sys.stderr)
        raise typer.Exit(1)


def printed_record(item: Any, out: Path | None) -> dict[str, Any]:
    """The record for stdout; an embedding is part of it unless files hold it."""
    embedding = getattr(item, "embedding", None)
    if embedding is None or out is not None:
        return dict(item.record)
    return {
        **item.record,
        "embedding": [float(str(value)) for value in embedding],
    }  # float32's shortest digits


def predict_summary(run: Path, predicted: int, skipped: int, out: Path | None, made: str) -> str:
    """What was done, and a useful next command."""
    text = f"{predicted:,} files predicted" + (f", {skipped:,} skipped" if skipped else "")
    if out is None:
        return f"{text}\nnext: the same command with --out FOLDER keeps predictions and {made}"
    exported = run.suffix == ".onnx"
    return f"{text}: predictions.jsonl and {made} in {out}" + (
        "" if exported else f"\nnext: cli export {run}"
    )


def export(
    run: Annotated[Path, typer.Argument(help="A run folder or its best.pt.")],
    format_: Annotated[ExportFormat, typer.Option("--format", help="What to write.")] = ExportFormat.onnx,
    out: Annotated[
        Path | None,
        typer.Option(help="The file (timm: folder). [default: named after the student, in the run]"),
    ] = None,
    images: Annotated[
        Path | None,
        typer.Option(help="Folder of images (or clips) for the check. [default: the run's store]"),
    ] = None,
    opset: Annotated[int | None, typer.Option(help="ONNX operator set. [default: 20]")] = None,
    json: AsJson = False,
) -> None:
    """cli export runs/resnet18 --format onnx

    Export a trained student with dynamic batch, preprocessing and class names inside, and compare it with
    PyTorch on real images. LoRA adapters are merged first; YOLO students go through ultralytics.

    cli export runs/resnet18 --format timm

    A folder with config.json and model.safetensors, which timm opens as "local-dir:FOLDER" and a hub takes as it is.
    """
    from console.output import print_json
    from train.deliver.export import OPSET, export_student

    done = export_student(run, format_.value, out, images, opset or OPSET)
    if format_ is ExportFormat.onnx:
        after = f"cli evaluate {done.path} STORE, or cli predict {done.path} INPUTS"
    elif format_ is ExportFormat.timm:
        after = f'load it with timm.create_model("local-dir:{done.path}", pretrained=True)'
    else:
        after = f"load it with torch.export.load({str(done.path)!r})"
    print(f"next: {after}", file=sys.stderr, flush=True)
    if json:
        print_json(done._asdict())
        return
    print(
        f"{done.path}: {done.size_bytes / 1e6:.1f} MB; outputs differ by at most {done.max_abs_difference:.2g} from "
        f"PyTorch on {done.checked_images} real images (allowed: {done.tolerance:.2g})"
    )


def quantize(
    run: Annotated[Path, typer.Argument(help="A run folder.")],
    store: Annotated[str, typer.Argument(help="The store it was trained from: calibration and fine-tuning.")],
    mode: Annotated[
        QuantizeMode, typer.Option(help="ptq: calibrate only; qat: also fine-tune.")
    ] = QuantizeMode.ptq,
    out: Annotated[Path | None, typer.Option(help="The folder to write. [default: RUN/int8-MODE]")] = None,
    calibration: Annotated[int, typer.Option(min=8, help="Training images to calibrate with.")] = 256,
    epochs: Annotated[
        int | None, typer.Option(min=1, help="qat: epochs of fine-tuning. [default: 3]")
    ] = None,
    learning_rate: Annotated[float | None, typer.Option(help="qat: learning rate. [default: 1e-05]")] = None,
    split: Annotated[
        str | None, typer.Option(help="The split to measure on. [default: the run's validation split]")
    ] = None,
    json: AsJson = False,
) -> None:
    """cli quantize runs/resnet18 features.zarr --mode ptq

    Make an int8 ONNX student: post-training static quantization with calibration from the store's training
    split, or quantization-aware training with the distillation loss still on. Accuracy, size and latency
    before and after are printed and written to summary.json.
    """
    from console.output import print_json, print_table
    from train.deliver.packages import require_torchao

    require_torchao()  # before torch and the run are loaded
    from train.deliver.quantize import QuantizeOptions, quantize_student

    given = finetuning_options(mode, epochs, learning_rate)
    options = QuantizeOptions(mode=mode.value, calibration=calibration, split=split, **given)
    summary = quantize_student(run, store, out, options)
    if json:
        print_json(summary)
        return
    print_table(
        summary["models"],
        ["model", "size_mb", "size_ratio", "latency_ms", "speedup", *summary["metric_names"]],
    )
    print(f"written: {summary['path']}")


def finetuning_options(mode: QuantizeMode, epochs: int | None, learning_rate: float | None) -> dict[str, Any]:
    """What was given of `epochs` and `learning_rate`; a usage error in --mode ptq."""
    named = {"--epochs": epochs, "--learning-rate": learning_rate}
    given = {option: value for option, value in named.items() if value is not None}
    if given and mode is QuantizeMode.ptq:
        raise typer.BadParameter(
            "nothing is trained in --mode ptq: leave it out or pass --mode qat",
            param_hint=" and ".join(given),
        )
    if learning_rate is not None and not 0 < learning_rate < math.inf:
        raise typer.BadParameter(f"{learning_rate}: expected a number above 0", param_hint="--learning-rate")
    return {option.removeprefix("--").replace("-", "_"): value for option, value in given.items()}
