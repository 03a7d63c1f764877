"""Batch norms that are folded while they are trained."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as f
from torch import Tensor, nn

from pennyweight.models.network import capture, fold_batch_norms
from pennyweight.train.qat.finish import finish
from pennyweight.train.qat.norms import freeze_norms, reestimate_norms
from pennyweight.train.qat.prepare import prepare
from pennyweight.train.qat.prepared import prepared_norms, trained_sites
from pennyweight.train.qat.weights import WeightRounding
from tests.train.qat.nets import Small, pictures, small, used

# float32 sums in another order, through five layers.
CLOSE = 2e-4


def unrounded(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if isinstance(module, WeightRounding):
            module.is_enabled = False
    return model


def paired(net: nn.Module, model: nn.Module) -> list[tuple[Tensor, Tensor]]:
    """Gradients of the same parameters."""
    mine = dict(model.named_parameters())
    return [(one.grad, mine[name].grad) for name, one in net.named_parameters()]


@pytest.mark.parametrize("scheme", ["int4-channel", "int4-tensor"])
def test_without_rounding_training_is_that_of_the_network_itself(scheme: str) -> None:
    """Outputs, gradients and running statistics of one step in train mode; a gamma of 0 included."""
    net = small().train()
    model = unrounded(prepare(net, scheme, example=pictures()))
    x = pictures(seed=5)
    for module in (net, model):
        module(x).square().sum().backward()
    torch.testing.assert_close(model(x), net(x), rtol=CLOSE, atol=CLOSE)
    for theirs, mine in paired(net, model):
        torch.testing.assert_close(mine, theirs, rtol=CLOSE, atol=CLOSE * float(theirs.abs().max()) + 1e-5)
    mine = dict(model.named_buffers())
    for name, buffer in net.named_buffers():
        if "running" in name:
            torch.testing.assert_close(mine[name], buffer, rtol=CLOSE, atol=CLOSE)


def test_a_rounded_site_is_the_formula_of_its_docstring() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3, stride=2), nn.BatchNorm2d(4))
    used(net)
    conv, norm = net
    assert isinstance(conv, nn.Conv2d)
    assert isinstance(norm, nn.BatchNorm2d)
    model, twin = (prepare(net, "int3-tensor", example=pictures()) for _ in range(2))
    [trained] = trained_sites(model)
    factor = (norm.weight / (norm.running_var + norm.eps).sqrt()).detach()
    folded = conv.weight.detach() * factor[:, None, None, None]
    step = trained.rounding.unit
    rounded = (folded / step).round().clamp(-4, 3) * step
    x = pictures(seed=3)
    safe = torch.where(factor == 0, 1, factor)
    y = f.conv2d(x, rounded, stride=2) / safe[:, None, None] + conv.bias.detach()[:, None, None]
    torch.testing.assert_close(model.train()(x), copy.deepcopy(norm).train()(y), rtol=1e-4, atol=1e-5)
    bias = norm.bias + (conv.bias - norm.running_mean) * factor
    torch.testing.assert_close(twin.eval()(x), f.conv2d(x, rounded, bias, stride=2), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("scheme", ["int2-channel", "int2-g9", "int2-tensor"])
def test_training_rounds_to_the_codes_that_are_deployed_where_gamma_is_negative_too(scheme: str) -> None:
    """Two bits reach further on one side of 0 than on the other."""
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).eval()
    used(net)
    conv, norm = net
    with torch.no_grad():
        norm.weight.copy_(torch.tensor([-1.0, 0.5, -0.2, 2.0]))
    model = prepare(net, scheme, example=pictures())
    deployed = finish(model).weights["0"].dequantize().reshape(4, 3, 3, 3)
    factor = norm.weight / (norm.running_var + norm.eps).sqrt()
    y = f.conv2d(pictures(seed=3), deployed / factor[:, None, None, None], conv.bias)
    torch.testing.assert_close(model.train()(pictures(seed=3)), norm.train()(y), rtol=1e-4, atol=1e-4)


def test_codes_do_not_depend_on_running_statistics_where_scales_belong_to_rows() -> None:
    model = prepare(small(), "int4-channel", example=pictures())
    before = finish(model)
    for norm in prepared_norms(model).values():
        norm.tensors.variance.mul_(torch.rand_like(norm.tensors.variance) * 3 + 0.2)
    after = finish(model)
    for name, weight in before.weights.items():
        assert torch.equal(weight.codes, after.weights[name].codes)
    assert not torch.equal(before.weights["stem"].scales, after.weights["stem"].scales)


def test_a_frozen_norm_keeps_its_statistics_and_computes_in_training_what_it_does_in_eval() -> None:
    model = prepare(small(), "w4a8-channel", example=pictures())
    state = copy.deepcopy(model.state_dict())
    freeze_norms(model)
    trained = model.train()(pictures(seed=4))
    assert torch.equal(trained, model.eval()(pictures(seed=4)))
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    freeze_norms(model, is_frozen=False)
    assert not torch.equal(trained, model.train()(pictures(seed=4)))


def test_gradients_reach_gamma_and_beta_of_a_frozen_norm() -> None:
    model = prepare(small(), "int4-channel", example=pictures())
    freeze_norms(model)
    model.train()(pictures()).square().sum().backward()
    norm = prepared_norms(model)["block.bn1"]
    assert norm.tensors.gamma is not None
    assert norm.tensors.gamma.grad is not None
    assert norm.tensors.gamma.grad.abs().max() > 0


def test_estimated_statistics_are_those_of_all_batches_together() -> None:
    """For the first norms, whose input does not depend on other norms: the mean and unbiased variance of all pixels."""
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).eval()
    used(net)
    model = prepare(net, "int4-channel", example=pictures())
    batches = [pictures(5, 1), pictures(12, 2), pictures(3, 3)]
    before = finish(model)
    reestimate_norms(model, batches)
    matrix = before.weights["0"].dequantize()
    [trained] = trained_sites(prepare(net, "int4-channel", example=pictures()))
    assert trained.rows is not None
    sign = torch.where(net[1].weight < 0, -1, 1)
    y = f.conv2d(torch.cat(batches), (matrix / (trained.rows * sign)[:, None]).reshape(4, 3, 3, 3), net[0].bias)
    norm = prepared_norms(model)["1"].tensors
    # What is deployed of the channel that is switched off is 0.
    on = net[1].weight != 0
    torch.testing.assert_close(norm.mean[on], y.mean((0, 2, 3))[on], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(norm.variance[on], y.transpose(0, 1).flatten(1).var(1)[on], rtol=1e-4, atol=1e-5)
    after = finish(model)
    assert torch.equal(after.weights["0"].codes, before.weights["0"].codes)


def test_the_cut_into_batches_does_not_matter_to_the_first_norm() -> None:
    whole, cut = (prepare(small(), "int4-channel", example=pictures()) for _ in range(2))
    reestimate_norms(whole, [pictures(12)])
    reestimate_norms(cut, list(pictures(12).split(5)))
    one, other = (prepared_norms(model)["lone"].tensors for model in (whole, cut))
    torch.testing.assert_close(one.mean, other.mean, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(one.variance, other.variance, rtol=1e-6, atol=1e-7)


def test_estimating_leaves_modes_and_parameters_alone() -> None:
    model = prepare(small(dropout=0.5), "w8a8-channel", example=pictures())
    model.block.eval()
    modes = [module.training for module in model.modules()]
    parameters = {name: tensor.clone() for name, tensor in model.named_parameters()}
    reestimate_norms(model, [pictures()])
    assert modes == [module.training for module in model.modules()]
    assert all(torch.equal(tensor, parameters[name]) for name, tensor in model.named_parameters())


def test_a_norm_that_averages_over_all_batches_still_follows_them() -> None:
    net = Small()
    net.norm.momentum = None
    model = prepare(net.eval(), "int4-channel", example=pictures())
    before = prepared_norms(model)["norm"].tensors.mean.clone()
    model.train()(pictures())
    assert not torch.equal(before, prepared_norms(model)["norm"].tensors.mean)


def test_values_keep_the_names_of_the_folded_network() -> None:
    net = small()
    model = prepare(net, "int4-channel", example=pictures())

    folded = {
        node.name for node in fold_batch_norms(capture(net, pictures())).graph.graph.nodes if node.op != "get_attr"
    }
    assert folded <= {node.name for node in model.graph.nodes}
