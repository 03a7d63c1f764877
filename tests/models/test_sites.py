"""What is a site, and what is not: routers, shared weights, matrices that are made while loading."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from pennyweight.models.sites import Place, find_sites
from pennyweight.models.streamed import StreamedModel
from pennyweight.models.weight_map import Source
from tests.models.families import FAMILIES, build, save

WIDTH = 8


class Linears(nn.Module):
    """Experts kept as [experts, out, in], each called as a linear map."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.zeros(3, 6, WIDTH))

    def forward(self, x: Tensor, expert: int) -> Tensor:
        return nn.functional.linear(x, self.up[expert])


class Products(Linears):
    """Experts kept as [experts, in, out], multiplied at once."""

    def forward(self, x: Tensor, expert: int) -> Tensor:
        return torch.bmm(x, self.up)


class Riddles(Linears):
    """Experts of which it can't be seen how they are kept."""

    def forward(self, x: Tensor, expert: int) -> Tensor:
        return torch.einsum("eti,eoi->eto", x, self.up)


class Mixture(nn.Module):
    def __init__(self, experts: nn.Module) -> None:
        super().__init__()
        self.experts = experts
        self.gate = nn.Linear(WIDTH, 3)
        self.shared_expert_gate = nn.Linear(WIDTH, 1)
        self.router = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 3))
        self.up = nn.Linear(WIDTH, 5)


class Block(nn.Module):
    def __init__(self, experts: nn.Module) -> None:
        super().__init__()
        # As wide as there are experts, but it carries: no router.
        self.k_proj = nn.Linear(WIDTH, 3)
        self.mlp = Mixture(experts)


def sites_of(block: nn.Module, **sources: Source) -> Any:
    model = nn.Module()
    model.layers = nn.ModuleList([block])
    names = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    weights = SimpleNamespace(sources={name: sources.get(name, Source(keys=[name])) for name in names})
    return find_sites(model, ["layers.0"], weights)  # type: ignore[arg-type]


@pytest.mark.parametrize("experts", [Linears(), nn.ModuleList(nn.Linear(WIDTH, 6) for _ in range(3))])
def test_routers_are_no_sites_and_their_neighbours_are(experts: nn.Module) -> None:
    names = {site.name.removeprefix("layers.0.") for site in sites_of(Block(experts)).sites}
    assert {name for name in names if "experts" not in name} == {"k_proj", "mlp.up", "mlp.router.0"}
    assert len({name for name in names if "experts" in name}) == 3


@pytest.mark.parametrize(("experts", "shape"), [(Linears(), (6, WIDTH)), (Products(), (WIDTH, 6))])
def test_what_the_experts_call_says_how_they_are_kept(experts: nn.Module, shape: tuple[int, int]) -> None:
    found = sites_of(Block(experts))
    sites = [site for site in found.sites if site.kind == "expert"]
    assert [site.shape for site in sites] == [shape] * 3
    assert [site.transposed for site in sites] == [isinstance(experts, Products)] * 3
    assert [(site.tensor, site.index) for site in sites] == [("layers.0.mlp.experts.up", index) for index in range(3)]


def test_experts_of_which_it_cannot_be_seen_how_they_are_kept_are_refused_by_name() -> None:
    found = sites_of(Block(Riddles()))
    assert not [site for site in found.sites if site.kind == "expert"]
    assert "cannot be seen" in found.refused["layers.0.mlp.experts.up"]


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("rows", [None, (2, 5)])
def test_a_place_is_a_view_into_the_parameter(*, transposed: bool, rows: tuple[int, int] | None) -> None:
    parameter = torch.arange(3 * 6 * 7.0).reshape(3, 6, 7)
    view = Place("w", 1, rows, transposed=transposed).view(parameter)
    expected = parameter[1].T if transposed else parameter[1]
    assert torch.equal(view, expected if rows is None else expected[slice(*rows)])
    view.zero_()
    assert parameter[1].count_nonzero() == (0 if rows is None else 42 - view.numel())
    assert parameter[0].count_nonzero() == 41


def test_a_matrix_that_is_split_while_loading_is_refused_with_its_source(tmp_path: Path) -> None:
    save(build("NomicBertModel", FAMILIES["bert"].config), tmp_path)
    model = StreamedModel(tmp_path)
    split = [f"layers.{block}.self_attn.{name}_proj" for block in range(2) for name in "qkv"]
    assert sorted(model.refused) == sorted(split)
    for name in split:
        assert f"encoder.layers.{name.split('.')[1]}.attn.Wqkv.weight" in model.refused[name]
    assert {site.tensor for site in model.sites} <= load_file(tmp_path / "model.safetensors").keys()


def test_experts_in_a_shape_of_their_own_are_kept_and_named(tmp_path: Path) -> None:
    shape = {"vocab_size": 100, "d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 64}
    attention = {"kv_n_heads": 2, "clip_qkv": 8, "rope_theta": 1e4}
    experts = {"ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2, "hidden_size": 32}
    save(build("DbrxForCausalLM", {**shape, "attn_config": attention, "ffn_config": experts}), tmp_path)
    refused = StreamedModel(tmp_path).refused
    assert {name.rpartition(".")[2] for name in refused} == {"w1", "v1", "w2"}
    assert len(refused) == 6
