"""Stages 1 to 3 of benchmarks/gpu.py: what the machine can do, what the vision tower makes of it, and whether it is right."""

from __future__ import annotations

import io
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from extract.teachers import load_teacher
from extract.teachers.vision_tower import TowerConfig, VisionTower

if TYPE_CHECKING:
    from benchmarks.gpu import Note, Settings
    from extract.teachers.qwen_vl import QwenVLTeacher

PACKAGES = ("torch", "triton", "timm", "transformers", "zarr", "numpy", "pillow", "ultralytics")
HEAD_DIM = 80  # of each of the tower's 16 attention heads


# -- timing -----------------------------------------------------------------------------------------------


def synchronize(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)


def time_calls(work: Callable[[], object], device: str, *, seconds: float, warmup: int = 2) -> float:
    """Median seconds of a call of `work`, the device included; calls are repeated for about `seconds`."""
    for _ in range(warmup):
        work()
    synchronize(device)
    times: list[float] = []
    ends = time.perf_counter() + seconds
    while len(times) < 3 or time.perf_counter() < ends:
        started = time.perf_counter()
        work()
        synchronize(device)
        times.append(time.perf_counter() - started)
    return statistics.median(times)


# -- 1. ceilings --------------------------------------------------------------------------------------------


def measure_ceilings(settings: Settings, note: Note) -> None:
    """What card, memory, disk and cores can do at best."""
    note(card=card_name(settings), versions=installed_versions(), python=platform.python_version())
    note(cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count())
    seconds = 0.1 if settings.quick else 1.0
    side = 512 if settings.quick else 8192
    dtype = torch.bfloat16 if settings.cuda else torch.float32
    left, right = (torch.randn(side, side, device=settings.device, dtype=dtype) for _ in range(2))
    product = time_calls(lambda: left @ right, settings.device, seconds=seconds)
    note(matrix_product_tflops=2 * side**3 / product / 1e12)
    note(**copy_rates(settings, seconds))
    note(fsynced_write_mb_s=write_rate(settings.work, 32 if settings.quick else 512))
    note(**decode_rate(settings, seconds))


def card_name(settings: Settings) -> str:
    return torch.cuda.get_device_name(settings.device) if settings.cuda else "cpu"


def installed_versions() -> dict[str, str]:
    found = {"cuda": str(torch.version.cuda)}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def copy_rates(settings: Settings, seconds: float) -> dict[str, float]:
    """GB/s of a copy on the device (bytes read and written) and of pinned copies both ways."""
    size = (16 if settings.quick else 1024) << 20
    source = torch.randint(0, 255, (size,), dtype=torch.uint8, device=settings.device)
    target = torch.empty_like(source)
    found = {
        "device_copy_gb_s": 2
        * size
        / time_calls(lambda: target.copy_(source), settings.device, seconds=seconds)
        / 1e9
    }
    if settings.cuda:
        host = torch.empty(size, dtype=torch.uint8, pin_memory=True)
        for name, to, start in (("to_device", target, host), ("to_host", host, source)):
            duration = time_calls(
                lambda to=to, start=start: to.copy_(start, non_blocking=True),
                settings.device,
                seconds=seconds,
            )
            found[f"pinned_{name}_gb_s"] = size / duration / 1e9
    return found


def write_rate(folder: Path, megabytes: int) -> float:
    """MB/s of one file, fsync included."""
    data = np.random.default_rng(0).bytes(1 << 20)
    path = folder / "write-rate"
    started = time.perf_counter()
    with path.open("wb") as file:
        for _ in range(megabytes):
            file.write(data)
        file.flush()
        os.fsync(file.fileno())
    seconds = time.perf_counter() - started
    path.unlink()
    return megabytes * (1 << 20) / 1e6 / seconds


def decode_rate(settings: Settings, seconds: float) -> dict[str, float]:
    """640×480 JPEG files to 224 px on one core, as the decoders do it."""
    from extract.decode.sample import Encoding, decode_samples
    from extract.sources.detect import open_source

    folder = settings.work / "decode-rate"
    write_photos(folder, 16)
    samples = open_source(folder, val_fraction=0).splits["train"][:]
    pixels = np.zeros((len(samples), 1, 3, 224, 224), np.uint8)
    encoding = Encoding(image_size=224, resize="squash")
    duration = time_calls(lambda: decode_samples(encoding, samples, pixels), "cpu", seconds=seconds)
    return {"decoded_per_second_and_core": len(samples) / duration}


