"""`cli quantize`: int8 students, after training or with further training, measured before and after."""

from __future__ import annotations

import contextlib
import copy
import statistics
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from console.output import get_logger
from console.progress import track_progress
from files.writing import check_writable, whole_file
from processes.stop import Stopped, StopRequest
from store.reader import Store, open_store
from train.checkpoint import BEST, LAST, load_checkpoint
from train.config import TrainConfig
from train.data.splits import open_split, resolve_data, resolve_task, student_preprocessing
from train.deliver.export import OPSET, write_onnx
from train.deliver.inputs import pixel_reader, run_content, run_folder, run_options, split_reader, spread
from train.deliver.int8 import (
    Ranges,
    activation_ranges,
    calibrate,
    prepare_int8,
    quantized_training_graph,
    start_from,
    write_int8,
)
from train.deliver.model import LogitsOnly, ModelCard, OnnxModel, OnnxStudent, batches, open_student
from train.deliver.packages import require_torchao
from train.distill.resolve import chosen_teachers
from train.errors import DeliveryError
from train.loop.assemble import build_training
from train.loop.loop import Loop, Parts
from train.loop.machine import build_accelerator
from train.loop.optimizer import build_optimizer
from train.metrics import TASK_METRICS
from train.run_folder import make_folder, write_json
from train.students.base import Student, StudentOutput

log = get_logger("quantize")

BATCH = 16
LATENCY_ROUNDS = 30
FLOAT, PTQ, FINETUNED_PTQ, QAT = "float32", "int8-ptq", "int8-finetuned-ptq", "int8-qat"


@dataclass(frozen=True, kw_only=True)
class QuantizeOptions:
    """`calibration`: training images to learn ranges from; `epochs`, `learning_rate`: of fine-tuning (qat).

    `split`: the split to measure on; None is the run's validation split.
    """

    mode: Literal["ptq", "qat"] = "ptq"
    split: str | None = None
    calibration: int = 256
    epochs: int = 3
    learning_rate: float = 1e-5


def quantize_student(
    run: Path, store_path: str, out: Path | None, options: QuantizeOptions
) -> dict[str, Any]:
    """Write int8 ONNX files of a run's best student and compare them with float32 in ONNX Runtime, on this CPU.

    `ptq` writes float32.onnx and int8-ptq.onnx. `qat` goes on from the PTQ weights and ranges: it fine-tunes with fake
    quantization and the run's own (distillation) loss, and, for a fair comparison, also the float student equally
    long, followed by PTQ.
    `out` is the folder to write, None one in the run's. Returns (and writes to its summary.json) metrics, size and latency of each.
    Raises DeliveryError: unknown run, a store of other classes, a student that cannot be quantized.
    """
    require_torchao()
    check_writable(out or run_folder(run), "--out")
    student, card = open_student(run)
    check_quantizable(card)
    config = run_options(run).replace(store=Path(store_path), out=run_folder(run))
    store = chosen_teachers(config, open_store(store_path))[0]
    check_store(run, store, card)
    open_split(store, options.split or config.val_split, "--split")
    out = out or run_folder(run) / f"int8-{options.mode}"
    make_folder(out)
    inputs = calibration_inputs(store, config, card, options.calibration)
    models = {FLOAT: out / f"{FLOAT}.onnx", PTQ: out / f"{PTQ}.onnx"}
    with whole_file(models[FLOAT]) as partial:
        write_onnx(student, card, partial, inputs[:BATCH], OPSET)
    ranges = write_ptq(student, card, inputs, models[PTQ])
    schedule = options.epochs, options.learning_rate
    if options.mode == "qat":
        models |= {FINETUNED_PTQ: out / f"{FINETUNED_PTQ}.onnx", QAT: out / f"{QAT}.onnx"}
        with build_finetuning(run, config, store, student, card, *schedule) as tuning:
            log.info("fine-tuning in float32 for %d epochs, for comparison", options.epochs)
            write_ptq(run_finetuning(tuning), card, inputs, models[FINETUNED_PTQ])
        with build_finetuning(run, config, store, student, card, *schedule) as tuning:
            log.info("fine-tuning with fake quantization for %d epochs", options.epochs)
            write_qat(tuning, card, inputs[:3], ranges, models[QAT])
    return summarize(models, student, config, store, inputs, out, options)


def check_quantizable(card: ModelCard) -> None:
    if card.task not in ("classification", "segmentation"):
        raise DeliveryError(
            f"cannot quantize {card.student}: int8 is offered for classification and segmentation students, "
            f"this one learnt {card.task}"
        )


