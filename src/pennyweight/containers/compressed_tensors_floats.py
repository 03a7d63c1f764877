"""The float formats of compressed-tensors 0.20: fp8, MXFP8, MXFP4 and NVFP4, weight-only.

A site SITE of [out, in] becomes
    float-quantized       SITE.weight         float8_e4m3fn [out, in]
                          SITE.weight_scale   the model's own type [out, 1], or [1] per tensor
    mxfp8-quantized       SITE.weight         float8_e4m3fn [out, in]
                          SITE.weight_scale   uint8 [out, in / 32], e8m0
    mxfp4-pack-quantized  SITE.weight_packed  uint8 [out, in / 2], two codes a byte, the lower half first
                          SITE.weight_scale   uint8 [out, in / 32], e8m0
    nvfp4-pack-quantized  SITE.weight_packed  the same
                          SITE.weight_scale   float8_e4m3fn [out, in / 16]
                          SITE.weight_global_scale  float32 [1], 1 / parent: readers divide by it
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from pennyweight.core.errors import ContainerError
from pennyweight.formats.integer import Int
from pennyweight.models.base import Site, TensorInfo
from pennyweight.schemes import PerChannel, PerTensor, QuantizedWeight, Scheme, parse_scheme

INTEGERS = "pack-quantized"
_FP8 = torch.float8_e4m3fn
_BY_NAME = {"mxfp8": "mxfp8-quantized", "mxfp4": "mxfp4-pack-quantized", "nvfp4": "nvfp4-pack-quantized"}
# Decoded to bfloat16 by the library, whatever the type of the model.
BFLOAT16_ONLY = frozenset(_BY_NAME.values())
_BY_SCHEME = {parse_scheme(name): layout for name, layout in _BY_NAME.items()}


def layout_of(scheme: Scheme) -> str | None:
    """The name that compressed-tensors gives to the layout of `scheme`, or None where it has none."""
    if scheme in _BY_SCHEME:
        return _BY_SCHEME[scheme]
    if scheme.computed is not None:
        # The library computes in the usual type.
        return None
    if isinstance(scheme.element, Int):
        return INTEGERS if scheme.element.signed and scheme.is_plain else None
    is_shared_widely = isinstance(scheme.granularity, PerTensor | PerChannel)
    is_fp8 = scheme.element.name == "fp8_e4m3" and scheme.is_plain and is_shared_widely
    return "float-quantized" if is_fp8 else None


def entries(site: Site, scheme: Scheme) -> dict[str, TensorInfo]:
    """The tensors of `site` by their last name."""
    rows, columns = site.shape
    shape = scheme.scale_shape(site.shape)
    match layout_of(scheme):
        case "float-quantized":
            scales = TensorInfo(scheme.scale.torch_dtype, (1,) if isinstance(scheme.granularity, PerTensor) else shape)
            return {"weight": TensorInfo(_FP8, (rows, columns)), "weight_scale": scales}
        case "mxfp8-quantized":
            return {"weight": TensorInfo(_FP8, (rows, columns)), "weight_scale": TensorInfo(torch.uint8, shape)}
        case "mxfp4-pack-quantized":
            packed = TensorInfo(torch.uint8, (rows, columns // 2))
            return {"weight_packed": packed, "weight_scale": TensorInfo(torch.uint8, shape)}
        case _:
            packed = TensorInfo(torch.uint8, (rows, columns // 2))
            one = TensorInfo(torch.float32, (1,))
            return {"weight_packed": packed, "weight_scale": TensorInfo(_FP8, shape), "weight_global_scale": one}


def encode(site: Site, weight: QuantizedWeight) -> dict[str, Tensor]:
    """The tensors of `entries`; raises ContainerError for a parent whose reciprocal does not lead back to it."""
    scales = (
        weight.scales.reshape(1) if isinstance(weight.scheme.granularity, PerTensor) else weight.scales.contiguous()
    )
    if weight.scheme.element.bits == 8:
        return {"weight": weight.codes.view(_FP8), "weight_scale": scales}
    parts = {"weight_packed": weight.codes[:, ::2] | weight.codes[:, 1::2] << 4, "weight_scale": scales}
    if weight.parents is not None:
        stored = weight.parents.reshape(1).reciprocal()
        if not torch.equal(stored.reciprocal(), weight.parents.reshape(1)):
            raise ContainerError(
                f"{site.name}: {weight.scheme} with the parent {weight.parents.item():g}; compressed-tensors stores "
                "its reciprocal, which leads back to another number: use a power of two, as fit_scales does"
            )
        parts["weight_scale"] = scales.view(_FP8)
        parts["weight_global_scale"] = stored
    return parts


def decode(scheme: Scheme, parts: Mapping[str, Tensor]) -> QuantizedWeight:
    """The inverse of `encode`."""
    scales = parts["weight_scale"]
    scales = scales if scheme.scale.element is None else scales.view(torch.uint8)
    scales = scales.reshape(1, 1) if isinstance(scheme.granularity, PerTensor) else scales
    if scheme.element.bits == 8:
        return QuantizedWeight(parts["weight"].view(torch.uint8), scales, None, scheme)
    packed = parts["weight_packed"]
    codes = torch.stack([packed & 15, packed >> 4], dim=-1).reshape(packed.shape[0], -1)
    found = parts.get("weight_global_scale")
    parents = None if found is None else found.reciprocal().reshape(1, 1)
    return QuantizedWeight(codes, scales, None, scheme, parents=parents)


def arguments(scheme: Scheme) -> dict[str, Any]:
    """What differs from the arguments of integers in the configuration."""
    coded = {"mxfp8-quantized": "torch.uint8", "mxfp4-pack-quantized": "torch.uint8"}
    layout = layout_of(scheme)
    changed: dict[str, Any] = {"type": "float"}
    if layout in coded:
        changed["scale_dtype"] = coded[layout]
    if layout == "nvfp4-pack-quantized":
        changed |= {"strategy": "tensor_group", "scale_dtype": "torch.float8_e4m3fn"}
    return changed
