"""The short names of schemes: `int4-g128`, `int4-g32-asym`, `int8-channel-bf16`."""

from __future__ import annotations

import re

from pennyweight.core.errors import UsageError
from pennyweight.formats import number_format
from pennyweight.schemes.scheme import (
    Granularity,
    PerChannel,
    PerGroup,
    PerTensor,
    ScaleDtype,
    ScaleSpec,
    Scheme,
    ZeroSpec,
)

_NAME = re.compile(
    r"(?P<element>[a-z0-9_]+)-(?P<shared>tensor|channel|g[1-9][0-9]{0,8})(?P<asym>-asym)?(?:-(?P<scale>f16|bf16|f32))?"
)
_SCALES: dict[str | None, ScaleDtype] = {None: "model", "f16": "float16", "bf16": "bfloat16", "f32": "float32"}


def parse_scheme(name: str) -> Scheme:
    """The scheme of a short name: FORMAT-(tensor|channel|gSIZE)[-asym][-(f16|bf16|f32)].

    Without the last part scales take the checkpoint's type. Raises UsageError.

    >>> parse_scheme("int4-g32-asym").name
    'int4-g32-asym'
    """
    match = _NAME.fullmatch(name)
    if match is None:
        raise UsageError(
            f"{name!r} is not the name of a scheme: write FORMAT-SHARED[-asym][-SCALE], for example int4-g128, "
            "int4-g32-asym, int8-channel, int8-tensor-f32 (SHARED: tensor, channel or g and the group size; "
            "SCALE: f16, bf16 or f32, by default the checkpoint's type)"
        )
    return Scheme(
        element=number_format(match["element"]),
        granularity=_granularity(match["shared"]),
        scale=ScaleSpec(_SCALES[match["scale"]]),
        zero=ZeroSpec() if match["asym"] else None,
    )


def _granularity(shared: str) -> Granularity:
    if shared == "tensor":
        return PerTensor()
    return PerChannel() if shared == "channel" else PerGroup(int(shared[1:]))
