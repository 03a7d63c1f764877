"""Tokens one after the other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import pennyweight as pw
from pennyweight.inference.generate import stream
from tests.containers import artefacts


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    directory = tmp_path_factory.mktemp("generate")
    src = artefacts.llama(directory / "model")
    return pw.load(artefacts.write(src, src.plan("int4-g32"), directory / "out").directory, cache=False)


IDS = artefacts.TOKENS[:1, 1:6]


def _tokens(model: Any, **options: Any) -> list[int]:
    return list(stream(model, IDS, **({"max_tokens": 12, "temperature": 0.0} | options)))


def test_the_likeliest_tokens_are_those_of_transformers(model: Any) -> None:
    expected = model.generate(IDS, max_new_tokens=12, do_sample=False)[0, IDS.shape[1] :].tolist()
    assert _tokens(model) == expected


def test_a_text_ends_with_the_token_that_ends_it(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    every = _tokens(model)
    end = every[4]
    for given in (end, [end, 10**6]):
        monkeypatch.setattr(model.generation_config, "eos_token_id", given)
        assert _tokens(model) == every[: every.index(end) + 1]
    monkeypatch.setattr(model.generation_config, "eos_token_id", None)
    assert len(_tokens(model)) == 12


def test_sampling_is_repeated_by_its_seed(model: Any) -> None:
    drawn = [
        _tokens(model, temperature=5.0, generator=torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)
    ]  # fmt: skip
    assert drawn[0] == drawn[1] != drawn[2]


def test_the_caller_may_do_as_it_likes_between_tokens(model: Any, tmp_path: Path) -> None:
    for _ in stream(model, IDS, max_tokens=2, temperature=0.0):
        assert torch.is_grad_enabled()
