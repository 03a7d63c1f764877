"""What `bench` found."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from pennyweight.evaluate.speed.base import Kind
from pennyweight.kernels.packed import Activations


@dataclass(frozen=True)
class Spread:
    """Of the rounds."""

    median: float
    lowest: float
    highest: float


def spread_of(values: Iterable[float]) -> Spread:
    found = sorted(values)
    return Spread(statistics.median(found), found[0], found[-1])


@dataclass(frozen=True)
class Contestant:
    """One model.

    runtime                 "packed": pennyweight.load; "transformers", which decodes quantized weights; "llama.cpp"
    kernels                 the native ones that it ran on; None where plain torch versions, or others' kernels, did
    activations, rounding   what packed weights are multiplied with; size of a group -> the relative error that rounding
                            makes in normally distributed inputs (root mean square)
    packed, packed_bytes    number of packed weights, and their bytes
    decoded, notes          quantized tensor -> why it is not packed; what `load` had to say beside
    size_bytes, cache       of the artefact's files; the file of packed weights, of `cache_bytes`
    import_s, load_s        of the libraries; of the model, from the file of packed weights where there is one
    first_load_s            with packing; None where they were packed before, or are not kept
    cold_first_token_s      import, load and the first text's first token
    prompt_.., decode_..    tokens per second: of the prompt until the first token is there; after it
    decode_bytes_per_s      bytes_per_token * tokens per second; share: of what reading memory gave in the same round
    resident_bytes          when every weight had been touched; mapped_bytes of them are of files, libraries_bytes were
                            there before loading; peak_bytes at most. None where the system does not say
    """

    model: str
    runtime: Kind
    kernels: str | None
    activations: Activations | None
    rounding: Mapping[str, float] | None
    packed: int
    packed_bytes: int
    decoded: Mapping[str, str]
    notes: list[str]
    size_bytes: int
    cache: str | None
    cache_bytes: int
    import_s: float
    load_s: float
    first_load_s: float | None
    cold_first_token_s: float
    first_token_s: Spread
    prompt_tokens_per_s: Spread
    decode_tokens_per_s: Spread
    bytes_per_token: int
    decode_bytes_per_s: Spread
    share: Spread
    resident_bytes: int | None
    mapped_bytes: int | None
    libraries_bytes: int | None
    peak_bytes: int


@dataclass(frozen=True)
class Bench:
    """Both models in the same rounds, in turns, and a reading of memory before and after each.

    load_average            of the machine, before; others_share: of all processors' time, what others used meanwhile
    cache_bytes             of the last level; read_bytes: of memory that is read with as many threads
    ratios                  artefact / other: of speeds the median over the rounds, of each of which both were part
    notices                 what a reader of these numbers should know
    """

    rounds: int
    prompt_tokens: int
    tokens: int
    threads: int
    is_interleaved: bool
    load_average: list[float] | None
    others_share: float | None
    cache_bytes: int | None
    read_bytes: int
    read_bytes_per_s: Spread
    artefact: Contestant
    against: Contestant | None
    ratios: Mapping[str, float] | None
    notices: list[str]
