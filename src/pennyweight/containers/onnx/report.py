"""What a file turned out to be, and what its user should know of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from pennyweight.containers.onnx.bias import distances
from pennyweight.containers.onnx.calls import Written
from pennyweight.containers.onnx.dialect import Dialect
from pennyweight.containers.onnx.rules import Form
from pennyweight.models.network.quantized import QuantizedNetwork
from pennyweight.schemes import PerGroup

# From here on a sum of two products with uint8 can leave int16.
_SEVEN_BITS = 64


@dataclass(frozen=True)
class OnnxReport:
    """opset       of the file
    sizes       exact bytes of codes, scales and zero points, site by site
    forms       how each site enters its operation: "integers", "blocks" or "decoded"
    blocks      site whose input ONNX Runtime rounds by itself -> how many numbers together, to 8 bits
    notes       what does not go as one might expect, in sentences
    file_bytes  of the .onnx file and of what lies beside it
    """

    opset: int
    sizes: Mapping[str, int]
    forms: Mapping[str, Form]
    blocks: Mapping[str, int]
    notes: tuple[str, ...] = ()
    file_bytes: int = 0


def notes_of(
    quantized: QuantizedNetwork, written: Mapping[str, Written], dialect: Dialect, guarded: list[str]
) -> tuple[str, ...]:
    """All that apply, those that change results first."""
    return (
        *_about_results(written, dialect),
        *_about_speed(written, dialect),
        *_about_size(written),
        *_about_the_rest(quantized, written, guarded),
    )


def _about_results(written: Mapping[str, Written], dialect: Dialect) -> Iterator[str]:
    wide = [name for name, site in written.items() if site.form == "integers" and _reach(site) > _SEVEN_BITS]
    if wide:
        yield (
            f"{_named(wide)}: x86 processors without VNNI add two products of uint8 and int8 in int16, where they "
            "may saturate: use int7-channel or fewer bits for them, or the session option session.x64quantprecision"
        )
    rounded = [name for name, site in written.items() if site.input_block(dialect) is not None]
    if rounded:
        yield (
            f"{_named(rounded)}: ONNX Runtime rounds the input to 8 bits a "
            "block (accuracy level 4); accuracy level 0 computes in float32"
        )
    large = [name for name, site in written.items() if site.is_too_large]
    if large:
        yield (
            f"{_named(large)}: a bias or a sum may leave int32, since the weights are very small beside the bias: "
            "computed in float"
        )


def _about_speed(written: Mapping[str, Written], dialect: Dialect) -> Iterator[str]:
    slow = [
        name
        for name, site in written.items()
        if site.form == "blocks" and site.stored.bits != 4 and site.accuracy_level(dialect) != 4
    ]
    if slow and dialect.runtime == "onnxruntime":
        yield (
            f"{_named(slow)}: 2 and 8 bits are slow at accuracy level 0, which computes in float32: level 4 is the "
            "fast one, for weights alone"
        )
    floats = [name for name, site in written.items() if site.form == "blocks" and site.stored.has_float_zeros]
    if floats:
        yield f"{_named(floats)}: float zero points have no fast kernel: use integer ones (-asym)"
    depthwise = [
        name
        for name, site in written.items()
        if site.form == "integers" and site.stored.site.kind == "conv" and site.stored.site.groups > 1
    ]
    if depthwise:
        yield f"{_named(depthwise)}: grouped convolutions may be slower in 8 bits than in float: measure them"
    decoded = [name for name, site in written.items() if site.form == "decoded"]
    if decoded and dialect.decodes_by_arithmetic:
        yield f"{_named(decoded)}: decoded when a session is made: a smaller file, but no faster than float"
    elif decoded and dialect.runtime == "onnxruntime":
        yield f"{_named(decoded)}: decoded at every run: slower than float; leave out portable to have it done once"
    grouped = [name for name in decoded if isinstance(written[name].stored.scheme.granularity, PerGroup)]
    activated = [name for name in grouped if any(call.activation for call in written[name].calls)]
    if activated:
        yield f"{_named(activated)}: groups have no product of integers: computed in float from rounded inputs"


def _about_size(written: Mapping[str, Written]) -> Iterator[str]:
    for bits in (4, 8):
        wider = [name for name, site in written.items() if site.stored.bits == bits and site.stored.element.bits < bits]
        if wider and bits == 4:
            yield f"{_named(wider)}: stored in 4 bits a weight: the reader has no tensors of so few bits"
        elif wider:
            yield f"{_named(wider)}: stored in 8 bits a weight: ONNX has nothing between 4 and 8"


def _about_the_rest(quantized: QuantizedNetwork, written: Mapping[str, Written], guarded: list[str]) -> Iterator[str]:
    transposed = [
        name for name, site in written.items() if site.stored.site.kind == "conv_transpose" and quantized.activations
    ]
    if transposed:
        yield f"{_named(transposed)}: transposed convolutions have no product of integers: computed in float"
    if guarded:
        yield (
            f"{_named(guarded)}: in float between rounded values, behind a Max of one value: ONNX Runtime would round "
            "the weights otherwise"
        )


def _reach(site: Written) -> int:
    return int(distances(site.weight).abs().max())


def _named(names: list[str]) -> str:
    """The first few names."""
    shown = 3
    rest = f" and {len(names) - shown} more" if len(names) > shown else ""
    return f"{', '.join(names[:shown])}{rest}"
