"""A GGUF file that transformers runs: for calibration on what its model computes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import torch

from pennyweight.core.errors import ModelError
from pennyweight.models.config_json import read_config_json
from pennyweight.models.gguf.checkpoint import GgufCheckpoint, Placed, checkpoint_of, decoded_rows, model_places
from pennyweight.models.gguf.conversion import extra_tensors
from pennyweight.models.gguf.families import family_of, hyperparameters
from pennyweight.models.gguf.fields import FieldValue
from pennyweight.models.gguf.file import GgufFile
from pennyweight.models.gguf.from_writer import fields_of
from pennyweight.models.gguf.model import architecture_of
from pennyweight.models.gguf.stored import Stored
from pennyweight.models.gguf.types import FLOAT_TYPES
from pennyweight.models.streamed import StreamedModel

_FLOATS = {kind.number for kind in FLOAT_TYPES.values()}
# Numbers that went through float32 on their way.
_CLOSE = 1e-5


def runnable(path: Path, file: GgufFile, scratch: Path, *, device: str) -> tuple[StreamedModel, GgufCheckpoint]:
    """The model of `file`, run by transformers, and its tensors, those too of which transformers knows nothing.

    config.json and tokenizer are those of the directory `path`, or made from the file's metadata in `scratch`. What
    that config means, written as GGUF, must be what the file says. Raises ModelError or ContainerError that says why
    the model cannot be run.
    """
    directory = path if (path / "config.json").is_file() else _described(file, scratch)
    places = model_places(directory, file)
    _check_same(file, directory)
    taken = {one.place.tensor for one in places.values()}
    others = {name: tensor.shape for name, tensor in file.tensors.items() if name not in taken}
    _check_others(file, directory, others)
    known = {name: Placed(shape, Stored(name, shape, is_float32=False)) for name, shape in others.items()}
    checkpoint = checkpoint_of(directory, file, places | known)
    packed = [tensor for _, tensor in checkpoint.places.values() if tensor.type_number not in _FLOATS]
    if packed:
        kind = gguf.GGMLQuantizationType(packed[0].type_number).name
        raise ModelError(f"{packed[0].name} is quantized already ({kind})")
    return StreamedModel(directory, device=device, checkpoint=checkpoint), checkpoint


def _described(file: GgufFile, scratch: Path) -> Path:
    """A directory with what transformers makes of the file's metadata, beside the file itself."""
    from transformers import AutoConfig, AutoTokenizer

    first = file.files[0]
    directory = scratch / first.stem
    directory.mkdir()
    try:
        for kind in (AutoConfig, AutoTokenizer):
            kind.from_pretrained(first.parent, gguf_file=first.name, local_files_only=True).save_pretrained(directory)
    except Exception as error:
        # Its reader of GGUF meets unknown architectures and odd metadata with exceptions of every kind.
        reason = f"{type(error).__name__}: {str(error).strip()}".split("\n")[0]
        raise ModelError(f"it does not read {architecture_of(file)!r} from GGUF: {reason}") from error
    for part in file.files:
        (directory / part.name).symlink_to(part.absolute())
    return directory


def _check_same(file: GgufFile, directory: Path) -> None:
    """Raises ModelError where the config in `directory` means another function than the file's metadata."""
    config = read_config_json(directory)
    family, hyper = family_of(config), hyperparameters(config)
    architecture, expected = architecture_of(file), gguf.MODEL_ARCH_NAMES[family.arch]
    if architecture != expected:
        raise ModelError(f"it takes the architecture {architecture!r} for {expected!r}")
    writer = gguf.GGUFWriter(None, expected)
    family.parameters(writer, hyper)
    meant: Mapping[str, FieldValue] = fields_of(writer)
    for key, value in file.fields.items():
        if not key.startswith(f"{architecture}."):
            continue
        if key not in meant:
            raise ModelError(f"what it makes of the file does not say {key}")
        if not _agree(value.value, meant[key].value):
            raise ModelError(f"{key} is {value.value} in the file and {meant[key].value} in what it makes of it")


def _agree(one: Any, other: Any) -> bool:
    if isinstance(one, int | float) and isinstance(other, int | float):
        return math.isclose(one, other, rel_tol=_CLOSE)
    return bool(one == other)


def _check_others(file: GgufFile, directory: Path, others: Mapping[str, tuple[int, ...]]) -> None:
    """Raises ModelError for a tensor of which the model computes nothing, or something else."""
    config = read_config_json(directory)
    made = extra_tensors(family_of(config), hyperparameters(config))
    unknown = sorted({*others} - {*made})
    if unknown:
        raise ModelError(f"it does not know the tensor {unknown[0]}")
    for name, tensor in made.items():
        if name not in others:
            raise ModelError(f"the file does not have the tensor {name}, which its config means")
        found = decoded_rows(file.tensors[name], slice(0, 1)).flatten().float()
        if found.shape != tensor.flatten().shape or not torch.allclose(found, tensor.flatten(), rtol=_CLOSE):
            raise ModelError(f"it computes other factors than those in {name}")
