"""Divergences against transformers' own logits of the changed model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from pennyweight.core.registry import find
from pennyweight.models.streamed import StreamedModel
from pennyweight.pipeline.costs import compared, direct, linearity
from pennyweight.pipeline.losses import kl, quadratic_kl
from pennyweight.plan.candidates import Candidates
from pennyweight.schemes import parse_scheme
from pennyweight.solvers.nearest import Nearest
from tests.models.families import FAMILIES, build, save, token_batches
from tests.pipeline.costs.originals import weights_of, whole

# Divergences of 1e-3 from logits in float32.
TOLERANCE = 1e-2
SCHEMES = (parse_scheme("int3-channel-f32"), None, parse_scheme("int4-channel-f32"))
GROUPS = [
    Candidates(("model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.k_proj"), SCHEMES),
    Candidates(("model.layers.1.mlp.down_proj",), SCHEMES),
    Candidates(("model.layers.1.self_attn.o_proj", "model.layers.0.mlp.up_proj"), SCHEMES),
    Candidates(("lm_head",), SCHEMES),
    Candidates(("lm_head", "model.layers.1.mlp.down_proj"), SCHEMES),
]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(build("LlamaForCausalLM", FAMILIES["llama"].config), tmp_path_factory.mktemp("llama"))


def divergence(directory: Path, changes: dict[str, Tensor]) -> float:
    """Mean KL over all tokens, by transformers in float64."""
    reference, changed = whole(directory), whole(directory)
    for name, weight in changes.items():
        changed.get_parameter(f"{name}.weight").data.copy_(weight)
    total = 0.0
    for batch in token_batches():
        with torch.no_grad():
            p, q = (model(batch).logits.log_softmax(-1) for model in (reference, changed))
        total += float((p.exp() * (p - q)).sum())
    return total / sum(batch.numel() for batch in token_batches())


def test_costs_are_the_divergences_of_the_changed_model(
    directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is put in place is noted on the way, so that only the divergence is compared."""
    put: dict[tuple[str, str], Tensor] = {}
    original = direct.rounded

    def noted(site, w, scheme, solver, found):  # type: ignore[no-untyped-def]
        put[site.name, scheme.name] = original(site, w, scheme, solver, found)
        return put[site.name, scheme.name]

    monkeypatch.setattr(direct, "rounded", noted)
    model = StreamedModel(directory)
    cost = find("pipeline.costs", "direct")
    rows = cost.measure(model, token_batches(), GROUPS, solver=Nearest(), seed=0, scratch=tmp_path / "kept")
    originals = weights_of(model)
    for group, row in zip(GROUPS, rows, strict=True):
        for scheme, found in zip(group.schemes, row, strict=True):
            if scheme is None:
                assert found == 0
                continue
            changes = {name: put[name, scheme.name] for name in group.sites}
            for name, weight in changes.items():
                assert 0 < (weight - originals[name]).norm() < 0.3 * originals[name].norm()
            assert found == pytest.approx(divergence(directory, changes), rel=TOLERANCE)


@pytest.mark.parametrize("group", [GROUPS[2], GROUPS[4]])
def test_a_site_is_rounded_alike_alone_and_behind_others_of_its_group(
    directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, group: Candidates
) -> None:
    """On what the original blocks before it give, not on what the group's first block is given."""
    put: list[Tensor] = []
    original = direct.rounded

    def noted(site, w, scheme, solver, found):  # type: ignore[no-untyped-def]
        result = original(site, w, scheme, solver, found)
        put.extend([result] if site.name == group.sites[0] else [])
        return result

    monkeypatch.setattr(direct, "rounded", noted)
    groups = [Candidates(names, SCHEMES[:1]) for names in (group.sites, group.sites[:1])]
    find("pipeline.costs", "direct").measure(
        StreamedModel(directory), token_batches(), groups, solver=Nearest(), seed=0, scratch=tmp_path / "kept"
    )
    assert len(put) == 2
    assert torch.equal(*put)


