"""The native kernels against their twins in torch, on every instruction set of this machine."""

from __future__ import annotations

from dataclasses import astuple

import pytest
import torch
from torch import Tensor

from pennyweight.core.registry import provided
from pennyweight.formats import NumberFormat
from pennyweight.formats.integer import Int
from pennyweight.kernels.feedback import Grid, _round_block, round_block_
from pennyweight.kernels.native import VARIABLE, kernel_table, native, table_of
from pennyweight.kernels.packing import pack_int32
from pennyweight.schemes import fit_scales, parse_scheme
from pennyweight.solvers.nearest import round_to_nearest

library = native()
TABLES = [] if library is None else list(library.kernel_tables())
# Products and sums are rounded alike in both, but torch may fuse the multiply-add of a rank-1 update, which moves a
# target by one unit in its last place; the values stay the same except on exact ties.
SAME_VALUES = 0.999

INT4 = Int(4)
NESTED = [
    "uint4-g32-offset-uint6x4.f16", "uint5-g32-offset-f16", "uint2-g16-offset-uint4x8.f16", "int3-g16-int6x8.f16",
    "int6-g16-int8x4.bf16", "nf4-g32-int6x4.f16", "nf4-g40-offset-uint6x4.f32", "uint4-g32-offset=f16-uint6x4.f16",
    "uint3-g10-offset=uint6x16.f16-f16", "uint4-channel-offset-f32",
]  # fmt: skip

pytestmark = pytest.mark.skipif(not TABLES, reason="the native library is not built")


def problem(
    columns: int,
    rows: int,
    *,
    groups: int,
    stored: torch.dtype,
    zeros: bool = False,
    offsets: bool = False,
    element: NumberFormat = INT4,
) -> tuple[Tensor, Tensor, Grid, Tensor]:
    generator = torch.Generator().manual_seed(columns * 1000 + rows)
    w = torch.randn(columns, rows, generator=generator)
    lower = torch.randn(columns, columns, generator=generator).mul_(0.1).tril(-1) + torch.eye(columns)
    scales = (torch.rand(groups, rows, generator=generator) * 0.3 + 0.05).to(stored).float()
    scales[0] = -scales[0]
    zero = torch.randint(-8, 8, (groups, rows), generator=generator).float() if zeros else None
    index = torch.randint(0, groups, (columns,), generator=generator)
    offset = torch.randn(groups, rows, generator=generator) if offsets else None
    return w, lower, Grid(element, scales, zero, stored, offset), index


def run(w: Tensor, lower: Tensor, grid: Grid, index: Tensor, *, twin: bool) -> tuple[Tensor, Tensor, Tensor]:
    values, errors = torch.full_like(w, torch.nan), torch.full_like(w, torch.nan)
    call = _round_block if twin else round_block_
    targets = w.clone()
    call(targets, w, values, errors, lower=lower, grid=grid, groups=index)
    return values, errors, targets


