"""Integers of few bits as bytes."""

from __future__ import annotations

import numpy as np
import onnx
import torch
from hypothesis import given
from hypothesis import strategies as st

from pennyweight.containers.onnx.packing import pack, to_bytes, unpack

TYPES = {
    (2, True): onnx.TensorProto.INT2,
    (2, False): onnx.TensorProto.UINT2,
    (4, True): onnx.TensorProto.INT4,
    (4, False): onnx.TensorProto.UINT4,
    (8, True): onnx.TensorProto.INT8,
    (8, False): onnx.TensorProto.UINT8,
}


@given(st.sampled_from(sorted(TYPES)), st.integers(0, 33), st.integers(1, 3), st.integers(0, 99))
def test_what_is_packed_comes_back(kind: tuple[int, bool], count: int, rows: int, seed: int) -> None:
    bits, signed = kind
    low = -(1 << (bits - 1)) if signed else 0
    values = torch.randint(low, low + (1 << bits), (rows, count), generator=torch.Generator().manual_seed(seed))
    packed = pack(values, bits)
    assert packed.shape == (rows, -(-count * bits // 8))
    assert torch.equal(unpack(packed, bits, count, signed=signed), values.to(torch.int16))


@given(st.sampled_from(sorted(TYPES)), st.integers(1, 33), st.integers(0, 99))
def test_the_bytes_are_those_that_onnx_reads(kind: tuple[int, bool], count: int, seed: int) -> None:
    bits, signed = kind
    low = -(1 << (bits - 1)) if signed else 0
    values = torch.randint(low, low + (1 << bits), (count,), generator=torch.Generator().manual_seed(seed))
    tensor = onnx.TensorProto(data_type=TYPES[kind], dims=[count], raw_data=to_bytes(pack(values, bits)))
    assert onnx.numpy_helper.to_array(tensor).astype(np.int64).tolist() == values.tolist()
