"""Running a contestant as a process of its own, measured whole; what it leaves is kept in benchmarks/.cache by content.

The content is that of the problem, of the sources that do the work and the versions that they depend on. A refusal is
kept too.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.peer_tools import Peer, said
from benchmarks.processes import measure
from benchmarks.results_file import ROOT, cache, project_environment
from benchmarks.vision.contestants import OURS, Contestant
from benchmarks.vision.problem import MODEL_FILE, OUTPUTS_FILE, Problem

_PACKAGE = "vision"
# One environment for all of them.
PEERS = {
    "onnxruntime": Peer(_PACKAGE, _PACKAGE, ("onnxruntime", "onnx")),
    "nncf": Peer(_PACKAGE, _PACKAGE, ("nncf", "onnxruntime", "onnx", "torch")),
    "torchao": Peer(_PACKAGE, _PACKAGE, ("torchao", "torch")),
}
_HERE = ROOT / "benchmarks"
_SHARED = tuple(_HERE / "vision" / name for name in ("problem.py", "training.py"))


@dataclass(frozen=True)
class Artefact:
    """What a contestant left, and what its whole process took; `said` is its answer: `refused` if it made nothing."""

    path: Path
    seconds: float
    cpu_seconds: float
    peak_memory_bytes: int
    said: dict[str, Any]

    @property
    def refused(self) -> str | None:
        return self.said.get("refused")

    @property
    def file(self) -> Path | None:
        """The ONNX file, or None where the tool writes none."""
        file = self.path / MODEL_FILE
        return file if file.exists() else None

    @property
    def size_bytes(self) -> int | None:
        """Bytes of the file and of the data that lie beside it."""
        return sum(one.stat().st_size for one in self.path.glob(f"{MODEL_FILE}*")) if self.file else None

    def outputs(self) -> NDArray[np.float32]:
        """float32 [n, width] of the judged inputs."""
        made: NDArray[np.float32] = np.load(self.path / OUTPUTS_FILE)
        return made


def why_not(tool: str) -> str | None:
    """Why the tool cannot be run here, or None."""
    return None if tool == OURS else PEERS[tool].why_not()


def made(contestant: Contestant, problem: Problem) -> Artefact:
    """What `contestant` makes of `problem`, made now or earlier."""
    place = _place(contestant, problem)
    record = place / "run.json"
    if not record.exists():
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir(parents=True)
        done = measure(_command(contestant, problem, place / "artefact"), environment=_environment(contestant))
        figures = {name: value for name, value in asdict(done).items() if name != "stdout"}
        record.write_text(json.dumps({**figures, "said": said(done)}, indent=2) + "\n", encoding="utf-8")
    return Artefact(place / "artefact", **json.loads(record.read_text(encoding="utf-8")))


def _command(contestant: Contestant, problem: Problem, out: Path) -> list[object]:
    if contestant.is_ours:
        words: list[object] = [sys.executable, "-m", "benchmarks.vision.ours"]
    else:
        words = [PEERS[contestant.tool].python, "-m", f"benchmarks.peers.{_PACKAGE}.run", "--tool", contestant.tool]
    return [*words, "--method", contestant.method, "--scheme", contestant.scheme, problem.path, out]


def _environment(contestant: Contestant) -> dict[str, str]:
    return project_environment() if contestant.is_ours else {**os.environ, "PYTHONPATH": str(ROOT)}


def _place(contestant: Contestant, problem: Problem) -> Path:
    asked = [problem.path.name, contestant.scheme, contestant.tool, contestant.method]
    text = json.dumps([*asked, _sources(contestant.tool), *_versions(contestant.tool)])
    return cache("vision") / f"{contestant}".replace(" ", "-") / hashlib.sha256(text.encode()).hexdigest()[:16]


def _versions(tool: str) -> list[str]:
    if tool == OURS:
        import onnxruntime
        import torch

        return [torch.__version__, onnxruntime.__version__]
    return [json.dumps(PEERS[tool].versions())]


@functools.cache
def _sources(tool: str) -> str:
    """A hash of the code that does the work of `tool`."""
    files: Iterable[Path] = (*_SHARED, _HERE / "peers" / _PACKAGE / f"{tool}_tools.py")
    if tool == OURS:
        files = (*_SHARED, _HERE / "vision" / "ours.py", *sorted((ROOT / "src" / "pennyweight").rglob("*.py")))
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.read_bytes())
    return digest.hexdigest()
