"""What a run reports, and the recipe that repeats it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class CalibrationRecipe:
    """Where the calibration windows came from: `samples` of them, the longest of `length` tokens; whether lengths vary;
    their hash."""

    source: str
    samples: int
    length: int
    varies: bool
    seed: int
    tokens_sha256: str


@dataclass(frozen=True)
class Recipe:
    """Everything needed to repeat a run; stored inside every output.

    plan         the scheme of each site where they were not all given `scheme`
    budget       what chose them
    inputs       hashes of the model's files
    finish       what changed the weights after the solver
    importance   the file that stood in place of calibration
    """

    scheme: str
    plan: Mapping[str, str] | None
    budget: str | None
    effort: str
    rotate: bool
    transform: str
    solver: str
    staged: bool
    refine: str
    recover: bool
    loss_aware: bool
    fit: str
    runtime: str
    container: str
    device: str
    trust_remote_code: bool
    calibration: CalibrationRecipe | None
    inputs: Mapping[str, str]
    finish: str | None = None
    importance: str | None = None


@dataclass(frozen=True)
class SiteRecord:
    """How one site fared.

    error, error_nearest   tr(E H Eᵀ) / tr(W H Wᵀ) of the result, and of rounding to nearest with the same fit of
                           scales; H is the identity without data, diagonal with importances. Over about 64 evenly
                           spaced rows; of a weight that is solved in parts, the mean of the parts' ratios.
    rows                   calibration rows that the site's own Hessian was made of
    """

    name: str
    scheme: str
    error: float
    error_nearest: float
    rows: int
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class BlockDone:
    """Told to the caller after each block."""

    index: int
    total: int
    sites: list[SiteRecord]
    resumed: bool


Tell = Callable[[BlockDone], None]

# What a recipe says in place of a solver where codes were copied from another artefact.
COPIED = "copied"


@dataclass
class RunReport:
    """What `quantize` returns and prints with --json. Sizes in bytes, times in seconds.

    seconds, peak_memory_bytes   without the verification, which has its own in `verification`
    notes                        of the run as a whole
    leftovers                    work directories beside `out` that runs with other inputs or another recipe left
    """

    out: str
    bpw: float
    bpw_sites: float
    sites: int
    kept: dict[str, str]
    changed: dict[str, str]
    fallbacks: dict[str, list[str]]
    notes: list[str] = field(default_factory=list)
    size_bytes: int = 0
    budget_bytes: int | None = None
    seconds: float = 0.0
    peak_memory_bytes: int = 0
    verified: str = "none"
    verification: dict[str, Any] = field(default_factory=dict)
    resumed_blocks: int = 0
    leftovers: list[str] = field(default_factory=list)
