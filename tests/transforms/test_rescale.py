"""Rescaled folds keep the block's function, also where part of them is stored in a narrow type."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pennyweight.schemes import parse_scheme
from pennyweight.solvers.base import Statistics
from pennyweight.stats.magnitude import Magnitude
from pennyweight.transforms.base import Fold, Weighed
from pennyweight.transforms.rescale import Observed, per_column, rescale_, rescale_block_
from pennyweight.transforms.structure import find_folds
from tests.transforms.blocks import Alone, block_of

EXACT = 1e-9
# A value of bfloat16 has 8 significant bits.
BFLOAT16 = 2.0**-8
SCHEME = parse_scheme("int4-g8-f32")
FAMILIES = ["llama", "qwen2", "gemma", "opt", "gpt2", "gpt-neox", "phi3", "mixtral", "llama4", "bert"]


def folds_of(alone: Alone) -> list[Fold]:
    return find_folds(alone.block, alone.run)


def random_scales(fold: Fold) -> Tensor:
    return torch.exp2(4 * torch.rand(fold.size, dtype=torch.float64) - 2)


def deviation(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("family", FAMILIES)
def test_any_scales_keep_the_blocks_function(family: str) -> None:
    alone = block_of(family)
    expected = alone.run(alone.block)
    before = {name: parameter.clone() for name, parameter in alone.block.named_parameters()}
    for fold in folds_of(alone):
        rescale_(alone.block, fold, random_scales(fold), stored={})
        names = [part.parameter for part in fold.producer] + [reader.parameter for reader in fold.readers]
        assert all(not torch.equal(alone.block.get_parameter(name), before[name]) for name in names)
        assert deviation(alone.run(alone.block), expected) <= EXACT


def bfloat16_vectors(alone: Alone) -> dict[str, torch.dtype]:
    """Vectors of the block as values of bfloat16, which they are stored as."""
    stored: dict[str, torch.dtype] = {}
    for name, parameter in alone.block.named_parameters():
        if parameter.ndim == 1:
            stored[name] = torch.bfloat16
            parameter.data.copy_(parameter.data.bfloat16())
    return stored


@pytest.mark.parametrize("family", ["llama", "gemma", "opt", "gpt-neox"])
def test_norms_that_are_stored_in_bfloat16_change_nothing_either(family: str) -> None:
    alone = block_of(family)
    stored = bfloat16_vectors(alone)
    expected = alone.run(alone.block)
    for fold in filter(lambda fold: fold.is_norm, folds_of(alone)):
        asked = random_scales(fold)
        done = rescale_(alone.block, fold, asked, stored=stored)
        assert done.changed == tuple(part.parameter for part in fold.producer)
        for name in done.changed:
            vector = alone.block.get_parameter(name)
            assert torch.equal(vector, vector.bfloat16().double())
        has_bias = len(fold.producer) > 1
        # With a bias beside it only powers of two leave both as they are.
        assert (done.s / asked).log2().abs().max() <= (0.51 if has_bias else 1.5 * BFLOAT16 if family == "llama" else 1)
        assert not has_bias or torch.equal(done.s.log2(), done.s.log2().round())
    assert deviation(alone.run(alone.block), expected) <= EXACT


def test_a_router_in_bfloat16_is_scaled_by_powers_of_two() -> None:
    alone = block_of("mixtral")
    stored = {"mlp.gate.weight": torch.bfloat16} | bfloat16_vectors(alone)
    router = alone.block.get_parameter("mlp.gate.weight")
    router.data.copy_(router.data.bfloat16())
    expected = alone.run(alone.block)
    fold = next(fold for fold in folds_of(alone) if any(r.parameter == "mlp.gate.weight" for r in fold.readers))
    done = rescale_(alone.block, fold, random_scales(fold), stored=stored)
    assert done.changed == ("post_attention_layernorm.weight", "mlp.gate.weight")
    assert torch.equal(router, router.bfloat16().double())
    assert deviation(alone.run(alone.block), expected) <= EXACT


def test_a_channel_that_the_norm_shuts_stays_shut() -> None:
    alone = block_of("llama")
    norm = alone.block.get_parameter("input_layernorm.weight")
    norm.data[3] = 0
    expected = alone.run(alone.block)
    fold = next(fold for fold in folds_of(block_of("llama")) if fold.is_norm)
    done = rescale_(alone.block, fold, random_scales(fold), stored={"input_layernorm.weight": torch.float64})
    assert norm[3] == 0
    assert done.s.isfinite().all()
    assert deviation(alone.run(alone.block), expected) <= EXACT


class Fixed:
    """Scales from 1 to 2, whatever is read."""

    name = "fixed"

    def __init__(self) -> None:
        self.asked: list[list[Weighed]] = []

    def choose(self, readers: list[Weighed], size: int) -> Tensor | None:
        self.asked.append(readers)
        return torch.linspace(1, 2, size)


def observed(alone: Alone, x: dict[str, Tensor]) -> dict[str, Observed]:
    shared: dict[int, tuple[Statistics, Magnitude]] = {}
    found: dict[str, Observed] = {}
    for name, module in alone.block.named_modules():
        if isinstance(module, torch.nn.Linear):
            rows = x[name]
            if id(rows) not in shared:
                zero = Magnitude.zero(rows.shape[1])
                shared[id(rows)] = (Statistics(rows.T @ rows / len(rows)), zero.update(rows))
            stats, magnitude = shared[id(rows)]
            found[name] = Observed(f"{name}.weight", module.weight.data, SCHEME, stats, magnitude)
    return found


def test_statistics_become_those_of_the_new_inputs_and_stay_shared() -> None:
    alone = block_of("llama")
    inputs = {width: torch.randn(50, width, dtype=torch.float64) for width in (32, 48)}
    modules = dict(alone.block.named_modules())
    x = {name: inputs[m.in_features] for name, m in modules.items() if isinstance(m, torch.nn.Linear)}
    before = observed(alone, x)
    fixed = Fixed()
    done, after = rescale_block_(alone.block, folds_of(alone), fixed, matrices=before, stored={})
    assert [len(readers) for readers in fixed.asked] == [3, 2, 1, 1]
    assert len(done) == 4
    for rescaled in done:
        for reader in rescaled.fold.readers:
            name = reader.parameter.removesuffix(".weight")
            rows = x[name] / per_column(rescaled.s, reader.source)
            hessian = after[name].stats.hessian
            assert hessian is not None
            torch.testing.assert_close(hessian, rows.T @ rows / len(rows))
            magnitude = after[name].magnitude
            assert magnitude is not None
            torch.testing.assert_close(magnitude.mean.double(), rows.abs().mean(0), atol=1e-6, rtol=1e-6)
            torch.testing.assert_close(magnitude.largest.double(), rows.abs().amax(0), atol=1e-6, rtol=1e-6)
    assert after["self_attn.q_proj"].stats is after["self_attn.v_proj"].stats
    assert before["self_attn.q_proj"].stats is not after["self_attn.q_proj"].stats


def test_a_fold_that_nothing_quantized_reads_is_left_alone() -> None:
    alone = block_of("llama")
    before = {name: parameter.clone() for name, parameter in alone.block.named_parameters()}
    done, after = rescale_block_(alone.block, folds_of(alone), Fixed(), matrices={}, stored={})
    assert (done, after) == ([], {})
    assert all(torch.equal(parameter, before[name]) for name, parameter in alone.block.named_parameters())
