"""The whole pipeline on one GPU: correctness and speed in six stages, at most nine minutes, with each figure's goal beside it.

    python benchmarks/gpu.py                            # one H100 or H200, 16 cores
    python benchmarks/gpu.py --stages tower,training    # some of the stages
    python benchmarks/gpu.py --device cpu --quick       # every stage end to end, in minutes, to test the script itself

Each stage runs in a process of its own with a deadline of its own. As soon as it is done, one JSON line with its figures
is printed; a stage that fails or runs out of time is reported with the figures it had, and the next one runs. The table
at the end compares figures with goals. Random weights and generated images: speed, memory and agreement between code
paths are measured here, not quality. Exit code 1 when a stage failed or a correctness figure misses its goal.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

FIGURE = "figure: "  # how a stage's process marks a figure on its standard output
TOTAL_S = 540.0
GRACE_S = 5.0


class StageEntry(NamedTuple):
    """Where a stage's function is, and the seconds it may take on a GPU and in a quick run."""

    target: str
    deadline_s: float
    quick_deadline_s: float


STAGES: dict[str, StageEntry] = {
    "ceilings": StageEntry("benchmarks.gpu_tower:measure_ceilings", 40, 180),
    "tower": StageEntry("benchmarks.gpu_tower:measure_tower", 130, 300),
    "correctness": StageEntry("benchmarks.gpu_tower:check_correctness", 80, 300),
    "extraction": StageEntry("benchmarks.gpu_extraction:measure_extraction", 190, 600),
    "training": StageEntry("benchmarks.gpu_training:measure_training", 240, 900),
    "distributed": StageEntry("benchmarks.gpu_training:check_distributed", 110, 600),
}


#: Parts of the stages extraction (the first six) and training that can be run on their own.
PARTS = ("pooled", "grid8", "grid16", "letterbox", "resume", "verify", "steps", "yolo", "families")


class Goal(NamedTuple):
    """What a figure has to reach: `must`, and what it should reach: `aim`. `at_most`: smaller is better.

    correctness: a figure that misses `must` makes the whole benchmark fail.
    """

    stage: str
    figure: str
    text: str
    must: float
    aim: float
    at_most: bool = False
    correctness: bool = False


GOALS: tuple[Goal, ...] = (
    Goal("tower", "images_per_second_224", "tower alone, 224 px, images/s", 1300, 1600),
    Goal("tower", "images_per_second_448", "tower alone, 448 px, images/s", 320, 400),
    Goal("correctness", "float32_relative", "float32: GPU against CPU, relative", 1e-4, 1e-4, True, True),
    Goal("correctness", "transformers_relative", "float32: transformers' tower, relative", 1e-4, 1e-4, True, True),
    Goal("correctness", "bfloat16_cosine_p1", "bf16 against float32, token cosine, 1st percentile", 0.999, 0.999, False, True),
    Goal("correctness", "batch_cosine_p1", "batch of 1 against a full batch, the same", 0.999, 0.999, False, True),
    Goal("extraction", "share_pooled", "extract ÷ tower alone, pooled", 0.95, 0.98),
    Goal("extraction", "share_grid8", "extract ÷ tower alone, 8×8 grids", 0.95, 0.98),
    Goal("extraction", "share_grid16", "extract ÷ tower alone, 16×16 grids", 0.90, 0.95),
    Goal("extraction", "share_letterbox", "extract ÷ tower alone, letterbox, 8×8 grids", 0.95, 0.98),
    Goal("extraction", "idle_pooled", "GPU idle after the first batch, pooled", 0.05, 0.02, True),
    Goal("extraction", "cores_per_1000", "host cores for 1,000 images/s, 640×480 JPEG", 3, 2, True),
    Goal("extraction", "resumed_identical", "stopped and resumed: byte-identical (1: yes)", 1, 1, False, True),
    Goal("extraction", "verified", "cli verify finds nothing (1: yes)", 1, 1, False, True),
    Goal("training", "stored_over_plain_resnet50", "step, stored features ÷ plain: resnet50", 1.08, 1.05, True),
    Goal("training", "stored_over_plain_vit-base", "the same: vit-base", 1.06, 1.03, True),
    Goal("training", "stored_over_plain_yolov8s", "the same: yolov8s, P5, 640 px", 1.10, 1.06, True),
    Goal("training", "loop_over_bare_resnet50", "our loop ÷ a bare PyTorch loop: resnet50", 1.05, 1.03, True),
    Goal("training", "busy_resnet50", "GPU busy while training, images in memory", 0.95, 0.97),
    Goal("training", "extra_memory_gb_resnet50", "peak memory, distilled − plain, GB", 0.6, 0.3, True),
    Goal("training", "live_over_stored_resnet50", "teacher in the loop ÷ stored: resnet50", 2.5, 2.9),
    Goal("training", "live_over_stored_vit-base", "the same: vit-base", 2.0, 2.4),
    Goal("training", "syncs_per_step", "host synchronizations in a step", 0, 0, True),
    Goal("training", "runs_failed", "trainings that failed", 0, 0, True, True),
    Goal("training", "resumed_difference", "resumed against uninterrupted, weights", 1e-3, 1e-3, True, True),
    Goal("distributed", "rank_difference", "torchrun, one rank, against one process: loss", 1e-3, 1e-4, True, True),
    Goal("distributed", "sweep_failed", "trials of a sweep with two jobs that failed", 0, 0, True, True),
)  # fmt: skip


