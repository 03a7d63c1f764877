"""What the result may take, or lose, as the user says it."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Literal

from pennyweight.core.errors import UsageError

_UNITS = {"": 1} | {
    f"{letter}{infix}B": base**power
    for power, letter in enumerate("KMGT", start=1)
    for infix, base in (("", 1000), ("i", 1024))
}
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?|\.\d+)\s*([a-zA-Z]*)\s*")
_SHARE = re.compile(r"\s*(\d+(?:\.\d+)?|\.\d+)\s*(%?)\s*")

BudgetKind = Literal["size", "bpw", "max-kl", "max-loss"]


@dataclass(frozen=True)
class Budget:
    """kind    what is limited: "size" bytes of the whole output; "bpw" bits of all tensors per weight of the original;
            "max-kl" mean KL to the original in nats a token; "max-loss" relative rise of perplexity
    value   the limit
    """

    kind: BudgetKind
    value: float

    @property
    def is_of_loss(self) -> bool:
        """It can only be kept by looking at results."""
        return self.kind in ("max-kl", "max-loss")

    def __str__(self) -> str:
        match self.kind:
            case "size":
                return f"--size {self.value:.0f} bytes"
            case "max-loss":
                return f"--max-loss {100 * self.value:g}%"
            case _:
                return f"--{self.kind} {self.value:g}"


def parse_budget(
    *, size: str | int | None = None, bpw: float | None = None, max_kl: float | None = None,
    max_loss: str | float | None = None,
) -> Budget | None:  # fmt: skip
    """The one that was given, or None. Raises UsageError for two, and for what is no size or share.

    >>> parse_budget(size="4GB"), parse_budget(max_loss="1%")
    (Budget(kind='size', value=4000000000.0), Budget(kind='max-loss', value=0.01))
    """
    given: dict[BudgetKind, float] = {}
    if size is not None:
        given["size"] = float(parse_size(size))
    if bpw is not None:
        given["bpw"] = bpw
    if max_kl is not None:
        given["max-kl"] = max_kl
    if max_loss is not None:
        given["max-loss"] = _share(max_loss)
    if len(given) > 1:
        raise UsageError(f"{' and '.join('--' + kind for kind in given)} exclude each other: give one budget")
    for kind, value in given.items():
        if not (math.isfinite(value) and value > 0):
            raise UsageError(f"--{kind} {value}: give a number above 0")
        return Budget(kind, value)
    return None


def parse_size(text: str | int) -> int:
    """Bytes of "4GB", "3.5 GiB", "700MB" or a plain number of bytes. Raises UsageError.

    >>> parse_size("4GB"), parse_size("1.5KiB")
    (4000000000, 1536)
    """
    match = _SIZE.fullmatch(str(text))
    unit = None if match is None else next((n for n in _UNITS if n.lower() == match[2].lower()), None)
    if match is None or unit is None:
        raise UsageError(f"--size {text}: give a number with a unit, such as 4GB, 3.5GiB or 700MB, or bytes")
    return int(float(match[1]) * _UNITS[unit])


def _share(text: str | float) -> float:
    match = _SHARE.fullmatch(str(text))
    # "1" may mean one per cent, or all of it.
    if match is None or (not match[2] and float(match[1]) >= 1):
        raise UsageError(f"--max-loss {text}: give a share such as 1% or 0.01")
    return float(match[1]) / (100 if match[2] else 1)
