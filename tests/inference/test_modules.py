"""The modules over packed weights do what those do that they stand for, also in graphs."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pennyweight.core.errors import UsageError
from pennyweight.inference.experts import PackedStack
from pennyweight.inference.modules import PackedEmbedding, PackedLinear
from pennyweight.inference.plan import packed
from pennyweight.inference.shared_input import SharedInput, find_shared
from pennyweight.kernels import packed as kernels
from pennyweight.kernels.packed import PackedMatrix
from pennyweight.schemes import parse_scheme
from tests.containers.artefacts import quantize_nearest

# float32 sums of 64 products in another order.
TOLERANCE = 1e-5


def _matrix(rows: int = 40, cols: int = 64, scheme: str = "int4-g32") -> tuple[PackedMatrix, Tensor]:
    weight = quantize_nearest(torch.randn(rows, cols), parse_scheme(scheme).with_scale_dtype(torch.float32))
    return packed(weight), weight.dequantize()


def _linear(rows: int = 40, *, bias: bool = True, activations: Any = "exact") -> tuple[PackedLinear, nn.Linear]:
    matrix, weight = _matrix(rows)
    plain = nn.Linear(64, rows, bias=bias).requires_grad_(False)
    plain.weight.copy_(weight)
    return PackedLinear(matrix, bias=plain.bias, activations=activations), plain


def _near(found: Tensor, expected: Tensor) -> bool:
    return found.shape == expected.shape and found.dtype == expected.dtype and bool(
        (found - expected).abs().max() <= TOLERANCE * expected.abs().max()
    )  # fmt: skip


# ---- the modules


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(64,), (3, 64), (2, 5, 64)])
def test_a_packed_linear_is_the_linear_of_the_decoded_weight(shape: tuple[int, ...], bias: bool) -> None:
    linear, plain = _linear(bias=bias)
    x = torch.randn(shape)
    assert _near(linear(x), plain(x))
    assert torch.equal(linear.weight, plain.weight)


def test_a_packed_linear_keeps_its_weights_when_the_models_type_changes() -> None:
    linear, plain = _linear()
    before = linear.packed.storage.clone()
    narrow = linear.to(torch.bfloat16)
    assert torch.equal(narrow.packed.storage, before)
    assert narrow.bias is not None
    assert narrow.bias.dtype == torch.bfloat16
    x = torch.randn(3, 64).bfloat16()
    expected = plain(x.float()) - plain.bias + narrow.bias
    # Half a unit in the last of bfloat16's 8 bits.
    assert torch.allclose(narrow(x).float(), expected, rtol=2**-8, atol=1e-6)


@pytest.mark.parametrize("scheme", ["int3-g32", "mxfp4", "int8-channel"])
def test_a_packed_embedding_gives_the_decoded_rows(scheme: str) -> None:
    matrix, weight = _matrix(37, scheme=scheme)
    table = PackedEmbedding(matrix, dtype=torch.bfloat16, padding_idx=3)
    ids = torch.tensor([[0, 36, 3], [17, 17, 5]])
    assert torch.equal(table(ids), weight.bfloat16()[ids])
    assert table(ids[:0]).shape == (0, 3, 64)
    assert torch.equal(table(torch.tensor(36)), weight.bfloat16()[36])
    for bad in (-1, 37):
        with pytest.raises(IndexError, match="out of range: the table has 37 rows"):
            table(torch.tensor([bad]))


def test_experts_of_parts_are_the_rows_of_one_matrix() -> None:
    (gate, w1), (up, w2) = _matrix(24), _matrix(24, scheme="mxfp4")
    floats = torch.randn(48, 64)
    stack = PackedStack([[gate, up], [floats]], activations="exact")
    x, bias = torch.randn(5, 64), torch.randn(48)
    for expert, weight in ((torch.tensor(0), torch.cat([w1, w2])), (1, floats)):
        assert _near(nn.functional.linear(x, stack[expert]), nn.functional.linear(x, weight))  # type: ignore[arg-type]
        assert _near(nn.functional.linear(x, stack[expert], bias), nn.functional.linear(x, weight, bias))  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="known is torch.nn.functional.linear"):
        torch.matmul(x, stack[0])  # type: ignore[call-overload]


# ---- graphs


class _Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = PackedEmbedding(_matrix(37)[0], dtype=torch.float32)
        self.first, _ = _linear(40)
        self.second, _ = _linear(24, bias=False, activations="int8")
        SharedInput([self.first, self.second])

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids)
        return torch.cat([self.first(x).relu(), self.second(x)], dim=-1)


def test_a_compiled_graph_has_no_breaks_and_gives_the_same() -> None:
    model = _Two()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for length in (3, 5, 9):
        ids = torch.arange(length).view(1, -1)
        with torch.no_grad():
            assert torch.equal(compiled(ids), model(ids))


def test_an_exported_program_is_saved_and_gives_the_same() -> None:
    model, ids = _Two(), torch.arange(6).view(1, -1)
    with torch.no_grad():
        program = torch.export.export(model, (ids,))
        file = io.BytesIO()
        torch.export.save(program, file)
        file.seek(0)
        again = torch.export.load(file)
        assert torch.equal(again.module()(ids), model(ids))
    called = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert {"pennyweight.packed_product.default", "pennyweight.packed_rows.default"} <= called


def test_the_operators_are_what_torch_expects_of_operators() -> None:
    linear, _ = _linear()
    from pennyweight.inference.operator import described, packed_product, packed_rows

    text = described([linear.packed.matrix.layout])
    torch.library.opcheck(packed_product, (torch.randn(3, 64), [linear.packed.storage], [linear.bias], text, "int8"))
    torch.library.opcheck(packed_rows, (torch.tensor([1, 2]), linear.packed.storage, text, torch.bfloat16))


# ---- one input, several maps


@pytest.fixture
def products(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many weights each product had."""
    from pennyweight.inference import modules, shared_input

    counts: list[int] = []

    def counted(x: Tensor, matrices: Any, **kwargs: Any) -> list[Tensor]:
        counts.append(len(matrices))
        return kernels.multiply(x, matrices, **kwargs)

    monkeypatch.setattr(modules, "multiply", counted)
    monkeypatch.setattr(shared_input, "multiply", counted)
    return counts


