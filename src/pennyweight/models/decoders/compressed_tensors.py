"""Integers packed by compressed-tensors (`quant_method: compressed-tensors`, format "pack-quantized"), and the way to
its small floats.

    X.weight_packed      int32 [out, in * bits / 32]       codes, dense, code = value + 2**(bits - 1)
    X.weight_scale             [out, groups]               groups 1 per channel; [1] per tensor
    X.weight_shape       int64 [2]                         out, in
    X.weight_zero_point  int32 [out * bits / 32, groups]   packed along the output; int8 [1] per tensor
    X.weight_g_idx       int32 [in]                        group of each input (older files), -1 for consecutive groups
    weight = (value - zero) * scale                        in the scale's type: QuantizedWeight.dequantize

Which scheme a weight has is said by the config's groups, by name, by "re:" pattern or by the class of its module.
https://github.com/vllm-project/compressed-tensors (compressors/pack_quantized, utils/match.py).
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pennyweight.core.errors import CheckpointError
from pennyweight.formats import number_format
from pennyweight.kernels.packing import packed_words, unpack_int32
from pennyweight.models.base import Checkpoint, TensorInfo
from pennyweight.models.checkpoint import row_range
from pennyweight.models.decoders.base import Coded, Decoder, Decoding, Virtual, companions, component, expect, suffixed
from pennyweight.models.decoders.compressed_tensors_floats import FORMATS, float_bases, float_linear
from pennyweight.models.decoders.compressed_tensors_floats import PARTS as FLOAT_PARTS
from pennyweight.schemes import (
    Granularity,
    PerChannel,
    PerGroup,
    PerTensor,
    QuantizedWeight,
    ScaleSpec,
    Scheme,
    ZeroSpec,
)

_FORMAT = "pack-quantized"
_FLOATS = (torch.float16, torch.bfloat16, torch.float32)
_PARTS = (".weight_packed", ".weight_scale", ".weight_shape", ".weight_zero_point", ".weight_g_idx")
# Scales of activations, which the weights are decoded without.
_UNUSED = (".input_scale", ".input_zero_point", ".output_scale", ".output_zero_point", ".input_global_scale")


@dataclass(frozen=True)
class _Linear:
    checkpoint: Checkpoint
    base: str
    info: TensorInfo
    scheme: Scheme

    def read(self, part: slice | None) -> Tensor:
        first, last = row_range(self.base, self.info.shape, part or slice(None))
        order = self._order()
        found = self._weight(slice(first, last), order).dequantize(self.info.dtype)
        return found if order is None else found[:, order.argsort()]

    def coded(self) -> Coded | None:
        """None where the inputs of a group do not lie together."""
        whole = slice(0, self.info.shape[0])
        return Coded(self.scheme, lambda: self._weight(whole, None)) if self._order() is None else None

    def _weight(self, rows: slice, order: Tensor | None) -> QuantizedWeight:
        inputs = self.info.shape[1]
        packed = self.checkpoint.read(f"{self.base}.weight_packed", rows)
        codes = unpack_int32(packed, self.scheme.element.bits, inputs)
        shared = isinstance(self.scheme.granularity, PerTensor)
        scales = self.checkpoint.read(f"{self.base}.weight_scale", None if shared else rows)
        zeros = None if self.scheme.zero is None else self._zeros(rows)
        if order is not None:
            codes = codes[:, order]
        scales = scales.reshape(self.scheme.scale_shape((rows.stop - rows.start, inputs)))
        return QuantizedWeight(codes, scales, zeros, self.scheme)

    def _zeros(self, rows: slice) -> Tensor:
        """int16 [rows, groups], values of the number format."""
        stored = self.checkpoint.read(f"{self.base}.weight_zero_point")
        if isinstance(self.scheme.granularity, PerTensor):
            return stored.to(torch.int16).reshape(1, 1)
        if stored.dtype != torch.int32:
            return stored.to(torch.int16)[rows]
        bits = self.scheme.element.bits
        codes = unpack_int32(stored.T.contiguous(), bits, self.info.shape[0]).T[rows]
        return codes.to(torch.int16).sub_(1 << (bits - 1)).contiguous()

    def _order(self) -> Tensor | None:
        """The order of the input columns that makes their groups consecutive; None where they are."""
        name = f"{self.base}.weight_g_idx"
        if name not in self.checkpoint.tensors:
            return None
        expect(self.checkpoint, name, dtypes=(torch.int32, torch.int64), shape=(self.info.shape[1],))
        group_of = self.checkpoint.read(name).long()
        if bool((group_of == -1).all()):
            return None
        size = self.scheme.group_size(self.info.shape[1])
        order = group_of.argsort(stable=True)
        if not torch.equal(group_of[order], torch.arange(len(order)) // size):
            raise CheckpointError(
                f"{self.checkpoint.path}: {name!r} must give each group {size} inputs. "
                "The checkpoint is damaged: download it again."
            )
        return order


@dataclass(frozen=True)
class CompressedTensors:
    """`quant_method: compressed-tensors`."""

    name: str = "compressed-tensors"

    def open(self, checkpoint: Checkpoint, settings: Mapping[str, Any], dtype: torch.dtype | None) -> Decoding:
        groups = _config_groups(checkpoint, settings)
        ignore = [text for text in settings.get("ignore") or () if isinstance(text, str)]
        tensors: dict[str, Virtual] = {}
        consumed: set[str] = set()
        schemes: set[str] = set()
        floats = float_bases(checkpoint)
        for base in floats:
            _check_ignored(checkpoint, base, ignore)
            number = float_linear(checkpoint, base, dtype)
            tensors[f"{base}.weight"] = Virtual(number.info, number.read, number.coded)
            consumed |= companions(checkpoint, base, FLOAT_PARTS + _UNUSED)
            schemes.add(number.element)
        for base in suffixed(checkpoint, ".weight_packed"):
            if base in floats:
                continue
            _check_ignored(checkpoint, base, ignore)
            linear = _linear(checkpoint, base, groups, dtype)
            tensors[f"{base}.weight"] = Virtual(linear.info, linear.read, linear.coded)
            consumed |= companions(checkpoint, base, _PARTS + _UNUSED)
            schemes.add(linear.scheme.element.name)
        names = " and ".join(sorted(schemes))
        return Decoding(f"compressed-tensors {names} weights", tensors, frozenset(consumed))


def _check_ignored(checkpoint: Checkpoint, base: str, ignore: Iterable[str]) -> None:
    if any(_matches(base, target) for target in ignore):
        raise CheckpointError(
            f"{checkpoint.path}: {base!r} is packed, but the config lists it under 'ignore', as not quantized. "
            "Config and weights are of different versions: download both again."
        )


@dataclass(frozen=True)
class _Group:
    """One of the config's groups: the modules it is for, and how their weights are stored."""

    targets: list[str]
    bits: int
    is_symmetric: bool
    granularity: Granularity


