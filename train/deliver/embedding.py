"""A label-free student as it is used: images in, embeddings out.

`B` images, `D` the student's feature width, `h w` its feature grid, `T` frames.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor, nn

from train.distill.projector import Projector, channels_last_rows, pool_cells, pooled_rows
from train.students.base import Student, StudentOutput


class Embeddings(NamedTuple):
    """float [B, D] `embedding`: the mean of the features; `features`: map [B, D, h, w], sequence [B, T, D] or None.

    `aligned`: the embedding in the teacher's standardized space [B, D_teacher]; None without an alignment head.
    """

    embedding: Tensor
    features: Tensor | None
    aligned: Tensor | None

    def named(self) -> dict[str, Tensor]:
        """The outputs that there are, by the names that exported files give them."""
        values = {"embedding": self.embedding, "features": self.features, "aligned": self.aligned}
        return {name: value for name, value in values.items() if value is not None}


class LabelFreeStudent(Student):
    """A trained backbone with the alignment head of its training, which measures how close it is to the teacher.

    `of_cells`: the training aligned each cell (or frame), so a head that is not linear must see cells here too.
    """

    def __init__(self, backbone: Student, head: nn.Module | None, *, of_cells: bool) -> None:
        super().__init__()
        self.spec, self.backbone, self.head, self.of_cells = backbone.spec, backbone, head, of_cells

    def forward(self, images: Tensor, lengths: Tensor | None = None) -> StudentOutput:
        return self.backbone(images) if lengths is None else self.backbone(images, lengths)  # type: ignore[no-any-return]

    def embed(self, images: Tensor) -> Embeddings:
        """`images` float [B, 3, S, S] (clips [B, T, 3, S, S], every frame counts)."""
        features = self(images).features
        pooled = pooled_rows(features)
        aligned = None
        if self.head is not None and self.of_cells and features.ndim > 2:
            aligned = pool_cells(self.head(channels_last_rows(features)), None)
        elif self.head is not None:
            aligned = self.head(pooled)
        return Embeddings(pooled, features if features.ndim > 2 else None, aligned)


class EmbeddingsOnly(nn.Module):
    """The exported face of a label-free student: images in, the outputs of `Embeddings.named` out, in that order."""

    def __init__(self, student: LabelFreeStudent) -> None:
        super().__init__()
        self.student = student

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        return tuple(self.student.embed(images).named().values())


def label_free_student(backbone: Student, content: Mapping[str, Any]) -> LabelFreeStudent:
    """The student of a checkpoint's `content`, with the head that it holds (older ones hold none)."""
    state, config = content.get("alignment_head"), content["config"]
    if state is None:
        return LabelFreeStudent(backbone, None, of_cells=False).eval()
    head: nn.Module = nn.Identity()  # widths were equal, and nothing was aligned
    kind = str(config.get("align_head") or "linear")
    if state:
        teacher_width = list(state.values())[-1].shape[0]  # the last layer's bias
        head = Projector(backbone.spec.feature_width, teacher_width, kind)
        head.load_state_dict(dict(state))
    # A linear head gives the same for the mean as on average for the cells, and the mean is cheaper.
    return LabelFreeStudent(backbone, head, of_cells=kind != "linear").eval()
