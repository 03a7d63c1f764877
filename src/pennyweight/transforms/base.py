"""What a fold and a chooser of its scales are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

from torch import Tensor

from pennyweight.schemes import Scheme
from pennyweight.solvers.base import Statistics
from pennyweight.stats.magnitude import Magnitude

# How a parameter p scales what it makes: "scaled" p -> t p, "one-plus" (Gemma's norms) p -> t (1 + p) - 1.
Style = Literal["scaled", "one-plus"]


@dataclass(frozen=True)
class Part:
    """Entries `rows` [n] along `axis` of a parameter, each of which makes one channel."""

    parameter: str
    axis: int
    rows: Tensor
    style: Style = "scaled"


@dataclass(frozen=True)
class Reader:
    """A linear map that reads the channels: input j of its matrix is channel `source[j]`, or none of them where -1.

    axis  the inputs' axis in the parameter, -1 or -2
    """

    parameter: str
    axis: int
    source: Tensor


@dataclass(frozen=True)
class Fold:
    """`size` channels that some parameters make and linear maps read: for every s > 0 [size]

        producer -> producer / s, readers' columns -> columns * s

    keeps the block's function. The producer is a norm's vectors (`is_norm`), or rows of one matrix and their bias.
    """

    producer: tuple[Part, ...]
    readers: tuple[Reader, ...]
    size: int
    is_norm: bool


@dataclass(frozen=True)
class Weighed:
    """A quantized matrix that reads a fold: what a chooser needs of it.

    w          float32 [out, in]
    source     [in], see Reader
    stats      of its input; the Hessian may be missing
    magnitude  of its input, None without data
    """

    w: Tensor
    source: Tensor
    scheme: Scheme
    stats: Statistics
    magnitude: Magnitude | None = None


class Rescaling(Protocol):
    """Chooses the scales of a fold."""

    @property
    def name(self) -> str: ...
    def choose(self, readers: list[Weighed], size: int) -> Tensor | None:
        """s > 0, float32 [size], for the quantized matrices that read the fold; None where nothing is better than 1."""
