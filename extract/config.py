"""What an extraction is asked to do: one frozen object, checked as a whole before anything heavy starts."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from console.option_file import read_option_file
from imaging.decode import DEFAULT_MAX_PIXELS, MOST_PIXELS
from store.errors import DistillError

SourceKind = Literal["auto", "folder", "yolo", "coco", "voc", "masks", "clips", "hdf5", "table", "sql"]


class ConfigError(DistillError):
    """The options do not make sense; the text lists every problem, not only the first."""

    exit_code = 2


ZERO_SHOT = "zero-shot"  # `zero-shot-calibrated` subtracts the scores of an empty image


class ExtractConfig(BaseModel):
    """Options of `cli extract`, with the same names (dashes for underscores) and meaning.

    `None` means absent. Sizes of images are in pixels.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    data: str
    out: Path
    source: SourceKind = "auto"
    split: dict[str, str] = Field(default_factory=dict)
    val_fraction: float = Field(0.1, ge=0, lt=1)
    group_duplicates: bool | None = None  # None: copies stay together, the rest is split by key
    source_options: dict[str, Any] = Field(default_factory=dict)
    frames: int = Field(16, ge=2)

    teacher: str = "qwen2.5-vl"
    teacher_path: str | None = None
    image_size: int = Field(224, ge=14, le=4096)
    resize: Literal["squash", "letterbox", "center-crop"] = "squash"
    exact_preprocessing: bool = False
    bit_depth: int | Literal["auto", "full"] = "auto"
    max_pixels: int = Field(DEFAULT_MAX_PIXELS, ge=1, le=MOST_PIXELS)

    grid: int | Literal["auto", "native"] = "auto"
    images: Literal["none", "jpeg", "raw"] = "none"
    views: int = Field(0, ge=0, le=64)
    logits: Literal["none", "probe", "zero-shot", "zero-shot-calibrated"] = "none"
    seed: int = 0

    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    device: str = "auto"
    batch_size: int | Literal["auto"] = "auto"
    compile: bool | None = None
    workers: int | None = Field(None, ge=0)
    shard_rows: int | None = Field(None, ge=1)
    shard_range: str | None = None
    scheduler: str | None = None

    max_bad: str = "1%"
    check_content: bool = False
    dry_run: bool = False
    overwrite: bool = False
    break_lock: bool = False

    @field_validator("grid")
    @classmethod
    def check_grid(cls, value: int | str) -> int | str:
        if isinstance(value, int) and not 0 <= value <= 256:
            raise ValueError("must be auto, native, 0 (no grid) or a side between 1 and 256")
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

    @field_validator("device")
    @classmethod
    def check_device(cls, value: str) -> str:
        for name in value.split(","):
            kind, _, index = name.strip().partition(":")
            if kind not in ("auto", "cpu", "cuda") or (index and not index.isdigit()):
                raise ValueError("must be auto, cpu, cuda, or a list like cuda:0,cuda:1")
        return value

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
        if self.scheduler is not None and len(self.devices) > 1:
            problems.append("device takes one name with scheduler: each of its workers uses that device")
        if problems:
            raise ValueError("; ".join(problems))
        return self

    @property
    def devices(self) -> list[str]:
        """The devices to use, one process each when there are several."""
        return [name.strip() for name in self.device.split(",")]

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


def load_config(file: Path | None = None, options: Mapping[str, Any] | None = None) -> ExtractConfig:
    """The configuration from a YAML or TOML file and options; an option that is not None wins.

    Raises:
        ConfigError: with every problem: unknown names (and the nearest valid one) and bad values.
    """
    values = read_option_file(file, ConfigError) if file is not None else {}
    values |= {name: value for name, value in (options or {}).items() if value is not None}
    try:
        return ExtractConfig(**values)
    except ValidationError as error:
        raise ConfigError("; ".join(describe_problems(error.errors()))) from None


def describe_problems(items: Sequence[Mapping[str, Any]]) -> list[str]:
    """pydantic's problems, one text per option: `name: what is wrong (got …)`."""
    texts: dict[str, list[str]] = {}
    for item in items:
        # pydantic reports each alternative of `int | "auto"` on its own; they belong together.
        name = ".".join(str(part) for part in item["loc"][:1]) or "options"
        texts.setdefault(name, []).append(describe_problem(name, item))
    values = {str(item["loc"][0]): item.get("input") for item in items if item["loc"]}
    return [f"{name}: {' or '.join(parts)}{got(values.get(name))}" for name, parts in texts.items()]


def describe_problem(name: str, item: Mapping[str, Any]) -> str:
    if item["type"] == "extra_forbidden":
        nearest = difflib.get_close_matches(name, ExtractConfig.model_fields, n=1, cutoff=0.5)
        hint = f"did you mean {nearest[0]}?" if nearest else f"valid: {', '.join(ExtractConfig.model_fields)}"
        return f"unknown option, {hint}"
    if item["type"] == "missing":
        return f"is needed: --{name.replace('_', '-')}"
    text = str(item["msg"]).removeprefix("Value error, ").removeprefix("Input ")
    return text.partition(", unable to parse")[0]  # pydantic says the same thing twice


def got(value: object) -> str:
    return f" (got {value})" if isinstance(value, (str, int, float)) else ""
