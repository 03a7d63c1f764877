"""Text into windows of tokens."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

import pennyweight
from pennyweight.core.errors import DataError, ModelError
from pennyweight.models import text

WORDS = [f"w{index}" for index in range(200)]
CLS, SEP, BOS = 1, 2, 3
TEMPLATE = "{% for m in messages %}{{ m['role'] }} {{ m['content'] }} {% endfor %}"
REFUSING = "{{ raise_exception('roles must alternate') }}"


def tokenizer(style: str = "plain") -> Any:
    """A word-level tokenizer; style "bos" or "cls" says what it puts around a text."""
    vocabulary = {"[UNK]": 0, "[CLS]": CLS, "[SEP]": SEP, "<s>": BOS, "a": 4, "user": 5}
    vocabulary |= {word: 10 + index for index, word in enumerate(WORDS)}
    raw = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if style == "bos":
        raw.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    if style == "cls":
        marks = [("[CLS]", CLS), ("[SEP]", SEP)]
        raw.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=marks)
    return PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="[UNK]")


def words(count: int, start: int = 0) -> str:
    return " ".join(WORDS[(start + index) % len(WORDS)] for index in range(count))


def test_windows_of_a_plain_tokenizer_are_the_text_cut() -> None:
    assert text.windows([words(23)], tokenizer(), length=5).tolist() == [
        list(range(10 + first, 15 + first)) for first in (0, 5, 10, 15)
    ]


def test_every_window_begins_with_bos() -> None:
    found = text.windows([words(20)], tokenizer("bos"), length=5)
    assert found.tolist() == [[BOS, *range(10 + first, 14 + first)] for first in (0, 4, 8, 12, 16)]


def test_every_window_stands_between_cls_and_sep() -> None:
    found = text.windows([words(9)], tokenizer("cls"), length=5)
    assert found.tolist() == [[CLS, *range(10 + first, 13 + first), SEP] for first in (0, 3, 6)]


def test_documents_follow_each_other_with_special_tokens_between_them() -> None:
    found = text.windows([words(3), words(2)], tokenizer("cls"), length=9)
    assert found.tolist() == [[CLS, 10, 11, 12, SEP, CLS, 10, 11, SEP]]


def test_windows_are_drawn_by_seed_without_repetition_in_the_order_of_the_text() -> None:
    drawn = [text.windows([words(200)], tokenizer(), length=4, count=10, seed=seed) for seed in (0, 0, 1)]
    assert drawn[0].shape == (10, 4)
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])
    starts = drawn[0][:, 0].tolist()
    assert starts == sorted(set(starts))


def test_a_count_beyond_the_text_gives_all_windows() -> None:
    assert text.windows([words(20)], tokenizer(), length=4, count=99).shape == (5, 4)


@pytest.mark.parametrize("length", [24, 500])
def test_text_shorter_than_a_window_is_refused(length: int) -> None:
    with pytest.raises(DataError, match=f"23 tokens, fewer than one window of {length}"):
        text.windows([words(23)], tokenizer(), length=length)


def test_a_window_without_room_for_text_is_refused() -> None:
    with pytest.raises(DataError, match="at least 4"):
        text.windows([words(23)], tokenizer("cls"), length=3)


def test_text_files_are_cut_at_the_end_of_text_mark(tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_text("one\n<|endoftext|>\ntwo<|endoftext|>\n")
    assert [part.strip() for part in text.documents(str(tmp_path / "t.txt"), tokenizer())] == ["one", "two"]


def test_jsonl_holds_text_or_messages(tmp_path: Path) -> None:
    chat = tokenizer()
    chat.chat_template = TEMPLATE
    messages = [{"role": "user", "content": "w1 w2"}]
    lines = [json.dumps({"text": "one", "other": 1}), "", json.dumps({"messages": messages})]
    (tmp_path / "t.jsonl").write_text("\n".join(lines))
    assert text.documents(str(tmp_path / "t.jsonl"), chat) == ["one", "user w1 w2 "]


@pytest.mark.parametrize(
    ("line", "template", "message"),
    [
        ('{"text": ', None, "line 2: not valid JSON"),
        ('{"words": "x"}', None, "line 2: an object with a `text`"),
        ('["x"]', None, "line 2: an object with a `text`"),
        ('{"messages": []}', None, "line 2: `messages` need a chat template"),
        ('{"messages": [{"role": "user", "content": "x"}]}', REFUSING, "line 2: .*roles must alternate"),
    ],
)
def test_a_bad_line_is_refused_by_its_number(tmp_path: Path, line: str, template: str | None, message: str) -> None:
    chat = tokenizer()
    chat.chat_template = template
    (tmp_path / "t.jsonl").write_text('{"text": "fine"}\n' + line)
    with pytest.raises(DataError, match=message):
        text.documents(str(tmp_path / "t.jsonl"), chat)


def test_a_directory_is_read_in_the_order_of_its_names(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "x.md").write_text("third")
    (tmp_path / "a.jsonl").write_text('{"text": "first"}')
    (tmp_path / "aa.txt").write_text("second")
    (tmp_path / "info.json").write_text('{"licence": "none of the text"}')
    assert text.documents(str(tmp_path), tokenizer()) == ["first", "second", "third"]


@pytest.mark.parametrize("content", [None, b"", b" \n"])
def test_no_text_is_refused(tmp_path: Path, content: bytes | None) -> None:
    if content is not None:
        (tmp_path / "t.txt").write_bytes(content)
    with pytest.raises(DataError, match="does not exist" if content is None else "holds no text"):
        text.documents(str(tmp_path / "t.txt"), tokenizer())


def test_text_that_is_not_utf8_is_refused_with_the_place(tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_bytes(b"fine \xff\xfe")
    with pytest.raises(DataError, match="not UTF-8.*byte 5"):
        text.documents(str(tmp_path / "t.txt"), tokenizer())


def test_a_directory_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="tokenizer"):
        text.load_tokenizer(tmp_path)


def test_tokens_outside_the_vocabulary_are_refused() -> None:
    from transformers import LlamaConfig

    config = LlamaConfig(vocab_size=50)
    text.check_vocabulary(torch.tensor([[0, 49]]), config)
    with pytest.raises(DataError, match="token id 50 is outside the model's vocabulary of 50"):
        text.check_vocabulary(torch.tensor([[0, 50]]), config)


def test_batches_depend_on_nothing_but_the_length() -> None:
    whole = torch.arange(40).reshape(10, 4)
    cut = text.batches(whole)
    assert torch.equal(torch.cat(cut), whole)
    assert [len(part) for part in text.batches(torch.zeros(3, 5000))] == [1, 1, 1]


def test_windows_of_equal_length_are_in_batches_together_without_padding() -> None:
    windows = [torch.full((length,), number) for number, length in enumerate((7, 300, 7, 200, 300, 7, 2))]
    found = [batch.tolist() for batch in text.batches(windows)]
    assert found == [[[6] * 2], [[0] * 7, [2] * 7, [5] * 7], [[3] * 200], [[1] * 300], [[4] * 300]]


def test_the_hash_of_windows_is_that_of_their_ids_one_after_the_other() -> None:
    ids = torch.arange(24)
    expected = hashlib.sha256(ids.numpy().tobytes()).hexdigest()
    assert text.digest(ids.reshape(4, 6)) == text.digest(ids.split(6)) == expected
    assert text.digest(ids.reshape(6, 4).T) != expected


def test_the_hash_of_windows_of_several_lengths_knows_where_they_end() -> None:
    ids = torch.arange(6)
    cuts = ([6], [3, 1, 2], [1, 2, 3], [1, 3, 2], [1, 5])
    assert len({text.digest(ids.split(cut)) for cut in cuts}) == len(cuts)


def test_every_passage_is_a_text_by_itself_with_its_special_tokens() -> None:
    found = text.passages([words(3), "", words(9, start=3), words(1)], tokenizer("cls"), length=6)
    ids = [10, 11, 12], [13, 14, 15, 16], [17, 18, 19, 20], [21], [10]
    assert [window.tolist() for window in found] == [[CLS, *part, SEP] for part in ids]


@given(sizes=st.lists(st.integers(1, 30), min_size=1, max_size=20), most=st.integers(1, 300), seed=st.integers(0, 3))
def test_passages_are_drawn_until_the_tokens_are_full(sizes: list[int], most: int, seed: int) -> None:
    texts, marked = [words(size, start=number) for number, size in enumerate(sizes)], tokenizer("cls")
    every = [window.tolist() for window in text.passages(texts, marked, length=12)]
    found = [window.tolist() for window in text.passages(texts, marked, length=12, most=most, seed=seed)]
    again = text.passages(texts, marked, length=12, most=most, seed=seed)
    assert [window.tolist() for window in again] == found
    in_order = iter(every)
    assert all(window in in_order for window in found)
    assert sum(map(len, found)) <= most or len(found) == 1
    if sum(map(len, every)) <= most:
        assert found == every
    else:
        # No text has more than 12 tokens.
        assert sum(map(len, found)) > most - 12


def test_a_template_that_writes_bos_gets_no_second_one() -> None:
    marked = tokenizer("bos")
    for cut in (text.passages, text.windows):
        assert [window.tolist() for window in cut(["<s> w0 w1 w2"], marked, length=4)] == [[BOS, 10, 11, 12]]


def test_another_seed_draws_other_passages() -> None:
    texts = [words(5, start=number) for number in range(100)]
    drawn = [text.digest(text.passages(texts, tokenizer(), length=9, most=60, seed=seed)) for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]


def test_passages_without_text_or_room_are_refused() -> None:
    with pytest.raises(DataError, match="the text has no tokens"):
        text.passages(["", " "], tokenizer("cls"), length=8)
    with pytest.raises(DataError, match="leave no room for text: give at least 4"):
        text.passages(["a"], tokenizer("cls"), length=3)


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        ("one\ntwo\n\n three\n \t\nfour\n\n\n", ["one\ntwo", "three", "four"]),
        ("one\ntwo\n\n", ["one", "two"]),
        ("one\n<|endoftext|>\ntwo\nthree\n", ["one", "two", "three"]),
        ("one\ntwo\n\nthree<|endoftext|>four\nfive", ["one\ntwo", "three", "four\nfive"]),
        ("one\ntwo\n\nthree<|endoftext|>", ["one\ntwo", "three"]),
        ("one\r\ntwo\r\n\r\nthree\r\n", ["one\ntwo", "three"]),
        ("one\n" * 60 + "\n" + "two\n" * 60, ["one"] * 60 + ["two"] * 60),
        ("one\n" * 20 + "\n" + "two\n" * 20, ["\n".join(["one"] * 20), "\n".join(["two"] * 20)]),
    ],
)
def test_plain_text_is_cut_into_paragraphs_or_else_lines(written: str, expected: list[str], tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_text(written)
    assert text.documents(str(tmp_path / "t.txt"), tokenizer(), paragraphs=True) == expected


def test_a_record_is_one_text_whatever_is_in_it(tmp_path: Path) -> None:
    (tmp_path / "t.jsonl").write_text(json.dumps({"text": "one\n\ntwo"}) + "\n")
    assert text.documents(str(tmp_path / "t.jsonl"), tokenizer(), paragraphs=True) == ["one\n\ntwo"]


def test_the_built_in_text_has_long_and_short_paragraphs_and_loses_none() -> None:
    whole = " ".join(text.documents(text.BUILT_IN, tokenizer())).split()
    found = text.documents(text.BUILT_IN, tokenizer(), paragraphs=True)
    assert " ".join(found).split() == whole
    sizes = [len(part.split()) for part in found]
    assert sum(size <= 10 for size in sizes) > 0.5 * len(sizes)
    assert sum(size for size in sizes if size > 40) > 0.3 * len(whole)


def test_the_built_in_text_is_enough_and_keeps_clear_of_what_is_held_out() -> None:
    documents = text.documents(text.BUILT_IN, tokenizer())
    assert len(documents) == 100
    held_out = (Path(pennyweight.__file__).parent / "demo_model" / "held-out.txt").read_text(encoding="utf-8")
    telling = {line.strip() for line in held_out.split("\n") if len(line.strip()) >= 40}
    assert telling.isdisjoint(line.strip() for document in documents for line in document.split("\n"))
    # The most frugal tokenizers take five characters for a token: 128 windows of 512 must be there for them too.
    assert sum(map(len, documents)) > 5 * 128 * 512
