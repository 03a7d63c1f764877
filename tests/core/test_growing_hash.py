"""The hash of a file that is written in pieces is that of its content, whatever the order of the pieces."""

from __future__ import annotations

import hashlib
import itertools
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pennyweight.core.hashing import GrowingHash

CONTENT = bytes(range(256)) * 40


@contextmanager
def growing_file(path: Path, content: bytes = bytes(len(CONTENT))) -> Iterator[tuple[GrowingHash, int]]:
    """A file with `content`, its hash and its descriptor."""
    path.write_bytes(content)
    descriptor = os.open(path, os.O_RDWR)
    growing = GrowingHash(descriptor, path)
    try:
        yield growing, descriptor
    finally:
        growing.close()
        os.close(descriptor)


def put(hash_: GrowingHash, descriptor: int, begin: int, end: int, content: bytes = CONTENT) -> None:
    hash_.written(begin, end)
    os.pwrite(descriptor, content[begin:end], begin)


@given(
    cuts=st.sets(st.integers(1, len(CONTENT) - 1), max_size=8),
    order=st.randoms(use_true_random=False),
    every=st.integers(1, 4),
    again=st.booleans(),
)
def test_pieces_in_any_order(
    tmp_path_factory: pytest.TempPathFactory, cuts: set[int], order: object, every: int, again: bool
) -> None:
    pieces = list(itertools.pairwise([0, *sorted(cuts), len(CONTENT)]))
    order.shuffle(pieces)  # type: ignore[attr-defined]
    with growing_file(tmp_path_factory.mktemp("hash") / "file") as (growing, descriptor):
        for number, (begin, end) in enumerate(pieces, 1):
            put(growing, descriptor, begin, end)
            if number % every == 0:
                growing.advance()
        expected = CONTENT
        if again:
            # A write into what may have been hashed already.
            expected = CONTENT[:3] + b"changed" + CONTENT[10:]
            put(growing, descriptor, 3, 10, expected)
        growing.advance()
        assert growing.hexdigest() == hashlib.sha256(expected).hexdigest()


def test_only_the_finished_beginning_is_read_before_the_end(tmp_path: Path) -> None:
    with growing_file(tmp_path / "file") as (growing, descriptor):
        put(growing, descriptor, 100, len(CONTENT))
        growing.advance()
        # Nothing was hashed yet: what lies before the hole may still come.
        put(growing, descriptor, 0, 100)
        growing.advance()
        assert growing.hexdigest() == hashlib.sha256(CONTENT).hexdigest()


def test_what_an_earlier_run_wrote_is_read_at_the_end(tmp_path: Path) -> None:
    with growing_file(tmp_path / "file", CONTENT) as (growing, descriptor):
        put(growing, descriptor, 5000, 6000)
        growing.advance()
        assert growing.hexdigest() == hashlib.sha256(CONTENT).hexdigest()


def test_a_file_that_lost_what_was_written_is_an_error(tmp_path: Path) -> None:
    with growing_file(tmp_path / "file") as (growing, _):
        growing.written(0, len(CONTENT) + 10)
        growing.advance()
        os.truncate(tmp_path / "file", 10)
        with pytest.raises(OSError, match="ends after"):
            growing.hexdigest()
