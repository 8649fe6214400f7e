"""Alignment: a trainable map from the student's features into the teacher's space, and fixed target statistics.

`B` samples, `h w` the student's cells, `T` frames, `D` a width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from train.data.prefetch import to_device
from train.errors import TrainError
from train.students.base import Student, StudentOutput

# Deviations from the mean: beyond what any ordinary feature reaches.
OUTLIER = 30.0


class AlignmentError(TrainError):
    """Student and teacher features cannot be compared as asked."""


class Projector(nn.Module):
    """Student features → rows in the teacher's space; trained with the student, never exported.

    The map is always on the *student's* side: a trainable map of the targets could collapse to a constant.
    A linear layer over the channel axis is the 1×1 convolution of a map, so one module serves maps, sequences and
    vectors; maps are computed as that convolution (`align_rows`).
    """

    def __init__(self, student_width: int, teacher_width: int, kind: str = "linear") -> None:
        super().__init__()
        if kind not in ("linear", "mlp"):
            raise AlignmentError(f"projector {kind!r}: expected linear or mlp")
        self.kind = kind
        self.layers: nn.Module = nn.Linear(student_width, teacher_width)
        if kind == "mlp":
            self.layers = nn.Sequential(
                nn.Linear(student_width, teacher_width), nn.GELU(), nn.Linear(teacher_width, teacher_width)
            )

    def forward(self, rows: Tensor) -> Tensor:
        """Channel-last [..., D_student] → [..., D_teacher] (see `channels_last_rows`)."""
        for layer in self.layers if isinstance(self.layers, nn.Sequential) else [self.layers]:
            rows = align_rows(layer, rows) if isinstance(layer, nn.Linear) else layer(rows)
        return rows


def align_rows(layer: nn.Linear, rows: Tensor) -> Tensor:
    """`layer(rows)`; rows of a map [B, h, w, D] as a 1×1 convolution, which oneDNN runs a third faster on CPUs."""
    if rows.ndim != 4:
        aligned: Tensor = layer(rows)
        return aligned
    maps = rows.permute(0, 3, 1, 2).contiguous(memory_format=torch.channels_last)
    return functional.conv2d(maps, layer.weight[:, :, None, None], layer.bias).permute(0, 2, 3, 1)


def channels_last_rows(features: Tensor) -> Tensor:
    """A map [B, D, h, w] becomes [B, h, w, D] as the store's grids are; sequences and vectors stay."""
    return features.permute(0, 2, 3, 1) if features.ndim == 4 else features


def pooled_rows(features: Tensor, mask: Tensor | None = None) -> Tensor:
    """Features of any kind → one row a sample [B, D]: the mean over cells, or over valid frames (`mask` [B, T])."""
    if features.ndim == 4:
        return features.mean((2, 3))
    if features.ndim == 3 and mask is not None:
        weight = mask.unsqueeze(-1).to(features.dtype)
        return (features * weight).sum(1) / weight.sum(1).clamp_min(1)
    return features.mean(1) if features.ndim == 3 else features


def build_projector(
    student_width: int, teacher_width: int, *, align_feature: bool, kind: str = "linear"
) -> nn.Module:
    """The alignment head, or the identity when alignment is off.

    Raises AlignmentError when it is off and the widths differ.
    """
    if align_feature:
        return Projector(student_width, teacher_width, kind)
    if student_width != teacher_width:
        raise AlignmentError(
            f"teacher features are {teacher_width} wide, the student's {student_width}: "
            "pass --align-feature to train a map between them"
        )
    return nn.Identity()


def take_over_head(head: nn.Module, checkpoint: Mapping[str, Any]) -> None:
    """The alignment head goes on with what it learned in phase one, where it has the same form."""
    state, own = checkpoint["alignment_head"], head.state_dict()
    if {name: value.shape for name, value in state.items()} == {k: v.shape for k, v in own.items()}:
        head.load_state_dict(state)


