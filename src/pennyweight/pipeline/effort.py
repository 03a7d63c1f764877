"""How much time a run may take, and which solvers that buys: `docs/effort.md` has the measurements behind the table."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Effort = Literal["fast", "normal", "best"]


@dataclass(frozen=True)
class Steps:
    """The names of what chooses codes, one after the other; "none" leaves a step out.

    transform   of each block before it is solved
    solver      of single sites
    staged      whether each site is calibrated behind the quantized ones before it in its block
    refine      of whole blocks
    recover     whether scales and norms are trained end to end at last
    """

    solver: str
    refine: str = "none"
    recover: bool = False
    transform: str = "none"
    staged: bool = False


# Without data nothing can be seen of the model but its weights, whatever the effort.
_WITHOUT_DATA = Steps("nearest")
_STEPS: dict[Effort, Steps] = {
    "fast": Steps("gptq"),
    "normal": Steps("qronos", staged=True),
    "best": Steps("qronos", staged=True, refine="sigmoid", recover=True),
}


def steps_of(effort: Effort, *, has_data: bool) -> Steps:
    """What `effort` does."""
    return _STEPS[effort] if has_data else _WITHOUT_DATA
