from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pennyweight.transforms.equalize import SWEEPS, TOLERANCE, Between, equalizing_scales

# Scales are accepted when they no longer change by more than TOLERANCE; ranges are as near.
NEAR = 2 * TOLERANCE


def random_matrix(rows: int, columns: int, seed: int) -> Tensor:
    """Normal numbers whose rows and columns differ by factors of up to 100."""
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
    spread = [100 ** torch.rand(n, generator=generator, dtype=torch.float64) for n in (rows, columns)]
    return w * spread[0][:, None] * spread[1]


def numbers(first: int, count: int) -> Tensor:
    return torch.arange(first, first + count)


def fixed(count: int) -> Tensor:
    return torch.zeros(count, dtype=torch.int64)


def test_a_pair_gets_the_scales_of_the_paper() -> None:
    w1, w2 = random_matrix(6, 5, 0), random_matrix(4, 6, 1)
    pair = [Between(w1, numbers(1, 6), fixed(5)[None]), Between(w2, fixed(4), numbers(1, 6)[None])]
    found = equalizing_scales(pair, 7)
    r1, r2 = w1.abs().amax(1), w2.abs().amax(0)
    assert torch.allclose(found.s[1:], (r1 * r2).sqrt() / r2, rtol=1e-12)
    assert found.s[0] == 1
    # Once to find them, once to see that nothing changes.
    assert found.sweeps == 2
    for matrix, axis in zip(pair, (1, 0), strict=True):
        assert torch.allclose(matrix.scaled(found.s).abs().amax(axis), (r1 * r2).sqrt(), rtol=1e-12)


def test_with_a_depthwise_matrix_between_the_three_ranges_are_their_geometric_mean() -> None:
    w1, w2, w3 = random_matrix(6, 5, 0), random_matrix(6, 9, 1), random_matrix(4, 6, 2)
    chain = [
        Between(w1, numbers(1, 6), fixed(5)[None]),
        Between(w2, numbers(7, 6), numbers(1, 6)[:, None].expand(6, 9)),
        Between(w3, fixed(4), numbers(7, 6)[None]),
    ]
    found = equalizing_scales(chain, 13)
    r1, r2, r3 = w1.abs().amax(1), w2.abs().amax(1), w3.abs().amax(0)
    mean = (r1 * r2 * r3) ** (1 / 3)
    assert torch.allclose(found.s[1:7], r1 / mean, rtol=NEAR)
    assert torch.allclose(found.s[7:], mean / r3, rtol=NEAR)
    assert found.sweeps < SWEEPS


def test_groups_read_their_own_channels() -> None:
    w1, w2 = random_matrix(6, 5, 0), random_matrix(4, 3, 1)
    grouped = Between(w2, fixed(4), torch.stack([numbers(1, 3), numbers(4, 3)]))
    dense = torch.zeros(4, 6, dtype=torch.float64)
    dense[:2, :3], dense[2:, 3:] = w2[:2], w2[2:]
    made = Between(w1, numbers(1, 6), fixed(5)[None])
    found = equalizing_scales([made, grouped], 7)
    expected = equalizing_scales([made, Between(dense, fixed(4), numbers(1, 6)[None])], 7)
    assert torch.equal(found.s, expected.s)
    rows = dense * found.s[1:]
    assert torch.equal(grouped.scaled(found.s), torch.cat([rows[:2, :3], rows[2:, 3:]]))


def test_channels_with_several_makers_and_readers_are_as_large_as_the_largest() -> None:
    makers = [random_matrix(6, 5, seed) for seed in range(2)]
    readers = [random_matrix(4, 6, seed) for seed in range(2, 5)]
    members = [Between(w, numbers(1, 6), fixed(5)[None]) for w in makers]
    members += [Between(w, fixed(4), numbers(1, 6)[None]) for w in readers]
    s = equalizing_scales(members, 7, sweeps=200).s

    def shared(ranges: list[Tensor]) -> Tensor:
        peaks = torch.stack([one.max() for one in ranges])
        return torch.stack([one / one.max() for one in ranges]).amax(0) * peaks.prod() ** (1 / len(ranges))

    made = shared([m.scaled(s).abs().amax(1) for m in members[:2]])
    read = shared([m.scaled(s).abs().amax(0) for m in members[2:]])
    assert torch.allclose(made, read, rtol=NEAR)


def test_a_matrix_that_is_larger_than_those_beside_it_counts_as_much_as_they() -> None:
    """Of three that make the same channels one is a thousand times as large: what counts is how its rows differ."""
    makers = [random_matrix(6, 5, seed) for seed in range(3)]
    reader = Between(random_matrix(4, 6, 3), fixed(4), numbers(1, 6)[None])
    found = []
    for factor in (1.0, 1000.0):
        scaled = [makers[0] * factor, *makers[1:]]
        found.append(equalizing_scales([*(Between(w, numbers(1, 6), fixed(5)[None]) for w in scaled), reader], 7).s[1:])
    assert torch.allclose(found[0] / found[0][0], found[1] / found[1][0], rtol=NEAR)


@pytest.mark.parametrize("size", [2, 7])
def test_a_matrix_that_reads_what_it_makes_comes_to_rest(size: int) -> None:
    w = random_matrix(size, size, 3).fill_diagonal_(0)
    itself = Between(w, numbers(1, size), numbers(1, size)[None])
    found = equalizing_scales([itself], size + 1, sweeps=200)
    after = itself.scaled(found.s).abs()
    assert torch.allclose(after.amax(1), after.amax(0), rtol=0.01)
    assert found.sweeps < 200


def test_a_channel_that_is_zero_on_one_side_stays() -> None:
    w1, w2 = random_matrix(3, 5, 0), random_matrix(4, 3, 1)
    w1[0], w2[:, 1] = 0, 0
    found = equalizing_scales(
        [Between(w1, numbers(1, 3), fixed(5)[None]), Between(w2, fixed(4), numbers(1, 3)[None])], 4
    )
    assert found.s[:3].tolist() == [1, 1, 1]
    assert found.s[3] != 1


def test_fixed_channels_alone_change_nothing() -> None:
    lone = Between(random_matrix(3, 4, 0), fixed(3), fixed(4)[None])
    assert equalizing_scales([lone], 1).s.tolist() == [1]
    assert equalizing_scales([], 1).s.tolist() == [1]
