"""The configuration of an extraction: one frozen object, checked as a whole before anything expensive starts."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from functools import partial
from hashlib import blake2b
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, field_validator, model_validator

from console.devices import parse_devices
from console.options import load_options, option, read_option_file
from files.cache import cache_folder
from imaging.decode import DEFAULT_MAX_PIXELS, MOST_PIXELS
from store.errors import DistillError
from store.metadata import is_url

SourceKind = Literal["auto", "folder", "yolo", "coco", "voc", "masks", "clips", "hdf5", "table", "sql"]


class ConfigError(DistillError):
    """The options do not make sense; the text lists every problem, not only the first."""

    exit_code = 2


TEACHER_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9_.-]*")
ZERO_SHOT = "zero-shot"  # `zero-shot-calibrated` subtracts the scores of an empty image


# Headings of `cli extract --help`.
_data = partial(option, panel="Data")
_teacher = partial(option, panel="Teacher")
_stored = partial(option, panel="What is stored")
_machine = partial(option, panel="Devices and speed")
_run = partial(option, panel="The run")


class ExtractConfig(BaseModel):
    """Options of `cli extract`, with the same names (dashes for underscores) and meaning.

    `None` means absent. Sizes of images are in pixels.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    data: str = option(..., "Folder, file or database URL of the data set.", flag="DATA")
    out: str = option(..., "The store to write: a folder, or a URL (s3://bucket/a.zarr).", metavar="STORE")

    source: SourceKind = _data("auto", "Layout of the data set.")
    split: dict[str, str] = _data(
        {}, "NAME=PATH of a split, e.g. val=images/val; repeat it.", metavar="NAME=PATH"
    )
    val_fraction: float = _data(0.1, "Share cut for validation when the data set has none.", ge=0, lt=1)
    group_duplicates: bool | None = _data(
        None,
        "Cut validation by content (reads all twice), or by key alone.",
        shown_default="by key, copies kept together",
    )
    source_options: dict[str, Any] = _data(
        {},
        "NAME=VALUE for the source, e.g. query='select …' (sql); repeat it.",
        flag="--source-option",
        metavar="NAME=VALUE",
    )
    frames: int = _data(16, "Frames taken evenly from each clip.", ge=2)

    teacher: str = _teacher("qwen2.5-vl", "qwen2.5-vl, qwen3-vl, qwen3.5 or timm:NAME.")
    add_teacher: str | None = _teacher(
        None, "Add the features of a further teacher, under this name, to the complete STORE.", metavar="NAME"
    )
    teacher_path: str | None = _teacher(None, "Checkpoint folder, weights file or hub name.")
    image_size: int = _teacher(224, "Side of the square the teacher sees, in pixels.", ge=14, le=4096)
    resize: Literal["squash", "letterbox", "center-crop"] = _teacher("squash", "How an image becomes square.")
    pool: Literal["mean", "cls", "model"] = _teacher(
        "mean", "The pooled vector: mean of the patch tokens, class token, or the model's own (timm)."
    )
    exact_preprocessing: bool = _teacher(
        False, "Bit-equal to the Hugging Face image processor; slower on large JPEG."
    )
    bit_depth: int | Literal["auto", "full"] = _teacher(
        "auto", "Bits used of 16-bit gray images: auto (by a sample), full, 8, 12 or 16.", metavar="BITS"
    )
    max_pixels: int = _teacher(
        DEFAULT_MAX_PIXELS, "Images with more pixels are bad images, never decoded.", ge=1, le=MOST_PIXELS
    )
    dtype: Literal["auto", "float32", "bfloat16"] = _teacher("auto", "Precision of the teacher.")

    grid: int | Literal["auto", "native"] = _stored(
        "auto", "Side of the stored grid: auto (16 with boxes or masks, else 0), 0, a number, native."
    )
    layers: str = _stored(
        "", "Further layers whose grids are stored: numbers from 0 and last (8,16,24,last), or auto."
    )
    images: Literal["none", "jpeg", "raw"] = _stored(
        "none", "Images kept in the store, which is then all that training needs."
    )
    views: int | Literal["flip"] = _stored(
        0, "flip: the mirror image too, exactly; a number: recorded augmented views per image."
    )
    logits: Literal["none", "probe", "zero-shot", "zero-shot-calibrated"] = _stored(
        "none", "The teacher's logits: of a probe of its features, or of the language model."
    )
    seed: int = _stored(0, "Seed of views and probe folds.")

    device: str = _machine("auto", "auto, cpu, cuda, or a list like cuda:0,cuda:1 (a process each).")
    batch_size: int | Literal["auto"] = _machine(
        "auto", "Images a forward pass, or auto. Halved when memory runs out."
    )
    compile: bool | None = _machine(
        None, "Run the teacher through torch.compile.", shown_default="on GPUs, for qwen2.5-vl"
    )
    workers: int | None = _machine(
        None,
        "Decoding processes; 0 decodes in a thread.",
        ge=0,
        shown_default="four of five cores, 16 at most",
    )
    shard_rows: int | None = _machine(
        None, "Rows of a shard, a power of two: the unit that devices share.", ge=1
    )
    shard_range: str | None = _machine(None, "Encode only shards A:B of the plan (SLURM arrays).")
    scheduler: str | None = _machine(None, "Address of a dask scheduler, e.g. tcp://host:8786.")

    staging_dir: Path | None = _run(
        None,
        "For a URL at --out: folder for the shards that are not uploaded yet.",
        shown_default="~/.cache/qwen-distill/staging",
    )
    staging_gb: float | None = _run(
        None,
        "What these shards may take there; encoding waits for uploads. The commit logs, with all labels, masks and JPEG "
        "images, are not counted.",
        gt=0,
        shown_default="four fifths of the free disk",
    )
    max_bad: str = _run("1%", "Bad images that end the run: 1% or a count.")
    check_content: bool = _run(
        False,
        "Read every file to find changed ones, and try bad images again; otherwise size and time decide.",
    )
    dry_run: bool = _run(
        False, "Print sizes, an estimated time, what has changed and what is at a URL, and stop."
    )
    overwrite: bool = _run(False, "Start from the beginning; the store at --out is deleted.")
    break_lock: bool = _run(False, "Take over a lock whose owner is gone.")

    @field_validator("split", "source_options", mode="before")
    @classmethod
    def read_pairs(cls, value: object) -> object:
        """The command line's `["a=b", …]` as a mapping."""
        if not isinstance(value, (list, tuple)):
            return value
        pairs = [(text, *str(text).partition("=")) for text in value]
        if wrong := [text for text, name, equals, _ in pairs if not (name and equals)]:
            raise ValueError(f"expected NAME=VALUE, got {', '.join(map(str, wrong))}")
        return {name: rest for _, name, _, rest in pairs}

    @field_validator("out", mode="before")
    @classmethod
    def read_out(cls, value: object) -> object:
        return os.fspath(value) if isinstance(value, Path) else value

    @field_validator("grid")
    @classmethod
    def check_grid(cls, value: int | str) -> int | str:
        if isinstance(value, int) and not 0 <= value <= 256:
            raise ValueError("must be auto, native, 0 (no grid) or a side between 1 and 256")
        return value

    @field_validator("views")
    @classmethod
    def check_views(cls, value: int | str) -> int | str:
        if isinstance(value, int) and not 0 <= value <= 64:
            raise ValueError("must be flip, 0 (no views) or a number of views between 1 and 64")
        return value

    @field_validator("bit_depth")
    @classmethod
    def check_bit_depth(cls, value: int | str) -> int | str:
        if isinstance(value, int) and not 8 <= value <= 16:
            raise ValueError("must be auto, full (16) or a number between 8 and 16")
        return value

    @field_validator("batch_size")
    @classmethod
    def check_batch_size(cls, value: int | str) -> int | str:
        if isinstance(value, int) and not 1 <= value <= 65536:
            raise ValueError("must be auto or a number between 1 and 65536")
        return value

    @field_validator("max_bad", mode="before")
    @classmethod
    def check_max_bad(cls, value: object) -> object:
        parse_max_bad(str(value))
        return str(value)

    @field_validator("add_teacher")
    @classmethod
    def check_name(cls, value: str | None) -> str | None:
        if value is not None and not TEACHER_NAME.fullmatch(value):
            raise ValueError(
                "must be a name of letters, digits, `_`, `-` and `.`, that starts with one of the first three"
            )
        return value

    @field_validator("device")
    @classmethod
    def check_device(cls, value: str) -> str:
        return ",".join(parse_devices(value))

    @field_validator("shard_range")
    @classmethod
    def check_shard_range(cls, value: str | None) -> str | None:
        if value is not None:
            parse_shard_range(value)
        return value

    @model_validator(mode="after")
    def check_together(self) -> Self:
        problems = []
        if self.shard_range is not None and self.scheduler is not None:
            problems.append("shard_range and scheduler exclude each other: the scheduler hands out shards")
        if self.shard_range is not None and len(self.devices) > 1:
            problems.append(
                f"shard_range takes one device, not {self.device}: start one command for each, with its own range"
            )
        if self.scheduler is not None and len(self.devices) > 1:
            problems.append("device takes one name with scheduler: each of its workers uses that device")
        if self.url is not None:
            if self.scheduler is not None:
                problems.append(
                    "--out with a URL takes no scheduler, whose workers may not share the staging folder: start one command "
                    "for each host, each with its own --shard-range"
                )
        elif self.staging_dir is not None or self.staging_gb is not None:
            problems.append("--staging-dir and --staging-gb are for a URL at --out (s3://bucket/a.zarr)")
        if self.add_teacher is not None:
            if self.url is not None:
                problems.append(
                    "add_teacher needs a local store: copy it here with cli copy, add the teacher, copy it back"
                )
            if "teacher" not in self.model_fields_set:
                problems.append(
                    f"add_teacher {self.add_teacher} is a name: say which model it is with --teacher"
                )
            problems += [
                f"{name} has no effect with add_teacher: the store keeps its own"
                for name in ("images", "logits")
                if getattr(self, name) != "none"
            ]
        if problems:
            raise ValueError("; ".join(problems))
        return self

    @property
    def url(self) -> str | None:
        """The address of the store when it is written to one; None for a folder."""
        return self.out.rstrip("/") if is_url(self.out) else None

    @property
    def base(self) -> Path | None:
        """The complete store that a further teacher is added to; None for any other extraction."""
        return None if self.add_teacher is None else Path(self.out)

    @property
    def folder(self) -> Path:
        """The store on this disk that is filled: `out`, the staging store of a URL, or a further teacher's inside `out`."""
        if self.add_teacher is not None:
            from store.teachers import addition_path

            return addition_path(Path(self.out), self.add_teacher)
        return Path(self.out) if self.url is None else self.staging_folder / "store.zarr"

    @property
    def staging_folder(self) -> Path:
        """Where a store at a URL is staged: one folder for each address and range of shards."""
        assert self.url is not None
        base = self.staging_dir or cache_folder("staging")
        part = "" if self.shard_range is None else f"-{self.shard_range.replace(':', '-')}"
        name = self.url.rpartition("/")[2].removesuffix(".zarr") or "store"
        return base / f"{name}{part}-{blake2b(self.url.encode(), digest_size=6).hexdigest()}"

    @property
    def devices(self) -> list[str]:
        """The devices to use, one process each when there are several."""
        return self.device.split(",")

    @property
    def shards(self) -> tuple[int, int | None] | None:
        """The shards this process is to encode, `(first, end)`, or None for all of them."""
        return None if self.shard_range is None else parse_shard_range(self.shard_range)

    def allowed_bad(self, total: int) -> int:
        """How many of `total` samples may be bad before the run ends; one at least of any share above 0."""
        share, count = parse_max_bad(self.max_bad)
        if share is None:
            return int(count or 0)
        return max(1, int(share * total)) if share else 0


