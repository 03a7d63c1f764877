"""Rotation of a model's residual stream and of the values of its heads, merged into its weights.

Ashkboos et al., "SliceGPT" and "QuaRot" (2024), Liu et al., "SpinQuant" (2024): R1 and R2.

With Q orthogonal, h the residual stream and norm(h) a normalization with weight g, norm(h Q) = norm(h) Q when g is
moved into the matrices that read it. So with

    readers W -> W diag(g) Q        writers W -> Qᵀ W, b -> b Q        embeddings E -> E Q        g -> 1

every block computes what it did on a stream that is rotated, and the logits are the same. What reads and what writes is
seen by running blocks; that it was seen right is proved on the rotated model, part by part, before it is returned.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from pennyweight.core.errors import ModelError
from pennyweight.core.parallel import one_thread_per_operation
from pennyweight.models.folds import FoldFinder, Kind, kind_of, small_ids
from pennyweight.models.rotation_plan import BlockRoles, RotationPlan
from pennyweight.models.streamed import StreamedModel
from pennyweight.transforms.hadamard import Rotation, random_rotation
from pennyweight.transforms.heads import head_size
from pennyweight.transforms.probe import trace

# Largest deviation of a part of the rotated model, in float32, relative to the root mean square of what it gives.
_TOLERANCE = 1e-4


@one_thread_per_operation()
def rotated(
    model: StreamedModel, *, seed: int = 0, heads: bool = True, stored: torch.dtype | None = None
) -> StreamedModel:
    """The same model on a rotated residual stream, and, with `heads`, with rotated values in each head.

    `stored` is the type of the changed tensors, None for each one's own. The result's checkpoint is a
    RotatedCheckpoint, whose `config_changes` belong in the config of whatever is written.
    Raises ModelError that says why a model cannot be rotated.
    """
    finder = FoldFinder(model, seed=seed)
    seen: dict[Kind, tuple[int, BlockRoles]] = {}
    for index, name in enumerate(model.blocks):
        kind = kind_of(model.module.get_submodule(name))
        if kind not in seen:
            with model.opened(index) as block:
                seen[kind] = (index, _look(model, finder, block, index, with_heads=heads))
    keeps_mean = any(found.subtracts_mean for _, found in seen.values())
    rotation = random_rotation(finder.hidden.shape[-1], seed=seed, keeps_mean=keeps_mean)
    plan = RotationPlan(model, rotation)
    for name in model.blocks:
        plan.add_block(name, seen[kind_of(model.module.get_submodule(name))][1])
    plan.add_outside(next(found.norms[0].producer[0].style for _, found in seen.values()))
    _prove(model, plan.model(torch.float32), finder, rotation, [index for index, _ in seen.values()])
    return plan.model(stored)


def _look(model: StreamedModel, finder: FoldFinder, block: nn.Module, index: int, *, with_heads: bool) -> BlockRoles:
    width = finder.hidden.shape[-1]
    folds = finder.find(block, index)
    every = torch.arange(width)
    norms = [
        fold for fold in folds if fold.is_norm and all(torch.equal(reader.source, every) for reader in fold.readers)
    ]
    if not norms:
        raise ModelError(
            f"{type(model.module).__name__} cannot be rotated: in {model.blocks[index]} no normalization of the "
            "residual stream is read by linear maps alone, so its weight cannot be moved into them"
        )
    base = trace(block, lambda probed: finder.run(probed, index, finder.hidden))
    shifted = trace(block, lambda probed: finder.run(probed, index, finder.hidden + 1))
    taken = {reader.parameter for fold in norms for reader in fold.readers}
    subtracts_mean = all(
        torch.allclose(shifted.inputs[name][0], base.inputs[name][0], atol=_TOLERANCE)
        for fold in norms[:1]
        for name in (reader.parameter for reader in fold.readers)
    )
    taken |= {fold.producer[0].parameter for fold in folds}
    writers = [
        used
        for name, used in base.maps.items()
        if name not in taken and block.get_parameter(name).shape[used.out_axis] == width
    ]
    sizes = [(fold, head_size(block, lambda probed: finder.run(probed, index, finder.hidden), fold)) for fold in folds]
    return BlockRoles(norms, writers, [pair for pair in sizes if pair[1] > 1 and with_heads], subtracts_mean)


def _prove(
    model: StreamedModel, turned: StreamedModel, finder: FoldFinder, rotation: Rotation, indices: Sequence[int]
) -> None:
    """Each part of `turned` gives, for a rotated input, what the original gives, rotated; raises ModelError."""
    ids = small_ids(model)
    streams = [model.start([ids]), turned.start([ids])]
    parts = [("the embedding", rotation.apply(streams[0].hidden[0]), streams[1].hidden[0])]
    hidden = (finder.hidden, rotation.apply(finder.hidden))
    for index in indices:
        outputs: list[Tensor] = []
        for each, stream, given in zip((model, turned), streams, hidden, strict=True):
            stream.hidden = [given]
            with each.opened(index) as block:
                outputs += each.run_block(block, index, stream)
        parts.append((model.blocks[index], rotation.apply(outputs[0]), outputs[1]))
    logits: list[Tensor] = []
    for each, stream, given in zip((model, turned), streams, hidden, strict=True):
        stream.hidden = [given]
        with each.finishing(stream) as finish:
            logits.append(finish(0))
    parts.append(("the head", logits[0], logits[1]))
    for name, expected, found in parts:
        if not bool((found - expected).abs().max() <= _TOLERANCE * expected.square().mean().sqrt()):
            raise ModelError(
                f"{type(model.module).__name__} cannot be rotated: {name} does more with the residual stream than "
                "normalizing it, reading it through linear maps and adding to it (a normalization of what is added, "
                "for one, cannot be moved out of the way)"
            )
