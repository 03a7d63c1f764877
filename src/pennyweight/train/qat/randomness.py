"""Streams of random numbers that can be entered anywhere again."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader


@contextmanager
def kept_randomness() -> Iterator[None]:
    """Afterwards the generators of torch, numpy and Python are where they were."""
    numbers, arrays = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(enabled=True):
        try:
            yield
        finally:
            random.setstate(numbers)
            np.random.set_state(arrays)


def seed_all(seed: int, *places: int) -> int:
    """Start the generators of torch, numpy and Python at a place of the stream `seed`; returns what they got."""
    mixed = int(np.random.SeedSequence([seed, *places]).generate_state(1)[0])
    random.seed(mixed)
    np.random.seed(mixed)
    torch.manual_seed(mixed)
    return mixed


@contextmanager
def own_stream(seed: int, *places: int) -> Iterator[None]:
    """Random numbers of torch inside come from a place of the stream `seed`; those outside do not notice."""
    with torch.random.fork_rng():
        torch.manual_seed(int(np.random.SeedSequence([seed, *places]).generate_state(1)[0]))
        yield


def epoch_of(loader: Iterable[Any], seed: int, *places: int) -> Iterator[Any]:
    """The batches of `loader`, shuffled and changed as a place of the stream `seed` says.

    Its own generator, where it has one, begins anew too. The global generators are left as the loader leaves them.
    """
    mixed = seed_all(seed, *places)
    if isinstance(loader, DataLoader) and loader.generator is not None:
        loader.generator.manual_seed(mixed)
    return iter(loader)
