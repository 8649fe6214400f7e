"""Which student the platform means: `student_model`, `student_model_type`, `student_model_size` reconciled."""

from __future__ import annotations

import difflib

from backend.errors import OptionError
from backend.values import shown
from train.students.names import SIZES, StudentName

LETTERS = {
    "nano": "n",
    "tiny": "n",
    "small": "s",
    "medium": "m",
    "large": "l",
    "xlarge": "x",
    "extra-large": "x",
}
WORDS = {"s": "small", "m": "medium", "l": "large"}
TYPE_NAMES = {"yolo": "yolov8", "yolo8": "yolov8", "yolo-v8": "yolov8", "u-net": "unet"}


def reconcile(model: str | None, kind: str | None, size: str | None) -> StudentName:
    """The student that the three options name together; what is missing is derived from `model`.

    Raises:
        OptionError: when they name none, an unknown one, or contradict each other.
    """
    named = parse_model(model) if model else None
    type_name = clean_type(kind) if kind else (named.type if named else None)
    if type_name is None:
        raise OptionError("--student_model: expected a student like resnet50 or yolov8s, got none")
    if named and named.type != type_name:
        raise OptionError(f"--student_model_type: {shown(kind)} contradicts --student_model {shown(model)}")
    if named is not None and (not size or type_name == "timm"):
        return named
    if not size:
        raise OptionError(
            f"--student_model_size: expected one of {', '.join(SIZES.get(type_name, ()))}, got none"
        )
    given = StudentName(type_name, clean_size(type_name, size))
    if named is not None and named != given:
        raise OptionError(f"--student_model_size: {shown(size)} contradicts --student_model {shown(model)}")
    return given


def parse_model(model: str) -> StudentName:
    """`resnet50`, `resnet/resnet50`, `yolov8s`, `yolov8/s`, `unet-small`, `lstm_medium`, `timm:NAME`."""
    text = model.strip()
    if text.lower().startswith("timm:") and len(text) > len("timm:"):
        return StudentName("timm", text[len("timm:") :])
    head, slash, tail = text.lower().partition("/")
    if slash:
        kind = clean_type(head)
        return StudentName(kind, clean_size(kind, tail))
    for kind in SIZES:
        if head.startswith(kind):
            return StudentName(kind, clean_size(kind, head))
    raise unknown("student_model", model)


def clean_type(kind: str) -> str:
    word = kind.strip().lower().replace("_", "-")
    word = TYPE_NAMES.get(word, word)
    if word not in SIZES and word != "timm":
        raise OptionError(f"--student_model_type: expected one of {', '.join(SIZES)}, got {shown(kind)}")
    return word


def clean_size(kind: str, size: str) -> str:
    """The size as the table spells it, from `50`, `resnet-50`, `tiny`, `yolov8s`, `nano`, `S` and the like."""
    if kind == "timm":
        return size
    word = size.strip().lower().replace("_", "-")
    if word in SIZES[kind]:
        return word
    bare = word.removeprefix(kind).strip("-")
    aliases = LETTERS if kind == "yolov8" else WORDS
    for candidate in (bare, f"{kind}{bare}", f"{kind}-{bare}", aliases.get(bare)):
        if candidate in SIZES[kind]:
            return candidate
    raise unknown("student_model_size", size, kind)


def unknown(option: str, value: str, kind: str | None = None) -> OptionError:
    names = SIZES[kind] if kind else tuple(f"{kind}/{size}" for kind in SIZES for size in SIZES[kind])
    near = difflib.get_close_matches(value, names, n=3, cutoff=0.4) if not kind else names
    return OptionError(
        f"--{option}: unknown, expected e.g. {', '.join(near or names[:4])}, got {shown(value)}"
    )
