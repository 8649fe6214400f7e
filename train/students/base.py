"""What every student is: a module that returns logits and the features that are distilled.

Shape letters: `B` batch, `T` frames, `D` width, `H W` image, `h w` feature grid, `C` classes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

from torch import Tensor, nn
from torch.nn import functional

from train.errors import TrainError
from train.students.families import FAMILIES, StudentName

FeatureKind = Literal["map", "sequence", "vector"]


class StudentError(TrainError):
    """A student cannot be built, named or loaded as asked."""


class StudentOutput(NamedTuple):
    """One forward pass.

    `logits`: [B, C] for classification and clips, [B, C, H, W] for segmentation, None without a head.
    `features`: what is distilled: map [B, D, h, w], sequence [B, T, D] or vector [B, D].
    `levels`: the maps [B, D, h, w] that `Student.choose_levels` asked for, in its order.
    """

    logits: Tensor | None
    features: Tensor
    levels: tuple[Tensor, ...] = ()


@dataclass(frozen=True)
class StudentSpec:
    """Enough to build the same student again; plain types, stored in every checkpoint.

    `feature_stride` is in image pixels per feature cell (None unless `feature_kind` is "map");
    `num_classes` 0 means no head (label-free training); `distilled_layer` says in words what
    `StudentOutput.features` is.
    """

    name: str
    type: str
    size: str
    task: str
    num_classes: int
    image_size: int
    feature_width: int
    feature_kind: FeatureKind
    feature_stride: int | None
    distilled_layer: str
    options: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, name: StudentName, num_classes: int, **rest: Any) -> StudentSpec:
        """The spec of a student by name: without classes it learns features, else its family's task."""
        task = FAMILIES[name.type].task if num_classes else "features"
        return cls(str(name), name.type, name.size, task, num_classes, **rest)

    def to_dict(self) -> dict[str, Any]:
        """Plain types for a checkpoint or JSON; `rebuild_student` reads them back."""
        return asdict(self)


@dataclass(frozen=True)
class InitialWeights:
    """Where a student's first weights came from.

    `origin` is "random", "pretrained:NAME" or the path; `reinitialized` names the parameters that were
    initialized randomly although weights were given (a head of another size).
    """

    origin: str = "random"
    reinitialized: tuple[str, ...] = ()

    @property
    def is_random(self) -> bool:
        """True when nothing was loaded: LoRA on such a student teaches nothing."""
        return self.origin == "random"


class Student(nn.Module):
    """Base of all students. Sub-classes set `spec` and implement `forward`."""

    spec: StudentSpec
    initial_weights: InitialWeights = InitialWeights()
    #: Prefixes of the parameters of the task head, which may differ in size between tasks.
    head_prefixes: tuple[str, ...] = ()
    #: What `features` is called among the levels (see `train.distill.levels`).
    last_level: str = "LAST"
    #: Channels of the other maps that can be distilled, by level, coarse to fine or in the order of blocks.
    level_widths: Mapping[str, int] = MappingProxyType({})
    #: Levels that are taught too where nothing else is chosen (label-free training of decoder or neck).
    default_levels: tuple[str, ...] = ()
    #: The levels that `forward` returns.
    levels: tuple[str, ...] = ()

    def forward(self, images: Tensor, lengths: Tensor | None = None) -> StudentOutput:
        """`images` float [B, 3, H, W] (clips [B, T, 3, H, W] with `lengths` int64 [B])."""
        raise NotImplementedError

    def set_gradient_checkpointing(self, enable: bool = True) -> None:
        """Recompute activations in the backward pass to save memory."""
        raise NotImplementedError

    def choose_levels(self, levels: Sequence[str]) -> None:
        """Let `forward` return these maps; each is one of `level_widths`, or `last_level`."""
        self.levels = tuple(levels)

    def level_width(self, level: str) -> int:
        """Channels of a level."""
        return self.spec.feature_width if level == self.last_level else self.level_widths[level]

    def chosen_maps(self, features: Tensor, maps: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        """The chosen levels in their order, from `features` and the other `maps` [B, D, h, w] by level."""
        return tuple(features if level == self.last_level else level_of(maps[level]) for level in self.levels)

    def rest_levels(self) -> None:
        """Label-free training: stop training what only levels that are not chosen depend on."""

    def lora_root(self) -> nn.Module:
        """The module whose layers LoRA may adapt."""
        return self

    def parameter_count(self) -> int:
        """All parameters, trained or frozen; buffers are not counted, as in published tables."""
        return sum(parameter.numel() for parameter in self.parameters())


#: Cells a side of a level, at most: the teacher's grid is coarser, and each cell's target has the teacher's width.
LEVEL_CELLS = 32


def level_of(maps: Tensor) -> Tensor:
    """A map [B, D, h, w] as one of `StudentOutput.levels`: means over squares of cells, at most LEVEL_CELLS a side."""
    factor = 1
    while max(maps.shape[-2:]) > LEVEL_CELLS * factor:
        factor *= 2
    if factor == 1:
        return maps
    return functional.avg_pool2d(maps, factor, ceil_mode=True, count_include_pad=False)
