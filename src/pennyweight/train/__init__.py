"""What is learnt by gradients: quantization-aware training, and recovery by distillation with codes frozen.

Importing it costs nothing: torch is imported by the first attribute that needs it.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pennyweight.train.qat.finish import finish
    from pennyweight.train.qat.fit import fit
    from pennyweight.train.qat.prepare import prepare

__all__ = ["finish", "fit", "prepare"]

# Public name -> module that defines it.
_LAZY = {
    "finish": "pennyweight.train.qat.finish",
    "fit": "pennyweight.train.qat.fit",
    "prepare": "pennyweight.train.qat.prepare",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_LAZY[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})
