"""LoRA as the options ask for it; peft is imported only when they do."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from train.students.base import Student


def apply_lora_options(student: Student, options: Mapping[str, Any], *, trained: bool = True) -> Any:
    """Put adapters into `student` by the `lora_*` options; None when `lora_rank` is 0.

    `trained`: the student is rebuilt to read trained weights back, so random ones are fine for now.
    """
    if not options.get("lora_rank"):
        return None
    from train.lora import LoraOptions, apply_lora

    names = str(options.get("lora_target_modules") or "").split(",")
    return apply_lora(
        student,
        LoraOptions(
            rank=int(options["lora_rank"]),
            alpha=float(options["lora_alpha"]),
            dropout=float(options["lora_dropout"]),
            target_modules=tuple(name.strip() for name in names if name.strip()),
            bias=options["lora_bias"],
        ),
        require_weights=not trained,
    )
