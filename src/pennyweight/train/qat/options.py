"""What may be said about how a network is prepared."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

# Where the scales of weights start: by the project's search of the least squared error, from the largest weight, or
# as LSQ does, 2 mean|w| / sqrt(p).
WeightStart = Literal["search", "minmax", "lsq"]


@dataclass(frozen=True)
class QatOptions:
    """ends      scheme of the first and the last site, "int8-channel" for example; None: as all others
    start     where the scales of weights start
    history   follow how often each code turns back: needed to freeze oscillating weights; 15 bytes a weight
    """

    ends: str | None = None
    start: WeightStart = "search"
    history: bool = True
