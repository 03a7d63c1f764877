"""What the result may take, or lose, as the user says it."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pennyweight.core.errors import UsageError

_UNITS = {"": 1} | {
    f"{letter}{infix}B": base**power
    for power, letter in enumerate("KMGT", start=1)
    for infix, base in (("", 1000), ("i", 1024))
}
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?|\.\d+)\s*([a-zA-Z]*)\s*")
_SHARE = re.compile(r"\s*(\d+(?:\.\d+)?|\.\d+)\s*(%?)\s*")

_POINTS = re.compile(r"\s*(\d+(?:\.\d+)?|\.\d+)\s*")

BudgetKind = Literal["size", "bpw", "max-kl", "max-loss", "max-points"]


@dataclass(frozen=True)
class Budget:
    """kind    what is limited: "size" bytes of the whole output; "bpw" bits of all tensors per weight of the original;
            "max-kl" mean KL to the original in nats a token; "max-loss" relative rise of perplexity; "max-points"
            points of the metric of a task
    value   the limit
    task    the file of that task
    """

    kind: BudgetKind
    value: float
    task: Path | None = None

    @property
    def is_of_loss(self) -> bool:
        """It can only be kept by looking at results."""
        return self.kind in ("max-kl", "max-loss", "max-points")

    def __str__(self) -> str:
        match self.kind:
            case "size":
                return f"--size {self.value:.0f} bytes"
            case "max-loss":
                return f"--max-loss {100 * self.value:g}%"
            case "max-points":
                return f"--max-loss {self.value:g} --task {self.task.name if self.task else ''}"
            case _:
                return f"--{self.kind} {self.value:g}"


def parse_budget(
    *, size: str | int | None = None, bpw: float | None = None, max_kl: float | None = None,
    max_loss: str | float | None = None, task: str | Path | None = None,
) -> Budget | None:  # fmt: skip
    """The one that was given, or None. `max_loss` is a share of perplexity, or with the file of a `task` points of its
    metric. Raises UsageError for two budgets, and for what is no size, share or number of points.

    >>> str(parse_budget(size="4GB")), str(parse_budget(max_loss="1%")), str(parse_budget(max_loss=0.5, task="a.jsonl"))
    ('--size 4000000000 bytes', '--max-loss 1%', '--max-loss 0.5 --task a.jsonl')
    """
    given: dict[BudgetKind, float] = {}
    if size is not None:
        given["size"] = float(parse_size(size))
    if bpw is not None:
        given["bpw"] = bpw
    if max_kl is not None:
        given["max-kl"] = max_kl
    if task is not None and max_loss is None:
        raise UsageError(f"--task {task}: say with --max-loss how many points of its metric may be lost")
    if max_loss is not None:
        given["max-loss" if task is None else "max-points"] = _share(max_loss) if task is None else _points(max_loss)
    if len(given) > 1:
        raise UsageError(f"{' and '.join(_option(kind) for kind in given)} exclude each other: give one budget")
    for kind, value in given.items():
        if not (math.isfinite(value) and value > 0):
            raise UsageError(f"{_option(kind)} {value}: give a number above 0")
        return Budget(kind, value, Path(task) if task is not None else None)
    return None


def _option(kind: BudgetKind) -> str:
    return "--max-loss" if kind == "max-points" else f"--{kind}"


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


def _points(text: str | float) -> float:
    match = _POINTS.fullmatch(str(text))
    if match is None:
        why = ": a percentage would be read as a share of the metric or as points" if "%" in str(text) else ""
        raise UsageError(f"--max-loss {text} with --task{why}: give points of the task's metric, such as 0.5")
    return float(match[1])