@pytest.mark.parametrize("size", [0.1, 0.05])
def test_linearity_is_the_divergence_under_noise_times_the_relative_error(
    directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: float
) -> None:
    errors: dict[tuple[str, str], float] = {}
    original = linearity.rounded

    def noted(site, w, scheme, solver, found):  # type: ignore[no-untyped-def]
        result = original(site, w, scheme, solver, found)
        errors[site.name, scheme.name] = float((w - result).square().sum() / w.square().sum())
        return result

    monkeypatch.setattr(linearity, "rounded", noted)
    model, cost = StreamedModel(directory), linearity.LinearityCost(size=size)
    rows = cost.measure(model, token_batches(), GROUPS, solver=Nearest(), seed=3, scratch=tmp_path / "kept")
    originals = weights_of(model)
    sites = {site.name: site for site in model.sites}
    for group, row in zip(GROUPS, rows, strict=True):
        changes = {}
        for name in group.sites:
            w = originals[name]
            noise = torch.empty(w.shape).normal_(generator=linearity._generator(sites[name], 3))
            changes[name] = w + noise / noise.norm() * size * w.norm()
        constant = divergence(directory, changes) / size**2
        weights = [sites[name].weights for name in group.sites]
        for scheme, found in zip(group.schemes, row, strict=True):
            if scheme is not None:
                terms = [n * errors[name, scheme.name] for n, name in zip(weights, group.sites, strict=True)]
                assert found == pytest.approx(constant * sum(terms) / sum(weights), rel=TOLERANCE)


def test_noise_is_a_site_s_own_and_the_seed_s(directory: Path) -> None:
    [one, other, *_] = StreamedModel(directory).sites
    drawn = [linearity._generator(site, seed).initial_seed() for site, seed in ((one, 0), (other, 0), (one, 1))]
    assert len(set(drawn)) == 3


def test_divergences_of_long_batches_are_sums_over_all_tokens() -> None:
    p, q = (torch.randn(600, 20, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    log_p, log_q = p.double().log_softmax(-1), q.double().log_softmax(-1)
    assert kl(p, q) == pytest.approx(float((log_p.exp() * (log_p - log_q)).sum()), rel=1e-5)
    assert kl(p, p) == 0
    d = (q - p).double()
    variances = (log_p.exp() * d.square()).sum(-1) - (log_p.exp() * d).sum(-1).square()
    assert quadratic_kl(p, q) == pytest.approx(float(variances.sum()) / 2, rel=1e-5)
    assert quadratic_kl(p, p) == 0
    # Of a small change they are the same, and one that is the same in all logits is none.
    assert quadratic_kl(p, p + 0.01 * q + 3) == pytest.approx(kl(p, p + 0.01 * q), rel=0.05)


@pytest.mark.parametrize("tokens", [1, 7, 1000])
def test_how_many_logits_are_held_at_once_does_not_matter(
    directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tokens: int
) -> None:
    def costs() -> list[list[float]]:
        return find("pipeline.costs", "direct").measure(
            StreamedModel(directory), token_batches(), GROUPS[-2:], solver=Nearest(), seed=0, scratch=tmp_path / "kept"
        )

    held: list[int] = []
    original = compared._part

    def noted(stream, batch, cut):  # type: ignore[no-untyped-def]
        ids, hidden = original(stream, batch, cut)
        held.append(ids.numel())
        assert hidden.shape[:2] == ids.shape
        return ids, hidden

    before = costs()
    monkeypatch.setattr(compared, "_TOKENS", tokens)
    monkeypatch.setattr(compared, "_part", noted)
    for found, expected in zip(costs(), before, strict=True):
        assert found == pytest.approx(expected, rel=TOLERANCE)
    # Of three windows no fewer than a token each.
    assert max(held) <= max(tokens, 3)
