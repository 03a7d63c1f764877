"""How far a student's output is from its teacher's."""

from __future__ import annotations

import torch
from torch import Tensor


def top_classes(logits: Tensor, count: int, *, temperature: float) -> tuple[Tensor, Tensor]:
    """The `count` most likely tokens and all others as one class.

    Of `logits` [tokens, vocabulary]: log-probabilities [tokens, count + 1] of softmax(logits / temperature), the last
    one log(1 - the sum of the others), minus infinity where none is left; and the tokens, int64 [tokens, count].
    """
    log_p = (logits.float() / temperature).log_softmax(-1)
    count = min(count, log_p.shape[1])
    _, tokens = log_p.topk(count, dim=-1)
    return _classes(log_p, tokens), tokens


def _classes(log_p: Tensor, tokens: Tensor) -> Tensor:
    chosen = log_p.gather(1, tokens)
    if tokens.shape[1] == log_p.shape[1]:
        # A logarithm of nothing has no gradient.
        return torch.cat([chosen, torch.full_like(chosen[:, :1], -torch.inf)], dim=1)
    rest = log_p.scatter(1, tokens, -torch.inf).logsumexp(-1, keepdim=True)
    return torch.cat([chosen, rest], dim=1)


def divergence(logits: Tensor, teacher: Tensor, tokens: Tensor, *, temperature: float) -> Tensor:
    """The sum over tokens of T² KL(teacher || student) over the teacher's classes,

        KL = sum_c p_c (log p_c - log q_c),    p, q = softmax(logits / T) with all other tokens as one class,

    `logits` [tokens, vocabulary] of the student; `teacher` and `tokens` as from `top_classes`. Merging classes only
    makes KL smaller, and leaves it as it is for count = vocabulary. T² keeps gradients of one size
    (Hinton, Vinyals, Dean, "Distilling the knowledge in a neural network", section 2).
    """
    log_q = _classes((logits.float() / temperature).log_softmax(-1), tokens)
    known = teacher > -torch.inf
    terms = torch.where(known, teacher.exp() * (teacher.where(known, 0) - log_q.where(known, 0)), 0)
    return temperature**2 * terms.sum()
