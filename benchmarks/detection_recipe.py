"""YOLOv8 with this project's defaults beside ultralytics' own defaults, on the same images.

Three trainings for every seed: `ultralytics` (its own command, nothing but data, epochs, image size and seed given),
`control` (`cli train --control-only`: our recipe without a teacher) and `distilled` (`cli train`: our recipe). The
images and boxes that ultralytics reads are those of the store. Printed: mAP50 and mAP50-95 of the best epoch.

    python benchmarks/detection_recipe.py --data FOLDER [--epochs 10] [--image-size 160] [--seeds 0] [--device cpu]
        [--jobs 1] [--teacher-path DIR] [--kinds ultralytics,control,distilled] [--work DIR] [--json]

`--data` is a folder that `cli extract` reads as a detection data set, or a store (`.zarr`) with boxes and grids. Without
`--teacher-path` (a folder of Qwen2.5-VL) the teacher is EfficientNet-Lite2 from the package registry. `--jobs 3` trains
all three at once, for a GPU. Finished trainings in `--work` are not repeated.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from PIL import Image

from benchmarks.stores import extract_features

KINDS = ("ultralytics", "control", "distilled")
METRICS = {"map50": "metrics/mAP50(B)", "map50_95": "metrics/mAP50-95(B)"}


def make_store(arguments: argparse.Namespace, work: Path) -> Path:
    """The given store, or one extracted from the given folder: grids of 16×16 and images."""
    if (arguments.data / "zarr.json").exists():
        return Path(arguments.data)
    options = {"grid": "16", "images": "jpeg", "device": arguments.device, "image_size": 512}
    if arguments.teacher_path is not None:
        options |= {"teacher": "qwen2.5-vl", "teacher_path": str(arguments.teacher_path), "image_size": 224}
    return extract_features(arguments.data, work / "store.zarr", **options)


def write_yolo_folder(store: Path, folder: Path, image_size: int) -> Path:
    """The images and boxes of a store's train and val as files for ultralytics; returns data.yaml."""
    from store.reader import open_store
    from train.yolo.dataset import open_split

    opened = open_store(store)
    for name in ("train", "val"):
        split = open_split(opened, name, image_size=image_size, data_root=None, distil=False)
        for kind in ("images", "labels"):
            (folder / kind / name).mkdir(parents=True, exist_ok=True)
        for record in split.records:
            Image.fromarray(split.read_image(record.row)).save(folder / f"images/{name}/{record.row:06}.png")
            boxes = zip(record.classes, record.boxes, strict=True)
            lines = [f"{label} " + " ".join(f"{value:.6f}" for value in box) for label, box in boxes]
            (folder / f"labels/{name}/{record.row:06}.txt").write_text("".join(line + "\n" for line in lines))
    described = folder / "data.yaml"
    names = json.dumps(list(opened.manifest.class_names))
    described.write_text(f"path: {folder.resolve()}\ntrain: images/train\nval: images/val\nnames: {names}\n")
    return described


