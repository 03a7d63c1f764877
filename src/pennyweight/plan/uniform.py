"""The simplest plan: one scheme for every site, and what to do where it does not fit."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from pennyweight.plan.plan import Plan
from pennyweight.schemes import PerChannel, PerGroup, Scheme

WhyNot = Callable[[Scheme, str], str | None]


@dataclass(frozen=True)
class Fitted:
    scheme: Scheme | None
    reason: str = ""


def uniform_plan(shapes: Mapping[str, tuple[int, int]], scheme: Scheme, why_not: WhyNot) -> Plan:
    """`scheme` for every site of `shapes` (name -> [out, in]).

    Where the group size does not divide the inputs, or the target refuses it: the largest divisor below it that
    `why_not(scheme, site)` accepts; if there is none, one scale per channel; if that is refused too, the site is kept
    in float. Every departure is recorded with its reason.
    """
    schemes: dict[str, Scheme] = {}
    kept: dict[str, str] = {}
    changed: dict[str, str] = {}
    for name, shape in shapes.items():
        choice = fitting(name, shape, scheme, why_not)
        if choice.scheme is None:
            kept[name] = choice.reason
            continue
        schemes[name] = choice.scheme
        if choice.scheme != scheme:
            changed[name] = f"{choice.scheme} in place of {scheme}: {choice.reason}"
    return Plan(schemes, kept, changed)


def fitting(name: str, shape: tuple[int, int], scheme: Scheme, why_not: WhyNot) -> Fitted:
    refusal = _refusal(name, shape, scheme, why_not)
    if refusal is None:
        return Fitted(scheme)
    if isinstance(scheme.granularity, PerGroup):
        for size in range(min(scheme.granularity.size, shape[1]), 1, -1):
            smaller = scheme.with_granularity(PerGroup(size))
            if smaller != scheme and shape[1] % size == 0 and why_not(smaller, name) is None:
                return Fitted(smaller, refusal)
    channel = scheme.with_granularity(PerChannel())
    last = why_not(channel, name)
    if last is None:
        return Fitted(channel, refusal)
    return Fitted(None, refusal if last == refusal else f"{refusal}; {last}")


def _refusal(name: str, shape: tuple[int, int], scheme: Scheme, why_not: WhyNot) -> str | None:
    if isinstance(scheme.granularity, PerGroup) and shape[1] % scheme.granularity.size:
        return f"groups of {scheme.granularity.size} do not divide {shape[1]} inputs"
    return why_not(scheme, name)
