"""The windows of text that a run is given."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from pennyweight.models import text
from pennyweight.models.self_text import SELF, own_windows
from pennyweight.models.streamed import StreamedModel
from pennyweight.pipeline.options import Options


def calibration_windows(model: StreamedModel, options: Options) -> Tensor | None:
    """Windows [windows, length] of the options' calibration text, `samples` at most; None for a data-free run."""
    source = options.calibration_source
    if source is None:
        return None
    if source == SELF:
        return own_windows(model, length=_length(model, options), count=options.samples, seed=options.seed)
    return _of_text(model, options, source, count=options.samples)


def some_windows(model: StreamedModel, options: Options, windows: Tensor | None) -> Tensor:
    """The run's calibration `windows`, as many of the built-in text where it has none."""
    return _of_text(model, options, text.BUILT_IN, count=options.samples) if windows is None else windows


def every_window(model: StreamedModel, options: Options) -> Tensor:
    """All windows of the text that `calibration_windows` draws from; of the built-in text where there is none."""
    source = options.calibration_source
    return _of_text(model, options, text.BUILT_IN if source in (None, SELF) else source, count=None)


def _of_text(
    model: StreamedModel, options: Options, source: str | Sequence[str] | None, *, count: int | None
) -> Tensor:
    tokenizer = text.load_tokenizer(model.path, trust_remote_code=options.trust_remote_code)
    documents = text.documents(source, tokenizer) if isinstance(source, str) else source or ()
    windows = text.windows(documents, tokenizer, length=_length(model, options), count=count, seed=options.seed)
    text.check_vocabulary(windows, model.config, [str(model.path)])
    return windows


def _length(model: StreamedModel, options: Options) -> int:
    return min(options.length, text.context_length(model.config) or options.length)