def train_ultralytics(
    data: Path, out: Path, seed: int, *, epochs: int, image_size: int, device: str
) -> dict[str, float]:
    """ultralytics' own training with its own defaults; metrics of its best epoch."""
    from train.students.offline import prepare_ultralytics

    prepare_ultralytics()
    from ultralytics import YOLO
    from ultralytics.engine.trainer import BaseTrainer

    from train.yolo.trainer import StoreTrainer

    BaseTrainer.read_results_csv = StoreTrainer.read_results_csv  # its own needs polars
    YOLO("yolov8n.yaml").train(
        data=str(data),
        epochs=epochs,
        imgsz=image_size,
        seed=seed,
        device=device.removeprefix("cuda:").replace("cuda", "0"),
        project=str(out.resolve().parent),
        name=out.name,
        exist_ok=True,
        plots=False,
        verbose=False,
    )
    import csv

    with (out / "results.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    best = max(rows, key=lambda row: float(row[METRICS["map50_95"]]))
    return {name: float(best[column]) for name, column in METRICS.items()}


def train_ours(
    store: Path, out: Path, seed: int, control: bool, *, epochs: int, image_size: int, device: str
) -> dict[str, float]:
    """`cli train` with the student's recipe; metrics of the best epoch."""
    from train.config import TrainConfig
    from train.run import run_training

    options: dict[str, Any] = {"seed": seed, "epochs": epochs, "image_size": image_size, "device": device}
    if control:
        options["control_only"] = True
    # ultralytics uses no loader processes on a CPU; here neither.
    workers = {"workers": 0} if device == "cpu" else {}
    config = TrainConfig(
        store=store,
        student="yolov8/n",
        out=out,
        yolo_settings="plots=false",
        overwrite=out.exists(),
        **options,
        **workers,
    )
    metrics = run_training(config)["metrics"]
    return {name: float(metrics[name]) for name in METRICS}


def measure(
    kind: str, seed: int, store: str, data: str, work: str, settings: dict[str, Any]
) -> dict[str, Any]:
    """One training; its result is kept in the working folder."""
    name = f"{kind}-seed{seed}-epochs{settings['epochs']}-size{settings['image_size']}-{settings['device']}"
    out = Path(work) / name
    kept = Path(work) / f"{name}.json"
    if kept.exists():
        found: dict[str, Any] = json.loads(kept.read_text())
        return found
    started = time.perf_counter()
    if kind == "ultralytics":
        metrics = train_ultralytics(Path(data), out, seed, **settings)
    else:
        metrics = train_ours(Path(store), out, seed, kind == "control", **settings)
    found = {"kind": kind, "seed": seed, **metrics, "seconds": round(time.perf_counter() - started, 1)}
    kept.write_text(json.dumps(found))
    return found


def parse_arguments(words: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="detection data set, or a store")
    parser.add_argument("--teacher-path", type=Path, default=None, help="folder of a Qwen2.5-VL teacher")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--image-size", type=int, default=160, help="pixels, a multiple of 32")
    parser.add_argument("--seeds", default="0", help="comma-separated")
    parser.add_argument("--kinds", default=",".join(KINDS), help="comma-separated")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--jobs", type=int, default=1, help="trainings at once")
    parser.add_argument("--work", type=Path, default=None, help="keep store and runs here")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    arguments = parser.parse_args(words)
    arguments.kinds = arguments.kinds.split(",")
    if unknown := set(arguments.kinds) - set(KINDS):
        parser.error(f"--kinds: unknown {', '.join(sorted(unknown))}: expected some of {', '.join(KINDS)}")
    return arguments


def benchmark(arguments: argparse.Namespace, work: Path) -> dict[str, Any]:
    work.mkdir(parents=True, exist_ok=True)
    store = make_store(arguments, work)
    data = write_yolo_folder(store, work / "yolo", arguments.image_size)
    settings = {name: getattr(arguments, name) for name in ("epochs", "image_size", "device")}
    tasks = [
        (kind, seed, str(store), str(data), str(work), settings)
        for seed in map(int, arguments.seeds.split(","))
        for kind in arguments.kinds
    ]
    rows = []
    # Each training in a process of its own: ultralytics changes global settings.
    with ProcessPoolExecutor(
        arguments.jobs, mp_context=multiprocessing.get_context("spawn"), max_tasks_per_child=1
    ) as pool:
        for done in as_completed([pool.submit(measure, *task) for task in tasks]):
            rows.append(done.result())
            print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    means = {
        kind: {
            metric: sum(row[metric] for row in rows if row["kind"] == kind)
            / len(tasks)
            * len(arguments.kinds)
            for metric in METRICS
        }
        for kind in arguments.kinds
    }
    return {"settings": {**settings, "seeds": arguments.seeds}, "runs": rows, "means": means}


def main(words: Sequence[str] | None = None) -> dict[str, Any]:
    arguments = parse_arguments(words)
    with tempfile.TemporaryDirectory() as scratch:
        result = benchmark(arguments, arguments.work or Path(scratch))
    if arguments.json:
        print(json.dumps(result, indent=2))
        return result
    print(f"settings {result['settings']}")
    for kind, means in result["means"].items():
        print(f"{kind:12} mAP50 {means['map50']:.3f}  mAP50-95 {means['map50_95']:.3f}")
    return result


if __name__ == "__main__":
    main()
