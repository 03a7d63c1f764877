"""Proof that an artefact's runtime reads it, and computes with the weights that we meant."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any, Literal

from pennyweight.core.errors import ModelError, VerificationError, killed_by
from pennyweight.core.hashing import sha256
from pennyweight.evaluate.network.directory import is_network_artefact
from pennyweight.models.config_json import read_config_json

Extent = Literal["full", "blocks", "none"]
_TIMEOUT_S = 6 * 3600
# A model card is there to be edited.
_MAY_CHANGE = {"README.md"}


def verify(artefact: Path, *, extent: Extent = "full", trust_remote_code: bool = False) -> dict[str, Any]:
    """Open `artefact` in its runtime in a fresh process and compare it with our own decoding; returns the findings.

    First the files must be the ones that pennyweight.json lists, where there is one. "full" loads the whole model and
    compares logits: in transformers no key may be missing or unexpected, and the difference must be 0 in float32, and
    at most one unit in the last place of the largest logit in a narrower type; for llama.cpp see verify_gguf; a network
    as ONNX must give for the inputs that lie beside it the outputs that do, up to rounding. "blocks", also taken where
    the decoded model does not fit in memory, compares every weight with the runtime's own decoder; the result then says
    `verified: partial`. Raises VerificationError with the runtime's own message, ModelError where there is no model.
    """
    if extent == "none":
        return {"verified": "none"}
    if not is_network_artefact(artefact) and not any(artefact.glob("*.gguf")):
        read_config_json(artefact)
    problems = _changed_files(artefact)
    found: dict[str, Any] = {} if problems else _in_fresh_process(artefact, extent, trust_remote_code=trust_remote_code)
    problems += found.pop("problems", [])
    if problems:
        raise VerificationError(f"{artefact}: {'; '.join(problems)}")
    return found


def _changed_files(artefact: Path) -> list[str]:
    """What is no longer as `quantize` wrote it."""
    record = artefact / "pennyweight.json"
    if not record.exists():
        return []
    try:
        outputs: dict[str, str] = json.loads(record.read_text(encoding="utf-8"))["outputs"]
        written = {name: digest for name, digest in outputs.items() if name not in _MAY_CHANGE}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{record} is damaged: quantize again, or remove it to do without its hashes") from error
    problems = [f"{name} is missing" for name in written if not (artefact / name).is_file()]
    for name, digest in written.items():
        if (artefact / name).is_file() and sha256(artefact / name) != digest:
            problems.append(f"{name} is not the file that was written: its SHA-256 is not the one in pennyweight.json")
    return problems[:5]


def _in_fresh_process(artefact: Path, extent: Extent, *, trust_remote_code: bool) -> dict[str, Any]:
    worker = "verify_gguf" if any(artefact.glob("*.gguf")) else "verify_worker"
    worker = "network.check" if is_network_artefact(artefact) else worker
    command = [sys.executable, "-m", f"pennyweight.evaluate.{worker}", str(artefact.absolute()), extent]
    command += ["--trust-remote-code"] if trust_remote_code else []
    # However this process found the package, the fresh one must find the same.
    package = str(Path(__file__).parents[2])
    paths = os.pathsep.join([package, *filter(None, [os.environ.get("PYTHONPATH")])])
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            timeout=_TIMEOUT_S,
            check=False,
            env=os.environ | {"PYTHONPATH": paths},
        )
    except subprocess.TimeoutExpired as error:
        raise VerificationError(f"{artefact}: the runtime was still busy after {_TIMEOUT_S // 3600} hours") from error
    lines = done.stdout.strip().splitlines()
    if done.returncode != 0 or not lines:
        raise VerificationError(f"{artefact}: the runtime could not open it: {_reason(done)}")
    found: dict[str, Any] = json.loads(lines[-1])
    return found


def _reason(done: subprocess.CompletedProcess[str]) -> str:
    if done.returncode < 0:
        less = ": ask for `blocks`, not `full`" if done.returncode == -signal.SIGKILL else ""
        return f"it was {killed_by(-done.returncode)}{less}"
    return (done.stderr.strip().splitlines() or ["it ended without a word"])[-1]
