"""Proof that an artefact's runtime reads it, and computes with the weights that we meant."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any, Literal

from pennyweight.core.errors import VerificationError

Extent = Literal["full", "blocks", "none"]
_TIMEOUT_S = 6 * 3600


def verify(artefact: Path, *, extent: Extent = "full", trust_remote_code: bool = False) -> dict[str, Any]:
    """Open `artefact` with transformers in a fresh process and compare it with our own decoding; returns what was found.

    "full" loads the whole model and compares logits: no key may be missing or unexpected; the difference must be 0 in
    float32, and at most one unit in the last place of the largest logit in a narrower type. "blocks", also taken where
    the decoded model does not fit in memory, compares every weight with the runtime's own decoder; the result then says
    `verified: partial`. Raises VerificationError with the runtime's own message.
    """
    if extent == "none":
        return {"verified": "none"}
    command = [sys.executable, "-m", "pennyweight.evaluate.verify_worker", str(artefact), extent]
    command += ["--trust-remote-code"] if trust_remote_code else []
    done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False)
    lines = done.stdout.strip().splitlines()
    if done.returncode != 0 or not lines:
        reason = (done.stderr.strip().splitlines() or ["it ended without a word"])[-1]
        raise VerificationError(f"{artefact}: the runtime could not open it: {reason}")
    found: dict[str, Any] = json.loads(lines[-1])
    if found["problems"]:
        raise VerificationError(f"{artefact}: {'; '.join(found['problems'])}")
    del found["problems"]
    return found
