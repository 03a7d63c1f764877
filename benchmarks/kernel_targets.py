"""What our kernels have to reach beside a streaming read and beside everybody else's, and whether they do.

A ratio is the median over rounds of one round's ratio, as the machine's own speed changes from minute to minute.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

OURS, READ = "pennyweight", "streaming read"
# At one token, of what memory gives; the rest is of peers' seconds over ours.
SHARES_OF_READ = {2: 0.8, 3: 0.8, 4: 0.9, 5: 0.9, 6: 0.9, 8: 0.9}
# Bits -> the type of llama.cpp, and how many times as fast at one token.
FASTER_THAN = {3: {"q3_K": 2.0}, 2: {"q2_K": 1.4, "iq2_xs": 4.0}}
EXACT_WIDTHS = (4, 8)
# From here on weights are a small part of the work: the fastest kernel of any width is the one to reach.
MANY_TOKENS = 128
BEST = "best peer"


@dataclass(frozen=True)
class Timed:
    """One contestant of a cell, as the runner answers; seconds of one product, and the reading beside it, by round."""

    name: str
    library: str
    bits: int
    group: int
    mode: Literal["int8", "float32", "bfloat16"]
    size_bytes: int
    weights: int
    error: float
    seconds: Sequence[float]
    read_bytes_per_s: Sequence[float]

    @property
    def share(self) -> float:
        """Of the streaming read."""
        rounds = zip(self.seconds, self.read_bytes_per_s, strict=True)
        return statistics.median(self.size_bytes / seconds / read for seconds, read in rounds)

    def speed_beside(self, other: Timed) -> float:
        """How many times as fast as the other."""
        return statistics.median(b / a for a, b in zip(self.seconds, other.seconds, strict=True))

    def figure(self) -> dict[str, Any]:
        """Medians, and what they are of."""
        of_rounds = ("seconds", "read_bytes_per_s")
        facts = {name: value for name, value in vars(self).items() if name not in of_rounds}
        return {
            **facts,
            "microseconds": round(1e6 * statistics.median(self.seconds), 1),
            "fastest": round(1e6 * min(self.seconds), 1),
            "slowest": round(1e6 * max(self.seconds), 1),
            "gb_per_s": round(self.size_bytes / statistics.median(self.seconds) / 1e9, 2),
            "read_gb_per_s": round(statistics.median(self.read_bytes_per_s) / 1e9, 2),
            "share": round(self.share, 3),
        }


@dataclass(frozen=True)
class Finding:
    """`ours` is to be `needed` times as fast as `against`; `other` is the one that it was, `measured` the ratio."""

    ours: str
    against: str
    other: str
    measured: float
    needed: float

    @property
    def is_met(self) -> bool:
        return self.measured >= self.needed


def findings(timed: Sequence[Timed], *, bits: int, tokens: int) -> list[Finding]:
    """Every target that a shape's contestants at this width and number of tokens answer."""
    peers = [one for one in timed if one.library != OURS]
    mine = [one for one in timed if one.library == OURS]
    return [finding for one in mine for finding in _findings(one, peers, bits, tokens)]


def _findings(one: Timed, peers: Sequence[Timed], bits: int, tokens: int) -> Iterator[Finding]:
    if one.mode == "int8" and tokens == 1:
        yield Finding(one.name, READ, READ, round(one.share, 3), SHARES_OF_READ[bits])
        for kind, times in FASTER_THAN.get(bits, {}).items():
            of_kind = [peer for peer in peers if peer.name in (f"ggml {kind}", f"ggml {kind} repacked")]
            yield from _beside_best(one, of_kind, kind, times)
    if one.mode == "int8" or bits in EXACT_WIDTHS:
        yield from _beside_best(one, [peer for peer in peers if _is_rival(one, peer, tokens)], BEST, 1.0)


def _is_rival(one: Timed, peer: Timed, tokens: int) -> bool:
    """Whether the peer does at least what ours does: its groups are as fine, and its activations as exact."""
    if one.mode == "int8":
        return peer.mode == "int8" and (tokens >= MANY_TOKENS or (peer.bits == one.bits and peer.group <= one.group))
    exact = ("float32",) if one.mode == "float32" else ("float32", "bfloat16")
    return peer.mode in exact and peer.bits == one.bits and peer.group <= one.group


def _beside_best(one: Timed, peers: Sequence[Timed], against: str, needed: float) -> Iterator[Finding]:
    if peers:
        ratio, other = min((one.speed_beside(peer), peer.name) for peer in peers)
        yield Finding(one.name, against, other, round(ratio, 3), needed)
