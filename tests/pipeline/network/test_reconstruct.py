from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pennyweight.core.errors import UsageError
from pennyweight.models.network import Network, QuantizedNetwork, capture
from pennyweight.models.network.network import Inputs
from pennyweight.models.network.part import Recorder
from pennyweight.pipeline.network.dropped import chance, dropped
from pennyweight.pipeline.network.reconstruct import ReconstructionResult, reconstructed
from pennyweight.pipeline.network.streams import cut
from pennyweight.plan.plan import Plan
from pennyweight.schemes import QuantizedWeight, parse_scheme
from pennyweight.schemes.activation import ActivationParameters, ActivationScheme
from pennyweight.solvers.base import Statistics
from pennyweight.solvers.learned.base import BlockProblem, BlockSolution
from pennyweight.solvers.learned.descent import gradients
from pennyweight.solvers.nearest import Nearest
from tests.models.network.zoo import Shared, UNet, case
from tests.pipeline.network.nets import Net

# The error is summed in another order than here.
CLOSE = 1e-4
UINT8 = ActivationScheme()
SCHEME = parse_scheme("int3-channel-f32")


def images(count: int, size: int = 8, seed: int = 1) -> Tensor:
    """Smooth ones whose colours go together: on white noise rounding to nearest is best."""
    white = torch.randn(count, 3, size + 2, size + 2, generator=torch.Generator().manual_seed(seed))
    return 3 * nn.functional.avg_pool2d(white + white.mean(1, keepdim=True) * 2, 3, stride=1)


def rounded(network: Network, scheme: Any = SCHEME) -> dict[str, QuantizedWeight]:
    return {
        site.name: Nearest().solve(site.matrix(network.weight(site).detach()).float(), scheme, Statistics()).weight
        for site in network.sites
    }


def ranges(network: Network, batch: Any, names: list[str]) -> dict[str, ActivationParameters]:
    values = Recorder.values(network, network.inputs(batch), frozenset(names))
    return {name: UINT8.parameters(float(x.min()), float(x.max())) for name, x in values.items()}


def small() -> Network:
    """A residual block, depthwise and grouped convolutions, a transposed one, a linear map."""
    net = Net([("relu", "residual"), ("relu", "depthwise"), ("relu", "transposed_groups"), ("relu", "grouped")])
    return capture(net.float(), images(2))


def learned(
    network: Network, activations: Mapping[str, ActivationParameters] | None = None, **options: Any
) -> ReconstructionResult:
    given: dict[str, Any] = dict(steps=20, batches=[images(16), images(8, seed=2)]) | options
    return reconstructed(network, rounded(network), activations or {}, given.pop("batches"), **given)


def block_errors(network: Network, result: ReconstructionResult, batch: Tensor) -> dict[str, float]:
    """Mean squared difference of each block's output, from a simulation of the whole network."""
    edges = dict.fromkeys(result.activations, UINT8)
    plan = Plan({site.name: SCHEME for site in network.sites}, edges=edges)
    graph = QuantizedNetwork(network, result.weights, result.activations, plan).simulated()
    names = frozenset(result.blocks)
    # What is on an edge itself is seen before it is rounded.
    exact = Recorder.values(network, Inputs((batch,)), names)
    found = Recorder.values(Network(graph, network.sites, network.example), Inputs((batch,)), names)
    return {name: float((exact[name] - found[name]).square().mean()) for name in names}


@pytest.mark.parametrize("edges", [[], ["x", "relu", "relu_1", "relu_2", "relu_3"]])
def test_errors_fall_and_are_those_of_the_quantized_network(edges: list[str]) -> None:
    network = small()
    batch = torch.cat([images(16), images(8, seed=2)])
    result = learned(network, ranges(network, batch, edges), steps=100)
    assert result.weights.keys() == {site.name for site in network.sites}
    assert len(result.blocks) >= 4
    for name, error in block_errors(network, result, batch).items():
        assert result.blocks[name].after == pytest.approx(error, rel=CLOSE)
        assert result.blocks[name].after <= result.blocks[name].before
    # The codes of a block that gains nothing stay, and it is said.
    kept = [name for name, error in result.blocks.items() if error.after == error.before]
    assert len(kept) <= 1
    assert len(result.notes) == len(kept)


