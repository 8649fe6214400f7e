"""Logits as probabilities and named classes."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from train.deliver.draw import Label
from train.deliver.model import ModelCard, class_name

TOP = 5


def softmax(logits: NDArray[np.float32], axis: int = -1) -> NDArray[np.float32]:
    """Probabilities along `axis`."""
    shifted = np.exp(logits - logits.max(axis=axis, keepdims=True))
    return np.asarray(shifted / shifted.sum(axis=axis, keepdims=True), dtype=np.float32)


def top_classes(card: ModelCard, logits: NDArray[np.float32]) -> list[dict[str, Any]]:
    """The most probable classes of logits [C], best first."""
    probabilities = softmax(logits)
    order = np.argsort(-probabilities, kind="stable")[:TOP]
    return [
        {
            "class": class_name(card, int(index)),
            "index": int(index),
            "probability": float(probabilities[index]),
        }
        for index in order
    ]


def top_label(top: list[dict[str, Any]]) -> Label:
    """The most probable class, to be drawn."""
    return Label(top[0]["class"], top[0]["index"], f"{top[0]['probability']:.0%}")
