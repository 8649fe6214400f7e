"""Cross-entropy with label smoothing, and the mixing of targets under MixUp and CutMix."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor
from torch.nn import functional

from train.losses.precision import full_precision


class Mixing(NamedTuple):
    """How a batch was mixed: sample i shows `weight[i]` of itself and the rest of sample `partner[i]`.

    `partner` int64 [B], `weight` float [B] in [0, 1]. MixUp: the blending factor; CutMix: the area that is left.
    """

    partner: Tensor
    weight: Tensor

    def blend(self, own: Tensor, partners: Tensor) -> Tensor:
        """Per-sample losses [B] against own and partner's targets → their mixture [B]."""
        weight = self.weight.to(own.dtype)
        return weight * own + (1 - weight) * partners


def classification_losses(
    logits: Tensor, labels: Tensor, *, label_smoothing: float = 0.0, mixing: Mixing | None = None
) -> Tensor:
    """Cross-entropy of every sample: logits [B, C], labels int64 [B] → float32 [B].

    With `mixing` the losses against both labels are blended by the weights with which the images were.
    """
    with full_precision(logits):
        scores = logits.float()
        own = functional.cross_entropy(scores, labels, reduction="none", label_smoothing=label_smoothing)
        if mixing is None:
            return own
        others = functional.cross_entropy(
            scores, labels[mixing.partner], reduction="none", label_smoothing=label_smoothing
        )
        return mixing.blend(own, others)
