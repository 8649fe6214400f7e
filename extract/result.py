"""What an extraction reports: bad images, progress, result, the command that resumes it after a stop; and what was measured.

The teacher's time and the features' accuracy are kept beside the arrays. Times differ from run to run, so they stay out of the
manifest: a store is bit-identical however often its extraction was interrupted.
"""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from console.options import options_of
from console.output import get_logger, redact
from extract.config import ExtractConfig
from extract.output import work_path
from extract.sources.base import REMOVED
from files.writing import replace_file
from store import format as names
from store.errors import DistillError
from store.format import LEDGER, MEASURED_FILE, NOTES_FOLDER, Manifest
from store.job import features_job, progress
from store.metadata import ZARR_JSON
from store.reader import open_store
from store.summary import store_warnings
from store.upload import uploaded_shards

log = get_logger("extract")

HALVED_FILE = "out_of_memory.jsonl"  # in the store's notes
# Fractions of 1, by `cli probe`: of class labels, of masks, of boxes.
PROBED = ("probe_top1", "knn_top1", "probe_miou", "probe_objectness_ap", "probe_class_accuracy")


# -- the ledger of bad images: one JSON line each, in the store, with key, reason and hash ---------------


@dataclass(frozen=True)
class BadSample:
    """A ledger entry. `content` is the hex digest of the file's bytes, empty when it could not be read."""

    split: str
    row: int
    key: str
    reason: str
    content: str


@dataclass
class EncodedRows:
    """What encoding some rows gave: how many, the bad ones, batch sizes that memory forced."""

    rows: int = 0
    bad: list[BadSample] = field(default_factory=list)
    halved: list[int] = field(default_factory=list)


class TooManyBad(DistillError):
    """More bad images than `--max-bad` allows."""


def ledger_lines(bad: Sequence[BadSample]) -> bytes:
    return "".join(json.dumps(asdict(item), ensure_ascii=False) + "\n" for item in bad).encode()


