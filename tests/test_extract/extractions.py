"""Extractions for tests: run, interrupted, and what they left."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from extract.config import load_config
from extract.decode.sample import Encoding, decode_sample
from extract.run import ExtractResult, run_extraction
from extract.sources.base import Sample
from extract.teachers.tiny import TINY_TEXT, tiny_vision
from imaging.decode import ImageError
from processes.stop import Stopped, StopRequest
from store.reader import Store

QWEN_VOCABULARY = 151_936


def extract(options: dict[str, Any], **changes: Any) -> ExtractResult:
    return run_extraction(load_config({**options, **changes}))


class Preprocessed(NamedTuple):
    """What a decoding process makes of an image: pixels uint8 [3, S, S], size (width, height) of the original."""

    pixels: np.ndarray
    size: tuple[int, int]


def preprocess(data: bytes | Path, image_size: int, resize: str = "squash", **options: Any) -> Preprocessed:
    """Decode one image as an extraction does. options: of `Encoding`. Raises ImageError for a bad one."""
    encoding = Encoding(image_size=image_size, resize=resize, **options)  # type: ignore[arg-type]
    planes = np.empty((1, 3, image_size, image_size), np.uint8)
    result = decode_sample(encoding, Sample("image", data), planes)
    if result.reason is not None:
        raise ImageError(result.reason)
    return Preprocessed(planes[0], result.size)


def true_features(store: Store, split: str, name: str = "features/pooled") -> np.ndarray:
    """All rows of an array in true units."""
    part = store[split]
    return part.gather(np.arange(len(part)), [name])[name].astype(np.float32) * part.scale[name]


def files_of(folder: Path) -> dict[str, bytes]:
    """Every file of a store but the extractor's own notes (times of files, locks)."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and ".extract" not in path.parts
    }


class StopAfter:
    """An observer that asks for a stop once `rows` rows are encoded, as Ctrl-C would."""

    def __init__(self, stop: StopRequest, rows: int) -> None:
        self.stop, self.rows = stop, rows

    def progress(self, done: int, total: int, message: str) -> None:
        if done >= self.rows:
            self.stop.set()


def interrupt(options: dict[str, Any], rows: int) -> Stopped:
    stop = StopRequest()
    with pytest.raises(Stopped) as stopped:
        run_extraction(load_config(options), [StopAfter(stop, rows)], stop)
    return stopped.value


def make_tiny_model(folder: str | Path, tokenizer: str | Path, *, depth: int = 1, seed: int = 0) -> Path:
    """A whole small Qwen2.5-VL with random weights, for zero-shot logits: two-layer language model, real vocabulary.

    tokenizer: a folder with Qwen's `tokenizer.json` and `tokenizer_config.json`, which are copied.
    """
    from extract.teachers.qwen_transformers import save_random_checkpoint

    target = Path(folder)
    text = {**TINY_TEXT, "num_hidden_layers": 2, "vocab_size": QWEN_VOCABULARY, "initializer_range": 0.1}
    save_random_checkpoint(target, vision=tiny_vision(depth), text=text, seed=seed, tie_word_embeddings=True)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(Path(tokenizer) / name, target)
    return target
