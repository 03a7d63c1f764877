"""Where GGUF files are in what the user named."""

from __future__ import annotations

import re
from pathlib import Path

from pennyweight.core.errors import ModelError

_PART = re.compile(r"(.+)-(\d{5})-of-(\d{5})", re.DOTALL)
_SAFETENSORS = ("model.safetensors", "model.safetensors.index.json")


def gguf_of(path: Path) -> Path | None:
    """The GGUF file, of a split one the first part, that holds the weights of the model at `path`: itself, or the only
    one in a directory without safetensors. None where there is none; raises ModelError where there are several."""
    if not path.is_dir():
        return path if path.suffix == ".gguf" and path.is_file() else None
    if any((path / name).exists() for name in _SAFETENSORS) or not any(path.glob("*.gguf")):
        return None
    return first_file(path)


def first_file(path: Path) -> Path:
    """The GGUF file in the directory `path`, of a split one its first part; raises ModelError where it is not one."""
    files = sorted(path.glob("*.gguf"))
    parts = {file: _PART.fullmatch(file.stem) for file in files}
    first = [file for file, match in parts.items() if match is None or match[2] == "00001"]
    if len(first) == 1:
        return first[0]
    names = ", ".join(file.name for file in first or files) or "none"
    raise ModelError(f"{path}: one GGUF file is expected in it, {names} found: name the one that you mean")


def gguf_parts(first: Path) -> list[Path]:
    """All parts of the file that `first` begins, as many as there are."""
    match = _PART.fullmatch(first.stem)
    if match is None:
        return [first]
    return sorted(first.parent.glob(f"{_literal(match[1])}-?????-of-{match[3]}.gguf"))


def _literal(text: str) -> str:
    return re.sub(r"([*?\[])", r"[\1]", text)
