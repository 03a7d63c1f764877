"""Rotary embeddings in GGUF: scaling as metadata, and factors as tensors that no checkpoint has."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import gguf
import torch
from torch import Tensor

from pennyweight.core.errors import ContainerError

Hyper = Mapping[str, Any]


def rope_of(hyper: Hyper) -> dict[str, Any]:
    """The rope parameters of full attention, with `rope_type`."""
    parameters = dict(hyper.get("rope_parameters") or {})
    rope = dict(parameters.get("full_attention") or parameters)
    length = hyper.get("original_max_position_embeddings")
    if length is not None:
        rope.setdefault("original_max_position_embeddings", length)
    rope.setdefault("rope_type", "default")
    return rope


def local_rope_theta(hyper: Hyper) -> float | None:
    """The base of sliding attention's rope, where it is another one."""
    theta = (hyper.get("rope_parameters") or {}).get("sliding_attention", {}).get("rope_theta")
    return None if theta is None else float(theta)


def head_dim(hyper: Hyper) -> int:
    return int(hyper.get("head_dim") or hyper["hidden_size"] // hyper["num_attention_heads"])


def partial_rope_dims(hyper: Hyper) -> int:
    """Rotated values of a head of Phi-3."""
    rotated = int(rope_of(hyper).get("partial_rotary_factor", 1.0) * hyper["hidden_size"])
    return rotated // int(hyper["num_attention_heads"])


def add_scaling(writer: gguf.GGUFWriter, rope: Mapping[str, Any]) -> None:
    """Linear and yarn scaling; the factors of llama3 and longrope are tensors."""
    kind, factor = rope["rope_type"], rope.get("factor")
    if kind == "linear" and factor is not None:
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(factor)
    elif kind == "yarn" and factor is not None:
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(factor)
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
        for name, add in (
            ("extrapolation_factor", writer.add_rope_scaling_yarn_ext_factor),
            ("attention_factor", writer.add_rope_scaling_yarn_attn_factor),
            ("beta_fast", writer.add_rope_scaling_yarn_beta_fast),
            ("beta_slow", writer.add_rope_scaling_yarn_beta_slow),
        ):
            if rope.get(name) is not None:
                add(rope[name])
    elif kind in ("longrope", "su"):
        writer.add_rope_scaling_type(gguf.RopeScalingType.LONGROPE)


def llama3_factors(hyper: Hyper) -> Tensor | None:
    """By what llama.cpp divides each frequency, float32 [head_dim / 2]; None without Llama 3.1's scaling.

    With wavelength w = 2 pi / frequency and old context c: 1 for w < c / high, factor for w > c / low, and between
    them 1 / ((1 - s) / factor + s) with s = (c / w - low) / (high - low).
    """
    rope = rope_of(hyper)
    if rope["rope_type"] != "llama3":
        return None
    dim, context, factor = head_dim(hyper), rope["original_max_position_embeddings"], rope["factor"]
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    frequencies = 1.0 / (rope.get("rope_theta", 10000.0) ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim))
    wavelengths = 2 * math.pi / frequencies
    smooth = (context / wavelengths - low) / (high - low)
    between = 1 / ((1 - smooth) / factor + smooth)
    factors = torch.where(wavelengths > context / low, float(factor), between)
    return torch.where(wavelengths < context / high, 1.0, factors)


def longrope_factors(hyper: Hyper) -> tuple[Tensor, Tensor] | None:
    """Long and short factors, float32 [rotated values of a head / 2]; None without longrope."""
    rope = rope_of(hyper)
    if not rope.get("long_factor"):
        return None
    long, short = rope["long_factor"], rope.get("short_factor") or []
    expected = partial_rope_dims(hyper) // 2
    if len(long) != expected or len(short) != expected:
        raise ContainerError(
            f"config.json: rope has {len(long)} long and {len(short)} short factors, {expected} of each are needed; "
            "download config.json again"
        )
    return torch.tensor(long, dtype=torch.float32), torch.tensor(short, dtype=torch.float32)


def longrope_attention_factor(hyper: Hyper) -> float:
    """sqrt(1 + ln(s) / ln(c)) for a context grown s times from c; 1 where it did not grow."""
    context = rope_of(hyper)["original_max_position_embeddings"]
    scale = hyper["max_position_embeddings"] / context
    return math.sqrt(1 + math.log(scale) / math.log(context)) if scale > 1 else 1.0
