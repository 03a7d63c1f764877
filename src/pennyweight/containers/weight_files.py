"""safetensors files whose layout is fixed before any weight is solved, filled in any order by any thread.

A file is: 8 bytes little-endian length of the header, the header (JSON, padded with spaces to a multiple of 8),
the tensors one after the other. Offsets in the header count from the end of the header. One file is called
model.safetensors; several are numbered and listed in model.safetensors.index.json.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Any

import torch
from torch import Tensor

from pennyweight.core.errors import ContainerError, ShapeError
from pennyweight.core.files import leave_cache
from pennyweight.core.hashing import GrowingHash
from pennyweight.models.base import TensorInfo

INDEX_NAME = "model.safetensors.index.json"
_DTYPE_NAMES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2",
}  # fmt: skip


@dataclass(frozen=True)
class Place:
    """Where a tensor lies: in which file, and at which byte of it."""

    file: str
    offset: int
    info: TensorInfo


@dataclass(frozen=True)
class WeightFiles:
    """The layout: `headers` file name -> its first bytes, `sizes` file name -> bytes, `places` tensor name -> place;
    `index` the bytes of model.safetensors.index.json, where there is one."""

    headers: Mapping[str, bytes]
    sizes: Mapping[str, int]
    places: Mapping[str, Place]
    index: bytes | None = None

    @classmethod
    def plan(cls, entries: Mapping[str, TensorInfo], *, max_file_bytes: int = 5 * 10**9) -> WeightFiles:
        """The layout of `entries` in their order, in files of at most `max_file_bytes` of tensors (one at least)."""
        shards = _shards(entries, max_file_bytes)
        headers, sizes, places = {}, {}, {}
        for number, shard in enumerate(shards, start=1):
            several = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            file = several if len(shards) > 1 else "model.safetensors"
            headers[file], offsets = _header(shard)
            for name, offset in offsets.items():
                places[name] = Place(file, len(headers[file]) + offset, shard[name])
            sizes[file] = len(headers[file]) + sum(info.size_bytes for info in shard.values())
        return cls(headers, sizes, places, _index(places) if len(sizes) > 1 else None)

    @property
    def size_bytes(self) -> int:
        """Bytes of all files together, the index included."""
        return sum(self.sizes.values()) + len(self.index or b"")

    def create(self, directory: Path) -> OpenWeightFiles:
        """Files of full size with their headers and nothing else (sparse where the file system can)."""
        for file in self.headers:
            with (directory / file).open("xb") as stream:
                stream.truncate(self.sizes[file])
        if self.index is not None:
            (directory / INDEX_NAME).write_bytes(self.index)
        opened = self._opened(directory)
        opened.write_headers()
        return opened

    def reopen(self, directory: Path) -> OpenWeightFiles:
        """Files that `create` made earlier; raises ContainerError if they are not the ones planned here."""
        for file, header in self.headers.items():
            path = directory / file
            if not path.is_file():
                raise ContainerError(f"{path}: missing; the unfinished output cannot be continued: start it afresh")
            with path.open("rb") as stream:
                if stream.read(len(header)) != header or path.stat().st_size != self.sizes[file]:
                    raise ContainerError(
                        f"{path}: holds other tensors than this run would write; "
                        "the unfinished output cannot be continued: start it afresh"
                    )
        if self.index is not None:
            (directory / INDEX_NAME).write_bytes(self.index)
        return self._opened(directory)

    def _opened(self, directory: Path) -> OpenWeightFiles:
        return OpenWeightFiles(self, {file: _OpenFile(directory / file) for file in self.sizes})


class _OpenFile:
    """One file, written in pieces in any order, and hashed behind them."""

    def __init__(self, path: Path) -> None:
        self.descriptor = os.open(path, os.O_RDWR)
        self._hash = GrowingHash(self.descriptor, path)
        # The kernel lets one thread at a time write to a file, and those that wait for it burn a core.
        self._one_writer = Lock()

    def write(self, view: memoryview, position: int) -> None:
        end = position + len(view)
        self._hash.written(position, end)
        with self._one_writer:
            # A single write may stop short, always so above 2 GiB.
            while view:
                view = view[os.pwrite(self.descriptor, view, end - len(view)) :]
        # The disk begins with it now, and little is left to wait for in `flush`.
        leave_cache(self.descriptor, position, end)

    def flush(self) -> None:
        os.fsync(self.descriptor)
        self._hash.advance()

    def sha256(self) -> str:
        return self._hash.hexdigest()

    def close(self) -> None:
        self._hash.close()
        os.close(self.descriptor)


class OpenWeightFiles:
    """The files of a layout, open for writing; every method may be called from several threads."""

    def __init__(self, layout: WeightFiles, files: Mapping[str, _OpenFile]) -> None:
        self.layout = layout
        self._files = dict(files)

    def write_headers(self) -> None:
        """What comes before the tensors."""
        for file, header in self.layout.headers.items():
            self._files[file].write(memoryview(header), 0)

    def write(self, name: str, tensor: Tensor) -> None:
        """The whole tensor `name`; raises ShapeError if its type or shape is not the planned one."""
        info = self._place(name).info
        if TensorInfo(tensor.dtype, tuple(tensor.shape)) != info:
            raise ShapeError(
                f"{name}: {tensor.dtype} {tuple(tensor.shape)} given, {info.dtype} {info.shape} planned: "
                "plan the files again with what is to be written"
            )
        self.write_chunk(name, 0, tensor_bytes(tensor))

    def write_chunk(self, name: str, byte_offset: int, buffer: bytes | memoryview) -> None:
        """`buffer` at `byte_offset` of the tensor `name`; raises ShapeError if it would run past its end."""
        place = self._place(name)
        view = memoryview(buffer).cast("B")
        if byte_offset < 0 or byte_offset + len(view) > place.info.size_bytes:
            raise ShapeError(
                f"{name}: {len(view)} bytes at {byte_offset} given, but the tensor has {place.info.size_bytes} bytes"
            )
        self._files[place.file].write(view, place.offset + byte_offset)

    def read(self, name: str, rows: slice | None = None) -> Tensor:
        """The tensor `name` (`rows` of its first axis, without a step) as it is now in the file, in fresh memory."""
        place = self._place(name)
        shape, position = place.info.shape, place.offset
        if rows is not None:
            first, last, _ = rows.indices(shape[0])
            position += first * (place.info.size_bytes // max(1, shape[0]))
            shape = (max(0, last - first), *shape[1:])
        tensor = torch.empty(shape, dtype=place.info.dtype)
        view = tensor_bytes(tensor)
        while view:
            count = os.preadv(self._files[place.file].descriptor, [view], position)
            if count == 0:
                raise ContainerError(f"{name}: {place.file} ends before the tensor does: write it again")
            view, position = view[count:], position + count
        return tensor

    def flush(self) -> None:
        """Returns when everything written is on the disk; what was is hashed in the background from then on."""
        for file in self._files.values():
            file.flush()

    def sha256(self) -> dict[str, str]:
        """Hex SHA-256 of each file as it is now, by name; nothing may be written meanwhile."""
        self.flush()
        return {name: file.sha256() for name, file in self._files.items()}

    def close(self) -> None:
        """Closes the files; calling it twice does no harm."""
        while self._files:
            self._files.popitem()[1].close()

    def __enter__(self) -> OpenWeightFiles:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _place(self, name: str) -> Place:
        if name not in self.layout.places:
            raise ContainerError(f"{name}: not among the tensors that were planned: plan the files again with it")
        return self.layout.places[name]


def tensor_bytes(tensor: Tensor) -> memoryview:
    """The bytes of `tensor` in row-major order; a view of its memory where it is contiguous and on the CPU."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data if flat.numel() else memoryview(b"")


