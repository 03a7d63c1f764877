"""`model.generate` of transformers with the native decoder: all but the forward pass of a text stays transformers' own.

Keys and values lie in the decoder as long as nobody asks for them: a `PackedCache` becomes the DynamicCache that it
stands for as soon as anything but its length is wanted.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from types import MethodType
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.modeling_outputs import CausalLMOutputWithPast

from pennyweight.inference.decoder import CACHES, Decoder, decoder_parts

_CACHE = next(name for name in CACHES if name in CausalLMOutputWithPast.__dataclass_fields__)
# Arguments that change nothing here, or whose values are looked at.
_KNOWN = frozenset(
    {
        "input_ids", "attention_mask", "position_ids", "cache_position", "use_cache", "return_dict", "logits_to_keep",
        *CACHES,
    }
)  # fmt: skip
# Room for so many tokens behind a prompt; more is made when it is full.
_ROOM = 256


class PackedCache(DynamicCache):
    """A DynamicCache whose keys and values lie in a native decoder.

    Any access to its layers (another forward pass, beams, cropping) makes an ordinary DynamicCache of it in place.
    """

    @staticmethod
    def hold(cache: DynamicCache, decoder: Decoder) -> PackedCache:
        """`cache`, which is empty, from now on stands for what went through `decoder`."""
        cache.__dict__["_held"] = (decoder, cache.__dict__.pop("layers"))
        object.__setattr__(cache, "__class__", PackedCache)
        assert isinstance(cache, PackedCache)
        return cache

    @property
    def decoder(self) -> Decoder:
        """That goes on with the text."""
        decoder: Decoder = self.__dict__["_held"][0]
        return decoder

    @property
    def layers(self) -> Any:
        """Those of transformers: this cache is an ordinary one afterwards."""
        decoder, layers = self.__dict__.pop("_held")
        object.__setattr__(self, "__class__", DynamicCache)
        self.layers = layers
        for index in range(decoder.blocks):
            self.update(*decoder.keys_and_values(index), index)
        return self.layers

    @layers.setter
    def layers(self, layers: Any) -> None:
        self.__dict__["layers"] = layers

    def __len__(self) -> int:
        return self.decoder.blocks

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.decoder.length

    @property
    def is_compileable(self) -> bool:
        return False

    @property
    def is_linear(self) -> list[bool]:
        return [False] * len(self)


def generate_natively(model: Any) -> None:
    """From now on `model` takes a text of its own through the native decoder, where `decoder_parts` has one for it.

    That is: without gradients, one text without padding, the logits of its last token alone, a cache that was empty
    when the text began and has been in nobody else's hands since. All else is the model's own forward.
    """
    model.forward = MethodType(_forward_of(type(model).forward), model)


def _forward_of(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def forward(self: Any, *args: Any, **given: Any) -> Any:
        if torch.compiler.is_compiling() or args or not _is_text(self, given):
            return original(self, *args, **given)
        cache = next((given[name] for name in CACHES if given.get(name) is not None), None)
        if type(cache) is DynamicCache and _is_empty(cache) and (parts := decoder_parts(self)).why_not is None:
            tokens = int(given["input_ids"].shape[1])
            cache = PackedCache.hold(cache, Decoder(parts, positions=tokens + _ROOM))
        if not isinstance(cache, PackedCache) or not _follows(given, cache.get_seq_length()):
            return original(self, *args, **given)
        logits = cache.decoder.logits(given["input_ids"][0].tolist())
        result: dict[str, Any] = {"logits": logits[None, None].to(self.dtype), _CACHE: cache}
        return CausalLMOutputWithPast(**result)

    return forward


def _is_text(model: Any, given: Mapping[str, Any]) -> bool:
    """Whether the next logits of one text are all that is asked for."""
    ids = given.get("input_ids")
    if not isinstance(ids, Tensor) or ids.dim() != 2 or len(ids) != 1 or not ids.numel() or ids.device.type != "cpu":
        return False
    if torch.is_grad_enabled() or model.training or given.get("use_cache") is False:
        return False
    if ids.shape[1] > 1 and given.get("logits_to_keep") != 1:
        return False
    if any(value is not None and value is not False for name, value in given.items() if name not in _KNOWN):
        return False
    config = model.config
    return given.get("return_dict") is not False and not (config.output_attentions or config.output_hidden_states)


def _is_empty(cache: DynamicCache) -> bool:
    return not cache.get_seq_length() and not cache.offloading


def _follows(given: Mapping[str, Any], past: int) -> bool:
    """Whether the tokens are the next ones after `past`, and see all that went before."""
    tokens = int(given["input_ids"].shape[1])
    mask, positions = given.get("attention_mask"), given.get("position_ids")
    if mask is not None and (not isinstance(mask, Tensor) or mask.shape != (1, past + tokens) or not bool(mask.all())):
        return False
    return positions is None or torch.equal(positions, torch.arange(past, past + tokens)[None].to(positions))
