"""Small random Qwen2.5-VL checkpoints, to try the machinery without the real weights."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from extract.teachers.base import TeacherError
from files.writing import check_writable


def make_tiny_teacher(folder: str | Path, *, depth: int = 2, seed: int = 0) -> Path:
    """Write a Qwen2.5-VL checkpoint with a 1280-wide tower of `depth` blocks and random weights.

    The folder has the published layout (config.json, model.safetensors, preprocessor_config.json) and a file
    `random_weights.json`, from which everything that uses it warns of them. About 32 MB per block.

    Raises:
        TeacherError: when depth is below 1 or the folder holds something else.
    """
    from safetensors import SafetensorError

    from extract.teachers.qwen2_5_vl import RANDOM_WEIGHTS_FILE, save_random_checkpoint

    target = Path(folder)
    if depth < 1:
        raise TeacherError(f"depth {depth}: expected at least 1 block")
    check_writable(target, "DIR")
    if target.exists() and not (
        target.is_dir() and (not any(target.iterdir()) or (target / RANDOM_WEIGHTS_FILE).is_file())
    ):
        raise TeacherError(f"{target} exists and is no tiny teacher: choose another folder")
    existed = target.exists()
    try:
        target.mkdir(parents=True, exist_ok=True)
        # Written aside: a folder that holds only a part would be taken for a checkpoint.
        with tempfile.TemporaryDirectory(dir=target, prefix=".partial-") as aside:
            save_random_checkpoint(Path(aside), vision=tiny_vision(depth), text=TINY_TEXT, seed=seed)
            for file in sorted(Path(aside).iterdir(), key=lambda file: file.name == RANDOM_WEIGHTS_FILE):
                file.replace(target / file.name)
    except (OSError, SafetensorError) as error:
        if not existed:
            shutil.rmtree(target, ignore_errors=True)
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise TeacherError(
            f"{target}: cannot be written: {reason}; choose another place (or make room), then run it again"
        ) from error
    return target


# The language model is only there because the layout has one; the vision tower is what counts.
TINY_TEXT = {
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 1024,
    "bos_token_id": None,
    "eos_token_id": None,
    "rope_scaling": {"type": "mrope", "mrope_section": [4, 6, 6]},
}


def tiny_vision(depth: int) -> dict[str, object]:
    """The published tower's shape with fewer blocks; the last of every four blocks attends to the whole image."""
    return {
        "depth": depth,
        "hidden_size": 1280,
        "intermediate_size": 3420,
        "num_heads": 16,
        "out_hidden_size": TINY_TEXT["hidden_size"],
        "fullatt_block_indexes": list(range(3, depth, 4)) or [depth - 1],
    }
