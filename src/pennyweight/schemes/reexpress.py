"""The same weight in another scheme, where that holds the same numbers."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from pennyweight.core.errors import ShapeError
from pennyweight.core.parallel import chunks, parallel_map
from pennyweight.formats import NumberFormat
from pennyweight.formats.integer import Int
from pennyweight.schemes.parameters import Parameters
from pennyweight.schemes.quantized import QuantizedWeight, grouped
from pennyweight.schemes.scheme import Scheme
from pennyweight.schemes.storage import PerTensor, ScaleSpec

# Weights taken at a time: the float64 temporaries stay in a core's second-level cache.
_CHUNK = 1 << 15
# What values may be multiplied by, and scales divided by: small floats of ggml are twice those of others.
_FACTORS = (1.0, 2.0, 0.5)


class _Inexact(Exception):
    """Why the scheme does not hold the numbers."""


@dataclass(frozen=True)
class _Numbers:
    """scale * (value - zero) = scale * value - offset, each float64 [rows, groups] of the scheme asked for."""

    scales: Tensor
    zeros: Tensor
    offsets: Tensor


def reexpressed(weight: QuantizedWeight, scheme: Scheme) -> QuantizedWeight | str:
    """`weight` [out, in] as `scheme` stores it, or why that would not be the same, in a sentence without its end.

    The same are scale * (value - zero) and scale * value - offset as real numbers; in which type a reader computes
    them (Scheme.arithmetic) is not asked here. A scale is repeated for smaller groups, or stands for several that are
    equal; scales and offsets change their type where they are numbers of the other one; zero points go into the values
    or become offsets; values become codes of another number format that has them.

    >>> from pennyweight.schemes import parse_scheme
    >>> codes = torch.tensor([[0, 7]], dtype=torch.uint8)
    >>> w = QuantizedWeight(codes, torch.ones(1, 1), None, parse_scheme("int3-g2-f32"))
    >>> reexpressed(w, parse_scheme("int4-g1-f16")).codes
    tensor([[ 4, 11]], dtype=torch.uint8)
    """
    if scheme == weight.scheme:
        return weight
    if scheme.scale.parent is not None or (scheme.offset is not None and scheme.offset.element is not None):
        return f"{weight.scheme} given: scales with parents as {scheme} has them are found by rounding only"
    if scheme.zero is not None and not scheme.has_integer_zero:
        return f"{weight.scheme} given: {scheme} has zero points that are found by rounding only"
    factors = _FACTORS[:1] if isinstance(weight.scheme.element, Int) else _FACTORS
    reasons = []
    for factor in factors:
        try:
            return _same(weight, scheme, factor)
        except (_Inexact, ShapeError) as reason:
            reasons.append(str(reason))
    return reasons[0]


def _same(weight: QuantizedWeight, scheme: Scheme, factor: float) -> QuantizedWeight:
    numbers = _numbers(weight, scheme)
    shift = _shift(weight.scheme.element, scheme)
    zeros = offsets = None
    if scheme.zero is not None:
        zeros = _integers(numbers.zeros * factor + shift, scheme.element).to(torch.int16)
    elif scheme.offset is not None:
        offsets = _stored(numbers.offsets + numbers.scales / factor * shift, scheme.offset, "offsets")
    scales = _stored(numbers.scales / factor, scheme.scale, "scales")
    # What a value is shifted by: where nothing else takes it, the zero point.
    taken = (
        numbers.zeros * factor
        if scheme.zero is None and scheme.offset is None
        else torch.full_like(numbers.zeros, -shift)
    )
    codes = _codes(weight, scheme, factor, taken)
    return QuantizedWeight.of(codes, Parameters(scales, zeros, offsets), scheme)


def _numbers(weight: QuantizedWeight, scheme: Scheme) -> _Numbers:
    given = weight.parameters.decoded(weight.scheme)
    scales = given.scales.double()
    if not bool(scales.isfinite().all()):
        raise _Inexact(f"{weight.scheme} given: some of its scales are no numbers")
    zeros = offsets = torch.zeros_like(scales)
    if given.zeros is not None:
        zeros = given.zeros.double()
        offsets = zeros * scales
    elif given.offsets is not None:
        offsets = given.offsets.double()
        zeros = torch.where(offsets == 0, 0.0, offsets / scales)
    return _Numbers(*(_regrouped(x, weight, scheme) for x in (scales, zeros, offsets)))


def _regrouped(x: Tensor, weight: QuantizedWeight, scheme: Scheme) -> Tensor:
    """`x` [rows, groups] of the weight's scheme for the groups of `scheme`."""
    rows, columns = weight.shape
    old, new = weight.scheme.group_size(columns), scheme.group_size(columns)
    fine = math.gcd(old, new) or 1
    x = x.expand(rows, -1).repeat_interleave(old // fine, dim=1)
    shape = scheme.scale_shape(weight.shape)
    if not x.numel():
        return x.new_zeros(shape)
    x = x.reshape(1, 1, -1) if isinstance(scheme.granularity, PerTensor) else x.reshape(*shape, -1)
    if not bool((x == x[..., :1]).all()):
        raise _Inexact(f"{weight.scheme} given: one scale of {scheme} would stand for several that differ")
    return x[..., 0]


def _shift(element: NumberFormat, scheme: Scheme) -> float:
    """What is added to values so that the number format has room for them, and to zero points: 0 where it has."""
    has_room = scheme.element.smallest <= element.smallest and element.largest <= scheme.element.largest
    is_shifted = scheme.zero is not None or scheme.offset is not None
    return 0.0 if has_room or not is_shifted else scheme.element.smallest - element.smallest


def _stored(x: Tensor, spec: ScaleSpec, what: str) -> Tensor:
    """`x` float64 as `spec` stores it."""
    stored = x.to(spec.torch_dtype) if spec.element is None else spec.element.encode(x.float())
    back = stored.double() if spec.element is None else spec.element.decode(stored).double()
    wrong = int((back != x).sum())
    if wrong:
        raise _Inexact(f"{wrong} of its {x.numel()} {what} are no {spec.dtype} numbers")
    return stored


def _integers(x: Tensor, element: NumberFormat) -> Tensor:
    if not bool(((x == x.round()) & (x >= element.smallest) & (x <= element.largest)).all()):
        raise _Inexact(f"its zero points or offsets are no zero points of {element.name}")
    return x


def _codes(weight: QuantizedWeight, scheme: Scheme, factor: float, taken: Tensor) -> Tensor:
    """Codes of value * factor - `taken` [rows, groups] in the number format of `scheme`."""
    own = torch.empty_like(weight.codes)
    if not own.numel():
        return own
    codes, given = grouped(own, scheme), grouped(weight.codes, scheme)

    def rows(part: slice) -> bool:
        values = weight.scheme.element.decode(given[part]).double().mul_(factor).sub_(taken[part][..., None])
        codes[part] = scheme.element.encode(values.float())
        return torch.equal(scheme.element.decode(codes[part]).double(), values)

    parts = chunks(codes.shape[0], max(1, _CHUNK // (codes.shape[1] * codes.shape[2])))
    if not all(parallel_map(rows, parts)):
        less = "" if weight.scheme.zero is None and weight.scheme.offset is None else " less its zero points or offsets"
        raise _Inexact(f"{weight.scheme} given: some of its values{less} are no numbers of {scheme.element.name}")
    return own
