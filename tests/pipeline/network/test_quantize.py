"""Whole networks, quantized after training."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from pennyweight.containers.onnx import edges_of, size_bytes
from pennyweight.core.errors import BudgetError, ContainerError, DataError, UsageError, WeightError
from pennyweight.models.network import Network, capture
from pennyweight.models.network.network import Inputs
from pennyweight.pipeline.network import (
    NetworkOptions,
    NetworkResult,
    budget_plan,
    prepare,
    problem_of,
    quantize_network,
)
from pennyweight.pipeline.network.moments import Moments
from pennyweight.pipeline.network.reconstruct import ReconstructionResult
from pennyweight.pipeline.network.rows import Reader
from pennyweight.pipeline.network.sites import SiteSolver
from pennyweight.plan.budget import parse_budget
from pennyweight.schemes import QuantizedWeight, parse_scheme
from pennyweight.solvers.base import Statistics
from pennyweight.solvers.gptq import Gptq
from pennyweight.solvers.nearest import Nearest
from tests.pipeline.network.subjects import KINDS, subject

INT4 = parse_scheme("int4-channel").with_scale_dtype(torch.float32)


def error_of(network: Network, result: NetworkResult, batches: list[Inputs]) -> float:
    """|y - ŷ|² / |y|² of the network's output."""
    rounded, away, total = result.quantized.simulated(), 0.0, 0.0
    with torch.no_grad():
        for batch in batches:
            y = network(batch)
            away += float((y - rounded(*batch.args)).square().sum())
            total += float(y.square().sum())
    return away / total


def same(one: Mapping[str, QuantizedWeight], other: Mapping[str, QuantizedWeight]) -> bool:
    return one.keys() == other.keys() and all(
        torch.equal(one[name].codes, other[name].codes) and torch.equal(one[name].scales, other[name].scales)
        for name in one
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "scheme", ["w8a8-channel", "w4a8-channel", "int4-channel", "w8a8-tensor", "w8a8-channel-dynamic"]
)
def test_every_site_gets_codes_and_every_edge_a_range(kind: str, scheme: str) -> None:
    network, batches = subject(kind)
    result = quantize_network(network, batches, NetworkOptions(scheme=scheme, refine=0))
    names = [site.name for site in network.sites]
    assert list(result.quantized.weights) == names
    assert list(result.sites) == names
    assert list(result.quantized.plan.schemes) == names
    edges = result.quantized.plan.edges
    assert set(result.quantized.activations) == (set() if scheme.endswith("dynamic") else set(edges))
    assert set(result.edges) == set(result.quantized.activations)
    # Dynamic ranges are those of what enters linear maps.
    has_linear = any(site.kind == "linear" for site in network.sites)
    assert bool(edges) == ("a8" in scheme and (has_linear or "dynamic" not in scheme))
    allowed = 0.02 if "8-" in scheme.split("a")[0] or scheme.startswith("w8") else 0.15
    assert error_of(network, result, batches) < allowed


@pytest.mark.parametrize("kind", KINDS)
def test_nearest_without_data_is_nearest(kind: str) -> None:
    network, _ = subject(kind)
    result = quantize_network(network, [], NetworkOptions(scheme="int4-channel"))
    for site in network.sites:
        w = site.matrix(network.weight(site).detach())
        assert torch.equal(
            result.quantized.weights[site.name].codes, Nearest().solve(w, INT4, Statistics()).weight.codes
        )
        assert result.sites[site.name].output_error is None


@pytest.mark.parametrize("kind", KINDS)
def test_solving_beats_nearest_in_the_network(kind: str) -> None:
    network, batches = subject(kind, batches=8)
    errors = [
        error_of(
            network, quantize_network(network, batches, NetworkOptions(scheme="int3-channel", effort=effort)), batches
        )
        if effort
        else error_of(network, quantize_network(network, [], NetworkOptions(scheme="int3-channel")), batches)
        for effort in (None, "fast")
    ]
    assert errors[1] < 0.7 * errors[0]


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_seed_gives_the_same_codes(kind: str) -> None:
    network, batches = subject(kind)
    options = NetworkOptions(scheme="w4a8-channel", refine=0)
    one, other = (quantize_network(network, batches, options) for _ in range(2))
    assert same(one.quantized.weights, other.quantized.weights)
    assert one.quantized.activations == other.quantized.activations
    assert one.sites == other.sites


