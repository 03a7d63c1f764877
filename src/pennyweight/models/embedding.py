"""The embedding of a model as a site: the table of its tokens, which a tied head shares."""

from __future__ import annotations

from torch import nn

from pennyweight.models.base import Site
from pennyweight.models.weight_map import WeightMap


def find_embedding(model: nn.Module, weights: WeightMap) -> Site | None:
    """The table of tokens as a site before the first block; None where the model has none or it is not one tensor of
    the checkpoint."""
    try:
        table = model.get_input_embeddings()  # type: ignore[operator]
    except NotImplementedError:
        # What transformers raises for a model without a table: of sounds or pictures.
        return None
    if not isinstance(table, nn.Embedding):
        return None
    name = next(path for path, module in model.named_modules() if module is table)
    parameter = f"{name}.weight"
    source = weights.sources.get(parameter) or weights.sources.get(weights.tied.get(parameter, ""))
    if source is None or source.converter is not None or len(source.keys) != 1:
        return None
    [key] = source.keys
    return Site(key.removesuffix(".weight"), (table.num_embeddings, table.embedding_dim), -1, "embedding", key)
