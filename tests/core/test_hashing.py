"""Hashes in the background are those of hashlib."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from pennyweight.core import hashing
from pennyweight.core.hashing import Hashes, sha256


@pytest.mark.parametrize("size", [0, 1, 9, 10, 11, 35])
def test_hashes_are_those_of_the_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    monkeypatch.setattr(hashing, "_READ", 10)
    content = bytes(range(size))
    (tmp_path / "a").write_bytes(content)
    (tmp_path / "b").write_bytes(content + b"more")
    hashes = Hashes([tmp_path / "a"])
    assert hashes.of(tmp_path / "b") == hashlib.sha256(content + b"more").hexdigest()
    assert hashes.of(tmp_path / "a") == sha256(tmp_path / "a") == hashlib.sha256(content).hexdigest()
    hashes.close()


def test_each_file_is_read_once(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"first")
    hashes = Hashes([tmp_path / "a"])
    first = hashes.of(tmp_path / "a")
    (tmp_path / "a").write_bytes(b"other")
    hashes.begin([tmp_path / "a"])
    assert hashes.of(tmp_path / "a") == first
    hashes.close()


def test_a_file_that_is_gone_says_so_where_its_hash_is_asked_for(tmp_path: Path) -> None:
    hashes = Hashes([tmp_path / "gone"])
    with pytest.raises(FileNotFoundError):
        hashes.of(tmp_path / "gone")
    hashes.close()
