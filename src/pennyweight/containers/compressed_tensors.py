"""compressed-tensors: weight-only signed integers (`pack-quantized`) and small floats for transformers and vLLM.

The float formats are in compressed_tensors_floats.py. Integers of a site SITE of [out, in] become
    SITE.weight_packed      int32 [out, ceil(in * bits / 32)], codes packed densely along the input
    SITE.weight_scale       [out, groups], or [1] per tensor, in the model's own type
    SITE.weight_zero_point  int32 [ceil(out * bits / 32), groups], packed along the output; int8 [1] per tensor;
                            absent when symmetric
    SITE.weight_shape       int64 [2]
with code = value + 2**(bits-1) everywhere. Source: compressed_tensors.compressors.pack_quantized, 0.20.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from pennyweight.containers import compressed_tensors_floats as floats
from pennyweight.containers.base import Container, ModelFacts
from pennyweight.containers.compressed_tensors_floats import INTEGERS, layout_of
from pennyweight.containers.compressed_tensors_rules import fused_sites, plan_refusal, site_refusal
from pennyweight.containers.compressed_tensors_targets import patterns
from pennyweight.core.errors import ContainerError
from pennyweight.formats.integer import Int
from pennyweight.kernels.packing import pack_int32, packed_words, unpack_int32
from pennyweight.models.base import Site, TensorInfo
from pennyweight.plan.plan import Plan
from pennyweight.schemes import Granularity, PerGroup, PerTensor, QuantizedWeight, Scheme, ZeroSpec, parse_scheme

# Older readers expect 3, 5, 6 and 7 bits with padding and decode a dense file to other numbers, without an error.
MINIMUM_VERSION = "0.18"
# Group sizes that every runtime of the container has.
_EVERYWHERE = (128, 64, 32)
_USAGE = """```python
from transformers import {auto}
model = {auto}.from_pretrained("path/to/this/directory")
```

Needs `transformers` and **`compressed-tensors` {minimum} or later**: older versions misread codes of 3, 5, 6 and 7
bits.
"""
Part = TypeVar("Part", Tensor, TensorInfo)


class CompressedTensors(Container):
    """The container of transformers and vLLM."""

    @property
    def name(self) -> str:
        return "compressed-tensors"

    @property
    def runtimes(self) -> tuple[str, ...]:
        return ("transformers", "vllm")

    def why_not(self, scheme: Scheme, site: Site, *, runtime: str) -> str | None:
        return site_refusal(scheme, site, runtime=runtime)

    def why_not_plan(self, plan: Plan, sites: Sequence[Site], facts: ModelFacts, *, runtime: str) -> str | None:
        return plan_refusal(plan, sites, facts, runtime=runtime)

    def fused(self, sites: Sequence[Site], *, runtime: str) -> list[tuple[str, ...]]:
        return fused_sites(sites, runtime=runtime)

    def equivalents(self, scheme: Scheme) -> Sequence[Scheme]:
        own = [] if layout_of(scheme) is None else [scheme]
        zeros = [None, ZeroSpec()] if scheme.zero is not None or scheme.offset is not None else [None]
        shared: list[Granularity] = [scheme.granularity]
        if isinstance(scheme.granularity, PerGroup):
            size = scheme.granularity.size
            shared += [PerGroup(finer) for finer in _EVERYWHERE if finer < size and size % finer == 0]
        integers = [Scheme(Int(bits), one, zero=zero) for one in shared for bits in range(2, 9) for zero in zeros]
        return [*own, parse_scheme("mxfp4"), *integers]

    def load_types(self, facts: ModelFacts, *, runtime: str) -> Sequence[str]:
        # vLLM's kernels for packed weights know no float32.
        return (facts.dtype,) if runtime == "vllm" else tuple(dict.fromkeys((facts.dtype, "float32")))

    def entries(self, site: Site, scheme: Scheme) -> Mapping[str, TensorInfo]:
        """The tensors of `site` by full name, in the order in which they are written."""
        if layout_of(scheme) != INTEGERS:
            return _named(site, floats.entries(site, scheme))
        rows, columns = site.shape
        bits = scheme.element.bits
        _, groups = scheme.scale_shape(site.shape)
        is_single = isinstance(scheme.granularity, PerTensor)
        infos = {
            "weight_packed": TensorInfo(torch.int32, (rows, packed_words(columns, bits))),
            "weight_scale": TensorInfo(scheme.scale.torch_dtype, (1,) if is_single else (rows, groups)),
        }
        if scheme.zero is not None:
            packed_zeros = TensorInfo(torch.int32, (packed_words(rows, bits), groups))
            infos["weight_zero_point"] = TensorInfo(torch.int8, (1,)) if is_single else packed_zeros
        infos["weight_shape"] = TensorInfo(torch.int64, (2,))
        return _named(site, infos)

    def encode(self, site: Site, weight: QuantizedWeight) -> dict[str, Tensor]:
        """The tensors of `site`; raises ContainerError if `weight` is not a matrix of the site's shape."""
        if weight.shape != site.shape:
            raise ContainerError(f"{site.name}: codes of shape {weight.shape} given, {site.shape} expected")
        if layout_of(weight.scheme) != INTEGERS:
            return _named(site, floats.encode(site, weight))
        bits = weight.scheme.element.bits
        is_single = isinstance(weight.scheme.granularity, PerTensor)
        parts = {
            "weight_packed": pack_int32(weight.codes, bits),
            "weight_scale": weight.scales.reshape(1) if is_single else weight.scales.contiguous(),
        }
        if weight.zeros is not None:
            packed = weight.zeros.to(torch.int8).reshape(1) if is_single else _pack_zeros(weight.zeros, bits)
            parts["weight_zero_point"] = packed
        parts["weight_shape"] = torch.tensor(site.shape, dtype=torch.int64)
        return _named(site, parts)

    def decode(self, site: Site, scheme: Scheme, tensors: Mapping[str, Tensor]) -> QuantizedWeight:
        """The weight that `encode` wrote; raises ContainerError if a tensor is missing or not as in `entries`."""
        for name, info in self.entries(site, scheme).items():
            if name not in tensors or TensorInfo(tensors[name].dtype, tuple(tensors[name].shape)) != info:
                given = f"{tensors[name].dtype} {tuple(tensors[name].shape)}" if name in tensors else "nothing"
                raise ContainerError(f"{name}: {given} found, {info.dtype} {info.shape} expected for {scheme}")
        if layout_of(scheme) != INTEGERS:
            return floats.decode(scheme, {name.removeprefix(f"{site.name}."): t for name, t in tensors.items()})
        bits, shape = scheme.element.bits, scheme.scale_shape(site.shape)
        zeros = tensors.get(f"{site.name}.weight_zero_point") if scheme.zero is not None else None
        if zeros is not None:
            is_single = isinstance(scheme.granularity, PerTensor)
            zeros = zeros.to(torch.int16).reshape(shape) if is_single else _unpack_zeros(zeros, bits, shape[0])
        return QuantizedWeight(
            codes=unpack_int32(tensors[f"{site.name}.weight_packed"], bits, site.shape[1]),
            scales=tensors[f"{site.name}.weight_scale"].reshape(shape),
            zeros=zeros,
            scheme=scheme,
        )

    def config(self, plan: Plan, sites: Sequence[Site], facts: ModelFacts, *, runtime: str) -> dict[str, Any]:
        """`quantization_config` of config.json.

        One scheme: every Linear but those listed in `ignore`. Several: each scheme names its sites, the routed
        experts' group first, because transformers decodes all experts with the first group that names experts.
        """
        groups = _sites_by_scheme(plan, sites)
        everything = [*(site.name for site in sites), *facts.linear_names]
        in_blocks = (site.name for site in sites if site.kind != "head")
        rest = [name for name in (*in_blocks, *facts.linear_names) if name not in plan.schemes]
        several = len(groups) > 1
        layouts = {layout_of(scheme) for scheme in groups}
        config_groups = {
            f"group_{index}": {
                "targets": patterns([site.name for site in members], among=everything) if several else ["Linear"],
                "weights": _weights_arguments(scheme),
                "input_activations": None,
                "output_activations": None,
                "format": layout_of(scheme),
            }
            for index, (scheme, members) in enumerate(groups.items())
        }
        config: dict[str, Any] = {
            "quant_method": "compressed-tensors",
            "format": next(iter(layouts)) if len(layouts) == 1 else "mixed-precision",
            "quantization_status": "compressed",
            "version": f"{MINIMUM_VERSION}.0",
            "config_groups": config_groups,
            "ignore": patterns(rest, among=everything),
            "kv_cache_scheme": None,
            "global_compression_ratio": None,
        }
        # transformers 5.23 builds no modules that packed zero points or float weights of another type than the model's
        # fit into; it can decode them while loading.
        is_other = facts.dtype != "bfloat16" and not layouts.isdisjoint(floats.BFLOAT16_ONLY)
        if not several and (is_other or any(scheme.zero for scheme in groups)):
            config["dequantize"] = True
        return config

    def usage(self, *, is_decoder: bool) -> str:
        return _USAGE.format(auto="AutoModelForCausalLM" if is_decoder else "AutoModel", minimum=MINIMUM_VERSION)


