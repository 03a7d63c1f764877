"""Products with packed weights against sums of float64 over the codes, on every kernel table of this machine."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pennyweight.core.errors import ShapeError, UsageError, WeightError
from pennyweight.formats.integer import Int
from pennyweight.kernels.native import VARIABLE
from pennyweight.kernels.packed import PackedMatrix, multiply
from tests.kernels.packed_cases import (
    FORMATS,
    TYPES,
    WEIGHT_FORMATS,
    Case,
    Weight,
    on_every_table,
    random_codes,
    weight_of,
)

# Activations are bytes to 2**-23 of a group's largest magnitude and groups are added in float32: seen 1.6e-7 of the sum
# of sizes.
TOLERANCE = 5e-7
# bfloat16 is two bytes, to 2**-16 of that magnitude: seen 9e-6.
HALF_TOLERANCE = 2e-5
# The bytes of a table are good to 2**-24 of its largest value, and most values of fp8 are far smaller: seen 6e-7.
TABLE_TOLERANCE = 3e-6
# Of an activation in three bytes, as a part of the largest one of its group.
LARGEST_ERROR = 2.0**-23
# Half a unit in the last place of the result's type, added to the above.
LAST_PLACE = {torch.float32: 0.0, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}

# Every group size, kind of zero and type of scale, and columns that fill no group.
CASES = (
    Case(32, 256, 32, scale=torch.float16),
    Case(33, 96, 16, "integer", torch.float32, unit=0.37),
    Case(1, 96, 48, "float"),
    Case(17, 192, 64, "offset", torch.float16),
    Case(48, 192, 96, "float", torch.float32),
    Case(16, 2304, 128, "integer"),
    Case(15, 512, 256, "offset", unit=-2.0),
    Case(5, 100, 100, "integer", torch.float16),
    Case(37, 288, 288, scale=torch.float32),
    Case(20, 24, 24, "float", torch.float16),
    Case(64, 1040, 80, "offset"),
)
TOKENS = (1, 2, 3, 5, 7, 8, 12, 13)


def tolerance(name: str) -> float:
    return TABLE_TOLERANCE if name.startswith("fp8") else TOLERANCE


def check(y: Tensor, weight: Weight, x: Tensor, bias: Tensor | None = None, *, within: float = TOLERANCE) -> None:
    expected, sizes = weight.product(x, bias)
    assert y.dtype == x.dtype
    assert y.shape == expected.shape
    error = (y.double() - expected).abs() - LAST_PLACE[x.dtype] * expected.abs()
    within = max(within, HALF_TOLERANCE) if x.dtype == torch.bfloat16 else within
    assert bool((error <= within * sizes).all()), f"off by {float((error / sizes).amax()):.1e} of the sum of sizes"


def whole_numbers(rows: int, cols: int) -> Tensor:
    """Whole numbers that a byte holds, with 127 in every 16 columns: scales of activations are 1."""
    x = torch.randint(-20, 21, (rows, cols)).float()
    x[:, ::16] = 127.0
    return x


@on_every_table
@pytest.mark.parametrize("name", WEIGHT_FORMATS)
def test_products_are_sums_over_the_codes(table: str, name: str) -> None:
    for index, case in enumerate(CASES):
        if case.zero == "integer" and not isinstance(FORMATS[name], Int):
            continue
        weight = weight_of(name, case)
        # Every number of tokens meets every case as formats change.
        tokens = TOKENS[(index + len(name) + FORMATS[name].bits) % len(TOKENS)]
        x, bias = torch.randn(tokens, case.cols), torch.randn(case.rows)
        check(multiply(x, [weight.packed], biases=[bias])[0], weight, x, bias, within=tolerance(name))


@on_every_table
@pytest.mark.parametrize("name", ["int2", "int3", "uint4", "int5", "int6", "int8", "nf4"])
def test_any_number_of_tokens(table: str, name: str) -> None:
    for case in (Case(40, 128, 64, "float"), Case(17, 96, 48, "offset")):
        weight = weight_of(name, case)
        for tokens in (*TOKENS, 4, 6, 33, 97, 330):
            x = torch.randn(tokens, case.cols)
            check(multiply(x, [weight.packed])[0], weight, x)
        assert multiply(x[:0], [weight.packed])[0].shape == (0, case.rows)


@pytest.mark.parametrize("name", WEIGHT_FORMATS)
def test_the_plain_version_gives_the_same(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    for case in (Case(33, 96, 16, "float", unit=0.37), Case(17, 192, 64, "offset"), Case(5, 100, 100)):
        weight = weight_of(name, case)
        x, bias = torch.randn(6, case.cols), torch.randn(case.rows)
        x[2, 3], x[4, 5] = torch.inf, torch.nan
        for activations in ("exact", "int8"):
            monkeypatch.delenv(VARIABLE, raising=False)
            (native,) = multiply(x, [weight.packed], biases=[bias], activations=activations)  # type: ignore[arg-type]
            monkeypatch.setenv(VARIABLE, "torch")
            (plain,) = multiply(x, [weight.packed], biases=[bias], activations=activations)  # type: ignore[arg-type]
            sizes = weight.product(torch.where(x.isfinite(), x, 0.0), bias)[1]
            assert bool(plain[[2, 4]].isnan().all())
            assert torch.equal(plain.isnan(), native.isnan())
            assert bool(((plain - native).abs() <= tolerance(name) * sizes)[[0, 1, 3, 5]].all())
            if activations == "exact":
                check(plain[:2], weight, x[:2], bias)


# ---- exact: of whole numbers and powers of two no product and no sum is rounded


WHOLE = [name for name in WEIGHT_FORMATS if name not in ("nf4", "fp8_e4m3", "fp8_e5m2")]


@on_every_table
@pytest.mark.parametrize("activations", ["exact", "int8"])
@pytest.mark.parametrize("name", WHOLE)
def test_whole_numbers_give_the_very_sums(table: str, name: str, activations: str) -> None:
    zero = "integer" if isinstance(FORMATS[name], Int) else "none"
    for rows, cols, group in ((33, 256, 32), (7, 144, 48), (16, 256, 128), (20, 64, 16), (3, 100, 100)):
        weight = weight_of(name, Case(rows, cols, group, zero, unit=0.5, power_of_two=True))
        for tokens in (1, 5, 12, 40):
            x, bias = whole_numbers(tokens, cols), torch.randint(-9, 9, (rows,)).float()
            (y,) = multiply(x, [weight.packed], biases=[bias], activations=activations)  # type: ignore[arg-type]
            assert torch.equal(y.double(), weight.product(x, bias)[0])


@on_every_table
@pytest.mark.parametrize(("low", "high"), [(0, 0), (255, 255), (0, 255)])
def test_the_largest_codes_and_numbers_do_not_overflow(table: str, low: int, high: int) -> None:
    codes = torch.full((16, 128), low, dtype=torch.uint8)
    codes[:, 1::2] = high
    for element in (Int(8), Int(8, signed=False)):
        packed = PackedMatrix.pack(codes, torch.ones(16, 1), element=element)
        for x in (torch.full((3, 128), 127.0), torch.full((3, 128), -127.0)):
            for activations in ("exact", "int8"):
                (y,) = multiply(x, [packed], activations=activations)  # type: ignore[arg-type]
                assert torch.equal(y, x @ element.decode(codes).T)


# ---- inputs and outputs


@on_every_table
@pytest.mark.parametrize("dtype", TYPES)
def test_input_and_output_are_of_one_type(table: str, dtype: torch.dtype) -> None:
    for cols, group in ((256, 32), (100, 100), (96, 48)):
        weight = weight_of("int4", Case(37, cols, group))
        for bias in (None, torch.randn(37), torch.randn(37, dtype=dtype)):
            x = torch.randn(2, 3, cols).to(dtype)
            (y,) = multiply(x, [weight.packed], biases=[bias])
            assert y.shape == (2, 3, 37)
            check(y.flatten(0, 1), weight, x.flatten(0, 1), bias)


@on_every_table
def test_results_round_to_halves_like_torch_does(table: str) -> None:
    numbers = torch.tensor([1e-8, 6e-8, 3e-5, 6.1e-5, 1.00048828125, 1.0009765625, 65519.0, 65520.0, 1e6, 3.4e38, 0.0])
    numbers = torch.cat([numbers, -numbers, torch.randn(100) * 10.0 ** torch.randint(-9, 6, (100,))])
    packed = PackedMatrix.pack(
        torch.full((len(numbers), 16), 8, dtype=torch.uint8), torch.ones(len(numbers), 1), element=Int(4)
    )
    for dtype in TYPES:
        (y,) = multiply(torch.zeros(1, 16, dtype=dtype), [packed], biases=[numbers])
        assert torch.equal(y[0], numbers.to(dtype))


@on_every_table
@pytest.mark.parametrize("dtype", TYPES)
def test_input_may_lie_anywhere(table: str, dtype: torch.dtype) -> None:
    weight = weight_of("int5", Case(24, 96, 32))
    x = torch.randn(96, 7).to(dtype)
    assert torch.equal(multiply(x.T, [weight.packed])[0], multiply(x.T.contiguous(), [weight.packed])[0])
    room = bytearray(1 + x.nbytes)
    odd = torch.frombuffer(room, dtype=dtype, offset=1, count=x.numel()).view(7, 96)
    assert odd.data_ptr() % 2 == 1
    odd.copy_(x.T)
    assert torch.equal(multiply(odd, [weight.packed])[0], multiply(x.T, [weight.packed])[0])


@on_every_table
def test_weights_may_lie_anywhere(table: str) -> None:
    for name, zero in (("int3", "integer"), ("nf4", "float"), ("int8", "offset")):
        for scale in TYPES:
            weight = weight_of(name, Case(24, 96, 32, zero, scale))
            room = torch.zeros(weight.packed.storage.numel() + 9, dtype=torch.uint8)
            x = torch.randn(3, 96)
            for start in (1, 4, 7):
                moved = room[start : start + weight.packed.storage.numel()].copy_(weight.packed.storage)
                opened = PackedMatrix.open(moved)
                for matrix in (PackedMatrix(weight.packed.layout, moved), opened):
                    assert torch.equal(multiply(x, [matrix])[0], multiply(x, [weight.packed])[0])
                assert torch.equal(opened.decode(), weight.packed.decode())


@on_every_table
def test_several_weights_at_once_are_those_one_by_one(table: str) -> None:
    cases = [("int4", 32), ("int4", 32), ("uint4", 32), ("int2", 128), ("nf4", 64), ("int8", 96), ("fp8_e4m3", 384)]
    weights = [weight_of(name, Case(5 + 11 * i, 384, group)).packed for i, (name, group) in enumerate(cases)]
    biases = [torch.randn(weight.shape[0]) if i % 2 else None for i, weight in enumerate(weights)]
    for activations in ("exact", "int8"):
        for tokens in (1, 9):
            x = torch.randn(tokens, 384)
            together = multiply(x, weights, biases=biases, activations=activations)  # type: ignore[arg-type]
            for y, weight, bias in zip(together, weights, biases, strict=True):
                assert torch.equal(y, multiply(x, [weight], biases=[bias], activations=activations)[0])  # type: ignore[arg-type]


@on_every_table
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_zero_points_may_be_far_above_the_codes(table: str, bits: int) -> None:
    codes = torch.randint(0, 2**bits, (32, 128), dtype=torch.uint8)
    zeros = torch.tensor([[0, 128], [129, 255]], dtype=torch.int32).repeat(16, 1)
    matrix = PackedMatrix.pack(codes, torch.rand(32, 2), element=Int(bits, signed=False), zeros=zeros)
    assert matrix.layout.zero == "integer"
    x = torch.randn(32, 128)
    whole = multiply(x, [matrix])[0]
    assert torch.equal(whole, torch.cat([multiply(row[None], [matrix])[0] for row in x]))
    assert (whole - x @ matrix.decode().T).abs().max() < 1e-5 * whole.abs().max()


@on_every_table
@pytest.mark.parametrize(
    ("name", "case"),
    [
        *((name, Case(40, 192, 48, "float")) for name in ("int4", "nf4", "int8")),
        # More columns than are unpacked at a time.
        *((name, Case(20, 2240, 80)) for name in ("int4", "nf4", "uint8")),
        *((name, Case(70, 1088, 64, "integer")) for name in ("uint3", "uint8")),
        # More than blocks of tokens that unpack codes for themselves take at a time.
        ("int4", Case(33, 4160, 64)),
    ],
    ids=str,
)
def test_a_row_does_not_depend_on_those_beside_it(table: str, name: str, case: Case) -> None:
    weight = weight_of(name, case).packed
    x = torch.randn(331, case.cols)
    for activations in ("exact", "int8"):
        whole = multiply(x, [weight], activations=activations)[0]  # type: ignore[arg-type]
        for part in (slice(0, 1), slice(5, 8), slice(31, 33), slice(40, 64), slice(300, 331)):
            assert torch.equal(multiply(x[part], [weight], activations=activations)[0], whole[part])  # type: ignore[arg-type]


# ---- numbers that are not ordinary


@on_every_table
@pytest.mark.parametrize("activations", ["exact", "int8"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_number_that_is_not_finite_makes_its_row_nan_and_no_other(table: str, activations: str, bad: float) -> None:
    for dtype in TYPES:
        for name, zero in (("int4", "integer"), ("nf4", "float"), ("uint8", "offset")):
            weight = weight_of(name, Case(20, 160, 32, zero)).packed
            x = torch.randn(6, 160).to(dtype)
            (before,) = multiply(x, [weight], activations=activations)  # type: ignore[arg-type]
            x[2, 159] = bad
            (after,) = multiply(x, [weight], activations=activations)  # type: ignore[arg-type]
            assert bool(after[2].isnan().all())
            others = [0, 1, 3, 4, 5]
            assert torch.equal(after[others], before[others])


@on_every_table
@pytest.mark.parametrize("magnitude", [1e-24, 1e-10, 1e10, 1e30])
def test_products_are_as_good_at_any_magnitude(table: str, magnitude: float) -> None:
    weight = weight_of("int4", Case(24, 128, 32, "float"))
    x = torch.randn(5, 128) * magnitude
    check(multiply(x, [weight.packed])[0], weight, x)


@on_every_table
def test_numbers_too_small_for_a_scale_count_as_zeros(table: str) -> None:
    weight = weight_of("int4", Case(24, 128, 32)).packed
    tiny = torch.full((3, 128), 1e-28)
    tiny[1], tiny[2] = 1e-40, 0.0
    for activations in ("exact", "int8"):
        (y,) = multiply(tiny, [weight], biases=[torch.ones(24)], activations=activations)  # type: ignore[arg-type]
        assert torch.equal(y, torch.ones(3, 24))


@on_every_table
def test_numbers_are_kept_to_a_fraction_of_the_largest_of_their_group(table: str) -> None:
    weight = weight_of("uint4", Case(24, 128, 32, "integer"))
    x = torch.randn(8, 128)
    x[:, 3] = 1e4 * torch.randn(8).abs() + 1e4
    expected, sizes = weight.product(x)
    kept = LARGEST_ERROR * x[:, 3:4].double() @ weight.dense[:, :32].abs().sum(1, keepdim=True).T
    (y,) = multiply(x, [weight.packed])
    assert bool(((y - expected).abs() <= kept + TOLERANCE * sizes).all())


# ---- what is refused


def test_shapes_and_types_that_do_not_fit_are_refused() -> None:
    weight = weight_of("int4", Case(24, 128, 32)).packed
    with pytest.raises(ShapeError, match="do not multiply"):
        multiply(torch.randn(2, 64), [weight])
    with pytest.raises(ShapeError, match="do not multiply"):
        multiply(torch.randn(2, 128), [weight], biases=[torch.randn(23)])
    with pytest.raises(UsageError, match="float64"):
        multiply(torch.randn(2, 128, dtype=torch.float64), [weight])
    with pytest.raises(UsageError, match="give 'exact' or 'int8'"):
        multiply(torch.randn(2, 128), [weight], activations="int4")  # type: ignore[arg-type]


def test_codes_of_no_finite_value_are_refused() -> None:
    for name, bad in (("fp8_e4m3", 0x7F), ("fp8_e4m3", 0xFF), ("fp8_e5m2", 0x7C), ("fp8_e5m2", 0xFE)):
        codes = random_codes(FORMATS[name], 16, 64)
        PackedMatrix.pack(codes, torch.ones(16, 1), element=FORMATS[name])
        codes[3, 5] = bad
        with pytest.raises(WeightError, match=name):
            PackedMatrix.pack(codes, torch.ones(16, 1), element=FORMATS[name])


@on_every_table
def test_zero_points_beyond_the_bytes_are_kept_as_floats(table: str) -> None:
    for name, zeros in (("int4", [-9, 8]), ("uint8", [-1, 0]), ("int8", [-128, 128]), ("nf4", [-1, 2])):
        element = FORMATS[name]
        codes = random_codes(element, 16, 64)
        given = torch.tensor(zeros).expand(16, 2)
        packed = PackedMatrix.pack(codes, torch.ones(16, 2), element=element, zeros=given)
        value, minus = element.decode(codes).double(), given.double().repeat_interleave(32, 1)
        x = torch.randn(3, 64)
        check(multiply(x, [packed])[0], Weight(value, torch.ones(16, 64).double(), minus, 1.0, packed), x)
        assert torch.equal(packed.decode().double(), (value - minus).float().double())
