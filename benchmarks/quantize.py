"""What int8 costs and gains: size, speed and accuracy of trained students in ONNX Runtime, on this CPU.

Real images (benchmarks/learning_data.py), 64 px. resnet18 learns Twitter's emoji and is measured on 85 % of Google's
drawings of them; unet/small learns to tell photographed objects from the photographs that they were pasted into, and is
measured on other objects in other photographs. Both are distilled from EfficientNet-Lite2 (ImageNet), then quantized by what
`cli quantize --mode qat` does: after training (PTQ), and with further training (QAT), which is compared with equally
long fine-tuning in float32 followed by PTQ. Metrics are of the split `test`, which no training and no choice of an epoch
saw. Calibration: 256 training images.

    python benchmarks/quantize.py [--students resnet18,unet] [--seeds 1] [--epochs 2] --work DIR [--timings] [--json]

What was trained and quantized is kept in --work and not repeated; times are always measured again, the models in turn, one
image at a time on one thread. `--timings` takes only the times, of what is finished.
"""

from __future__ import annotations

import argparse
import json
import logging
import shutil
import statistics
import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.learning_data import write_emoji_table, write_scenes
from benchmarks.stores import extract_features

SIDE = 64
TEACHER_SIDE = 160
FLOAT = "float32"
AIMS = {"size_ratio": 0.3, "speedup": 1.3, "points_lost_ptq": 1.0, "points_lost_qat": 0.5}


class Study(NamedTuple):
    """A student, its data's layout (`source`), the metric it is judged by, and how it is trained."""

    student: str
    source: str
    metric: str
    options: dict[str, Any]


STUDIES = {
    "resnet18": Study(
        "resnet18",
        "table",
        "top1",
        {"epochs": 5, "batch_size": 32, "learning_rate": 1e-3, "augment": "mild"},
    ),
    "unet": Study(
        "unet/small",
        "masks",
        "miou",
        {"epochs": 14, "batch_size": 8, "learning_rate": 1e-3, "augment": "full"},
    ),
}
SCENES = {"train": 240, "val": 48, "test": 300}


def make_store(study: Study, work: Path) -> Path:
    """The store of teacher features, extracted on first use."""
    path, data = work / f"{study.source}.zarr", work / study.source
    if (path / "complete").exists():
        return path
    if study.source == "table":
        write_emoji_table(data, None, unlabeled=False, draw=0, every=1)
    else:
        merge_classes(write_scenes(data, SCENES))
    shutil.rmtree(path, ignore_errors=True)
    extract_features(data, path, source=study.source, image_size=TEACHER_SIDE, grid="native", workers=0)
    (path / "complete").touch()
    return path


def merge_classes(scenes: Path) -> None:
    """Two classes, background and object: what so few scenes can teach a network with random weights."""
    for path in scenes.glob("masks/*/*.png"):
        mask = Image.open(path)
        Image.fromarray(np.minimum(np.asarray(mask), 1)).save(path)
    (scenes / "classes.txt").write_text("background\nobject\n", encoding="utf-8")


def run_folder(study: Study, seed: int, work: Path) -> Path:
    return work / f"{study.student.replace('/', '-')}-seed{seed}"


def quantized(study: Study, seed: int, epochs: int, work: Path) -> dict[str, Any]:
    """summary.json of the quantized student of one seed; trained and quantized on first use."""
    from train.config import TrainConfig
    from train.deliver.quantize import QuantizeOptions, quantize_student
    from train.run import run_training

    store, run = make_store(study, work), run_folder(study, seed, work)
    out = run / f"int8-{epochs}-epochs"
    if not (out / "summary.json").exists():
        if not (run / "summary.json").exists():
            common = {"image_size": SIDE, "device": "cpu", "workers": 0, "seed": seed}
            resume = (run / "last.pt").exists()
            settings = {**study.options, **common, "resume": resume, "overwrite": not resume}
            run_training(TrainConfig(store=str(store), student=study.student, out=run, **settings))
        options = QuantizeOptions(mode="qat", epochs=epochs, split="test")
        quantize_student(run, str(store), out, options)
    summary: dict[str, Any] = json.loads((out / "summary.json").read_text(encoding="utf-8"))
    summary["path"] = str(out)
    return summary


