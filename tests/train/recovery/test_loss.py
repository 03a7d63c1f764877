"""The teacher's classes, and the divergence from them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pennyweight.pipeline.losses import distance
from pennyweight.train.recovery.loss import divergence, top_classes

# float32 sums over a vocabulary, in another order.
CLOSE = 1e-5


def _logits(seed: int, tokens: int = 7, vocabulary: int = 50) -> Tensor:
    return 3 * torch.randn(tokens, vocabulary, generator=torch.Generator().manual_seed(seed))


def _kl(p: Tensor, q: Tensor, temperature: float = 1.0) -> Tensor:
    p, q = (p / temperature).log_softmax(-1), (q / temperature).log_softmax(-1)
    return temperature**2 * (p.exp() * (p - q)).sum()


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_with_the_whole_vocabulary_it_is_the_divergence_itself(temperature: float) -> None:
    teacher, student = _logits(0), _logits(1)
    classes, tokens = top_classes(teacher, 50, temperature=temperature)
    found = divergence(student, classes, tokens, temperature=temperature)
    assert found.item() == pytest.approx(_kl(teacher, student, temperature).item(), rel=CLOSE)


def test_classes_are_a_distribution_and_the_rest_is_one_class() -> None:
    teacher, student = _logits(0), _logits(1)
    classes, tokens = top_classes(teacher, 5, temperature=1.0)
    torch.testing.assert_close(classes.exp().sum(-1), torch.ones(7))

    def merged(logits: Tensor) -> Tensor:
        p = logits.softmax(-1)
        chosen = p.gather(1, tokens)
        return torch.cat([chosen, 1 - chosen.sum(-1, keepdim=True)], dim=1)

    p, q = merged(teacher), merged(student)
    expected = (p * (p.log() - q.log())).sum().item()
    assert divergence(student, classes, tokens, temperature=1.0).item() == pytest.approx(expected, rel=1e-4)
    assert expected < _kl(teacher, student).item()


@pytest.mark.parametrize("count", [5, 50])
def test_its_gradient_is_that_of_finite_differences_and_zero_at_the_teacher(count: int) -> None:
    teacher, student = _logits(0), _logits(1).requires_grad_()
    classes, tokens = top_classes(teacher, count, temperature=1.0)
    [gradient] = torch.autograd.grad(divergence(student, classes, tokens, temperature=1.0), student)
    way = torch.randn(7, 50, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        up, down = (divergence(student + step * way, classes, tokens, temperature=1.0) for step in (1e-2, -1e-2))
    assert (gradient * way).sum().item() == pytest.approx((up - down).item() / 2e-2, rel=1e-3)
    itself = teacher.requires_grad_()
    [none] = torch.autograd.grad(divergence(itself, classes, tokens, temperature=1.0), itself)
    assert none.abs().max() < CLOSE


def test_probabilities_of_zero_harm_nothing() -> None:
    teacher = torch.tensor([[0.0, -200.0, -200.0]])
    student = torch.tensor([[-200.0, 0.0, 1.0]], requires_grad=True)
    classes, tokens = top_classes(teacher, 2, temperature=1.0)
    loss = divergence(student, classes, tokens, temperature=1.0)
    [gradient] = torch.autograd.grad(loss, student)
    assert loss.isfinite()
    assert gradient.isfinite().all()


def test_the_distance_of_an_encoder_is_relative_to_the_size_of_its_states() -> None:
    teacher = _logits(0)
    assert distance(teacher, teacher) == 0
    assert distance(2 * teacher, teacher).item() == pytest.approx(7)
    assert distance(20 * teacher, 10 * teacher).item() == pytest.approx(7)
