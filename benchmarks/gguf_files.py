"""GGUF files of floats: a model as it is, and a quantized file with all its weights decoded."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path

import gguf
import gguf.quants
import torch
from torch import Tensor

from pennyweight.models.checkpoint import open_checkpoint
from pennyweight.models.config_json import read_config_json
from pennyweight.models.gguf.conversion import conversion
from pennyweight.models.gguf.fields import FieldValue
from pennyweight.models.gguf.file import read_gguf
from pennyweight.models.gguf.layout import header_bytes

_FILE_TYPE = {
    gguf.Keys.General.FILE_TYPE: FieldValue.of(int(gguf.LlamaFileType.ALL_F32), gguf.GGUFValueType.UINT32),
    gguf.Keys.General.QUANTIZATION_VERSION: FieldValue.of(gguf.GGML_QUANT_VERSION, gguf.GGUFValueType.UINT32),
}


def write_floats(model: Path, out: Path) -> Path:
    """The Hugging Face model in the directory `model` as one GGUF file of float32, as llama.cpp's converter makes it.

    Each GGUF tensor is put together in memory, one after the other.
    """
    checkpoint = open_checkpoint(model)
    found = conversion(model, read_config_json(model), checkpoint.tensors)
    sources: dict[str, list[tuple[int, str, int]]] = {}
    for name, parts in found.places.items():
        for index, place in enumerate(parts):
            sources.setdefault(place.tensor, []).append((place.expert or 0, name, index))

    def weights(tensor: str) -> Tensor:
        if tensor in found.extra:
            return found.extra[tensor]
        parts = [found.places[name][index].apply(checkpoint.read(name)) for _, name, index in sorted(sources[tensor])]
        return torch.cat([part.float().reshape(-1) for part in parts])

    return _write(out, {**found.fields, **_FILE_TYPE}, found.shapes, weights)


def write_decoded(file: Path, out: Path) -> Path:
    """The same model as in the GGUF `file`, its weights decoded to float32 by the gguf package and not by us."""
    fields = {**read_gguf(file).fields, **_FILE_TYPE}
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(file).tensors}
    shapes = {name: tuple(int(size) for size in reversed(tensor.shape)) for name, tensor in tensors.items()}

    def weights(name: str) -> Tensor:
        return torch.from_numpy(gguf.quants.dequantize(tensors[name].data, tensors[name].tensor_type).copy())

    return _write(out, fields, shapes, weights)


def _write(
    out: Path,
    fields: Mapping[str, FieldValue],
    shapes: Mapping[str, tuple[int, ...]],
    weights: Callable[[str], Tensor],
) -> Path:
    sizes = {name: 4 * math.prod(shape) for name, shape in shapes.items()}
    entries = [(name, shape, int(gguf.GGMLQuantizationType.F32), sizes[name]) for name, shape in shapes.items()]
    header, positions = header_bytes(fields, entries)
    with out.open("wb") as file:
        file.write(header)
        for name, position in positions.items():
            file.seek(position)
            file.write(weights(name).numpy().astype("<f4").tobytes())
        # llama.cpp reads whole multiples of 32 bytes.
        file.truncate(-(-file.tell() // 32) * 32)
    return out


def tensor_bytes(file: Path) -> int:
    """What all tensors of a GGUF file take, without padding and metadata."""
    return sum(tensor.size_bytes for tensor in read_gguf(file).tensors.values())


def types_of(file: Path) -> dict[str, str]:
    """The type of each tensor, as ggml spells it."""
    found = read_gguf(file).tensors
    return {name: gguf.GGMLQuantizationType(tensor.type_number).name for name, tensor in found.items()}
