"""How much the model's loss depends on what each site gives, token by token.

    s_n = |dl / dz_n|²,    z_n = W x_n

l is the sum over tokens of the cross entropy with tokens drawn from the model's own prediction: the mean of s x xᵀ is
then the Fisher information of W, summed over its rows, and does not depend on how well the model knows the text (Kim,
El Halabi, Park, Kim, Jung, Kang, Song, "GuidedQuant", arXiv:2505.07004, section 3, with all rows of the sites of an
input as one group).
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from pennyweight.containers.weight_files import OpenWeightFiles, WeightFiles
from pennyweight.core.files import check_space
from pennyweight.core.parallel import parallel_map
from pennyweight.models.base import Site, TensorInfo
from pennyweight.models.intercept import Made
from pennyweight.models.self_text import sampled
from pennyweight.models.streamed import Stream, StreamedModel

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

    The inputs of all blocks are kept in files in the directory `scratch`, which goes away: 2 bytes (4 of a float32
    checkpoint) a token, channel and block. Then the blocks are run once more, last to first, each batch with its own
    graph (Chen, Xu, Zhang, Guestrin, arXiv:1604.06174). `seed` is that of the tokens that are drawn.
    """
    stream = model.start(batches)
    with _kept(model, stream, scratch) as files:
        for index in range(len(model.blocks)):
            for batch, hidden in enumerate(stream.hidden):
                files.write(f"{index}.{batch}", hidden.to("cpu", _kept_dtype(model)))
            with model.opened(index) as block:
                model.advance(block, index, stream)
        outer, found = _slopes_of_loss(model, stream, seed=seed, head=model.head if has_head else None)
        for index in reversed(range(len(model.blocks))):
            outer, of_block = _back(model, index, stream, outer, files)
            found |= of_block
    return Sensitivities(found)


@contextmanager
def _kept(model: StreamedModel, stream: Stream, scratch: Path) -> Iterator[OpenWeightFiles]:
    """Files for what each batch is at the beginning of each block."""
    dtype = _kept_dtype(model)
    layout = WeightFiles.plan(
        {
            f"{index}.{batch}": TensorInfo(dtype, tuple(hidden.shape))
            for index in range(len(model.blocks))
            for batch, hidden in enumerate(stream.hidden)
        }
    )
    scratch.mkdir()
    try:
        check_space(scratch, layout.size_bytes)
        with layout.create(scratch) as files:
            yield files
    finally:
        shutil.rmtree(scratch)


def _kept_dtype(model: StreamedModel) -> torch.dtype:
    """float32 where weights are; for weights of 16 bits bfloat16, whose range hidden states do not leave."""
    sites = (site for site in model.sites if site.kind != "head")
    is_wide = any(model.checkpoint.tensors[site.tensor].dtype == torch.float32 for site in sites)
    return torch.float32 if is_wide else torch.bfloat16


def _slopes_of_loss(
    model: StreamedModel, stream: Stream, *, seed: int, head: Site | None
) -> tuple[list[Tensor], dict[str, list[Tensor]]]:
    """dl / d(what the last block gives), a batch each, and s of the `head`."""
    sites = [] if head is None else [head]
    squares = [_Squares({site.name: site for site in sites}) for _ in stream.hidden]
    with model.finishing(stream, made=(lambda batch: squares[batch].made) if sites else None) as finish:

        def one(batch: int) -> Tensor:
            hidden = stream.hidden[batch] = stream.hidden[batch].detach().requires_grad_()
            with torch.enable_grad():
                logits = finish(batch).flatten(0, -2).float()
                drawn = sampled(logits.detach(), torch.Generator().manual_seed(seed + batch))
                loss = nn.functional.cross_entropy(logits, drawn, reduction="sum")
            [slope] = torch.autograd.grad(loss, hidden)
            return slope

        slopes = parallel_map(one, range(len(stream.hidden)))
    return slopes, _of_batches(sites, [batch.found() for batch in squares])


def _of_batches(sites: Iterable[Site], parts: Sequence[Mapping[str, Tensor]]) -> dict[str, list[Tensor]]:
    """s by batch, of those `sites` that every batch has it of."""
    names = (site.name for site in sites)
    return {name: [part[name] for part in parts] for name in names if all(name in part for part in parts)}


def _back(
    model: StreamedModel, index: int, stream: Stream, outer: Sequence[Tensor], files: OpenWeightFiles
) -> tuple[list[Tensor], dict[str, list[Tensor]]]:
    """From slopes of what block `index` gives to those of what it is given, and s of its sites."""
    sites = {site.name: site for site in model.sites_of(index) if site.kind != "expert"}
    with model.opened(index) as block:
        watched = model.watched(list(sites.values()), is_narrow=False)

        def one(batch: int) -> tuple[Tensor, dict[str, Tensor]]:
            hidden = files.read(f"{index}.{batch}").to(model.device, torch.float32).requires_grad_()
            stream.hidden[batch] = hidden
            squares = _Squares(sites)
            with torch.enable_grad():
                out = model.differentiable(block, index, stream, batch, watched=watched, made=squares.made)
            [slope] = torch.autograd.grad(out, hidden, outer[batch])
            stream.hidden[batch] = hidden.detach()
            return slope, squares.found()

        parts = parallel_map(one, range(len(outer)))
    return [slope for slope, _ in parts], _of_batches(sites.values(), [squares for _, squares in parts])


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
