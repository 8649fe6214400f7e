"""What reporting costs: training time with a hostile platform server against a healthy one, interleaved.

    python benchmarks/platform_reports.py [--quick] [--rounds N] [--json] [--blocking]

Each run is the platform's own entry script on the CPU, features from the cache. `training_s` is the time that
summary.json gives for the training itself; `ratio` is its median over that of the healthy server's runs, and
`paired` the median of each round's own ratio. The bar is 1.02.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from backend.task.call_queue import CallQueue  # noqa: E402
from backend.task.calls import (  # noqa: E402
    PipeSender,
    TaskCalls,
    read_calls,
)
from backend.task.events import TrainingEvents  # noqa: E402
from backend.task.http_client import HttpClient  # noqa: E402
from console.output import print_json, print_table  # noqa: E402
from extract.teachers.tiny import make_tiny_teacher  # noqa: E402
from tests.test_backend.platform_data import make_class_folders  # noqa: E402
from tests.test_backend.platform_server import PlatformServer  # noqa: E402
from train.events import EpochEnded  # noqa: E402

HEALTHY = "ok"
HOSTILE = ("stall", "500", "trickle", "down")


def run_once(folder: Path, behaviour: str, number: int, epochs: int) -> float:
    """One task against one kind of server; seconds of training."""
    server = PlatformServer()
    url = "http://127.0.0.1:9/api" if behaviour == "down" else server.url
    server.behaviour = HEALTHY if behaviour == "down" else behaviour
    out = folder / f"out-{number}"
    options = {
        "task_id": 7,
        "api_base_url": url,
        "teacher_path": folder / "models" / "tiny",
        "student_model": "resnet18",
        "dataset_id": "squares",
        "datasets_root": folder / "datasets",
        "output_dir": out,
        "cache_dir": folder / "cache",
        "image_size": 48,
        "batch_size": 16,
        "epochs": epochs,
        "workers": 0,
        "gpu_devices": "cpu",
        "distillation_type": "feature",
    }
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    done = subprocess.run(
        [sys.executable, str(ROOT / "train_qwen_vl_distillation.py"), *words],
        env=os.environ | {"QWEN_DISTILL_REPORT_SECONDS": "1", "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        check=False,
    )
    server.stop()
    if done.returncode:
        raise SystemExit(done.stdout.decode())
    return float(json.loads((out / "summary.json").read_text())["wall_time_s"])


def measure(rounds: int, epochs: int) -> list[dict[str, object]]:
    kinds = (HEALTHY, *HOSTILE)
    times: dict[str, list[float]] = {kind: [] for kind in kinds}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_tiny_teacher(folder / "models" / "tiny", depth=1)
        make_class_folders(folder / "datasets" / "squares", train=128, val=16)
        run_once(folder, HEALTHY, 0, 1)  # fills the cache
        for number in range(rounds):
            for kind in kinds[number % len(kinds) :] + kinds[: number % len(kinds)]:
                times[kind].append(run_once(folder, kind, 1 + sum(map(len, times.values())), epochs))
    base = times[HEALTHY]
    return [
        {
            "server": kind,
            "training_s": round(statistics.median(values), 3),
            "ratio": round(statistics.median(values) / statistics.median(base), 4),
            "paired": round(statistics.median(a / b for a, b in zip(values, base, strict=True)), 4),
            "runs": len(values),
        }
        for kind, values in times.items()
    ]


def pass_on(reading: int, queue: CallQueue) -> None:
    for call in read_calls(reading):
        queue.send(call)


def measure_blocking(epochs: int = 2000) -> dict[str, object]:
    """What the training itself waits for: handing an epoch's calls over while the server stalls."""
    server = PlatformServer()
    server.behaviour = "stall"
    reading, writing = os.pipe()
    with tempfile.TemporaryDirectory() as folder:
        queue = CallQueue(HttpClient(server.url), Path(folder) / "undelivered.jsonl")
        relay = threading.Thread(target=pass_on, args=(reading, queue))
        relay.start()
        events = TrainingEvents(TaskCalls("7"), PipeSender(writing), epochs, Path(folder))
        times = []
        for epoch in range(1, epochs + 1):
            record = {"epoch": epoch, "train_loss": 0.5, "val_loss": 0.5, "top1": 0.5, "epoch_time_s": 1.0}
            started = time.perf_counter()
            events(EpochEnded(record))
            times.append(time.perf_counter() - started)
        os.close(writing)
        relay.join()
        queue.close(0)
    server.stop()
    times.sort()
    return {
        "median_ms": round(1000 * times[epochs // 2], 3),
        "p99_ms": round(1000 * times[epochs * 99 // 100], 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="one round of two epochs")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument(
        "--blocking", action="store_true", help="only what training waits for at an epoch's end"
    )
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    if arguments.blocking:
        print_json({"benchmark": "platform", "epoch_end": measure_blocking()})
        return
    rows = measure(1, 2) if arguments.quick else measure(arguments.rounds, arguments.epochs)
    if arguments.json:
        print_json({"benchmark": "platform", "rows": rows})
    else:
        print_table(
            rows, ["server", "training_s", "ratio", "paired", "runs"], "training time by kind of server"
        )


if __name__ == "__main__":
    main()
