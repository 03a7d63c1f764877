"""What may be said about how a network is prepared, and how it is trained."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch

from pennyweight.core.errors import UsageError
from pennyweight.train.qat.groups import OptimizerName
from pennyweight.train.qat.objective import Objective

# Where the scales of weights start: by the project's search of the least squared error, from the largest weight, or
# as LSQ does, 2 mean|w| / sqrt(p).
WeightStart = Literal["search", "minmax", "lsq"]


@dataclass(frozen=True)
class QatOptions:
    """ends      scheme of the first and the last site, "int8-channel" for example; None: as all others
    start     where the scales of weights start
    history   follow how often each code turns back: needed to freeze oscillating weights; 13 bytes a weight
    """

    ends: str | None = None
    start: WeightStart = "search"
    history: bool = True


@dataclass(frozen=True)
class FitOptions:
    """optimizer     SGD with Nesterov's momentum, or AdamW
    rate          the highest learning rate; None: 0.02 with SGD and 0.001 with AdamW
    decay         of weights; None: 1e-4 with SGD and 0.01 with AdamW, half of that at 3 bits and a quarter at 2
    momentum      of SGD
    warm_up       share of the steps over which the rate rises from 0; from there it falls to 0 as a cosine
    frozen_norms  share of the steps, at the end, in which the statistics of batch norms stand still; while the rate is
                  high nothing but these statistics keeps a network in its range
    dampening     the factor of the dampening loss at the end, to which it rises from 0 as a cosine; 0 for none
    freezing      the frequencies of turns above which codes are frozen, at the start and at the end; None for never
    objective     what is made small
    accumulate    batches of the loader for one step
    autocast      float type of the forward pass; None for that of the network
    checks        how often the held-out data are asked, an epoch
    save_every    steps between checkpoints, beside those at the end of each epoch; None for no others
    seed          of shuffling, augmentation and dropout
    """

    optimizer: OptimizerName = "sgd"
    rate: float | None = None
    decay: float | None = None
    momentum: float = 0.9
    warm_up: float = 0.05
    frozen_norms: float = 0.1
    dampening: float = 0.0
    freezing: tuple[float, float] | None = None
    objective: Objective = field(default_factory=Objective)
    accumulate: int = 1
    autocast: torch.dtype | None = None
    checks: int = 1
    save_every: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        shares = {"warm_up": self.warm_up, "frozen_norms": self.frozen_norms}
        for name, share in shares.items():
            if not 0 <= share <= 1:
                raise UsageError(f"{name}={share}: it is a share of the steps, from 0 to 1")
        for name, count in {"accumulate": self.accumulate, "checks": self.checks}.items():
            if count < 1:
                raise UsageError(f"{name}={count}: give 1 or more")

    def rate_at(self, bits: int) -> float:
        return self.rate if self.rate is not None else {"sgd": 0.02, "adamw": 1e-3}[self.optimizer]

    def decay_at(self, bits: int) -> float:
        """Esser et al., section 2.3: the fewer the bits, the less the network can overfit."""
        if self.decay is not None:
            return self.decay
        return {"sgd": 1e-4, "adamw": 1e-2}[self.optimizer] * {2: 0.25, 3: 0.5}.get(bits, 1.0)
