"""What each site may be stored as: the schemes that the target takes for it, and the sites that must share one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from pennyweight.plan.overrides import Decided
from pennyweight.plan.uniform import StandIns, WhyNot, finer, fitting
from pennyweight.schemes import PerGroup, Scheme, parse_scheme

# About half a bit apart, with small groups where the codes have few bits: there scales earn their place.
INTEGERS = (
    "int2-g128", "int2-g64", "int2-g32", "int3-g128", "int3-g64", "int3-g32",
    "int4-g128", "int4-g64", "int4-g32", "int5-g128", "int6-g128", "int8-g128",
)  # fmt: skip
# A set of sites with this share of all weights moves the size in steps that the others cannot fill.
_LARGE = 0.1
_FINE_GROUPS = (512, 384, 256, 192, 128, 96, 64, 48, 32, 24, 16)


@dataclass(frozen=True)
class Candidates:
    """Sites that share a scheme, and the schemes that they may share; None keeps them in float."""

    sites: tuple[str, ...]
    schemes: tuple[Scheme | None, ...]


def candidates(
    shapes: Mapping[str, tuple[int, int]],
    *,
    fused: Iterable[Sequence[str]],
    decided: Mapping[str, Decided],
    finish: Callable[[Scheme], Scheme],
    why_not: WhyNot,
    alphabet: Sequence[str] = INTEGERS,
    stand_ins: StandIns = finer,
) -> list[Candidates]:
    """For each set of sites that must share a scheme all that the target takes, in the order of `shapes`.

    shapes    site name -> [out, in]
    fused     sets that must share a scheme; they may overlap
    decided   what is left to no choice
    finish    what is said of every scheme: the type of its scales
    why_not   of the target, for one site
    alphabet  names of the schemes to choose from; `stand_ins` where one of them does not fit
    """
    total = sum(out * inputs for out, inputs in shapes.values())
    found = []
    for sites in _sets(list(shapes), fused):
        if sites[0] in decided:
            found.append(Candidates(sites, (decided[sites[0]].scheme,)))
            continue
        weights = sum(shapes[site][0] * shapes[site][1] for site in sites)
        is_large = len(sites) > 1 and weights > _LARGE * total
        schemes = (finish(scheme) for scheme in _alphabet(alphabet, is_large))
        taken = dict.fromkeys(
            scheme for wanted in schemes if (scheme := _shared(sites, shapes, wanted, why_not, stand_ins)) is not None
        )
        found.append(Candidates(sites, (*taken, None)))
    return found


def _alphabet(names: Sequence[str], is_large: bool) -> Iterator[Scheme]:
    yield from (parse_scheme(name) for name in names)
    if is_large:
        for bits in range(2, 9):
            plain = parse_scheme(f"int{bits}-channel")
            yield plain
            yield from (plain.with_granularity(PerGroup(size)) for size in _FINE_GROUPS)


def _shared(
    sites: Sequence[str],
    shapes: Mapping[str, tuple[int, int]],
    wanted: Scheme,
    why_not: WhyNot,
    stand_ins: StandIns,
) -> Scheme | None:
    """`wanted`, fitted to the first site, if all others take it too."""
    scheme = fitting(sites[0], shapes[sites[0]], wanted, why_not, stand_ins).scheme
    if scheme is None or any(not _takes(site, shapes[site], scheme, why_not) for site in sites[1:]):
        return None
    return scheme


def _takes(site: str, shape: tuple[int, int], scheme: Scheme, why_not: WhyNot) -> bool:
    divides = not isinstance(scheme.granularity, PerGroup) or shape[1] % scheme.granularity.size == 0
    return divides and why_not(scheme, site) is None


def _sets(sites: Sequence[str], fused: Iterable[Sequence[str]]) -> list[tuple[str, ...]]:
    """All sites in disjoint sets, in order: `fused` ones that overlap are one."""
    belongs = {site: [site] for site in sites}
    for members in fused:
        together = list(dict.fromkeys(site for member in members for site in belongs[member]))
        belongs.update(dict.fromkeys(together, together))
    order = {site: place for place, site in enumerate(sites)}
    unique = {id(members): members for members in belongs.values()}
    return sorted(
        (tuple(sorted(members, key=order.__getitem__)) for members in unique.values()), key=lambda m: order[m[0]]
    )