def take_over_heads(heads: Sequence[TeacherHeads], checkpoint: Mapping[str, Any]) -> None:
    """`take_over_head` for the head of the student's features of each teacher."""
    for head, state in zip(heads, head_states(checkpoint), strict=False):
        if head.projector is not None:
            take_over_head(head.projector, {"alignment_head": state})


def head_states(checkpoint: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The states of the heads of the student's features, by teacher; empty where only levels were distilled."""
    others: Mapping[str, Any] = checkpoint.get("others") or {}
    numbers = range(len({name.partition(".")[0] for name in others}))
    parts = [f"{number}.projector." for number in numbers]
    return [
        dict(checkpoint["alignment_head"] or {}),
        *(
            {name.removeprefix(part): value for name, value in others.items() if name.startswith(part)}
            for part in parts
        ),
    ]


class TargetStandardizer(nn.Module):
    """Stored teacher features → zero mean, unit variance in every dimension, float32, without gradient.

    Qwen's features have a few huge channels that would otherwise be the whole loss. `mean` and `std` [D] are in
    true units; `scale` [D] is the store's power-of-two factor (true value = stored × scale), folded in so
    that float16 rows need one multiply and one subtract. Channels that never vary become 0. Values further than
    `OUTLIER` deviations from the mean are cut to it: a channel that the training split hardly excites has a tiny
    deviation, and one image that excites it would be the whole loss. With a `rotation` [D, D] (`train.distill.phi_s`, its
    scale included) all channels are centered, then rotated, instead of being divided by their deviations.
    """

    gain: Tensor
    shift: Tensor
    rotation: Tensor | None

    def __init__(
        self, mean: Any, std: Any, scale: Any = None, *, rotation: Any = None, epsilon: float = 1e-6
    ) -> None:
        super().__init__()
        center = torch.as_tensor(mean, dtype=torch.float32)
        spread = torch.as_tensor(std, dtype=torch.float32)
        factor = torch.ones_like(center) if scale is None else torch.as_tensor(scale, dtype=torch.float32)
        self.register_buffer("rotation", None if rotation is None else torch.as_tensor(rotation))
        if rotation is not None:
            self.register_buffer("gain", factor)
            self.register_buffer("shift", center)
            return
        varies = spread > epsilon * spread.max().clamp_min(epsilon)
        inverse = torch.where(varies, 1.0 / spread.clamp_min(1e-30), torch.zeros_like(spread))
        self.register_buffer("gain", factor * inverse)
        self.register_buffer("shift", center * inverse)

    @torch.no_grad()
    def forward(self, stored: Tensor) -> Tensor:
        """`stored` [..., D], any float type → float32 [..., D]."""
        if stored.shape[-1] != self.gain.shape[0]:
            raise AlignmentError(
                f"teacher features are {stored.shape[-1]} wide, their statistics {self.gain.shape[0]}: "
                "the store's statistics do not belong to this array"
            )
        values = (stored.float() * self.gain).sub_(self.shift)
        if self.rotation is not None:
            values = values @ self.rotation.T
        return values.clamp_(-OUTLIER, OUTLIER)


class Aligned(NamedTuple):
    """The student's features in a teacher's space, where they are asked for.

    `cells` [B, h, w, D] or [B, T, D], `pooled` [B, D]; `levels`: the student's chosen levels (`StudentOutput.levels`), as
    `cells`, each in the space of the layer that it learns.
    """

    cells: Tensor | None
    pooled: Tensor | None
    levels: tuple[Tensor, ...] = ()


class DistilledOutput(NamedTuple):
    """One forward pass: task `logits`, features aligned with the first teacher's as in `Aligned`, and with the others'."""

    logits: Tensor | None
    cells: Tensor | None
    pooled: Tensor | None
    levels: tuple[Tensor, ...] = ()
    others: tuple[Aligned, ...] = ()


class TeacherHeads(nn.Module):
    """The alignment heads into one teacher's space, and which of the student's features and maps they are for.

    `places`: of each level's head, the place of its map among those that the student returns.
    """

    def __init__(
        self,
        projector: nn.Module | None,
        *,
        cells: bool,
        pooled: bool,
        level_heads: Sequence[nn.Module] = (),
        places: Sequence[int] = (),
    ) -> None:
        super().__init__()
        self.projector, self.level_heads = projector, nn.ModuleList(level_heads)
        self.wants_cells, self.wants_pooled, self.places = cells, pooled, tuple(places)

    def forward(self, features: Tensor, maps: Sequence[Tensor], mask: Tensor | None) -> Aligned:
        """A student's features and chosen maps; `mask` bool [B, T] of clips."""
        return align(self, features, [maps[place] for place in self.places], mask)


def align(
    heads: DistilledStudent | TeacherHeads, features: Tensor, maps: Sequence[Tensor], mask: Tensor | None
) -> Aligned:
    """Map a student's features, and a map for each level's head, into a teacher's space."""
    # Without heads (a control, or an evaluation of the task alone) the student's maps are left out.
    levels = tuple(
        head(channels_last_rows(level)) for head, level in zip(heads.level_heads, maps, strict=False)
    )
    if heads.projector is None:
        return Aligned(None, None, levels)
    if not heads.wants_cells:
        # Pooling first costs h·w times less, and commutes with a linear head.
        return Aligned(None, heads.projector(pooled_rows(features, mask)), levels)
    cells = heads.projector(channels_last_rows(features))
    return Aligned(cells, pool_cells(cells, mask) if heads.wants_pooled else None, levels)


class DistilledStudent(nn.Module):
    """Student → alignment head. `projector` None: `features` are not distilled (a control, or other levels alone).

    `level_heads`: one head for each of the student's chosen levels. `others`: `TeacherHeads` of further teachers.
    """

    def __init__(
        self,
        student: Student,
        projector: nn.Module | None,
        *,
        cells: bool,
        pooled: bool,
        level_heads: Sequence[nn.Module] = (),
        others: Sequence[nn.Module] = (),
    ) -> None:
        super().__init__()
        self.student, self.projector = student, projector
        self.level_heads, self.others = nn.ModuleList(level_heads), nn.ModuleList(others)
        self.wants_cells, self.wants_pooled = cells, pooled
        # In a list, and so out of the module tree: compiling must not change the names in state dicts.
        self.compiled: list[Callable[..., StudentOutput]] = []
        self.compiled_batch, self.runs_compiled = 0, True

    def compile_student(self, batch_size: int) -> None:
        """From now on run batches of `batch_size` through torch.compile.

        Others, the short last one of an epoch, run as they are: each size would be compiled again, and a graph of
        dynamic size is slower for all.
        """
        self.compiled, self.compiled_batch = [torch.compile(self.student, dynamic=False)], batch_size

    def forward(self, images: Tensor, lengths: Tensor | None = None) -> DistilledOutput:
        """`images` float [B, 3, S, S], clips [B, T, 3, S, S] with `lengths` int64 [B]."""
        compiled = self.compiled and self.runs_compiled and len(images) == self.compiled_batch
        run = self.compiled[0] if compiled else self.student
        logits, features, maps = run(images) if lengths is None else run(images, lengths)
        mask = None if lengths is None or features.ndim != 3 else frame_mask(lengths, features)
        others = tuple(heads(features, maps, mask) for heads in self.others)
        return DistilledOutput(logits, *align(self, features, maps, mask), others)


def pool_cells(cells: Tensor, mask: Tensor | None) -> Tensor:
    """Mean over h and w [B, h, w, D], or over the valid frames [B, T, D]; [B, D]."""
    return cells.mean((1, 2)) if cells.ndim == 4 else pooled_rows(cells, mask)


def frame_mask(lengths: Tensor, features: Tensor) -> Tensor:
    """Bool [B, T] on the device of `features`, true where a frame is real."""
    mask = torch.arange(features.shape[1], device=lengths.device).unsqueeze(0) < lengths.unsqueeze(1)
    return to_device(mask, features.device)
