"""Windows that the model writes itself: exact where theory says so, and the same whoever computes them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from pennyweight.core.errors import ModelError
from pennyweight.models.self_text import own_windows, sampled
from pennyweight.models.streamed import StreamedModel
from tests.models.families import FAMILIES, build, save


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(build("LlamaForCausalLM", FAMILIES["llama"].config), tmp_path_factory.mktemp("llama"))


def test_neither_threads_nor_a_second_run_change_them_but_the_seed_does(path: Path) -> None:
    before = torch.get_num_threads()
    found = []
    try:
        for threads, seed in ((1, 0), (2, 0), (2, 1)):
            torch.set_num_threads(threads)
            found.append(own_windows(StreamedModel(path), length=20, count=70, seed=seed))
    finally:
        torch.set_num_threads(before)
    assert found[0].shape == (70, 20)
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


def test_the_second_token_has_the_frequencies_of_the_model(path: Path) -> None:
    model = StreamedModel(path)
    windows = own_windows(model, length=3, count=4000, passes=1)
    begin = windows[0, 0]
    assert (windows[:, 0] == begin).all()
    stream = model.run([begin.reshape(1, 1)])
    with model.finishing(stream) as finish:
        expected = finish(0)[0, 0].softmax(-1)
    counts = torch.bincount(windows[:, 1], minlength=len(expected)) / len(windows)
    # Four standard errors of the frequency of the likeliest token.
    top = int(expected.argmax())
    assert abs(counts[top] - expected[top]) < 4 * (expected[top] * (1 - expected[top]) / len(windows)).sqrt()
    assert float((counts - expected).abs().sum()) < 0.2


def test_an_encoder_writes_nothing(tmp_path: Path) -> None:
    path = save(build(FAMILIES["bert"].architecture, FAMILIES["bert"].config), tmp_path)
    with pytest.raises(ModelError, match="does not write text"):
        own_windows(StreamedModel(path), length=8, count=1)


def test_tokens_are_drawn_as_often_as_they_are_likely() -> None:
    p = torch.tensor([0.5, 0.3, 0.2, 0.0])
    rows = 20_000
    drawn = sampled(p.log().expand(rows, 4), torch.Generator().manual_seed(0))
    often = torch.bincount(drawn, minlength=4) / rows
    # Four standard deviations.
    assert ((often - p).abs() <= 4 * (p * (1 - p) / rows).sqrt()).all()
