"""What `pennyweight inspect` shows of a quantized network."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pennyweight.cli.console import mebibytes, table

if TYPE_CHECKING:
    from pennyweight.evaluate.network.inventory import NetworkInventory


def print_network(found: NetworkInventory) -> None:
    size = mebibytes(found.size_bytes)
    print(f"{found.path}: {found.name} for {found.runtime}, {found.weights:,} quantized weights, {size}")
    print(f"verified: {found.verified}")
    for name, value in found.inputs.items():
        print(f"  input {name}: {value['dtype']} {_sizes(value['shape'])}")
    rows = [
        [site["name"], site["kind"], _sizes(site["shape"]), site["scheme"], site["form"] or "", _error(site)]
        for site in found.sites
    ]
    table(["site", "kind", "shape", "scheme", "in the file as", "error"], rows)
    if found.edges:
        table(["rounded value", "scheme", "from", "to", "chosen by"], [_edge(edge) for edge in found.edges])
    for name, reason in found.kept.items():
        print(f"  in float: {name}: {reason}")
    for note in found.notes:
        print(f"  {note}")


def _sizes(shape: list[int | None]) -> str:
    return " x ".join("any" if size is None else str(size) for size in shape) or "a number"


def _error(site: dict[str, Any]) -> str:
    error = site["output_error"] if site["output_error"] is not None else site["error"]
    return "" if error is None else f"{error:.3g}"


def _edge(edge: dict[str, Any]) -> list[str]:
    low, high = ("" if edge[end] is None else f"{edge[end]:.4g}" for end in ("low", "high"))
    return [edge["name"], edge["scheme"], low, high, edge["why"] or ""]
