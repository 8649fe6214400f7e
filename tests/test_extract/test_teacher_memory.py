"""A checkpoint of the full size is read with little memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

INDEX = "model.safetensors.index.json"


ROOT = Path(__file__).parents[2]


MEMORY_SCRIPT = """
import sys, time
import torch
from extract.teachers import load_teacher
began = time.perf_counter()
teacher = load_teacher(sys.argv[2], sys.argv[1], device="cpu", dtype="bfloat16", image_size=224)
loaded = time.perf_counter() - began
out = teacher.encode(torch.zeros(1, 3, 224, 224, dtype=torch.uint8))
side = 224 // teacher.tower.config.patch_size
assert out.grid.shape == (1, side, side, teacher.spec.width), out.grid.shape
assert teacher.tower.config.depth == int(sys.argv[3])
# Not getrusage, whose peak begins with that of the process which started this one.
peak = next(line for line in open("/proc/self/status") if line.startswith("VmHWM:"))
print(peak.split()[1], loaded)
"""


def lay_out_full_size(folder: Path, family: str) -> int:
    """The published layout of the 7B (Qwen2.5-VL) or 8B (Qwen3-VL) model as sparse files: 5 shards with an index.

    As published, the tower is in the first shard, together with language-model tensors; the rest holds none. The
    language model has the sizes of Qwen2.5's 7B in both. Returns the apparent size in bytes.
    """
    from extract.teachers.qwen_config import FAMILIES
    from extract.teachers.vision_tower import VisionTower

    kind = FAMILIES[family]
    with torch.device("meta"):
        tower = VisionTower(kind.tower).state_dict()
    hidden, merged, inner, vocabulary = 3584, 5120, 18944, 152064
    prefix = "visual." if family == "qwen2.5-vl" else "model.visual."
    shapes = {f"{prefix}{name}": tuple(value.shape) for name, value in tower.items()}
    shapes |= {f"{prefix}merger.mlp.0.weight": (merged, merged)}
    shapes |= {f"{prefix}merger.mlp.2.weight": (hidden, merged)}
    shards: list[dict[str, tuple[int, ...]]] = [shapes | {"model.embed_tokens.weight": (vocabulary, hidden)}]
    layer = {
        "q_proj": (hidden, hidden),
        "o_proj": (hidden, hidden),
        "k_proj": (512, hidden),
        "v_proj": (512, hidden),
    }
    mlp = {"gate_proj": (inner, hidden), "up_proj": (inner, hidden), "down_proj": (hidden, inner)}
    for first in range(0, 28, 7):
        names: dict[str, tuple[int, ...]] = {}
        for index in range(first, first + 7):
            names |= {f"model.layers.{index}.self_attn.{key}.weight": shape for key, shape in layer.items()}
            names |= {f"model.layers.{index}.mlp.{key}.weight": shape for key, shape in mlp.items()}
        shards.append(names)
    shards[-1]["lm_head.weight"] = (vocabulary, hidden)
    folder.mkdir()
    weight_map = {}
    for number, tensors in enumerate(shards, 1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        write_sparse(folder / file, tensors)
        weight_map |= dict.fromkeys(tensors, file)
    vision = {key: getattr(kind.tower, key) for key in kind.keys if key != "rope_theta"}
    config = {"model_type": kind.model_types[0], "vision_config": vision}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def write_sparse(file: Path, tensors: dict[str, tuple[int, ...]]) -> None:
    """A safetensors file of bfloat16 zeros that takes almost no disk."""
    header, offset = {}, 0
    for name, shape in tensors.items():
        size = 2
        for side in shape:
            size *= side
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header).encode()
    with file.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        stream.truncate(8 + len(text) + offset)


@pytest.mark.slow
@pytest.mark.parametrize(("family", "depth"), [("qwen2.5-vl", 32), ("qwen3-vl", 27)])
def test_a_full_size_checkpoint_needs_little_memory(family: str, depth: int, tmp_path: Path) -> None:
    """Trap 2: 16 GB on disk, at most 2.5 GB in memory, one forward included."""
    folder = tmp_path / "full"
    apparent = lay_out_full_size(folder, family)
    assert 15.5e9 < apparent < 17.2e9
    for number in range(2, 6):  # no vision tensors in there: never opened, so absence goes unnoticed
        (folder / f"model-{number:05}-of-00005.safetensors").unlink()
    done = subprocess.run(
        [sys.executable, "-c", MEMORY_SCRIPT, str(folder), family, str(depth)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    peak_kb, loaded_s = (float(value) for value in done.stdout.split())
    print(f"peak RSS {peak_kb / 1e6:.2f} GB, loaded in {loaded_s:.1f} s")
    assert peak_kb * 1024 <= 2.5e9
