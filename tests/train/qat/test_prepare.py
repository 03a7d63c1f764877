"""Networks that are prepared for training."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pennyweight as pw
from pennyweight.core.errors import DataError, UsageError, WeightError
from pennyweight.models.network import capture
from pennyweight.plan.plan import Plan
from pennyweight.schemes import parse_scheme
from pennyweight.schemes.activation import ActivationScheme
from pennyweight.train.qat.finish import finish
from pennyweight.train.qat.options import QatOptions
from pennyweight.train.qat.prepare import prepare
from pennyweight.train.qat.prepared import activation_roundings, preparation_of, trained_sites
from tests.models.network.zoo import CASES, case
from tests.train.qat.nets import SCHEMES, Tagger, labelled, pictures, small

pytestmark = [
    # A module that the zoo has on purpose.
    pytest.mark.filterwarnings("ignore:LSTM with projections:UserWarning"),
    # Of torch about how it copies the structure of inputs.
    pytest.mark.filterwarnings("ignore:.isinstance.treespec, LeafSpec:FutureWarning"),
]


def trained(model: nn.Module, steps: int = 3) -> nn.Module:
    """A few steps with a large rate: codes, scales and statistics change."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for x, labels in labelled(steps):
        nn.functional.cross_entropy(model(x), labels).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


@pytest.mark.parametrize("scheme", SCHEMES)
def test_what_is_finished_computes_what_the_trained_network_does_bit_for_bit(scheme: str) -> None:
    model = trained(prepare(small(), scheme, example=pictures())).eval()
    x = pictures(seed=8)
    simulated = finish(model).simulated()
    with torch.no_grad():
        assert torch.equal(simulated(x), model(x))
        assert not torch.equal(model(x), small()(x))


@pytest.mark.parametrize("scheme", ["int4-channel", "w8a8-tensor", "w8a8-channel-dynamic"])
@pytest.mark.parametrize("name", sorted(CASES))
def test_every_kind_of_network_is_trained_and_finished(name: str, scheme: str) -> None:
    net, example = case(name)
    network = capture(net, example)
    if not network.sites:
        with pytest.raises(UsageError, match="nothing to quantize"):
            prepare(net, scheme, example=example)
        return
    model = prepare(net, scheme, example=example)
    given = network.inputs(example)
    outputs = leaves(model(*given.args, **given.kwargs))
    # Dropout, and norms of a batch of one, leave some of these without a gradient.
    sum(one.float().square().sum() for one in outputs if one.requires_grad).backward()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter -= 0.01 * parameter.grad.nan_to_num(0, 0, 0).clamp(-1, 1)
    model.eval()
    simulated = finish(model).simulated()
    torch.manual_seed(0)
    mine = leaves(model(*given.args, **given.kwargs))
    torch.manual_seed(0)
    for one, other in zip(mine, leaves(simulated(*given.args, **given.kwargs)), strict=True):
        assert torch.equal(one, other)


def leaves(outputs: Any) -> list[Tensor]:
    return [one for one in torch.utils._pytree.tree_leaves(outputs) if isinstance(one, Tensor)]


def test_weights_keep_their_names() -> None:
    net = small()
    model = prepare(net, "w4a8-channel", example=pictures())
    names = {name for name in net.state_dict() if "num_batches" not in name}
    assert names <= set(model.state_dict())
    model.load_state_dict({name: net.state_dict()[name] for name in names}, strict=False)


def test_the_network_that_was_given_is_not_changed() -> None:
    net = small().train()
    before = copy.deepcopy(net.state_dict())
    trained(prepare(net, "w4a8-channel", example=pictures()))
    assert net.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())


@pytest.mark.parametrize("scheme", ["int3-channel-f16", "w4a8-tensor-asym"])
def test_a_state_dict_carries_everything_that_was_trained(scheme: str) -> None:
    model = trained(prepare(small(), scheme, example=pictures()))
    other = prepare(small(), scheme, example=pictures(seed=9))
    assert not torch.equal(other.eval()(pictures()), model.eval()(pictures()))
    missing, unexpected = other.load_state_dict(model.state_dict())
    assert (missing, unexpected) == ([], [])
    assert torch.equal(other.eval()(pictures()), model.eval()(pictures()))
    for name, weight in finish(model).weights.items():
        assert torch.equal(weight.codes, finish(other).weights[name].codes)


def test_a_copy_is_trained_by_itself() -> None:
    model = prepare(small(), "w4a8-channel", example=pictures())
    twin = copy.deepcopy(model)
    assert list(twin.state_dict()) == list(model.state_dict())
    before = model.eval()(pictures())
    trained(twin.train())
    assert torch.equal(model.eval()(pictures()), before)
    assert torch.equal(finish(twin).simulated()(pictures()), twin.eval()(pictures()))


