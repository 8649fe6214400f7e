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
teacher = load_teacher("qwen2.5-vl", sys.argv[1], device="cpu", dtype="bfloat16", image_size=56)
loaded = time.perf_counter() - began
out = teacher.encode(torch.zeros(1, 3, 56, 56, dtype=torch.uint8))
assert out.grid.shape == (1, 4, 4, 1280), out.grid.shape
# Not getrusage, whose peak begins with that of the process which started this one.
peak = next(line for line in open("/proc/self/status") if line.startswith("VmHWM:"))
print(peak.split()[1], loaded)
"""


def lay_out_full_size(folder: Path, source: Path) -> int:
    """The published 7B layout as sparse files: 5 shards with an index. Returns the apparent size in bytes.

    As published, the tower lies in the first shard, together with language-model tensors; the rest holds none.
    """
    from extract.teachers.vision_tower import TowerConfig, VisionTower

    with torch.device("meta"):
        tower = VisionTower(TowerConfig()).state_dict()
    hidden, merged, inner, vocabulary = 3584, 5120, 18944, 152064
    shapes = {f"visual.{name}": tuple(value.shape) for name, value in tower.items()}
    shapes |= {"visual.merger.ln_q.weight": (1280,), "visual.merger.mlp.0.weight": (merged, merged)}
    shapes |= {"visual.merger.mlp.2.weight": (hidden, merged)}
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
    config = json.loads((source / "config.json").read_text())
    config["vision_config"] |= {
        "depth": 32,
        "fullatt_block_indexes": [7, 15, 23, 31],
        "out_hidden_size": hidden,
    }
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
def test_a_full_size_checkpoint_needs_little_memory(tiny_teacher_folder: Path, tmp_path: Path) -> None:
    """Trap 2: 16.6 GB on disk, at most 2.5 GB in memory, one forward included."""
    folder = tmp_path / "full"
    apparent = lay_out_full_size(folder, tiny_teacher_folder)
    assert 16.0e9 < apparent < 17.2e9
    for number in range(2, 6):  # no vision tensors in there: never opened, so absence goes unnoticed
        (folder / f"model-{number:05}-of-00005.safetensors").unlink()
    done = subprocess.run(
        [sys.executable, "-c", MEMORY_SCRIPT, str(folder)],
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
