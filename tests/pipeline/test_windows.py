"""The windows that a run is given: of a decoder, of an encoder; runs on windows of several lengths."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from pennyweight.core.errors import DataError
from pennyweight.core.parallel import allowed_threads
from pennyweight.evaluate.compare import evaluate
from pennyweight.models import text
from pennyweight.models.network.source import TextAmount, named_network
from pennyweight.models.streamed import StreamedModel
from pennyweight.pipeline import measuring
from pennyweight.pipeline.options import Options
from pennyweight.pipeline.windows import calibration_windows, every_window, some_windows, windows_of
from pennyweight.plan.budget import Budget
from pennyweight.train.recovery.finish import Recovery
from tests.evaluate.tasks import examples
from tests.pipeline import tiny

TEXTS = tuple(tiny.words(count, seed=count) for count in (1, 2, 3, 2, 9, 1, 40, 5, 4, 6, 8, 7, 3, 3, 2, 11))
OPTIONS = Options(scheme="int4-g16", effort="fast", calibration=TEXTS, samples=12, length=24)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return examples.bert(tmp_path_factory.mktemp("encoder") / "model")


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.llama(tmp_path_factory.mktemp("decoder") / "model")


def test_a_decoder_gets_windows_of_one_length(decoder: Path) -> None:
    windows = calibration_windows(StreamedModel(decoder), OPTIONS)
    assert windows is not None
    assert {len(window) for window in windows} == {24}
    expected = text.windows(TEXTS, tiny.byte_tokenizer(), length=24, count=12, seed=0)
    assert torch.equal(torch.stack(windows), expected)


def test_an_encoder_gets_text_by_text_as_much_as_the_windows_would_hold(encoder: Path) -> None:
    model, tokenizer = StreamedModel(encoder), tiny.byte_tokenizer()
    every = every_window(model, OPTIONS)
    assert [window.tolist() for window in every[:4]] == [tokenizer(one)["input_ids"] for one in TEXTS[:4]]
    assert max(map(len, every)) == 24
    drawn = calibration_windows(model, OPTIONS)
    assert drawn is not None
    assert 11 * 24 < sum(map(len, drawn)) <= 12 * 24 < sum(map(len, every))
    assert some_windows(model, OPTIONS, drawn) is drawn


def test_no_window_is_longer_than_the_model_takes(encoder: Path, decoder: Path) -> None:
    for path in (encoder, decoder):
        model = StreamedModel(path)
        windows = windows_of(model, [tiny.words(200)], length=1000)
        assert max(map(len, windows)) == text.context_length(model.config)


@pytest.mark.parametrize("kind", ["Roberta", "MPNet"])
def test_positions_before_a_padding_index_hold_no_token(kind: str, tmp_path: Path) -> None:
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=tiny.VOCABULARY, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4,
        max_position_embeddings=66, pad_token_id=3,
    )  # fmt: skip
    path = tiny.save(getattr(transformers, f"{kind}Model"), config, tmp_path / "model")
    windows = windows_of(StreamedModel(path), [tiny.words(200)], length=1000)
    named = named_network(str(path), "built-in", text=TextAmount(length=1000))
    assert named.batches is not None
    longest = max(named.batches, key=lambda batch: int(batch["input_ids"].shape[1]))
    assert longest["input_ids"].shape[1] == max(map(len, windows)) < 66
    # One more is one too many: the places before the padding index are no token's.
    assert named.net(**longest).last_hidden_state.isfinite().all()
    with pytest.raises((RuntimeError, IndexError)):
        named.net(torch.full((1, max(map(len, windows)) + 1), 5))


def test_plain_text_is_cut_for_an_encoder_alone(encoder: Path, decoder: Path, tmp_path: Path) -> None:
    (tmp_path / "lines.txt").write_text("a bee\nthe grass\nMay\n")
    lines = windows_of(StreamedModel(encoder), str(tmp_path / "lines.txt"), length=64)
    assert [len(line) for line in lines] == [1 + len(line) for line in ("a bee", "the grass", "May")]
    with pytest.raises(DataError, match="fewer than one window of 64"):
        windows_of(StreamedModel(decoder), str(tmp_path / "lines.txt"), length=64)


@pytest.mark.parametrize("effort", ["fast", "normal", "best"])
def test_a_run_on_texts_does_not_depend_on_the_threads(encoder: Path, effort: str, tmp_path: Path) -> None:
    asked = replace(OPTIONS, effort=effort)  # type: ignore[arg-type]
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            assert allowed_threads() == threads
            tiny.run(encoder, tmp_path / str(threads), asked, finish=Recovery.of(asked))
            found.append(tiny.digests(tmp_path / str(threads)))
    finally:
        torch.set_num_threads(before)
    assert found[0] == found[1]
    record = json.loads((tmp_path / "1" / "pennyweight.json").read_text())
    assert ("finish" in record["found"]) == (effort == "best")
    recipe = record["recipe"]["calibration"]
    windows = calibration_windows(StreamedModel(encoder), asked)
    assert windows is not None
    assert (recipe["samples"], recipe["length"], recipe["varies"]) == (len(windows), 24, True)
    assert recipe["tokens_sha256"] == text.digest(windows)
    card = (tmp_path / "1" / "README.md").read_text()
    assert f"{len(windows)} windows of at most 24 tokens" in card


def test_costs_are_measured_on_the_first_sixteen_windows_or_as_much_of_texts(
    encoder: Path, decoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[list[torch.Tensor]] = []
    monkeypatch.setattr(measuring, "cached_costs", _told(given))
    options = replace(OPTIONS, scheme=None, budget=Budget("bpw", 20.0), samples=30)
    for path, texts in ((decoder, (tiny.words(300),)), (encoder, TEXTS * 3)):
        tiny.run(path, tmp_path / path.parent.name, replace(options, calibration=texts))
    of_decoder, of_encoder = given[0], given[-1]
    assert sum(map(len, of_decoder)) == 16
    assert 15 * 24 < sum(batch.numel() for batch in of_encoder) <= 16 * 24
    assert len({batch.shape[1] for batch in of_encoder}) > 3


def _told(given: list[list[torch.Tensor]]) -> Any:
    original = measuring.cached_costs

    def told(cost: Any, model: Any, batches: list[torch.Tensor], *args: Any, **options: Any) -> Any:
        given.append(batches)
        return original(cost, model, batches, *args, **options)

    return told


def test_less_than_a_window_of_text_is_refused_before_any_block(encoder: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="the text has 4 tokens, fewer than one window of 24: give more text"):
        tiny.run(encoder, tmp_path / "out", replace(OPTIONS, calibration=("May",)))
    asked = replace(OPTIONS, calibration=("a bee over the hill,", "a bee under the hill"), effort="best")
    with pytest.raises(DataError, match="recovery was given 1 batch") as refused:
        tiny.run(encoder, tmp_path / "out", asked, finish=Recovery.of(asked))
    assert not hasattr(refused.value, "__notes__")
    assert tiny.traces(tmp_path) == []


@pytest.mark.parametrize("seed", range(6))
def test_a_single_sample_is_a_text_or_two(encoder: Path, seed: int) -> None:
    windows = calibration_windows(StreamedModel(encoder), replace(OPTIONS, samples=1, seed=seed))
    assert windows is not None
    assert 0 < sum(map(len, windows)) <= 24


def test_an_encoder_is_compared_text_by_text(encoder: Path, tmp_path: Path) -> None:
    tiny.run(encoder, tmp_path / "out", OPTIONS)
    file = tmp_path / "texts.jsonl"
    file.write_text("".join(json.dumps({"text": one}) + "\n" for one in TEXTS))
    found = evaluate(str(tmp_path / "out"), against=str(encoder), source=str(file), length=24)
    windows = windows_of(StreamedModel(encoder), TEXTS, length=24)
    assert (found.windows, found.context, found.stride) == (len(windows), 24, None)
    assert found.tokens == sum(map(len, windows))
    from transformers import AutoModel

    whole, quantized = (AutoModel.from_pretrained(path).eval() for path in (encoder, tmp_path / "out"))
    with torch.no_grad():
        pairs = [[model(ids[None]).last_hidden_state.mean(1)[0] for model in (whole, quantized)] for ids in windows]
    cosines = [float(torch.nn.functional.cosine_similarity(one, other, dim=0)) for one, other in pairs]
    assert found.cosine_mean == pytest.approx(sum(cosines) / len(cosines), abs=1e-5)
