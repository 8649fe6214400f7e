"""What was measured of a store: the teacher's time and the features' accuracy. Kept beside the arrays.

Times differ from run to run, so they stay out of the manifest: a store is bit-identical however often its
extraction was interrupted.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from store.files import write_file
from store.format import MEASURED_FILE


def read_measured(store: Path) -> dict[str, Any]:
    """`extraction_s` and `encoded` (added up over resumed runs), `probe_top1`, `knn_top1`; empty when unknown."""
    try:
        values: dict[str, Any] = json.loads((store / MEASURED_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return values


def note_extraction(store: Path, seconds: float, encoded: int) -> None:
    """Add one run's share to the time of the extraction."""
    before = read_measured(store)
    note(
        store,
        extraction_s=float(before.get("extraction_s", 0.0)) + seconds,
        encoded=int(before.get("encoded", 0)) + encoded,
    )


def note_probe(store: Path, result: Mapping[str, Any]) -> None:
    """Keep what the features are worth (`extract.logits.ProbeResult`)."""
    note(store, probe_top1=result["probe_top1"], knn_top1=result["knn_top1"])


def note(store: Path, **values: Any) -> None:
    """Keep `values` beside what is known already."""
    path = store / MEASURED_FILE
    path.parent.mkdir(exist_ok=True)
    write_file(path, json.dumps({**read_measured(store), **values}, indent=1).encode())
