"""Which schemes a file can hold for which site, in which form, and in how many bytes."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import torch

from pennyweight.containers.onnx.dialect import Dialect, Runtime
from pennyweight.containers.onnx.stored import Stored
from pennyweight.formats.integer import Int
from pennyweight.models.network.network import NetworkSite, NetworkSiteKind
from pennyweight.schemes import PerGroup, Scheme
from pennyweight.schemes.activation import ActivationScheme

# integers  codes enter a product of integers
# blocks    codes enter MatMulNBits or GatherBlockQuantized
# decoded   codes are decoded, and the operation is one in float
Form = Literal["integers", "blocks", "decoded"]

# Weights of a block: what the kernels of ONNX Runtime have.
_BLOCKS = (256, 128, 64, 32, 16)
_FLOAT_ZERO_BITS = (2, 4)


def why_not(
    scheme: Scheme, site: NetworkSite, runtime: Runtime, *, activation: ActivationScheme | None = None
) -> str | None:
    """None if the file holds `scheme` for `site` and `runtime` reads it, else why not, in a sentence."""
    Dialect(runtime)
    if not isinstance(scheme.element, Int):
        return f"ONNX files hold integers, not {scheme.element.name}: use a scheme such as int4-channel"
    if scheme.offset is not None or scheme.scale.element is not None:
        return f"{scheme}: ONNX has neither offsets nor scales that are codes: use zero points and float scales"
    if not _is_float32(scheme):
        return f"{scheme}: scales are float32 in ONNX files: use Scheme.with_scale_dtype(torch.float32)"
    if 0 in site.matrix_shape:
        return f"the weight {list(site.shape)} has no elements"
    if isinstance(scheme.granularity, PerGroup) and site.matrix_shape[1] % scheme.granularity.size:
        return (
            f"{site.matrix_shape[1]} inputs cannot be split into groups of {scheme.granularity.size}: use a group size "
            "that divides them, or one scale per channel"
        )
    if activation is None:
        return None
    if activation.is_dynamic and site.kind == "linear" and not has_integers(site.kind, scheme, activation):
        return (
            f"{scheme} beside {activation.name}: numbers are rounded in the run for products of integers alone, which "
            "want one scale per channel: use w4a8-channel-dynamic, or int4-g32, whose inputs MatMulNBits rounds"
        )
    return why_not_activation(activation)


def why_not_activation(activation: ActivationScheme) -> str | None:
    """The same for how the numbers on an edge are rounded."""
    if activation.element.bits not in (4, 8):
        return f"{activation.name}: QuantizeLinear gives 4 or 8 bits: use uint8"
    if activation.is_dynamic and (activation.element != Int(8, signed=False) or activation.is_symmetric):
        return f"{activation.name}: DynamicQuantizeLinear gives uint8 with a zero point: use uint8-dynamic"
    return None


def _is_float32(scheme: Scheme) -> bool:
    kinds = [scheme.scale.dtype, *([scheme.zero.dtype] if scheme.zero is not None else [])]
    return set(kinds) <= {"float32", "integer"} and scheme.arithmetic == torch.float32


def size_bytes(
    scheme: Scheme,
    site: NetworkSite,
    runtime: Runtime = "onnxruntime",
    *,
    activation: ActivationScheme | None = None,
    is_portable: bool = False,
) -> int:
    """Exact bytes of the codes, scales and zero points of `site` in the file, where `activation` rounds what it reads.

    Biases and the scale of an edge are not counted: they are as many as in the float file, or a few bytes.
    """
    dialect = Dialect(runtime, is_portable)
    return stored_as(site, scheme, usual_form(site, scheme, dialect, activation), dialect).size_bytes


def usual_form(site: NetworkSite, scheme: Scheme, dialect: Dialect, activation: ActivationScheme | None) -> Form:
    """The form of a site whose every reader is of its own kind and reads what `activation` rounds."""
    if has_integers(site.kind, scheme, activation):
        return "integers"
    is_alone = site.kind == "linear" or (site.kind == "embedding" and not (site.tied and activation is not None))
    return "blocks" if is_alone and block_of(site, scheme, dialect) is not None else "decoded"


def has_integers(kind: NetworkSiteKind, scheme: Scheme, activation: ActivationScheme | None) -> bool:
    """Whether there is a product of integers: one scale a row, 8 bits before it."""
    is_row = not isinstance(scheme.granularity, PerGroup) and (scheme.zero is None or scheme.has_integer_zero)
    if activation is None or activation.element.bits != 8 or not is_row:
        return False
    return kind == "linear" or (kind == "conv" and not activation.is_dynamic)


def block_of(site: NetworkSite, scheme: Scheme, dialect: Dialect) -> int | None:
    """Weights of a block in which the site can be stored, or None: groups are whole blocks, and the least is added at
    the end of a row."""
    assert isinstance(scheme.element, Int)
    bits = 2 if scheme.element.bits == 2 else 4 if scheme.element.bits <= 4 else 8
    if not dialect.has_blocks(bits) or site.kind not in ("linear", "embedding"):
        return None
    if scheme.zero is not None and not scheme.has_integer_zero:
        # Float zero points of signed integers would have to be moved by half the range, which rounds them.
        is_held = bits in _FLOAT_ZERO_BITS and not scheme.element.signed and site.kind == "linear"
        if not is_held:
            return None
    inputs = site.matrix_shape[1]
    # An embedding and a head that share their bytes lie in whole blocks, and one of them reads them reshaped.
    if site.tied and (inputs % _BLOCKS[-1] or not dialect.folds):
        return None
    if isinstance(scheme.granularity, PerGroup):
        return next((block for block in _BLOCKS if scheme.granularity.size % block == 0), None)
    if site.kind == "embedding" and inputs * bits % 8:
        return None
    return min(_BLOCKS, key=lambda block: (-(-inputs // block) * block, -block))


def stored_as(site: NetworkSite, scheme: Scheme, form: Form, dialect: Dialect) -> Stored:
    """How `site` lies in the file; `scheme` is one that `why_not` lets pass."""
    assert isinstance(scheme.element, Int)
    width = scheme.element.bits
    if form == "blocks":
        block = block_of(site, scheme, dialect)
        bits = 2 if width == 2 else 4 if width <= 4 else 8
        return Stored(site, scheme, bits, block, is_filled=site.kind == "linear", is_full=not dialect.folds)
    bits = 8 if width > 4 else 2 if width == 2 and dialect.has_int2 else 4
    stored = Stored(site, scheme, bits)
    # DequantizeLinear has no float zero points.
    is_spread = form == "decoded" and (dialect.decodes_by_arithmetic or stored.has_float_zeros)
    return replace(stored, is_spread=is_spread)