def _group() -> list[tuple[PackedLinear, nn.Linear]]:
    pairs = [_linear(rows, bias=rows != 24) for rows in (40, 24, 8)]
    SharedInput([linear for linear, _ in pairs])
    return pairs


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1), (1,), (1, 1), (0, 0, 2, 2)])
def test_members_may_be_called_in_any_order_or_alone_or_twice(order: tuple[int, ...]) -> None:
    pairs, x = _group(), torch.randn(3, 64)
    for index in order:
        linear, plain = pairs[index]
        assert _near(linear(x), plain(x))


def test_one_product_serves_all_members(products: list[int]) -> None:
    pairs, x = _group(), torch.randn(3, 64)
    with torch.no_grad():
        for linear, _ in pairs:
            linear(x)
    assert products == [3]


def test_other_inputs_in_between_and_changed_ones_are_told_apart() -> None:
    pairs = _group()
    (a, plain_a), (b, plain_b), (c, plain_c) = pairs
    x, y = torch.randn(3, 64), torch.randn(3, 64)
    a(x)
    assert _near(b(y), plain_b(y))
    assert _near(b(x), plain_b(x))
    x.mul_(2)
    for linear, plain in ((a, plain_a), (c, plain_c), (b, plain_b)):
        assert _near(linear(x), plain(x))
    with torch.inference_mode():
        z = torch.randn(3, 64)
        a(z)
        z.mul_(2)
        assert _near(b(z), plain_b(z))
    assert _near(a(x), plain_a(x))


def test_nothing_outlives_the_input(monkeypatch: pytest.MonkeyPatch) -> None:
    from pennyweight.inference import shared_input

    made: list[weakref.ref[Tensor]] = []

    def noted(x: Tensor, matrices: Any, **kwargs: Any) -> list[Tensor]:
        outputs = kernels.multiply(x, matrices, **kwargs)
        made.extend(weakref.ref(out) for out in outputs)
        return outputs

    monkeypatch.setattr(shared_input, "multiply", noted)
    pairs = _group()
    x = torch.randn(3, 64)
    pairs[0][0](x)
    gc.collect()
    assert sum(ref() is not None for ref in made) == 2
    pairs[1][0](x)
    gc.collect()
    assert sum(ref() is not None for ref in made) == 1
    del x
    gc.collect()
    assert not [ref for ref in made if ref() is not None]


def test_copies_are_computed_alone() -> None:
    pairs, x = _group(), torch.randn(3, 64)
    linear, plain = pairs[0]
    for copied in (copy.deepcopy(linear), pickle.loads(pickle.dumps(linear))):
        assert copied._shared is None
        assert _near(copied(x), plain(x))
    assert linear._shared is not None


class _Config:
    num_hidden_layers = 2

    def get_text_config(self) -> _Config:
        return self


class _Block(nn.Module):
    def __init__(self, is_copied: bool) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(64, 64, device="meta") for _ in range(3))
        self.is_copied = is_copied

    def forward(self, x: Tensor) -> Tensor:
        given = x.clone() if self.is_copied else x
        return self.c(self.a(x) * self.b(given))  # type: ignore[no-any-return]


class _Model(nn.Module):
    def __init__(self, is_copied: bool) -> None:
        super().__init__()
        self.config = _Config()
        self.table = nn.Embedding(8, 64)
        self.layers = nn.ModuleList(_Block(is_copied) for _ in range(2))

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.table(input_ids)
        for layer in self.layers:
            x = layer(x)
        return x  # type: ignore[no-any-return]


def test_who_shares_an_input_is_seen_and_not_taken_from_names() -> None:
    names = [f"layers.{i}.{name}" for i in range(2) for name in "abc"]
    found = find_shared(_Model(False), names, [])
    assert found.groups == [["layers.0.a", "layers.0.b"], ["layers.1.a", "layers.1.b"]]
    assert find_shared(_Model(True), names, []).groups == []


def test_a_model_that_cannot_be_run_shares_nothing_and_says_why() -> None:
    model = _Model(False)
    model.forward = lambda input_ids: input_ids + None  # type: ignore[assignment, operator]
    found = find_shared(model, ["layers.0.a"], [])
    assert found.groups == []
    assert "unsupported operand" in found.why_none