def write_photos(folder: Path, count: int, *, distinct: int = 48, size: tuple[int, int] = (640, 480)) -> None:
    """JPEG files with the spectrum of photographs; beyond `distinct` pictures the files differ in trailing bytes only."""
    folder.mkdir(parents=True)
    pictures = [photo(number, size) for number in range(min(count, distinct))]
    for number in range(count):
        data = pictures[number % len(pictures)]
        # Decoders stop at the end marker; the bytes after it make each file another content.
        (folder / f"{number:06d}.jpg").write_bytes(data + number.to_bytes(4, "little"))


def photo(seed: int, size: tuple[int, int]) -> bytes:
    """A JPEG of noise whose spectrum falls with the frequency as that of photographs does."""
    width, height = size
    generator = np.random.default_rng(seed)
    rows, columns = np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None]
    falloff = 1 / np.maximum(np.hypot(rows, columns), 1 / max(size)) ** 1.4
    planes = []
    for _ in range(3):
        phases = generator.uniform(0, 2 * np.pi, falloff.shape)
        plane = np.fft.irfft2(falloff * np.exp(1j * phases), s=(height, width))
        planes.append((plane - plane.mean()) / plane.std())
    mixed = np.stack(planes, -1) @ np.array([[0.9, 0.3, 0.3], [0.8, 0.6, 0.1], [0.8, 0.2, 0.6]]).T
    pixels = np.clip(128 + 45 * mixed, 0, 255).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


# -- a checkpoint of the published shape ------------------------------------------------------------------


def make_checkpoint(settings: Settings) -> Path:
    """A Qwen2.5-VL checkpoint folder with random weights of realistic scale; 32 blocks (2 in a quick run).

    It holds the vision tower alone, in bfloat16: that is all that `load_teacher` reads. Outputs of a block are of the
    size of its inputs, and some channels are far larger than the others, as in the published weights.
    """
    from safetensors.torch import save_file

    from extract.teachers.qwen_config import RANDOM_WEIGHTS_FILE

    depth = 2 if settings.quick else 32
    folder = settings.work / f"tower-{depth}"
    if (folder / "model.safetensors").exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    full = [1] if settings.quick else [7, 15, 23, 31]
    config = TowerConfig(depth=depth, fullatt_block_indexes=tuple(full))
    with torch.device("meta"):
        shapes = {name: value.shape for name, value in VisionTower(config).state_dict().items()}
    generator = torch.Generator(settings.device).manual_seed(0)
    tensors = {
        f"visual.{name}": random_weight(name, shape, generator).to(torch.bfloat16).cpu()
        for name, shape in shapes.items()
    }
    vision = {
        "depth": depth,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_heads": config.num_heads,
        "fullatt_block_indexes": full,
    }
    (folder / "config.json").write_text(json.dumps({"model_type": "qwen2_5_vl", "vision_config": vision}))
    (folder / RANDOM_WEIGHTS_FILE).write_text(json.dumps({"random_weights": True, "seed": 0, "depth": depth}))
    save_file(tensors, folder / "partial.safetensors")
    (folder / "partial.safetensors").rename(folder / "model.safetensors")
    return folder


def random_weight(name: str, shape: torch.Size, generator: torch.Generator) -> Tensor:
    """Norm weights near 1, biases small, matrices that keep the size of their input."""
    noise = torch.randn(shape, generator=generator, device=generator.device)
    if "norm" in name:
        return 1 + 0.1 * noise
    if name.endswith("bias"):
        return 0.02 * noise
    weight = noise / noise[0].numel() ** 0.5
    if name.startswith("patch_embed"):
        weight[:4] *= 30  # channels that are far larger than the others
    return weight


def open_tower(settings: Settings, size: int, dtype: str, **options: Any) -> QwenVLTeacher:
    teacher: Any = load_teacher(
        "qwen2.5-vl",
        str(make_checkpoint(settings)),
        device=options.pop("device", settings.device),
        dtype=dtype,
        image_size=size,
        **options,
    )
    return teacher  # type: ignore[no-any-return]


# -- 2. tower -----------------------------------------------------------------------------------------------


