"""Calibration statistics: what is shared, blended, noted, and what they may not depend on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pennyweight.models.stream import Stream
from pennyweight.models.streamed import StreamedModel
from pennyweight.pipeline import observe as module
from pennyweight.pipeline.collect import SiteStatistics, Streams, collect
from pennyweight.pipeline.observe import Observer
from tests.models.families import FAMILIES, build, save, token_batches

# Sums of float32 over a few hundred rows, in another order.
TOLERANCE = 1e-5
# bfloat16 has 8 bits: products of a few maps in a row, squared.
NARROW_TOLERANCE = 2**-5
LAYER = "model.layers.0"


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    names = ("llama", "mixtral")
    return {
        name: save(build(FAMILIES[name].architecture, FAMILIES[name].config), tmp_path_factory.mktemp(name))
        for name in names
    }


def statistics(
    directory: Path,
    batches: list[Tensor],
    change: Callable[[Any], None] = lambda block: None,
) -> dict[str, SiteStatistics]:
    """What block 0 shows on `batches`, after `change(block)`."""
    model = StreamedModel(directory)
    stream = model.start(batches)
    with model.opened(0) as block:
        change(block)
        return collect(model, block, model.sites_of(0), Streams(stream))


def hessian(found: SiteStatistics) -> Tensor:
    assert found.stats.hessian is not None
    return found.stats.hessian


def assert_alike(a: dict[str, SiteStatistics], b: dict[str, SiteStatistics]) -> None:
    for name, found in a.items():
        assert (found.rows, found.notes) == (b[name].rows, b[name].notes)
        assert (hessian(found) - hessian(b[name])).abs().max() <= TOLERANCE * hessian(found).abs().max()


# -- what they may not depend on ----------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_the_cut_into_batches_changes_neither_rows_nor_hessians(directories: dict[str, Path], family: str) -> None:
    whole = torch.cat(token_batches((6, 5)))
    assert_alike(statistics(directories[family], [whole]), statistics(directories[family], list(whole.split(2))))


def test_the_cut_into_rounds_changes_no_rows(directories: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    batches = token_batches((2, 2, 2, 1))
    once = statistics(directories["mixtral"], batches)
    monkeypatch.setattr(module, "_ROUND_TOKENS", 50)
    assert len(module.rounds(Stream(batches, batches, []))) == 4
    assert_alike(once, statistics(directories["mixtral"], batches))


def test_rounds_hold_every_batch_once_and_at_least_one_each(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_ROUND_TOKENS", 30)
    batches = [torch.zeros(count, 10) for count in (1, 2, 5, 1, 1, 1, 1)]
    assert module.rounds(Stream(batches, batches, [])) == [[0, 1], [2], [3, 4, 5], [6]]


# -- what a block may do ------------------------------------------------------------------------------------------


def test_an_input_that_the_block_changes_in_place_is_seen_as_the_map_saw_it(directories: dict[str, Path]) -> None:
    expected = statistics(directories["llama"], token_batches())

    def overwrite(block: Any) -> None:
        original = block.mlp.forward

        def forward(x: Tensor) -> Tensor:
            out: Tensor = original(x)
            x.fill_(torch.nan)
            return out

        block.mlp.forward = forward

    found = statistics(directories["llama"], token_batches(), overwrite)
    for name in expected:
        assert torch.equal(hessian(found[name]), hessian(expected[name])), name


def test_maps_called_before_and_after_a_change_in_place_share_nothing(directories: dict[str, Path]) -> None:
    def overwrite(block: Any) -> None:
        mlp = block.mlp

        def forward(x: Tensor) -> Tensor:
            gate = mlp.gate_proj(x)
            up = mlp.up_proj(x.mul_(2))
            out: Tensor = mlp.down_proj(gate * up)
            return out

        mlp.forward = forward

    found = statistics(directories["llama"], token_batches(), overwrite)
    gate, up = found[f"{LAYER}.mlp.gate_proj"], found[f"{LAYER}.mlp.up_proj"]
    assert torch.equal(hessian(up), 4 * hessian(gate))


def test_an_input_that_is_no_block_of_memory_is_still_shared(directories: dict[str, Path]) -> None:
    def stride(block: Any) -> None:
        mlp = block.mlp

        def forward(x: Tensor) -> Tensor:
            x = torch.stack([x, x], dim=-1)[..., 0]
            assert not x.is_contiguous()
            out: Tensor = mlp.down_proj(mlp.gate_proj(x) * mlp.up_proj(x))
            return out

        mlp.forward = forward

    found = statistics(directories["llama"], token_batches(), stride)
    assert found[f"{LAYER}.mlp.gate_proj"].stats is found[f"{LAYER}.mlp.up_proj"].stats


def test_a_site_that_is_never_called_is_noted_and_has_no_hessian(directories: dict[str, Path]) -> None:
    def hide(block: Any) -> None:
        mlp = block.mlp
        mlp.forward = lambda x: torch.einsum("bti,oi->bto", mlp.gate_proj(x), mlp.down_proj.weight)

    found = statistics(directories["llama"], token_batches(), hide)
    for name in ("up_proj", "down_proj"):
        hidden = found[f"{LAYER}.mlp.{name}"]
        assert (hidden.rows, hidden.stats.hessian) == (0, None)
        assert hidden.notes == ("saw no calibration data: rounded to nearest",)
    assert found[f"{LAYER}.mlp.gate_proj"].notes == ()


# -- experts ------------------------------------------------------------------------------------------------------

FEW = 5


def route(block: Any) -> None:
    """Every token goes to expert 0; the second choice is expert 1, but expert 2 for the first few; none goes to 3."""
    gate = block.mlp.gate
    original = gate.forward

    def forward(x: Tensor) -> Any:
        logits, scores, chosen = original(x)
        chosen = torch.tensor([0, 1]).expand(chosen.shape).clone()
        chosen[:FEW, 1] = 2
        return logits, scores, chosen

    gate.forward = forward


def site(expert: int, name: str) -> str:
    return f"{LAYER}.block_sparse_moe.experts.{expert}.{name}"


@pytest.fixture(scope="module")
def routed(directories: dict[str, Path]) -> tuple[dict[str, SiteStatistics], Tensor]:
    """Statistics of the mixture under `route` on one batch, and the rows that its experts chose from, float64."""
    seen: list[Tensor] = []

    def watch(block: Any) -> None:
        route(block)
        experts: nn.Module = block.mlp.experts
        experts.register_forward_pre_hook(lambda module, args: seen.append(args[0].detach().double().clone()))

    found = statistics(directories["mixtral"], token_batches((4,)), watch)
    return found, seen[0].flatten(0, -2)


def test_an_expert_with_enough_rows_has_its_own_hessian(routed: tuple[dict[str, SiteStatistics], Tensor]) -> None:
    found, x = routed
    for expert, rows in ((0, x), (1, x[FEW:])):
        gate = found[site(expert, "w1")]
        assert (gate.rows, gate.notes) == (len(rows), ())
        assert gate.stats is found[site(expert, "w3")].stats
        expected = rows.T @ rows / len(rows)
        assert (hessian(gate) - expected).abs().max() <= TOLERANCE * expected.abs().max()


def test_an_expert_with_few_rows_is_blended_with_the_pool_by_their_share(
    routed: tuple[dict[str, SiteStatistics], Tensor],
) -> None:
    found, x = routed
    gate = found[site(2, "w1")]
    assert gate.rows == FEW
    assert gate.notes == ("saw 5 of the 32 rows that a Hessian needs: blended with the layer's pooled one",)
    assert gate.stats is found[site(2, "w3")].stats
    share = FEW / 32
    expected = share * (x[:FEW].T @ x[:FEW] / FEW) + (1 - share) * pool(x)
    assert (hessian(gate) - expected).abs().max() <= TOLERANCE * expected.abs().max()


def pool(x: Tensor) -> Tensor:
    rows = torch.cat([x, x[FEW:], x[:FEW]])
    return rows.T @ rows / len(rows)


def test_an_expert_without_rows_takes_the_pool(routed: tuple[dict[str, SiteStatistics], Tensor]) -> None:
    found, x = routed
    for name in ("w1", "w3"):
        gate = found[site(3, name)]
        assert (gate.rows, gate.notes) == (0, ("saw no rows: the layer's pooled Hessian is used",))
        assert (hessian(gate) - pool(x)).abs().max() <= TOLERANCE * pool(x).abs().max()
    down = found[site(3, "w2")]
    assert hessian(down).shape == (48, 48)
    assert down.notes == ("saw no rows: the layer's pooled Hessian is used",)


def test_experts_do_not_share_with_each_other(routed: tuple[dict[str, SiteStatistics], Tensor]) -> None:
    found, _ = routed
    assert len({id(found[site(expert, "w1")].stats) for expert in range(4)}) == 4
    assert not {id(found[site(e, "w1")].stats) for e in range(4)} & {id(found[site(e, "w2")].stats) for e in range(4)}


def test_experts_of_which_none_was_called_are_rounded_plainly_and_noted(directories: dict[str, Path]) -> None:
    def skip(block: Any) -> None:
        block.mlp.experts.forward = lambda x, chosen, scores: x

    found = statistics(directories["mixtral"], token_batches(), skip)
    for expert in range(4):
        idle = found[site(expert, "w1")]
        assert (idle.rows, idle.stats.hessian) == (0, None)
        assert idle.notes == ("no expert of the layer saw calibration data: rounded to nearest",)


def test_a_bfloat16_model_may_be_observed_in_bfloat16(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(build("MixtralForCausalLM", FAMILIES["mixtral"].config).to(torch.bfloat16), tmp_path)
    found = []
    for is_supported in (False, True):
        monkeypatch.setattr("torch.cpu._is_avx512_bf16_supported", lambda answer=is_supported: answer)
        found.append(statistics(tmp_path, token_batches((6, 5)), route))
    for name, exact in found[0].items():
        narrow = found[1][name]
        assert (narrow.rows, narrow.notes) == (exact.rows, exact.notes), name
        assert (hessian(narrow) - hessian(exact)).abs().max() <= NARROW_TOLERANCE * hessian(exact).abs().max(), name


def test_the_last_map_is_not_computed_where_nobody_needs_the_output(directories: dict[str, Path]) -> None:
    model = StreamedModel(directories["llama"])
    stream = model.start(token_batches((2, 3)))
    with model.opened(0) as block:
        whole = Observer(model, block, 0, model.sites_of(0)).run(stream, [0, 1])
        enough = Observer(model, block, 0, model.sites_of(0), needs_outputs=False).run(stream, [0, 1])
    for one, other in zip(whole[0], enough[0], strict=True):
        assert one.leaders == other.leaders
        for leader, seen in one.inputs.items():
            assert all(torch.equal(x, y) for (x, _), (y, _) in zip(seen, other.inputs[leader], strict=True))
    assert not any(torch.equal(one, other) for one, other in zip(whole[1], enough[1], strict=True))


def test_a_block_that_returns_to_a_site_is_computed_to_its_end(directories: dict[str, Path]) -> None:
    def twice(block: Any) -> None:
        once = block.mlp.forward
        block.mlp.forward = lambda x: once(once(x))

    model = StreamedModel(directories["llama"])
    stream = model.start(token_batches())
    with model.opened(0) as block:
        twice(block)
        [whole], _ = Observer(model, block, 0, model.sites_of(0)).run(stream, [0])
        [enough], _ = Observer(model, block, 0, model.sites_of(0), needs_outputs=False).run(stream, [0])
    leader = whole.leaders[f"{LAYER}.mlp.down_proj"]
    assert len(whole.inputs[leader]) == 2
    assert all(torch.equal(x, y) for (x, _), (y, _) in zip(whole.inputs[leader], enough.inputs[leader], strict=True))


# -- the original model beside the quantized one ------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_the_cross_moment_pairs_the_tokens_of_both_streams(directories: dict[str, Path], family: str) -> None:
    model = StreamedModel(directories[family])
    streams = Streams.of(model.start(token_batches((2, 3))), has_original=True)
    assert streams.original is not None
    assert streams.are_equal
    noise = torch.Generator().manual_seed(0)
    streams.quantized.hidden = [
        x + 0.1 * torch.randn(x.shape, generator=noise) * x.std() for x in streams.quantized.hidden
    ]
    assert not streams.are_equal
    seen: dict[str, list[Tensor]] = {"original": [], "quantized": []}
    with model.opened(0) as block:
        outputs = model.run_block(block, 0, streams.original)
        for name, stream in (("original", streams.original), ("quantized", streams.quantized)):
            for batch in range(2):
                norm = block.input_layernorm(stream.hidden[batch])
                seen[name].append(norm.detach().double().flatten(0, -2))
        found = collect(model, block, model.sites_of(0), streams)
    q = found[f"{LAYER}.self_attn.q_proj"].stats
    original, x = torch.cat(seen["original"]), torch.cat(seen["quantized"])
    for moment, expected in ((q.hessian, x.T @ x / len(x)), (q.cross, original.T @ x / len(x))):
        assert moment is not None
        assert (moment - expected).abs().max() <= TOLERANCE * expected.abs().max()
    for handed_on, output in zip(streams.original.hidden, outputs, strict=True):
        assert torch.equal(handed_on, output)
    for name, one in found.items():
        if ".experts." in name:
            assert one.stats.cross is one.stats.hessian
            assert "taken to be those that there are" in one.notes[-1]


def test_before_anything_is_quantized_there_is_nothing_to_cross(directories: dict[str, Path]) -> None:
    model = StreamedModel(directories["llama"])
    streams = Streams.of(model.start(token_batches((2, 3))), has_original=True)
    assert streams.original is not None
    with model.opened(0) as block:
        outputs = model.run_block(block, 0, streams.original)
        found = collect(model, block, model.sites_of(0), streams)
    assert all(one.stats.cross is one.stats.hessian and not one.notes for one in found.values())
    assert found[f"{LAYER}.mlp.gate_proj"].stats is found[f"{LAYER}.mlp.up_proj"].stats
    assert all(torch.equal(one, other) for one, other in zip(streams.original.hidden, outputs, strict=True))
