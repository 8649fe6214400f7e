"""Which Qwen teacher takes a checkpoint folder. Imports nothing heavy: a platform's request is checked with it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

from files.reading import read_regular


class QwenCheckpoint(NamedTuple):
    """How a family of Qwen checkpoints is told from the others, before torch is imported.

    model_types: of config.json. side: sides of images are multiples of it, in pixels (patch × merge).
    """

    model_types: tuple[str, ...]
    side: int


QWEN_CHECKPOINTS = {
    "qwen2.5-vl": QwenCheckpoint(("qwen2_5_vl",), 28),
    "qwen3-vl": QwenCheckpoint(("qwen3_vl", "qwen3_vl_moe"), 32),
    "qwen3.5": QwenCheckpoint(("qwen3_5", "qwen3_5_moe"), 32),
}


def teacher_of_checkpoint(folder: Path) -> str | None:
    """The teacher (`qwen2.5-vl`, `qwen3-vl`, `qwen3.5`) that takes a checkpoint folder, from its config.json.

    None for a folder without one, or of another architecture.
    """
    try:
        config = json.loads(read_regular(folder / "config.json"))
    except (OSError, ValueError):
        return None
    model_type = config.get("model_type") if isinstance(config, dict) else None
    return next((name for name, known in QWEN_CHECKPOINTS.items() if model_type in known.model_types), None)
