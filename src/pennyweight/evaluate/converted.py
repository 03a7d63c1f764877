"""`convert` with its proof: the result is opened in its runtime before it is done."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from pennyweight.evaluate.proved import proved
from pennyweight.evaluate.verify import Extent
from pennyweight.pipeline.convert import TellSite
from pennyweight.pipeline.convert import convert as run
from pennyweight.pipeline.records import RunReport


def convert(
    artefact: str | Path,
    out: str | Path,
    *,
    runtime: str,
    allow_float: bool = False,
    trust_remote_code: bool = False,
    verification: Extent = "full",
    tell: TellSite = lambda done, total: None,
) -> RunReport:
    """Write the quantized model in the directory `artefact` for another `runtime`, with the same codes, verified.

    `artefact` is one of ours or any that compressed-tensors packed. What the container cannot hold exactly is an error
    that lists it, or with `allow_float` stays in float; `kept` of the report names it, `changed` what is stored
    otherwise now. Raises PennyweightError, and then `out` does not exist.
    """
    prove = partial(proved, runtime=runtime, extent=verification, trust_remote_code=trust_remote_code)
    return run(
        str(artefact), out, runtime=runtime, allow_float=allow_float, trust_remote_code=trust_remote_code,
        prove=prove, tell=tell,
    )  # fmt: skip
