"""An artefact of a network checked without the network: what the runtime computes from it is what was written down.

Run as a module it prints the findings as one line of JSON: `python -m pennyweight.evaluate.network.check DIR full`.
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

from pennyweight.containers.onnx import Runtime
from pennyweight.core.errors import CheckpointError, ModelError, VerificationError
from pennyweight.core.memory import peak_memory_bytes
from pennyweight.evaluate.network.directory import CHECK, MODEL, RECORD, read_check
from pennyweight.evaluate.onnx.agreement import RuntimeAgreement, agreement
from pennyweight.evaluate.onnx.runtime import as_arrays


def checked(directory: Path, runtimes: tuple[Runtime, ...]) -> list[RuntimeAgreement]:
    """Run the file in each of `runtimes` on the inputs that lie beside it and compare with the outputs that do.

    Raises CheckpointError where these are damaged, VerificationError where a runtime cannot open the file. Whether what
    was found is near enough is for the caller to ask.
    """
    try:
        inputs, outputs, allowed = read_check(directory / CHECK)
    except Exception as error:
        raise CheckpointError(f"{directory / CHECK} cannot be read ({error}): quantize again") from error
    feeds = [as_arrays(inputs)]
    return [agreement(directory / MODEL, feeds, [outputs], allowed, runtime=runtime) for runtime in runtimes]


def runtimes_of(directory: Path) -> tuple[Runtime, ...]:
    """The runtime that the artefact was written for."""
    record = directory / RECORD
    if not record.is_file():
        raise ModelError(f"{directory} has no {RECORD}: it is not a directory that quantize_module wrote")
    try:
        return (cast(Runtime, json.loads(record.read_text(encoding="utf-8"))["recipe"]["runtime"]),)
    except (ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{record} is damaged: quantize again") from error


def findings(directory: Path) -> dict[str, Any]:
    """What `pennyweight verify` prints; `problems` where the runtime computes something else."""
    started = time.perf_counter()
    found = checked(directory, runtimes_of(directory))
    problems = []
    for one in found:
        try:
            one.check(directory / MODEL)
        except VerificationError as error:
            problems.append(str(error))
    return {
        "verified": "full",
        "runtimes": [asdict(one) for one in found],
        "problems": problems,
        "seconds": round(time.perf_counter() - started, 3),
        "peak_memory_bytes": peak_memory_bytes(),
    }


def main() -> None:
    print(json.dumps(findings(Path(sys.argv[1]))))


if __name__ == "__main__":
    main()