def time_again(summary: dict[str, Any]) -> None:
    """Replace the times of a summary by new ones."""
    from train.deliver.quantize import measure_latencies

    folder = Path(summary["path"])
    models = {row["model"]: folder / row["file"] for row in summary["models"]}
    image = np.random.default_rng(0).normal(size=(1, 3, SIDE, SIDE)).astype(np.float32)
    latencies = measure_latencies(models, image)
    for row in summary["models"]:
        row["latency_ms"] = latencies[row["model"]]
        row["speedup"] = latencies[FLOAT] / latencies[row["model"]]


def rows_of(study: Study, summaries: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row a model: means over the seeds; points lost against the float32 model of the same seed, and the worst."""
    rows = []
    for index, first in enumerate(summaries[0]["models"]):
        models = [summary["models"][index] for summary in summaries]
        floats = [summary["models"][0] for summary in summaries]
        lost = [100 * (f[study.metric] - m[study.metric]) for f, m in zip(floats, models, strict=True)]
        rows.append(
            {
                "student": study.student,
                "model": first["model"],
                "seeds": len(models),
                "size_mb": first["size_mb"],
                "size_ratio": first["size_ratio"],
                "latency_ms": statistics.mean(m["latency_ms"] for m in models),
                "speedup": statistics.mean(m["speedup"] for m in models),
                "metric": study.metric,
                "value": statistics.mean(m[study.metric] for m in models),
                "points_lost": statistics.mean(lost),
                "points_lost_worst": max(lost),
            }
        )
    return rows


def print_table(rows: list[dict[str, Any]]) -> None:
    """The rows as a markdown table."""
    print("| student | model | size, MB (ratio) | ms an image (speed) | metric | points lost (worst seed) |")
    print("|---|---|---|---|---|---|")
    for row in rows:
        print(
            f"| {row['student']} | {row['model']} | {row['size_mb']:.2f} ({row['size_ratio']:.3f}) "
            f"| {row['latency_ms']:.2f} ({row['speedup']:.2f} ×) | {row['metric']} {100 * row['value']:.2f} % "
            f"| {row['points_lost']:+.2f} ({row['points_lost_worst']:+.2f}) |"
        )
    print(
        f"aims: size ratio at most {AIMS['size_ratio']}, speed at least {AIMS['speedup']} ×, points lost at most "
        f"{AIMS['points_lost_ptq']} (PTQ) and {AIMS['points_lost_qat']} (QAT)"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--students", default=",".join(STUDIES), help="a list of: " + ", ".join(STUDIES))
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--epochs", type=int, default=2, help="of fine-tuning, with and without quantization")
    parser.add_argument("--work", type=Path, required=True, help="keeps stores, runs and ONNX files")
    parser.add_argument("--timings", action="store_true", help="only time what is finished")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    logging.disable(logging.INFO)
    rows: list[dict[str, Any]] = []
    for name in arguments.students.split(","):
        study = STUDIES[name]
        seeds = range(arguments.seeds)
        if arguments.timings:
            seeds = [seed for seed in seeds if is_finished(study, seed, arguments.epochs, arguments.work)]
        summaries = [quantized(study, seed, arguments.epochs, arguments.work) for seed in seeds]
        for summary in summaries:
            time_again(summary)
        rows += rows_of(study, summaries) if summaries else []
    if arguments.json:
        print(json.dumps(rows, indent=2))
    else:
        print_table(rows)


def is_finished(study: Study, seed: int, epochs: int, work: Path) -> bool:
    return (run_folder(study, seed, work) / f"int8-{epochs}-epochs" / "summary.json").exists()


if __name__ == "__main__":
    main()
