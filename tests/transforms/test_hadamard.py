"""Rotations are orthogonal whatever the width."""

from __future__ import annotations

import pytest
import torch

from pennyweight.transforms.hadamard import is_known, random_rotation, tiled_rotation

EXACT = 1e-12
WIDTHS = [1, 2, 4, 12, 20, 24, 28, 36, 44, 60, 64, 180, 192, 224, 576, 640]
UNKNOWN = {3: 1, 52: 4, 11: 1}


@pytest.mark.parametrize("keeps_mean", [False, True])
@pytest.mark.parametrize("width", [*WIDTHS, *UNKNOWN])
def test_a_rotation_is_orthogonal_and_undone(width: int, keeps_mean: bool) -> None:
    rotation = random_rotation(width, seed=5, keeps_mean=keeps_mean)
    identity = torch.eye(width, dtype=torch.float64)
    q = rotation.apply(identity)
    assert (q @ q.T - identity).abs().max() <= EXACT
    assert (rotation.undo(q) - identity).abs().max() <= EXACT
    if keeps_mean:
        assert (q.sum(0) - 1).abs().max() <= EXACT


@pytest.mark.parametrize("width", WIDTHS)
def test_every_entry_of_a_hadamard_matrix_is_equally_large(width: int) -> None:
    assert is_known(width)
    q = tiled_rotation(width, width).apply(torch.eye(width, dtype=torch.float64))
    assert (q.abs() * width**0.5 - 1).abs().max() <= EXACT


@pytest.mark.parametrize(("width", "tile"), UNKNOWN.items())
def test_widths_without_a_matrix_are_rotated_in_runs(width: int, tile: int) -> None:
    assert random_rotation(width, seed=0).tile == tile


def test_every_axis_in_front_is_a_row() -> None:
    rotation = random_rotation(24, seed=1)
    x = torch.randn(3, 5, 24)
    assert torch.equal(rotation.apply(x)[2, 3], rotation.apply(x[2, 3]))
