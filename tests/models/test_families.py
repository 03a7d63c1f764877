"""Every family of models: found, run block by block as transformers runs it whole, and observed."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from pennyweight.models.base import Site
from pennyweight.models.streamed import StreamedModel
from pennyweight.pipeline.collect import SiteStatistics, Streams, collect, collect_given
from tests.models.families import BLOCKS, FAMILIES, VOCABULARY, WIDTH, Family, build, save, token_batches

# Products of float32 by two libraries (oneDNN here, BLAS there) that add up in different orders: a few units in the
# last place of the largest output, which passes through two blocks.
OUTPUT_TOLERANCE = 2e-6
# The Hessian is a float32 sum over a few hundred rows, and its inputs differ as the outputs above do.
HESSIAN_TOLERANCE = 1e-5
BATCHES = (6, 5)


@dataclass
class Case:
    """A family's model, whole and streamed, and what both showed on the same windows."""

    family: Family
    directory: Path
    streamed: StreamedModel
    plain: nn.Module
    found: dict[str, SiteStatistics]
    outputs: list[tuple[Tensor, Tensor]]
    inputs: dict[str, Tensor]
    routed: dict[str, list[Tensor]] = field(default_factory=dict)

    @property
    def tokens(self) -> int:
        return sum(ours.shape[0] * ours.shape[1] for ours, _ in self.outputs)


@pytest.fixture(scope="module", params=FAMILIES)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    family = FAMILIES[request.param]
    plain = build(family.architecture, family.config)
    directory = save(plain, tmp_path_factory.mktemp(request.param))
    streamed = StreamedModel(directory)
    batches = token_batches(BATCHES)
    found, ours = run_streamed(streamed, batches)
    inputs, routed, theirs = run_plain(plain, batches)
    return Case(family, directory, streamed, plain, found, list(zip(ours, theirs, strict=True)), inputs, routed)


def run_streamed(streamed: StreamedModel, batches: list[Tensor]) -> tuple[dict[str, SiteStatistics], list[Tensor]]:
    stream = streamed.start(batches)
    found: dict[str, SiteStatistics] = {}
    for index in range(len(streamed.blocks)):
        with streamed.opened(index) as block:
            found |= collect(streamed, block, streamed.sites_of(index), Streams(stream))
            stream.hidden = streamed.run_block(block, index, stream)
    with streamed.finishing(stream) as finish:
        outputs = [finish(batch) for batch in range(len(batches))]
    if streamed.head is not None:
        streamed.enter_head(stream)
        found[streamed.head.name] = collect_given(streamed.head, Streams(stream))
    return found, outputs


def run_plain(
    plain: nn.Module, batches: list[Tensor]
) -> tuple[dict[str, Tensor], dict[str, list[Tensor]], list[Tensor]]:
    """Inputs of linear modules [tokens, in], inputs of each expert [tokens, in], and outputs; by forward hooks."""
    inputs: dict[str, list[Tensor]] = {}
    routed: dict[str, list[Tensor]] = {}
    hooks = []
    for name, module in plain.named_modules():
        if isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D":
            hooks.append(module.register_forward_pre_hook(_keep(inputs.setdefault(name, []))))
        elif name.endswith("experts") and any(p.ndim == 3 for p in module.parameters(recurse=False)):
            hooks.append(module.register_forward_pre_hook(_route(routed, name), with_kwargs=True))
    with torch.no_grad():
        outs = [plain(input_ids=ids) for ids in batches]
    for hook in hooks:
        hook.remove()
    joined = {name: torch.cat(parts) for name, parts in inputs.items() if parts}
    return joined, routed, [getattr(out, "logits", getattr(out, "last_hidden_state", None)) for out in outs]


def _keep(parts: list[Tensor]) -> Any:
    def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        parts.append(args[0].detach().clone().flatten(0, -2).double())

    return hook


