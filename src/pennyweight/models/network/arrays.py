"""Batches from a file of arrays."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import torch
from torch import Tensor

from pennyweight.core.errors import DataError
from pennyweight.models.network.batches import LABELS

ARRAY_FILES = (".npz", ".npy", ".safetensors")
_ROWS = 32


def array_batches(path: Path, rows: int = _ROWS) -> Iterator[Any]:
    """The arrays of `path`, samples along the first axis, `rows` of them at a time.

    A batch is a tensor; (inputs, labels) where one of two arrays has a name of LABELS; else a mapping by argument name,
    without labels. Raises DataError for what cannot be read and for arrays of different lengths.
    """
    arrays = _arrays(path)
    lengths = {name: len(array) if array.dim() else 0 for name, array in arrays.items()}
    if len(set(lengths.values())) != 1 or 0 in lengths.values():
        raise DataError(f"{path} has {lengths or 'no array'}: every array needs the same number of rows, 1 or more")
    labels = next((name for name in LABELS if name in arrays), None)
    inputs = [name for name in arrays if name != labels]
    if not inputs:
        raise DataError(f"{path} holds {labels} alone: add the array that the network takes")
    for start in range(0, next(iter(lengths.values())), rows):
        part = {name: array[start : start + rows] for name, array in arrays.items()}
        if len(inputs) > 1:
            yield {name: part[name] for name in inputs}
        else:
            yield part[inputs[0]] if labels is None else (part[inputs[0]], part[labels])


def _arrays(path: Path) -> dict[str, Tensor]:
    import numpy as np
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not path.is_file():
        raise DataError(f"{path} does not exist: give a file of arrays ({', '.join(ARRAY_FILES)})")
    try:
        if path.suffix == ".safetensors":
            return dict(load_file(path))
        with path.open("rb") as file:
            found = np.load(file, allow_pickle=False)
            named = dict(found) if isinstance(found, Mapping) else {"x": found}
        return {name: torch.from_numpy(array) for name, array in named.items()}
    except (ValueError, OSError, EOFError, TypeError, BadZipFile, SafetensorError) as error:
        raise DataError(
            f"{path} cannot be read as arrays ({error}): write it with numpy.savez or safetensors"
        ) from error
