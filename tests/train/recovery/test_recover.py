"""Recovery lowers the loss, never returns anything worse, and does not depend on the number of threads."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers

from pennyweight.core.errors import DataError
from pennyweight.models.streamed import StreamedModel
from pennyweight.train.recovery.recover import Recovered, Settings, Step, recover
from tests.pipeline import tiny
from tests.train.recovery.conftest import Case, case

SETTINGS = Settings(epochs=4, batch=1, rate=5e-3, held_out=4, checks=4, tokens=32)


def _recover(given: Case, directory: Path, settings: Settings = SETTINGS, **kwargs: object) -> Recovered:
    weights = given.weights("int3-g16-bf16")
    return recover(
        given.model, StreamedModel(given.path), weights, given.windows, directory, settings=settings, **kwargs
    )  # type: ignore[arg-type]


def test_the_loss_falls_on_windows_that_were_not_trained_on(llama: Case, tmp_path: Path) -> None:
    told: list[Step] = []
    found = _recover(llama, tmp_path, tell=told.append)
    assert found.after < 0.95 * found.before
    assert found.after == min(step.held_out for step in told if step.held_out is not None)
    assert [step.done for step in told] == list(range(found.steps + 1))
    assert {weight.scales.dtype for weight in found.weights.values()} == {torch.bfloat16}


def test_without_steps_everything_is_as_it_was(llama: Case, tmp_path: Path) -> None:
    found = _recover(llama, tmp_path, Settings(epochs=0, tokens=32))
    assert found.steps == found.step == 0
    assert found.after == found.before
    _assert_unchanged(llama, found)


def test_steps_that_only_harm_are_undone(llama: Case, tmp_path: Path) -> None:
    found = _recover(llama, tmp_path, Settings(epochs=1, batch=1, rate=10, checks=2, tokens=32))
    assert found.steps > 1
    assert found.step == 0
    assert found.after == found.before
    _assert_unchanged(llama, found)


def _assert_unchanged(llama: Case, found: Recovered) -> None:
    for name, weight in llama.weights("int3-g16-bf16").items():
        assert torch.equal(found.weights[name].scales, weight.scales)
        assert torch.equal(found.weights[name].codes, weight.codes)
    for key, vector in found.vectors.items():
        assert torch.equal(vector, llama.model.checkpoint.read(key))


def test_the_number_of_threads_changes_nothing(llama: Case, tmp_path: Path) -> None:
    settings = Settings(epochs=1, batch=3, held_out=4, checks=1, tokens=32)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            (tmp_path / str(threads)).mkdir()
            results.append(_recover(llama, tmp_path / str(threads), settings))
    finally:
        torch.set_num_threads(before)
    assert results[0].after == results[1].after
    for name, weight in results[0].weights.items():
        assert torch.equal(weight.scales, results[1].weights[name].scales)
    for key, vector in results[0].vectors.items():
        assert torch.equal(vector, results[1].vectors[key])


def test_an_encoder_learns_its_last_hidden_state(tmp_path: Path) -> None:
    config = transformers.BertConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
                                     vocab_size=tiny.VOCABULARY, max_position_embeddings=64)  # fmt: skip
    bert = case(tiny.save(transformers.BertModel, config, tmp_path / "model"))
    found = _recover(bert, tmp_path)
    assert found.after < 0.9 * found.before


def test_one_batch_of_windows_is_too_little(llama: Case, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="give more text"):
        _recover(Case(llama.path, llama.model, llama.windows[:3]), tmp_path)