def _index(places: Mapping[str, Place]) -> bytes:
    total = sum(place.info.size_bytes for place in places.values())
    weight_map = {name: place.file for name, place in places.items()}
    return (json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=2) + "\n").encode()


def _shards(entries: Mapping[str, TensorInfo], limit: int) -> list[dict[str, TensorInfo]]:
    shards: list[dict[str, TensorInfo]] = [{}]
    filled = 0
    for name, info in entries.items():
        if shards[-1] and filled + info.size_bytes > limit:
            shards.append({})
            filled = 0
        shards[-1][name] = info
        filled += info.size_bytes
    return shards


def _header(shard: Mapping[str, TensorInfo]) -> tuple[bytes, dict[str, int]]:
    """The first bytes of a file, and the offset of each tensor from their end."""
    described: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offsets: dict[str, int] = {}
    end = 0
    for name, info in shard.items():
        if info.dtype not in _DTYPE_NAMES:
            raise ContainerError(f"{name}: safetensors files cannot hold {info.dtype}: use one of {list(_DTYPE_NAMES)}")
        offsets[name], end = end, end + info.size_bytes
        described[name] = {
            "dtype": _DTYPE_NAMES[info.dtype],
            "shape": list(info.shape),
            "data_offsets": [offsets[name], end],
        }
    text = json.dumps(described, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, offsets
