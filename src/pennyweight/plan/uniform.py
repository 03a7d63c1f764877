"""The simplest plan: one scheme for every site, and what to do where it does not fit."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from pennyweight.plan.plan import Plan
from pennyweight.schemes import PerChannel, PerGroup, Scheme

WhyNot = Callable[[Scheme, str], str | None]
# Given a scheme that does not fit, and the inputs of a site: what to try in its place, the best first.
StandIns = Callable[[Scheme, int], Sequence[Scheme]]


@dataclass(frozen=True)
class Fitted:
    scheme: Scheme | None
    reason: str = ""


def finer(scheme: Scheme, inputs: int) -> list[Scheme]:
    """The same number format in smaller groups, the largest first; at last one scale per channel."""

    def sizes() -> Iterator[int]:
        if isinstance(scheme.granularity, PerGroup):
            size = scheme.granularity.size
            yield from (smaller for smaller in range(min(size, inputs), 1, -1) if smaller != size)

    groups = [scheme.with_granularity(PerGroup(size)) for size in sizes() if inputs % size == 0]
    return [*groups, scheme.with_granularity(PerChannel())]


def uniform_plan(
    shapes: Mapping[str, tuple[int, int]], scheme: Scheme, why_not: WhyNot, stand_ins: StandIns = finer
) -> Plan:
    """`scheme` for every site of `shapes` (name -> [out, in]).

    Where the group size does not divide the inputs, or the target refuses it: the first of its `stand_ins` that
    `why_not(scheme, site)` accepts; if there is none, the site is kept in float. Every departure is recorded with its
    reason.
    """
    schemes: dict[str, Scheme] = {}
    kept: dict[str, str] = {}
    changed: dict[str, str] = {}
    for name, shape in shapes.items():
        choice = fitting(name, shape, scheme, why_not, stand_ins)
        if choice.scheme is None:
            kept[name] = choice.reason
            continue
        schemes[name] = choice.scheme
        if choice.scheme != scheme:
            changed[name] = f"{choice.scheme} in place of {scheme}: {choice.reason}"
    return Plan(schemes, kept, changed)


def fitting(name: str, shape: tuple[int, int], scheme: Scheme, why_not: WhyNot, stand_ins: StandIns = finer) -> Fitted:
    refusal = _refusal(name, shape, scheme, why_not)
    if refusal is None:
        return Fitted(scheme)
    last = refusal
    for other in stand_ins(scheme, shape[1]):
        reason = why_not(other, name)
        if reason is None:
            return Fitted(other, refusal)
        last = reason
    return Fitted(None, refusal if last == refusal else f"{refusal}; {last}")


def _refusal(name: str, shape: tuple[int, int], scheme: Scheme, why_not: WhyNot) -> str | None:
    if isinstance(scheme.granularity, PerGroup) and shape[1] % scheme.granularity.size:
        return f"groups of {scheme.granularity.size} do not divide {shape[1]} inputs"
    return why_not(scheme, name)