@dataclass(frozen=True)
class Settings:
    """What a stage needs to know: the device, whether to use small sizes or few repetitions, and a folder of its own."""

    device: str
    quick: bool
    work: Path
    brief: bool = False
    parts: tuple[str, ...] = ()

    def wants(self, part: str) -> bool:
        """Whether a part of a stage is to run; all are, unless some were named."""
        return not self.parts or part in self.parts

    @property
    def cuda(self) -> bool:
        return self.device.startswith("cuda")


Note = Callable[..., None]
"""Report figures by name as soon as they are known: `note(images_per_second=1300.0)`."""


@dataclass
class StageResult:
    """One line of the output."""

    stage: str
    ok: bool
    seconds: float
    figures: dict[str, Any] = field(default_factory=dict)
    error: str | None = None

    def as_line(self) -> str:
        return json.dumps(self.__dict__, ensure_ascii=False)


def run_stage(name: str, settings: Settings) -> None:
    """In a stage's own process: run it, printing its figures."""

    def note(**figures: Any) -> None:
        print(FIGURE + json.dumps(plain(figures)), flush=True)

    module, _, function = STAGES[name].target.partition(":")
    getattr(importlib.import_module(module), function)(settings, note)


def plain(value: Any) -> Any:
    from console.output import plain_json

    return plain_json(value)


def supervise(command: Sequence[str], name: str, deadline_s: float) -> StageResult:
    """Run a stage's command, collect its figures, and end it and its children at the deadline."""
    started = time.monotonic()
    result = StageResult(name, False, 0.0)
    # A session of its own: the deadline also ends the decoders, ranks and trials that the stage has started.
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    last_words: list[str] = []
    readers = [
        threading.Thread(target=collect, args=(process.stdout, result.figures, last_words), daemon=True),
        threading.Thread(target=collect, args=(process.stderr, result.figures, last_words), daemon=True),
    ]
    for reader in readers:
        reader.start()
    code: int | None = None
    try:
        code = process.wait(deadline_s)
    except subprocess.TimeoutExpired:
        result.error = f"not finished after {deadline_s:.0f} s"
    finally:
        end_group(process)
    for reader in readers:  # they end with the last process that holds the pipes
        reader.join(GRACE_S)
    result.ok = code == 0
    if code:
        result.error = last_error(last_words) or f"exit code {code}"
    result.seconds = round(time.monotonic() - started, 1)
    return result


def collect(stream: Any, figures: dict[str, Any], last_words: list[str]) -> None:
    """Figures out of a stage's output; everything else is passed on to standard error."""
    for line in stream:
        if line.startswith(FIGURE):
            figures.update(json.loads(line.removeprefix(FIGURE)))
        else:
            sys.stderr.write(line)
            last_words.append(line.rstrip())
            del last_words[:-40]


def last_error(lines: Sequence[str]) -> str | None:
    """The last line that is not indented: of a traceback, the exception."""
    return next((line for line in reversed(lines) if line.strip() and not line.startswith(" ")), None)


