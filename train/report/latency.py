"""Latency of the runs' students, measured for the report: once for each architecture, one after the other.

What a run's summary.json says was measured while other trials were running. A measurement is kept in the run's
folder, and used again by later reports on the same machine: figures of different machines are never compared.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from console.log import get_logger
from files.writing import whole_file
from store.errors import DistillError
from train.checkpoint import load_student_from_run
from train.measure import measure_latency
from train.report.collect import Run
from train.run_folder import LATENCY, read_json

logger = get_logger("report")

RUNS = 20


class Latencies(NamedTuple):
    """Milliseconds for one image (or clip), by run folder, and where they were measured."""

    by_run: dict[Path, float]
    machine: str


def measure_latencies(runs: Sequence[Run]) -> Latencies:
    """The latency of each run whose student can be read; the log names the others."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    machine = describe_machine(device)
    known = {}
    for run in runs:
        kept = read_json(run.folder / LATENCY) or {}
        if kept.get("machine") == machine and kept.get("architecture") == architecture_of(run):
            known[architecture_of(run)] = float(kept["latency_ms"])
    for run in runs:
        if architecture_of(run) not in known and (value := measure_run(run, device)) is not None:
            known[architecture_of(run)] = value
            keep(run, machine, value)
    values = {run.folder: known[key] for run in runs if (key := architecture_of(run)) in known}
    return Latencies(values, machine)


def architecture_of(run: Run) -> str:
    """What decides a student's speed: runs with one text share one measurement."""
    shape: list[Any] = [run.summary.get(name) for name in ("student", "parameters", "macs")]
    return " ".join(map(str, [*shape, (run.config.get("options") or {}).get("image_size")]))


def measure_run(run: Run, device: torch.device) -> float | None:
    try:
        student, content = load_student_from_run(run.folder)
    except DistillError as error:
        logger.warning("no latency of %s: %s", run.name, error)
        return None
    if content["config"].get("lora_rank"):
        from train.lora import merge_lora

        student = merge_lora(student)
    return measure_latency(student.to(device), RUNS)


def keep(run: Run, machine: str, value: float) -> None:
    """Write the measurement into the run's folder; one that cannot be written is measured again next time."""
    content = {"architecture": architecture_of(run), "machine": machine, "latency_ms": value}
    try:
        with whole_file(run.folder / LATENCY) as partial:
            partial.write_text(json.dumps(content, indent=1), encoding="utf-8")
    except OSError as error:
        logger.info("the latency of %s is not kept: %s", run.name, error)


def describe_machine(device: torch.device) -> str:
    """`Intel(R) Xeon(R) CPU @ 2.20GHz, 2 threads` or the GPU's name."""
    if device.type == "cuda":
        return str(torch.cuda.get_device_name(device))
    threads = torch.get_num_threads()
    return f"{processor_name()}, {threads} thread" + ("s" if threads > 1 else "")


def processor_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or platform.machine())
