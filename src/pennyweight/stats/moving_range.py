"""The range of an edge as a moving average over batches, which forgets what was only once large."""

from __future__ import annotations

from dataclasses import dataclass

# ONNX Runtime's averaging constant.
AVERAGING = 0.01


@dataclass(frozen=True)
class MovingRange:
    """low <- low + 0.01 * (batch low - low), high likewise, float64; the first batch is taken as it is.

    It depends on how the data was cut into batches and on their order. `first_low` and `first_high` are the range of
    the first batch, which `merge` needs.
    """

    low: float = 0.0
    high: float = 0.0
    first_low: float = 0.0
    first_high: float = 0.0
    batches: int = 0

    def update(self, low: float, high: float) -> MovingRange:
        """The average with a batch more, of numbers from `low` to `high`."""
        return self.merge(MovingRange(low, high, low, high, 1))

    def merge(self, other: MovingRange) -> MovingRange:
        """The average over this one's batches and then those of `other`, up to float64 rounding.

        With r the average of n batches that begin with f, the same batches after an average s leave it at
        (1-a)^n s + (r - (1-a)^(n-1) f) + a (1-a)^(n-1) f = r + (1-a)^n (s - f).
        """
        if not self.batches or not other.batches:
            return self if self.batches else other
        kept = (1 - AVERAGING) ** other.batches
        return MovingRange(
            other.low + kept * (self.low - other.first_low),
            other.high + kept * (self.high - other.first_high),
            self.first_low,
            self.first_high,
            self.batches + other.batches,
        )
