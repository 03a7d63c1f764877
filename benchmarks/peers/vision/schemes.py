"""Names of schemes as the vision benchmark has them: bits of weights, of activations, and what shares a scale."""

from __future__ import annotations

import argparse
import re
from dataclasses import dataclass


@dataclass(frozen=True)
class NetworkScheme:
    """weights, activations   bits; activations None: they stay in float
    sharing                 "channel", "tensor", or "g128": so many weights along the input
    """

    weights: int
    activations: int | None
    sharing: str

    @classmethod
    def parse(cls, name: str) -> NetworkScheme:
        """Read `w8a8-channel`, `w8a8-tensor`, `w4-channel` or `w4-g32`."""
        match = re.fullmatch(r"w([2-8])(?:a(8))?-(channel|tensor|g[1-9]\d*)", name)
        if match is None:
            raise argparse.ArgumentTypeError(f"{name!r} is no scheme; write wN or wNa8 and -channel, -tensor or -gG")
        weights, activations, sharing = match.groups()
        return cls(int(weights), int(activations) if activations else None, sharing)

    @property
    def group(self) -> int | None:
        return int(self.sharing[1:]) if self.sharing.startswith("g") else None

    @property
    def is_per_channel(self) -> bool:
        return self.sharing == "channel"