def _sites_by_scheme(plan: Plan, sites: Sequence[Site]) -> dict[Scheme, list[Site]]:
    groups: dict[Scheme, list[Site]] = {}
    for site in sorted(sites, key=lambda site: site.kind != "expert"):
        if site.name in plan.schemes:
            groups.setdefault(plan.schemes[site.name], []).append(site)
    return groups


def _weights_arguments(scheme: Scheme) -> dict[str, Any]:
    match scheme.granularity:
        case PerTensor():
            strategy, group_size = "tensor", None
        case PerGroup(size):
            strategy, group_size = "group", size
        case _:
            strategy, group_size = "channel", None
    changed = {} if layout_of(scheme) == INTEGERS else floats.arguments(scheme)
    return {
        "num_bits": scheme.element.bits,
        "type": "int",
        "symmetric": scheme.zero is None,
        "strategy": strategy,
        "group_size": group_size,
        "dynamic": False,
        "actorder": None,
        "block_structure": None,
        "observer": "minmax",
        "observer_kwargs": {},
        **changed,
    }


def _named(site: Site, parts: Mapping[str, Part]) -> dict[str, Part]:
    """With the names of the checkpoint."""
    return {f"{site.name}.{part}": value for part, value in parts.items()}


def _pack_zeros(zeros: Tensor, bits: int) -> Tensor:
    """int16 zero points [out, groups] as int32 [ceil(out * bits / 32), groups]."""
    codes = (zeros + 2 ** (bits - 1)).to(torch.uint8)
    return pack_int32(codes.T.contiguous(), bits).T.contiguous()


def _unpack_zeros(packed: Tensor, bits: int, rows: int) -> Tensor:
    codes = unpack_int32(packed.T.contiguous(), bits, rows)
    return codes.T.contiguous().to(torch.int16).sub_(2 ** (bits - 1))


PROVIDES: tuple[Container, ...] = (CompressedTensors(),)