def check_store(run: Path, store: Store, card: ModelCard) -> None:
    """Other classes or another teacher than the run's are errors; other data is fine, and named."""
    names = tuple(store.manifest.class_names)
    if names and card.class_names and names != card.class_names:
        odd = sorted(set(names) ^ set(card.class_names)) or ["their order"]
        raise DeliveryError(
            f"{store.path}: other classes than {run} was trained on (differing: {', '.join(odd[:5])}): "
            "quantize with the run's store, or one with the same classes"
        )
    trained, teacher = run_content(run)["store"], store.manifest.teacher
    ours = (trained["teacher"], trained.get("teacher_fingerprint", teacher.fingerprint))
    if ours != (teacher.name, teacher.fingerprint):
        raise DeliveryError(
            f"{store.path}: features of teacher {teacher.name} ({teacher.fingerprint}), {run} learnt from {ours[0]} "
            f"({ours[1]}): quantize with features of the same teacher"
        )
    if trained["fingerprint"] != store.fingerprint:
        log.info("other data than the run was trained on: %s instead of %s", store.path, trained["path"])


def calibration_inputs(store: Store, config: TrainConfig, card: ModelCard, count: int) -> NDArray[np.float32]:
    """Normalized images float32 [B, 3, S, S], evenly spread over the training split."""
    read = pixel_reader(card, split_reader(config, store, config.train_split, card))
    rows = spread(np.flatnonzero(store[config.train_split].valid), count)
    return card.normalize(np.stack([read(int(row)) for row in rows]))


def write_ptq(student: Student, card: ModelCard, inputs: NDArray[np.float32], path: Path) -> Ranges:
    """Post-training static quantization: observe the ranges on `inputs`, convert, write. Returns the ranges."""
    example = torch.from_numpy(inputs[:3])
    # A copy: tracing and observing must not touch the student that is used again.
    prepared = prepare_int8(LogitsOnly(copy.deepcopy(student)), example, training=False)
    calibrate(prepared, batches(inputs, BATCH))
    ranges = activation_ranges(prepared)
    with whole_file(path) as partial:
        write_int8(prepared, card, example, partial)
    return ranges


def write_qat(
    tuning: FineTuning, card: ModelCard, example: NDArray[np.float32], ranges: Ranges, path: Path
) -> None:
    """Quantization-aware training from the weights and ranges of post-training quantization, then convert and write."""
    images = torch.from_numpy(example)
    graph = quantized_training_graph(tuning.student, images)
    graph.eval()
    calibrate(graph, [example])
    start_from(ranges, graph)
    trained = run_finetuning(tuning, QuantizedStudent(tuning.student, graph))
    assert isinstance(trained, QuantizedStudent)
    trained.graph.eval()
    with whole_file(path) as partial:
        write_int8(trained.graph, card, images, partial)


class QuantizedStudent(Student):
    """A student whose forward pass is its graph with fake quantization, so that the loop can train it.

    The graph has no levels: `features` alone are distilled.
    """

    def __init__(self, student: Student, graph: nn.Module) -> None:
        super().__init__()
        self.spec, self.graph = student.spec, graph

    def forward(self, images: torch.Tensor, lengths: torch.Tensor | None = None) -> StudentOutput:
        logits, features = self.graph(images)
        return StudentOutput(logits, features)


def summarize(
    models: Mapping[str, Path],
    student: Student,
    config: TrainConfig,
    store: Store,
    inputs: NDArray[np.float32],
    out: Path,
    options: QuantizeOptions,
) -> dict[str, Any]:
    split = options.split or config.val_split
    latencies = measure_latencies(models, inputs[:1])
    rows: list[dict[str, Any]] = []
    for name, path in models.items():
        metrics = measure_metrics(OnnxModel(path), config, store, split)
        size = path.stat().st_size / 1e6
        rows.append(
            {
                "model": name,
                "file": path.name,
                "size_mb": round(size, 3),
                "latency_ms": latencies[name],
                **metrics,
            }
        )
    first, compared = rows[0], TASK_METRICS[student.spec.task].compared
    for row in rows:
        row["size_ratio"] = round(row["size_mb"] / first["size_mb"], 4)
        row["speedup"] = round(first["latency_ms"] / row["latency_ms"], 3)
    summary = {
        "path": str(out),
        "mode": options.mode,
        "split": split,
        "student": student.spec.name,
        "calibration_images": len(inputs),
        "epochs": options.epochs if options.mode == "qat" else 0,
        "metric_names": [name for name in compared if name in first],
        "models": rows,
    }
    write_json(out / "summary.json", summary)
    return summary


