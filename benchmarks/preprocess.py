"""The host's half of preprocessing against decoding + the Hugging Face Qwen2-VL image processor; and its fidelity.

    python benchmarks/preprocess.py [--quick] [--json] [--rounds 9]

One process, one torch thread, CPU time per image, medians of interleaved rounds. Files: JPEG at quality 90 of 640×480
and 2000×1500 pixels: photographs that were taken at that size or larger, collages of twelve small photos (as much detail
as the sharpest photographs have), enlarged small photos (as little as a soft one). Baselines: the processor told to make
224×224 pixels of every image, and as it is shipped (which keeps up to a million pixels); its torchvision and its Pillow
variant.
`floor` is what libjpeg alone takes to read the file at 1/8 size: no decoder of that family can be faster. `just above
the target` decodes as small as the target allows: as fast as can be, but for detailed files below the fidelity aimed at.

Fidelity: per token of the pretrained 1280-wide teacher's grid, features standardized per channel, 1st percentile of the
cosine with the exact pixels' features; a mirrored image is the negative that must fail.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
from PIL import Image, ImageOps

from commands.assets import pretrained_teacher_weights
from extract.decode.sample import Encoding, decode_sample, resize_pixels
from extract.sources.base import Sample
from imaging.decode import decode
from tests.assets import asset

SIZE = 224
LARGE = (2000, 1500)
BOUNDS = {"640×480": 0.5, "2000×1500 photos": 0.25, "2000×1500 collage": 0.25, "2000×1500 enlarged": 0.25}

torch.set_num_threads(1)


def jpeg(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def make_files(quick: bool) -> dict[str, list[bytes]]:
    photos = [Image.open(file).convert("RGB") for file in sorted(asset("foolbox").rglob("*.jpg"))]
    generator = np.random.default_rng(0)

    def collage() -> Image.Image:
        canvas = Image.new("RGB", LARGE)
        for place, number in enumerate(generator.permutation(len(photos))[:12]):
            tile = photos[number].resize((500, 500), Image.Resampling.LANCZOS)
            canvas.paste(tile, (place % 4 * 500, place // 4 * 500))
        return canvas

    few = 3 if quick else 12
    return {
        "640×480": [
            jpeg(p.resize((640, 480), Image.Resampling.LANCZOS)) for p in photos[: 4 if quick else None]
        ],
        "2000×1500 photos": [jpeg(photo) for photo in large_photos()[:few]],
        "2000×1500 collage": [jpeg(collage()) for _ in range(few)],
        "2000×1500 enlarged": [jpeg(p.resize(LARGE, Image.Resampling.BICUBIC)) for p in photos[:few]],
    }


def large_photos() -> list[Image.Image]:
    """Photographs cut to 4:3 and made 2000×1500; none is enlarged."""
    photos = [Image.open(file).convert("RGB") for file in sorted(asset("large-photos").rglob("*.jpg"))]
    return [
        ImageOps.fit(photo, LARGE, Image.Resampling.LANCZOS)
        for photo in photos
        if photo.width >= LARGE[0] and photo.height >= LARGE[1]
    ]


def preprocess(data: bytes, exact: bool = False) -> np.ndarray:
    """uint8 [3, S, S] of one file, as a decoding process makes them."""
    planes = np.empty((1, 3, SIZE, SIZE), np.uint8)
    encoding = Encoding(image_size=SIZE, resize="squash", exact=exact)
    assert decode_sample(encoding, Sample("", data), planes).reason is None
    return planes[0]


def contestants() -> dict[str, Callable[[bytes], object]]:
    from transformers.models.qwen2_vl import Qwen2VLImageProcessor

    try:
        from transformers.models.qwen2_vl import Qwen2VLImageProcessorPil
    except ImportError:  # before transformers 5
        Qwen2VLImageProcessorPil = None

    def read(data: bytes) -> Image.Image:
        image = Image.open(io.BytesIO(data))
        image.load()
        return image

    def eighth(data: bytes) -> Image.Image:
        image = Image.open(io.BytesIO(data))
        image.draft("RGB", (image.width // 8, image.height // 8))
        image.load()
        return image

    size = {"shortest_edge": SIZE * SIZE, "longest_edge": SIZE * SIZE}
    small, stock = Qwen2VLImageProcessor(size=size), Qwen2VLImageProcessor()
    table: dict[str, Callable[[bytes], object]] = {
        "ours, fast": preprocess,
        "ours, exact": lambda data: preprocess(data, exact=True),
        "just above the target": lambda data: resize_pixels(decode(data, target_size=SIZE), SIZE),
        "HF to 224": lambda data: small(images=read(data), return_tensors="pt"),
        "HF as shipped": lambda data: stock(images=read(data), return_tensors="pt"),
        "decode alone": read,
        "floor": eighth,
    }
    if Qwen2VLImageProcessorPil is not None:
        pillow = Qwen2VLImageProcessorPil(size=size)
        table["HF (Pillow) to 224"] = lambda data: pillow(images=read(data), return_tensors="pt")
    return table


def measure_speed(files: dict[str, list[bytes]], rounds: int) -> dict[str, dict[str, float]]:
    """Milliseconds of CPU per image."""
    table = contestants()
    generator = np.random.default_rng(0)
    times: dict[str, dict[str, list[float]]] = {kind: {name: [] for name in table} for kind in files}
    for number in range(rounds + 1):
        for kind, members in files.items():
            # Another order each round: what ran before leaves caches and memory in one state or another.
            for name in generator.permutation(list(table)).tolist():
                run = table[name]
                start = time.process_time()
                for data in members:
                    run(data)
                if number > 0:  # the first round warms up
                    times[kind][name].append((time.process_time() - start) / len(members) * 1e3)
    return {kind: {name: statistics.median(t) for name, t in row.items()} for kind, row in times.items()}


def load_tokens() -> Callable[[list[np.ndarray]], np.ndarray]:
    """float32 [B · h · w, 1280] of uint8 [3, S, S] images."""
    import timm

    model = timm.create_model("tf_efficientnet_lite2")
    weights = torch.load(pretrained_teacher_weights(), weights_only=True)
    model.load_state_dict(dict(zip(model.state_dict(), weights.values(), strict=True)))
    model.eval()

    @torch.no_grad()
    def tokens(pixels: list[np.ndarray]) -> np.ndarray:
        batch = torch.from_numpy(np.stack(pixels)).float() / 127.5 - 1
        result: np.ndarray = model.forward_features(batch).permute(0, 2, 3, 1).reshape(-1, 1280).numpy()
        return result

    return tokens


def measure_fidelity(files: dict[str, list[bytes]]) -> dict[str, dict[str, float]]:
    tokens = load_tokens()
    exact = {kind: [preprocess(d, exact=True) for d in members] for kind, members in files.items()}
    references = {kind: tokens(pixels) for kind, pixels in exact.items()}
    everything = np.concatenate(list(references.values()))
    mean, std = everything.mean(axis=0), everything.std(axis=0) + 1e-6

    def percentile(kind: str, pixels: list[np.ndarray]) -> float:
        a, b = (references[kind] - mean) / std, (tokens(pixels) - mean) / std
        cosine = (a * b).sum(axis=1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
        return float(np.percentile(cosine, 1))

    return {
        kind: {
            "fast": percentile(kind, [preprocess(data) for data in members]),
            "just above the target": percentile(
                kind, [resize_pixels(decode(data, target_size=SIZE), SIZE) for data in members]
            ),
            "mirrored (must fail)": percentile(
                kind, [np.ascontiguousarray(p[:, :, ::-1]) for p in exact[kind]]
            ),
        }
        for kind, members in files.items()
    }


def ratios(speed: dict[str, dict[str, float]]) -> dict[str, dict[str, float]]:
    baselines = [name for name in next(iter(speed.values())) if name.startswith("HF")]
    return {
        kind: {
            f"{label} / {name}": row[ours] / row[name]
            for label, ours in (
                ("fast", "ours, fast"),
                ("just above", "just above the target"),
                ("floor", "floor"),
            )
            for name in baselines
        }
        | {"bound": BOUNDS[kind]}
        for kind, row in speed.items()
    }


def print_rows(title: str, rows: dict[str, dict[str, float]], digits: int) -> None:
    print(f"\n{title}")
    columns = list(next(iter(rows.values())))
    width = max(map(len, columns)) + 2
    for name in columns:
        print(f"  {name:{width}s}" + "".join(f"{row[name]:20.{digits}f}" for row in rows.values()))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="few files, three rounds")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    files = make_files(options.quick)
    speed = measure_speed(files, 3 if options.quick else options.rounds)
    result: dict[str, Any] = {
        "kilobytes": {kind: statistics.mean(map(len, members)) / 1e3 for kind, members in files.items()},
        "milliseconds": speed,
        "ratios": ratios(speed),
        "fidelity": measure_fidelity(files),
    }
    if options.json:
        print(json.dumps(result, ensure_ascii=False))
        return
    print(" " * 24 + "".join(f"{kind:>20s}" for kind in files))
    print_rows("CPU milliseconds per image, one core", result["milliseconds"], 2)
    print_rows("Ratio", result["ratios"], 3)
    print_rows("1st percentile of the cosine per token", result["fidelity"], 4)


if __name__ == "__main__":
    main()
