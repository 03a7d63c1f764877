"""Codebooks: the tables of their sources, and what a table must be."""

from __future__ import annotations

import pytest
import torch
from gguf.quants import IQ4_NL
from scipy import stats

from pennyweight.core.errors import UsageError
from pennyweight.formats import number_format
from pennyweight.formats.codebook import Codebook


def test_nf4_is_the_table_of_qlora() -> None:
    """Its recipe: quantiles of the normal distribution, 8 above zero and 7 below, and an exact 0, scaled to 1."""
    offset = 0.9677083
    above = stats.norm.ppf(torch.linspace(offset, 0.5, 9, dtype=torch.float64)[:-1].numpy())
    below = -stats.norm.ppf(torch.linspace(offset, 0.5, 8, dtype=torch.float64)[:-1].numpy())
    expected = torch.cat([torch.from_numpy(below), torch.zeros(1), torch.from_numpy(above).flip(0)]) / above.max()
    found = number_format("nf4").decode(torch.arange(16, dtype=torch.uint8))
    # The published table was made with quantiles in float32.
    torch.testing.assert_close(found, expected.float(), rtol=0, atol=1e-6)
    assert found[7] == 0


def test_levels_of_two_bits() -> None:
    codes = torch.arange(4, dtype=torch.uint8)
    assert number_format("bal2").decode(codes).tolist() == [-1.5, -0.5, 0.5, 1.5]
    assert number_format("ternary").decode(codes).tolist() == [-1.0, 0.0, 1.0, 2.0]


def test_the_table_of_ggml() -> None:
    codes = torch.arange(16, dtype=torch.uint8)
    assert number_format("iq4_nl").decode(codes).tolist() == list(IQ4_NL.kvalues)


def test_no_encoder_emits_the_fourth_ternary_code() -> None:
    assert number_format("ternary").encode(torch.tensor([-9.0, -0.5, 0.5, 9.0, float("inf")])).tolist() == [
        0,
        0,
        2,
        2,
        2,
    ]


def test_ties_go_to_the_even_code() -> None:
    assert number_format("bal2").encode(torch.tensor([-1.0, 0.0, 1.0])).tolist() == [0, 2, 2]


@pytest.mark.parametrize(
    ("bits", "values"),
    [(2, (0.0, 1.0, 2.0)), (9, (0.0,) * 512), (1, (1.0, 1.0)), (1, (1.0, 0.0)), (1, (0.0, float("nan")))],
)
def test_tables_that_are_none_are_refused(bits: int, values: tuple[float, ...]) -> None:
    with pytest.raises(UsageError, match="sort them|value for every code"):
        Codebook("mine", bits, values)