def measure_tower(settings: Settings, note: Note) -> None:
    """Images a second of the tower alone, and what compilation, padding and the attention kernels change."""
    note(**attention_kernels(settings))
    sizes = ((56, 2), (112, 1)) if settings.quick else ((224, 256), (448, 64))
    shown = (224, 448)
    variants = ((False, False), (False, True), (True, False), (True, True))
    for compiled, padded in variants[-1:] if settings.brief else variants:
        label = f"{'compiled' if compiled else 'eager'}{'_padded' if padded else ''}"
        teacher = open_tower(
            settings, sizes[0][0], "auto", compile_tower=compiled and settings.cuda, pad_mlp=padded
        )
        for (size, batch), name in zip(sizes, shown, strict=True):
            started = time.perf_counter()
            rate = tower_rate(teacher, settings, size, batch, note if compiled and padded else None)
            note(**{f"{label}_{name}": rate, f"{label}_{name}_s": time.perf_counter() - started})
            if compiled and padded:
                note(**{f"images_per_second_{name}": rate})
        del teacher


def tower_rate(teacher: QwenVLTeacher, settings: Settings, size: int, batch: int, note: Note | None) -> float:
    """Images a second of `encode` on uint8 images that are on the device already."""
    images = torch.randint(0, 256, (batch, 3, size, size), dtype=torch.uint8, device=settings.device)
    if settings.cuda:
        torch.cuda.reset_peak_memory_stats()
    seconds = time_calls(
        lambda: teacher.encode(images), settings.device, seconds=0.2 if settings.quick else 2.0
    )
    if note is not None and settings.cuda:
        note(**{f"peak_gb_{size}": torch.cuda.max_memory_allocated() / 1e9})
        note(**{f"tflops_{size}": tower_flops(teacher, size) * batch / seconds / 1e12})
    return batch / seconds


def tower_flops(teacher: QwenVLTeacher, size: int) -> float:
    """Floating-point operations of one image: twice the multiply-adds of the matrix products and of attention."""
    config = teacher.tower.config
    tokens = (size // config.patch_size) ** 2
    width, window = config.hidden_size, config.window_patches**2
    matrices = (
        config.depth * (4 * width**2 + 3 * width * config.intermediate_size) + config.patch_values * width
    )
    full = len(config.fullatt_block_indexes)
    attention = 2 * width * (full * tokens + (config.depth - full) * min(window, tokens))
    return 2.0 * tokens * (matrices + attention)


def attention_kernels(settings: Settings) -> dict[str, Any]:
    """Milliseconds of one attention call of a batch of 65,536 tokens, by kernel and window length."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    if not settings.cuda:
        return {}
    backends = {
        "flash": SDPBackend.FLASH_ATTENTION,
        "efficient": SDPBackend.EFFICIENT_ATTENTION,
        "cudnn": SDPBackend.CUDNN_ATTENTION,
    }
    found: dict[str, Any] = {}
    for length in (64, 256, 1024):
        shape = (65536 // length, length, 16, HEAD_DIM)
        q, k, v = (
            torch.randn(shape, device=settings.device, dtype=torch.bfloat16).transpose(1, 2) for _ in range(3)
        )
        for name, backend in backends.items():
            try:
                with sdpa_kernel(backend):
                    seconds = time_calls(
                        lambda q=q, k=k, v=v: torch.nn.functional.scaled_dot_product_attention(q, k, v),
                        settings.device,
                        seconds=0.1,
                    )
                found[f"attention_{name}_{length}_ms"] = 1e3 * seconds
            except RuntimeError as error:
                found[f"attention_{name}_{length}_ms"] = str(error).splitlines()[0][:80]
    return found


# -- 3. correctness -----------------------------------------------------------------------------------------


def check_correctness(settings: Settings, note: Note) -> None:
    """The same images through different devices, dtypes, batch sizes and transformers' own code."""
    size, few, many = (56, 1, 4) if settings.quick else (224, 2, 256)
    images = photo_pixels(many, size)
    with exact_float32():
        exact = open_tower(settings, size, "float32", compile_tower=False)
        reference = exact.encode(images[:few]).grid
        host = open_tower(settings, size, "float32", device="cpu").encode(images[:few]).grid
        note(float32_relative=relative(reference.cpu(), host))
        del host
        ours, theirs = transformers_grids(exact, images[:few], settings)
        note(transformers_relative=relative(ours, theirs))
        some = min(32, many)
        truth = torch.cat([exact.encode(images[i : i + 4]).grid for i in range(0, some, 4)])
    del exact
    teacher = open_tower(settings, size, "bfloat16")
    full = teacher.encode(images).grid[:some]
    note(
        bfloat16_cosine_p1=token_cosine(full, truth, 0.01),
        bfloat16_cosine_median=token_cosine(full, truth, 0.5),
    )
    single = torch.cat([teacher.encode(images[index : index + 1]).grid for index in range(min(8, some))])
    note(batch_cosine_p1=token_cosine(single, full[: len(single)], 0.01))
    note(batch_relative=relative(single, full[: len(single)]))


@contextmanager
def exact_float32() -> Iterator[None]:
    """Products in full float32, not in TF32."""
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False  # transformers' patch embedding is a convolution
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]