class Slopes:
    """Stands for a solver: keeps the size of the gradient that reaches each site, and changes nothing."""

    def __init__(self) -> None:
        self.name, self.found = "slopes", dict[str, float]()

    def with_steps(self, steps: int, *, batches: int) -> Slopes:
        return self

    def refine(self, problem: BlockProblem) -> BlockSolution:
        weights = {name: weight.dequantize() for name, weight in problem.start.items()}
        slopes = gradients(problem, weights, range(len(problem.targets)))
        self.found |= {name: float(slope.abs().max()) for name, slope in zip(weights, slopes, strict=True)}
        return BlockSolution(problem.start, 0.0, 0.0)


@pytest.mark.parametrize("name", ["unet", "lstm", "gru", "embedding", "transformer", "conv3d", "by name", "shared"])
def test_every_kind_of_site_can_be_learned(name: str) -> None:
    network = capture(*case(name))
    solver = Slopes()
    result = reconstructed(network, rounded(network), {}, [network.example], steps=1, solver=solver)
    assert all(slope > 0 for slope in solver.found.values())
    left = {site.name for site in network.sites} - solver.found.keys()
    # An LSTM whose states are given to the caller has no single output.
    assert all(any(note.startswith(site) for note in result.notes) for site in left)
    assert not left or name in ("lstm", "gru")


def test_neither_threads_nor_a_second_run_change_a_bit_but_the_seed_does() -> None:
    network, before, found = small(), torch.get_num_threads(), []
    activations = ranges(network, images(16), ["x", "relu_1", "relu_2"])
    try:
        for threads, seed in ((1, 0), (2, 0), (3, 0), (2, 1)):
            torch.set_num_threads(threads)
            found.append(learned(network, activations, seed=seed))
    finally:
        torch.set_num_threads(before)
    assert same(found[0], found[1])
    assert same(found[0], found[2])
    assert not same(found[0], found[3])


def same(one: ReconstructionResult, other: ReconstructionResult) -> bool:
    weights = [(one.weights[name], other.weights[name]) for name in one.weights]
    return one.blocks == other.blocks and all(
        torch.equal(a.codes, b.codes) and torch.equal(a.scales, b.scales) for a, b in weights
    )


def test_rounding_that_is_dropped_is_seen_by_the_steps_alone() -> None:
    network = small()
    activations = ranges(network, images(16), ["x", "relu_1", "relu_2"])
    always, half = (learned(network, activations, drop=drop) for drop in (1.0, 0.5))
    assert not same(always, half)
    # The first block with an edge inside begins with the same error: codes are judged with everything rounded.
    first = next(iter(always.blocks))
    assert always.blocks[first].before == half.blocks[first].before
    # Without edges there is nothing to drop.
    assert same(learned(network, drop=1.0), learned(network, drop=0.5))


def test_sites_without_codes_stay_in_float() -> None:
    network = small()
    some = {name: weight for name, weight in rounded(network).items() if name in ("stem", "linear")}
    result = reconstructed(network, some, {}, [images(16)], steps=5)
    assert result.weights.keys() == some.keys()
    assert [block.sites for block in result.blocks.values()] == [("stem",), ("linear",)]


def test_a_site_that_is_called_again_is_learned_once_and_used_everywhere() -> None:
    network = capture(Shared(), torch.randn(3, 4))
    result = reconstructed(network, rounded(network), {}, [torch.randn(40, 4)], steps=30)
    learned_sites = [site for block in result.blocks.values() for site in block.sites]
    assert sorted(learned_sites) == sorted({site.name for site in network.sites})


def test_the_network_and_the_codes_that_were_given_are_not_edited() -> None:
    network = small()
    start = rounded(network)
    codes = {name: weight.codes.clone() for name, weight in start.items()}
    state = {name: tensor.clone() for name, tensor in network.graph.state_dict().items()}
    reconstructed(network, start, {}, [images(16)], steps=5)
    assert all(torch.equal(start[name].codes, codes[name]) for name in start)
    assert all(torch.equal(tensor, state[name]) for name, tensor in network.graph.state_dict().items())


