"""llama.cpp's kernels: its own libraries by their C interface, one graph of products a rotation."""

from __future__ import annotations

import ctypes
import importlib.metadata
import importlib.util
from collections.abc import Iterator, Sequence
from ctypes import POINTER, c_bool, c_char_p, c_float, c_int, c_int64, c_size_t, c_uint32, c_void_p
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.peers.kernels.contest import THREADS, Contestant, Facts, Size

# Name -> number in ggml.h, bits, weights that share the finest scale, whether llama.cpp has a repacked layout on x86.
TYPES = {
    "q8_0": (8, 8, 32, False),
    "q6_K": (14, 6, 16, False),
    "q5_K": (13, 5, 32, False),
    "q4_0": (2, 4, 32, True),
    "q4_K": (12, 4, 32, True),
    "iq4_nl": (20, 4, 32, True),
    "mxfp4": (39, 4, 32, True),
    "iq4_xs": (23, 4, 32, False),
    "q3_K": (11, 3, 16, False),
    "iq3_s": (21, 3, 32, False),
    "q2_K": (10, 2, 16, True),
    "iq2_xs": (17, 2, 16, False),
}
_F32 = 0
# It tells of each tensor that it repacks.
_SILENT = ctypes.CFUNCTYPE(None, c_int, c_char_p, c_void_p)(lambda level, said, user: None)
# What a tensor and its place in a graph take in a context, and what a context takes without any.
_TENSOR_BYTES, _CONTEXT_BYTES = 1 << 10, 1 << 16
_MOST_THREADS = 512


class _InitParams(ctypes.Structure):
    _fields_ = [("mem_size", c_size_t), ("mem_buffer", c_void_p), ("no_alloc", c_bool)]


class _ThreadpoolParams(ctypes.Structure):
    _fields_ = [
        ("cpumask", c_bool * _MOST_THREADS), ("n_threads", c_int), ("prio", c_int), ("poll", c_uint32),
        ("strict_cpu", c_bool), ("paused", c_bool),
    ]  # fmt: skip


class _TypeTraits(ctypes.Structure):
    _fields_ = [
        ("type_name", c_char_p), ("blck_size", c_int64), ("blck_size_interleave", c_int64), ("type_size", c_size_t),
        ("is_quantized", c_bool), ("to_float", ctypes.CFUNCTYPE(None, c_void_p, c_void_p, c_int64)),
    ]  # fmt: skip


# What the functions that are called return and take.
_BASE: dict[str, tuple[Any, list[Any]]] = {
    "ggml_log_set": (None, [c_void_p, c_void_p]),
    "ggml_init": (c_void_p, [_InitParams]),
    "ggml_free": (None, [c_void_p]),
    "ggml_new_tensor_2d": (c_void_p, [c_void_p, c_int, c_int64, c_int64]),
    "ggml_mul_mat": (c_void_p, [c_void_p, c_void_p, c_void_p]),
    "ggml_new_graph_custom": (c_void_p, [c_void_p, c_size_t, c_bool]),
    "ggml_build_forward_expand": (None, [c_void_p, c_void_p]),
    "ggml_get_data": (c_void_p, [c_void_p]),
    "ggml_row_size": (c_size_t, [c_int, c_int64]),
    "ggml_quantize_chunk": (c_size_t, [c_int, c_void_p, c_void_p, c_int64, c_int64, c_int64, c_void_p]),
    "ggml_get_type_traits": (POINTER(_TypeTraits), [c_int]),
    "ggml_threadpool_params_default": (_ThreadpoolParams, [c_int]),
    "ggml_backend_alloc_ctx_tensors_from_buft": (c_void_p, [c_void_p, c_void_p]),
    "ggml_backend_buffer_free": (None, [c_void_p]),
    "ggml_backend_buft_name": (c_char_p, [c_void_p]),
    "ggml_backend_tensor_set": (None, [c_void_p, c_void_p, c_size_t, c_size_t]),
    "ggml_backend_graph_compute": (c_int, [c_void_p, c_void_p]),
    "ggml_backend_supports_op": (c_bool, [c_void_p, c_void_p]),
    "ggml_backend_get_default_buffer_type": (c_void_p, [c_void_p]),
    "ggml_backend_get_device": (c_void_p, [c_void_p]),
    "ggml_backend_reg_get_proc_address": (c_void_p, [c_void_p, c_char_p]),
}
_CPU: dict[str, tuple[Any, list[Any]]] = {
    "ggml_backend_cpu_init": (c_void_p, []),
    "ggml_backend_cpu_reg": (c_void_p, []),
    "ggml_backend_cpu_set_n_threads": (None, [c_void_p, c_int]),
    "ggml_backend_cpu_set_threadpool": (None, [c_void_p, c_void_p]),
    "ggml_threadpool_new": (c_void_p, [POINTER(_ThreadpoolParams)]),
}


