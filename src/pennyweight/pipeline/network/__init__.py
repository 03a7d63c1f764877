"""Post-training quantization of a captured network: what happens to it between capture and the file."""

from pennyweight.pipeline.network.options import NetworkOptions
from pennyweight.pipeline.network.quantize import (
    NetworkResult,
    Prepared,
    budget_plan,
    prepare,
    problem_of,
    quantize_network,
    quantize_planned,
)

__all__ = [
    "NetworkOptions",
    "NetworkResult",
    "Prepared",
    "budget_plan",
    "prepare",
    "problem_of",
    "quantize_network",
    "quantize_planned",
]
