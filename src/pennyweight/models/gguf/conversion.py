"""Everything that a GGUF file says about a Hugging Face model beside its weights' bytes.

Names, types and order are those of llama.cpp's convert_hf_to_gguf.py; the gguf package gives the names.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
from torch import Tensor

from pennyweight.core.errors import CheckpointError
from pennyweight.models.base import TensorInfo
from pennyweight.models.gguf.checkpoint import GgufCheckpoint
from pennyweight.models.gguf.families import Family, check, expert_count, family_of, hyperparameters
from pennyweight.models.gguf.fields import FieldValue
from pennyweight.models.gguf.from_writer import fields_of
from pennyweight.models.gguf.general import add_general
from pennyweight.models.gguf.model import architecture_of
from pennyweight.models.gguf.places import placed, shapes_of
from pennyweight.models.gguf.rope import Hyper, llama3_factors, longrope_factors
from pennyweight.models.gguf.stored import Stored
from pennyweight.models.gguf.vocabulary import add_vocabulary, read_vocabulary


@dataclass(frozen=True)
class Conversion:
    """A model as GGUF.

    architecture  llama.cpp's name of it
    fields        all metadata in order, without general.file_type and general.quantization_version
    places        checkpoint tensor -> where it goes: one place, two where GGUF splits a fused tensor
    dropped       checkpoint tensor -> why GGUF does not take it
    extra         float32 tensors that no checkpoint has; they come first in the file
    shapes        shape of every GGUF tensor, outermost axis first
    experts       of a layer, 0 where there are none
    source        the GGUF file that it was before, whose tensors stay byte for byte where they are not quantized
    """

    architecture: str
    fields: Mapping[str, FieldValue]
    places: Mapping[str, tuple[Stored, ...]]
    dropped: Mapping[str, str]
    extra: Mapping[str, Tensor]
    shapes: Mapping[str, tuple[int, ...]]
    experts: int
    source: GgufCheckpoint | None = None


def same_file(source: GgufCheckpoint) -> Conversion:
    """A model that comes from a GGUF file and stays one: all that the file says, and all its tensors in their order.

    Raises CheckpointError where it has tensors that `source` does not name.
    """
    file = source.file
    named = {tensor.name for _, tensor in source.places.values()}
    missing = [name for name in file.tensors if name not in named]
    if missing:
        raise CheckpointError(f"{file.files[0]}: {missing[0]} is not known of this model")
    return Conversion(
        architecture=architecture_of(file),
        fields=file.fields,
        places={name: (place,) for name, (place, _) in source.places.items()},
        dropped={},
        extra={},
        shapes={name: tensor.shape for name, tensor in file.tensors.items()},
        experts=0,
        source=source,
    )


def conversion(path: Path, config: Mapping[str, Any], tensors: Mapping[str, TensorInfo]) -> Conversion:
    """How the model in the directory `path`, with `config` of its config.json and `tensors`, is stored as GGUF.

    Raises ContainerError where llama.cpp has no place for it or would compute something else, and ModelError where its
    files can't be read.
    """
    family = family_of(config)
    hyper = hyperparameters(config)
    check(family, hyper)
    vocabulary = read_vocabulary(path, vocab_size=int(hyper["vocab_size"]), has_prefix=family.has_prefix)
    found = placed(family, hyper, tensors, tokens=len(vocabulary.tokens))
    experts = expert_count(hyper)
    extra = extra_tensors(family, hyper)
    shapes = {name: tuple(tensor.shape) for name, tensor in extra.items()}
    shapes.update(shapes_of(found.places, experts=experts))
    architecture = gguf.MODEL_ARCH_NAMES[family.arch]
    writer = gguf.GGUFWriter(None, architecture)
    add_general(writer, path, shapes)
    family.parameters(writer, hyper)
    add_vocabulary(writer, path, vocabulary)
    return Conversion(architecture, fields_of(writer), found.places, found.dropped, extra, shapes, experts)


def extra_tensors(family: Family, hyper: Hyper) -> dict[str, Tensor]:
    """By name the float32 tensors that say how rope is scaled, of which no checkpoint has any."""
    kind = gguf.MODEL_TENSOR
    found: dict[gguf.MODEL_TENSOR, Tensor] = {}
    freqs = llama3_factors(hyper)
    if freqs is not None:
        found[kind.ROPE_FREQS] = freqs
    factors = longrope_factors(hyper)
    if factors is not None:
        found[kind.ROPE_FACTORS_LONG], found[kind.ROPE_FACTORS_SHORT] = factors
    return {f"{gguf.TENSOR_NAMES[name]}.weight": tensor for name, tensor in found.items()}
