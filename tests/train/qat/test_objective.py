"""What training makes small."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as f

from pennyweight.core.errors import DataError, UsageError
from pennyweight.train.qat.objective import Objective, logits_of


def test_labels_and_teacher_are_mixed_as_hinton_does() -> None:
    q, t, labels = torch.randn(6, 5), torch.randn(6, 5), torch.arange(6) % 5
    p = (t / 3).softmax(-1)
    kl = 9 * (p * (p.log() - (q / 3).log_softmax(-1))).sum(-1).mean()
    wanted = 0.7 * f.cross_entropy(q, labels) + 0.3 * kl
    torch.testing.assert_close(Objective(alpha=0.7, temperature=3.0).loss(q, t, labels), wanted)


def test_one_of_them_alone_counts_fully() -> None:
    q, t, labels = torch.randn(6, 5), torch.randn(6, 5), torch.arange(6) % 5
    objective = Objective(alpha=0.2, temperature=1.0)
    torch.testing.assert_close(objective.loss(q, None, labels), f.cross_entropy(q, labels))
    kl = f.kl_div(q.log_softmax(-1), t.log_softmax(-1), log_target=True, reduction="batchmean")
    torch.testing.assert_close(objective.loss(q, t, None), kl)
    assert float(objective.loss(t, t, None)) == pytest.approx(0, abs=1e-6)


def test_classes_may_be_along_any_axis() -> None:
    q, t = torch.randn(2, 5, 3, 4), torch.randn(2, 5, 3, 4)
    labels = torch.randint(0, 5, (2, 3, 4))
    along, last = Objective(class_axis=1), Objective()
    moved = along.loss(q, t, labels)
    torch.testing.assert_close(moved, last.loss(q.movedim(1, -1), t.movedim(1, -1), labels))


def test_outputs_that_are_no_logits_are_compared_by_squares() -> None:
    q, t = torch.randn(4, 7), torch.randn(4, 7)
    wanted = (q - t).square().sum() / t.square().sum()
    torch.testing.assert_close(Objective(distance="squares").loss(q, t, None), wanted)


def test_half_precision_outputs_are_judged_in_float32() -> None:
    q = torch.randn(4, 5).bfloat16()
    assert Objective().loss(q, q, torch.zeros(4, dtype=torch.int64)).dtype == torch.float32


def test_the_tensor_that_counts_is_found() -> None:
    one, other = torch.zeros(1), torch.ones(1)
    assert logits_of(one) is one
    assert logits_of((one, other)) is one
    assert logits_of({"hidden": one, "logits": other}) is other
    assert logits_of({"hidden": one}) is one
    with pytest.raises(DataError, match="the network gives a list"):
        logits_of([])


def test_what_makes_no_sense_is_refused() -> None:
    with pytest.raises(UsageError, match="neither labels nor a teacher"):
        Objective().loss(torch.zeros(1, 2), None, None)
    with pytest.raises(UsageError, match="alpha 2"):
        Objective(alpha=2)
    with pytest.raises(UsageError, match="temperature"):
        Objective(temperature=0)
