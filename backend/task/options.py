"""The platform's options: name, kind, limits, default, names in the JSON; and how a value of each kind is read.

Names and defaults are an external contract. What the platform shares with `cli train` is declared there, on the
fields of TrainConfig; this table lists the differences. The JSON's camelCase form of each name is accepted without
being listed; `json` holds further spellings.
"""

from __future__ import annotations

import math
import operator
import re
import textwrap
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from backend.task.errors import OptionError
from console.options import options_of
from files.reading import open_regular
from train.config import TrainConfig

WHOLE = re.compile(r"[+-]?[0-9]{1,18}(\.0+)?", re.ASCII)
DECIMAL = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]{1,4})?", re.ASCII)
TRUE_WORDS = frozenset({"true", "1", "yes", "on"})
FALSE_WORDS = frozenset({"false", "0", "no", "off"})
LONGEST_TEXT = 100_000
LONGEST_SHOWN = 60


def shown(value: object) -> str:
    """A value as an error message shows it: printable, on one line, short."""
    text = repr(value)
    return text if len(text) <= LONGEST_SHOWN else f"{text[:LONGEST_SHOWN]}…"


def as_boolean(value: Any) -> bool:
    """`True`, `true`, `1`, `yes`, `on` and their opposites, in any case."""
    word = str(value).strip().lower()
    if word in TRUE_WORDS:
        return True
    if word in FALSE_WORDS:
        return False
    raise OptionError(f"expected true or false, got {shown(value)}")


def as_integer(value: Any) -> int:
    """`32` and `32.0`; booleans and fractions are refused."""
    text = number_text(value)
    if not WHOLE.fullmatch(text):
        raise OptionError(f"expected a whole number, got {shown(value)}")
    return int(text.partition(".")[0])


def as_float(value: Any) -> float:
    """`0.0001`, `1.0E-4`, `.5`, `32`; infinity and not-a-number are refused."""
    text = number_text(value)
    if not DECIMAL.fullmatch(text) or not math.isfinite(float(text)):
        raise OptionError(f"expected a number, got {shown(value)}")
    return float(text)


def number_text(value: Any) -> str:
    """The text of a number; empty, which no pattern matches, for anything that is none."""
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        return ""
    if isinstance(value, int) and abs(value) >= 10**18:
        return ""
    return str(value).strip()


def as_text(value: Any) -> str:
    """Text with no control characters; a number in JSON (`"datasetId": 12`) counts as its text."""
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        raise OptionError(f"expected text, got {shown(value)}")
    if isinstance(value, int) and abs(value) >= 10**18:
        raise OptionError(f"expected text, got {shown(str(type(value)))}")
    text = str(value).strip()
    if len(text) > LONGEST_TEXT:
        raise OptionError(f"expected at most {LONGEST_TEXT} characters, got {len(text)}")
    if not all(is_plain(character) for character in text):
        raise OptionError(f"control characters are not allowed, got {shown(text)}")
    return text


def as_multiline_text(value: Any) -> str:
    """Text where line breaks and tabs count as spaces: an SQL query, a JSON document."""
    return as_text(re.sub(r"[\r\n\t]+", " ", value) if isinstance(value, str) else value)


def as_list(value: Any) -> str:
    """`a,b` or `["a", "b"]` as `a,b`, without spaces and empty items."""
    items = value if isinstance(value, list) else as_text(value).split(",")
    return ",".join(text for text in (as_text(item) for item in items) if text)


def read_text_file(path: Path, largest_bytes: int = 1_000_000) -> str:
    """A small UTF-8 text file. Devices and pipes, which a web form could name, are not read.

    Raises:
        OptionError: when it is no regular file, too large, unreadable or not UTF-8.
    """
    try:
        with open_regular(path) as file:
            content = file.read(largest_bytes + 1)
        if len(content) > largest_bytes:
            raise OptionError(f"{shown(str(path))} is larger than {largest_bytes} bytes")
        return content.decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8 text"
        raise OptionError(f"cannot read {shown(str(path))}: {reason}") from None


def is_plain(character: str) -> bool:
    """False for control characters, line separators and lone surrogates (undecodable bytes of argv)."""
    code = ord(character)
    return not (code < 0x20 or 0x7F <= code < 0xA0 or code in (0x2028, 0x2029) or 0xD800 <= code <= 0xDFFF)


