"""Pennyweight turns a trained model into the best smaller one that fits, in the file that its runtime reads.

Importing it costs nothing: torch and transformers are imported by the first attribute that needs them.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pennyweight import train
    from pennyweight.evaluate.converted import convert
    from pennyweight.evaluate.network.quantize import quantize_module
    from pennyweight.evaluate.network.saved import save_module
    from pennyweight.evaluate.proved import quantize
    from pennyweight.evaluate.speed.bench import bench
    from pennyweight.evaluate.verify import verify
    from pennyweight.inference.load import load
    from pennyweight.pipeline.imatrix import imatrix

__all__ = [
    "__version__", "bench", "convert", "imatrix", "load", "quantize", "quantize_module", "save_module", "train",
    "verify",
]  # fmt: skip
__version__ = "0.1.0"

# Public name -> module that defines it.
_LAZY = {
    "bench": "pennyweight.evaluate.speed.bench",
    "convert": "pennyweight.evaluate.converted",
    "imatrix": "pennyweight.pipeline.imatrix",
    "load": "pennyweight.inference.load",
    "quantize": "pennyweight.evaluate.proved",
    "quantize_module": "pennyweight.evaluate.network.quantize",
    "save_module": "pennyweight.evaluate.network.saved",
    "verify": "pennyweight.evaluate.verify",
}


def __getattr__(name: str) -> Any:
    if name == "train":
        # What learns by gradients, under names of its own.
        return importlib.import_module("pennyweight.train")
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_LAZY[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY, "train"})