# What "aot_eager" computes in another order, rounding of activations may turn into a step's difference. It computes
# things again for the backward pass, when running statistics have changed.
@pytest.mark.parametrize(
    ("backend", "scheme"), [("eager", "w4a8-channel"), ("aot_eager", "int4-channel"), ("aot_eager", "int3-tensor")]
)
# Of torch's own compiler.
@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_a_compiled_network_trains_alike(backend: str, scheme: str) -> None:
    """In one graph, without breaks; frozen codes included, which change between its calls."""
    torch._dynamo.reset()
    model = prepare(small(), scheme, example=pictures())
    twin = copy.deepcopy(model)
    compiled = torch.compile(twin, backend=backend, fullgraph=True)
    for place in range(2):
        outputs = [one(pictures(seed=place)) for one in (model, compiled)]
        torch.testing.assert_close(outputs[0], outputs[1], rtol=1e-5, atol=1e-5)
        for output in outputs:
            output.square().sum().backward()
        for mine, theirs in zip(twin.parameters(), model.parameters(), strict=True):
            torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-3, atol=1e-4)
        for one in (model, twin):
            next(iter(trained_sites(one))).rounding.history.fixed[0] = 3  # type: ignore[union-attr]
    assert torch.equal(finish(compiled).weights["head"].codes, finish(twin).weights["head"].codes)


def test_bfloat16_autocast_trains() -> None:
    model = prepare(small(), "w4a8-channel", example=pictures())
    with torch.autocast("cpu", torch.bfloat16):
        output = model(pictures())
    assert output.dtype == torch.bfloat16
    output.float().square().sum().backward()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in model.parameters())
    exact = prepare(small(), "w4a8-channel", example=pictures())(pictures())
    # Numbers of 8 bits through five layers.
    assert (output.float() - exact).abs().max() < 0.1 * exact.abs().max()


def test_accumulated_gradients_are_those_of_the_big_batch_once_norms_stand_still() -> None:
    big, parts = (prepare(small(), "w4a8-channel", example=pictures()) for _ in range(2))
    for model in (big, parts):
        pw.train.freeze_norms(model)
    x = pictures(16)
    big(x).square().mean().backward()
    for part in x.split(4):
        (parts(part).square().mean() / 4).backward()
    for one, other in zip(big.parameters(), parts.parameters(), strict=True):
        assert one.grad is not None
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-4, atol=1e-5 * float(one.grad.abs().max()) + 1e-9)


def test_a_tied_embedding_is_rounded_once_and_a_recurrent_weight_in_the_graph() -> None:
    net = Tagger()
    tokens = torch.randint(0, 11, (3, 6))
    model = prepare(net, "int4-channel", example=tokens)
    assert set(preparation_of(model).roundings) == {"embed", "memory.weight_ih_l0", "memory.weight_hh_l0"}
    model(tokens).square().sum().backward()
    assert all(one.rounding.step.grad is not None for one in trained_sites(model))
    quantized = finish(model)
    assert torch.equal(quantized.simulated()(tokens), model.eval()(tokens))
    assert quantized.weights["embed"].codes.shape == (11, 8)


def test_edges_that_only_move_numbers_share_a_step() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(4, 4, 2))
    model = prepare(net, "w8a8-channel", example=pictures())
    quantized = finish(trained_pictures(model))
    assert quantized.activations["max_pool2d"] == quantized.activations["relu"]
    assert "max_pool2d" not in activation_roundings(model)


def trained_pictures(model: nn.Module) -> nn.Module:
    model(pictures()).square().sum().backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    return model


def test_a_zero_point_is_learnt_only_where_there_are_numbers_below_zero() -> None:
    roundings = activation_roundings(prepare(small(), "w8a8-channel", example=pictures()))
    assert roundings["relu"].offset is None
    assert roundings["batch_norm"].offset is not None


def test_ranges_start_from_calibration() -> None:
    wide = prepare(small(), "w8a8-channel", calibration=[(3 * pictures(), torch.zeros(12)), (pictures(), None)])
    narrow = prepare(small(), "w8a8-channel", example=pictures())
    scales = [activation_roundings(model)["relu"].parameters_.scale for model in (wide, narrow)]
    assert scales[0] > 1.5 * scales[1]


def test_sites_can_be_kept_and_given_other_schemes() -> None:
    model = prepare(
        small(), "int4-channel", example=pictures(), keep=["block.*"], at=["head=int8-channel"],
        options=QatOptions(ends="int6-channel"),
    )  # fmt: skip
    quantized = finish(model)
    names = {name: weight.scheme.name for name, weight in quantized.weights.items()}
    assert names == {"stem": "int6-channel-f32", "head": "int8-channel-f32"}
    assert set(quantized.plan.kept) == {"block.conv1", "block.conv2"}
    assert quantized.plan.changed["stem"] == "int6-channel-f32 in place of int4-channel-f32: ends=int6-channel"
    assert torch.equal(quantized.simulated()(pictures()), model.eval()(pictures()))


