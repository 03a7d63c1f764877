"""llm-compressor, run in its own environment by `peers/llm_compressor/run.py`; results kept by content."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.processes import Measured, measure
from benchmarks.results_file import ROOT, cache

PYTHON = ROOT / ".venvs" / "llm-compressor" / "bin" / "python"
_RUNNER = ROOT / "benchmarks" / "peers" / "llm_compressor" / "run.py"
_VERSIONS = """
import importlib.metadata, json
names = ("llmcompressor", "compressed-tensors", "transformers", "torch")
print(json.dumps({name: importlib.metadata.version(name) for name in names}))
"""


@dataclass(frozen=True)
class PeerRun:
    """What the peer made, and what its whole process took; `said` is the JSON of the runner."""

    artefact: Path
    seconds: float
    cpu_seconds: float
    peak_memory_bytes: int
    said: dict[str, object]


def why_not() -> str | None:
    """Why the peer cannot be run here, or None."""
    return None if PYTHON.exists() else "the environment of llm-compressor is not there: make peers"


def versions() -> dict[str, str]:
    """Versions of what the peer's results depend on."""
    done = subprocess.run([str(PYTHON), "-I", "-c", _VERSIONS], capture_output=True, text=True, check=True)
    found: dict[str, str] = json.loads(done.stdout)
    return found


def run(model: Path, out: Path, *, scheme: str, solver: str, tokens: Path | None) -> Measured:
    """Quantize `model` into `out` with the peer's defaults, on the calibration `tokens` where the solver takes them."""
    command = [PYTHON, _RUNNER, model, out, "--scheme", scheme, "--solver", solver]
    if tokens is not None:
        command += ["--tokens", tokens]
    return measure(command, environment={name: word for name, word in os.environ.items() if name != "PYTHONPATH"})


def quantized(model: Path, *, scheme: str, solver: str, tokens: Path | None) -> PeerRun:
    """The peer's result for this content, made now or taken from benchmarks/.cache/llm-compressor."""
    place = cache("llm-compressor") / _key(model, scheme=scheme, solver=solver, tokens=tokens)
    record = place / "run.json"
    if not record.exists():
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir(parents=True)
        done = run(model, place / "artefact", scheme=scheme, solver=solver, tokens=tokens)
        figures = asdict(done)
        figures["said"] = json.loads(figures.pop("stdout").strip().splitlines()[-1])
        # Paths say nothing about the result.
        figures["said"] = {name: value for name, value in figures["said"].items() if name not in ("model", "out")}
        record.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    return PeerRun(place / "artefact", **json.loads(record.read_text(encoding="utf-8")))


def _key(model: Path, *, scheme: str, solver: str, tokens: Path | None) -> str:
    files = sorted({*model.glob("*.safetensors"), *model.glob("*.json"), _RUNNER, *([tokens] if tokens else [])})
    parts = [hashlib.sha256(file.read_bytes()).hexdigest() for file in files]
    text = json.dumps([parts, scheme, solver, versions()])
    return hashlib.sha256(text.encode()).hexdigest()[:16]
