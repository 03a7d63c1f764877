"""What it costs to quantize the embedding: the model's own loss, with nothing else changed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from pennyweight.core.parallel import one_thread_per_operation
from pennyweight.models.streamed import StreamedModel
from pennyweight.pipeline.collect import SiteStatistics
from pennyweight.pipeline.costs.base import Tell, tell_nobody
from pennyweight.pipeline.costs.compared import compared
from pennyweight.pipeline.costs.rounded import rounded
from pennyweight.pipeline.rows import stored_matrix
from pennyweight.plan.candidates import Candidates
from pennyweight.schemes import Scheme
from pennyweight.solvers.base import Solver, Statistics


@dataclass(frozen=True)
class EmbeddingCost:
    """c = loss of the model in which the embedding, and a head that shares its weight, has the scheme.

    The only group is the embedding by itself. For each of its schemes the whole model is run once.
    """

    name: str = "embedding"

    @one_thread_per_operation()
    def measure(
        self,
        model: StreamedModel,
        batches: Sequence[Tensor],
        groups: Sequence[Candidates],
        *,
        solver: Solver,
        seed: int,
        scratch: Path,
        tell: Tell = tell_nobody,
    ) -> list[list[float]]:
        """See Cost."""
        embedding = model.embedding
        assert embedding is not None
        original = model.run(batches)
        w = stored_matrix(model.checkpoint, embedding).float()

        def loss(scheme: Scheme) -> float:
            changed = rounded(embedding, w, scheme, solver, SiteStatistics(Statistics(), 0))
            stream = model.run(batches, embedding=changed.__getitem__)
            [found] = compared(model, original, [stream], given=_head(model, changed))
            return found

        [group] = groups
        costs: list[float] = []
        for scheme in group.schemes:
            costs.append(0.0 if scheme is None else loss(scheme))
            tell(len(costs), len(group.schemes))
        return [costs]


def _head(model: StreamedModel, changed: Tensor) -> Mapping[str, Tensor]:
    """`changed` in place of the head's weight, where that is the embedding's."""
    if not (model.is_decoder and model.tied_head):
        return {}
    table = model.module.get_input_embeddings().weight  # type: ignore[operator]
    return {name: changed for name, parameter in model.module.named_parameters() if parameter is table}
