"""What is in a model: sites, sizes, ranges and outliers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from pennyweight.models.coded import coded_tensors
from pennyweight.models.decoders.base import Coded
from pennyweight.models.hub import resolve
from pennyweight.models.streamed import StreamedModel
from pennyweight.pipeline.rows import stored_matrix
from pennyweight.pipeline.sizes import weight_count


@dataclass(frozen=True)
class SiteFacts:
    """shape (out, in); largest is the largest magnitude, std the root of the mean square; stored_as a torch type, or of
    a weight in codes the name of its scheme."""

    name: str
    shape: tuple[int, int]
    kind: str
    stored_as: str
    std: float
    largest: float


@dataclass(frozen=True)
class Inventory:
    """What is in a model; other_codes: tensor that is no site's -> the scheme of its codes."""

    path: str
    model_class: str
    blocks: int
    weights: int
    other_weights: int
    size_bytes: int
    decoded_from: str | None
    sites: list[SiteFacts]
    other_codes: Mapping[str, str]
    refused: Mapping[str, str]


def inventory(
    model: str, *, trust_remote_code: bool = False, tell: Callable[[int, int], None] = lambda done, total: None
) -> Inventory:
    """Read every site of `model` once, one at a time."""
    streamed = StreamedModel(resolve(model, trust_remote_code=trust_remote_code), trust_remote_code=trust_remote_code)
    coded = coded_tensors(streamed.checkpoint)
    facts: list[SiteFacts] = []
    for number, site in enumerate(streamed.sites, 1):
        stored = stored_matrix(streamed.checkpoint, site)
        w = stored.float()
        std = float(w.double().square().mean().sqrt()) if w.numel() else 0.0
        largest = float(w.abs().max()) if w.numel() else 0.0
        codes = coded.get(site.tensor)
        kind = str(stored.dtype).removeprefix("torch.") if codes is None else codes.scheme.name
        facts.append(SiteFacts(site.name, site.shape, site.kind, kind, std, largest))
        tell(number, len(streamed.sites))
    total = weight_count(streamed)
    return Inventory(
        path=str(streamed.path),
        model_class=type(streamed.module).__name__,
        blocks=len(streamed.blocks),
        weights=total,
        other_weights=total - sum(site.weights for site in streamed.sites),
        size_bytes=sum(file.stat().st_size for file in streamed.checkpoint.weight_files),
        decoded_from=streamed.checkpoint.decoded_from,
        sites=facts,
        other_codes=_others(streamed, coded),
        refused=streamed.refused,
    )


def _others(model: StreamedModel, coded: Mapping[str, Coded | None]) -> dict[str, str]:
    sites = {site.tensor for site in model.sites}
    return {name: one.scheme.name for name, one in coded.items() if one is not None and name not in sites}