def _route(routed: dict[str, list[Tensor]], name: str) -> Any:
    """Rows of each expert, by the router's choice that is handed to the experts."""

    def hook(module: Any, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
        given = [*args, *kwargs.values()]
        count = next(p.shape[0] for p in module.parameters() if p.ndim == 3)
        x = given[0].detach().double()
        if len(given) == 1:  # Llama 4: every expert gets every token, zeros where it wasn't chosen
            rows = [part[part.abs().sum(1) > 0] for part in x.reshape(count, -1, x.shape[-1])]
        else:
            x = x.reshape(-1, x.shape[-1])
            chosen = given[1].reshape(x.shape[0], -1)
            rows = [x[(chosen == expert).any(1)] for expert in range(count)]
        before = routed.get(name)
        routed[name] = rows if before is None else [torch.cat(pair) for pair in zip(before, rows, strict=True)]

    return hook


def test_sites_are_exactly_the_linear_maps_of_the_blocks_in_checkpoint_names(case: Case) -> None:
    found = {site.name: site.shape for site in case.streamed.sites if site.kind != "head"}
    assert found == case.family.expected()
    assert [site.block for site in case.streamed.sites] == sorted(site.block for site in case.streamed.sites)
    assert len(case.streamed.blocks) == BLOCKS
    assert case.streamed.refused == {}
    assert case.streamed.weights.unused == []


def test_an_untied_head_under_its_own_name_comes_behind_the_blocks(case: Case) -> None:
    head, stored = case.plain.get_output_embeddings(), load_file(case.directory / "model.safetensors")
    if head is None or case.streamed.tied_head or "lm_head.weight" not in stored:
        assert case.streamed.head is None
        assert case.streamed.why_no_head
        return
    site = Site("lm_head", (VOCABULARY, WIDTH), BLOCKS, "head", "lm_head.weight")
    assert case.streamed.head == case.streamed.sites[-1] == site
    assert case.streamed.sites_of(BLOCKS) == [site]
    assert not case.streamed.why_no_head


def test_heads_routers_and_towers_are_no_sites_of_the_blocks(case: Case) -> None:
    kept = set(case.streamed.linear_names())
    for name, module in case.plain.named_modules():
        if isinstance(module, nn.Linear) and not any(name.startswith(block + ".") for block in case.streamed.blocks):
            assert name in kept
        if name.endswith((".gate", ".router", "shared_expert_gate")) and isinstance(module, nn.Linear):
            assert name in kept
    inside = [site.name for site in case.streamed.sites if site.block < BLOCKS]
    assert not any(word in name for name in inside for word in ("vision", "visual", "lm_head"))


def test_a_matrix_is_the_checkpoints_tensor(case: Case) -> None:
    stored = load_file(case.directory / "model.safetensors")
    for index in range(BLOCKS):
        with case.streamed.opened(index):
            for site in case.streamed.sites_of(index):
                tensor = stored[site.tensor] if site.index is None else stored[site.tensor][site.index]
                expected = tensor.T if site.transposed else tensor
                assert torch.equal(case.streamed.matrix(site), expected), site.name


def test_output_is_that_of_the_plain_model(case: Case) -> None:
    for ours, theirs in case.outputs:
        assert ours.dtype == torch.float32
        assert (ours - theirs).abs().max() <= OUTPUT_TOLERANCE * theirs.abs().max()


def test_every_site_is_observed_on_all_its_rows(case: Case) -> None:
    for site in case.streamed.sites:
        statistics = case.found[site.name]
        if site.kind != "expert":
            assert (statistics.rows, statistics.notes) == (case.tokens, ()), site.name
        else:
            assert statistics.rows == len(expert_rows(case, site.name)), site.name
            assert bool(statistics.notes) == (statistics.rows < site.shape[1]), site.name
        assert statistics.stats.hessian is not None


def expert_rows(case: Case, name: str) -> Tensor:
    """Inputs of the expert that the site belongs to."""
    place = case.streamed.places[name]
    assert place.index is not None
    return case.routed[place.parameter.rpartition(".")[0]][place.index]


def test_sites_with_the_same_input_share_one_hessian_and_no_others(case: Case) -> None:
    for index in range(BLOCKS):
        groups: dict[int, set[str]] = {}
        sites = [site.name for site in case.streamed.sites_of(index)]
        for name in sites:
            groups.setdefault(id(case.found[name].stats), set()).add(name)
        below = [{f"{case.family.prefix}.{index}.{name}" for name in names} for names in shared(case.family, index)]
        assert sorted(map(sorted, (g for g in groups.values() if len(g) > 1))) == sorted(map(sorted, below))


def shared(family: Family, index: int) -> list[tuple[str, ...]]:
    names = family.others.get(index, family.sites)
    return [group for group in family.shared if all(name in names for name in group)]


def test_hessians_are_those_of_forward_hooks_in_float64(case: Case) -> None:
    for site in case.streamed.sites:
        place = case.streamed.places[site.name]
        ours = case.found[site.name].stats.hessian
        assert ours is not None
        if site.kind != "expert":
            x = case.inputs[place.parameter.removesuffix(".weight")]
        elif "down" in place.parameter or case.found[site.name].notes:
            continue
        else:
            x = expert_rows(case, site.name)
        expected = x.T @ x / len(x)
        assert (ours.double() - expected).abs().max() <= HESSIAN_TOLERANCE * expected.abs().max(), site.name
        assert torch.equal(ours, ours.T)