def test_the_network_that_is_given_stays_as_it_is() -> None:
    network, batches = subject("pictures")
    before = {name: tensor.clone() for name, tensor in network.graph.state_dict().items()}
    code = network.graph.code
    quantize_network(network, batches, NetworkOptions(scheme="w8a8-tensor", effort="fast"))
    assert network.graph.code == code
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.graph.state_dict().items())


def test_memory_that_is_full_changes_nothing() -> None:
    network, batches = subject("pictures")
    small, large = (
        quantize_network(network, batches, NetworkOptions(scheme="w4a8-channel", memory_bytes=size, refine=0))
        for size in (1, 1 << 30)
    )
    assert same(small.quantized.weights, large.quantized.weights)
    assert small.quantized.activations == large.quantized.activations


def test_sites_that_are_kept_stay_in_float() -> None:
    network, batches = subject("pictures")
    options = NetworkOptions(
        scheme="w4a8-channel", keep=("head",), at=("*conv*=int8-channel", "gr*=int8-channel"), effort="fast"
    )
    with pytest.raises(UsageError, match="conv.*no site is called so"):
        quantize_network(network, batches, options)
    options = NetworkOptions(scheme="w4a8-channel", keep=("head",), at=("gr*=int8-channel",), effort="fast")
    plan = quantize_network(network, batches, options).quantized.plan
    assert plan.kept == {"head": "--keep head"}
    assert plan.schemes["grouped"].name == "int8-channel-f32"
    assert plan.schemes["stem"] == INT4
    assert set(plan.edges) == {edge.value for edge in edges_of(network, sites=set(plan.schemes))}


def test_both_ends_can_have_a_scheme_of_their_own() -> None:
    network, batches = subject("pictures")
    result = quantize_network(
        network, batches, NetworkOptions(scheme="int2-channel", ends="int8-channel", effort="fast")
    )
    names = {name: scheme.element.bits for name, scheme in result.quantized.plan.schemes.items()}
    assert names == {"stem": 8, "depthwise": 2, "grouped": 2, "down": 2, "head": 8}


def test_groups_that_do_not_divide_are_smaller_and_that_is_said() -> None:
    network, batches = subject("pictures")
    plan = quantize_network(network, batches, NetworkOptions(scheme="int4-g32", effort="fast")).quantized.plan
    assert plan.schemes["down"].name == "int4-g24-f32"
    assert "groups of 32 do not divide 72" in plan.changed["down"]


def test_what_the_container_refuses_is_an_error_where_it_was_asked_for() -> None:
    network, batches = subject("pictures")
    with pytest.raises(ContainerError, match="stem cannot be nf4"):
        quantize_network(network, batches, NetworkOptions(at=("stem=nf4-channel",)))


def test_a_weight_that_is_nan_is_named() -> None:
    network, batches = subject("pictures")
    network = network.copied()
    with torch.no_grad():
        network.graph.get_parameter("down.weight")[0, 0, 0, 0] = torch.nan
    with pytest.raises((WeightError, DataError), match="down"):
        quantize_network(network, batches, NetworkOptions(scheme="int4-channel", effort="fast"))