def end_group(process: subprocess.Popen[str]) -> None:
    """End what is left of a stage's process group."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
        except ProcessLookupError:
            return
        try:
            process.wait(GRACE_S)
        except subprocess.TimeoutExpired:
            continue


def compare(results: Mapping[str, StageResult]) -> list[dict[str, Any]]:
    """A row for each goal of the stages that ran."""
    rows = []
    for goal in GOALS:
        if goal.stage not in results:
            continue
        value = results[goal.stage].figures.get(goal.figure)
        rows.append(
            {
                "figure": goal.text,
                "measured": value,
                "must": f"{'≤' if goal.at_most else '≥'} {goal.must:g}",
                "aim": f"{'≤' if goal.at_most else '≥'} {goal.aim:g}",
                "result": verdict(goal, value),
            }
        )
    return rows


def verdict(goal: Goal, value: float | None) -> str:
    if value is None:
        return "not measured"
    if reaches(value, goal.aim, goal.at_most):
        return "aim reached"
    return "must reached" if reaches(value, goal.must, goal.at_most) else "missed"


def reaches(value: float, bound: float, at_most: bool) -> bool:
    return value <= bound if at_most else value >= bound


def failed(results: Mapping[str, StageResult]) -> bool:
    """Whether a stage failed or a correctness figure is missing or misses its goal."""
    wrong = [
        goal
        for goal in GOALS
        if goal.correctness
        and goal.stage in results
        and verdict(goal, results[goal.stage].figures.get(goal.figure)) in ("missed", "not measured")
    ]
    return bool(wrong) or not all(result.ok for result in results.values())


def parse_arguments(words: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda", help="cuda, cuda:N or cpu (%(default)s)")
    parser.add_argument(
        "--quick", action="store_true", help="small sizes: tests the script, figures mean nothing"
    )
    parser.add_argument(
        "--brief", action="store_true", help="real sizes, fewer files and repetitions: about half the time"
    )
    parser.add_argument("--stages", default=",".join(STAGES), help="comma-separated: %(default)s")
    parser.add_argument(
        "--total", type=float, default=TOTAL_S, help="seconds for all stages together (%(default)g)"
    )
    parser.add_argument(
        "--work",
        type=Path,
        help="folder for temporary files (default: one below /dev/shm or the temporary folder)",
    )
    parser.add_argument("--parts", default="", help=f"only these parts of the stages: {', '.join(PARTS)}")
    parser.add_argument("--stage", help=argparse.SUPPRESS)
    arguments = parser.parse_args(words)
    unknown = [name for name in arguments.stages.split(",") if name not in STAGES]
    if unknown:
        parser.error(f"--stages {arguments.stages}: unknown {unknown[0]}; valid: {', '.join(STAGES)}")
    unknown = [name for name in parts_of(arguments.parts) if name not in PARTS]
    if unknown:
        parser.error(f"--parts {arguments.parts}: unknown {unknown[0]}; valid: {', '.join(PARTS)}")
    return arguments


def parts_of(text: str) -> tuple[str, ...]:
    return tuple(name for name in text.split(",") if name)


def check_device(device: str) -> None:
    """Ends the benchmark with one line when the GPU that was asked for is not there."""
    import torch

    if device.startswith("cuda") and not torch.cuda.is_available():
        sys.exit(
            f"--device {device}: PyTorch {torch.__version__} sees no CUDA device; use --device cpu --quick to try the script"
        )


def main(words: Sequence[str] | None = None) -> int:
    arguments = parse_arguments(words)
    if arguments.stage:
        parts = parts_of(arguments.parts)
        run_stage(
            arguments.stage,
            Settings(arguments.device, arguments.quick, arguments.work, arguments.brief, parts),
        )
        return 0
    check_device(arguments.device)
    work = arguments.work or Path(tempfile.mkdtemp(prefix="gpu-benchmark-", dir=fast_folder()))
    work.mkdir(parents=True, exist_ok=True)
    started, results = time.monotonic(), {}
    try:
        for name in arguments.stages.split(","):
            entry = STAGES[name]
            deadline = entry.quick_deadline_s if arguments.quick else entry.deadline_s
            left = arguments.total - (time.monotonic() - started)
            command = [sys.executable, __file__, "--stage", name, "--device", arguments.device]
            command += ["--work", str(work), "--parts", arguments.parts]
            command += [option for option in ("--quick", "--brief") if getattr(arguments, option[2:])]
            if arguments.device == "cpu":
                os.environ.setdefault("OMP_NUM_THREADS", "1")
            results[name] = supervise(command, name, max(1.0, min(deadline, left)))
            print(results[name].as_line(), flush=True)
    finally:
        if arguments.work is None:
            shutil.rmtree(work, ignore_errors=True)
    from console.output import print_table

    print_table(compare(results), ["figure", "measured", "must", "aim", "result"])
    print(f"{time.monotonic() - started:.0f} s", flush=True)
    return int(failed(results))


def fast_folder() -> str | None:
    """/dev/shm where it has room for the largest store (6 GB and as much again), else the temporary folder."""
    shared = Path("/dev/shm")
    return str(shared) if shared.is_dir() and shutil.disk_usage(shared).free > 24e9 else None


if __name__ == "__main__":
    sys.exit(main())