def _config_groups(checkpoint: Checkpoint, settings: Mapping[str, Any]) -> list[_Group]:
    given = settings.get("config_groups")
    if not isinstance(given, Mapping) or not given:
        raise CheckpointError(
            f"{checkpoint.path}: its quantization_config has no 'config_groups', which say how the weights are stored. "
            "Download config.json again."
        )
    found: list[_Group] = []
    for name, group in given.items():
        if not isinstance(group, Mapping) or not isinstance(group.get("weights"), Mapping):
            raise CheckpointError(
                f"{checkpoint.path}: the config group {name!r} does not say how its weights are stored; known are "
                "groups with 'weights' and 'targets'. Give the original model, or save it dequantized."
            )
        kind = group.get("format") or settings.get("format")
        if kind in FORMATS:
            continue
        if kind != _FORMAT:
            raise CheckpointError(
                f"{checkpoint.path}: the config group {name!r} has the compressed-tensors format {kind!r}; known are "
                f"{', '.join((_FORMAT, *FORMATS))}. Give the original model, or save it dequantized."
            )
        found.append(_group(f"{checkpoint.path}: the config group {name!r}", group))
    return found


def _group(where: str, group: Mapping[str, Any]) -> _Group:
    weights = group["weights"]
    bits, size, strategy = weights.get("num_bits"), weights.get("group_size"), weights.get("strategy")
    if strategy is None:
        strategy = "tensor" if size is None else ("channel" if size == -1 else "group")
    if weights.get("type", "int") != "int" or type(bits) is not int or not 2 <= bits <= 8:
        raise CheckpointError(
            f"{where} has weights of type {weights.get('type')!r} with {bits!r} bits; known are 'int' with 2 to 8. "
            "Give the original model, or save it dequantized."
        )
    granularity: Granularity
    if strategy == "group" and type(size) is int and size > 0:
        granularity = PerGroup(size)
    elif strategy in ("tensor", "channel"):
        granularity = PerTensor() if strategy == "tensor" else PerChannel()
    else:
        raise CheckpointError(
            f"{where} has the strategy {strategy!r} with group size {size!r}; known are tensor, channel and "
            "group (with a size). Give the original model, or save it dequantized."
        )
    targets = [text for text in group.get("targets") or () if isinstance(text, str)]
    return _Group(targets, bits, bool(weights.get("symmetric", True)), granularity)


