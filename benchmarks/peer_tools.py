"""The tools we compare with, each run in an environment of its own (`make peers`); results are kept by content.

A peer has a package benchmarks/peers/NAME with `run.py` and `requirements.txt`, run by the Python of .venvs/TOOL.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import shutil
import subprocess
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.processes import CommandError, Measured, measure
from benchmarks.results_file import ROOT, cache

_VERSIONS = """
import importlib.metadata, json, sys
print(json.dumps({name: importlib.metadata.version(name) for name in sys.argv[1:]}))
"""


class RefusedError(CommandError):
    """The peer does not take this model or this scheme; the message is its own."""


@dataclass(frozen=True)
class PeerRun:
    """What a peer made, and what its whole process took; `said` is the answer of the runner.

    `said["refused"]` is its message where it made nothing.
    """

    artefact: Path
    seconds: float
    cpu_seconds: float
    peak_memory_bytes: int
    said: dict[str, Any]


@dataclass(frozen=True)
class Peer:
    """tool: its name, and that of its environment. package: of its runner. depends_on: what its results depend on.
    program: module of the runner. takes_lengths: whether windows may be of several lengths."""

    tool: str
    package: str
    depends_on: tuple[str, ...]
    program: str = "run"
    takes_lengths: bool = True

    @property
    def python(self) -> Path:
        return ROOT / ".venvs" / self.tool / "bin" / "python"

    @property
    def runner(self) -> Path:
        return ROOT / "benchmarks" / "peers" / self.package / f"{self.program}.py"

    def why_not(self) -> str | None:
        """Why the peer cannot be run here, or None."""
        return None if self.python.exists() else f"the environment of {self.tool} is not there: make peers"

    def versions(self) -> dict[str, str]:
        """Versions of what the peer's results depend on."""
        return _versions(self)

    def run(self, model: Path, out: Path, *, scheme: str, solver: str, tokens: Path | None) -> Measured:
        """Quantize `model` into `out` with the peer's defaults, on the calibration `tokens` where the solver takes any.

        Raises RefusedError where the peer does not take the model or the scheme.
        """
        done = self._run(model, out, scheme=scheme, solver=solver, tokens=tokens)
        if refused := said(done).get("refused"):
            raise RefusedError(f"{self.tool} {solver} {scheme}: {refused}")
        return done

    def quantized(self, model: Path, *, scheme: str, solver: str, tokens: Path | None) -> PeerRun:
        """The peer's result for this content, made now or taken from benchmarks/.cache/TOOL; a refusal is one too."""
        place = self._place(model, scheme=scheme, solver=solver, tokens=tokens)
        record = place / "run.json"
        if not record.exists():
            shutil.rmtree(place, ignore_errors=True)
            place.mkdir(parents=True)
            done = self._run(model, place / "artefact", scheme=scheme, solver=solver, tokens=tokens)
            figures = asdict(done)
            del figures["stdout"]
            record.write_text(json.dumps({**figures, "said": said(done)}, indent=2) + "\n", encoding="utf-8")
        return PeerRun(place / "artefact", **json.loads(record.read_text(encoding="utf-8")))

    def is_kept(self, model: Path, *, scheme: str, solver: str, tokens: Path | None) -> bool:
        """Whether `quantized` would answer at once."""
        return (self._place(model, scheme=scheme, solver=solver, tokens=tokens) / "run.json").exists()

    def _run(self, model: Path, out: Path, *, scheme: str, solver: str, tokens: Path | None) -> Measured:
        command = [self.python, "-m", f"benchmarks.peers.{self.package}.{self.program}", model, out]
        command += ["--scheme", scheme, "--solver", solver]
        if tokens is not None:
            command += ["--tokens", tokens]
        return measure(command, environment={**os.environ, "PYTHONPATH": str(ROOT)})

    def _place(self, model: Path, *, scheme: str, solver: str, tokens: Path | None) -> Path:
        files = sorted(
            {*model.glob("*.safetensors"), *model.glob("*.json"), self.runner, *([tokens] if tokens else [])}
        )
        parts = [hashlib.sha256(file.read_bytes()).hexdigest() for file in files]
        text = json.dumps([parts, scheme, solver, self.versions()])
        return cache(self.tool) / hashlib.sha256(text.encode()).hexdigest()[:16]


@functools.cache
def _versions(peer: Peer) -> dict[str, str]:
    command = [str(peer.python), "-I", "-c", _VERSIONS, *peer.depends_on]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found: dict[str, str] = json.loads(done.stdout)
    return found


def said(done: Measured) -> dict[str, Any]:
    """The answer of a runner: the last line that it printed."""
    answer: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return answer


LLM_COMPRESSOR = Peer(
    "llm-compressor", "llm_compressor", ("llmcompressor", "compressed-tensors", "transformers", "torch")
)
AUTO_ROUND = Peer("auto-round", "auto_round", ("auto-round", "transformers", "torch"), takes_lengths=False)
# Its plans, which have average bits in place of a scheme; no tool of the quality table.
AUTO_SCHEME = Peer("auto-round", "auto_round", AUTO_ROUND.depends_on, program="scheme", takes_lengths=False)
HQQ = Peer("hqq", "hqq", ("hqq", "transformers", "torch"))
PEERS = {peer.tool: peer for peer in (LLM_COMPRESSOR, AUTO_ROUND, HQQ)}
