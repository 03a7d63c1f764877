"""What can go wrong, as a tree; every class also derives from the builtin that a caller would expect.

PennyweightError
├── UsageError (ValueError)          an option, a name or a combination that is not allowed
│   └── BudgetError                  a size below that of the smallest plan
├── ShapeError (ValueError)          a tensor whose shape does not fit
├── WeightError (ValueError)         NaN or infinity in a weight
├── NotPositiveDefiniteError (ArithmeticError)   a Hessian that cannot be factorised
├── ModelError (ValueError)          a directory that is not a model we can quantize
│   └── CheckpointError              a weight file that is damaged, incomplete or of an unknown kind
├── DataError (ValueError)           calibration or evaluation text that cannot be used
├── ContainerError (ValueError)      a plan that the container cannot hold
├── SpaceError (OSError)             not enough room on the disk
├── TrainingError (ArithmeticError)  a loss that is not finite
├── VerificationError (RuntimeError) the runtime and our own decoding disagree
└── MissingExtraError (ImportError)  an optional dependency that is not installed
"""

from __future__ import annotations

import importlib
from typing import Any


class PennyweightError(Exception):
    """Base of all errors that Pennyweight raises on purpose; its text says what was given, allowed and what to do."""


class UsageError(PennyweightError, ValueError):
    pass


class BudgetError(UsageError):
    """`asked` and `smallest` are bytes; `advice` says what would make smaller plans possible."""

    def __init__(self, asked: int, smallest: int, advice: str = "") -> None:
        super().__init__(asked, smallest, advice)
        self.asked, self.smallest, self.advice = asked, smallest, advice

    def __str__(self) -> str:
        text = (
            f"{self.asked:,} bytes can't be reached with these constraints: "
            f"the smallest plan takes {self.smallest:,} bytes"
        )
        return f"{text}; {self.advice}" if self.advice else text


class ShapeError(PennyweightError, ValueError):
    pass


class WeightError(PennyweightError, ValueError):
    pass


class NotPositiveDefiniteError(PennyweightError, ArithmeticError):
    pass


class ModelError(PennyweightError, ValueError):
    pass


class CheckpointError(ModelError):
    pass


class DataError(PennyweightError, ValueError):
    pass


class ContainerError(PennyweightError, ValueError):
    pass


class SpaceError(PennyweightError, OSError):
    pass


class TrainingError(PennyweightError, ArithmeticError):
    pass


class VerificationError(PennyweightError, RuntimeError):
    pass


class MissingExtraError(PennyweightError, ImportError):
    pass


def require(module: str, *, extra: str) -> Any:
    """Import an optional dependency, or raise MissingExtraError with the pip command that brings it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise MissingExtraError(f"{module} is needed here: pip install 'pennyweight[{extra}]'") from error


_KILL, _ILLEGAL_INSTRUCTION = 9, 4
_CAUSES = {
    _KILL: "probably for lack of memory",
    _ILLEGAL_INSTRUCTION: (
        "its library is built for another processor, or by a compiler that got this one's instructions wrong: build it "
        "again on this machine (llama-cpp-python with gcc 12 on a processor with AMX: set CFLAGS and CXXFLAGS to "
        "'-mno-amx-tile -mno-amx-int8 -mno-amx-bf16' first)"
    ),
}


def killed_by(number: int) -> str:
    """That a process was killed by the signal of that number, and what is most probably behind it."""
    return f"killed by signal {number}, {_CAUSES.get(number, 'a fault in the runtime')}"


def first_line(error: BaseException) -> str:
    """What a library says first in its error; the error's kind where it says nothing."""
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
