"""The short names of schemes: `int4-g128`, `int4-g32-asym`, `nf4-g64`, `mxfp4`, `uint4-g32-offset-uint6x8.f16`."""

from __future__ import annotations

import re

from pennyweight.core.errors import UsageError
from pennyweight.formats import number_format
from pennyweight.schemes.scheme import SHORT, WORDS, Scheme
from pennyweight.schemes.storage import Granularity, PerChannel, PerGroup, PerTensor, ScaleSpec, ZeroSpec

_KINDS = {short: dtype for dtype, short in SHORT.items()}
_SPEC = r"[a-z][a-z0-9_]*(?:\.[a-z0-9]+)?"
_NAME = re.compile(
    r"(?P<element>[a-z0-9_]+)-(?P<shared>tensor|channel|g[1-9][0-9]{0,8})"
    rf"(?:-(?:(?P<asym>asym)|fzero(?:=(?P<zero>f16|bf16|f32|model))?(?P<fzero>)|offset(?:=(?P<offset>{_SPEC}))?(?P<has>)))?"
    rf"(?:-(?P<scale>(?!(?:asym|fzero|offset)\b){_SPEC})(?:-(?P<computed>f16|bf16|f32))?)?"
)
_STORED = re.compile(r"(?P<format>[a-z][a-z0-9_]*?)(?:x(?P<span>[1-9][0-9]{0,8}))?(?:\.(?P<parent>[a-z0-9]+))?")


def parse_scheme(name: str) -> Scheme:
    """The scheme of a short name: FORMAT-SHARED[-asym | -fzero[=TYPE] | -offset[=STORED]][-STORED[-IN]], or a word.

    FORMAT  a number format: int4, uint3, nf4, ternary, bal2, fp4_e2m1, fp8_e4m3 ...
    SHARED  what shares a scale: tensor, channel, or g and the group size
    -asym   integer zero points; -fzero float ones, of the scales' type or of TYPE; -offset offsets, stored like the
            scales or as its own STORED says
    STORED  how scales are stored: TYPE, by default the checkpoint's type; or a number format, alone (e8m0), with one
            parent for the weight (fp8_e4m3.f32), or with a parent for so many scales (uint6x8.f16)
    IN      f16, bf16 or f32: the type in which a reader computes weights; by default that of the scales where they are
            floats and nothing else but integer zero points is stored, and f32 otherwise
    TYPE    f16, bf16, f32 or model
    word    mxfp4, mxfp8, nvfp4; for GGUF q4_0, q4_k, iq4_xs ...: see WORDS

    Raises UsageError.

    >>> [parse_scheme(name).name for name in ("int4-g32-asym", "fp4_e2m1-g32-e8m0", "int4-g32-f16-f32")]
    ['int4-g32-asym', 'mxfp4', 'q4_0']
    """
    match = _NAME.fullmatch(WORDS.get(name, name))
    if match is None:
        raise _not_a_name(name)
    scale = ScaleSpec() if match["scale"] is None else _spec(match["scale"], name)
    zero = offset = None
    if match["asym"] is not None:
        zero = ZeroSpec()
    elif match["fzero"] is not None:
        zero = ZeroSpec(_KINDS[match["zero"] or SHORT[scale.root]])
    elif match["has"] is not None:
        offset = scale if match["offset"] is None else _spec(match["offset"], name)
    computed = None if match["computed"] is None else _KINDS[match["computed"]]
    return Scheme(number_format(match["element"]), _granularity(match["shared"]), scale, zero, offset, computed)


def _spec(text: str, name: str) -> ScaleSpec:
    if text in _KINDS:
        return ScaleSpec(_KINDS[text])
    match = _STORED.fullmatch(text)
    if match is None or match["parent"] not in {None, *_KINDS} or (match["span"] and not match["parent"]):
        raise _not_a_name(name)
    parent = None if match["parent"] is None else ScaleSpec(_KINDS[match["parent"]])
    try:
        return ScaleSpec(match["format"], parent, int(match["span"]) if match["span"] else None)
    except UsageError as error:
        raise _not_a_name(name) from error


def _granularity(shared: str) -> Granularity:
    if shared == "tensor":
        return PerTensor()
    return PerChannel() if shared == "channel" else PerGroup(int(shared[1:]))


def _not_a_name(name: str) -> UsageError:
    return UsageError(
        f"{name!r} is not the name of a scheme: write FORMAT-SHARED[-asym][-SCALE], for example int4-g128, "
        "int4-g32-asym, int8-channel, nf4-g64, int4-g64-offset-f16, mxfp4 (SHARED: tensor, channel or g and the group "
        "size; -asym integer zero points, -fzero float ones, -offset offsets; SCALE: f16, bf16, f32, by default the "
        "checkpoint's type, or a number format as in e8m0, fp8_e4m3.f32, uint6x8.f16; a float type after SCALE: "
        f"that in which a reader computes; words: {', '.join(WORDS)})"
    )
