"""Loading the tower alone: which files are opened, what is refused, what the fingerprint depends on."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from extract.teachers import CheckpointError, TeacherError, load_teacher
from extract.teachers.qwen_vl import QwenVLTeacher
from extract.teachers.tiny import make_tiny_teacher

INDEX = "model.safetensors.index.json"
ROOT = Path(__file__).parents[2]


def load(folder: Path | str, **options: Any) -> QwenVLTeacher:
    teacher = load_teacher("qwen2.5-vl", str(folder), **{"device": "cpu", "dtype": "float32", **options})
    assert isinstance(teacher, QwenVLTeacher)
    return teacher


@pytest.fixture
def checkpoint(micro_checkpoint: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage. The weights are a link; replace them, do not write into them."""
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    for file in micro_checkpoint.iterdir():
        if file.suffix == ".safetensors":
            (folder / file.name).symlink_to(file)
        else:
            shutil.copy(file, folder)
    return folder


def shard(folder: Path, prefix: str = "") -> dict[str, str]:
    """Split the single file into three shards with an index: block 0, the other vision tensors, the language model.

    prefix: put before `visual.` (some checkpoints say `model.visual.`). Returns the weight map.
    """
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    shards: dict[str, dict[str, torch.Tensor]] = {"a": {}, "b": {}, "c": {}}
    for name, tensor in tensors.items():
        place = "a" if ".blocks.0." in name else "b" if name.startswith("visual.") else "c"
        shards[place][prefix + name if name.startswith("visual.") else name] = tensor
    weight_map = {}
    for place, content in shards.items():
        save_file(content, folder / f"{place}.safetensors")
        weight_map |= dict.fromkeys(content, f"{place}.safetensors")
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return weight_map


def rewrite_json(file: Path, **changes: Any) -> None:
    content = json.loads(file.read_text())
    file.write_text(json.dumps(content | changes))


def test_only_files_with_vision_tensors_are_opened(checkpoint: Path, micro_checkpoint: Path) -> None:
    """Trap 2: the language model's shard may be anything, even absent."""
    shard(checkpoint)
    (checkpoint / "c.safetensors").write_bytes(b"not a safetensors file")
    damaged = load(checkpoint)
    (checkpoint / "c.safetensors").unlink()
    absent = load(checkpoint)
    assert damaged.spec == absent.spec == load(micro_checkpoint).spec
    assert not hasattr(absent.tower, "merger")


def test_shards_and_prefix_change_nothing(checkpoint: Path, micro_checkpoint: Path) -> None:
    shard(checkpoint, prefix="model.")
    images = torch.randint(0, 256, (1, 3, 56, 56), dtype=torch.uint8)
    one, many = load(micro_checkpoint), load(checkpoint)
    assert one.spec == many.spec
    assert torch.equal(one.encode(images).grid, many.encode(images).grid)


def test_the_fingerprint_follows_weights_and_architecture(checkpoint: Path, tmp_path: Path) -> None:
    before = load(checkpoint).spec.fingerprint
    shutil.copytree(checkpoint, tmp_path / "moved")
    assert load(tmp_path / "moved").spec.fingerprint == before
    assert load(checkpoint, dtype="bfloat16").spec.fingerprint == before

    config = json.loads((checkpoint / "config.json").read_text())
    config["vision_config"]["fullatt_block_indexes"] = [0]
    (checkpoint / "config.json").write_text(json.dumps(config))
    other_windows = load(checkpoint).spec.fingerprint

    tensors = load_file(tmp_path / "moved" / "model.safetensors")
    weight = tensors["visual.blocks.1.mlp.down_proj.weight"]
    weight[50, 30] = torch.nextafter(weight[50, 30], torch.tensor(9.0))
    (tmp_path / "moved" / "model.safetensors").unlink()
    save_file(tensors, tmp_path / "moved" / "model.safetensors")
    one_bit = load(tmp_path / "moved").spec.fingerprint

    merger = {name: tensor + 1 if "merger" in name else tensor for name, tensor in tensors.items()}
    save_file(merger, tmp_path / "moved" / "model.safetensors")
    assert load(tmp_path / "moved").spec.fingerprint == one_bit  # not used, not part of the teacher
    assert len({before, other_windows, one_bit}) == 3


