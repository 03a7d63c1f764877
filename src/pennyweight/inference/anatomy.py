"""What the blocks of a decoder consist of, if they are the usual ones: attention with turned heads, a gated
feed-forward part, a root-mean-square norm before each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pennyweight.inference.modules import PackedLinear

_LINEARS = (
    "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
    "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj",
)  # fmt: skip
_NORMS = ("input_layernorm", "post_attention_layernorm")
_HEAD_NORMS = ("self_attn.q_norm", "self_attn.k_norm")
# Kinds of positions whose angles do not depend on the length of the text.
_ROTARY = {"default", "linear", "llama3", "yarn", "proportional"}
# The numbers that csrc/packed.h gives to activations.
_ACTIVATIONS: tuple[Callable[[Tensor], Tensor], ...] = (
    nn.functional.silu,
    lambda x: nn.functional.gelu(x, approximate="tanh"),
)


@dataclass(frozen=True)
class BlockParts:
    """Norms are float32 weights [hidden] or [width]; linears in the order query, key, value, out, gate, up, down."""

    attention_norm: Tensor
    feed_norm: Tensor
    query_norm: Tensor | None
    key_norm: Tensor | None
    linears: list[nn.Module]
    window: int


@dataclass(frozen=True)
class Anatomy:
    """A whole decoder. `width` is that of a head, of which `rotated` numbers are turned by the angles of `rotary`."""

    hidden: int
    heads: int
    key_heads: int
    width: int
    rotated: int
    epsilon: float
    scale: float
    activation: int
    is_exact: bool
    dtype: torch.dtype
    vocabulary: int
    blocks: list[BlockParts]
    final_norm: Tensor
    head: nn.Module
    embedding: Callable[[Tensor], Tensor]
    rotary: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


class _OtherError(Exception):
    """This is no decoder of that kind; the text says why."""


def anatomy_of(model: Any) -> Anatomy | str:
    """The parts of `model`, or why they are not the usual ones."""
    try:
        return _anatomy(model)
    except _OtherError as why:
        return str(why)


def _anatomy(model: Any) -> Anatomy:
    config = model.config.get_text_config()
    inner, head = model.get_decoder(), model.get_output_embeddings()
    blocks = getattr(inner, "layers", None)
    rotary, final = getattr(inner, "rotary_emb", None), getattr(inner, "norm", None)
    if not isinstance(blocks, nn.ModuleList) or rotary is None or final is None or not _is_linear(head):
        raise _OtherError("its decoder is not made of layers, norm and rotary_emb with a linear head")
    _check_config(config, rotary)
    parts = [_block(block, config, index) for index, block in enumerate(blocks)]
    attention: Any = blocks[0].self_attn
    width = getattr(attention, "head_dim", None)
    scale = getattr(attention, "scaling", None)
    if not isinstance(width, int) or width % 16 or not isinstance(scale, float):
        raise _OtherError(f"heads of {width} numbers are not run: multiples of 16 are")
    final_weight, epsilon = _norm(final)
    activation = _activation(getattr(blocks[0].mlp, "act_fn", None))
    query, key = (int(module.out_features) for module in parts[0].linears[:2])  # type: ignore[arg-type]
    packed = [module for part in parts for module in part.linears if isinstance(module, PackedLinear)]
    if not packed:
        raise _OtherError("none of its blocks is packed")
    cosines, _ = rotary(torch.empty(1, 1, 1), torch.arange(2)[None])
    return Anatomy(
        hidden=len(final_weight), heads=query // width, key_heads=key // width, width=width,
        rotated=cosines.shape[-1], epsilon=epsilon, scale=scale, activation=activation,
        is_exact=packed[0].activations == "exact", dtype=model.dtype, vocabulary=head.out_features, blocks=parts,
        final_norm=final_weight, head=head, embedding=model.get_input_embeddings(), rotary=rotary,
    )  # fmt: skip


def _check_config(config: Any, rotary: Any) -> None:
    settings = config.to_dict()
    capped = [name for name, value in settings.items() if "softcap" in name and value]
    if capped:
        raise _OtherError(f"{capped[0]} is not run")
    kinds = set(settings.get("layer_types") or ["full_attention"]) - {"full_attention", "sliding_attention"}
    if kinds:
        raise _OtherError(f"{', '.join(sorted(kinds))} is not run")
    if (kind := getattr(rotary, "rope_type", "default")) not in _ROTARY:
        raise _OtherError(f"positions of the kind {kind!r} are not run")


def _block(block: nn.Module, config: Any, index: int) -> BlockParts:
    known = {name: module for name, module in block.named_modules() if _has_weights(module)}
    missing = [name for name in (*_LINEARS, *_NORMS) if name not in known]
    further = known.keys() - {*_LINEARS, *_NORMS, *_HEAD_NORMS}
    if missing or further:
        names = ", ".join(sorted(missing) or sorted(further))
        raise _OtherError(f"block {index} has {'no' if missing else 'further parts:'} {names}")
    linears = [known[name] for name in _LINEARS]
    if not all(_is_linear(module) for module in linears):
        raise _OtherError(f"block {index} has linear maps of another kind")
    heads = [_norm(known[name])[0] if name in known else None for name in _HEAD_NORMS]
    first, second = (_norm(known[name])[0] for name in _NORMS)
    return BlockParts(first, second, heads[0], heads[1], linears, _window(config, index))


def _window(config: Any, index: int) -> int:
    """Positions that a token of this block sees; 0 for all."""
    kinds = getattr(config, "layer_types", None)
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    return window or 0 if kinds is None or kinds[index] == "sliding_attention" else 0


def _has_weights(module: nn.Module) -> bool:
    """Whether it stands for weights of its own: those of a packed linear map lie a level below."""
    if isinstance(module, PackedLinear):
        return True
    own = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
    return any(name != "storage" for name, _ in own)


def _is_linear(module: Any) -> bool:
    return isinstance(module, PackedLinear) or type(module) is nn.Linear


def _activation(function: Any) -> int:
    x = torch.linspace(-6, 6, 101)
    for number, known in enumerate(_ACTIVATIONS):
        if function is not None and torch.allclose(function(x), known(x), atol=1e-6):
            return number
    raise _OtherError("its activation is neither SiLU nor GELU by tanh")


def _norm(module: Any) -> tuple[Tensor, float]:
    """What a root-mean-square norm multiplies by, and its epsilon."""
    epsilon = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    stored = next(iter(module.parameters()), None)
    if stored is None or not isinstance(epsilon, float):
        raise _OtherError(f"{type(module).__name__} is no root-mean-square norm")
    with torch.no_grad():
        ones = torch.ones(stored.shape)
        weight = module(ones).float() * (1 + epsilon) ** 0.5
        x = torch.linspace(-1, 2, stored.numel())
        expected = x * (x.square().mean() + epsilon).rsqrt() * weight
        if not torch.allclose(module(x).float(), expected, rtol=0.02, atol=1e-4):
            raise _OtherError(f"{type(module).__name__} is no root-mean-square norm")
    return weight, epsilon
