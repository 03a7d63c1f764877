"""The journal of a run: which parts of the output are already on disk, in a work directory keyed by the run's inputs."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path

from pennyweight.core.files import to_json
from pennyweight.pipeline.records import Recipe, SiteRecord

_NAME = "journal.jsonl"


def work_directory(out: Path, recipe: Recipe, version: str) -> Path:
    """Where the run that makes `out` from `recipe` works: beside `out`, named by a hash of everything that shapes it."""
    key = hashlib.sha256((to_json(recipe) + version).encode()).hexdigest()[:12]
    return out.parent / f".{out.name}.work-{key}"


@dataclass
class Journal:
    """Lines of JSON, one for each finished part, each written after the part's bytes are safe on disk."""

    path: Path
    finished: dict[str, list[SiteRecord]]

    @staticmethod
    def open(directory: Path) -> Journal:
        """The journal of a work directory, empty when it is new; a last line cut short by a crash does not count."""
        path = directory / _NAME
        finished: dict[str, list[SiteRecord]] = {}
        if path.exists():
            good = ""
            for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
                try:
                    entry = json.loads(line)
                except json.JSONDecodeError:
                    break
                if not line.endswith("\n"):
                    break
                good += line
                finished[entry["part"]] = [_site_record(record) for record in entry["sites"]]
            path.write_text(good, encoding="utf-8")
        return Journal(path, finished)

    def add(self, part: str, sites: list[SiteRecord]) -> None:
        """Note that `part` is complete; returns when the note itself is on disk."""
        line = json.dumps({"part": part, "sites": [dataclasses.asdict(site) for site in sites]}) + "\n"
        with self.path.open("a", encoding="utf-8") as file:
            file.write(line)
            file.flush()
            os.fsync(file.fileno())
        self.finished[part] = sites

    def discard(self) -> None:
        """Remove the journal: the output is complete."""
        self.path.unlink(missing_ok=True)


def _site_record(entry: dict[str, object]) -> SiteRecord:
    notes = entry.pop("notes")
    assert isinstance(notes, list)
    return SiteRecord(**entry, notes=tuple(notes))  # type: ignore[arg-type]