READERS: dict[str, Callable[[Any], Any]] = {
    "text": as_text,
    "long text": as_multiline_text,
    "integer": as_integer,
    "number": as_float,
    "boolean": as_boolean,
    "list": as_list,
}
LIMITS: dict[str, tuple[str, Callable[[Any, Any], Any]]] = {
    "ge": ("at least", operator.ge),
    "gt": ("more than", operator.gt),
    "le": ("at most", operator.le),
    "lt": ("less than", operator.lt),
}
LARGEST_NUMBER = 1e9
TASKS = ("classification", "detection", "segmentation", "sequence", "features")
DISTILLATIONS = ("feature", "logit", "hybrid")
NO_LOGITS = "Tasks without class logits distill features alone."


@dataclass(frozen=True, kw_only=True, slots=True)
class Option:
    """One option.

    Attributes:
        kind: a key of READERS.
        default: None means absent.
        limits: `ge`, `gt`, `le`, `lt` → number.
        json: further names in the JSON.
        from_json: False keeps it out of the web form's reach.
        shared: a field of TrainConfig with the same name and meaning, which gets its value.
        needs: what must be in use for it to have an effect: `lora`, or class `logits` of the teacher.
    """

    name: str
    kind: str
    help: str
    default: Any = None
    choices: tuple[str, ...] = ()
    limits: Mapping[str, float] = field(default_factory=dict)
    json: tuple[str, ...] = ()
    from_json: bool = True
    shared: bool = False
    needs: str = ""

    def read(self, value: Any) -> Any:
        """The typed value, or None for an empty one, which counts as not given.

        Raises:
            OptionError: when it is of another kind, not among the choices or out of range.
        """
        if value is None or value == "" or value == []:
            return None
        result = READERS[self.kind](value)
        if self.choices:
            result = self.read_choice(result)
        for name, limit in self.limits.items():
            words, holds = LIMITS[name]
            if not holds(result, limit):
                raise OptionError(f"expected {words} {limit:.10g}, got {shown(result)}")
        return None if result == "" else result

    def read_choice(self, value: str) -> str | None:
        word = value.lower().replace("-", "_")
        if word and word not in self.choices:
            raise OptionError(f"expected one of {', '.join(self.choices)}, got {shown(value)}")
        return word or None


def own(kind: str, name: str, help: str, **rest: Any) -> Option:
    """An option of the platform alone; limits are keywords of their own."""
    limits = {limit: rest.pop(limit) for limit in LIMITS if limit in rest}
    return Option(name=name, kind=kind, help=help, limits=limits, **rest)


def shared(name: str, **differences: Any) -> Option:
    """An option of `cli train`: everything but the differences is as its field declares it."""
    declared = options_of(TrainConfig)[name]
    (kind,) = declared.kinds
    facts: dict[str, Any] = {
        "kind": {int: "integer", float: "number", bool: "boolean", str: "text"}[kind],
        "help": declared.help,
        "default": declared.default,
        "choices": declared.choices,
        "needs": declared.needs,
        **({"le": LARGEST_NUMBER} if kind in (int, float) else {}),
    }
    for item in TrainConfig.model_fields[name].metadata:
        facts |= {limit: getattr(item, limit) for limit in LIMITS if hasattr(item, limit)}
    return own(name=name, shared=True, **{**facts, **differences})


text = partial(own, "text")
operator_text = partial(own, "text", from_json=False)
long_text = partial(own, "long text", from_json=False)
integer = partial(own, "integer", ge=1, le=LARGEST_NUMBER)
number = partial(own, "number")
boolean = partial(own, "boolean")
words = partial(own, "list")