class Divided(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.one(x)
        return self.two(y / x.sum(1, keepdim=True))


def test_a_value_that_is_nan_is_named() -> None:
    x = torch.randn(4, 4)
    network = capture(Divided(), x)
    with torch.no_grad():
        network.graph.get_submodule("one").bias.zero_()
    with pytest.raises(DataError, match="div: .* NaN in calibration batch 1"):
        quantize_network(network, [Inputs((x,)), Inputs((torch.zeros(4, 4),))], NetworkOptions(scheme="int4-channel"))


def test_a_network_without_weights_is_refused() -> None:
    network = capture(nn.ReLU(), torch.randn(2, 3))
    with pytest.raises(UsageError, match="nothing can be quantized"):
        quantize_network(network, [Inputs((torch.randn(2, 3),))], NetworkOptions())


def test_a_site_that_is_called_twice_is_calibrated_on_both_calls() -> None:
    network, batches = subject("repeated")
    result = quantize_network(network, batches, NetworkOptions(scheme="int4-channel", effort="fast"))
    tokens = sum(batch.args[0].numel() for batch in batches)
    assert result.sites["again"].rows == 2 * tokens
    # The tied head reads states, which say more than how often a token comes.
    assert result.sites["words"].rows == tokens
    assert result.sites["again"].bias_shift is None


def test_a_head_without_a_bias_gets_one_and_that_is_said() -> None:
    network, batches = subject("reader")
    result = quantize_network(network, batches, NetworkOptions(scheme="int2-channel", effort="fast"))
    if result.sites["head"].bias_shift is not None:
        assert result.sites["head"].notes == ("a bias was made for it",)
        assert result.quantized.network.graph.get_submodule("head").bias is not None
    assert network.graph.get_submodule("head").bias is None


def test_an_embedding_with_one_scale_counts_tokens_as_often_as_they_come() -> None:
    torch.manual_seed(0)

    class Words(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words = nn.Embedding(10, 16)

        def forward(self, tokens: Tensor) -> Tensor:
            made: Tensor = self.words(tokens)
            return made

    module = Words()
    with torch.no_grad():
        module.words.weight[9] *= 50
    common, rare = torch.arange(9).repeat(50)[None], torch.full((1, 450), 9)
    errors = {}
    for name, tokens in (("common", common), ("rare", rare)):
        network = capture(module, common[:, :8])
        options = NetworkOptions(scheme="int4-tensor", effort="fast", equalize=False)
        errors[name] = error_of(network, quantize_network(network, [Inputs((tokens,))], options), [Inputs((common,))])
    assert errors["common"] < 0.8 * errors["rare"]


@pytest.mark.parametrize("scheme", ["int4-channel", "w4a8-channel"])
def test_a_budget_is_kept_to_the_byte_and_larger_ones_lose_less(scheme: str) -> None:
    network, batches = subject("pictures")
    options = NetworkOptions(scheme=scheme, effort="fast")
    prepared = prepare(network, batches, options)
    problem = problem_of(prepared, batches, options)
    activation = options.network_scheme.activation
    last, sizes = float("inf"), [point.size_bytes for point in problem.frontier.points]
    for size in (sizes[0], sizes[len(sizes) // 2], sizes[-1]):
        budget = parse_budget(size=size)
        assert budget is not None
        plan = budget_plan(prepared, problem, budget, options)
        taken, cost = problem.of(plan)
        sites = sum(
            size_bytes(plan.schemes[site.name], site, activation=activation)
            if site.name in plan.schemes
            else network.weight(site).nbytes
            for site in network.sites
        )
        biases = sum(tensor.nbytes for name, tensor in network.graph.named_parameters() if name.endswith("bias"))
        assert taken == sites + biases <= size
        assert cost <= last
        assert bool(plan.edges) == (activation is not None and bool(plan.schemes))
        last = cost
    budget = parse_budget(size=sizes[0] - 1)
    assert budget is not None
    with pytest.raises(BudgetError, match=f"the smallest plan takes {sizes[0]:,} bytes"):
        budget_plan(prepared, problem, budget, options)


def test_a_budget_is_one_call_too() -> None:
    network, batches = subject("reader")
    result = quantize_network(
        network, batches, NetworkOptions(scheme="int8-channel", budget=parse_budget(bpw=14.0), effort="fast")
    )
    bits = {scheme.element.bits for scheme in result.quantized.plan.schemes.values()}
    assert len(bits) > 1


def test_costs_are_what_the_outputs_lose_with_one_site_changed() -> None:
    network, batches = subject("upsampler")
    options = NetworkOptions(scheme="int4-channel", solver="gptq", loss="error")
    problem = problem_of(prepare(network, batches, options), batches, options)
    others = [site.name for site in network.sites]
    for group in problem.groups:
        [name] = group.sites
        [cost] = [choice.cost for choice in group.choices if choice.scheme == INT4]
        alone = NetworkOptions(
            scheme="int4-channel", solver="gptq", keep=tuple(other for other in others if other != name)
        )
        assert cost == pytest.approx(error_of(network, quantize_network(network, batches, alone), batches), rel=1e-4)
        assert [choice.cost for choice in group.choices if choice.scheme is None] == [0.0]


@pytest.mark.parametrize("scheme", ["int3-channel", "w4a8-channel"])
@pytest.mark.parametrize("kind", ["pictures", "upsampler"])
def test_every_site_is_solved_on_what_it_reads_in_the_network_that_comes_out(kind: str, scheme: str) -> None:
    network, batches = subject(kind)
    result = quantize_network(network, batches, NetworkOptions(scheme=scheme, effort="fast"))
    module = result.quantized.simulated()
    inputs = {site.name: inputs_of(module, site.nodes[0], batches) for site in network.sites}
    for site in network.sites:
        reader, groups = Reader(network.graph.get_submodule(site.name)), site.groups
        rows = [reader.rows(x, reader.draw(x, torch.Generator())) for x in inputs[site.name]]
        every = torch.cat(rows, 1)
        moments = Moments(every.transpose(1, 2) @ every / every.shape[1], None, every.shape[1])
        w = site.matrix(network.weight(site).detach())
        wanted = SiteSolver(Gptq()).solve(site, w, result.quantized.plan.schemes[site.name], moments).weight
        # Sums in another order may turn a tie.
        apart = (wanted.codes != result.quantized.weights[site.name].codes).float().mean()
        assert apart < 0.01, (site.name, groups)


def inputs_of(module: fx.GraphModule, name: str, batches: list[Inputs]) -> list[Tensor]:
    """What the node `name` reads in each batch."""
    found: list[Tensor] = []

    class Watching(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            if n.name == name:
                found.append(self.fetch_args_kwargs_from_env(n)[0][0])
            return super().run_node(n)

    with torch.no_grad():
        for batch in batches:
            Watching(module).run(*batch.args)
    return found


@pytest.mark.parametrize("scheme", ["int4-channel", "w4a8-channel", "w8a8-tensor"])
@pytest.mark.parametrize("kind", ["pictures", "reader"])
def test_the_error_of_the_last_site_is_that_of_the_network(kind: str, scheme: str) -> None:
    network, batches = subject(kind)
    result = quantize_network(network, batches, NetworkOptions(scheme=scheme, effort="fast", equalize=False))
    assert result.sites["head"].output_error == pytest.approx(error_of(network, result, batches), rel=1e-3)


def test_blocks_that_learned_what_does_not_hold_elsewhere_keep_their_codes(monkeypatch: pytest.MonkeyPatch) -> None:
    network, batches = subject("pictures", batches=8)
    normal = quantize_network(network, batches, NetworkOptions(scheme="int4-channel"))
    seen: list[int] = []

    def spoiled(network: Network, weights: Any, activations: Any, batches: Any, **_: Any) -> ReconstructionResult:
        seen.append(len(batches))
        codes = {name: replace(weight, codes=torch.zeros_like(weight.codes)) for name, weight in weights.items()}
        return ReconstructionResult(codes, activations, {})

    monkeypatch.setattr("pennyweight.pipeline.network.quantize.reconstructed", spoiled)
    result = quantize_network(network, batches, NetworkOptions(scheme="int4-channel", refine=5))
    assert seen == [6]
    assert same(result.quantized.weights, normal.quantized.weights)
    assert "learned rounding of blocks was left out" in result.notes[-1]


def test_blocks_that_learned_something_are_taken() -> None:
    network, batches = subject("pictures", batches=24)
    options = {"scheme": "int2-channel", "solver": "nearest", "correct_bias": True}
    nearest = quantize_network(network, batches, NetworkOptions(**options))
    result = quantize_network(network, batches, NetworkOptions(**options, refine=100))
    assert result.blocks
    assert all(block.after <= block.before for block in result.blocks.values())
    assert error_of(network, result, batches) < error_of(network, nearest, batches)
    assert list(result.seconds) == ["ranges", "weights", "blocks", "biases"]