def test_a_plan_is_followed() -> None:
    plan = Plan({"head": parse_scheme("int4-channel-f32")}, {"stem": "why not"}, edges={"mean": ActivationScheme()})
    quantized = finish(prepare(small(), plan, example=pictures()))
    assert set(quantized.weights) == {"head"}
    assert set(quantized.activations) == {"mean"}
    assert quantized.plan is plan


@pytest.mark.parametrize("start", ["search", "minmax", "lsq"])
def test_scales_start_as_is_asked(start: Any) -> None:
    model = prepare(nn.Linear(8, 3), "int4-channel", example=torch.randn(2, 8), options=QatOptions(start=start))
    [site] = trained_sites(model)
    w, scale = site.matrix.detach(), finish(model).weights[site.site.name].scales[:, 0]
    wanted = {"lsq": 2 * w.abs().mean(1) / 7**0.5, "minmax": torch.maximum(w.amax(1) / 7, -w.amin(1) / 8)}
    assert {name: torch.allclose(scale, one) for name, one in wanted.items()} == {
        name: name == start for name in wanted
    }


@pytest.mark.parametrize("name", ["int4-channel", "int2-tensor", "nf4-channel", "w3a8-channel-asym"])
def test_training_goes_on_from_the_codes_of_a_quantized_network(name: str) -> None:
    start = finish(trained(prepare(small(), name, example=pictures())))
    again = finish(prepare(start, calibration=[pictures()]))
    for site, weight in start.weights.items():
        assert torch.equal(weight.codes, again.weights[site].codes)
        assert torch.equal(weight.dequantize(), again.weights[site].dequantize())
    assert dict(again.activations) == dict(start.activations)
    assert torch.equal(again.simulated()(pictures()), start.simulated()(pictures()))


def test_a_weight_without_elements_stays_in_float() -> None:
    class Empty(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.none = nn.Linear(4, 3), nn.Linear(4, 0)

        def forward(self, x: Tensor) -> Tensor:
            return torch.cat((self.a(x), self.none(x)), 1)

    with warnings.catch_warnings():
        # Of torch about the start of a weight without elements.
        warnings.simplefilter("ignore")
        net = Empty()
    assert finish(prepare(net, "int4-channel", example=torch.randn(2, 4))).plan.kept == {"none": "it has no weights"}


def test_a_group_that_does_not_fit_becomes_smaller_and_the_plan_says_so() -> None:
    plan = finish(prepare(small(), "int4-g4", example=pictures())).plan
    assert plan.schemes["stem"].name == "int4-g3-f32"
    assert "groups of 4" in plan.changed["stem"]


def test_what_cannot_be_prepared_is_named() -> None:
    net, x = small(), pictures()
    with pytest.raises(UsageError, match="give example= a batch, or calibration="):
        prepare(net, "int4-channel")
    with pytest.raises(UsageError, match="no scheme was given"):
        prepare(net, example=x)
    with pytest.raises(UsageError, match="'int9' is not one of the formats"):
        prepare(net, "int9-channel", example=x)
    with pytest.raises(UsageError, match="q4_k .*which are not learnt here"):
        prepare(net, "q4_k", example=x)
    with pytest.raises(UsageError, match="--keep \\*.conv3: no site"):
        prepare(net, "int4-channel", example=x, keep=["*.conv3"])
    with pytest.raises(UsageError, match="site 'heads' .* nearest name is 'head'"):
        prepare(net, Plan({"heads": parse_scheme("int4-channel-f32")}), example=x)
    with pytest.raises(UsageError, match="edge 'relu_77' .* nearest name is 'relu"):
        prepare(net, Plan({}, edges={"relu_77": ActivationScheme()}), example=x)
    with pytest.raises(DataError, match="calibration yields no batches"):
        prepare(net, "w8a8-channel", calibration=[])
    with pytest.raises(DataError, match="calibration batch 1: .*NaN"):
        prepare(net, "w8a8-channel", calibration=[x, x * torch.nan])
    with pytest.raises(UsageError, match="Small was not made by pw.train.prepare"):
        finish(net)
    with torch.no_grad():
        net.head.weight[0, 0] = torch.nan
    with pytest.raises(WeightError, match=r"head\.weight"):
        prepare(net, "int4-channel", example=x)


def test_weights_that_training_has_ruined_are_named() -> None:
    model = prepare(small(), "int4-channel", example=pictures())
    with torch.no_grad():
        model.get_parameter("block.conv1.weight")[0] = torch.inf
    with pytest.raises(WeightError, match=r"block\.conv1\.weight has become NaN or infinite in training: lower"):
        finish(model)