class _Library:
    """The functions above, a backend on THREADS threads, and its buffer types by name."""

    def __init__(self) -> None:
        found = importlib.util.find_spec("llama_cpp")
        if found is None or not found.submodule_search_locations:
            raise ImportError("llama-cpp-python is not installed here")
        folder = Path(found.submodule_search_locations[0]) / "lib"
        self._functions: dict[str, Any] = {}
        for file, functions in (("libggml-base.so", _BASE), ("libggml-cpu.so", _CPU)):
            library = ctypes.CDLL(str(folder / file), mode=ctypes.RTLD_GLOBAL)
            for name, (result, takes) in functions.items():
                function = getattr(library, name)
                function.restype, function.argtypes = result, takes
                self._functions[name] = function
        self.call("ggml_log_set", ctypes.cast(_SILENT, c_void_p), None)
        self.backend = self.call("ggml_backend_cpu_init")
        parameters = self.call("ggml_threadpool_params_default", THREADS)
        self.call("ggml_backend_cpu_set_n_threads", self.backend, THREADS)
        pool = self.call("ggml_threadpool_new", ctypes.byref(parameters))
        self.call("ggml_backend_cpu_set_threadpool", self.backend, pool)
        self.plain = self.call("ggml_backend_get_default_buffer_type", self.backend)

    def call(self, name: str, *words: Any) -> Any:
        return self._functions[name](*words)

    def repacking(self) -> Any:
        """The buffer type whose weights are repacked as they are set."""
        registry = self.call("ggml_backend_cpu_reg")
        address = self.call("ggml_backend_reg_get_proc_address", registry, b"ggml_backend_dev_get_extra_bufts")
        listed = ctypes.CFUNCTYPE(POINTER(c_void_p), c_void_p)(address)(
            self.call("ggml_backend_get_device", self.backend)
        )
        types = []
        while listed[len(types)]:
            types.append(listed[len(types)])
        return {self.call("ggml_backend_buft_name", kind): kind for kind in types}[b"CPU_REPACK"]

    def context(self, tensors: int) -> Any:
        """For so many tensors without their data, and a graph of them."""
        return self.call("ggml_init", _InitParams(_CONTEXT_BYTES + tensors * _TENSOR_BYTES, None, True))


@cache
def _library() -> _Library:
    return _Library()


class Ggml:
    """Weights of a type of ggml, in its plain layout or repacked; activations are rounded to 8 bits by groups."""

    memory: Sequence[Tensor] = ()

    def __init__(self, size: Size, kind: str, *, is_repacked: bool) -> None:
        self._size, self._ggml = size, _library()
        self._number, bits, group, _ = TYPES[kind]
        self._blocks = _quantized(size, self._number)
        call = self._ggml.call
        self._weights_context = self._ggml.context(size.count)
        self._weights = [
            call("ggml_new_tensor_2d", self._weights_context, self._number, size.cols, size.rows)
            for _ in range(size.count)
        ]
        buffer = self._ggml.repacking() if is_repacked else self._ggml.plain
        self._buffer = call("ggml_backend_alloc_ctx_tensors_from_buft", self._weights_context, buffer)
        whole = size.of_rows(self._blocks)
        for weight in self._weights:
            call("ggml_backend_tensor_set", weight, whole.data_ptr(), 0, whole.nbytes)
        self._graph_context: Any = None
        name = f"ggml {kind}{' repacked' if is_repacked else ''}"
        self.facts = Facts(name, "llama.cpp", bits, group, "int8", whole.nbytes)

    def take(self, x: Tensor) -> None:
        call = self._ggml.call
        self._free_graph()
        nodes = 2 * self._size.count + 1
        self._graph_context = self._ggml.context(nodes)
        self._tokens = x.shape[0]
        taken = call("ggml_new_tensor_2d", self._graph_context, _F32, self._size.cols, self._tokens)
        self._graph = call("ggml_new_graph_custom", self._graph_context, nodes, False)
        self._outs = [call("ggml_mul_mat", self._graph_context, weight, taken) for weight in self._weights]
        for out in self._outs:
            call("ggml_build_forward_expand", self._graph, out)
        self._graph_buffer = call("ggml_backend_alloc_ctx_tensors_from_buft", self._graph_context, self._ggml.plain)
        if not call("ggml_backend_supports_op", self._ggml.backend, self._outs[0]):
            raise RuntimeError(f"{self.facts.name}: ggml does not multiply weights of this size")
        x = x.contiguous()
        call("ggml_backend_tensor_set", taken, x.data_ptr(), 0, x.nbytes)

    def run(self) -> None:
        if self._ggml.call("ggml_backend_graph_compute", self._ggml.backend, self._graph):
            raise RuntimeError(f"{self.facts.name}: ggml_backend_graph_compute failed")

    def outcome(self, index: int) -> Tensor:
        out = torch.empty(self._tokens, self._size.rows)
        ctypes.memmove(out.data_ptr(), self._ggml.call("ggml_get_data", self._outs[index]), out.nbytes)
        return out

    def decoded(self) -> Tensor:
        out = torch.empty(self._blocks.shape[0], self._size.cols)
        traits = self._ggml.call("ggml_get_type_traits", self._number).contents
        traits.to_float(self._blocks.data_ptr(), out.data_ptr(), out.numel())
        return self._size.of_rows(out)

    def _free_graph(self) -> None:
        if self._graph_context is not None:
            self._ggml.call("ggml_backend_buffer_free", self._graph_buffer)
            self._ggml.call("ggml_free", self._graph_context)
            self._graph_context = None

    def __del__(self) -> None:
        self._free_graph()
        self._ggml.call("ggml_backend_buffer_free", self._buffer)
        self._ggml.call("ggml_free", self._weights_context)


def _quantized(size: Size, number: int) -> Tensor:
    """uint8 [distinct rows, bytes of a row]."""
    ggml = _library()
    weight = size.normal()
    out = torch.empty(weight.shape[0], ggml.call("ggml_row_size", number, size.cols), dtype=torch.uint8)
    # Some types need an importance for every column.
    even = (c_float * size.cols)(*[1.0] * size.cols)
    ggml.call("ggml_quantize_chunk", number, weight.data_ptr(), out.data_ptr(), 0, *weight.shape, even)
    return out


def contestants(size: Size, bits: int) -> Iterator[Contestant]:
    for kind, (_, width, _, has_repacked) in TYPES.items():
        if width == bits:
            yield Ggml(size, kind, is_repacked=False)
            if has_repacked:
                yield Ggml(size, kind, is_repacked=True)


def versions() -> dict[str, str]:
    return {"llama-cpp-python": importlib.metadata.version("llama-cpp-python")}
