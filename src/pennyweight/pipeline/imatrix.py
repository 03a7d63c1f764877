"""An importance matrix for llama.cpp's quantizer, of the text that a run would be calibrated on."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from pennyweight.core.errors import ModelError, UsageError
from pennyweight.models import text
from pennyweight.models.hub import resolve
from pennyweight.models.stream import Stream
from pennyweight.models.streamed import StreamedModel
from pennyweight.pipeline.observe import Observer, rounds
from pennyweight.pipeline.options import Options
from pennyweight.pipeline.prepare import container_for
from pennyweight.pipeline.source import facts_of, open_source
from pennyweight.pipeline.windows import calibration_windows
from pennyweight.stats.square import Square

_FOR = "llama.cpp"
Tell = Callable[[int, int], None]


@dataclass(frozen=True)
class ImatrixReport:
    """What was written: entries are weights of llama.cpp; unseen are experts that saw no token, by site."""

    out: str
    entries: int
    windows: int
    length: int
    unseen: list[str]


def imatrix(
    model: str | Path,
    out: str | Path,
    *,
    calibration: str | Sequence[str] | None = None,
    samples: int = Options.samples,
    length: int = Options.length,
    seed: int = Options.seed,
    device: str = Options.device,
    trust_remote_code: bool = False,
    legacy: bool = False,
    tell: Tell = lambda done, total: None,
) -> ImatrixReport:
    """Write into the file `out` the mean square of each input of each weight of `model`, on its calibration text.

    `model` is a directory, a Hub id or a GGUF file that transformers can run; its weights are the original ones, and
    all blocks see what those before them give. Names are llama.cpp's. `legacy` writes the older of its two formats.
    Raises PennyweightError, and then `out` is not there.
    """
    if Path(out).exists():
        raise UsageError(f"{out} exists: choose another --out, or remove it")
    if not Path(out).absolute().parent.is_dir():
        raise UsageError(f"{Path(out).absolute().parent} does not exist: create it, or choose another --out")
    options = Options(
        runtime=_FOR, calibration=calibration if calibration is None or isinstance(calibration, str)
        else tuple(calibration), samples=samples, length=length, seed=seed, device=device,
        trust_remote_code=trust_remote_code,
    )  # fmt: skip
    if options.calibration_source is None:
        raise UsageError("--calibration none: an importance matrix is made of text: give some, or built-in")
    options.check()
    with tempfile.TemporaryDirectory(prefix="pennyweight-source-") as scratch:
        return _made(str(model), Path(out), options, Path(scratch), legacy=legacy, tell=tell)


def _made(model: str, out: Path, options: Options, scratch: Path, *, legacy: bool, tell: Tell) -> ImatrixReport:
    from pennyweight.models.gguf.imatrix import Importance, write_imatrix

    container = container_for(_FOR)
    source = open_source(resolve(model, trust_remote_code=options.trust_remote_code), options, container, scratch)
    opened = source.model
    if not isinstance(opened, StreamedModel):
        raise ModelError(f"{model}: {source.why_blind}: use llama-imatrix, which runs it")
    container = container.bound(facts_of(source))
    windows = calibration_windows(opened, options)
    assert windows is not None
    tokens = max(map(len, windows))
    squares = mean_squares(opened, text.batches(windows), tell=tell)
    stacks: dict[str, dict[int, Square]] = {}
    counts: dict[str, int] = {}
    for site in opened.sites:
        place = container.importance_entry(site)
        if place is not None:
            stacks.setdefault(place.name, {})[place.index] = squares[site.name]
            counts[place.name] = place.shape[0] if len(place.shape) == 3 else 1
    entries = {}
    for name, rows in stacks.items():
        every = [rows.get(index, Square.zero(len(rows[min(rows)].total))) for index in range(counts[name])]
        values = torch.stack([one.mean if one.rows else torch.ones(len(one.total)) for one in every])
        entries[name] = Importance(values.cpu(), torch.tensor([one.rows for one in every]))
    write_imatrix(out, entries, dataset=_named(options), chunk_size=tokens, chunk_count=len(windows), legacy=legacy)
    unseen = [name for name, square in squares.items() if not square.rows]
    return ImatrixReport(str(out), len(entries), len(windows), tokens, unseen)


def _named(options: Options) -> str:
    source = options.calibration_source
    return source if isinstance(source, str) else "texts"


def mean_squares(model: StreamedModel, batches: Sequence[Tensor], *, tell: Tell) -> dict[str, Square]:
    """The squares of each site's inputs, by site, on `batches` of token ids [windows, tokens] in the original model."""
    stream = model.start(batches)
    found: dict[str, Square] = {site.name: Square.zero(site.shape[1], model.device) for site in model.sites}
    total = len(model.blocks) + (model.head is not None)
    for index in range(len(model.blocks)):
        found |= _of_block(model, index, stream, found)
        tell(index + 1, total)
    if model.head is not None:
        model.enter_head(stream)
        for hidden in stream.hidden:
            found[model.head.name] = found[model.head.name].update(hidden.reshape(-1, hidden.shape[-1]))
        tell(total, total)
    return found


def _of_block(model: StreamedModel, index: int, stream: Stream, before: Mapping[str, Square]) -> dict[str, Square]:
    """Those of the sites of block `index`; `stream` goes on to what it gives."""
    sites = model.sites_of(index)
    experts = {site.name for site in sites if site.kind == "expert"}
    sums: dict[str, Square] = {}
    leaders: dict[str, str] = {}
    handed_on: list[Tensor] = []
    with model.opened(index) as block:
        observer = Observer(model, block, index, sites, needs_outputs=True)
        for batches in rounds(stream):
            seen, outputs = observer.run(stream, batches)
            handed_on.extend(outputs)
            for batch in seen:
                leaders = {**batch.leaders, **leaders}
                for leader in dict.fromkeys(batch.leaders.values()):
                    for x in batch.take(leader):
                        # Where all experts run on all tokens, those that were not routed to this one are zeros.
                        rows = x[x.any(dim=1)] if leader in experts else x
                        zero = Square.zero(x.shape[1], x.device)
                        sums[leader] = sums.get(leader, zero).update(rows)
    stream.hidden = handed_on
    return {site.name: sums.get(leaders.get(site.name, ""), before[site.name]) for site in sites}