@pytest.mark.parametrize("table", TABLES)
@pytest.mark.parametrize(
    ("element", "zeros", "offsets"),
    [("int4", False, False), ("int4", True, False), ("uint4", False, True), ("nf4", False, False), ("nf4", True, False),
     ("fp4_e2m1", False, True)],
)  # fmt: skip
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("columns", "rows"), [(1, 1), (3, 63), (32, 64), (17, 65), (128, 200)])
def test_rounding_a_block_equals_its_twin(
    monkeypatch: pytest.MonkeyPatch,
    table: str,
    element: str,
    zeros: bool,
    offsets: bool,
    stored: torch.dtype,
    columns: int,
    rows: int,
) -> None:
    monkeypatch.setenv(VARIABLE, table)
    number_format = provided("formats")[element]
    given = problem(columns, rows, groups=3, stored=stored, zeros=zeros, offsets=offsets, element=number_format)
    values, errors, targets = run(*given, twin=False)
    expected, expected_errors, expected_targets = run(*given, twin=True)
    agree = values == expected
    assert agree.float().mean() >= SAME_VALUES
    torch.testing.assert_close(errors[agree], expected_errors[agree], rtol=0, atol=2e-6)
    if agree.all():
        torch.testing.assert_close(targets, expected_targets, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("element", ["int3", "uint4", "nf4"])
def test_every_instruction_set_gives_the_same_bits(monkeypatch: pytest.MonkeyPatch, element: str) -> None:
    number_format, is_offset = provided("formats")[element], element == "uint4"
    given = problem(
        96, 130, groups=5, stored=torch.bfloat16, zeros=not is_offset, offsets=is_offset, element=number_format
    )
    results = []
    for table in TABLES:
        monkeypatch.setenv(VARIABLE, table)
        results.append(run(*given, twin=False))
    for found in results[1:]:
        assert all(torch.equal(one, other) for one, other in zip(found, results[0], strict=True))


@pytest.mark.parametrize("table", TABLES)
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(
    "name",
    [
        "int4-g128-bf16",
        "int2-g64-f16",
        "int3-g32-f32",
        "int4-g32-asym-f16",
        "int8-channel-f32",
        "uint4-g20-asym-f32",
        "nf4-g64-bf16",
        "ternary-g20-f32",
        "bal2-channel-f16",
        "fp4_e2m1-g32-e8m0",
        "fp4_e2m1-g16-fp8_e4m3.f32",
        "int6-g16-int8x8.f16",
        "nf4-tensor-f32",
        *NESTED,
    ],
)
def test_the_native_search_is_as_good_as_its_twin(
    monkeypatch: pytest.MonkeyPatch, table: str, weighted: bool, name: str
) -> None:
    scheme = parse_scheme(name)
    generator = torch.Generator().manual_seed(1)
    inputs = 640
    w = torch.randn(24, inputs, generator=generator) * torch.rand(24, 1, generator=generator)
    importance = torch.rand(inputs, generator=generator) ** 3 if weighted else None
    weights = torch.ones(inputs) if importance is None else importance

    def loss(choice: str) -> float:
        monkeypatch.setenv(VARIABLE, choice)
        found = fit_scales(w, scheme, importance=importance)
        error = round_to_nearest(w, scheme, found).dequantize() - w
        return float((error.double().square() * weights).sum())

    # They may choose differently between candidates that are equal up to the order of the sums.
    assert loss(table) == pytest.approx(loss("torch"), rel=2e-3)


@pytest.mark.parametrize("element", provided("formats").values(), ids=lambda element: str(element.name))
def test_tables_round_as_their_formats_do(element: NumberFormat) -> None:
    values, thresholds = table_of(element)
    x = torch.cat([thresholds[:-1], torch.nextafter(thresholds[:-1], torch.tensor(torch.inf)), values])
    x = torch.cat([x, torch.randn(1000) * element.largest])
    assert torch.equal(values[torch.bucketize(x, thresholds[:-1])], element.nearest(x) + 0.0)


@pytest.mark.parametrize("name", ["int3-g128-asym-f16", *NESTED])
def test_every_instruction_set_finds_the_same_scales(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    # Rows that no number of lanes divides, and what may go wrong: zeros, one value, values beyond the stored types.
    w = torch.randn(33, 640, generator=torch.Generator().manual_seed(2))
    w[0], w[1, :128], w[2, 5], w[3], w[4] = 0.0, 3.5, 1e30, w[3].abs() + 1, w[4] * 1e-20
    found = []
    for table in TABLES:
        monkeypatch.setenv(VARIABLE, table)
        found.append(astuple(fit_scales(w, parse_scheme(name))))
    for other in found[1:]:
        for one, two in zip(found[0], other, strict=True):
            assert one is two is None or torch.equal(one, two)


@pytest.mark.parametrize("table", TABLES)
@pytest.mark.parametrize("kept", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "name",
    ["int4-g128-bf16", "int2-g3-f32", "int4-g48-f32", "uint8-channel-f32", "int3-g32-asym-f16", "int8-tensor-f32"],
)
def test_native_codes_and_ranges_equal_their_twins(
    monkeypatch: pytest.MonkeyPatch, table: str, kept: torch.dtype, name: str
) -> None:
    scheme = parse_scheme(name)
    w = torch.randn(37, 384, generator=torch.Generator().manual_seed(3))
    w[0], w[1, :128], w[2, 5], w[3] = 0.0, 3.5, 1e30, w[3] * 1e-30
    w = w.clamp(-6e4, 6e4).to(kept)
    found = []
    # The twin works on float32, which holds all of them exactly.
    for choice, given in ((table, w), ("torch", w.float())):
        monkeypatch.setenv(VARIABLE, choice)
        found.append(round_to_nearest(given, scheme, fit_scales(given, scheme, fit="minmax")))
    native, twin = found
    assert torch.equal(native.scales, twin.scales)
    assert native.zeros is twin.zeros is None or torch.equal(native.zeros, twin.zeros)  # type: ignore[arg-type]
    assert torch.equal(native.codes, twin.codes)


@pytest.mark.parametrize("table", TABLES)
@pytest.mark.parametrize("shape", [(1, 8), (3, 40), (7, 264), (5, 36)])
def test_packing_nibbles_equals_its_twin(monkeypatch: pytest.MonkeyPatch, table: str, shape: tuple[int, int]) -> None:
    codes = torch.randint(0, 16, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(4))
    monkeypatch.setenv(VARIABLE, table)
    packed = pack_int32(codes, 4)
    monkeypatch.setenv(VARIABLE, "torch")
    assert torch.equal(packed, pack_int32(codes, 4))


def test_kernels_that_the_processor_lacks_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "scalar")
    assert kernel_table() == "scalar"
    assert library is not None
    with pytest.raises(ValueError, match="no kernels called sse9"):
        library.round_block(*arguments("sse9"))


@pytest.mark.parametrize(
    ("place", "shape"),
    [(1, (3, 5)), (2, (4, 4)), (3, (4, 6)), (4, (3, 3)), (5, (2, 4)), (7, (3, 5)), (8, (3,)), (11, (1, 4))],
)
def test_arguments_of_wrong_shapes_are_refused(place: int, shape: tuple[int, ...]) -> None:
    assert library is not None
    given = list(arguments("scalar"))
    wrong = torch.zeros(shape, dtype=given[place].dtype if isinstance(given[place], Tensor) else torch.float32)
    given[place] = wrong
    with pytest.raises(ValueError, match="expected"):
        library.round_block(*given)


def test_a_group_outside_the_scales_is_refused() -> None:
    assert library is not None
    given = list(arguments("scalar"))
    given[8] = torch.tensor([0, 1, 2, 0])
    with pytest.raises(ValueError, match="outside the scales"):
        library.round_block(*given)


def arguments(kernels: str) -> tuple[object, ...]:
    """A call of round_block on four columns of five rows with two groups."""
    block = torch.zeros(4, 5)
    scales, groups = torch.ones(2, 5), torch.zeros(4, dtype=torch.int64)
    return (
        block.clone(),
        block,
        block.clone(),
        block.clone(),
        torch.eye(4),
        scales,
        None,
        None,
        groups,
        -8.0,
        7.0,
        None,
        0,
        kernels,
    )