def record_encoded(store: Path, encoded: EncodedRows) -> None:
    """Add the bad samples to the ledger while the store is being written; several processes may do so.

    Batch sizes that memory forced are noted too: rows encoded so may differ in the last bits from an undisturbed run's.
    """
    if encoded.bad:
        fd = os.open(store / LEDGER, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            os.write(fd, ledger_lines(encoded.bad))
        finally:
            os.close(fd)
    if encoded.halved:
        with (store / NOTES_FOLDER / HALVED_FILE).open("a") as file:
            file.write("".join(json.dumps({"batch_size": size}) + "\n" for size in encoded.halved))


def write_ledger(store: Path) -> list[BadSample]:
    """The whole ledger from a complete store, each bad row once; no file when there is none."""
    bad = []
    opened = open_store(store)
    for name in opened.splits:
        split = opened[name]
        for row in np.flatnonzero(~split.valid).tolist():
            content = split.gather([row], [names.CONTENT])[names.CONTENT][0]
            digest = content.tobytes().hex() if content.any() else ""
            bad.append(BadSample(name, row, split.keys[row], split.reason(row), digest))
    if bad:
        replace_file(store / LEDGER, ledger_lines(bad))
    else:
        (store / LEDGER).unlink(missing_ok=True)
    return bad


def count_bad(config: ExtractConfig, before: int, new: Sequence[BadSample], rows: int) -> int:
    """Bad images of `rows`: those before and the new ones, without samples that were removed since.

    Raises:
        TooManyBad: when they are more than `--max-bad` allows.
    """
    found = [item for item in new if item.reason != REMOVED]
    bad, allowed = before + len(found), config.allowed_bad(rows)
    if bad > allowed:
        example = f"; the last: {found[-1].key}: {found[-1].reason}" if found else ""
        raise TooManyBad(
            f"{bad} bad images, --max-bad {config.max_bad} allows {allowed}{example}. All are listed in "
            f"{config.folder / LEDGER}. Raise --max-bad, or repair or remove them, and run the same command again"
        )
    return bad


# -- progress and result ---------------------------------------------------------------------------------


class ExtractObserver(Protocol):
    """Who wants to know how far an extraction is: a progress bar, the platform."""

    def progress(self, done: int, total: int, message: str) -> None: ...


@dataclass
class ExtractResult:
    """What a run did. `encoded` counts this run's rows, `rows` all of the store's."""

    store: str
    task: str | None = None
    rows: int = 0
    splits: dict[str, int] = field(default_factory=dict)
    encoded: int = 0
    bad: int = 0
    complete: bool = False
    fingerprint: str | None = None
    batch_size: int = 0
    halved: list[int] = field(default_factory=list)
    seconds: float = 0.0
    # Of `seconds`: until the first batch was encoded (decoders start, caches fill).
    startup_seconds: float = 0.0
    images_per_second: float = 0.0
    random_weights: bool = False
    teachers: list[str] = field(default_factory=list)
    probe: dict[str, Any] | None = None
    # Samples by what changed since the store was made; None: nothing did.
    changes: dict[str, int] | None = None
    changes_text: str = ""
    warnings: list[str] = field(default_factory=list)  # why results on these splits may be less certain
    estimate: dict[str, Any] | None = None

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def add(self, encoded: EncodedRows) -> None:
        """Count rows that were encoded just now; `seconds` is the caller's."""
        self.encoded += encoded.rows
        self.halved += encoded.halved
        self.images_per_second = self.encoded / max(self.seconds, 1e-9)

    def note_changes(self, summary: tuple[dict[str, int], str] | None) -> None:
        """Keep what changed in the data set; of several looks, what the last one that found something found."""
        if summary is not None:
            self.changes, self.changes_text = summary

    def read_store(self, folder: Path | None = None) -> None:
        """Fill in what the store records; a complete one gets its final ledger. folder: where it is staged, of a URL."""
        store = open_store(folder or self.store, allow_incomplete=True)
        self.read_manifest(store.manifest)
        job = features_job(store.path)
        splits = {name: split.rows for name, split in job.splits.items()} if job else store.manifest.splits
        self.splits, self.rows = dict(splits), sum(splits.values())
        if self.complete:
            self.bad = len(write_ledger(store.path))
            self.fingerprint = store.fingerprint
            self.warnings = store_warnings(store)
            for text in self.warnings:
                log.warning("%s: %s", self.store, text)

    def read_manifest(self, manifest: Manifest) -> None:
        self.complete = manifest.complete
        self.task = manifest.task
        self.random_weights = manifest.teacher.random_weights
        self.teachers = manifest.teacher_names
        self.batch_size = manifest.batch_rows


def stop_message(config: ExtractConfig) -> str:
    """The message after a signal ended the run, read from what is committed."""
    path = config.folder
    if not (path / ZARR_JSON).exists():
        done = "nothing is encoded yet"
    elif (job := features_job(rows_of := work_path(path))) is None:
        done = f"all images are committed in {config.base or path}"
    else:
        rows, total = (sum(counts) for counts in zip(*progress(rows_of, job).values(), strict=True))
        new = "" if rows_of == path else "new "
        done = f"{rows:,} of {total:,} {new}images are committed in {config.base or path}"
        if config.url is not None:
            done += f", those of {uploaded_shards(path, job)} of {len(job.units())} shards in {config.url}"
    return f"stopped: {done}. Go on with: {resume_command(config)}"


def logits_stop_message(config: ExtractConfig) -> str:
    """The message after a signal came while logits were written."""
    return (
        f"stopped while writing logits/{config.logits}; the features are complete. "
        f"Go on with: {resume_command(config)}"
    )


def resume_command(config: ExtractConfig) -> str:
    """The command line that goes on with this extraction; passwords in addresses are left out of it."""
    words = ["cli", "extract", config.data]
    for name, item in options_of(ExtractConfig).items():
        value, option = getattr(config, name), item.flag
        needed = name == "teacher" and config.add_teacher is not None
        if name in ("data", "overwrite", "dry_run") or (value == item.default and not needed):
            continue
        if isinstance(value, bool):
            words.append(option if value else option.replace("--", "--no-", 1))
        elif isinstance(value, dict):
            for key, item in value.items():
                words += [option, f"{key}={item}"]
        else:
            words += [option, str(value)]
    return shlex.join(map(redact, words))


def read_measured(store: Path) -> dict[str, Any]:
    """`extraction_s` and `encoded` (added up over resumed runs), and `PROBED`; empty when unknown."""
    try:
        values: dict[str, Any] = json.loads((store / MEASURED_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return values


def note_probe(store: Path, result: Mapping[str, Any]) -> None:
    """Keep what the features are worth (`extract.logits.probe_store`)."""
    note(store, **{name: result[name] for name in PROBED if name in result})


def forget_probe(store: Path) -> None:
    """Drop what was found out about features or labels that have changed since."""
    measured = read_measured(store)
    if known := {*PROBED, "verdicts"} & measured.keys():
        note(store, **dict.fromkeys(known))


def note(store: Path, **values: Any) -> None:
    """Keep `values` beside what is known already."""
    path = store / MEASURED_FILE
    path.parent.mkdir(exist_ok=True)
    replace_file(path, json.dumps({**read_measured(store), **values}, indent=1).encode())
