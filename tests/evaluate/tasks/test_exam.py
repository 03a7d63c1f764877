"""What each kind makes of a model, against transformers on whole, padded batches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from scipy.stats import spearmanr
from torch import Tensor

from pennyweight.core.errors import DataError, ModelError
from pennyweight.evaluate import sequences
from pennyweight.evaluate.sequences import each_output
from pennyweight.evaluate.tasks.base import FieldError, Passage, Tokens
from pennyweight.evaluate.tasks.exam import Exam
from pennyweight.evaluate.tasks.file import read_task
from pennyweight.models import text
from pennyweight.models.streamed import StreamedModel
from tests.evaluate.tasks import examples
from tests.pipeline import tiny

ITEMS = 30
# Float32 sums of up to a dozen log-probabilities; another order of batches and padding.
LOG_P = 2e-4


@pytest.fixture(scope="module")
def demo() -> StreamedModel:
    return StreamedModel(examples.DEMO)


@pytest.fixture(scope="module")
def whole() -> tuple[Any, Any]:
    """The shipped model as transformers loads it, and its tokenizer."""
    loaded = transformers.AutoModelForCausalLM.from_pretrained(examples.DEMO, dtype=torch.float32)
    return loaded, transformers.AutoTokenizer.from_pretrained(examples.DEMO)


def _padded(model: Any, ids: list[list[int]]) -> Tensor:
    """Outputs [sequences, tokens, ...] for sequences that are padded at the right and masked."""
    longest = max(map(len, ids))
    padded = torch.tensor([one + [0] * (longest - len(one)) for one in ids])
    mask = torch.tensor([[1] * len(one) + [0] * (longest - len(one)) for one in ids])
    with torch.no_grad():
        out = model(input_ids=padded, attention_mask=mask)
    return out.logits if "logits" in out else out.last_hidden_state


def _logs(whole: tuple[Any, Any], context: str, endings: list[str]) -> list[tuple[float, bool]]:
    """log p of each ending after the context, and whether greedy decoding gives it."""
    model, tokenizer = whole
    begin = len(tokenizer(context)["input_ids"])
    ids = [tokenizer(context + ending)["input_ids"] for ending in endings]
    assert all(one[:begin] == tokenizer(context)["input_ids"] for one in ids)
    found = []
    for one, logits in zip(ids, _padded(model, ids), strict=True):
        log_p = logits.double().log_softmax(-1)
        pairs = [(log_p[place - 1], one[place]) for place in range(begin, len(one))]
        found.append((sum(float(row[token]) for row, token in pairs), all(int(row.argmax()) == t for row, t in pairs)))
    return found


def test_multiple_choice_is_that_of_transformers(demo: StreamedModel, whole: tuple[Any, Any], tmp_path: Path) -> None:
    items = examples.continuations(examples.held_out(), ITEMS, length=6)
    exam = Exam.of(read_task(examples.write(tmp_path / "task.jsonl", items)), demo)
    logs = [[log for log, _ in _logs(whole, item["context"], item["choices"])] for item in items]
    passages = [passage for found in exam.passages for passage in found]
    read = exam.task.metric.read
    ours = each_output(demo, [one.ids for one in passages], lambda output, index: read(output, passages[index]))
    assert [float(one) for one in ours] == pytest.approx([log for found in logs for log in found], abs=LOG_P)
    right = [max(found) == found[item["answer"]] for found, item in zip(logs, items, strict=True)]
    by_length = [[log / len(choice) for log, choice in zip(found, item["choices"], strict=True)]
                 for found, item in zip(logs, items, strict=True)]  # fmt: skip
    normalised = [max(found) == found[item["answer"]] for found, item in zip(by_length, items, strict=True)]
    metric, readings = exam.task.metric, torch.stack(ours).reshape(ITEMS, 3)
    outcomes = [metric.outcome(item, list(found)) for item, found in zip(exam.task.items, readings, strict=True)]
    assert outcomes == list(zip(map(float, right), map(float, normalised), strict=True))
    assert exam.metrics(outcomes) == {
        "accuracy": pytest.approx(100 * sum(right) / ITEMS),
        "accuracy_normalised": pytest.approx(100 * sum(normalised) / ITEMS),
    }
    assert right != normalised


def test_cloze_is_what_transformers_decodes(demo: StreamedModel, whole: tuple[Any, Any], tmp_path: Path) -> None:
    items = examples.blanks(examples.held_out(), 2 * ITEMS)
    exam = Exam.of(read_task(examples.write(tmp_path / "task.jsonl", items)), demo)
    right = [_logs(whole, item["context"], [item["target"]])[0][1] for item in items]
    assert [outcome[0] for outcome in exam.outcomes(demo)] == right
    assert 0 < sum(right) < len(right)


def test_sentence_pairs_are_those_of_transformers(tmp_path: Path) -> None:
    path = examples.bert(tmp_path / "model")
    words = tiny.words().split()
    items = examples.pairs(words, ITEMS)
    model = StreamedModel(path)
    exam = Exam.of(read_task(examples.write(tmp_path / "task.jsonl", items)), model)
    loaded = transformers.AutoModel.from_pretrained(path)
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    cosines = []
    for item in items:
        ids = [tokenizer(item[side])["input_ids"] for side in ("a", "b")]
        hidden = _padded(loaded, ids)
        a, b = (rows[: len(one)].double().mean(0) for rows, one in zip(hidden, ids, strict=True))
        cosines.append(float(torch.cosine_similarity(a, b, dim=0)))
    outcomes = exam.outcomes(model)
    assert [outcome[0] for outcome in outcomes] == pytest.approx(cosines, abs=1e-5)
    expected = spearmanr([outcome[0] for outcome in outcomes], [item["score"] for item in items]).statistic
    assert exam.metrics(outcomes) == {"spearman": pytest.approx(100 * expected)}
    assert len(exam.distinct) < 2 * ITEMS


def test_neither_neighbours_nor_rounds_nor_threads_change_an_output(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = StreamedModel(tiny.llama(tmp_path / "model"))
    lengths = [5, 17, 3, 17, 9, 40, 5, 5, 17, 3]
    ids = [torch.randint(0, 256, (length,), generator=torch.Generator().manual_seed(length)).tolist()
           for length in lengths]  # fmt: skip

    def outputs(some: list[list[int]]) -> list[Tensor]:
        return each_output(model, some, lambda output, index: output)

    together = outputs(ids)
    assert [len(output) for output in together] == lengths
    alone = [outputs([one])[0] for one in ids]
    for one, other in zip(together, alone, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
    monkeypatch.setattr(sequences, "_STATES_BYTES", 4 * 32 * 30)
    started = []
    real = StreamedModel.start
    monkeypatch.setattr(StreamedModel, "start", lambda self, batches: started.append(1) or real(self, batches))
    torch.set_num_threads(1)
    in_rounds = outputs(ids)
    torch.set_num_threads(2)
    assert len(started) > 2
    assert all(torch.equal(one, other) for one, other in zip(together, in_rounds, strict=True))


def test_what_counts_begins_where_the_context_ends_or_where_tokens_span_it() -> None:
    def tokenizer(written: str, **_: object) -> dict[str, list[int]]:
        """Letters, but "bc" is one token."""
        return {"input_ids": [ord(letter) for letter in written.replace("bc", "X")]}

    tokens = Tokens(tokenizer, text.Prefixes([1], [2]))
    assert tokens.sentence("ab") == Passage((1, 97, 98, 2))
    assert tokens.continued("ab", ["d", "dd"]) == [Passage((1, 97, 98, 100), 3), Passage((1, 97, 98, 100, 100), 3)]
    # "b" is not there before "c", so it counts in both.
    assert tokens.continued("ab", ["d", "c"]) == [Passage((1, 97, 98, 100), 2), Passage((1, 97, ord("X")), 2)]
    assert tokens.continued("", ["d"]) == [Passage((1, 100), 1)]
    bare = Tokens(tokenizer, text.Prefixes([], []))
    with pytest.raises(FieldError, match="`context` is no token"):
        bare.continued("", ["d"])


def test_a_model_that_cannot_be_asked_is_told_what_it_can(tmp_path: Path) -> None:
    words = tiny.words().split()
    blanks = read_task(examples.write(tmp_path / "cloze.jsonl", examples.blanks(words, ITEMS)))
    pairs = read_task(examples.write(tmp_path / "pairs.jsonl", examples.pairs(words, ITEMS)))
    encoder = StreamedModel(examples.bert(tmp_path / "bert"))
    decoder = StreamedModel(tiny.llama(tmp_path / "llama", max_position_embeddings=24))
    with pytest.raises(ModelError, match="is cloze, and BertModel predicts no tokens: give sentence-pairs"):
        Exam.of(blanks, encoder)
    with pytest.raises(ModelError, match="is sentence-pairs, and LlamaForCausalLM is no encoder: give multiple"):
        Exam.of(pairs, decoder)
    with pytest.raises(DataError, match=r"cloze.jsonl, line \d+: \d+ tokens, and .* takes 24: shorten it"):
        Exam.of(blanks, decoder)
