"""The native library: loaded if it was built, left out if the user says so.

PENNYWEIGHT_KERNELS=auto     the native library if it is there (the default)
PENNYWEIGHT_KERNELS=native   the native library, or an error
PENNYWEIGHT_KERNELS=torch    the plain torch versions only
"""

from __future__ import annotations

import importlib
import os
from types import ModuleType

from pennyweight.core.errors import MissingExtraError, UsageError

VARIABLE = "PENNYWEIGHT_KERNELS"
_CHOICES = ("auto", "native", "torch")


def native() -> ModuleType | None:
    """The module `pennyweight._native`, or None where it was not built or PENNYWEIGHT_KERNELS is "torch".

    Raises UsageError for any other value than those above, and MissingExtraError where "native" is asked for
    and the library is not there.
    """
    choice = os.environ.get(VARIABLE) or "auto"
    if choice not in _CHOICES:
        raise UsageError(f"{VARIABLE}={choice} is not one of {', '.join(_CHOICES)}: correct it or unset it")
    if choice == "torch":
        return None
    try:
        return importlib.import_module("pennyweight._native")
    except ImportError as error:
        if choice == "native":
            raise MissingExtraError(
                f"{VARIABLE}=native, but the native library was not built or does not load: {error}. "
                f"Install Pennyweight again with a C++17 compiler, or set {VARIABLE}=auto"
            ) from error
        return None
