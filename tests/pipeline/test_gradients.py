"""Loss-aware statistics: gradients against autograd through the whole model, and Hessians against their definition."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from pennyweight.core.errors import ModelError, UsageError
from pennyweight.models.streamed import StreamedModel
from pennyweight.pipeline import gradients
from pennyweight.pipeline.collect import SiteStatistics, Streams, collect
from pennyweight.pipeline.gradients import Sensitivities, sensitivities
from pennyweight.pipeline.options import Options
from pennyweight.pipeline.records import BlockDone
from tests.models.families import FAMILIES, build, save, token_batches
from tests.pipeline import tiny

# float32 through two blocks and back, squared.
TOLERANCE = 1e-4
# Hidden states of 8 bits, squared.
NARROW_TOLERANCE = 2**-4
# Sums of float32 over a few dozen rows, in another order.
SUM_TOLERANCE = 1e-5
LAYER = "model.layers.0"
UNWEIGHTED = "its inputs are not weighted by the loss's gradient"


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    names = ("llama", "mixtral", "gpt2")
    return {
        name: save(build(FAMILIES[name].architecture, FAMILIES[name].config), tmp_path_factory.mktemp(name))
        for name in names
    }


def found(directory: Path, scratch: Path, *, seed: int = 0, has_head: bool = False) -> Sensitivities:
    return sensitivities(StreamedModel(directory), token_batches(), scratch / "kept", seed=seed, has_head=has_head)


def by_autograd(directory: Path, batch: Tensor) -> dict[str, Tensor]:
    """|dl/dz|² [tokens] of every linear map by one backward pass through the whole model in float64."""
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float64, experts_implementation="eager"
    ).eval()
    outputs: dict[str, Tensor] = {}

    def keep(name: str, module: nn.Module) -> None:
        def hook(module: nn.Module, args: Any, out: Tensor) -> None:
            out.retain_grad()  # type: ignore[no-untyped-call]
            outputs[name] = out

        module.register_forward_hook(hook)

    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D":
            keep(name, module)
    with torch.enable_grad():
        logits = model(batch).logits.flatten(0, 1)
        nn.functional.cross_entropy(logits, unlikeliest(logits), reduction="sum").backward()
    return {name: out.grad.square().sum(-1).flatten() for name, out in outputs.items() if out.grad is not None}


def unlikeliest(logits: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """What stands in for the draw: another implementation can find the same tokens."""
    return logits.argmin(-1)


# -- gradients ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "mixtral", "gpt2"])
def test_squares_are_those_of_autograd_through_the_whole_model(
    directories: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str
) -> None:
    monkeypatch.setattr(gradients, "sampled", unlikeliest)
    model = StreamedModel(directories[family])
    squares = found(directories[family], tmp_path, has_head=model.head is not None).squares
    assert set(squares) == {site.name for site in model.sites if site.kind != "expert"}
    module_of = {site.name: model.places[site.name].parameter.removesuffix(".weight") for site in model.sites}
    for number, batch in enumerate(token_batches()):
        expected = by_autograd(directories[family], batch)
        for name, parts in squares.items():
            theirs = expected[module_of[name]]
            assert parts[number].shape == theirs.shape
            assert (parts[number] - theirs).abs().max() <= TOLERANCE * theirs.max(), name


def test_hidden_states_of_a_narrow_model_are_kept_in_bfloat16(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gradients, "sampled", unlikeliest)
    model = build("LlamaForCausalLM", FAMILIES["llama"].config).to(torch.bfloat16)
    squares = found(save(model, tmp_path / "model"), tmp_path, has_head=True).squares
    [batch] = token_batches((3,))
    for name, theirs in by_autograd(tmp_path / "model", batch).items():
        # The last hidden states are never rounded; those before are, each once.
        assert (squares[name][0] - theirs).norm() <= NARROW_TOLERANCE * theirs.norm(), name


def test_squares_do_not_depend_on_the_number_of_threads(directories: dict[str, Path], tmp_path: Path) -> None:
    before = torch.get_num_threads()
    made = []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            made.append(found(directories["llama"], tmp_path).squares)
    finally:
        torch.set_num_threads(before)
    for name, parts in made[0].items():
        assert all(torch.equal(one, other) for one, other in zip(parts, made[1][name], strict=True)), name


def test_the_scratch_directory_goes_away_and_the_seed_matters(directories: dict[str, Path], tmp_path: Path) -> None:
    [one, same, other] = [found(directories["llama"], tmp_path, seed=seed).squares for seed in (0, 0, 1)]
    assert list(tmp_path.iterdir()) == []
    name = f"{LAYER}.mlp.up_proj"
    assert torch.equal(one[name][0], same[name][0])
    assert not torch.equal(one[name][0], other[name][0])


def test_each_batch_draws_its_own_tokens(directories: dict[str, Path], tmp_path: Path) -> None:
    batch = token_batches((2,))
    model = StreamedModel(directories["llama"])
    for parts in sensitivities(model, batch * 2, tmp_path / "kept", seed=0).squares.values():
        assert not torch.equal(*parts)


def test_how_windows_are_put_into_batches_does_not_change_what_they_draw(
    directories: dict[str, Path], tmp_path: Path
) -> None:
    [batch] = token_batches((4,))
    model = StreamedModel(directories["llama"])
    made = [sensitivities(model, list(batch.split(size)), tmp_path / "kept", seed=0).squares for size in (4, 1)]
    for name, parts in made[0].items():
        one, other = torch.cat(list(parts)), torch.cat(list(made[1][name]))
        assert (one - other).abs().max() <= TOLERANCE * one.max(), name


def test_of_an_encoder_a_projection_stands_in_for_the_draw(tmp_path: Path) -> None:
    """Its gradient's second moment is the second derivative of the distance."""
    hidden = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    moments = torch.zeros(2, 3, 4, dtype=torch.float64)
    draws = 4000
    for seed in range(draws):
        generators = [torch.Generator().manual_seed(2 * seed + window) for window in range(2)]
        with torch.enable_grad():
            [slope] = torch.autograd.grad(gradients._projected_loss(hidden, generators), hidden)
        moments += slope.square() / draws
    for window, moment in zip(hidden.detach(), moments, strict=True):
        # Each of the 12 elements is a mean of 4000 squares of normal numbers.
        expected = 2 / window.square().sum(-1).mean()
        assert (moment / expected - 1).abs().max() < 0.15


