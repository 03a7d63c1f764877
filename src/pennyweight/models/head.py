"""The output head of a decoder as a site: the one linear map outside the blocks that can be quantized."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from pennyweight.models.base import Site
from pennyweight.models.weight_map import WeightMap


def find_head(model: nn.Module, weights: WeightMap, changes: Mapping[str, Any], *, block: int) -> Site | str:
    """The head as a site behind the last of `block` blocks, or why it is none, in a sentence without its end.

    `changes` is what will stand in the config in place of what it says: a head that it ties to the embedding, although
    the checkpoint has two tensors, would be tied again by whoever loads the result.
    """
    head = model.get_output_embeddings()  # type: ignore[operator]
    if head is None:
        return f"{type(model).__name__} has no output head"
    name = next(path for path, module in model.named_modules() if module is head)
    if not isinstance(head, nn.Linear):
        return f"{name} is no linear map but a {type(head).__name__}"
    parameter = f"{name}.weight"
    every = model.named_parameters(remove_duplicate=False)
    shared = [path for path, other in every if other is head.weight and path != parameter]
    if shared:
        return (
            f"{name} shares its weight with {shared[0]}, and transformers reads a quantized embedding wrongly: only a "
            "head with a weight of its own can be quantized, which --rotate gives most models"
        )
    if parameter in getattr(model, "all_tied_weights_keys", {}) and changes.get("tie_word_embeddings") is not False:
        return (
            f"config.json ties {name} to the embedding, though the checkpoint has two different tensors: "
            "say there that it does not (tie_word_embeddings: false)"
        )
    source = weights.sources.get(parameter)
    if source is None or source.converter is not None or source.keys != [parameter]:
        return f"the checkpoint does not keep the weight of {name} under that name, as it is"
    return Site(name, (head.out_features, head.in_features), block, "head", parameter)
