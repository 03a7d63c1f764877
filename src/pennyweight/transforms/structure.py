"""Which channels of a block can be rescaled without a change of its function.

Nothing is read from names or classes. A producer is a guess: the vectors of a module that has nothing else (a norm), or
rows of a matrix. Its channels are scaled by factors that are all different, and every linear map whose input changes by
exactly these factors, column by column, is a reader; the factors say which column is which channel, also where heads
repeat. Readers have the factors divided out of their inputs, until no further one shows (behind a router that no
longer chooses otherwise stand experts). The guess is right where the block's output then is what it was.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from pennyweight.transforms.base import Fold, Part, Reader, Style
from pennyweight.transforms.probe import Change, LinearMap, Run, Trace, trace

# Largest deviation of the output, relative to its root mean square: rounding, which a wrong guess exceeds by far.
_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-5}
# A column's ratio must lie this near to a factor, as a share of the distance between neighbouring factors.
_SHARE = 0.2


def find_folds(block: nn.Module, run: Run, *, seed: int = 0) -> list[Fold]:
    """Every fold of `block` that its function proves; `run` must give the same each time it is called.

    Proved in the type of the block: to 1e-9 in float64, 1e-5 in float32, relative to the output's root mean square.
    The block is as it was afterwards.
    """
    base = trace(block, run)
    folds: list[Fold] = []
    for guesses in _guesses(block, base):
        for producer in guesses:
            fold = _fold(block, run, base, producer, seed=seed)
            if fold is not None:
                folds.append(fold)
                break
    return folds


def _guesses(block: nn.Module, base: Trace) -> Iterator[Iterator[tuple[Part, ...]]]:
    """For each producer the ways in which it may make channels; the first one that is proved counts."""
    for name, module in block.named_modules():
        own = {f"{name}.{key}".lstrip("."): p for key, p in module.named_parameters(recurse=False)}
        lengths = {p.shape for p in own.values()}
        if len(lengths) == 1 and all(p.ndim == 1 and p.numel() > 1 for p in own.values()):
            yield _vectors(own)
    widths = sorted({inputs[0].shape[1] for inputs in base.inputs.values()})
    for used in base.maps.values():
        yield _rows(used, block.get_parameter(used.parameter).shape[used.out_axis], widths)


def _vectors(own: dict[str, nn.Parameter]) -> Iterator[tuple[Part, ...]]:
    styles: tuple[Style, ...] = ("scaled", "one-plus")
    for style in styles:
        yield tuple(Part(name, -1, torch.arange(len(p)), style) for name, p in own.items())


def _rows(used: LinearMap, count: int, widths: Sequence[int]) -> Iterator[tuple[Part, ...]]:
    for rows in _row_sets(count, widths):
        weight = Part(used.parameter, used.out_axis, rows)
        yield (weight,) if used.bias is None else (weight, Part(used.bias, -1, rows))


def _row_sets(count: int, widths: Sequence[int]) -> list[Tensor]:
    """All rows; then, larger sets first, those that a matrix which makes several things may keep for one of them."""
    every = torch.arange(count)
    found = [every]
    for width in widths:
        if width < count:
            found.append(every[-width:])
        if 0 < count - width < 2 * width and (count - width) % 2 == 0:
            found.append(every[-((count - width) // 2) :])
        if count == 2 * width:
            found += [every[:width], every[1::2], every[::2]]
        if count == 3 * width:
            # Query, key and value of one head after those of the other.
            sizes = (size for size in range(width // 2, 0, -1) if width % size == 0)
            found += [every[every // size % 3 == 2] for size in sizes]
    return sorted(found, key=len, reverse=True)


def _fold(block: nn.Module, run: Run, base: Trace, producer: tuple[Part, ...], *, seed: int) -> Fold | None:
    size = len(producer[0].rows)
    distinct = torch.exp2(torch.arange(1, size + 1, dtype=torch.float64) / (size + 1))
    sources: dict[str, Tensor] = {}
    while True:
        seen = _scaled_run(block, run, base, producer, sources, distinct)
        found = {
            name: source
            for name, inputs in seen.inputs.items()
            if name not in sources and (source := _source(base.inputs.get(name, []), inputs, size)) is not None
        }
        if not found:
            break
        sources |= found
    if not sources or _is_read_unseen(block, base, sources):
        return None
    generator = torch.Generator().manual_seed(seed)
    random = torch.exp2(2 * torch.rand(size, generator=generator, dtype=torch.float64) - 1)
    proof = _scaled_run(block, run, base, producer, sources, random)
    if not same(proof.output, base.output):
        return None
    readers = tuple(Reader(name, base.maps[name].axis, source) for name, source in sources.items())
    return Fold(producer, readers, size, is_norm=producer[0].parameter not in base.maps)


def same(found: Tensor, expected: Tensor) -> bool:
    """Equal but for rounding, in the type of `expected`."""
    if found.shape != expected.shape:
        return False
    size = expected.double().square().mean().sqrt()
    return bool((found.double() - expected.double()).abs().max() <= _TOLERANCE[expected.dtype] * size)


def _is_read_unseen(block: nn.Module, base: Trace, sources: dict[str, Tensor]) -> bool:
    """A matrix as wide as a reader that the run did not reach (an expert that no token chose) might read the fold."""
    widths = {len(source) for source in sources.values()}
    for name, p in block.named_parameters():
        if p.ndim > 1 and name not in base.maps and widths & set(p.shape) and not _is_stacked_bias(block, name):
            return True
    return False


def _is_stacked_bias(block: nn.Module, name: str) -> bool:
    """A vector for each expert, beside the experts' matrices."""
    p = block.get_parameter(name)
    siblings = block.get_submodule(name.rpartition(".")[0]).parameters(recurse=False)
    return p.ndim == 2 and any(other.ndim == 3 and len(other) == len(p) for other in siblings)


