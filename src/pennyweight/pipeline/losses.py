"""How far what a model gives is from what its original gave."""

from __future__ import annotations

from torch import Tensor

from pennyweight.core.parallel import chunks

# Rows of logits that are compared at once: bounds the memory of their copies.
_ROWS = 256


def kl(reference: Tensor, logits: Tensor) -> float:
    """The sum over tokens of KL(reference || this) in nats, over the whole vocabulary, for logits [tokens, vocabulary]
    of both; float32, summed in float64."""
    total = 0.0
    for rows in chunks(logits.shape[0], _ROWS):
        p = reference[rows].float().log_softmax(-1)
        q = logits[rows].float().log_softmax(-1)
        total += float((p.exp() * (p - q)).sum(-1).double().sum())
    return total


def quadratic_kl(reference: Tensor, logits: Tensor) -> float:
    """The same to second order, for logits d apart,

        1/2 sum over tokens of (E_p[d²] - E_p[d]²),    p = softmax(reference)

    (Amari, "Natural gradient works efficiently in learning", 1998).
    """
    total = 0.0
    for rows in chunks(logits.shape[0], _ROWS):
        p = reference[rows].float().softmax(-1)
        d = logits[rows].float() - reference[rows].float()
        mean = (p * d).sum(-1, keepdim=True)
        total += float((p * (d - mean).square()).sum(-1).double().sum()) / 2
    return total


def distance(hidden: Tensor, teacher: Tensor) -> Tensor:
    """The sum over tokens of |h - t|² / mean |t|² for hidden states [tokens, width] of an encoder."""
    return (hidden.float() - teacher).square().sum() / teacher.square().sum(-1).mean()
