"""`pennyweight quantize` for schemes that no runtime reads: the same run, its artefact dense.

    python -m benchmarks.ours MODEL --out DIR [--scheme int4-g64-offset-f16] [--solver hqq] [--NAME VALUE ...]

NAME is any field of the run's options. Prints the run's report as JSON, as the command does.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import sys
from pathlib import Path
from typing import Any, get_type_hints


def parse_arguments() -> argparse.Namespace:
    """The command line: one option for each field."""
    from pennyweight.pipeline.options import Options

    parser = argparse.ArgumentParser(prog="python -m benchmarks.ours", description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--out", type=Path, required=True)
    hints = get_type_hints(Options)
    for field in dataclasses.fields(Options):
        option, hint = f"--{field.name.replace('_', '-')}", hints[field.name]
        if hint == (bool | None):
            parser.add_argument(option, action=argparse.BooleanOptionalAction, default=argparse.SUPPRESS)
        elif hint is bool:
            parser.add_argument(option, action="store_true", default=argparse.SUPPRESS)
        else:
            parser.add_argument(option, type=hint if hint in (int, float) else str, default=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    """Quantize and report."""
    gc.disable()
    from benchmarks.dense import DENSE, settle
    from pennyweight.core.files import to_json
    from pennyweight.core.memory import settle_imports
    from pennyweight.pipeline.options import Options
    from pennyweight.pipeline.run import quantize
    from pennyweight.train.recovery.finish import Recovery

    arguments: dict[str, Any] = vars(parse_arguments())
    model, out = arguments.pop("model"), arguments.pop("out")
    settle_imports()
    options = Options(**arguments)
    report = quantize(model, out, options, container=DENSE, finish=Recovery.of(options))
    settle(out)
    sys.stdout.write(to_json(report))


if __name__ == "__main__":
    main()
