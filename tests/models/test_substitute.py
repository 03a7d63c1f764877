"""A block run with other weights than its own: same outputs as if they were its own, right gradients, no trace."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from pennyweight.core.parallel import parallel_map
from pennyweight.models.streamed import StreamedModel
from tests.models.families import FAMILIES, build, save, token_batches

# float32 products of a few dozen terms through a whole block, by another kernel.
TOLERANCE = 1e-4


@pytest.fixture(scope="module", params=["llama", "mixtral", "gpt2", "bert"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> StreamedModel:
    family = FAMILIES[request.param]
    directory: Path = tmp_path_factory.mktemp(request.param)
    return StreamedModel(save(build(family.architecture, family.config), directory))


def others(model: StreamedModel) -> dict[str, Tensor]:
    """Other weights for every site of block 0, which is open."""
    generator = torch.Generator().manual_seed(1)
    return {
        site.name: model.matrix(site) * (1 + 0.1 * torch.randn(site.shape, generator=generator))
        for site in model.sites_of(0)
    }


def test_the_output_is_that_of_a_block_with_these_weights(model: StreamedModel) -> None:
    stream = model.start(token_batches((2, 3)))
    with model.opened(0) as block, torch.no_grad():
        weights = others(model)
        before = model.run_block(block, 0, stream)
        found = parallel_map(lambda batch: model.run_with(block, 0, stream, batch, weights), range(2))
        for one, same in zip(model.run_block(block, 0, stream), before, strict=True):
            assert torch.equal(one, same)
        for site in model.sites_of(0):
            model.matrix(site).copy_(weights[site.name])
        for one, expected in zip(found, model.run_block(block, 0, stream), strict=True):
            assert (one - expected).abs().max() <= TOLERANCE * expected.abs().max()


def test_gradients_are_those_of_finite_differences(model: StreamedModel) -> None:
    stream = model.start(token_batches((2,)))
    with model.opened(0) as block:
        weights = {name: value.clone().requires_grad_() for name, value in others(model).items()}
        probe = torch.randn(stream.hidden[0].shape, generator=torch.Generator().manual_seed(2))

        def value() -> Tensor:
            return (model.run_with(block, 0, stream, 0, weights) * probe).double().sum()

        value().backward()  # type: ignore[no-untyped-call]
        for name, weight in weights.items():
            gradient = weight.grad
            assert gradient is not None, name
            size = gradient.norm()
            if size == 0:
                # An expert that no token was sent to.
                continue
            # Short: a token sent to another expert on the way would be a jump.
            step = 1e-3 / size
            with torch.no_grad():
                weight.add_(gradient * step)
                above = value()
                weight.sub_(gradient * step, alpha=2)
                below = value()
                weight.add_(gradient * step)
            measured = float(above - below) / (2 * float(step) * float(size) ** 2)
            assert measured == pytest.approx(1, rel=0.05), name