def test_weights_stay_mapped_on_the_cpu_in_the_stored_dtype(tiny_teacher_folder: Path) -> None:
    teacher = load(tiny_teacher_folder)
    weight = teacher.tower.blocks[0].mlp.up_proj.weight.data  # type: ignore[union-attr]
    with open("/proc/self/maps") as maps:
        ranges = [line.split("-", 1) for line in maps if "model.safetensors" in line]
    starts_ends = [(int(start, 16), int(rest.split()[0], 16)) for start, rest in ranges]
    assert any(start <= weight.data_ptr() < end for start, end in starts_ends)


def damage_nothing(folder: Path) -> None: ...


def remove(*names: str) -> Any:
    return lambda folder: [(folder / name).unlink() for name in names]


def truncate(folder: Path) -> None:
    whole = (folder / "model.safetensors").resolve().read_bytes()
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").write_bytes(whole[: len(whole) // 2])


def truncate_in_header(folder: Path) -> None:
    whole = (folder / "model.safetensors").resolve().read_bytes()
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").write_bytes(whole[:100])


def replace_weights(content: bytes) -> Any:
    def write(folder: Path) -> None:
        (folder / "model.safetensors").unlink()
        (folder / "model.safetensors").write_bytes(content)

    return write


def missing_shard(folder: Path) -> None:
    shard(folder)
    (folder / "a.safetensors").unlink()


def missing_index_entries(folder: Path) -> None:
    weight_map = shard(folder)
    kept = {name: file for name, file in weight_map.items() if ".blocks.1.attn" not in name}
    (folder / INDEX).write_text(json.dumps({"weight_map": kept}))


def index_points_to_the_wrong_shard(folder: Path) -> None:
    weight_map = shard(folder)
    weight_map["visual.blocks.1.attn.qkv.bias"] = "a.safetensors"
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))


def shards_without_index(folder: Path) -> None:
    shard(folder)
    (folder / INDEX).unlink()


def index_without_map(folder: Path) -> None:
    shard(folder)
    (folder / INDEX).write_text("{}")


def only_bin_files(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"")


