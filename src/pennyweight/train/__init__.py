"""What is learnt by gradients: quantization-aware training, and recovery by distillation with codes frozen.

Importing it costs nothing: torch is imported by the first attribute that needs it.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pennyweight.train.qat.finish import finish
    from pennyweight.train.qat.fit import fit
    from pennyweight.train.qat.groups import parameter_groups
    from pennyweight.train.qat.norms import freeze_norms, reestimate_norms
    from pennyweight.train.qat.objective import Objective
    from pennyweight.train.qat.options import FitOptions, QatOptions
    from pennyweight.train.qat.oscillation import dampening, follow_codes
    from pennyweight.train.qat.prepare import prepare

__all__ = [
    "FitOptions",
    "Objective",
    "QatOptions",
    "dampening",
    "finish",
    "fit",
    "follow_codes",
    "freeze_norms",
    "parameter_groups",
    "prepare",
    "reestimate_norms",
]

# Public name -> module that defines it.
_LAZY = {
    "FitOptions": "pennyweight.train.qat.options",
    "Objective": "pennyweight.train.qat.objective",
    "QatOptions": "pennyweight.train.qat.options",
    "dampening": "pennyweight.train.qat.oscillation",
    "finish": "pennyweight.train.qat.finish",
    "fit": "pennyweight.train.qat.fit",
    "follow_codes": "pennyweight.train.qat.oscillation",
    "freeze_norms": "pennyweight.train.qat.norms",
    "parameter_groups": "pennyweight.train.qat.groups",
    "prepare": "pennyweight.train.qat.prepare",
    "reestimate_norms": "pennyweight.train.qat.norms",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_LAZY[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})
