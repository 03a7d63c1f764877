"""The README of a quantized network."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from pennyweight.evaluate.network.record import NetworkRecord

_CARD = """---
quantized_by: pennyweight
library_name: onnx
---

# {name}, quantized

{sites} as {schemes}{edges}; {kept} kept in float. {size:,} bytes{share}. Made by Pennyweight.

```python
import onnxruntime

session = onnxruntime.InferenceSession("model.onnx")
outputs = session.run(None, {{{inputs}}})
```

{table}
{verified}
What each weight lost, the range of every rounded value, what was kept in float and why, hashes and verification:
`pennyweight.json`. Times: `run.json`. `pennyweight verify` on this directory checks it again.
"""


def network_card(record: NetworkRecord) -> str:
    """What the artefact is, what it takes, and how far it is from the original."""
    counted = Counter(site.scheme for site in record.sites)
    names = ", ".join(f"`{name}`" for name in counted)
    sizes = record.sizes
    share = (
        f" ({100 * sizes['file_bytes'] / sizes['float_file_bytes']:.0f} % of the float file)"
        if sizes.get("float_file_bytes")
        else ""
    )
    return _CARD.format(
        name=record.network["name"],
        sites=f"{len(record.sites)} weights",
        schemes=names or "nothing",
        edges=f", {len(record.edges)} values rounded as {_edge_schemes(record)}" if record.edges else "",
        kept=len(record.kept),
        size=int(sizes.get("file_bytes", 0)),
        share=share,
        inputs=", ".join(f'"{name}": {name}' for name in record.network["inputs"]),
        table=_inputs(record.network["inputs"]),
        verified=_verified(record),
    )


def _edge_schemes(record: NetworkRecord) -> str:
    return ", ".join(f"`{name}`" for name in dict.fromkeys(edge.scheme for edge in record.edges))


def _inputs(inputs: Mapping[str, Any]) -> str:
    rows = [f"| {name} | {value['dtype']} | {_shape(value['shape'])} |" for name, value in inputs.items()]
    return "\n".join(["| input | type | shape |", "|---|---|---|", *rows, ""])


def _shape(sizes: list[int | None]) -> str:
    return " x ".join("any" if size is None else str(size) for size in sizes) or "a number"


def _verified(record: NetworkRecord) -> str:
    lines = []
    for one in record.verification:
        worst = max((output.relative_error / output.allowed for output in one.outputs), default=0.0)
        lines.append(
            f"Verified in {one.runtime}: outputs within {100 * worst:.0f} % of what rounding alone may change."
        )
    lines += [f"Slower than float: {warning}." for warning in record.warnings]
    return "\n".join([*lines, ""]) if lines else "Not verified in a runtime.\n"
