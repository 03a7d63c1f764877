"""Integers of 2, 4 and 8 bits as the bytes of ONNX tensors: the first in the lowest bits, no gaps, zeros at the end."""

from __future__ import annotations

import torch
from torch import Tensor


def pack(values: Tensor, bits: int) -> Tensor:
    """Whole numbers of `bits` bits, signed or not, along the last axis -> uint8 [..., ceil(n * bits / 8)].

    >>> pack(torch.tensor([1, -2, 3]), 4).tolist()
    [225, 3]
    """
    each = 8 // bits
    fields = values.to(torch.int16).bitwise_and((1 << bits) - 1)
    fields = torch.nn.functional.pad(fields, (0, -values.shape[-1] % each))
    fields = fields.reshape(*values.shape[:-1], -1, each)
    packed = torch.zeros(fields.shape[:-1], dtype=torch.int16)
    for place in range(each):
        packed |= fields[..., place] << (bits * place)
    return packed.to(torch.uint8)


def unpack(packed: Tensor, bits: int, count: int, *, signed: bool) -> Tensor:
    """The inverse: int16 [..., count]."""
    each, mask = 8 // bits, (1 << bits) - 1
    fields = torch.stack([packed.to(torch.int16) >> (bits * place) & mask for place in range(each)], -1)
    values = fields.reshape(*packed.shape[:-1], -1)[..., :count]
    return torch.where(values >> (bits - 1) == 1, values - (1 << bits), values) if signed else values


def to_bytes(tensor: Tensor) -> bytes:
    """The memory of a contiguous copy of `tensor`, little-endian."""
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""
