"""The journal of a run: which parts of the output are on disk, in a work directory keyed by the run's inputs."""

from __future__ import annotations

import dataclasses
import fcntl
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

from pennyweight.core.errors import UsageError
from pennyweight.core.files import to_json, write_text
from pennyweight.pipeline.records import Recipe, SiteRecord

NAME = "journal.jsonl"


def work_directory(out: Path, recipe: Recipe, made_with: Mapping[str, str]) -> Path:
    """Where the run that makes `out` from `recipe` works: beside `out`, named by a hash of what shapes it.

    `made_with` are versions, kernels and arithmetic: blocks made in different ways never meet in one output.
    """
    key = hashlib.sha256((to_json(recipe) + to_json(made_with)).encode()).hexdigest()[:12]
    return out.parent / f"{_prefix(out)}{key}"


def other_work_directories(out: Path, own: Path) -> list[str]:
    """Names of what runs with other inputs or another recipe left unfinished beside `out`."""
    found = (path for path in out.parent.iterdir() if path.name.startswith(_prefix(out)) and path.is_dir())
    return sorted(path.name for path in found if path != own)


def _prefix(out: Path) -> str:
    return f".{out.name}.work-"


@contextmanager
def only_writer(directory: Path) -> Iterator[None]:
    """Keeps a second run out of a work directory; raises UsageError where one is in it."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError as error:
        raise UsageError(f"{directory}: another run is making the same output: wait for it, or stop it") from error
    finally:
        os.close(descriptor)


@dataclass
class Journal:
    """Lines of JSON, one for each finished part, each written after the part's bytes are safe on disk.

    finished   part -> the records of its sites
    found      part -> what else it had to say, of parts that had
    """

    path: Path
    finished: dict[str, list[SiteRecord]]
    found: dict[str, dict[str, Any]] = field(default_factory=dict)

    @staticmethod
    def open(directory: Path) -> Journal:
        """The journal of a work directory, empty when it is new; a damaged line and what follows it are dropped."""
        journal = Journal(directory / NAME, {})
        path = journal.path
        if path.exists():
            text, good = path.read_text(encoding="utf-8", errors="replace"), ""
            for line in text.splitlines(keepends=True):
                try:
                    entry = json.loads(line)
                    part, sites = entry["part"], [_site_record(record) for record in entry["sites"]]
                    found = dict(entry.get("found", {}))
                except (ValueError, KeyError, TypeError):
                    break
                if not line.endswith("\n"):
                    break
                good += line
                journal._note(part, sites, found)
            if good != text:
                write_text(path, good)
        return journal

    def _note(self, part: str, sites: list[SiteRecord], found: Mapping[str, Any]) -> None:
        self.finished[part] = sites
        if found:
            self.found[part] = dict(found)

    def add(self, part: str, sites: list[SiteRecord], *, found: Mapping[str, Any] = MappingProxyType({})) -> None:
        """Note that `part` is complete; returns when the note itself is on disk."""
        entry = {"part": part, "sites": [dataclasses.asdict(site) for site in sites], "found": dict(found)}
        line = json.dumps(entry) + "\n"
        with self.path.open("a", encoding="utf-8") as file:
            file.write(line)
            file.flush()
            os.fsync(file.fileno())
        self._note(part, sites, found)

    @property
    def blocks(self) -> int:
        """How many blocks are finished."""
        return sum(part.startswith("block ") for part in self.finished)


def _site_record(entry: dict[str, object]) -> SiteRecord:
    notes = entry.pop("notes")
    if not isinstance(notes, list):
        raise TypeError("notes")
    return SiteRecord(**entry, notes=tuple(notes))  # type: ignore[arg-type]