def _matches(name: str, target: str) -> bool:
    if target.startswith("re:"):
        try:
            return re.match(target.removeprefix("re:"), name) is not None
        except re.error as error:
            raise CheckpointError(
                f"the quantization_config names modules by {target!r}, which is no regular expression ({error}). "
                "Download config.json again."
            ) from error
    return target == name


def _linear(checkpoint: Checkpoint, base: str, groups: Iterable[_Group], dtype: torch.dtype | None) -> _Linear:
    for kind in (".weight_scale", ".weight_shape"):
        component(checkpoint, base + kind, of=f"{base}.weight")
    expect(checkpoint, f"{base}.weight_shape", dtypes=(torch.int64, torch.int32), shape=(2,))
    outputs, inputs = (int(length) for length in checkpoint.read(f"{base}.weight_shape"))
    scales = checkpoint.tensors[f"{base}.weight_scale"]
    group = _group_of(checkpoint, base, groups, shape=(outputs, inputs))
    if scales.dtype not in _FLOATS:
        expect(checkpoint, f"{base}.weight_scale", dtypes=_FLOATS, shape=scales.shape)
    scheme = Scheme(
        number_format(f"int{group.bits}"),
        group.granularity,
        ScaleSpec(),
        None if group.is_symmetric else ZeroSpec(),
    ).with_scale_dtype(scales.dtype)
    _check_zeros(checkpoint, base, scheme, shape=(outputs, inputs))
    return _Linear(checkpoint, base, TensorInfo(dtype or scales.dtype, (outputs, inputs)), scheme)


def _group_of(checkpoint: Checkpoint, base: str, groups: Iterable[_Group], *, shape: tuple[int, int]) -> _Group:
    """The config group of the weight `base`: by exact name, else by pattern, else by the class of its module.

    A checkpoint does not tell classes: where several groups name one, the group is the first that fits what is stored.
    """
    known = list(groups)
    exact = [group for group in known if base in group.targets]
    pattern = [group for group in known if any(t.startswith("re:") and _matches(base, t) for t in group.targets)]
    # A class's name has no dots.
    by_class = [group for group in known if any(t.isidentifier() for t in group.targets)]
    candidates = (exact or pattern)[:1] or by_class
    for group in candidates:
        if _fits(checkpoint, base, group, shape=shape):
            return group
    stored = {part: list(checkpoint.tensors[base + part].shape) for part in _PARTS if base + part in checkpoint.tensors}
    raise CheckpointError(
        f"{checkpoint.path}: {base!r} [{shape[0]}, {shape[1]}] is stored as {stored}; that fits none of the config's "
        f"groups that are for it ({'; '.join(map(_describe, candidates)) or 'there is none'}). Save it again with "
        "compressed-tensors 0.18 or later (older ones pad 3, 5, 6 and 7 bits), or give the original model."
    )


def _describe(group: _Group) -> str:
    return f"{group.bits} bits, {group.granularity}, {'symmetric' if group.is_symmetric else 'asymmetric'}"


def _fits(checkpoint: Checkpoint, base: str, group: _Group, *, shape: tuple[int, int]) -> bool:
    packed, scales = checkpoint.tensors[f"{base}.weight_packed"], checkpoint.tensors[f"{base}.weight_scale"]
    if min(shape) < 0 or packed.dtype != torch.int32:
        return False
    if packed.shape != (shape[0], packed_words(shape[1], group.bits)):
        return False
    match group.granularity:
        case PerTensor():
            return math.prod(scales.shape) == 1
        case PerChannel():
            return scales.shape in ((shape[0],), (shape[0], 1))
        case PerGroup(size):
            return shape[1] % size == 0 and scales.shape == (shape[0], shape[1] // size)


def _check_zeros(checkpoint: Checkpoint, base: str, scheme: Scheme, *, shape: tuple[int, int]) -> None:
    if scheme.zero is None:
        return
    name = f"{base}.weight_zero_point"
    info = component(checkpoint, name, of=f"{base}.weight")
    rows, groups = scheme.scale_shape(shape)
    if isinstance(scheme.granularity, PerTensor):
        expect(checkpoint, name, dtypes=(torch.int8,), shape=(1,) * len(info.shape))
    elif info.dtype == torch.int32:
        expect(checkpoint, name, dtypes=(torch.int32,), shape=(packed_words(rows, scheme.element.bits), groups))
    else:
        expect(checkpoint, name, dtypes=(torch.int8,), shape=(rows, groups))


PROVIDES: tuple[Decoder, ...] = (CompressedTensors(),)