def photo_pixels(count: int, size: int) -> Tensor:
    """uint8 [count, 3, size, size], cut from a few pictures."""
    pictures = [np.asarray(Image.open(io.BytesIO(photo(seed, (640, 480))))) for seed in range(min(count, 16))]
    generator = np.random.default_rng(0)
    crops = []
    for index in range(count):
        picture = pictures[index % len(pictures)]
        top, left = generator.integers(480 - size + 1), generator.integers(640 - size + 1)
        crops.append(picture[top : top + size, left : left + size])
    return torch.from_numpy(np.stack(crops)).permute(0, 3, 1, 2).contiguous()


def relative(values: Tensor, reference: Tensor) -> float:
    """‖values − reference‖ / ‖reference‖."""
    reference = reference.double()
    return float((values.double() - reference).norm() / reference.norm())


def token_cosine(grid: Tensor, reference: Tensor, quantile: float) -> float:
    """A quantile of the cosine per token, on features standardized per channel by the reference's statistics."""
    values, truth = (part.flatten(0, 2).double() for part in (grid, reference))
    mean, std = truth.mean(0), truth.std(0).clamp_min(1e-12)
    cosine = torch.nn.functional.cosine_similarity((values - mean) / std, (truth - mean) / std, dim=-1)
    return float(cosine.quantile(quantile))


def transformers_grids(teacher: QwenVLTeacher, images: Tensor, settings: Settings) -> tuple[Tensor, Tensor]:
    """Our grid and that of transformers' own tower with the same weights, both [B, h, w, D] in raster order."""
    from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLVisionConfig
    from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VisionTransformerPretrainedModel

    from benchmarks.teacher import reference_inputs
    from extract.teachers.checkpoint import find_tensors, load_tensors

    config = teacher.tower.config
    folder = make_checkpoint(settings)
    names = ("depth", "hidden_size", "intermediate_size", "num_heads")
    published = Qwen2_5_VLVisionConfig(
        **{name: getattr(config, name) for name in names},
        fullatt_block_indexes=list(config.fullatt_block_indexes),
        out_hidden_size=64,
    )
    with torch.device(settings.device):
        tower = Qwen2_5_VisionTransformerPretrainedModel._from_config(published, attn_implementation="sdpa")
    with torch.device("meta"):
        shapes = {name: tuple(value.shape) for name, value in VisionTower(config).state_dict().items()}
    entries = find_tensors(folder, ("visual.",), shapes, "Qwen2.5-VL")
    state = load_tensors(entries, torch.device(settings.device), torch.float32)
    absent, unknown = tower.load_state_dict(state, strict=False)
    if unknown or any(not name.startswith("merger.") for name in absent):
        raise AssertionError(f"transformers' tower has other weights: {unknown or absent}")
    tower = tower.float().eval().requires_grad_(False)
    patches, sizes = reference_inputs(teacher, images.to(settings.device))
    with torch.inference_mode():
        out = tower(patches, grid_thw=sizes.to(settings.device))
    hidden = out if isinstance(out, Tensor) else out.last_hidden_state
    h, w = images.shape[2] // 14, images.shape[3] // 14
    order = torch.tensor([row * w + column for row, column in published_order(h, w)])
    grid = torch.empty(len(images), h * w, config.hidden_size, device=hidden.device)
    grid[:, order.to(hidden.device)] = hidden.view(len(images), h * w, -1)
    return teacher.encode(images).grid, grid.view(len(images), h, w, -1)


def published_order(h: int, w: int) -> list[tuple[int, int]]:
    """(row, column) of each patch in transformers' order: windows of 8×8, in them blocks of 2×2, each row by row."""
    return [
        (block_row + i, block_column + j)
        for window_row in range(0, h, 8)
        for window_column in range(0, w, 8)
        for block_row in range(window_row, min(window_row + 8, h), 2)
        for block_column in range(window_column, min(window_column + 8, w), 2)
        for i in (0, 1)
        for j in (0, 1)
    ]
