"""A loop of our own for decoders whose blocks are the usual ones: between two tokens nothing goes back to Python."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from pennyweight.core.parallel import allowed_threads
from pennyweight.inference.anatomy import Anatomy, BlockParts, anatomy_of
from pennyweight.inference.modules import PackedLinear
from pennyweight.kernels.native import kernel_table, native

# Tokens of a prompt that go through the model together: a multiple of what kernels take at a time.
_CHUNK = 384
# What a loop of ours may differ from the model's own, of the spread of its logits. Rounding moves them by a hundredth;
# a part that is missing or wrong, by the whole.
_TOLERANCE = 0.1
# Tokens that both are tried on: some together, some one by one.
_TRIED = (9, 3)
# What transformers calls its keys and values from 5.24 on, and before.
CACHES = ("cache", "past_key_values")
_KINDS = {torch.float32: 0, torch.bfloat16: 1}


@dataclass(frozen=True)
class DecoderParts:
    """What the native decoder of a model is made of; it refers to the memory of the model.

    why_not   the reason why this model has none, or None
    """

    why_not: str | None
    anatomy: Anatomy | None = None
    native: tuple[Any, ...] = ()
    kept: list[Tensor] = field(default_factory=list)


class Decoder:
    """The text so far, as keys and values of all its tokens. There is room for `positions` of them; when it is full,
    for twice as many."""

    def __init__(self, parts: DecoderParts, *, positions: int) -> None:
        library, anatomy = native(), parts.anatomy
        assert library is not None
        assert anatomy is not None
        self._anatomy, self._parts = anatomy, parts
        self._native = library.Decoder(*parts.native, kernel_table())
        self._reserve(positions)

    def _reserve(self, positions: int) -> None:
        with torch.no_grad():
            angles = self._anatomy.rotary(torch.empty(1, 1, self._anatomy.hidden), torch.arange(positions)[None])
        # The native part refers to them.
        self._angles = [part[0].float().contiguous() for part in angles]
        self._positions = positions
        self._native.reserve(positions, *(part.data_ptr() for part in self._angles))

    @property
    def length(self) -> int:
        """Tokens so far."""
        return int(self._native.length)

    @property
    def blocks(self) -> int:
        return len(self._anatomy.blocks)

    def keys_and_values(self, block: int) -> tuple[Tensor, Tensor]:
        """Both [1, heads of keys, tokens, width] in the model's type, keys turned by their positions."""
        shape = (1, self._anatomy.key_heads, self.length, self._anatomy.width)
        keys, values = torch.empty(shape), torch.empty(shape)
        self._native.copy(block, keys.data_ptr(), values.data_ptr())
        return keys.to(self._anatomy.dtype), values.to(self._anatomy.dtype)

    def logits(self, ids: Sequence[int]) -> Tensor:
        """float32 [vocabulary] after `ids`, which follow what went before."""
        if self.length + len(ids) > self._positions:
            self._reserve(max(2 * self._positions, self.length + len(ids)))
        logits = torch.empty(self._anatomy.vocabulary)
        for start in range(0, len(ids), _CHUNK):
            part = torch.tensor(ids[start : start + _CHUNK])
            with torch.no_grad():
                x = self._anatomy.embedding(part).to(torch.float32).contiguous()
            is_last = start + _CHUNK >= len(ids)
            self._native.run(x.data_ptr(), len(part), logits.data_ptr() if is_last else 0, allowed_threads())
        return logits


def decoder_parts(model: Any) -> DecoderParts:
    """What a native decoder of `model` is made of, or why it has none; looked at once a model.

    The parts are found by their names and shapes, everything that has weights must be one of them, and the result is
    compared with the model's own before it is trusted.
    """
    made_of = _made_of(model)
    known = _known.get(model)
    if known is None or known[0] != made_of:
        known = made_of, _found(model)
        _known[model] = known
    return known[1]


