"""Task losses: label smoothing, mixed targets, Dice and cross-entropy without ignored pixels."""

from __future__ import annotations

from functools import partial

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from train.data.batches import Batch
from train.distill.losses import cross_entropy
from train.distill.mixing import Mixing, mix
from train.distill.projector import DistilledOutput
from train.tasks.segmentation import IGNORE_INDEX, Segmentation, dice_from_sums, dice_sums, pixel_entropy_sum


def scores(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def segmentation_loss(logits: Tensor, mask: Tensor) -> Tensor:
    """The task's loss on one batch that is the whole step."""
    count = len(mask)
    batch = Batch(np.arange(count), torch.zeros(count), np.zeros((count, 2, 3)), torch.ones(count), count)
    batch.masks = mask
    task = Segmentation(logits.shape[1])
    loss = task.loss(DistilledOutput(logits, None, None), batch, task.counts(batch), None)
    assert loss is not None
    return loss


def test_label_smoothing_by_hand() -> None:
    logits, labels = scores(4, 5), torch.tensor([0, 3, 4, 1])
    smooth = 0.9 * functional.one_hot(labels, 5) + 0.1 / 5
    expected = -(smooth * logits.log_softmax(1)).sum(1)
    torch.testing.assert_close(cross_entropy(logits, labels, label_smoothing=0.1), expected.mean())


def test_mixed_images_mix_their_losses_with_the_same_weights() -> None:
    logits, labels = scores(3, 5), torch.tensor([0, 1, 2])
    mixing = Mixing(partner=torch.tensor([2, 0, 1]), weight=torch.tensor([0.3, 1.0, 0.0]))
    soft = mixing.weight[:, None] * functional.one_hot(labels, 5)
    soft = soft + (1 - mixing.weight[:, None]) * functional.one_hot(labels[mixing.partner], 5)
    expected = -(soft * logits.log_softmax(1)).sum(1)
    weight = torch.ones(3)
    found = mix(partial(cross_entropy, logits, normalizer=1.0), labels, weight, mixing)
    torch.testing.assert_close(found, expected.sum())


def test_ignored_pixels_have_no_influence() -> None:
    logits = scores(2, 3, 4, 4).requires_grad_()
    mask = torch.randint(0, 3, (2, 4, 4), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    mask[:, 2:] = IGNORE_INDEX
    loss = segmentation_loss(logits, mask)
    loss.backward()
    assert logits.grad is not None
    assert logits.grad[:, :, 2:].abs().max() == 0
    torch.testing.assert_close(loss, segmentation_loss(logits[:, :, :2], mask[:, :2]))
    expected = functional.cross_entropy(logits, mask.long(), ignore_index=255, reduction="sum")
    torch.testing.assert_close(pixel_entropy_sum(logits, mask), expected)


def test_dice_by_hand() -> None:
    logits, mask = scores(1, 3, 2, 2), torch.tensor([[[0, 0], [1, 255]]])
    probabilities = logits.softmax(1).flatten(2)[0][:, :3]
    truth = torch.tensor([[1.0, 1, 0], [0, 0, 1]])
    dice = [
        (2 * (probabilities[c] * truth[c]).sum() + 1) / (probabilities[c].sum() + truth[c].sum() + 1)
        for c in (0, 1)
    ]
    torch.testing.assert_close(dice_from_sums(*dice_sums(logits, mask)), 1 - torch.stack(dice).mean())


def test_perfect_masks_have_almost_no_loss_and_empty_ones_none() -> None:
    mask = torch.randint(0, 3, (2, 8, 8), generator=torch.Generator().manual_seed(1))
    perfect = 30.0 * functional.one_hot(mask, 3).permute(0, 3, 1, 2).float()
    assert float(segmentation_loss(perfect, mask)) < 1e-3
    ignored = torch.full((2, 8, 8), IGNORE_INDEX)
    assert float(segmentation_loss(perfect, ignored)) == 0.0


def test_losses_are_float32_under_mixed_precision() -> None:
    mask = torch.zeros(1, 4, 4, dtype=torch.long)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert segmentation_loss(scores(1, 2, 4, 4).bfloat16(), mask).dtype == torch.float32
        assert cross_entropy(scores(2, 3).bfloat16(), torch.tensor([0, 1])).dtype == torch.float32
