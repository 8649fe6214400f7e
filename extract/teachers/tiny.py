"""Small random checkpoints of the Qwen families, to try the commands without the real weights."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from extract.teachers.base import TeacherError
from files.writing import check_writable


def make_tiny_teacher(
    folder: str | Path, *, depth: int = 2, seed: int = 0, family: str = "qwen2.5-vl"
) -> Path:
    """Write a checkpoint of the family with a tower of the published width, `depth` blocks and random weights.

    The folder has the published layout (config.json, model.safetensors, preprocessor_config.json) and a file
    `random_weights.json`, from which everything that uses it warns of them. About 32 MB per block.

    Raises:
        TeacherError: an unknown family, a depth below 1, or a folder that holds something else.
    """
    from safetensors import SafetensorError

    from extract.teachers.qwen_config import FAMILIES, RANDOM_WEIGHTS_FILE
    from extract.teachers.qwen_transformers import save_random_checkpoint

    target = Path(folder)
    if family not in FAMILIES:
        raise TeacherError(f"unknown family {family!r}: valid are {', '.join(FAMILIES)}")
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
            save_random_checkpoint(
                Path(aside), vision=tiny_vision(depth, family), text=TINY_TEXT, seed=seed, family=family
            )
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
    "head_dim": 32,
    "vocab_size": 1024,
    "bos_token_id": None,
    "eos_token_id": None,
    "rope_scaling": {"rope_type": "default", "type": "mrope", "mrope_section": [4, 6, 6]},
}


def tiny_vision(depth: int, family: str = "qwen2.5-vl") -> dict[str, object]:
    """The published tower's shape with fewer blocks.

    Qwen2.5-VL: the last of every four blocks attends to the whole image. Qwen3-VL: DeepStack's taps are after a
    quarter, a half and three quarters of the blocks.
    """
    from extract.teachers.qwen_config import FAMILIES

    tower = FAMILIES[family].tower
    vision: dict[str, object] = {
        "depth": depth,
        "hidden_size": tower.hidden_size,
        "intermediate_size": tower.intermediate_size,
        "num_heads": tower.num_heads,
        "out_hidden_size": TINY_TEXT["hidden_size"],
    }
    if family == "qwen2.5-vl":
        vision["fullatt_block_indexes"] = list(range(3, depth, 4)) or [depth - 1]
    if family == "qwen3-vl":
        vision["deepstack_visual_indexes"] = sorted({depth * part // 4 - 1 for part in (1, 2, 3)} - {-1})
    return vision