def change_vision(**changes: Any) -> Any:
    def change(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        config["vision_config"] |= changes
        (folder / "config.json").write_text(json.dumps(config))

    return change


DAMAGE = {
    "no config": (remove("config.json"), r"config.json is missing: is .* a checkpoint folder"),
    "broken config": (
        lambda f: (f / "config.json").write_text("{"),
        r"config.json cannot be read .*download it again",
    ),
    "config is a list": (lambda f: (f / "config.json").write_text("[]"), r"expected a JSON object, got list"),
    "another model": (
        lambda f: rewrite_json(f / "config.json", model_type="qwen2_vl"),
        r"model_type is 'qwen2_vl', expected 'qwen2_5_vl'",
    ),
    "another family": (
        lambda f: rewrite_json(f / "config.json", model_type="qwen3_vl_moe"),
        r"this is a Qwen3-VL checkpoint \(model_type 'qwen3_vl_moe'\), expected Qwen2.5-VL: use --teacher qwen3-vl",
    ),
    "no vision part": (lambda f: rewrite_json(f / "config.json", vision_config=None), r"no vision_config"),
    "another activation": (
        change_vision(hidden_act="gelu"),
        r"not a Qwen2.5-VL tower that this version can run",
    ),
    "no heads": (change_vision(num_heads=0), r"not a Qwen2.5-VL tower"),
    "text for a number": (change_vision(depth="two"), r"not a Qwen2.5-VL tower"),
    "other sizes": (
        change_vision(intermediate_size=48),
        r"has shape \[40, 64\], config.json says \[48, 64\]",
    ),
    "more blocks than weights": (
        change_vision(depth=3),
        r"lists no visual.blocks.2.norm1.weight \(12 of 37 vision",
    ),
    "no weights": (
        remove("model.safetensors"),
        r"neither model.safetensors.index.json nor model.safetensors: give",
    ),
    "bin weights": (only_bin_files, r"only .bin files: save the checkpoint as safetensors"),
    "truncated": (truncate, r"model.safetensors is truncated: got [\d,]+ bytes, its header promises [\d,]+"),
    "truncated in the header": (truncate_in_header, r"is truncated: got 100 bytes"),
    "empty file": (replace_weights(b""), r"not a readable safetensors file"),
    "text file": (
        replace_weights(b"version https://git-lfs.github.com/spec/v1"),
        r"not a readable safetensors file",
    ),
    "header is no JSON": (replace_weights(b"\x04" + b"\0" * 7 + b"abcd"), r"not a readable safetensors file"),
    "missing shard": (missing_shard, r"shard a.safetensors is missing in .*the vision tower needs it"),
    "missing index entries": (missing_index_entries, r"index.json lists no visual.blocks.1.attn.qkv.weight"),
    "wrong index": (index_points_to_the_wrong_shard, r"a.safetensors lacks visual.blocks.1.attn.qkv.bias"),
    "shards without index": (shards_without_index, r"only shards: the index file is needed"),
    "index without map": (index_without_map, r"has no weight_map"),
    "broken processor": (
        lambda f: (f / "preprocessor_config.json").write_text("no"),
        r"preprocessor_config.json cannot be read",
    ),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_checkpoint_is_one_clear_line(name: str, checkpoint: Path) -> None:
    load(checkpoint)
    damage, problem = DAMAGE[name]
    damage(checkpoint)
    with pytest.raises(CheckpointError, match=problem) as caught:
        load(checkpoint)
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 1


@pytest.mark.parametrize(
    ("path", "problem"),
    [
        ("/nowhere/at/all", "no such folder, and no hub name"),
        ("./Qwen2.5-VL-7B-Instruct", "no such folder, and no hub name"),
        (__file__, "is a file: expected the folder"),
        (
            "Qwen/Qwen2.5-VL-7B-Instruct",
            r"gave no such checkpoint .*set HF_ENDPOINT to a mirror, or run `hf download Qwen/.* --local-dir DIR`",
        ),
    ],
)
def test_a_path_that_leads_nowhere(
    path: str, problem: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # nobody listens
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(CheckpointError, match=problem):
        load(path)


@pytest.mark.parametrize(
    ("size", "problem"),
    [
        (256, r"image size 256×256: both sides must be multiples of 28, e.g. 252×252"),
        (14, "multiples of 28, e.g. 28×28"),
        (28 * 200, r"31,360,000 pixels: the checkpoint's cap is 12,845,056"),
    ],
)
def test_sizes_the_tower_does_not_take(micro_checkpoint: Path, size: int, problem: str) -> None:
    """Trap 6: multiples of 28, and a cap on pixels."""
    with pytest.raises(TeacherError, match=problem):
        load(micro_checkpoint, image_size=size)


def test_the_cap_is_the_checkpoints(checkpoint: Path) -> None:
    rewrite_json(checkpoint / "preprocessor_config.json", max_pixels=50_000)
    assert load(checkpoint, image_size=196).max_pixels == 50_000
    with pytest.raises(TeacherError, match="cap is 50,000"):
        load(checkpoint, image_size=224)
    with pytest.raises(TeacherError, match="cap is 50,000"):
        load(checkpoint, image_size=196).encode(torch.zeros(1, 3, 224, 252, dtype=torch.uint8))


def test_normalization_is_the_checkpoints(checkpoint: Path) -> None:
    rewrite_json(
        checkpoint / "preprocessor_config.json", image_mean=[0.1, 0.2, 0.3], image_std=[0.5, 0.6, 0.7]
    )
    changed = load(checkpoint).preprocessing
    assert (changed.mean, changed.std) == ((0.1, 0.2, 0.3), (0.5, 0.6, 0.7))
    (checkpoint / "preprocessor_config.json").unlink()
    assert load(checkpoint).preprocessing.mean == (0.48145466, 0.4578275, 0.40821073)


def test_the_published_config_is_understood(checkpoint: Path) -> None:
    """Keys as in the published 7B checkpoint: `in_chans`, no rope_parameters, extra keys."""
    config = json.loads((checkpoint / "config.json").read_text())
    vision = config["vision_config"]
    for name in ("in_channels", "rope_parameters", "initializer_range", "model_type"):
        vision.pop(name)
    vision |= {"in_chans": 3, "spatial_patch_size": 14, "tokens_per_second": 2}
    before = load(checkpoint).spec
    (checkpoint / "config.json").write_text(json.dumps(config))
    assert load(checkpoint).spec == before


def test_tiny_teachers_repeat_and_say_what_they_are(tiny_teacher_folder: Path, tmp_path: Path) -> None:
    again = make_tiny_teacher(tmp_path / "again")
    other = make_tiny_teacher(tmp_path / "other", depth=1, seed=5)
    specs = [load(folder).spec for folder in (tiny_teacher_folder, again, other)]
    assert specs[0] == specs[1]
    assert specs[0].fingerprint != specs[2].fingerprint
    assert all(spec.random_weights and spec.width == 1280 for spec in specs)
    assert "random weights" in (again / "random_weights.json").read_text()
    (again / "random_weights.json").unlink()
    assert not load(again).spec.random_weights


def test_a_tiny_teacher_on_a_full_disk_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fill_the_disk(folder: Path, **options: Any) -> None:
        (folder / "config.json").write_text("{}")
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("extract.teachers.qwen_transformers.save_random_checkpoint", fill_the_disk)
    with pytest.raises(TeacherError, match=r"tiny: cannot be written: I/O error: No space left on device"):
        make_tiny_teacher(tmp_path / "tiny")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("family", "changes", "problem"),
    [
        ("qwen3.5", {}, r"this is a Qwen3-VL checkpoint .*expected Qwen3.5: use --teacher qwen3-vl"),
        ("qwen2.5-vl", {}, r"this is a Qwen3-VL checkpoint .*expected Qwen2.5-VL: use --teacher qwen3-vl"),
        ("qwen3-vl", {"image_size": 224 + 16}, r"both sides must be multiples of 32, e.g. 224×224"),
        ("qwen3-vl", {"image_size": 8192}, r"67,108,864 pixels: the checkpoint's cap is 16,777,216"),
    ],
)
def test_what_a_qwen3_checkpoint_is_not(
    family: str, changes: dict[str, Any], problem: str, sharp_qwen3: Path
) -> None:
    with pytest.raises(TeacherError, match=problem):
        load_teacher(family, str(sharp_qwen3), device="cpu", **changes)


@pytest.mark.parametrize(
    "changes", [{"num_position_embeddings": 2300}, {"num_position_embeddings": 0}, {"hidden_act": "silu"}]
)
def test_a_qwen3_tower_this_version_cannot_run(
    changes: dict[str, Any], sharp_qwen3: Path, tmp_path: Path
) -> None:
    shutil.copy(sharp_qwen3 / "config.json", tmp_path)
    change_vision(**changes)(tmp_path)
    with pytest.raises(CheckpointError, match="is not a Qwen3-VL tower that this version can run"):
        load_teacher("qwen3-vl", str(tmp_path), device="cpu")


def test_tiny_teachers_overwrite_only_their_own_kind(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("keep me")
    with pytest.raises(TeacherError, match="exists and is no tiny teacher"):
        make_tiny_teacher(tmp_path)
    with pytest.raises(TeacherError, match="depth 0: expected at least 1"):
        make_tiny_teacher(tmp_path / "new", depth=0)
    with pytest.raises(
        TeacherError, match=r"unknown family 'qwen3': valid are qwen2.5-vl, qwen3-vl, qwen3.5"
    ):
        make_tiny_teacher(tmp_path / "new", family="qwen3")


@pytest.mark.slow
@pytest.mark.parametrize(("family", "width"), [("qwen3-vl", 1152), ("qwen3.5", 1152)])
def test_tiny_teachers_of_every_family(family: str, width: int, tmp_path: Path) -> None:
    folder = make_tiny_teacher(tmp_path / "tiny", depth=1, family=family)
    teacher = load_teacher(family, str(folder), device="cpu")
    assert (teacher.spec.name, teacher.spec.width, teacher.spec.random_weights) == (family, width, True)
    assert teacher.encode(torch.zeros(1, 3, 64, 96, dtype=torch.uint8)).grid.shape == (1, 4, 6, width)
