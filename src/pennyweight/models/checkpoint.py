"""A model's weights on disk: a directory of safetensors, one file or sharded.

Files are read, never mapped, so that what is not in use is not in memory. Each read opens its file and closes it:
nothing has to be closed by the caller, and any number of threads may read at once.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from pennyweight.core.errors import CheckpointError, ModelError, ShapeError
from pennyweight.models.base import StoredCheckpoint, TensorInfo
from pennyweight.models.safetensors_header import Entry, read_header

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
# One read of a large tensor is cut here: Linux moves at most 2 GiB at a time.
_READ_BYTES = 1 << 30


@dataclass(frozen=True)
class SafetensorsCheckpoint:
    """The tensors of a directory of safetensors files; see `Checkpoint` for the meaning of each member."""

    path: Path
    tensors: Mapping[str, TensorInfo]
    weight_files: list[Path]
    places: Mapping[str, tuple[Path, Entry]]
    decoded_from: str | None = None
    config_changes: Mapping[str, Any] = field(default_factory=dict)

    @property
    def stored_bytes(self) -> int:
        return sum(info.size_bytes for info in self.tensors.values())

    def read(self, name: str, part: slice | None = None) -> Tensor:
        """The tensor `name` (rows `part` of its first axis) in fresh memory, in its stored type.

        Raises CheckpointError for a name that is not there or a file that has become shorter, and ShapeError for a
        part of a scalar or one with steps.
        """
        if name not in self.places:
            raise CheckpointError(f"{self.path}: there is no tensor {name!r}{_did_you_mean(name, self.places)}")
        file, entry = self.places[name]
        if part is None:
            return _read(file, name, entry, first=entry.begin, shape=entry.shape)
        first, last = row_range(name, entry.shape, part)
        row_bytes = (entry.end - entry.begin) // entry.shape[0] if entry.shape[0] else 0
        shape = (last - first, *entry.shape[1:])
        return _read(file, name, entry, first=entry.begin + first * row_bytes, shape=shape)


def row_range(name: str, shape: Sequence[int], part: slice) -> tuple[int, int]:
    """First row and the row after the last of `part` of a tensor of `shape`; an empty range where they cross."""
    if not shape:
        raise ShapeError(f"{name}: a scalar has no rows, read it whole")
    first, last, step = part.indices(shape[0])
    if step != 1:
        raise ShapeError(f"{name}: cannot read every {step}th row, only ranges without a step")
    return first, max(first, last)


def open_checkpoint(path: Path) -> StoredCheckpoint:
    """The weights in the directory `path`: `model.safetensors`, shards under `model.safetensors.index.json`, or a GGUF
    file.

    All headers are read and checked; no weight is. Raises ModelError where there are no weights that can be read,
    and CheckpointError where they are damaged or incomplete.
    """
    if not path.exists():
        raise ModelError(f"{path}: there is no such directory. Give a directory with config.json and safetensors.")
    if not path.is_dir():
        hint = "Its weights are quantized by `pennyweight quantize FILE --for llama.cpp`. " * (path.suffix == ".gguf")
        raise ModelError(f"{path}: is a file. {hint}Give the directory that holds it together with config.json.")
    if (path / SINGLE_FILE).exists():
        entries = read_header(path / SINGLE_FILE)
        return _checkpoint(path, {name: (path / SINGLE_FILE, entry) for name, entry in entries.items()})
    if (path / INDEX_FILE).exists():
        return _checkpoint(path, _sharded(path))
    if (path / "config.json").exists() and any(path.glob("*.gguf")):
        from pennyweight.models.gguf.checkpoint import open_gguf

        return open_gguf(path)
    raise _no_weights(path)


def _checkpoint(path: Path, places: Mapping[str, tuple[Path, Entry]]) -> SafetensorsCheckpoint:
    return SafetensorsCheckpoint(
        path=path,
        tensors={name: TensorInfo(entry.dtype, entry.shape) for name, (_, entry) in places.items()},
        weight_files=sorted({file for file, _ in places.values()}),
        places=places,
    )


def _sharded(path: Path) -> dict[str, tuple[Path, Entry]]:
    weight_map = _weight_map(path / INDEX_FILE)
    shards = sorted(set(weight_map.values()))
    missing = [shard for shard in shards if not (path / shard).is_file()]
    if missing:
        raise CheckpointError(
            f"{path}: {INDEX_FILE} lists {len(shards)} files, {len(missing)} of them missing: {_some(missing)}. "
            "Download the missing files into the directory."
        )
    headers = {shard: read_header(path / shard) for shard in shards}
    for name, shard in weight_map.items():
        if name not in headers[shard]:
            raise CheckpointError(
                f"{path / shard}: does not hold the tensor {name!r} that {INDEX_FILE} places there. "
                "Index and files are of different versions: download both again."
            )
    return {name: (path / shard, headers[shard][name]) for name, shard in weight_map.items()}


def _weight_map(file: Path) -> dict[str, str]:
    try:
        index: Any = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{file}: cannot be read as JSON ({error}). Download it again.") from error
    found: Any = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(found, dict) or not found:
        raise CheckpointError(f"{file}: has no 'weight_map' from tensor names to files. Download it again.")
    for name, shard in found.items():
        # A name that leads out of the directory would read files that are none of the model's.
        if not isinstance(shard, str) or not shard.endswith(".safetensors") or set(shard) & set("/\\\0"):
            raise CheckpointError(
                f"{file}: places the tensor {name!r} in {shard!r}, expected a .safetensors file of this directory."
            )
    return found


def _no_weights(path: Path) -> ModelError:
    files = sorted(file.name for file in path.iterdir() if file.is_file())
    safetensors = [file for file in files if file.endswith(".safetensors")]
    if "adapter_model.safetensors" in safetensors:
        return ModelError(f"{path}: holds an adapter, not a model. Merge it into its base model and save that.")
    if len(safetensors) > 1 or any("-of-" in file for file in safetensors):
        return CheckpointError(
            f"{path}: holds {len(safetensors)} safetensors files ({_some(safetensors)}) but no {INDEX_FILE}, "
            "which says what is where. Download the index too."
        )
    if safetensors:
        return CheckpointError(f"{path}: holds {safetensors[0]}, expected {SINGLE_FILE}. Rename it if it is the model.")
    if any(file.endswith(".gguf") for file in files):
        return ModelError(
            f"{path}: holds a GGUF file without a config.json, which says how transformers runs it. "
            "Give one, or quantize the file itself: pennyweight quantize FILE --for llama.cpp"
        )
    other = [file for file in files if file.endswith((".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack"))]
    if other:
        return ModelError(
            f"{path}: holds {_some(other)} but no safetensors, the only kind that is read. Convert it: load the model "
            "in transformers and call model.save_pretrained(directory, safe_serialization=True)."
        )
    return ModelError(f"{path}: holds no weights. Expected {SINGLE_FILE}, or {INDEX_FILE} with its files.")


def _read(file: Path, name: str, entry: Entry, *, first: int, shape: tuple[int, ...]) -> Tensor:
    """Bytes of the file from position `first` as a tensor of `shape`."""
    count = entry.dtype.itemsize
    for length in shape:
        count *= length
    raw = torch.empty(count, dtype=torch.uint8)
    # numpy shares torch's memory: the file goes straight into the tensor.
    buffer = memoryview(cast(Any, raw.numpy()))
    done = 0
    try:
        with open(file, "rb", buffering=0) as stream:
            stream.seek(first)
            while done < count:
                moved = stream.readinto(buffer[done : done + _READ_BYTES])
                if not moved:
                    break
                done += moved
    except OSError as error:
        raise CheckpointError(f"{file}: tensor {name!r} cannot be read: {error.strerror or error}") from error
    if done < count:
        raise CheckpointError(
            f"{file}: tensor {name!r} has {count} bytes from position {first} on, but the file ended after {done}: "
            "it has become shorter since it was opened. Leave it alone while it is in use, and start again."
        )
    return raw.view(entry.dtype).reshape(shape)


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _did_you_mean(name: str, known: Mapping[str, object]) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    return f"; the nearest name is {near[0]!r}" if near else ""
