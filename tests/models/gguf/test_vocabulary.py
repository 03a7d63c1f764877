"""Tokenizers as GGUF. That llama.cpp cuts text as the tokenizers library does was measured with llama-tokenize for each
kind that is known here; what is left to check is that nothing else passes for one of them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import gguf
import pytest

from pennyweight.core.errors import ContainerError, ModelError
from pennyweight.models.gguf.merges_as_scores import begins_with_space, token_scores
from pennyweight.models.gguf.pre_tokenizer import pre_tokenizer_name
from pennyweight.models.gguf.sentencepiece_model import read_pieces
from pennyweight.models.gguf.vocabulary import Vocabulary, read_vocabulary
from tests.models.gguf.tiny import DEMO, PIECES

# As in the tokenizer.json of Llama 3 and of Qwen 2.
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2 = LLAMA3.replace("{1,3}", "")
# As in Mistral Nemo's.
TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
DIGITS = {"type": "Digits", "individual_digits": True}


def byte_level(*, use_regex: bool, add_prefix_space: bool = False) -> dict[str, Any]:
    return {"type": "ByteLevel", "add_prefix_space": add_prefix_space, "use_regex": use_regex}


def split(regex: str, behavior: str = "Isolated", *, invert: bool = False) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": regex}, "behavior": behavior, "invert": invert}


def named(*steps: dict[str, Any], ignore_merges: bool = False) -> str:
    definition = {"type": "Sequence", "pretokenizers": list(steps)}
    return pre_tokenizer_name({"pre_tokenizer": definition, "model": {"ignore_merges": ignore_merges}})


def test_pre_tokenizers_have_llama_cpps_names() -> None:
    bytes_only = byte_level(use_regex=False)
    assert named(byte_level(use_regex=True)) == "gpt-2"
    assert named(DIGITS, byte_level(use_regex=True)) == "smollm"
    assert named(split(LLAMA3), bytes_only, ignore_merges=True) == "llama-bpe"
    assert named(split(LLAMA3, "Removed", invert=True), bytes_only) == "smaug-bpe"
    assert named(split(QWEN2), bytes_only) == "qwen2"
    assert named(split(TEKKEN), bytes_only, ignore_merges=True) == "tekken"
    # Some files hold the characters themselves.
    assert named(split(QWEN2.replace(r"\r", "\r").replace(r"\n", "\n")), bytes_only) == "qwen2"


@pytest.mark.parametrize(
    "steps",
    [
        (),
        (split(QWEN2),),
        (split(QWEN2), byte_level(use_regex=True)),
        (split(QWEN2, "Removed"), byte_level(use_regex=False)),
        (split(QWEN2.replace("{L}+", "{L}*")), byte_level(use_regex=False)),
        (byte_level(use_regex=True, add_prefix_space=True),),
        (byte_level(use_regex=True), DIGITS),
        ({"type": "Digits", "individual_digits": False}, byte_level(use_regex=True)),
        ({"type": "Whitespace"}, byte_level(use_regex=True)),
    ],
)
def test_a_pre_tokenizer_that_llama_cpp_has_not_is_refused(steps: tuple[dict[str, Any], ...]) -> None:
    with pytest.raises(ContainerError, match="llama.cpp has no pre-tokenizer"):
        named(*steps)


def test_qwens_cuts_with_whole_words_first_are_refused() -> None:
    with pytest.raises(ContainerError, match="ignore_merges True"):
        named(split(QWEN2), byte_level(use_regex=False), ignore_merges=True)


def test_pieces_are_those_of_the_sentencepiece_package() -> None:
    sentencepiece = pytest.importorskip("sentencepiece")
    theirs = sentencepiece.SentencePieceProcessor(model_file=str(PIECES))
    pieces = read_pieces(PIECES)
    assert [piece.text for piece in pieces] == [theirs.id_to_piece(index) for index in range(len(theirs))]
    assert [piece.score for piece in pieces] == [theirs.get_score(index) for index in range(len(theirs))]
    for index, piece in enumerate(pieces):
        assert (piece.type is gguf.TokenType.BYTE) == theirs.is_byte(index)
        assert (piece.type is gguf.TokenType.CONTROL) == theirs.is_control(index)
        assert (piece.type is gguf.TokenType.UNKNOWN) == theirs.is_unknown(index)


@pytest.mark.parametrize("length", [1, 40, 5000, -1])
def test_a_shortened_sentencepiece_model_is_an_error(tmp_path: Path, length: int) -> None:
    (tmp_path / "tokenizer.model").write_bytes(PIECES.read_bytes()[:length])
    with pytest.raises(ModelError, match="tokenizer.model: can't be read as a SentencePiece model"):
        read_pieces(tmp_path / "tokenizer.model")


def test_a_unigram_model_is_refused(tmp_path: Path) -> None:
    trainer = bytes([2 << 3 | 2, 2, 3 << 3, 1])
    (tmp_path / "tokenizer.model").write_bytes(bytes([10, 3, 10, 1, 97]) + trainer)
    with pytest.raises(ContainerError, match="is not a BPE model"):
        read_pieces(tmp_path / "tokenizer.model")


def bpe(vocab: str, merges: str) -> dict[str, Any]:
    """Tokens and merges (a+b) from words."""
    pairs = [merge.split("+") for merge in merges.split()]
    return {"model": {"vocab": {token: index for index, token in enumerate(vocab.split())}, "merges": pairs}}


def test_scores_follow_the_ranks_of_merges() -> None:
    assert token_scores(bpe("a b c ab abc", "a+b ab+c")) == {"ab": 0.0, "abc": -1.0}
    assert token_scores(bpe("a b c ab bc abc", "a+b b+c ab+c a+bc")) == {"ab": 0.0, "bc": -1.0, "abc": -2.0}


def test_merges_that_scores_cannot_say_are_refused() -> None:
    # llama.cpp would join a and bc, too.
    with pytest.raises(ContainerError, match="'abc' has no merge of 'a' and 'bc'"):
        token_scores(bpe("a b c ab bc abc", "a+b b+c ab+c"))
    # Here a+bc waits for cd, which has no place between the scores of one token.
    with pytest.raises(ContainerError, match="the merges of 'abc' do not follow each other"):
        token_scores(bpe("a b c d ab bc cd abc", "a+b b+c ab+c c+d a+bc"))


def test_whether_text_begins_with_a_space() -> None:
    prepend = {"type": "Prepend", "prepend": "▁"}
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    both = {"type": "Sequence", "normalizers": [prepend, replace]}
    words = {"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": False}
    metaspace = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": False}
    model = bpe("a ▁ ▁a ▁▁", "▁+a ▁+▁")
    assert begins_with_space({"normalizer": both, **model})
    assert not begins_with_space({"normalizer": replace, "pre_tokenizer": words, **model})
    assert begins_with_space({"pre_tokenizer": metaspace, **model})
    assert not begins_with_space({"pre_tokenizer": {**metaspace, "prepend_scheme": "never"}, **model})
    with pytest.raises(ContainerError, match="'▁▁' holds a space"):
        begins_with_space({"pre_tokenizer": {**metaspace, "split": True}, **model})
    with pytest.raises(ContainerError, match="no normalizer like {'type': 'NFKC'}"):
        begins_with_space({"normalizer": {"type": "NFKC"}, **model})


def demo_vocabulary(tmp_path: Path, **settings: Any) -> Vocabulary:
    shutil.copy(DEMO / "tokenizer.json", tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    return read_vocabulary(tmp_path, vocab_size=4100, has_prefix=None)


def test_tokens_with_a_role_are_control_tokens_and_missing_ones_unused(tmp_path: Path) -> None:
    vocabulary = demo_vocabulary(
        tmp_path, pad_token="!", added_tokens_decoder={"4097": {"content": "▁▁"}, "4098": {"content": "<|x|>"}}
    )
    assert vocabulary.types[2] is gguf.TokenType.CONTROL
    assert vocabulary.types[3] is gguf.TokenType.NORMAL
    assert vocabulary.tokens[4096:] == ["[PAD4096]", "  ", "<|x|>", "[PAD4099]"]
    kinds = gguf.TokenType
    assert vocabulary.types[4096:] == [kinds.UNUSED, kinds.USER_DEFINED, kinds.CONTROL, kinds.UNUSED]


def test_a_model_without_a_tokenizer_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="has neither tokenizer.json nor tokenizer.model"):
        read_vocabulary(tmp_path, vocab_size=8, has_prefix=None)
    (tmp_path / "tokenizer.json").write_text("[")
    with pytest.raises(ModelError, match="tokenizer.json: can't be read as JSON"):
        read_vocabulary(tmp_path, vocab_size=8, has_prefix=None)
