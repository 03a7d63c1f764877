"""Seconds that AutoRound takes for a number of iterations, in place of its default of 200: hours on a large model.

python -m benchmarks.peers.auto_round.timing MODEL --scheme int4-g128 --tokens FILE --iterations 10
"""

from __future__ import annotations

from benchmarks.peers import common  # isort: skip - sets the environment before any library is imported

import argparse
import contextlib
import json
import sys
import time
from pathlib import Path


def main() -> None:
    """Tune all blocks of the model and print {"seconds": ...} of that alone, without imports and loading."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--scheme", type=common.WeightScheme.parse, required=True)
    parser.add_argument("--tokens", type=Path, required=True)
    parser.add_argument("--iterations", type=int, required=True)
    arguments = parser.parse_args()
    with contextlib.redirect_stdout(sys.stderr):
        seconds = _seconds(arguments)
    print(json.dumps({"seconds": seconds}))


def _seconds(arguments: argparse.Namespace) -> float:
    from auto_round import AutoRound
    from safetensors.torch import load_file
    from transformers import AutoTokenizer

    model = common.load_model(arguments.model, dtype="auto")
    windows = load_file(arguments.tokens)["input_ids"]
    tuner = AutoRound(
        model,
        AutoTokenizer.from_pretrained(arguments.model),
        bits=arguments.scheme.bits,
        group_size=arguments.scheme.group,
        sym=arguments.scheme.is_symmetric,
        dataset=[window[None] for window in windows],
        nsamples=len(windows),
        seqlen=windows.shape[1],
        iters=arguments.iterations,
        scale_dtype="bf16",
        device_map="cpu",
        low_cpu_mem_usage=False,
    )
    started = time.perf_counter()
    tuner.quantize()
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
