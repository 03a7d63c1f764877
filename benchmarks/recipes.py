"""The rows of the quality table: a tool and how it is asked; and the settings in which tools are compared.

A setting adds the same thing to a width for everybody (integer zero points, a float16 offset), so that all of its rows
take the same bytes.
"""

from __future__ import annotations

from dataclasses import dataclass

OURS = "pennyweight"


@dataclass(frozen=True)
class Recipe:
    """One way to quantize.

    tool        OURS, or the name of a peer
    name        of the solver or effort; a peer's runner knows it by this name
    needs_data  it is given the calibration text
    options     what our command is given beside the scheme
    most_bits, least_bits  widths above and below are left out
    """

    tool: str
    name: str
    needs_data: bool
    options: tuple[str, ...] = ()
    most_bits: int = 8
    least_bits: int = 2

    @property
    def is_ours(self) -> bool:
        return self.tool == OURS

    def __str__(self) -> str:
        return f"{self.tool} {self.name}"


NEAREST = Recipe(OURS, "nearest", needs_data=False, options=("--solver", "nearest"))
MINMAX = Recipe(OURS, "nearest, min-max", needs_data=False, options=("--solver", "nearest", "--fit", "minmax"))
PROXIMAL = Recipe(OURS, "hqq", needs_data=False, options=("--solver", "hqq"))
SELF = Recipe(
    OURS, "normal, self-calibrated", needs_data=False, options=("--effort", "normal", "--calibration", "self")
)
GPTQ = Recipe(OURS, "gptq", needs_data=True, options=("--solver", "gptq"))
FAST = Recipe(OURS, "fast", needs_data=True, options=("--effort", "fast"))
NORMAL = Recipe(OURS, "normal", needs_data=True, options=("--effort", "normal"))
# At 8 bits there is nothing left to learn.
BEST = Recipe(OURS, "best", needs_data=True, options=("--effort", "best"), most_bits=4)
RECOVERED = Recipe(OURS, "gptq, recovered", needs_data=True, options=("--solver", "gptq", "--recover"))

PEER_NEAREST = Recipe("llm-compressor", "nearest", needs_data=False)
PEER_GPTQ = Recipe("llm-compressor", "gptq", needs_data=True)
# Below 4 bits it is no better than rounding to nearest, and takes longer than all of ours.
PEER_AWQ = Recipe("llm-compressor", "awq", needs_data=True, least_bits=4)
# It takes longer than all others together, and at 8 bits there is nothing to tune.
AUTO_ROUND = Recipe("auto-round", "auto-round", needs_data=True, most_bits=4)
HQQ = Recipe("hqq", "hqq", needs_data=False)
HQQ_MINMAX = Recipe("hqq", "minmax", needs_data=False)

# Those that are first compared with nearest come after it.
_CALIBRATED = (NEAREST, FAST, NORMAL, BEST, PEER_NEAREST, PEER_GPTQ, PEER_AWQ, AUTO_ROUND)


@dataclass(frozen=True)
class Setting:
    """What is the same for all rows of a table.

    ours_suffix, peer_suffix  what a width's name (int4-g128) gets in our scheme names and in those of the runners
    baseline                  the row of ours that others of ours are compared with, in pairs
    is_dense                  no runtime of ours reads these schemes: artefacts are judged decoded
    """

    name: str
    title: str
    recipes: tuple[Recipe, ...]
    baseline: Recipe
    ours_suffix: str = ""
    peer_suffix: str = ""
    is_dense: bool = False

    def scheme(self, width: str, recipe: Recipe) -> str:
        return width + (self.ours_suffix if recipe.is_ours else self.peer_suffix)


SETTINGS = {
    setting.name: setting
    for setting in (
        Setting("symmetric", "symmetric, scales in the model's type", _CALIBRATED, NEAREST),
        Setting(
            "asymmetric",
            "asymmetric, integer zero points, scales in the model's type",
            _CALIBRATED,
            NEAREST,
            ours_suffix="-asym",
            peer_suffix="-asym",
        ),
        Setting(
            "data-free",
            "without data: asymmetric, scale and offset in float16",
            (MINMAX, NEAREST, PROXIMAL, SELF, HQQ_MINMAX, HQQ),
            MINMAX,
            ours_suffix="-offset-f16",
            peer_suffix="-offset",
            is_dense=True,
        ),
        Setting("recovery", "recovery on the same codes, symmetric", (GPTQ, RECOVERED), GPTQ),
        Setting(
            "recovery-offset",
            "recovery on the same codes, asymmetric, scale and offset in float16",
            (GPTQ, RECOVERED),
            GPTQ,
            ours_suffix="-offset-f16",
            is_dense=True,
        ),
    )
}
