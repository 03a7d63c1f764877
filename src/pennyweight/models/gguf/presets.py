"""The mixes of llama.cpp's quantizer, llama-quantize, by their names: Q4_K_M and its like.

A mix has a type for most tensors and others for what suffers more: the values of attention, down projections of early
and late layers, the output. Which layers these are depends on the model. The rules are those of llama-quant.cpp.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from pennyweight.core.errors import ContainerError
from pennyweight.models.gguf.conversion import Conversion
from pennyweight.models.gguf.types import BLOCK_TYPES

# Where a block does not divide the inputs; to what remains the quantizer gives F16.
_STAND_INS = {
    "Q2_K": "Q4_0", "Q3_K": "Q4_0", "TQ2_0": "Q4_0", "IQ4_XS": "IQ4_NL", "Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0",
}  # fmt: skip
_NEVER = ("_norm.weight", "ffn_gate_inp.weight")
_VALUES = ("attn_v", "attn_qkv")
# A model of 80 layers is known as the one of 70 B weights, whose values are few and worth more bits.
_LAYERS_OF_70B = 80


@dataclass(frozen=True)
class _Model:
    """gqa: query heads for each head of keys and values. has_data: an importance matrix is given."""

    layers: int
    gqa: int
    experts: int
    is_70b: bool
    is_tied: bool
    has_data: bool


# (model, layer) -> the type that the tensor gets in place of the mix's own, None for that one
_Rule = Callable[[_Model, int], str | None]


def _own(model: _Model, layer: int) -> None:
    return None


def _all(kind: str) -> _Rule:
    return lambda model, layer: kind


def _first(count: int, kind: str, rest: str | None = None) -> _Rule:
    return lambda model, layer: kind if layer < count else rest


def _part(share: int, kind: str, rest: str | None = None, *, has_data: bool | None = None) -> _Rule:
    """The first of `share` equal parts of the layers, only with or only without data where `has_data` says so."""

    def rule(model: _Model, layer: int) -> str | None:
        is_meant = has_data is None or has_data == model.has_data
        return kind if is_meant and layer < model.layers // share else rest

    return rule


def _ends_and_thirds(kind: str) -> _Rule:
    """The first and the last eighth of the layers, and each third between."""

    def rule(model: _Model, layer: int) -> str | None:
        first, last = model.layers // 8, 7 * model.layers // 8
        return kind if layer < first or layer >= last or (layer - first) % 3 == 2 else None

    return rule


def _shared(kind: str, rest: str | None = None) -> _Rule:
    """Where four query heads or more share the values."""
    return lambda model, layer: kind if model.gqa >= 4 else rest


@dataclass(frozen=True)
class _Mix:
    """own       type of all tensors that no rule names
    values      rule of the projection to values, or of that to queries, keys and values in one
    down        rule of the down projections, those of experts too
    attention   rule of the output projection of attention; of_eight: its type in models of eight experts
    embedding   type of an embedding that is not the output too
    """

    own: str
    values: _Rule = _own
    down: _Rule = _own
    attention: _Rule = _own
    of_eight: str | None = None
    embedding: str | None = None


_MIXES: Mapping[str, _Mix] = {
    "Q2_K": _Mix("Q2_K", _shared("Q4_K", "Q3_K"), _all("Q3_K"), _all("Q3_K"), of_eight="Q5_K"),
    "Q2_K_S": _Mix("Q2_K", _shared("Q4_K"), _part(8, "Q4_K")),
    "Q3_K_S": _Mix("Q3_K", of_eight="Q5_K"),
    "Q3_K_M": _Mix("Q3_K", _first(2, "Q5_K", "Q4_K"), _part(16, "Q5_K", "Q4_K"), _all("Q4_K"), of_eight="Q5_K"),
    "Q3_K_L": _Mix("Q3_K", _all("Q5_K"), _all("Q5_K"), _all("Q5_K")),
    "Q4_0": _Mix("Q4_0", down=_part(8, "Q4_1", has_data=True)),
    "Q4_1": _Mix("Q4_1"),
    "Q4_K_S": _Mix("Q4_K", _first(4, "Q5_K"), _part(8, "Q5_K"), of_eight="Q5_K"),
    "Q4_K_M": _Mix("Q4_K", _ends_and_thirds("Q6_K"), _ends_and_thirds("Q6_K"), of_eight="Q5_K"),
    "Q5_0": _Mix("Q5_0", down=_part(8, "Q5_1", has_data=True)),
    "Q5_1": _Mix("Q5_1"),
    "Q5_K_S": _Mix("Q5_K"),
    "Q5_K_M": _Mix("Q5_K", _ends_and_thirds("Q6_K"), _ends_and_thirds("Q6_K")),
    "Q6_K": _Mix("Q6_K"),
    "Q8_0": _Mix("Q8_0"),
    "IQ4_NL": _Mix("IQ4_NL", _shared("Q5_K"), _part(8, "Q5_K", has_data=False), of_eight="Q5_K"),
    "IQ4_XS": _Mix("IQ4_XS", _shared("Q5_K"), _part(8, "Q5_K", has_data=False), of_eight="Q5_K"),
    "TQ2_0": _Mix("TQ2_0", embedding="Q4_K"),
    "MXFP4_MOE": _Mix("MXFP4"),
}
PRESETS = tuple(_MIXES)


def preset_types(name: str, model: Conversion, *, has_data: bool) -> dict[str, str | None]:
    """The type of each tensor of `model` in the mix `name` of PRESETS: ggml's name of it, None where it stays in float.

    has_data  whether importance is known, which changes a few types

    Raises ContainerError for a model whose metadata do not say what the mixes depend on.
    """
    facts = _facts(model, has_data=has_data)
    return {
        tensor: _fitting(_wanted(name, tensor, shape, facts), shape) if _is_quantized(tensor, shape) else None
        for tensor, shape in model.shapes.items()
    }


def _facts(model: Conversion, *, has_data: bool) -> _Model:
    layers, heads = (_number(model, key) for key in ("block_count", "attention.head_count"))
    heads_kv = _number(model, "attention.head_count_kv", heads)
    is_70b = layers == _LAYERS_OF_70B and (
        model.architecture == "qwen2" or (model.architecture == "llama" and model.experts != 8 and heads != heads_kv)
    )
    return _Model(layers, heads // heads_kv, model.experts, is_70b, "output.weight" not in model.shapes, has_data)


def _number(model: Conversion, key: str, otherwise: int | None = None) -> int:
    field = model.fields.get(f"{model.architecture}.{key}")
    value = otherwise if field is None else field.value
    if not isinstance(value, int) or value < 1:
        raise ContainerError(
            f"{model.architecture}.{key}: {value} given, the mixes of llama.cpp's quantizer depend on a number above 0 "
            "there: give a scheme, a size or a plan file"
        )
    return value


def _is_quantized(tensor: str, shape: tuple[int, ...]) -> bool:
    """Matrices alone; one of a single row counts as a vector."""
    is_matrix = len(shape) > 1 and max(shape[:-1]) > 1
    return is_matrix and tensor.endswith("weight") and not any(part in tensor for part in _NEVER)


def _wanted(name: str, tensor: str, shape: tuple[int, ...], model: _Model) -> str:
    mix = _MIXES[name]
    is_output = tensor == "output.weight" or (model.is_tied and tensor == "token_embd.weight")
    if name == "MXFP4_MOE":
        return mix.own if len(shape) > 2 and shape[0] > 1 and not is_output else "Q8_0"
    if is_output:
        return "Q8_0" if mix.own == "Q8_0" or shape[-1] % BLOCK_TYPES[mix.own].weights else "Q6_K"
    if tensor == "token_embd.weight":
        return mix.embedding or mix.own
    block, _, rest = tensor.removesuffix(".weight").partition(".")
    layer, _, part = rest.partition(".")
    return (_of_layer(mix, part, int(layer), model) if block == "blk" and layer.isdecimal() else None) or mix.own


def _of_layer(mix: _Mix, part: str, layer: int, model: _Model) -> str | None:
    if part in _VALUES:
        kind = mix.values(model, layer) or mix.own
        if model.experts == 8:
            return "Q8_0"
        return "Q5_K" if model.is_70b and kind in ("Q3_K", "Q4_K") else kind
    if part == "attn_k":
        return "Q8_0" if model.experts == 8 else None
    if part.startswith("ffn_down"):
        return mix.down(model, layer)
    if part == "attn_output":
        return mix.of_eight if model.experts == 8 else mix.attention(model, layer)
    return None


def _fitting(kind: str, shape: tuple[int, ...]) -> str | None:
    if shape[-1] % BLOCK_TYPES[kind].weights:
        kind = _STAND_INS.get(kind, kind)
    return None if shape[-1] % BLOCK_TYPES[kind].weights else kind
