"""Operations of a model on one thread, products on all: side by side the two kinds of threads hold each other up."""

from __future__ import annotations

import threading
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn

from pennyweight.core.parallel import one_thread_per_operation


class _Running(threading.local):
    """Forward passes that this thread is in."""

    def __init__(self) -> None:
        self.stacks: list[ExitStack] = []


_running = _Running()


def keep_to_one_thread(model: nn.Module) -> None:
    """From now on forward passes of `model` run inside `one_thread_per_operation`.

    Between two of torch's parallel operations OpenMP's helpers spin, and so do those of products: on two cores a token
    takes two to three times as long.
    """
    model.register_forward_pre_hook(_enter)
    model.register_forward_hook(_leave, always_call=True)


def _enter(module: nn.Module, given: Any) -> None:
    if torch.compiler.is_compiling():
        return
    stack = ExitStack()
    stack.enter_context(one_thread_per_operation())
    _running.stacks.append(stack)


def _leave(module: nn.Module, given: Any, result: Any) -> None:
    if not torch.compiler.is_compiling() and _running.stacks:
        _running.stacks.pop().close()