def test_the_caller_is_told_of_every_step() -> None:
    told: list[tuple[int, int]] = []
    result = learned(small(), steps=3, tell=lambda *done: told.append(done))
    total = 3 * len(result.blocks)
    assert told == [(step + 1, total) for step in range(total)]


def test_without_batches_the_codes_stay_and_it_is_said() -> None:
    network = small()
    start = rounded(network)
    result = reconstructed(network, start, {}, [], steps=5)
    assert all(torch.equal(result.weights[name].codes, start[name].codes) for name in start)
    assert "no data" in result.notes[0]


def test_names_that_the_network_has_not_are_refused() -> None:
    network = small()
    with pytest.raises(UsageError, match=r"conv9 is no site of the network"):
        reconstructed(network, {"conv9": rounded(network)["stem"]}, {}, [images(2)], steps=1)
    with pytest.raises(UsageError, match=r"relu_99 is no value of the network"):
        reconstructed(network, {}, {"relu_99": UINT8.parameters(0, 1)}, [images(2)], steps=1)


def test_batches_are_cut_into_pieces_that_a_thread_can_hold() -> None:
    network = small()
    pieces = cut(network, [images(7), images(4)], rows=3, elements=1 << 20)
    assert [len(piece.tensors[0]) for piece in pieces] == [3, 3, 1, 3, 1]
    assert torch.equal(torch.cat([piece.tensors[0] for piece in pieces]), torch.cat([images(7), images(4)]))
    assert [len(piece.tensors[0]) for piece in cut(network, [images(5)], rows=3, elements=400)] == [2, 2, 1]
    fixed = capture(*case("a fixed batch"))
    assert [len(piece.tensors[0]) for piece in cut(fixed, [torch.randn(3, 4)], rows=2, elements=99)] == [3]


def test_an_element_is_rounded_where_the_mask_says_so() -> None:
    parameters = UINT8.parameters(-1.0, 2.0)
    x = torch.tensor([-3.0, -0.5, 0.012, 1.9, 7.0]).requires_grad_()
    every = dropped(x, parameters, None)
    assert torch.equal(every, parameters.round_trip(x.detach()))
    every.sum().backward()
    assert x.grad is not None
    # Straight through inside of the range, nothing outside.
    assert x.grad.tolist() == [0, 1, 1, 1, 0]
    x.grad = None
    some = dropped(x, parameters, torch.tensor([1.0, 0.0, 1.0, 0.0, 0.0]))
    expected = x.detach().clone()
    expected[[0, 2]] = every.detach()[[0, 2]]
    assert torch.equal(some, expected)
    (some * torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0])).sum().backward()
    assert x.grad.tolist() == [0, 2, 3, 4, 5]


def test_chance_is_what_it_says_and_the_generators_alone() -> None:
    shape = torch.Size((50, 41, 10))
    for probability in (0.25, 0.5, 0.9):
        masks = [chance(shape, probability, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)]
        first, again, other = (mask for mask in masks if mask is not None)
        assert torch.equal(first, again)
        assert not torch.equal(first, other)
        assert set(first.unique().tolist()) == {0.0, 1.0}
        # Five deviations of the mean of 20,500.
        assert float(first.mean()) == pytest.approx(probability, abs=0.018)
    assert chance(shape, 1.0, torch.Generator()) is None
    never = chance(shape, 0.0, torch.Generator())
    assert never is not None
    assert not never.any()


def test_an_early_value_that_is_read_again_much_later_arrives() -> None:
    """A U-Net: the values of a block are held as long as any block behind it reads them."""
    network = capture(UNet(), images(2))
    result = reconstructed(network, rounded(network), {}, [images(24)], steps=20)
    for name, error in block_errors(network, result, images(24)).items():
        assert result.blocks[name].after == pytest.approx(error, rel=CLOSE)


def test_a_linear_map_is_learned_as_its_solver_learns_it() -> None:
    """One site, one block: what comes out is at least as good as rounding to nearest in every output."""
    network = capture(nn.Sequential(nn.Linear(16, 8)), torch.randn(4, 16))
    x = torch.randn(64, 16) @ torch.randn(16, 16)
    start = rounded(network)
    result = reconstructed(network, start, {}, [x], steps=100)
    [block] = result.blocks.values()
    assert block.after < 0.7 * block.before