def parse_max_bad(text: str) -> tuple[float | None, int | None]:
    """`1%` gives (0.01, None), `20` gives (None, 20).

    Raises:
        ValueError: for anything else.
    """
    try:
        if text.endswith("%"):
            share = float(text[:-1]) / 100
            if 0 <= share <= 1:
                return share, None
        elif int(text) >= 0:
            return None, int(text)
    except ValueError:
        pass
    raise ValueError("must be a share like 1% or a count like 20")


def parse_shard_range(text: str) -> tuple[int, int | None]:
    """`2:4` gives (2, 4); `2:` gives (2, None), up to the end; `2` gives (2, 3).

    Raises:
        ValueError: for anything else.
    """
    first, colon, end = text.partition(":")
    numbers = (int(first or 0) if (first or "0").isdigit() else None, int(end) if end.isdigit() else None)
    if numbers[0] is not None and not (end and numbers[1] is None):
        start, stop = numbers[0], numbers[1] if colon else numbers[0] + 1
        if stop is None or stop > start:
            return start, stop
    raise ValueError("must be first:end with first < end, like 0:8")


def load_config(options: Mapping[str, Any], file: Path | None = None) -> ExtractConfig:
    """The configuration of `options` (`None` is absent) over those of a YAML, TOML or JSON file.

    Raises:
        ConfigError: with every problem: unknown names (and the nearest valid one) and bad values.
    """
    from_file = read_option_file(file, ConfigError) if file is not None else {}
    return load_options(ExtractConfig, options, from_file, ConfigError)
