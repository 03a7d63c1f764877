"""The rows of the vision benchmark: a network, a scheme, a tool and how it is asked."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

OURS = "pennyweight"


@dataclass(frozen=True)
class Contestant:
    """subject   key of `subjects.SUBJECTS`
    scheme    as `peers/vision/schemes.py` reads it
    tool      OURS, or one that peers/vision/run.py knows; "float": the float file
    method    the tool's module says what it is
    """

    subject: str
    scheme: str
    tool: str
    method: str

    @property
    def is_ours(self) -> bool:
        return self.tool == OURS

    def __str__(self) -> str:
        return f"{self.subject} {self.scheme} {self.tool} {self.method}"


FLOAT_SCHEME, FLOAT_TOOL = "float", "float"
# (tool, method) whose ranges are the smallest and largest values and that corrects nothing afterwards.
MINMAX = (("onnxruntime", "minmax"), ("nncf", "minmax"), ("nncf", "torch-minmax"), ("torchao", "minmax"))

_STATIC = (("onnxruntime", "minmax"), ("onnxruntime", "percentile"))
# Slow, and on the small networks no better than the others: left out of the large ones.
_ENTROPY, _ACCURATE = ("onnxruntime", "entropy"), ("nncf", "accurate")
_NNCF = (("nncf", "minmax"), ("nncf", "fast"))
_TORCHAO = (("torchao", "minmax"), ("torchao", "histogram"))
_PTQ, _QAT, _NEAREST = (OURS, "ptq"), (OURS, "qat"), (OURS, "nearest")
_TRAINED = ("torchao", "trained")
_UNEQUALIZED = tuple((OURS, method) for method in ("minmax", "minmax-equalized", "ptq-unequalized"))
# What is asked for weights alone, with activations left in float.
_WEIGHTS = (("nncf", "compress"), ("torchao", "minmax"))

_ASKED: dict[str, dict[str, tuple[tuple[str, str], ...]]] = {
    "resnet20": {
        "w8a8-channel": (*_STATIC, _ENTROPY, *_NNCF, _ACCURATE, *_TORCHAO, _TRAINED, _PTQ, _QAT),
        "w4a8-channel": (
            *_STATIC, _ENTROPY, ("nncf", "fast"), ("nncf", "torch-minmax"), ("nncf", "torch-fast"), *_TORCHAO,
            _TRAINED, _PTQ, _QAT,
        ),
        "w4-channel": (("onnxruntime", "minmax"), ("onnxruntime", "rtn"), *_WEIGHTS, _TRAINED, _NEAREST, _PTQ, _QAT),
        "w3-channel": (("onnxruntime", "minmax"), *_WEIGHTS, _TRAINED, _NEAREST, _PTQ, _QAT),
        "w2-channel": (("onnxruntime", "minmax"), *_WEIGHTS, _TRAINED, _NEAREST, _PTQ, _QAT),
    },
    "resnet20-spread": {
        "w8a8-tensor": (*_STATIC, _ENTROPY, *_NNCF, _ACCURATE, *_TORCHAO, *_UNEQUALIZED, _PTQ),
    },
    "mobilenetv2": {
        "w8a8-channel": (*_STATIC, *_NNCF, *_TORCHAO, _PTQ),
        "w4a8-channel": (
            *_STATIC, ("nncf", "torch-minmax"), ("nncf", "torch-fast"), *_TORCHAO, _PTQ,
        ),
        "w4-channel": (("onnxruntime", "rtn"), *_WEIGHTS, _NEAREST, _PTQ),
    },
    "minilm": {
        "w8-g128": (("onnxruntime", "rtn"), ("nncf", "compress"), _PTQ),
        "w4-g32": (
            ("onnxruntime", "rtn"), ("onnxruntime", "rtn-embedding"), ("onnxruntime", "hqq"), ("nncf", "compress"),
            _PTQ,
        ),
        "w4-g128": (("onnxruntime", "rtn"), ("onnxruntime", "hqq"), ("nncf", "compress"), _PTQ),
        "w8a8-channel": (("onnxruntime", "dynamic"), *_STATIC, *_NNCF, _PTQ),
    },
}  # fmt: skip

QUICK = ("resnet20 w8a8-channel", "resnet20 w4a8-channel")
# Minutes each; --quick leaves them out.
SLOW_METHODS = ("qat", "trained")


def contestants() -> Iterator[Contestant]:
    """All of them, in the order of the tables."""
    for subject, schemes in _ASKED.items():
        for scheme, asked in schemes.items():
            for tool, method in asked:
                yield Contestant(subject, scheme, tool, method)
