"""What may be asked of the quantization of a network."""

from __future__ import annotations

from typing import Any

import pytest

from pennyweight.core.errors import UsageError
from pennyweight.pipeline.network import NetworkOptions
from pennyweight.plan.budget import parse_budget


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"scheme": "w9a8-channel"}, "w9a8"),
        ({"effort": "slow"}, "effort='slow': give fast, normal, best"),
        ({"ranges": "median"}, "ranges='median': give one of output, entropy"),
        ({"fit": "best"}, "fit='best': give minmax, search"),
        ({"loss": "accuracy"}, "loss='accuracy'"),
        ({"runtime": "tflite"}, "tflite"),
        ({"solver": "magic"}, "magic"),
        ({"at": ("head",)}, "give GLOB=SCHEME"),
        ({"ends": "int9-channel"}, "int9"),
        ({"refine": -1}, "refine=-1"),
        ({"memory_bytes": 0}, "memory_bytes=0"),
        ({"budget": parse_budget(max_kl=0.1)}, "give size or bpw"),
    ],
)
def test_what_makes_no_sense_is_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        NetworkOptions(**given).check()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "static ranges, needs calibration data"),
        ({"scheme": "int4-channel", "solver": "gptq"}, "solver='gptq' needs calibration data"),
        ({"scheme": "int4-channel", "correct_bias": True}, "correct_bias needs"),
        ({"scheme": "int4-channel", "refine": 10}, "refine needs"),
        ({"scheme": "int4-channel", "budget": parse_budget(size=1000)}, "--size 1000 bytes needs"),
    ],
)
def test_what_needs_data_is_refused_without(given: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        NetworkOptions(**given).check(has_data=False)


@pytest.mark.parametrize("scheme", ["int8-channel", "int4-g32", "w8a8-channel-dynamic"])
def test_weights_alone_need_no_data(scheme: str) -> None:
    options = NetworkOptions(scheme=scheme)
    options.check(has_data=False)
    assert options.steps(has_data=False).solver == "nearest"


def test_a_solver_asked_for_by_name_is_all_there_is() -> None:
    steps = NetworkOptions(effort="best", solver="nearest").steps()
    assert (steps.solver, steps.correct_bias, steps.refine) == ("nearest", False, 0)
    assert NetworkOptions(effort="best", solver="nearest", correct_bias=True).steps().correct_bias