# -- weights ------------------------------------------------------------------------------------------------------


def test_weights_are_roots_of_the_sum_over_the_sites_with_mean_one() -> None:
    squares = {
        "a": [torch.tensor([1.0, 0.0]), torch.tensor([8.0])],
        "b": [torch.tensor([3.0, 0.0]), torch.tensor([8.0])],
    }
    weights = Sensitivities(squares).weights(["a", "b", "an expert"])
    assert weights is not None
    assert torch.equal(torch.cat(weights), torch.tensor([2.0, 0.0, 4.0]) / 2)


def test_sites_that_the_loss_does_not_depend_on_have_no_weights() -> None:
    known = Sensitivities({"a": [torch.zeros(3)]})
    assert known.weights(["a"]) is None
    assert known.weights(["b"]) is None


def statistics(directory: Path, sensitive: Sensitivities | None, *, noise: float = 0.0) -> dict[str, SiteStatistics]:
    """What block 0 shows; with `noise` beside another stream that is the original one."""
    model = StreamedModel(directory)
    streams = Streams.of(model.start(token_batches()), has_original=noise > 0, sensitive=sensitive)
    if noise:
        generator = torch.Generator().manual_seed(0)
        streams.quantized.hidden = [
            x + noise * x.std() * torch.randn(x.shape, generator=generator) for x in streams.quantized.hidden
        ]
    with model.opened(0) as block:
        return collect(model, block, model.sites_of(0), streams, has_magnitudes=True)


def same_for_all(directory: Path, parts: Sequence[Tensor]) -> Sensitivities:
    return Sensitivities({site.name: parts for site in StreamedModel(directory).sites if site.kind != "expert"})


def tokens() -> list[int]:
    return [ids.numel() for ids in token_batches()]


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_weights_that_are_all_the_same_change_no_bit(directories: dict[str, Path], family: str) -> None:
    even = same_for_all(directories[family], [torch.full((count,), 1.0) for count in tokens()])
    plain, weighted = (statistics(directories[family], one, noise=0.1) for one in (None, even))
    for name, one in plain.items():
        for moment, other in ((one.stats.hessian, weighted[name].stats.hessian),
                              (one.stats.cross, weighted[name].stats.cross)):  # fmt: skip
            assert moment is not None
            assert other is not None
            assert torch.equal(moment, other)


def test_hessians_and_cross_moments_are_weighted_means(directories: dict[str, Path]) -> None:
    generator = torch.Generator().manual_seed(0)
    squares = {
        site.name: [torch.rand(count, generator=generator) for count in tokens()]
        for site in StreamedModel(directories["llama"]).sites
    }
    known = Sensitivities(squares)
    seen = statistics(directories["llama"], known, noise=0.1)
    plain = statistics(directories["llama"], None, noise=0.1)
    original, x = _inputs_of_mlp(directories["llama"], noise=0.1)
    pair = [f"{LAYER}.mlp.gate_proj", f"{LAYER}.mlp.up_proj"]
    w = torch.cat([a + b for a, b in zip(squares[pair[0]], squares[pair[1]], strict=True)]).sqrt().double()
    w = (w / w.mean()).unsqueeze(1)
    stats = seen[pair[0]].stats
    assert stats is seen[pair[1]].stats
    for moment, expected in ((stats.hessian, (w * x).T @ x / len(x)), (stats.cross, (w * original).T @ x / len(x))):
        assert moment is not None
        assert (moment - expected).abs().max() <= SUM_TOLERANCE * expected.abs().max()
    assert seen[pair[0]].notes == ()
    for name, one in seen.items():
        theirs = plain[name].magnitude
        assert one.magnitude is not None
        assert theirs is not None
        assert torch.equal(one.magnitude.total, theirs.total)


