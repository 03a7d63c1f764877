"""The directory of a quantized network: it appears when all of it is there and verified."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pennyweight.core.errors import UsageError
from pennyweight.core.files import sync_files, to_json, write_text
from pennyweight.core.hashing import sha256

if TYPE_CHECKING:
    from torch import Tensor

MODEL, CHECK, RECORD, RUN, CARD = "model.onnx", "check.safetensors", "pennyweight.json", "run.json", "README.md"
_NOT_HASHED = {RECORD, RUN, CARD}
_INPUT, _OUTPUT = "input.", "output."


def is_network_artefact(path: Path) -> bool:
    """Whether `path` is a directory that a network was written to."""
    return (path / MODEL).is_file()


@contextmanager
def appearing(target: Path) -> Iterator[Path]:
    """A new directory that becomes `target` when the block ends, and is gone if it raises."""
    work = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        yield work
        work.chmod(0o777 & ~_umask())
        sync_files(work)
        _rename(work, target)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _rename(work: Path, target: Path) -> None:
    try:
        os.rename(work, target)
    except OSError as error:
        if not target.exists():
            raise
        raise UsageError(f"{target} came to exist meanwhile: choose another directory, or remove it") from error


def hashes_of(directory: Path) -> dict[str, str]:
    """SHA-256 of the files that must not change, by name."""
    files = sorted(file for file in directory.iterdir() if file.name not in _NOT_HASHED)
    return {file.name: sha256(file) for file in files}


def write_check(path: Path, inputs: dict[str, Tensor], outputs: list[Tensor], allowed: list[float]) -> None:
    """Inputs, what the network gives for them with its decoded weights and rounded edges, and how far off a runtime may
    be: with them an artefact is checked without the network."""
    import json

    from safetensors.torch import save_file

    tensors = {_INPUT + name: tensor for name, tensor in inputs.items()}
    tensors |= {f"{_OUTPUT}{place}": tensor for place, tensor in enumerate(outputs)}
    plain = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    save_file(plain, path, metadata={"allowed": json.dumps(allowed)})
    # safetensors keeps what it writes from others.
    path.chmod(0o666 & ~_umask())


def read_check(path: Path) -> tuple[dict[str, Tensor], list[Tensor], list[float]]:
    """What write_check wrote."""
    import json

    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        allowed = json.loads(file.metadata()["allowed"])
    inputs = {name.removeprefix(_INPUT): tensor for name, tensor in tensors.items() if name.startswith(_INPUT)}
    outputs = [tensors[f"{_OUTPUT}{place}"] for place in range(len(tensors) - len(inputs))]
    return inputs, outputs, [float(one) for one in allowed]


def write_texts(directory: Path, *, record: Mapping[str, Any], run: Mapping[str, Any], card: str) -> None:
    for name, text in ((RECORD, to_json(record)), (RUN, to_json(run)), (CARD, card)):
        write_text(directory / name, text)
