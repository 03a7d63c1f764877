"""The weights of a file as operations see them: integers, or decoded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from pennyweight.containers.onnx.calls import Written
from pennyweight.containers.onnx.dialect import Dialect
from pennyweight.containers.onnx.graph import Graph, Value
from pennyweight.schemes import PerGroup


class Weights:
    """Makes the tensors of sites, and what is computed from them, each once."""

    def __init__(self, graph: Graph, written: Mapping[str, Written], dialect: Dialect) -> None:
        self._graph, self._written, self._dialect = graph, written, dialect
        self._arrays: dict[str, dict[str, Value]] = {}
        self._made: dict[tuple[str, str], Value] = {}

    def arrays(self, site: str) -> dict[str, Value]:
        """The initializers `codes`, `scales` and perhaps `zeros` of `site`, named after it."""
        if site not in self._arrays:
            written = self._written[site]
            arrays = written.stored.arrays(written.weight)
            self._arrays[site] = {part: self._graph.array(f"{site}.{part}", array) for part, array in arrays.items()}
        return self._arrays[site]

    def names(self) -> dict[str, dict[str, str]]:
        """Site -> part -> name of the initializer."""
        return {site: {part: str(value.name) for part, value in parts.items()} for site, parts in self._arrays.items()}

    def _once(self, site: str, what: str, value: Value | None = None) -> Value | None:
        if value is not None:
            self._made[site, what] = value
        return self._made.get((site, what))

    def integers(self, site: str, *, is_transposed: bool) -> Value:
        """INT8 codes, cast when a session is made: products of integers take few bits in the file."""
        what = f"integers{'_transposed' * is_transposed}"
        if (made := self._once(site, what)) is not None:
            return made
        value = self._as_int8(site, "codes")
        if is_transposed:
            value = self._graph.make("Transpose", [value], name=f"{site}.transposed", attributes={"perm": [1, 0]})
        return self._once(site, what, value)

    def _as_int8(self, site: str, part: str) -> Value:
        value = self.arrays(site)[part]
        if self._written[site].stored.bits == 8:
            return value
        to = self._graph.type_number("INT8")
        return self._graph.make("Cast", [value], name=f"{site}.{part}.int8", attributes={"to": to})

    def integer_zeros(self, site: str, *, is_needed: bool) -> Value | None:
        """INT8 zero points, or None where all are 0 and not `is_needed`: QGemm takes none without them."""
        if (made := self._once(site, "zeros")) is not None:
            return made
        stored = self._written[site].stored
        if stored.has_zeros:
            return self._once(site, "zeros", self._as_int8(site, "zeros"))
        if not is_needed:
            return None
        shape = self.shape(f"{site}.zeros.shape", stored.scale_shape)
        zeros = self._graph.make("ConstantOfShape", [shape], name=f"{site}.zeros", attributes=self._graph.zero_int8())
        return self._once(site, "zeros", zeros)

    def dequantized(self, site: str, *, is_transposed: bool = False, has_zeros: bool = False) -> Value:
        """DequantizeLinear of INT8 codes: what a product of integers is fused from."""
        what = f"dequantized{'_transposed' * is_transposed}"
        if (made := self._once(site, what)) is not None:
            return made
        zeros = self.integer_zeros(site, is_needed=has_zeros)
        inputs = [self.integers(site, is_transposed=is_transposed), self.arrays(site)["scales"]]
        axis = 1 if is_transposed else self._written[site].stored.axis or 0
        made = self._dequantize(f"{site}.decoded", [*inputs, *([] if zeros is None else [zeros])], {"axis": axis})
        return self._once(site, what, made)

    def _dequantize(self, name: str, inputs: Sequence[Value], attributes: Mapping[str, int]) -> Value:
        return self._graph.make("DequantizeLinear", inputs, name=name, attributes=attributes)

    def decoded(self, site: str) -> Value:
        """float32, in the shape that torch has."""
        if (made := self._once(site, "decoded")) is not None:
            return made
        stored = self._written[site].stored
        value = self._by_arithmetic(site) if stored.is_spread else self._by_dequantizing(site)
        return self._once(site, "decoded", self._as_torch_has_it(site, value))

    def _by_arithmetic(self, site: str) -> Value:
        """(float(code) - zero) scale."""
        graph, parts, stored = self._graph, self.arrays(site), self._written[site].stored
        to = {"to": graph.type_number("FLOAT")}
        value = graph.make("Cast", [parts["codes"]], name=f"{site}.float", attributes=to)
        if isinstance(stored.scheme.granularity, PerGroup):
            value = self.reshaped(f"{site}.groups", value, (*stored.groups, -1))
        if stored.has_zeros:
            zeros = parts["zeros"]
            if not stored.has_float_zeros:
                zeros = graph.make("Cast", [zeros], name=f"{site}.zeros.float", attributes=to)
            value = graph.make("Sub", [value, zeros], name=f"{site}.centred")
        return graph.make("Mul", [value, parts["scales"]], name=f"{site}.decoded")

    def _by_dequantizing(self, site: str) -> Value:
        stored, parts = self._written[site].stored, self.arrays(site)
        inputs = [parts[part] for part in ("codes", "scales", "zeros") if part in parts]
        size = stored.scheme.granularity.size if isinstance(stored.scheme.granularity, PerGroup) else 0
        attributes = {"axis": 1, "block_size": size} if size else {"axis": stored.axis or 0}
        return self._dequantize(f"{site}.decoded", inputs, attributes)

    def decoded_for_product(self, site: str) -> Value:
        """float32 [in, out] by DequantizeLinear of transposed codes, which ONNX Runtime makes MatMulNBits of."""
        if (made := self._once(site, "product")) is not None:
            return made
        stored, parts = self._written[site].stored, self.arrays(site)
        size = stored.scheme.granularity.size if isinstance(stored.scheme.granularity, PerGroup) else 0
        turned = ("codes", "scales", "zeros") if size else ("codes",)
        inputs = [
            self._graph.make("Transpose", [value], name=f"{site}.{part}.transposed", attributes={"perm": [1, 0]})
            if part in turned
            else value
            for part, value in parts.items()
        ]
        attributes = {"axis": 0, "block_size": size} if size else {"axis": 1}
        return self._once(site, "product", self._dequantize(f"{site}.decoded", inputs, attributes))

    def _as_torch_has_it(self, site: str, value: Value) -> Value:
        """The matrix [out, in], or groups of it, in the shape of the parameter."""
        written = self._written[site]
        shape, stored = written.stored.site.shape, written.stored
        if stored.axis is not None:
            return value
        if stored.site.kind == "conv_transpose":
            groups = stored.site.groups
            parts = (groups, shape[1], shape[0] // groups, -1)
            value = self.reshaped(f"{site}.parts", value, parts)
            value = self._graph.make("Transpose", [value], name=f"{site}.turned", attributes={"perm": [0, 2, 1, 3]})
        return self.reshaped(f"{site}.shaped", value, shape)

    def reshaped(self, name: str, value: Value, shape: Sequence[int]) -> Value:
        return self._graph.make("Reshape", [value, self.shape(f"{name}.shape", shape)], name=name)

    def shape(self, name: str, shape: Sequence[int]) -> Value:
        return self._graph.tensor(name, torch.tensor(list(shape), dtype=torch.int64), "INT64")

    def blocks(self, site: str, *, is_rows: bool) -> dict[str, Value]:
        """`codes` [out, blocks, bytes], or [out, bytes] with `is_rows`, `scales` [out, blocks] and perhaps `zeros`."""
        stored, parts = self._written[site].stored, dict(self.arrays(site))
        outputs, blocks = stored.site.matrix_shape[0], stored.blocks
        if is_rows == stored.is_filled:
            what = "rows" if is_rows else "blocks"
            shape = (outputs, -1) if is_rows else (outputs, blocks, -1)
            made = self._once(site, what)
            parts["codes"] = made or self._once(site, what, self.reshaped(f"{site}.{what}", parts["codes"], shape))
        if not stored.is_full and stored.groups != (outputs, blocks):
            parts["scales"] = self._once(site, "scales") or self._once(site, "scales", self._scales_of_blocks(site))
        return parts

    def _scales_of_blocks(self, site: str) -> Value:
        """[rows, groups] -> [out, blocks]: blocks of a group have its scale."""
        stored, scales = self._written[site].stored, self.arrays(site)["scales"]
        outputs, blocks, groups = stored.site.matrix_shape[0], stored.blocks, stored.groups[1]
        value = self.reshaped(f"{site}.scales.groups", scales, (stored.groups[0], groups, 1))
        shape = self.shape(f"{site}.scales.shape", (outputs, groups, blocks // groups))
        value = self._graph.make("Expand", [value, shape], name=f"{site}.scales.each")
        return self.reshaped(f"{site}.scales.blocks", value, (outputs, blocks))