def _inputs_of_mlp(directory: Path, *, noise: float) -> tuple[Tensor, Tensor]:
    """The rows that gate and up see in `statistics`, of the original stream and of the other, float64."""
    model = StreamedModel(directory)
    stream = model.start(token_batches())
    generator = torch.Generator().manual_seed(0)
    noisy = [x + noise * x.std() * torch.randn(x.shape, generator=generator) for x in stream.hidden]
    seen: list[Tensor] = []
    with model.opened(0) as block:
        mlp: Any = block.mlp
        handle = mlp.register_forward_pre_hook(
            lambda module, args: seen.append(args[0].detach().double().flatten(0, 1))
        )
        for hidden in (stream.hidden, noisy):
            stream.hidden = hidden
            for batch in range(len(hidden)):
                model.run_block(block, 0, stream, batches=[batch])
        handle.remove()
    half = len(seen) // 2
    return torch.cat(seen[:half]), torch.cat(seen[half:])


def test_experts_keep_even_weights_and_say_so(directories: dict[str, Path], tmp_path: Path) -> None:
    plain = statistics(directories["mixtral"], None)
    weighted = statistics(directories["mixtral"], found(directories["mixtral"], tmp_path))
    for name, one in weighted.items():
        hessian, theirs = one.stats.hessian, plain[name].stats.hessian
        assert hessian is not None
        assert theirs is not None
        is_expert = ".experts." in name
        assert torch.equal(hessian, theirs) == is_expert, name
        assert (UNWEIGHTED in one.notes) == is_expert, name


def test_other_rows_than_in_the_original_model_are_not_weighted(directories: dict[str, Path]) -> None:
    short = same_for_all(directories["llama"], [torch.arange(1.0, count) for count in tokens()])
    plain, kept = (statistics(directories["llama"], one) for one in (None, short))
    for name, one in kept.items():
        assert one.notes == (UNWEIGHTED,)
        hessian, theirs = one.stats.hessian, plain[name].stats.hessian
        assert hessian is not None
        assert theirs is not None
        assert torch.equal(hessian, theirs)


# -- runs ---------------------------------------------------------------------------------------------------------

LOSS_AWARE = replace(tiny.OPTIONS, loss_aware=True)


@pytest.fixture(scope="module")
def aware(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("aware") / "out"
    tiny.run(model, out, LOSS_AWARE)
    return out


def test_a_run_records_that_it_was_loss_aware_and_ends_with_other_codes(aware: Path, done: tuple[Path, Any]) -> None:
    record = json.loads((aware / "pennyweight.json").read_text())
    assert record["recipe"]["loss_aware"] is True
    ours, theirs = tiny.digests(aware), tiny.digests(done[0])
    assert set(ours) == set(theirs)
    assert ours["model.safetensors"] != theirs["model.safetensors"]


class _Stop(Exception):
    pass


def test_a_run_that_was_ended_goes_on_to_the_same_bytes(model: Path, aware: Path, tmp_path: Path) -> None:
    def stop(block: BlockDone) -> None:
        raise _Stop

    with pytest.raises(_Stop):
        tiny.run(model, tmp_path / "out", LOSS_AWARE, tell=stop)
    [work] = [path for path in tmp_path.iterdir() if path.name.startswith(".out.work-")]
    # As if the end had come while the gradients were made.
    (work / "gradients").mkdir()
    (work / "gradients" / "model.safetensors").write_bytes(b"half")
    assert tiny.run(model, tmp_path / "out", LOSS_AWARE).resumed_blocks == 1
    assert tiny.digests(tmp_path / "out") == tiny.digests(aware)


def test_without_data_there_is_nothing_to_weigh() -> None:
    with pytest.raises(UsageError, match="--loss-aware needs calibration data: give --calibration FILE or built-in"):
        Options(loss_aware=True, calibration="none").check()


def test_a_model_without_a_head_has_no_loss(tmp_path: Path) -> None:
    config = transformers.BertConfig(
        vocab_size=tiny.VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_attention_heads=4,
        num_hidden_layers=2,
        max_position_embeddings=64,
    )
    encoder = tiny.save(transformers.BertModel, config, tmp_path / "bert")
    with pytest.raises(ModelError, match="no language-model head, so there is no loss"):
        tiny.run(encoder, tmp_path / "out", LOSS_AWARE)
    assert tiny.traces(tmp_path) == []
