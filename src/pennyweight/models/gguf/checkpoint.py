"""The weights of a GGUF file under the names that transformers has for them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from gguf.constants import GGMLQuantizationType
from torch import Tensor, nn

from pennyweight.core.errors import CheckpointError
from pennyweight.models.base import TensorInfo
from pennyweight.models.checkpoint import row_range
from pennyweight.models.config_json import read_config_json
from pennyweight.models.decoders.base import Coded
from pennyweight.models.gguf.families import expert_count, family_of, hyperparameters
from pennyweight.models.gguf.file import GgufFile, GgufTensor, read_gguf
from pennyweight.models.gguf.places import placed
from pennyweight.models.gguf.stored import Stored
from pennyweight.models.gguf.types import BLOCK_TYPES, FLOAT_TYPES, BlockType, FloatType
from pennyweight.models.gguf_files import first_file
from pennyweight.models.skeleton import build, read_config
from pennyweight.schemes import QuantizedWeight

_TYPES: dict[int, BlockType | FloatType] = {
    kind.number: kind for kinds in (BLOCK_TYPES, FLOAT_TYPES) for kind in kinds.values()
}
# What lies in a file number by number.
_PLAIN = {kind.number: kind.dtype for kind in FLOAT_TYPES.values()} | {
    int(GGMLQuantizationType[name]): dtype
    for name, dtype in {"F64": torch.float64, "I8": torch.int8, "I16": torch.int16, "I32": torch.int32,
                        "I64": torch.int64}.items()
}  # fmt: skip
# How checkpoints call the matrices of an expert; transformers has them in two parameters.
_EXPERTS = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}
_MIXTRAL = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}


@dataclass(frozen=True)
class GgufCheckpoint:
    """The tensors of a GGUF file; see `Checkpoint` for the meaning of each member. Blocks are decoded to float32."""

    path: Path
    file: GgufFile
    tensors: Mapping[str, TensorInfo]
    weight_files: list[Path]
    places: Mapping[str, tuple[Stored, GgufTensor]]
    decoded_from: str | None
    config_changes: Mapping[str, Any]

    @property
    def stored_bytes(self) -> int:
        """Bytes of all tensors as they lie in the file."""
        return sum(tensor.size_bytes for tensor in {id(t): t for _, t in self.places.values()}.values())

    def read(self, name: str, part: slice | None = None) -> Tensor:
        """The tensor `name` (rows `part` of its first axis) in fresh memory; raises CheckpointError."""
        if name not in self.places:
            raise CheckpointError(f"{self.path}: there is no tensor {name!r}")
        place, tensor = self.places[name]
        shape = self.tensors[name].shape
        first, last = (0, shape[0]) if part is None else row_range(name, shape, part)
        # Rows that change places are read together.
        rows = slice(first, last) if place.heads is None else slice(0, shape[0])
        if len(shape) == 1:
            # The file has one row, of which each number is one here.
            stored = decoded_rows(tensor, slice(0, 1))[0, rows]
        else:
            stored = decoded_rows(tensor, self._stored_rows(name, rows))
        found = place.invert(stored).to(self.tensors[name].dtype)
        return found if place.heads is None else found[first:last]

    def coded(self, name: str) -> Coded | None:
        """How the tensor `name` is stored where it is in blocks: its rows in the order of the checkpoint."""
        place, tensor = self.places[name]
        kind = _TYPES[tensor.type_number]
        if isinstance(kind, FloatType):
            return None

        def read() -> QuantizedWeight:
            rows = self.tensors[name].shape[0]
            weight = kind.unpack(tensor.read_rows(self._stored_rows(name, slice(0, rows))), tensor.width)
            order = place.row_order(rows)
            return weight if order is None else weight.rows(order.argsort())

        return Coded(kind.scheme, read)

    def _stored_rows(self, name: str, rows: slice) -> slice:
        """Which rows of the file's tensor `rows` of the tensor `name` are: experts come one after the other."""
        before = (self.places[name][0].expert or 0) * self.tensors[name].shape[0]
        return slice(before + rows.start, before + rows.stop)

    def stored_info(self, name: str) -> TensorInfo:
        """The tensor `name` as it lies in the file: floats and integers as they are, blocks as rows of bytes."""
        place, tensor = self.places[name]
        shape = tensor.shape if place.expert is None else tensor.shape[1:]
        dtype = _PLAIN.get(tensor.type_number)
        if dtype is not None:
            return TensorInfo(dtype, shape)
        rows, size = math.prod(shape[:-1]), tensor.size_bytes // (1 if place.expert is None else tensor.shape[0])
        return TensorInfo(torch.uint8, (rows, size // max(1, rows)))

    def stored(self, name: str, part: slice | None = None) -> Tensor:
        """The tensor `name` as `stored_info` says, or rows of its first axis, byte for byte."""
        info, (place, tensor) = self.stored_info(name), self.places[name]
        begin = (place.expert or 0) * info.size_bytes
        if part is not None:
            first, last = row_range(name, info.shape, part)
            begin += first * (info.size_bytes // max(1, info.shape[0]))
            info = TensorInfo(info.dtype, (last - first, *info.shape[1:]))
        return tensor.read(begin, begin + info.size_bytes).view(info.dtype).reshape(info.shape)


def is_decoded(tensor: GgufTensor) -> bool:
    """Whether its type is one that `decoded_rows` knows."""
    return tensor.type_number in _TYPES


def decoded_rows(tensor: GgufTensor, rows: slice) -> Tensor:
    """`rows` of a tensor, all axes but the last counted as one, as they lie in the file; blocks as float32."""
    if not is_decoded(tensor):
        name = GGMLQuantizationType(tensor.type_number).name
        raise CheckpointError(f"{tensor.file}: {tensor.name} is {name}; decoded are {', '.join(BLOCK_TYPES)}")
    kind, raw = _TYPES[tensor.type_number], tensor.read_rows(rows)
    return raw.view(kind.dtype) if isinstance(kind, FloatType) else kind.unpack(raw, tensor.width).dequantize()


def open_gguf(path: Path) -> GgufCheckpoint:
    """The GGUF file in the directory `path`, beside a config.json that says what transformers makes of it.

    Raises ModelError where there is no such file or several, and CheckpointError where it is damaged or does not hold
    what the config asks for.
    """
    file = read_gguf(first_file(path))
    return checkpoint_of(path, file, model_places(path, file))


@dataclass(frozen=True)
class Placed:
    """A tensor of some `shape`, and where a file has it."""

    shape: tuple[int, ...]
    place: Stored


def checkpoint_of(path: Path, file: GgufFile, wanted: Mapping[str, Placed]) -> GgufCheckpoint:
    """The tensors of `file` by the names in `wanted`; raises CheckpointError for one that it does not have so."""
    found = {name: (one.place, _found(file, name, one.place)) for name, one in wanted.items()}
    numbers = {tensor.type_number for _, tensor in found.values()}
    quantized = sorted(GGMLQuantizationType(number).name for number in numbers - _PLAIN.keys())
    return GgufCheckpoint(
        path=path,
        file=file,
        tensors={name: TensorInfo(_dtype(tensor), wanted[name].shape) for name, (_, tensor) in found.items()},
        weight_files=list(file.files),
        places=found,
        decoded_from=f"GGUF: {', '.join(quantized)}" if quantized else None,
        config_changes={},
    )


def model_places(path: Path, file: GgufFile) -> dict[str, Placed]:
    """Where `file` has each tensor of the model whose config.json lies in `path`, by the names that transformers' own
    checkpoints give them. Raises ContainerError for a model whose GGUF names are not known here."""
    config = read_config_json(path)
    family, hyper = family_of(config), hyperparameters(config)
    named = _names(build(read_config(path)), expert_count(hyper), is_mixtral=config.get("model_type") == "mixtral")
    tokens = file.fields["tokenizer.ggml.tokens"].count if "tokenizer.ggml.tokens" in file.fields else None
    places = placed(family, hyper, named, tokens=tokens or 0).places
    return {name: Placed(named[name].shape, place) for name, (place,) in places.items()}


def _dtype(tensor: GgufTensor) -> torch.dtype:
    return _PLAIN.get(tensor.type_number, torch.float32)


def _names(module: nn.Module, experts: int, *, is_mixtral: bool) -> dict[str, TensorInfo]:
    """Every tensor that a checkpoint of the model has, each expert's by itself."""
    found: dict[str, TensorInfo] = {}
    for name, tensor in module.state_dict().items():
        head, _, last = name.rpartition(".experts.")
        if not head or last not in _EXPERTS or tensor.ndim != 3:
            found[name] = TensorInfo(torch.float32, tuple(tensor.shape))
            continue
        parts = _EXPERTS[last]
        rows, columns = tensor.shape[1] // len(parts), tensor.shape[2]
        if is_mixtral:
            head, parts = head.removesuffix("mlp") + "block_sparse_moe", tuple(_MIXTRAL[part] for part in parts)
        for expert in range(experts):
            for part in parts:
                found[f"{head}.experts.{expert}.{part}.weight"] = TensorInfo(torch.float32, (rows, columns))
    return found


def _found(file: GgufFile, name: str, place: Stored) -> GgufTensor:
    tensor = file.tensors.get(place.tensor)
    if tensor is None:
        raise CheckpointError(f"{file.files[0]}: has no tensor {place.tensor!r} for {name}: it is of another model")
    own = tensor.shape if place.expert is None else tensor.shape[1:]
    if math.prod(own) != math.prod(place.shape):
        raise CheckpointError(
            f"{file.files[0]}: {place.tensor} has shape {own}, config.json asks for {place.shape}: they do not belong "
            "together"
        )
    return tensor
