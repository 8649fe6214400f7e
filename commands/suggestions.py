"""Which student suits a data set's task: what `cli extract` proposes next, and what the demo trains."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Suggestion:
    """`student` is for a real training; the two `small` ones, with the options `quick`, are for the demo.

    `options`: what a training of this task must be told. `control`: whether there is anything to learn without the
    teacher. `classes`: whether an image has one class, so that features can be probed. `images`: whether a store can
    keep the images themselves.
    """

    student: str
    small: tuple[str, str]
    quick: Mapping[str, str]
    options: Mapping[str, str] = field(default_factory=dict)
    control: bool = True
    classes: bool = False
    images: bool = True


_TIMM = ("timm:resnet10t", "timm:mobilenetv3_small_050")
_TIMM_QUICK = {"image-size": "48", "learning-rate": "3e-3"}
SUGGESTIONS = {
    "classification": Suggestion("resnet18", _TIMM, _TIMM_QUICK, classes=True),
    "features": Suggestion("resnet18", _TIMM, _TIMM_QUICK, {"task": "features"}, control=False),
    "detection": Suggestion("yolov8n", ("yolov8n", "yolov8s"), {"image-size": "64"}),
    "segmentation": Suggestion("unet/small", ("unet/small", "unet/medium"), {"image-size": "64"}),
    "sequence": Suggestion(
        "lstm/small", ("lstm/small", "lstm/medium"), {"image-size": "48"}, classes=True, images=False
    ),
}


def train_command(store: str, task: str) -> str:
    """The command line that trains a student from a store whose manifest names this task."""
    suggestion = SUGGESTIONS[task]
    run = "runs/" + suggestion.student.replace("/", "-")
    words = ["cli", "train", store, "--student", suggestion.student, "--out", run]
    return shlex.join([*words, *option_words(suggestion.options)])


def option_words(options: Mapping[str, str]) -> list[str]:
    return [word for name, value in options.items() for word in (f"--{name}", value)]