def _source(before: Sequence[Tensor], after: Sequence[Tensor], size: int) -> Tensor | None:
    """Which channel each column is, by the factor that it has gained; None where the columns changed otherwise."""
    if [x.shape for x in before] != [x.shape for x in after] or not before:
        return None
    x, changed = torch.cat(list(before)).double(), torch.cat(list(after)).double()
    energy = x.square().sum(0)
    ratio = (x * changed).sum(0) / energy
    position = ratio.clamp(min=0.5, max=4.0).log2() * (size + 1)
    source = position.round()
    off = (changed - x * torch.exp2(source / (size + 1))).square().sum(0)
    spacing = torch.exp2(source / (size + 1)) * (_SHARE * 0.6931 / (size + 1))
    silent = (energy == 0) & (changed.square().sum(0) == 0)
    fits = (off <= spacing.square() * energy) & (source >= 0) & (source <= size) & (energy > 0)
    if not bool((fits | silent).all()) or bool((source[fits] == 0).all()):
        return None
    channels = source.nan_to_num(0).long() - 1
    if not bool(silent.any()):
        return channels
    # A channel that no token lit, as ReLU leaves some: known only where all others are in order.
    order = torch.arange(len(channels))
    return order if size == len(channels) and bool((channels == order)[~silent].all()) else None


def _scaled_run(
    block: nn.Module,
    run: Run,
    base: Trace,
    producer: tuple[Part, ...],
    sources: dict[str, Tensor],
    factors: Tensor,
) -> Trace:
    """The block with its producer's channels times `factors`, divided out again of the inputs of `sources`."""
    before = {name: _divide(factors, source) for name, source in sources.items()}
    first = producer[0]
    if first.parameter in base.maps:
        # A row of the matrix and its bias scale what comes out; nothing has to be copied for that.
        return trace(block, run, before=before, after={first.parameter: _multiply(factors, first.rows)})
    with _vectors_scaled(block, producer, factors):
        return trace(block, run, before=before)


def _divide(factors: Tensor, source: Tensor) -> Change:
    extended = torch.cat([factors, factors.new_ones(1)])[source]
    return lambda x: x / extended.to(x)


def _multiply(factors: Tensor, rows: Tensor) -> Change:
    def change(out: Tensor) -> Tensor:
        every = torch.ones(out.shape[-1], dtype=torch.float64)
        every[rows] = factors
        return out * every.to(out)

    return change


@contextmanager
def _vectors_scaled(block: nn.Module, producer: tuple[Part, ...], factors: Tensor) -> Iterator[None]:
    kept = {part.parameter: block.get_parameter(part.parameter).detach().clone() for part in producer}
    try:
        for part in producer:
            vector = block.get_parameter(part.parameter).detach()
            vector.copy_(scaled(vector, part.style, factors.to(vector)))
        yield
    finally:
        for name, vector in kept.items():
            block.get_parameter(name).detach().copy_(vector)


def scaled(p: Tensor, style: Style, factors: Tensor) -> Tensor:
    """What `p` must be for its channels to be `factors` times as large."""
    return p * factors if style == "scaled" else (1 + p) * factors - 1
