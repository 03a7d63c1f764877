"""A transformers model that is run block by block, with one block's weights in memory at a time."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from pennyweight.core.errors import ModelError
from pennyweight.core.parallel import one_thread_per_operation, parallel_map
from pennyweight.models.base import Checkpoint, Site
from pennyweight.models.checkpoint import open_checkpoint
from pennyweight.models.decoders import decoded
from pennyweight.models.embedding import find_embedding
from pennyweight.models.head import find_head
from pennyweight.models.intercept import Intercept, Made, Seen, Watched
from pennyweight.models.postponed import postponed
from pennyweight.models.sites import Place, find_sites
from pennyweight.models.skeleton import build, call_arguments, find_blocks, read_config
from pennyweight.models.stream import Stream, shared
from pennyweight.models.substitute import Substituted
from pennyweight.models.weight_map import WeightMap


class StreamedModel:
    """The model of a directory: config, checkpoint, blocks and sites; weights are read when they are needed.

    `sites` are those of the blocks and, behind the last, the `head` where it can be one; else `why_no_head`. The
    `embedding` is one beside them.
    """

    def __init__(self, path: Path, *, trust_remote_code: bool = False, device: str = "cpu",
                 checkpoint: Checkpoint | None = None) -> None:  # fmt: skip
        """`checkpoint` stands in for the directory's own weights, which it may read differently."""
        from pennyweight.models.config_json import read_config_json

        self.path = path
        self.device = torch.device(device)
        self.trust_remote_code = trust_remote_code
        self.checkpoint: Checkpoint = checkpoint or decoded(open_checkpoint(path), read_config_json(path))
        with postponed():
            self.config = read_config(path, trust_remote_code=trust_remote_code)
            self.module = build(self.config, trust_remote_code=trust_remote_code)
            self.weights = WeightMap(self.module, self.checkpoint)
        self._untie()
        self.blocks = find_blocks(self.module)
        found = find_sites(self.module, self.blocks, self.weights)
        head = find_head(self.module, self.weights, self.checkpoint.config_changes, block=len(self.blocks))
        self.head: Site | None = head if isinstance(head, Site) else None
        self.why_no_head: str = head if isinstance(head, str) else ""
        self.embedding: Site | None = find_embedding(self.module, self.weights)
        heads = [] if self.head is None else [self.head]
        self.sites: list[Site] = [*found.sites, *heads]
        self.places: dict[str, Place] = found.places | {site.name: Place(site.tensor) for site in heads}
        self.refused: dict[str, str] = found.refused
        self._names = {id(parameter): name for name, parameter in self.module.named_parameters()}
        self._outside: dict[int, Tensor] = {}
        self._embedding_rows: Callable[[Tensor], Tensor] | None = None
        self._loading = threading.Lock()
        self._returned = 0
        self._read_buffers()

    @property
    def is_decoder(self) -> bool:
        """It has a language-model head, so perplexity and logits mean something."""
        return bool(hasattr(self.module, "lm_head") or self.module.get_output_embeddings() is not None)  # type: ignore[operator]

    @property
    def tied_head(self) -> bool:
        tied = {id(parameter) for parameter in self.module.get_input_embeddings().parameters()}  # type: ignore[operator]
        head = self.module.get_output_embeddings()  # type: ignore[operator]
        return head is not None and any(id(parameter) in tied for parameter in head.parameters())

    @property
    def unused(self) -> list[str]:
        """Tensors of the checkpoint that the model has no place for."""
        return self.weights.unused

    @property
    def stored_twice(self) -> set[str]:
        """Tensors that the checkpoint holds although they are another one's, tied."""
        return self.weights.stored_twice

    def sites_of(self, block: int) -> list[Site]:
        return [site for site in self.sites if site.block == block]

    def linear_names(self) -> tuple[str, ...]:
        """Modules of type nn.Linear that are no sites of the blocks: heads, routers, towers."""
        owned = {self.places[site.name].parameter for site in self.sites if site.kind != "head"}
        linear = (name for name, module in self.module.named_modules() if isinstance(module, nn.Linear))
        return tuple(name for name in linear if f"{name}.weight" not in owned)

    # -- running ------------------------------------------------------------------------------------------------

    def start(self, batches: Sequence[Tensor], *, embedding: Callable[[Tensor], Tensor] | None = None) -> Stream:
        """Run the part before the blocks on `batches` of token ids [windows, tokens]; note what each block is given.
        `embedding` gives the rows of the site of that name for token ids in place of the checkpoint."""
        self._embedding_rows = embedding
        stream = Stream([batch.to(self.device) for batch in batches], [], [])
        canonical: list[Tensor] = []
        with torch.no_grad(), one_thread_per_operation(), self.opened(0) as first:
            self._returned = self._probe(first, stream.input_ids[0])
            for ids in stream.input_ids:
                recorded, hidden = self._record(ids)
                stream.hidden.append(hidden)
                stream.arguments.append(
                    [(shared(args, canonical), shared(kwargs, canonical)) for args, kwargs in recorded]
                )
        self._outside.clear()
        self._embedding_rows = None
        return stream

    def run(self, batches: Sequence[Tensor], *, embedding: Callable[[Tensor], Tensor] | None = None,
            tell: Callable[[int], None] = lambda done: None) -> Stream:  # fmt: skip
        """`batches` as the last block hands them on; arguments as for `start`. `tell(done)` follows the blocks."""
        stream = self.start(batches, embedding=embedding)
        for index in range(len(self.blocks)):
            with self.opened(index) as block:
                self.advance(block, index, stream)
            tell(index + 1)
        return stream

    def run_block(self, block: nn.Module, index: int, stream: Stream, *, seen: Callable[[int], Seen] | None = None,
                  watched: Watched | None = None, batches: Sequence[int] | None = None) -> list[Tensor]:  # fmt: skip
        """Outputs of block `index` for `batches` (all), one thread a batch; `seen(batch)` gets linear maps' inputs."""

        def one(batch: int) -> Tensor:
            observer = None if seen is None else seen(batch)
            with torch.no_grad(), Intercept(load=self._load, watched=watched, seen=observer):
                return self._call(block, index, stream, batch)

        return parallel_map(one, range(len(stream.hidden)) if batches is None else batches)

    def differentiable(
        self, block: nn.Module, index: int, stream: Stream, batch: int, *,
        weights: Sequence[Tensor] = (), watched: Watched | None = None, seen: Seen | None = None,
        made: Made | None = None,
    ) -> Tensor:  # fmt: skip
        """The output of block `index` for one batch, recorded for gradients where there are to be any. Linear maps with
        one of the `weights` are computed as in calibration; `seen` gets what those of `watched` sites are called with,
        and `made` what they give."""
        values = {id(weight): weight for weight in weights}
        outer = Intercept(load=self._load, watched=watched, seen=seen, made=made)
        with outer, Substituted(values, is_narrow=self.calibrates_in_bfloat16):
            return self._call(block, index, stream, batch)

    def _call(self, block: nn.Module, index: int, stream: Stream, batch: int) -> Tensor:
        args, kwargs = stream.arguments[batch][index]
        out = block(stream.hidden[batch], *args, **kwargs)
        return out[0] if isinstance(out, tuple | list) else out  # type: ignore[no-any-return]

    def run_with(
        self, block: nn.Module, index: int, stream: Stream, batch: int, weights: Mapping[str, Tensor]
    ) -> Tensor:
        """The same with `weights` (site -> [out, in]) in place of the block's own, and differentiable in them."""
        values = self._parameters_with(weights)
        with Intercept(load=self._load), Substituted(values, is_narrow=self.calibrates_in_bfloat16):
            return self._call(block, index, stream, batch)

    def _parameters_with(self, weights: Mapping[str, Tensor]) -> dict[int, Tensor]:
        """id of a parameter of the opened block -> its value with `weights` put in."""
        values: dict[int, Tensor] = {}
        for name, weight in weights.items():
            place = self.places[name]
            parameter = self.module.get_parameter(place.parameter)
            if place.is_whole:
                values[id(parameter)] = weight
            else:
                place.view(values.setdefault(id(parameter), parameter.detach().clone())).copy_(weight)
        return values

    def advance(self, block: nn.Module, index: int, stream: Stream, *, watched: Watched | None = None) -> None:
        """Replace `stream.hidden` by the outputs of block `index`, one batch after the other."""

        def one(batch: int) -> None:
            [stream.hidden[batch]] = self.run_block(block, index, stream, watched=watched, batches=[batch])

        parallel_map(one, range(len(stream.hidden)))

    def enter_head(self, stream: Stream) -> None:
        """Replace what the last block gave in `stream.hidden` by what the head is given; its weight is not read."""
        assert self.head is not None

        def stop(x: Tensor) -> Any:
            raise _Enough(x)

        with self._patched({self.head.name: stop}), self.finishing(stream) as finish:

            def one(batch: int) -> None:
                try:
                    finish(batch)
                except _Enough as found:
                    [stream.hidden[batch]] = found.args
                    return
                raise ModelError(f"{type(self.module).__name__}: a pass over text does not run its output head")

            parallel_map(one, range(len(stream.hidden)))

    @contextmanager
    def finishing(
        self, stream: Stream, *, given: Callable[[int], Mapping[str, Tensor]] = lambda batch: {},
        made: Callable[[int], Made] | None = None,
    ) -> Iterator[Callable[[int], Tensor]]:  # fmt: skip
        """A function that runs the part after the blocks on `stream.hidden[batch]`: logits [windows, tokens,
        vocabulary] of a decoder, the last hidden state of an encoder. It may be called from several threads.

        `given(batch)` takes the place of parameters by name; gradients are recorded for what asks for them.
        `made(batch)` gets what the head gives where that is a site."""
        own = threading.local()

        def skip(*args: Any, **kwargs: Any) -> Any:
            return self._wrap(own.final)

        def finish(batch: int) -> Tensor:
            own.final = stream.hidden[batch]
            values = {id(self.module.get_parameter(name)): tensor for name, tensor in given(batch).items()}
            outer = self._intercept(None if made is None else made(batch))
            with one_thread_per_operation(), outer, Substituted(values):
                out = self.module(**call_arguments(self.module, stream.input_ids[batch]))
            logits = getattr(out, "logits", None)
            return out.last_hidden_state if logits is None else logits  # type: ignore[no-any-return]

        try:
            with self._patched(dict.fromkeys(self.blocks, skip)):
                yield finish
        finally:
            self.release()

    def _intercept(self, made: Made | None = None) -> Intercept:
        """For the parts outside the blocks; `made` gets what the head gives."""
        watched = None
        if made is not None and self.head is not None:
            weight = self._load(self.module.get_parameter(self.places[self.head.name].parameter))
            watched = Watched({self.head.name: weight})
        return Intercept(load=self._load, load_rows=self._load_rows, watched=watched, made=made)

    def _probe(self, first: nn.Module, ids: Tensor) -> int:
        """How long a tuple blocks return, 0 for a tensor alone: seen by running the first one on a few tokens."""
        answer: list[int] = []
        original = first.forward

        def look(*args: Any, **kwargs: Any) -> Any:
            out = original(*args, **kwargs)
            answer.append(len(out) if isinstance(out, tuple | list) else 0)
            raise _Enough

        self._run_with([look], ids[:1, :8])
        return answer[0]

    def _record(self, ids: Tensor) -> tuple[list[tuple[tuple[Any, ...], dict[str, Any]]], Tensor]:
        recorded: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        hidden: list[Tensor] = []

        def note(*args: Any, **kwargs: Any) -> Any:
            first = args[0] if args else kwargs.pop(self._first_name())
            if hidden and first is not hidden[0]:
                raise ModelError(
                    f"{type(self.module).__name__} changes the hidden state between its blocks, "
                    "so they cannot be run one after the other"
                )
            hidden.append(first)
            recorded.append((args[1:], kwargs))
            if len(recorded) == len(self.blocks):
                raise _Enough
            return self._wrap(first)

        self._run_with([note] * len(self.blocks), ids)
        return recorded, hidden[0]

    def _run_with(self, functions: Sequence[Callable[..., Any]], ids: Tensor) -> None:
        """Run the model on `ids` with `functions` in place of its first blocks, until one of them has seen enough."""
        with self._patched(dict(zip(self.blocks, functions, strict=False))), self._intercept():
            try:
                self.module(**call_arguments(self.module, ids))
            except _Enough:
                return
            except (TypeError, ValueError, IndexError, AttributeError) as error:
                raise ModelError(
                    f"{type(self.module).__name__} cannot be run on text alone, block by block: {error}"
                ) from error
        raise ModelError(
            f"{type(self.module).__name__}: a pass over text does not run all blocks ({self.blocks[0]}, ...)"
        )

    def _first_name(self) -> str:
        block = type(self.module.get_submodule(self.blocks[0]))
        return list(inspect.signature(block.forward).parameters)[1]

    def _wrap(self, hidden: Tensor) -> Any:
        return (hidden, *[None] * (self._returned - 1)) if self._returned else hidden

    @contextmanager
    def _patched(self, functions: Mapping[str, Callable[..., Any]]) -> Iterator[None]:
        """Modules, by name, call `functions` in place of their own forward."""
        modules = [self.module.get_submodule(name) for name in functions]
        for module, function in zip(modules, functions.values(), strict=True):
            module.forward = function
        try:
            yield
        finally:
            for module in modules:
                del module.forward

    def _untie(self) -> None:
        """Give a parameter of its own to what the config ties but the checkpoint has two different tensors for."""
        for name in self.weights.untied():
            _set(self.module, name, nn.Parameter(self.module.get_parameter(name).detach().clone(), requires_grad=False))

    def _read_buffers(self) -> None:
        """Buffers are small: those in the checkpoint are read, the others are what the model made them."""
        for path, buffer in list(self.module.named_buffers()):
            if path in self.weights.sources:
                buffer = self.weights.read(path).to(buffer.dtype)
            elif buffer.is_meta:
                raise ModelError(f"{type(self.module).__name__}: the buffer {path} has no value before it is used")
            owner, _, name = path.rpartition(".")
            self.module.get_submodule(owner)._buffers[name] = buffer.to(self.device)

    # -- weights ------------------------------------------------------------------------------------------------

    def _load(self, parameter: nn.Parameter) -> Tensor:
        """A parameter outside the blocks, read on its first use and kept until the pass is over."""
        key = id(parameter)
        with self._loading:
            if key not in self._outside:
                self._outside[key] = self.weights.read(self._names[key]).to(self.device)
            return self._outside[key]

    def _load_rows(self, parameter: nn.Parameter, rows: Tensor) -> Tensor:
        """Rows of an embedding: of the table where it has been read, else from the checkpoint."""
        table = self._outside.get(id(parameter))
        if self._embedding_rows is not None and parameter is self.module.get_input_embeddings().weight:  # type: ignore[operator]
            return self._embedding_rows(rows.cpu()).to(self.device)
        if table is not None:
            return table[rows]
        return self.weights.read_rows(self._names[id(parameter)], rows.cpu()).to(self.device)

    def release(self) -> None:
        """Let go of what was read outside the blocks (embeddings, head)."""
        self._outside.clear()

    @contextmanager
    def opened(self, index: int, *, given: Mapping[str, Tensor] = MappingProxyType({})) -> Iterator[nn.Module]:
        """Block `index`, or behind the last the head, in float32; `given` takes the place of parameters by name."""
        name = self.blocks[index] if self.head is None else [*self.blocks, self.head.name][index]
        block = self.module.get_submodule(name)
        empty = dict(block.named_parameters())
        try:
            missing = [path for path in empty if f"{name}.{path}" not in given]
            values = parallel_map(lambda path: self.weights.read(f"{name}.{path}").to(self.device), missing)
            read = dict(zip(missing, values, strict=True))
            del values
            for path in empty:
                known = given.get(f"{name}.{path}")
                _set(block, path, nn.Parameter(read.pop(path), requires_grad=False) if known is None else known)
            yield block
        finally:
            for path, parameter in empty.items():
                _set(block, path, parameter)

    def matrix(self, site: Site, block: nn.Module | None = None) -> Tensor:
        """The site's weight [out, in] in an opened block, or in `block`, a copy of that, as a view of its memory."""
        place = self.places[site.name]
        if block is None:
            return place.view(self.module.get_parameter(place.parameter).data)
        within = place.parameter.removeprefix(f"{self.blocks[site.block]}.")
        return place.view(block.get_parameter(within).data)

    def watched(
        self, sites: Sequence[Site], block: nn.Module | None = None, *, is_narrow: bool | None = None
    ) -> Watched:
        """Recognises sites by where their weights lie in an opened block, or in a copy of it; narrow by default where
        calibration is."""
        is_narrow = self.calibrates_in_bfloat16 if is_narrow is None else is_narrow
        return Watched({site.name: self.matrix(site, block) for site in sites}, is_narrow=is_narrow)

    @property
    def calibrates_in_bfloat16(self) -> bool:
        """Calibration runs the sites' maps in bfloat16, as the runtime will: where the checkpoint is bfloat16 and the
        processor has instructions for it. Evaluation is always in float32."""
        stored = {self.checkpoint.tensors[site.tensor].dtype for site in self.sites if site.kind != "head"}
        is_fast = self.device.type == "cpu" and torch.cpu._is_avx512_bf16_supported()
        return is_fast and stored == {torch.bfloat16}


class _Enough(Exception):
    """The forward pass has shown what it was run for."""


def _set(module: nn.Module, path: str, parameter: Tensor) -> None:
    owner, _, name = path.rpartition(".")
    module.get_submodule(owner)._parameters[name] = parameter  # type: ignore[assignment]
