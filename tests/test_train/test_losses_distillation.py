"""Every distillation loss against a computation by hand; where gradients flow; what must not matter."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from train.distill import losses
from train.distill.losses import feature_loss, logit_loss, relational_loss, weighted_mean

KINDS = ("mse", "cosine", "smooth_l1")


def rows(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float32)


def by_hand(kind: str, student: np.ndarray, target: np.ndarray) -> np.ndarray:
    if kind == "mse":
        return ((student - target) ** 2).mean(-1)
    if kind == "cosine":
        norms = np.linalg.norm(student, axis=-1) * np.linalg.norm(target, axis=-1)
        return 1 - (student * target).sum(-1) / norms
    gap = np.abs(student - target)
    return np.where(gap < 1, 0.5 * gap**2, gap - 0.5).mean(-1)


@pytest.mark.parametrize("kind", KINDS)
def test_feature_loss_equals_numpy(kind: str) -> None:
    student, target, weight = rows(4, 3, 3, 7), rows(4, 3, 3, 7, seed=1), rows(4, 3, 3, seed=2).abs()
    distances = by_hand(kind, student.double().numpy(), target.double().numpy())
    assert float(feature_loss(kind, student, target)) == pytest.approx(distances.mean(), rel=1e-5)
    expected = (distances * weight.numpy()).sum() / weight.numpy().sum()
    assert float(feature_loss(kind, student, target, weight)) == pytest.approx(expected, rel=1e-5)


def by_autograd(kind: str, student: Tensor, target: Tensor) -> Tensor:
    if kind == "mse":
        return (student - target).square().mean(-1)
    if kind == "cosine":
        return 1 - functional.cosine_similarity(student, target, dim=-1)
    return functional.smooth_l1_loss(student, target, reduction="none").mean(-1)


@pytest.mark.parametrize("rows_at_once", [1, 3, 100])
@pytest.mark.parametrize("kind", KINDS)
def test_gradient_of_rows_taken_in_parts_is_that_of_autograd(
    kind: str, rows_at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(losses, "CPU_CHUNK", rows_at_once * 7)
    target, weight = rows(2, 5, 7, seed=1), rows(2, 5, seed=2).relu()
    ours, reference = (rows(2, 5, 7).requires_grad_() for _ in range(2))
    loss = feature_loss(kind, ours, target, weight, normalizer=3.0) * 0.5
    expected = (by_autograd(kind, reference, target) * weight).sum() / 3 * 0.5
    torch.testing.assert_close(loss, expected)
    loss.backward()
    expected.backward()
    torch.testing.assert_close(ours.grad, reference.grad)


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_of_zeros_has_a_finite_gradient(kind: str) -> None:
    student = torch.zeros(2, 5, requires_grad=True)
    feature_loss(kind, student, rows(2, 5)).backward()
    assert student.grad is not None
    assert student.grad.isfinite().all()


@pytest.mark.parametrize("kind", KINDS)
def test_backward_keeps_no_float32_copies(kind: str) -> None:
    """One gradient in the student's dtype; float32 copies were four times that, most of a GPU's extra memory."""
    kept: list[Tensor] = []
    student = rows(32, 64).bfloat16().requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor
    ):
        loss = feature_loss(kind, student, rows(32, 64, seed=1), torch.ones(32))
    large = [tensor for tensor in kept if tensor.numel() >= student.numel()]
    assert [tensor.dtype for tensor in large] == [torch.bfloat16]
    loss.backward()
    assert student.grad is not None


@pytest.mark.parametrize("temperature", [1.0, 2.0, 4.0, 10.0])
def test_logit_loss_equals_torch(temperature: float) -> None:
    student, teacher = rows(6, 5) * 5, rows(6, 5, seed=1) * 5
    expected = temperature**2 * functional.kl_div(
        (student / temperature).log_softmax(-1), (teacher / temperature).softmax(-1), reduction="batchmean"
    )
    torch.testing.assert_close(logit_loss(student, teacher, temperature), expected)


def test_logit_loss_keeps_its_gradient_size_across_temperatures() -> None:
    """Hinton et al.: T² cancels the 1/T² of the softened gradient, in the limit of high temperatures."""
    teacher = rows(64, 5, seed=1)
    norms = []
    for temperature in (20.0, 80.0):
        student = rows(64, 5).requires_grad_()
        logit_loss(student, teacher, temperature).backward()
        assert student.grad is not None
        norms.append(float(student.grad.norm()))
    assert norms[0] == pytest.approx(norms[1], rel=0.05)


def test_relational_loss_equals_a_loop() -> None:
    student, target = rows(5, 3), rows(5, 8, seed=1)

    def similarity(a: Tensor, b: Tensor) -> float:
        return float(a @ b) / math.sqrt(float(a @ a) * float(b @ b))

    gaps = [
        (similarity(student[i], student[j]) - similarity(target[i], target[j])) ** 2
        for i in range(5)
        for j in range(5)
        if i != j
    ]
    assert float(relational_loss(student, target)) == pytest.approx(sum(gaps) / len(gaps), rel=1e-5)


def test_relational_loss_ignores_scale_and_weightless_rows() -> None:
    student, target = rows(5, 3), rows(5, 8, seed=1)
    torch.testing.assert_close(relational_loss(student * 7, target * 0.1), relational_loss(student, target))
    weight = torch.tensor([1.0, 1, 0, 1, 1])
    broken = target.clone()
    broken[2] = float("nan")
    kept = [0, 1, 3, 4]
    torch.testing.assert_close(
        relational_loss(student, broken, weight), relational_loss(student[kept], target[kept])
    )
    assert float(relational_loss(student[:1], target[:1])) == 0.0


@pytest.mark.parametrize("kind", [*KINDS, "relation", "logit"])
class TestEveryLoss:
    """A new loss gets every check by one name."""

    def value(self, kind: str, student: Tensor, target: Tensor, weight: Tensor | None = None) -> Tensor:
        if kind == "relation":
            return relational_loss(student, target, weight)
        if kind == "logit":
            return logit_loss(student, target, 4.0, weight)
        return feature_loss(kind, student, target, weight)

    def test_gradient_flows_into_the_student_alone(self, kind: str) -> None:
        student, target = rows(6, 5).requires_grad_(), rows(6, 5, seed=1).requires_grad_()
        weight = torch.ones(6, requires_grad=True)
        self.value(kind, student, target, weight).backward()
        assert student.grad is not None
        assert student.grad.abs().max() > 0
        assert target.grad is None
        assert weight.grad is None

    def test_gradient_is_the_numerical_one(self, kind: str) -> None:
        student, target = rows(4, 5), rows(4, 5, seed=1)
        student.requires_grad_()
        self.value(kind, student, target).backward()
        step = 1e-2
        bumped, lowered = student.detach().clone(), student.detach().clone()
        bumped[1, 2] += step
        lowered[1, 2] -= step
        slope = (self.value(kind, bumped, target) - self.value(kind, lowered, target)) / (2 * step)
        assert student.grad is not None
        assert float(student.grad[1, 2]) == pytest.approx(float(slope), rel=0.02, abs=1e-4)

    def test_order_of_the_batch_does_not_matter(self, kind: str) -> None:
        student, target, weight = rows(8, 5), rows(8, 5, seed=1), rows(8, seed=2).abs()
        order = torch.randperm(8, generator=torch.Generator().manual_seed(3))
        shuffled = self.value(kind, student[order], target[order], weight[order])
        torch.testing.assert_close(shuffled, self.value(kind, student, target, weight))

    def test_a_perfect_student_has_no_loss_and_a_wrong_one_has(self, kind: str) -> None:
        target = rows(6, 5)
        assert float(self.value(kind, target.clone(), target)) == pytest.approx(0, abs=1e-6)
        assert float(self.value(kind, rows(6, 5, seed=1), target)) > 0.01

    def test_weightless_rows_may_hold_nan(self, kind: str) -> None:
        student, target = rows(6, 5).requires_grad_(), rows(6, 5, seed=1)
        target[4:] = float("nan")
        weight = torch.tensor([1.0, 1, 1, 1, 0, 0])
        loss = self.value(kind, student, target, weight)
        torch.testing.assert_close(loss, self.value(kind, student[:4], target[:4]))
        loss.backward()
        assert student.grad is not None
        assert student.grad.isfinite().all()
        assert student.grad[4:].abs().max() == 0

    def test_no_weight_at_all_is_zero_not_nan(self, kind: str) -> None:
        student = rows(3, 5).requires_grad_()
        loss = self.value(kind, student, torch.full((3, 5), float("nan")), torch.zeros(3))
        loss.backward()
        assert float(loss.detach()) == 0.0
        assert student.grad is not None
        assert student.grad.abs().max() == 0

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_arithmetic_is_float32_under_mixed_precision(self, kind: str, dtype: torch.dtype) -> None:
        student, target = rows(16, 64).to(dtype), rows(16, 64, seed=1)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            mixed = self.value(kind, student, target)
        assert mixed.dtype == torch.float32
        assert torch.equal(mixed, self.value(kind, student.float(), target))


def test_global_batch_mean_from_local_parts() -> None:
    """With the mean count over ranks as normalizer, the mean of the ranks' losses is the global loss."""
    values, weight = rows(8).abs(), torch.tensor([1.0, 0, 1, 1, 1, 0, 0, 1])
    mean_count = weight.sum() / 2
    parts = [weighted_mean(values[s], weight[s], mean_count) for s in (slice(0, 4), slice(4, 8))]
    torch.testing.assert_close(torch.stack(parts).mean(), weighted_mean(values, weight))


