"""Alignment on the student's side, standardised targets."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from train.distill.losses import feature_loss
from train.distill.projector import (
    AlignmentError,
    Projector,
    TargetStandardizer,
    build_projector,
    channels_last_rows,
    pooled_rows,
)


@pytest.mark.parametrize("kind", ["linear", "mlp"])
@pytest.mark.parametrize("shape", [(2, 8, 3, 4), (2, 5, 8), (2, 8)])
def test_every_kind_of_feature_is_aligned(kind: str, shape: tuple[int, ...]) -> None:
    rows = channels_last_rows(torch.randn(*shape))
    aligned = Projector(8, 16, kind)(rows)
    assert aligned.shape == (*rows.shape[:-1], 16)


def test_on_maps_it_is_a_1x1_convolution() -> None:
    projector = Projector(8, 16)
    convolution = nn.Conv2d(8, 16, 1)
    linear = projector.layers
    assert isinstance(linear, nn.Linear)
    convolution.weight.data = linear.weight.data[:, :, None, None]
    convolution.bias = linear.bias
    maps = torch.randn(2, 8, 3, 4)
    torch.testing.assert_close(projector(channels_last_rows(maps)), convolution(maps).permute(0, 2, 3, 1))


def test_gradients_reach_student_and_projector_but_not_the_target() -> None:
    projector = Projector(4, 6)
    features, target = torch.randn(3, 4, requires_grad=True), torch.randn(3, 6, requires_grad=True)
    feature_loss("mse", projector(features), target).backward()
    assert features.grad is not None
    assert all(p.grad is not None for p in projector.parameters())
    assert target.grad is None


def test_alignment_off_needs_equal_widths() -> None:
    assert isinstance(build_projector(8, 8, align_feature=False), nn.Identity)
    with pytest.raises(AlignmentError, match=r"1280 wide, the student's 512.*--align-feature"):
        build_projector(512, 1280, align_feature=False)
    with pytest.raises(AlignmentError, match="'cubic': expected linear or mlp"):
        Projector(4, 4, "cubic")


def test_pooling_of_every_kind() -> None:
    maps, sequence = torch.randn(2, 4, 3, 3), torch.randn(2, 5, 4)
    torch.testing.assert_close(pooled_rows(maps), maps.mean((2, 3)))
    mask = torch.tensor([[True] * 5, [True, True, False, False, False]])
    torch.testing.assert_close(pooled_rows(sequence, mask)[1], sequence[1, :2].mean(0))
    torch.testing.assert_close(pooled_rows(maps[:, :, 0, 0]), maps[:, :, 0, 0])


def test_standardised_targets_have_mean_0_and_deviation_1() -> None:
    generator = np.random.default_rng(0)
    true = generator.normal(size=(500, 6)) * [1, 1000, 1e-3, 1, 1, 5] + [0, 5000, 0, 1, 2, 3]
    scale = np.array([1, 16, 2.0**-10, 1, 1, 1])
    stored = torch.from_numpy((true / scale).astype(np.float16))
    standardise = TargetStandardizer(true.mean(0), true.std(0), scale)
    targets = standardise(stored)
    assert targets.dtype == torch.float32
    torch.testing.assert_close(targets.mean(0), torch.zeros(6), atol=0.02, rtol=0)
    torch.testing.assert_close(targets.std(0), torch.ones(6), atol=0.02, rtol=0)


def test_channels_that_never_vary_become_zero() -> None:
    standardise = TargetStandardizer([3.0, 1.0], [0.0, 2.0])
    assert standardise(torch.tensor([[3.0, 5.0], [4.0, 1.0]])).tolist() == [[0.0, 2.0], [0.0, 0.0]]


def test_a_channel_that_training_hardly_excites_does_not_own_the_loss_of_other_images() -> None:
    standardise = TargetStandardizer([0.0, 0.0], [1.0, 1e-3])
    rows = torch.tensor([[29.0, 0.029], [0.0, 5.0], [0.0, -5.0], [torch.nan, torch.nan]])
    expected = torch.tensor([[29.0, 29.0], [0.0, 30.0], [0.0, -30.0], [torch.nan, torch.nan]])
    torch.testing.assert_close(standardise(rows), expected, equal_nan=True)


def test_statistics_of_another_array_are_refused() -> None:
    with pytest.raises(AlignmentError, match="1280 wide, their statistics 2"):
        TargetStandardizer([0.0, 0.0], [1.0, 1.0])(torch.zeros(1, 1280))


def test_standardiser_is_saved_but_never_trained() -> None:
    standardise = TargetStandardizer([0.0], [1.0])
    assert set(standardise.state_dict()) == {"gain", "shift"}
    assert list(standardise.parameters()) == []
    assert not standardise(torch.ones(1, 1, requires_grad=True)).requires_grad


def test_huge_channels_do_not_own_the_standardised_loss() -> None:
    """Without standardisation one channel of deviation 1000 is the whole loss; with it, each has its share."""
    spread = torch.tensor([1000.0, 1, 1, 1])
    target = torch.randn(256, 4) * spread
    standardised = TargetStandardizer(torch.zeros(4), spread)(target)
    raw_share = target[:, 0].square().sum() / target.square().sum()
    share = standardised[:, 0].square().sum() / standardised.square().sum()
    assert raw_share > 0.999
    assert share == pytest.approx(0.25, abs=0.05)