GROUPS: dict[str, tuple[Option, ...]] = {
    "Task": (
        text("task_id", "The platform's id of the task."),
        text("task_name", "Its name, for log lines."),
        operator_text("api_base_url", "Where progress is reported: http://host:port/path."),
        operator_text("output_dir", "Where everything is written (default: output root / task id)."),
    ),
    "Models": (
        text("teacher_model", "Name of the teacher: a folder of the models root."),
        text("teacher_path", "Its folder or file (default: models root / its name).", json=("modelPath",)),
        operator_text("models_root", "Folder of the models."),
        text("student_model", "resnet50, resnet/resnet50, yolov8s, …"),
        text("student_model_type", "resnet, vit, yolov8, unet, lstm (default: from student_model)."),
        text("student_model_size", "resnet18, vit-tiny, n, small, … (default: from student_model)."),
        text("student_path", "Weights to start from, if they exist.", json=("pretrainPath",)),
        boolean("pretrained", "Start from timm's published weights where no student_path is given."),
    ),
    "Data": (
        text("dataset_id", "Folder of the data set below the data sets' root."),
        text("val_dataset_id", "Folder whose val split validates (default: dataset_id)."),
        operator_text("datasets_root", "Folder of the data sets.", default="/data/datasets"),
        operator_text("dataset_url", "Database that holds the data set (SQLAlchemy URL)."),
        long_text("dataset_query", "Its query; may use :dataset_id."),
        operator_text("cache_dir", "Shared cache of teacher features."),
        integer("teacher_image_size", "Teacher's image side (default: from image_size).", ge=28),
        integer("clip_frames", "Frames per clip for lstm students.", ge=2, le=4096),
        number("val_fraction", "Share cut for validation from a single split.", default=0.1, gt=0, lt=1),
        text("max_bad", "How many unreadable images end the run: 1% or a count.", default="1%"),
    ),
    "Training": (
        text("task_type", "The student's task.", default="classification", choices=TASKS),
        shared("num_classes", default=10, help="Classes of the head; more than the data has widens it."),
        shared("image_size", ge=16),
        shared("epochs", json=("totalEpochs",)),
        shared("batch_size", le=65536),
        shared("learning_rate"),
        shared("optimizer", choices=("adamw", "adam", "sgd"), help="sgd uses momentum 0.9."),
        shared("lr_scheduler"),
        shared("weight_decay"),
        shared("grad_accum_steps", le=65536),
        shared("max_grad_norm"),
        shared("seed", le=2**31 - 1),
        shared("workers", le=1024, help="Processes that decode images."),
    ),
    "Distillation": (
        shared("distillation_type", default="hybrid", choices=DISTILLATIONS, help=NO_LOGITS),
        shared("temperature"),
        number("alpha", "Soft weight; the hard weight is 1 - alpha.", ge=0, le=1),
        shared("hard_label_weight"),
        shared("soft_label_weight"),
        shared("feature_loss_type"),
        shared("align_feature"),
        shared("distill_loss_type"),
        shared("control"),
    ),
    "LoRA": (
        shared("lora_rank", le=4096),
        shared("lora_alpha"),
        shared("lora_dropout"),
        shared("lora_target_modules", kind="list", default=None, json=("targetModules",)),
        shared("lora_bias"),
    ),
    "Running": (
        words("gpu_devices", "0 or 0,1 or cpu.", default="0"),
        boolean("auto_save_checkpoint", "Keep checkpoint_epoch_n.pt files.", default=False),
        integer("checkpoint_interval", "Epochs between them.", default=10),
        long_text("training_config", "The settings as JSON: a file or the text."),
        operator_text("platform_config", "The platform's YAML with URLs and roots."),
    ),
}
OPTIONS: dict[str, Option] = {option.name: option for group in GROUPS.values() for option in group}


def canonical_name(name: str) -> str:
    """`batch-size` and `batch_size` are one option."""
    return name.replace("-", "_")


def camel_case(name: str) -> str:
    """`batch_size` as the JSON spells it: `batchSize`."""
    first, *rest = name.split("_")
    return first + "".join(word.capitalize() for word in rest)


def help_text(program: str) -> str:
    """The page that `--help` prints: 80 columns, each option with its choices and default."""
    lines = [
        f"{program} --task_id 7 --api_base_url http://localhost:8080/api \\",
        "    --teacher_model qwen2.5-vl-8b --teacher_path /data/models/qwen2.5-vl-8b \\",
        "    --student_model resnet18 --dataset_id flowers --output_dir /data/output/7",
        "",
        "Extract the teacher's features if the shared cache lacks them, train the student,",
        "evaluate it, report to the platform. Dashes work for underscores; the",
        "last of repeated options wins; unknown options are warned about and ignored.",
        "Option > training_config JSON > recipe of the student > [default].",
    ]
    for title, group in GROUPS.items():
        lines += ["", f"{title}:"]
        lines += [option_line(option) for option in group]
    return "\n".join(lines)


def option_line(option: Option) -> str:
    choices = f" {', '.join(option.choices)}." if option.choices else ""
    default = "" if option.default is None else f" [{option.default}]"
    head = f"  --{option.name:<22}"
    return textwrap.fill(f"{head}{option.help}{choices}{default}", 80, subsequent_indent=" " * len(head))