def measure_latencies(models: Mapping[str, Path], image: NDArray[np.float32]) -> dict[str, float]:
    """Median milliseconds of one image on one thread, the models in turn so that a noisy machine treats all alike."""
    sessions = {name: OnnxModel(path, threads=1) for name, path in models.items()}
    times: dict[str, list[float]] = {name: [] for name in sessions}
    for model in sessions.values():
        model.run(image)
    for _ in range(LATENCY_ROUNDS):
        for name, model in sessions.items():
            started = time.perf_counter()
            model.run(image)
            times[name].append(1000 * (time.perf_counter() - started))
    return {name: round(statistics.median(values), 4) for name, values in times.items()}


def measure_metrics(model: OnnxModel, config: TrainConfig, store: Store, split: str) -> dict[str, float]:
    """The task's metrics on a split."""
    from train.deliver.evaluate import about, data_to_evaluate, measure
    from train.loop.machine import build_accelerator

    config = config.replace(
        device="cpu",
        image_size=model.card.image_size,
        batch_size=BATCH,
        train_split=f"not {split}",  # only the measured split is opened
        val_split=split,
    )
    student = OnnxStudent(model)
    data = data_to_evaluate(config, store, about(model.card), student.spec.num_classes)
    measured = measure(student, config, store, data, build_accelerator(config))
    return {name: measured[name] for name in TASK_METRICS[data.task].compared if name in measured}


@dataclass
class FineTuning:
    """The parts of the loop around a trained student, in float32 on one device."""

    parts: Parts
    student: Student
    config: TrainConfig
    stop: StopRequest


@contextlib.contextmanager
def build_finetuning(
    run: Path,
    config: TrainConfig,
    store: Store,
    student: Student,
    card: ModelCard,
    epochs: int,
    learning_rate: float,
) -> Iterator[FineTuning]:
    """The run's own data, loss and alignment head around a copy of `student`, with a short gentle schedule."""
    config = config.replace(
        epochs=epochs,
        learning_rate=learning_rate,
        warmup_epochs=0.0,
        precision="fp32",
        student_path=None,
        pretrained=False,
        compile=False,
        gradient_checkpointing=False,
        ema_decay=None,
        early_stopping_patience=None,
        lora_rank=0,
        control=False,
    )
    data = resolve_data(config, store, resolve_task(config))
    data = replace(data, preprocessing=student_preprocessing(store, card.preprocessing))
    with StopRequest() as stop:
        built = build_training(config, store, data, build_accelerator(config), stop)
        built.student.load_state_dict(student.state_dict())
        restore_head(built.parts, run)
        try:
            yield FineTuning(built.parts, built.student, config, stop)
        finally:
            built.parts.train_loader.close()
            built.parts.val_loader.close()


def restore_head(parts: Parts, run: Path) -> None:
    """The alignment heads of the student's own checkpoint: fresh ones would pull the student away from what it learned."""
    own, last = run / BEST if run.is_dir() else run, run_folder(run) / LAST
    module = parts.module
    heads = {
        "alignment_head": module.projector,
        "level_heads": module.level_heads,
        "others": module.others,
    }
    for path in (own, last):  # checkpoints of older versions may have no head in best.pt
        content = load_checkpoint(path) if path.exists() else {}
        content = {**content.get("training", {}), **content}
        for name, state in [(name, content.get(name)) for name in heads]:
            if state and (head := heads.pop(name)) is not None:
                head.load_state_dict(state)


def run_finetuning(tuning: FineTuning, student: Student | None = None) -> Student:
    """Train to the end and return the student of the best epoch; how it began counts as one.

    `student` replaces the forward pass (its parameters are what is trained). Raises Stopped after a signal.
    """
    parts, config = tuning.parts, tuning.config
    if student is not None:
        parts.module.student = student
        optimizer = build_optimizer(parts.module, config.optimizer, config.learning_rate, config.weight_decay)
        parts.optimizer = parts.accelerator.prepare_optimizer(optimizer)
        parts.guard = type(parts.guard)(parts.module)
    trained = student or tuning.student
    metric = TASK_METRICS[parts.objective.task.name].best
    total = len(parts.train_loader.batches.rows) * config.epochs
    with track_progress(total, "fine-tuning", "samples") as display:
        loop = Loop(parts)
        loop.display = display
        best, best_state = loop.validate()[metric], copy.deepcopy(trained.state_dict())
        display.note(f"before: {metric} {best:.4f}")
        try:
            for record in loop.run():
                display.note(f"epoch {record['epoch']}/{config.epochs}: {metric} {record[metric]:.4f}")
                if record[metric] > best:
                    best, best_state = record[metric], copy.deepcopy(trained.state_dict())
                parts.progress.finish_epoch(record)
        except Stopped as stopped:
            raise Stopped(
                "stopped while fine-tuning; the same command starts again", stopped.exit_code
            ) from None
    trained.load_state_dict(best_state)
    return trained.eval()
