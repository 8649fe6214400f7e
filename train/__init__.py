"""Stage two: students learn from the stored features, without the teacher.

from train import load_student, train

summary = train(store="photos.zarr", student="resnet18", out="runs/resnet18")
model = load_student("runs/resnet18")
model(model.preprocess(image)[None])
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from train.api import train
    from train.deliver.model import load_student

__all__ = ["load_student", "train"]


def __getattr__(name: str) -> Any:
    """`from train import train, load_student`; nothing is imported before."""
    if name == "train":
        from train.api import train

        return train
    if name == "load_student":
        from train.deliver.model import load_student

        return load_student
    raise AttributeError(f"module 'train' has no attribute {name!r}")
