"""What Pennyweight has to reach, as ratios of losses, and whether it does.

A ratio of at most r holds where the mean over windows of (ours - r x the other's) is not above zero; its standard
error, from the same windows, says by how much.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from benchmarks import recipes
from benchmarks.judges import Score, paired
from benchmarks.recipes import Recipe

# (setting, width, recipe) -> what the judge found
Scores = Mapping[tuple[str, str, Recipe], Score]


@dataclass(frozen=True)
class Target:
    """The loss of `ours` is to be at most `ratio` times that of `other`."""

    setting: str
    width: str
    ours: Recipe
    other: Recipe
    ratio: float


@dataclass(frozen=True)
class Finding:
    """A target, the ratio that was measured, and mean and standard error of (ours - asked x other); None: a row is
    missing."""

    target: Target
    measured: float | None
    margin: tuple[float, float] | None

    @property
    def holds(self) -> bool:
        return self.margin is not None and self.margin[0] <= 0


_WIDTHS = ("int4-g128", "int3-g128", "int2-g64")
# ours, other: the ratio at each of the widths, None where nothing is asked
_CALIBRATED: dict[tuple[Recipe, Recipe], Sequence[float | None]] = {
    (recipes.NORMAL, recipes.PEER_GPTQ): (0.8, 0.75, 0.7),
    (recipes.NORMAL, recipes.PEER_AWQ): (0.75, None, None),
    (recipes.NORMAL, recipes.AUTO_ROUND): (0.95, 0.95, 0.9),
    (recipes.BEST, recipes.PEER_GPTQ): (0.6, 0.55, 0.4),
    (recipes.BEST, recipes.AUTO_ROUND): (0.75, 0.75, 0.7),
}
_DATA_FREE: dict[tuple[Recipe, Recipe], float] = {
    (recipes.SELF, recipes.HQQ): 0.9,
    (recipes.SELF, recipes.HQQ_MINMAX): 0.7,
}
_RECOVERY = {
    "recovery-offset": (recipes.RECOVERED, {"int4-g32": 0.8, "int3-g32": 0.75, "int2-g32": 0.7}),
    "recovery": (recipes.RECOVERED, {"int4-g128": 0.92, "int3-g128": 0.88, "int2-g128": 0.85}),
}


def _targets() -> Iterator[Target]:
    for setting in ("symmetric", "asymmetric"):
        for (ours, other), ratios in _CALIBRATED.items():
            for width, ratio in zip(_WIDTHS, ratios, strict=True):
                if ratio is not None:
                    yield Target(setting, width, ours, other, ratio)
    for width in ("int4-g64", "int3-g64"):
        for (ours, other), ratio in _DATA_FREE.items():
            yield Target("data-free", width, ours, other, ratio)
    for setting, (recovered, ratio_of) in _RECOVERY.items():
        for width, ratio in ratio_of.items():
            yield Target(setting, width, recovered, recipes.GPTQ, ratio)


# They are about the model that ships.
TARGET_MODEL = "demo"
TARGETS = tuple(_targets())


def findings(scores: Scores) -> list[Finding]:
    """Every target whose setting and width were measured, with what was found."""
    measured = {(setting, width) for setting, width, _ in scores}
    return [_finding(target, scores) for target in TARGETS if (target.setting, target.width) in measured]


def _finding(target: Target, scores: Scores) -> Finding:
    ours = scores.get((target.setting, target.width, target.ours))
    other = scores.get((target.setting, target.width, target.other))
    if ours is None or other is None:
        return Finding(target, None, None)
    ratio = ours.mean_and_error[0] / other.mean_and_error[0]
    return Finding(target, ratio, paired(ours, other, factor=target.ratio))
