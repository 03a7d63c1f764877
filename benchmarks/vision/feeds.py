"""Inputs under the names that a file gives them."""

from __future__ import annotations

from typing import Any

from benchmarks.vision.problem import Arrays


def fed(names: list[str], inputs: Arrays) -> Arrays:
    """`inputs` under the file's `names`: a single input has whatever name the tool chose, several keep theirs."""
    return {names[0]: next(iter(inputs.values()))} if len(names) == 1 else {name: inputs[name] for name in names}


def names_of(session: Any) -> list[str]:
    """The inputs of an `onnxruntime.InferenceSession`, in its order."""
    return [one.name for one in session.get_inputs()]
