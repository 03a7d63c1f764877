"""The windows of text that a run is given."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from pennyweight.models import text
from pennyweight.models.self_text import SELF, own_windows
from pennyweight.models.streamed import StreamedModel
from pennyweight.pipeline.options import Options


def windows_of(
    model: StreamedModel,
    source: str | Sequence[str],
    *,
    length: int,
    count: int | None = None,
    least: int = 1,
    seed: int = 0,
    trust_remote_code: bool = False,
) -> list[Tensor]:
    """Windows of a text (see `text.documents`) or of several as `model` is used with them, token ids int64 [tokens].

    A decoder gets the text cut into windows of `length` tokens, or of as many as it takes, `count` of them at most. An
    encoder is asked about texts by themselves, and what it does with one of ten tokens is not what it does with it
    among others: it gets text by text, as many as `count` such windows would hold, the long ones in pieces. Raises
    DataError where there is less than one window, for an encoder fewer than `least` tokens, or what the model has no
    token for.
    """
    tokenizer = text.load_tokenizer(model.path, trust_remote_code=trust_remote_code)
    length = longest(model, length)
    if isinstance(source, str):
        source = text.documents(source, tokenizer, paragraphs=not model.is_decoder)
    if model.is_decoder:
        windows = list(text.windows(source, tokenizer, length=length, count=count, seed=seed))
    else:
        most = None if count is None else count * length
        windows = text.passages(source, tokenizer, length=length, most=most, least=least, seed=seed)
    text.check_vocabulary(windows, model.config, [str(model.path)])
    return windows


def longest(model: StreamedModel, length: int) -> int:
    """`length` tokens, or as many as the model takes where that is less."""
    return min(length, text.context_length(model.config, model.module) or length)


def calibration_windows(model: StreamedModel, options: Options) -> list[Tensor] | None:
    """Windows of the options' calibration text; None for a data-free run."""
    source = options.calibration_source
    if source is None:
        return None
    if source == SELF:
        length = longest(model, options.length)
        return list(own_windows(model, length=length, count=options.samples, seed=options.seed))
    return _drawn(model, options, source, count=options.samples)


def some_windows(model: StreamedModel, options: Options, windows: Sequence[Tensor] | None) -> Sequence[Tensor]:
    """The run's calibration `windows`, as many of the built-in text where it has none."""
    return _drawn(model, options, text.BUILT_IN, count=options.samples) if windows is None else windows


def every_window(model: StreamedModel, options: Options) -> list[Tensor]:
    """All windows of the text that `calibration_windows` draws from; of the built-in text where there is none."""
    source = options.calibration_source
    return _drawn(model, options, text.BUILT_IN if source is None or source == SELF else source, count=None)


def _drawn(model: StreamedModel, options: Options, source: str | Sequence[str], *, count: int | None) -> list[Tensor]:
    return windows_of(
        model,
        source,
        length=options.length,
        count=count,
        least=longest(model, options.length),
        seed=options.seed,
        trust_remote_code=options.trust_remote_code,
    )