# What models were made of when they were looked at, and what was found.
_known: WeakKeyDictionary[Any, tuple[list[tuple[Any, ...]], DecoderParts]] = WeakKeyDictionary()


def _made_of(model: Any) -> list[tuple[Any, ...]]:
    """Changes with a module that is replaced, a weight that is written to and a hook that is set."""
    inner = [module for module in model.modules() if module is not model]
    weights = [weight for module in inner for weight in module._parameters.values() if weight is not None]
    return [
        *((module, _has_hooks(module)) for module in inner),
        *((id(weight), 0 if weight.is_inference() else weight._version) for weight in weights),
    ]


def _has_hooks(module: nn.Module) -> bool:
    """Of somebody who wants to know what goes through: those of transformers do nothing here."""
    hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
    return any(not str(getattr(hook, "__module__", "")).startswith("transformers.") for hook in hooks)


def _found(model: Any) -> DecoderParts:
    if native() is None:
        return DecoderParts("there is no native library")
    if any(_has_hooks(module) for module in model.modules() if module is not model):
        return DecoderParts("hooks of its modules would not be called")
    anatomy = anatomy_of(model)
    if isinstance(anatomy, str):
        return DecoderParts(anatomy)
    if anatomy.embedding(torch.zeros(1, dtype=torch.long)).device.type != "cpu":
        return DecoderParts("it is not in the processor's memory")
    parts = _assembled(anatomy)
    try:
        difference = _difference(model, parts)
    except ValueError as error:
        return DecoderParts(str(error))
    if not difference < _TOLERANCE:
        return DecoderParts(f"its logits are not those of blocks of this shape: {difference:.2g} of their spread away")
    return parts


def _assembled(anatomy: Anatomy) -> DecoderParts:
    library = native()
    assert library is not None
    kept: list[Tensor] = []

    def address(x: Tensor | None) -> int:
        if x is None:
            return 0
        kept.append(x.detach().float().contiguous())
        return kept[-1].data_ptr()

    def linear(module: nn.Module) -> Any:
        if isinstance(module, PackedLinear):
            return library.packed_linear(module.packed.matrix.native, address(module.bias))
        assert isinstance(module, nn.Linear)
        weight = module.weight.detach()
        weight = weight.contiguous() if weight.dtype in _KINDS else weight.float().contiguous()
        kept.append(weight)
        return library.dense_linear(weight.data_ptr(), _KINDS[weight.dtype], *weight.shape, address(module.bias))

    def block(parts: BlockParts) -> Any:
        norms = (parts.attention_norm, parts.query_norm, parts.key_norm, parts.feed_norm)
        return library.decoder_block(*map(address, norms), [linear(module) for module in parts.linears], parts.window)

    cache = torch.float32 if anatomy.is_exact else anatomy.dtype
    made = (
        anatomy.hidden, anatomy.heads, anatomy.key_heads, anatomy.width, anatomy.rotated, anatomy.epsilon,
        anatomy.scale, anatomy.activation, anatomy.is_exact, _KINDS.get(cache, 0),
        [block(parts) for parts in anatomy.blocks], address(anatomy.final_norm), linear(anatomy.head),
    )  # fmt: skip
    return DecoderParts(None, anatomy, made, kept)


def _difference(model: Any, parts: DecoderParts) -> float:
    """The largest difference between both on a few tokens, in standard deviations of the model's logits."""
    assert parts.anatomy is not None
    together, single = _TRIED
    count = together + single
    ids = torch.randint(parts.anatomy.vocabulary, (count,), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = model(input_ids=ids[None], use_cache=False).logits[0].float()
    decoder, worst = Decoder(parts, positions=count), 0.0
    for start, stop in [(0, together), *((at, at + 1) for at in range(together, count))]:
        found, wanted = decoder.logits(ids[start:stop].tolist()), expected[stop - 1]
        worst = max(worst, float((found - wanted).square().mean().sqrt() / wanted.std()))
    return worst
