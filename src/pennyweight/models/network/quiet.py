"""Running a user's module without leaving traces: its modes come back, torch's own remarks are not shown."""

from __future__ import annotations

import io
import logging
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from pathlib import Path

import torch
from torch import nn

_OURS, _TORCH = str(Path(__file__).parents[2]), str(Path(torch.__file__).parent)


@contextmanager
def in_eval(net: nn.Module) -> Iterator[None]:
    """`net` in eval mode; afterwards every module is in its own mode again."""
    modes = [(module, module.training) for module in net.modules()]
    net.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


@contextmanager
def quiet() -> Iterator[None]:
    """Without torch's log lines, warnings and listings, and without fused attention, which hides weights."""
    disabled, fast = logging.root.manager.disable, torch.backends.mha.get_fastpath_enabled()
    logging.disable(logging.CRITICAL)
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with warnings.catch_warnings(), redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)
        torch.backends.mha.set_fastpath_enabled(fast)


def where(error: BaseException) -> str:
    """The innermost line of the user's own code that `error` comes from, to be put behind a message."""
    frames: list[traceback.FrameSummary] = []
    cause: BaseException | None = error
    while cause is not None:
        frames += traceback.extract_tb(cause.__traceback__)
        cause = cause.__cause__ or cause.__context__
    own = [frame for frame in frames if not frame.filename.startswith((_OURS, _TORCH, "<"))]
    return f", in {own[-1].filename}, line {own[-1].lineno}: {own[-1].line}" if own else ""
