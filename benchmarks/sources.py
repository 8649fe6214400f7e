"""Listing a large data set: time and memory of `open_source`, samples pickled as the workers get them.

    python benchmarks/sources.py [--quick] [--json] [--files 1000000] [--folder DIR]

Makes (empty) image files in 1,000 class folders, opens them in a fresh process, cuts the validation split and
walks over every sample. Peak memory is that of the whole process; what Python and the imports take is given
beside it.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

CLASSES = 1_000


def make_files(root: Path, count: int) -> None:
    """`count` empty files called like ImageNet's, over 1,000 folders."""
    for number in range(CLASSES):
        folder = root / f"n{number:08d}"
        folder.mkdir(parents=True)
        for member in range(number, count, CLASSES):
            (folder / f"n{number:08d}_{member:08d}.JPEG").touch()


def peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def list_once(root: Path) -> dict[str, Any]:
    """What one process needs for the data set at `root`."""
    from extract.sources.detect import open_source

    calls: list[int] = []
    base = peak_mb()
    start = time.perf_counter()
    source = open_source(root, progress=calls.append)
    opened = time.perf_counter() - start
    after_open = peak_mb()
    start = time.perf_counter()
    count = sum(1 for samples in source.splits.values() for sample in samples if sample.label is not None)
    walked = time.perf_counter() - start
    return {
        "files": count,
        "val_fraction": len(source.splits["val"]) / count,
        "open_s": opened,
        "walk_s": walked,
        "progress_calls": len(calls),
        "imports_mb": base,
        "peak_open_mb": after_open,
        "peak_mb": peak_mb(),
        "bytes_per_file": (peak_mb() - base) * 2**20 / count,
    }


def measure(root: Path) -> dict[str, Any]:
    """`list_once` in a process of its own, so that the peak is nobody else's."""
    command = [sys.executable, str(Path(__file__).resolve()), "--child", str(root)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--files", type=int, default=1_000_000)
    parser.add_argument("--quick", action="store_true", help="20,000 files")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--folder", type=Path, help="where to make the files (default: a temporary folder)")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(list_once(options.child)))
        return
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        make_files(Path(folder) / "images", 20_000 if options.quick else options.files)
        result = measure(Path(folder) / "images")
    if options.json:
        print(json.dumps(result))
        return
    for name, value in result.items():
        print(f"{name:16s} {value:12,.3f}" if isinstance(value, float) else f"{name:16s} {value:12,d}")


if __name__ == "__main__":
    main()
