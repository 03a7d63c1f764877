"""Which runtime measures what the user named."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pennyweight.core.errors import ModelError
from pennyweight.evaluate.compare import directory_bytes
from pennyweight.evaluate.generate import Runtime, check_continues, is_packed
from pennyweight.evaluate.speed.base import Kind
from pennyweight.models.config_json import read_config_json
from pennyweight.models.gguf.file import read_gguf
from pennyweight.models.gguf_files import first_file, gguf_of, gguf_parts
from pennyweight.models.hub import resolve
from pennyweight.models.skeleton import read_config
from pennyweight.models.text import context_length


@dataclass(frozen=True)
class Entry:
    """A model directory or a GGUF file. name: what the user typed; context: tokens, None where the model does not say;
    size_bytes: of all its files."""

    name: str
    path: Path
    kind: Kind
    context: int | None
    size_bytes: int


def entry_of(model: str | Path, runtime: Runtime, *, trust_remote_code: bool) -> Entry:
    """As `pennyweight run` would run it on the processor; raises ModelError for what is no language model."""
    path = resolve(str(model), trust_remote_code=trust_remote_code)
    file = first_file(path) if path.is_dir() and any(path.glob("*.gguf")) else gguf_of(path)
    if file is not None:
        return _of_gguf(str(model), path, file)
    if not path.is_dir():
        raise ModelError(f"{path} is no model: give the directory of one, or a GGUF file")
    read_config_json(path)
    check_continues(path, trust_remote_code=trust_remote_code)
    context = context_length(read_config(path, trust_remote_code=trust_remote_code))
    kind: Kind = "packed" if runtime == "auto" and is_packed(path) else "transformers"
    return Entry(str(model), path, kind, context, directory_bytes(path))


def _of_gguf(name: str, path: Path, file: Path) -> Entry:
    fields = read_gguf(file).fields
    if "general.architecture" not in fields:
        raise ModelError(f"{file} holds no model: it names no general.architecture")
    length = fields.get(f"{fields['general.architecture'].value}.context_length")
    size = directory_bytes(path) if path.is_dir() else sum(part.stat().st_size for part in gguf_parts(file))
    return Entry(name, file, "llama.cpp", None if length is None else int(length.value), size)
