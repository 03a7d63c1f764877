"""How much the model's loss depends on what each site gives, token by token.

    s_n = |dl / dz_n|²,    z_n = W x_n

l is the sum over tokens of the cross entropy with tokens drawn from the model's own prediction: the mean of s x xᵀ is
then the Fisher information of W, summed over its rows, and does not depend on how well the model knows the text (Kim,
El Halabi, Park, Kim, Jung, Kang, Song, "GuidedQuant", arXiv:2505.07004, section 3, with all rows of the sites of an
input as one group).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from pennyweight.core.parallel import parallel_map
from pennyweight.models.base import Site
from pennyweight.models.intercept import Made, Seen
from pennyweight.models.self_text import sampled
from pennyweight.models.stream import Stream
from pennyweight.models.streamed import StreamedModel
from pennyweight.pipeline.kept import kept_states

# How steeply weights follow s: the square root of s, of which one draw a token is a noisy estimate with a long tail.
_POWER = 0.5


@dataclass(frozen=True)
class Sensitivities:
    """`squares`: site name -> batch -> s, float32 [tokens], in the order in which the site sees its tokens."""

    squares: Mapping[str, Sequence[Tensor]]
    _made: dict[tuple[str, ...], list[Tensor] | None] = field(default_factory=dict, repr=False, compare=False)

    def weights(self, names: Sequence[str]) -> list[Tensor] | None:
        """For the input that `names` share: batch -> weight of each token, float32 [tokens], with mean 1.

            w_n = sqrt(sum over the sites of s_n) / mean

        None where the loss depends on none of them.
        """
        key = tuple(names)
        if key not in self._made:
            self._made[key] = _weights([self.squares[name] for name in names if name in self.squares])
        return self._made[key]


def _weights(squares: Sequence[Sequence[Tensor]]) -> list[Tensor] | None:
    steep = [torch.stack(parts).sum(0).pow(_POWER) for parts in zip(*squares, strict=True)]
    total = math.fsum(float(part.double().sum()) for part in steep)
    if not total:
        return None
    mean = total / sum(part.numel() for part in steep)
    return [part / mean for part in steep]


def sensitivities(
    model: StreamedModel, batches: Sequence[Tensor], scratch: Path, *, seed: int, has_head: bool = False
) -> Sensitivities:
    """s of every site of the blocks but experts, for `batches` of windows [windows, tokens] of a decoder; with
    `has_head` of the head too.

    `seed` is that of the tokens that are drawn; `scratch` as for `walk_back`.
    """
    found: dict[str, list[Tensor]] = {}

    def visit(index: int, stream: Stream, outer: Sequence[Tensor]) -> list[Tensor]:
        sites = {site.name: site for site in model.sites_of(index) if site.kind != "expert"}
        squares = [_Squares(sites) for _ in outer]
        slopes = through_block(model, index, stream, outer, list(sites.values()), made=lambda n: squares[n].made)
        found.update(_of_batches(sites, squares))
        return slopes

    heads = {site.name: site for site in model.sites if has_head and site.kind == "head"}
    outputs = [_Squares(heads) for _ in batches]
    walk_back(model, batches, scratch, seed=seed, visit=visit, made=(lambda n: outputs[n].made) if heads else None)
    return Sensitivities(found | _of_batches(heads, outputs))


def _of_batches(sites: Iterable[str], squares: Sequence[_Squares]) -> dict[str, list[Tensor]]:
    """s by batch, of those `sites` that every batch has it of."""
    parts = [one.found() for one in squares]
    return {name: [part[name] for part in parts] for name in sites if all(name in part for part in parts)}


# Given a block's index and slopes of what it gives, with what it is given in the stream: the slopes of that.
Visit = Callable[[int, Stream, Sequence[Tensor]], list[Tensor]]


def walk_back(model: StreamedModel, batches: Sequence[Tensor], scratch: Path, *, seed: int, visit: Visit,
              turn: Callable[[Stream], None] = lambda stream: None,
              made: Callable[[int], Made] | None = None) -> None:  # fmt: skip
    """Run `batches` of windows [windows, tokens] through the model, show `turn` what the last block gives, then `visit`
    each opened block, last to first.

    The inputs of all blocks are kept in files in the directory `scratch`, which goes away: 2 bytes (4 of a float32
    checkpoint) a token, channel and block. On the way back blocks are run once more, each batch with its own graph
    (Chen, Xu, Zhang, Guestrin, arXiv:1604.06174). `seed` is that of what is drawn; `made(batch)` gets
    what a head that is a site gives.
    """
    stream = model.start(batches)
    with kept_states(model, stream, scratch, _kept_dtype(model)) as kept:
        for index in range(len(model.blocks)):
            kept.put(index, stream)
            with model.opened(index) as block:
                model.advance(block, index, stream)
        turn(stream)
        outer = _slopes_of_loss(model, stream, seed=seed, made=made)
        for index in reversed(range(len(model.blocks))):
            kept.take(index, stream)
            with model.opened(index):
                outer = visit(index, stream, outer)


def _kept_dtype(model: StreamedModel) -> torch.dtype:
    """float32 where weights are; for weights of 16 bits bfloat16, whose range hidden states do not leave."""
    is_wide = any(model.checkpoint.tensors[site.tensor].dtype == torch.float32 for site in model.sites)
    return torch.float32 if is_wide else torch.bfloat16


def _slopes_of_loss(
    model: StreamedModel, stream: Stream, *, seed: int, made: Callable[[int], Made] | None
) -> list[Tensor]:
    """dl / d(what the last block gives), a batch each.

    Each window draws with a generator of its own, so that it does not matter how windows are put into batches.
    """
    counts = [ids.shape[0] for ids in stream.input_ids]
    with model.finishing(stream, made=made) as finish:

        def one(batch: int) -> Tensor:
            hidden = stream.hidden[batch] = stream.hidden[batch].detach().requires_grad_()
            first = seed + sum(counts[:batch])
            generators = [torch.Generator().manual_seed(first + window) for window in range(counts[batch])]
            loss_of = _drawn_loss if model.is_decoder else _projected_loss
            with torch.enable_grad():
                loss = loss_of(finish(batch).float(), generators)
            [slope] = torch.autograd.grad(loss, hidden)
            return slope

        return parallel_map(one, range(len(stream.hidden)))


def _drawn_loss(logits: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
    """l for logits [windows, tokens, vocabulary]: the cross entropy with tokens drawn from softmax(logits)."""
    drawn = [sampled(rows, generator) for rows, generator in zip(logits.detach(), generators, strict=True)]
    return nn.functional.cross_entropy(logits.flatten(0, 1), torch.cat(drawn), reduction="sum")


def _projected_loss(hidden: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
    """The same of an encoder, for its last hidden states [windows, tokens, width], a window each:

        l = sum over tokens of sqrt(2 / mean |t|²) <g, h>,    g ~ N(0, I),

    whose gradient's second moment is the second derivative of the distance |h - t|² / mean |t|² where h = t.
    """
    parts = []
    for rows, generator in zip(hidden, generators, strict=True):
        directions = torch.empty(rows.shape).normal_(generator=generator).to(rows.device)
        size = rows.detach().square().sum(-1).mean()
        parts.append((directions * rows).sum() * (2 / size).sqrt())
    return torch.stack(parts).sum()


def through_block(
    model: StreamedModel,
    index: int,
    stream: Stream,
    outer: Sequence[Tensor],
    sites: Sequence[Site],
    *,
    made: Callable[[int], Made],
    seen: Callable[[int], Seen] | None = None,
) -> list[Tensor]:
    """From slopes of what the opened block `index` gives to those of what it is given. `seen(batch)` gets what `sites`
    are called with, `made(batch)` what they give."""
    watched = model.watched(sites, is_narrow=False)

    def one(batch: int) -> Tensor:
        hidden = stream.hidden[batch] = stream.hidden[batch].detach().float().requires_grad_()
        told = None if seen is None else seen(batch)
        with torch.enable_grad():
            out = model.differentiable(
                model.module.get_submodule(model.blocks[index]),
                index,
                stream,
                batch,
                watched=watched,
                seen=told,
                made=made(batch),
            )
        [slope] = torch.autograd.grad(out, hidden, outer[batch])
        stream.hidden[batch] = hidden.detach()
        return slope

    return parallel_map(one, range(len(outer)))


@dataclass
class _Squares:
    """Collects s of one batch while its graph is gone through backwards; `parts` in the order of the calls."""

    sites: Mapping[str, Site]
    parts: dict[str, list[Tensor | None]] = field(default_factory=dict)

    @property
    def made(self) -> Made:
        def made(names: list[str], out: Tensor) -> None:
            # A slice of a matrix, or several at once, is not what a site's rows could be told from.
            is_whole = len(names) == 1 and out.shape[-1] == self.sites[names[0]].shape[0]
            if not is_whole or not out.requires_grad:
                return
            parts = self.parts.setdefault(names[0], [])
            number = len(parts)
            parts.append(None)

            def slope(dz: Tensor) -> None:
                parts[number] = dz.detach().float().square().sum(-1).flatten()

            out.register_hook(slope)  # type: ignore[no-untyped-call]

        return made

    def found(self) -> dict[str, Tensor]:
        """Of the sites that the loss depends on through every call."""
        return {
            name: torch.cat([part for part in parts if part is not None])
            for name, parts in self.parts.items()
            if all(part is not None for part in parts)
        }
