"""Bit-exactness is promised for the kernels of processors with AVX2 and VNNI."""

from __future__ import annotations

import pytest

onnx = pytest.importorskip("onnx", reason="needs onnx: pip install 'pennyweight[onnx]'")
pytest.importorskip("onnxruntime", reason="needs onnxruntime: pip install 'pennyweight[onnx]'")

from pennyweight.evaluate.onnx.integer.probe import departures  # noqa: E402


@pytest.fixture(autouse=True)
def _promised() -> None:
    if departures():
        pytest.skip(f"ONNX Runtime has other kernels on this processor: {'; '.join(departures())}")
