"""The codes of a file, as they were before it was written."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pennyweight.containers.onnx.calls import Written
from pennyweight.containers.onnx.stored import Array, Stored
from pennyweight.core.errors import ContainerError, require
from pennyweight.models.network.network import NetworkSite
from pennyweight.schemes import QuantizedWeight, parse_scheme

METADATA = "pennyweight"
_VERSION = 1
_STORED = ("bits", "block", "is_filled", "is_full", "is_spread")


def described(written: Mapping[str, Written], names: Mapping[str, Mapping[str, str]]) -> str:
    """JSON that says of each site where its tensors lie and how they are read."""
    sites = {
        name: {
            "scheme": site.stored.scheme.name,
            "kind": site.stored.site.kind,
            "shape": list(site.stored.site.shape),
            "groups": site.stored.site.groups,
            "tensors": dict(names[name]),
            **{part: getattr(site.stored, part) for part in _STORED},
        }
        for name, site in written.items()
    }
    return json.dumps({"version": _VERSION, "sites": sites})


def read_onnx(path: Path) -> dict[str, QuantizedWeight]:
    """Site name -> its codes, scales and zero points, of a file that write_onnx wrote; raises ContainerError for
    another one.

    A row of nothing but zeros may have another scale than before it was written.
    """
    ir = require("onnx_ir", extra="onnx")
    try:
        model = ir.load(path)
        description = json.loads(model.metadata_props[METADATA])
    except OSError:
        raise
    except Exception as error:
        raise ContainerError(f"{path}: not an ONNX file that Pennyweight wrote: it has no codes to read") from error
    if description.get("version") != _VERSION:
        raise ContainerError(f"{path}: written by another version of Pennyweight: read it with that, or write it again")
    initializers = model.graph.initializers
    return {name: _weight(path, name, site, initializers) for name, site in description["sites"].items()}


def _weight(path: Path, name: str, site: Mapping[str, Any], initializers: Mapping[str, Any]) -> QuantizedWeight:
    shape = tuple(site["shape"])
    network_site = NetworkSite(name, site["kind"], name, shape, site["groups"])
    stored = Stored(network_site, parse_scheme(site["scheme"]), **{part: site[part] for part in _STORED})
    arrays = {}
    for part, tensor in site["tensors"].items():
        if tensor not in initializers:
            raise ContainerError(f"{path}: {name}: the tensor {tensor} is missing: the file was changed")
        value = initializers[tensor].const_value
        arrays[part] = Array(value.dtype.name, tuple(value.shape), value.tobytes())
    return stored.weight(arrays)
