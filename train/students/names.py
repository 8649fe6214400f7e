"""Student names: `resnet/resnet18`, `resnet18`, `timm:NAME`, `yolov8n`. Parsed here and nowhere else.

Imports no torch, so that configurations are validated before anything heavy is loaded.
"""

from __future__ import annotations

from dataclasses import dataclass
from difflib import get_close_matches

from train.errors import ConfigError

SIZES: dict[str, tuple[str, ...]] = {
    "resnet": ("resnet18", "resnet34", "resnet50", "resnet101"),
    "vit": ("vit-tiny", "vit-base", "vit-large"),
    "yolov8": ("n", "s", "m", "l", "x"),
    "unet": ("small", "medium", "large"),
    "lstm": ("small", "medium", "large"),
}


class UnknownStudentError(ConfigError):
    """No student of that name; the text lists the nearest names."""


@dataclass(frozen=True)
class StudentName:
    """A student's type and size; `str()` gives the canonical `type/size` or `timm:NAME`."""

    type: str
    size: str

    def __str__(self) -> str:
        return f"timm:{self.size}" if self.type == "timm" else f"{self.type}/{self.size}"


def _short_names() -> dict[str, StudentName]:
    """Every accepted spelling of the fixed students (lower case) → its name."""
    names: dict[str, StudentName] = {}
    for kind, sizes in SIZES.items():
        for size in sizes:
            name = StudentName(kind, size)
            spellings = {f"{kind}/{size}", f"{kind}/{kind}{size}", f"{kind}/{kind}-{size}"}
            spellings |= {f"{kind}{size}", f"{kind}-{size}"}
            if size.startswith(kind):
                bare = size.removeprefix(kind).lstrip("-")
                spellings |= {
                    size,
                    size.replace("-", "_"),
                    f"{kind}/{bare}",
                    f"{kind}/{size.replace('-', '_')}",
                }
            names.update(dict.fromkeys(spellings, name))
    return names


_NAMES = _short_names()


def parse_student_name(text: str) -> StudentName:
    """`resnet/resnet18`, `resnet18`, `vit-tiny`, `yolov8n`, `unet/small`, `timm:NAME` → type and size.

    A timm name is not checked here (that needs timm itself); `build_student` does.
    Raises UnknownStudentError with the nearest names.
    """
    stripped = text.strip()
    if stripped.lower().startswith("timm:") and stripped[5:].strip():
        return StudentName("timm", stripped[5:].strip())
    found = _NAMES.get(stripped.lower())
    if found is None:
        raise UnknownStudentError(_unknown_text(stripped))
    return found


def all_student_names() -> list[StudentName]:
    """The fixed students in the order of their table (timm's are open-ended and not listed)."""
    return [StudentName(kind, size) for kind, sizes in SIZES.items() for size in sizes]


def _unknown_text(text: str) -> str:
    text = text.rstrip("/")
    if text.lower() in SIZES:
        text = text.lower()
        return f"student {text!r} needs a size: one of {', '.join(f'{text}/{size}' for size in SIZES[text])}"
    near = get_close_matches(text.lower(), _NAMES, n=8, cutoff=0.5)
    candidates = list(dict.fromkeys(str(_NAMES[name]) for name in near))[:4]
    if not candidates:
        candidates = [str(name) for name in all_student_names()]
    hint = "nearest" if near else "valid"
    return f"unknown student {text!r}: {hint} names {', '.join(candidates)}, or timm:NAME for any timm model"
