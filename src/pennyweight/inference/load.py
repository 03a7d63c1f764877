"""`pennyweight.load`: a quantized model directory as a transformers model that multiplies with the packed weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pennyweight.core.errors import UsageError
from pennyweight.inference.cache import Notes, PackedFile, Weight, cache_key, open_packed, places, write_packed
from pennyweight.inference.experts import PackedStack
from pennyweight.inference.frame import Frame
from pennyweight.inference.modules import PackedEmbedding, PackedLinear
from pennyweight.inference.one_thread import keep_to_one_thread
from pennyweight.inference.operator import check_activations
from pennyweight.inference.plan import packed
from pennyweight.inference.shared_input import SharedInput, find_shared
from pennyweight.kernels.packed import Activations, PackedMatrix
from pennyweight.models.hub import resolve

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class LoadReport:
    """What `load` did; the model's attribute `load_report`.

    packed         number of packed weights, of `packed_bytes`
    decoded        quantized tensors that are kept as floats -> the reason
    shared         names of linear maps that are computed together, by the input that they share
    cache          the file that they are mapped from, of `cache_bytes`; None where they are in memory
    is_fresh       they were packed by this load
    notes          what else a user should know
    """

    path: Path
    activations: Activations
    packed: int
    packed_bytes: int
    decoded: Mapping[str, str]
    shared: list[list[str]]
    cache: Path | None
    cache_bytes: int
    is_fresh: bool
    notes: list[str]

    def lines(self) -> list[str]:
        """What a user should know, in sentences; nothing where all went as usual."""
        told = list(self.notes)
        if self.is_fresh and self.cache is not None:
            told.append(f"packed weights are kept in {self.cache} ({self.cache_bytes / 2**20:.1f} MiB)")
        if self.decoded:
            name, why = next(iter(self.decoded.items()))
            more = f" and {len(self.decoded) - 1} more" if len(self.decoded) > 1 else ""
            told.append(f"{name}{more}: kept as floats: {why}")
        return told


def load(
    directory: str | Path,
    *,
    activations: Activations = "int8",
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    cache: bool = True,
    trust_remote_code: bool = False,
) -> Any:
    """The transformers model of a quantized directory, its linear maps over packed weights; see docs/inference.md.

    activations  "int8" rounds what goes into a packed weight to 8 bits, "exact" does not
    dtype        of what is not packed and of what goes through the model; the model's own by default
    cache        keep the packed weights in a file, which the next load maps instead of packing again
    Raises ModelError for a directory that holds no quantized weights, CheckpointError where files are missing or
    damaged, UsageError for settings that do not exist.
    """
    from pennyweight.inference.generation import generate_natively

    check_activations(activations)
    if dtype is not None and dtype not in _DTYPES:
        raise UsageError(f"dtype={dtype}: give torch.float32, torch.bfloat16 or torch.float16, or leave it out")
    path = resolve(str(directory), trust_remote_code=trust_remote_code)
    frame = Frame(path, dtype=dtype, trust_remote_code=trust_remote_code)
    problems: list[str] = []
    found, is_fresh = _weights(frame, problems) if cache else (_in_memory(frame), True)
    _install(frame, found.weights, activations)
    shared: list[list[str]] = found.notes["shared"]
    for names in shared:
        SharedInput([frame.model.get_submodule(name) for name in names])
    matrices = [weight for weight in found.weights.values() if isinstance(weight, PackedMatrix)]
    model = frame.model.eval()
    keep_to_one_thread(model)
    generate_natively(model)
    model.load_report = LoadReport(
        path=path, activations=activations, packed=len(matrices),
        packed_bytes=sum(matrix.layout.size_bytes for matrix in matrices), decoded=dict(frame.plan.decoded),
        shared=shared, cache=found.path if found.size_bytes else None, cache_bytes=found.size_bytes, is_fresh=is_fresh,
        notes=[*found.notes["said"], *problems],
    )  # fmt: skip
    # It would write bytes under names that nobody reads.
    model.save_pretrained = partial(_refuse_to_save, path)
    return model.to(device)


def _refuse_to_save(path: Path, *_: Any, **__: Any) -> None:
    raise UsageError(f"{path}: a model with packed weights is not saved: copy its directory instead")


# ---- the weights


def _weights(frame: Frame, problems: list[str]) -> tuple[PackedFile, bool]:
    """The quantized weights from a file, and whether it was made now; in memory where none can be kept, which is said
    in `problems`."""
    key = cache_key(frame.path, frame.checkpoint.weight_files)
    files = places(frame.path, key)
    for file in files:
        found = open_packed(file, key)
        if found is not None and found.weights.keys() == set(_quantized(frame)):
            return found, False
    notes = _notes(frame)
    for file in files:
        try:
            write_packed(file, key, _made(frame), notes)
        except OSError as error:
            problems.append(f"{file}: packed weights cannot be kept: {error.strerror or error}")
            continue
        found = open_packed(file, key)
        if found is not None:
            return found, True
        problems.append(f"{file}: packed weights were written, but cannot be read")
    return PackedFile(frame.path, 0, dict(_made(frame)), notes), True


def _in_memory(frame: Frame) -> PackedFile:
    return PackedFile(frame.path, 0, dict(_made(frame)), _notes(frame))


def _quantized(frame: Frame) -> list[str]:
    """The quantized tensors that the model has a place for."""
    used = {key for source in frame.weights.sources.values() for key in source.keys}
    return [key for key in frame.coded if key in used]


def _made(frame: Frame) -> Iterator[tuple[str, Weight]]:
    """Every quantized tensor, packed or decoded, one after the other."""
    for key in _quantized(frame):
        coded = frame.coded[key]
        is_packed = coded is not None and key not in frame.plan.decoded
        yield key, packed(coded.read()) if coded is not None and is_packed else frame.checkpoint.read(key)


def _notes(frame: Frame) -> Notes:
    """Which of the maps that will be packed share an input."""
    model: nn.Module = frame.model
    linears, others = [], []
    for name, module in model.named_modules():
        empty = [p for p in module.parameters(recurse=False) if p.is_meta]
        if isinstance(module, nn.Linear) and empty:
            linears.append(name)
        elif empty:
            others.append(name)
    found = find_shared(model, linears, others)
    names = (name for name in linears if f"{name}.weight" in frame.plan.matrices)
    packed_ones = set(names)
    groups = [[name for name in group if name in packed_ones] for group in found.groups]
    said = [f"no maps are computed together: {found.why_none}"] if found.why_none else []
    return {"shared": [group for group in groups if len(group) > 1], "said": said}


# ---- into the model


def _install(frame: Frame, weights: Mapping[str, Weight], activations: Activations) -> None:
    """Packed weights into modules of their own, decoded ones into the parameters that they are."""

    def read(key: str) -> Tensor:
        weight = weights.get(key)
        if weight is None:
            return frame.mapped(key)
        assert isinstance(weight, Tensor), key
        return weight

    paths: dict[int, list[str]] = {}
    for path, module in frame.model.named_modules(remove_duplicate=False):
        paths.setdefault(id(module), []).append(path)
    for name, source in frame.weights.sources.items():
        if name in frame.plan.stacks:
            _put_stack(frame, name, weights, activations)
        elif name in frame.plan.matrices:
            matrix = weights[frame.plan.matrices[name]]
            assert isinstance(matrix, PackedMatrix), name
            for module, _ in frame.owners[name]:
                replacement = _replacement(module, matrix, activations)
                for path in paths[id(module)]:
                    parent, _, attribute = path.rpartition(".")
                    setattr(frame.model.get_submodule(parent), attribute, replacement)
        elif any(key in frame.coded for key in source.keys):
            frame.set(name, frame.weights.made(name, read))


def _replacement(module: nn.Module, matrix: PackedMatrix, activations: Activations) -> nn.Module:
    if isinstance(module, nn.Embedding):
        return PackedEmbedding(matrix, dtype=module.weight.dtype, padding_idx=module.padding_idx)
    assert isinstance(module, nn.Linear)
    return PackedLinear(matrix, bias=module.bias, activations=activations)


def _put_stack(frame: Frame, name: str, weights: Mapping[str, Weight], activations: Activations) -> None:
    """The experts' own forward goes on, expert by expert: what it multiplies with is packed."""
    owner, _, attribute = name.rpartition(".")
    module: Any = frame.model.get_submodule(owner)
    kind = module._parameters[attribute].dtype

    def part(key: str) -> Weight:
        weight = weights[key] if key in weights else frame.mapped(key)
        return weight.to(kind) if isinstance(weight, Tensor) else weight

    stack = PackedStack([[part(key) for key in keys] for keys in frame.plan.stacks[name]], activations=activations)
    del module._parameters[attribute]
    module.add_module(attribute, stack)
    if hasattr(module, "config"):
        module.config._experts_implementation = "eager"
