"""The native library: loaded if it was built, left out if the user says so.

PENNYWEIGHT_KERNELS=auto     the native library if it is there (the default)
PENNYWEIGHT_KERNELS=native   the native library, or an error
PENNYWEIGHT_KERNELS=amx, avx512bf16, avx512vnni, avx512, avx2vnni, avx2, neon or scalar   the native library with these
                             kernels, or an error
PENNYWEIGHT_KERNELS=torch    the plain torch versions only
"""

from __future__ import annotations

import importlib
import os
from functools import cache
from types import ModuleType

import torch
from torch import Tensor

from pennyweight.core.errors import MissingExtraError, UsageError
from pennyweight.formats import NumberFormat
from pennyweight.formats.integer import Int

# The numbers that csrc/kernels.h gives to the types in which scales are stored.
STORED = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
# Where it takes tables the native library goes through all values of one for each weight.
_BITS_OF_TABLES = 4
VARIABLE = "PENNYWEIGHT_KERNELS"
_TABLES = ("amx", "avx512bf16", "avx512vnni", "avx512", "avx2vnni", "avx2", "neon", "scalar")
_CHOICES = ("auto", "native", *_TABLES, "torch")


def native() -> ModuleType | None:
    """The module `pennyweight._native`, or None where it was not built or PENNYWEIGHT_KERNELS is "torch".

    Raises UsageError for any other value than those above, and MissingExtraError where the library is asked for
    and is not there.
    """
    return _loaded(os.environ.get(VARIABLE) or "auto")


@cache
def _loaded(choice: str) -> ModuleType | None:
    if choice not in _CHOICES:
        raise UsageError(f"{VARIABLE}={choice} is not one of {', '.join(_CHOICES)}: correct it or unset it")
    if choice == "torch":
        return None
    try:
        return importlib.import_module("pennyweight._native")
    except ImportError as error:
        if choice != "auto":
            raise MissingExtraError(
                f"{VARIABLE}={choice}, but the native library was not built or does not load: {error}. "
                f"Install Pennyweight again with a C++17 compiler, or set {VARIABLE}=auto"
            ) from error
        return None


def kernel_table() -> str | None:
    """The native kernels in use: those that PENNYWEIGHT_KERNELS names, else the best that the processor can run; None
    without the native library. Raises UsageError where the processor cannot run those that are named."""
    in_use = library_and_table()
    return None if in_use is None else in_use[1]


def library_and_table() -> tuple[ModuleType, str] | None:
    """`native()` and `kernel_table()` at once, or None without the library: for products, which ask each time."""
    return _chosen(os.environ.get(VARIABLE) or "auto")


@cache
def _chosen(choice: str) -> tuple[ModuleType, str] | None:
    library = _loaded(choice)
    if library is None:
        return None
    there: list[str] = library.kernel_tables()
    if choice not in _TABLES:
        return library, there[0]
    if choice not in there:
        raise UsageError(f"{VARIABLE}={choice}: this processor has {', '.join(there)}: name one of these, or auto")
    return library, choice


def forget() -> None:
    """Look for the library again when it is next asked for."""
    _loaded.cache_clear()
    _chosen.cache_clear()


def multiplies_bfloat16() -> bool:
    """Whether the kernels in use have products of bfloat16."""
    return kernel_table() == "avx512bf16"


def as_stored(w: Tensor) -> Tensor:
    """`w` as the kernels over groups take it: bfloat16 by its bits, float32 as it is, anything else as float32."""
    return w.view(torch.uint16) if w.dtype == torch.bfloat16 else w.float()


@cache
def table_of(element: NumberFormat) -> Tensor:
    """float32 [2, count]: the values that `element` emits, rising, and for each but the last the largest float32 that
    goes to it (the last column of that row stands for nothing)."""
    values = element.decode(torch.arange(2**element.bits, dtype=torch.uint8))
    values = values[values.isfinite() & (values >= element.smallest) & (values <= element.largest)].unique()  # type: ignore[no-untyped-call]
    middles = ((values[:-1].double() + values[1:].double()) / 2).float()
    goes_up = element.nearest(middles) > values[:-1]
    thresholds = torch.where(goes_up, torch.nextafter(middles, torch.full_like(middles, -torch.inf)), middles)
    return torch.stack([values, torch.cat([thresholds, values[-1:]])])


def has_kernels(x: Tensor, element: NumberFormat, *, tables: bool = False) -> bool:
    """Whether the native kernels take `x` and this number format: integers, and for those that take `tables` formats of
    few values too, in the processor's memory."""
    is_taken = isinstance(element, Int) or (tables and element.bits <= _BITS_OF_TABLES)
    return is_taken and x.device.type == "cpu" and native() is not None