def test_a_wider_head_pushes_the_extra_class_down() -> None:
    teacher = rows(4, 3)
    student = torch.cat([teacher, torch.zeros(4, 1)], 1).requires_grad_()
    loss = logit_loss(student, teacher, 1.0)
    loss.backward()
    assert float(loss.detach()) > 0
    assert student.grad is not None
    assert (student.grad[:, 3] > 0).all()


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: feature_loss("mse", rows(2, 3), rows(2, 4)), r"\(2, 3\).*\(2, 4\)"),
        (lambda: feature_loss("mse", rows(2, 3), rows(1, 3)), r"\(2, 3\).*\(1, 3\)"),
        (lambda: feature_loss("mae", rows(2, 3), rows(2, 3)), "'mae': expected one of mse, cosine"),
        (lambda: logit_loss(rows(2, 3), rows(2, 4), 1.0), r"\(2, 3\) do not cover.*\(2, 4\)"),
        (lambda: logit_loss(rows(2, 3), rows(2, 3), 0.0), "above 0, got 0.0"),
        (lambda: relational_loss(rows(2, 3), rows(3, 3)), "equal N"),
    ],
)
def test_wrong_shapes_and_values_are_refused(call: object, text: str) -> None:
    assert callable(call)
    with pytest.raises(ValueError, match=text):
        call()
