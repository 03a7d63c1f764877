"""`tokenizer.ggml.*`: a tokenizer as GGUF.

Three kinds are known: SentencePiece (tokenizer.model), the same as tokenizer.json alone (BPE with byte_fallback), and
byte-level BPE (tokenizer.json).
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import gguf
import gguf.vocab

from pennyweight.core.errors import ContainerError, ModelError
from pennyweight.models.gguf.merges_as_scores import begins_with_space, token_scores
from pennyweight.models.gguf.pre_tokenizer import pre_tokenizer_name
from pennyweight.models.gguf.sentencepiece_model import read_pieces

_BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>")
# Tokens that some models forget to call special.
_LOOKS_SPECIAL = re.compile(r"<pad>|<mask>|<2mass>|\[@BOS@\]|<\|.*\|>|<\uff5c.*\uff5c>|<unused.*>", re.DOTALL)
_UNUSED_SCORE, _ADDED_SCORE = -10000.0, -1000.0
_TYPE = gguf.TokenType


@dataclass(frozen=True)
class Vocabulary:
    """model: llama.cpp's kind of tokenizer; pre: how it cuts text into words; scores: None for byte-level BPE;
    has_prefix: whether text begins with a space, None where llama.cpp decides."""

    model: Literal["gpt2", "llama"]
    pre: str
    tokens: list[str]
    types: list[gguf.TokenType]
    scores: list[float] | None
    has_prefix: bool | None


@dataclass(frozen=True)
class _Files:
    """The tokenizer's files; `settings` is tokenizer_config.json."""

    path: Path
    tokenizer: Mapping[str, Any] | None
    settings: Mapping[str, Any]
    added: Mapping[str, Any]


def read_vocabulary(path: Path, *, vocab_size: int, has_prefix: bool | None) -> Vocabulary:
    """The tokenizer in the directory `path`, padded to `vocab_size` tokens.

    Raises ModelError where there is none that can be read, ContainerError for one that llama.cpp would not follow.
    """
    files = _Files(
        path,
        _read_json(path / "tokenizer.json"),
        _read_json(path / "tokenizer_config.json") or {},
        _read_json(path / "added_tokens.json") or {},
    )
    stated = files.settings.get("add_prefix_space")
    if (path / "tokenizer.model").is_file():
        return _sentencepiece(files, vocab_size, stated if has_prefix is None else has_prefix)
    if files.tokenizer is None:
        raise ModelError(
            f"{path}: has neither tokenizer.json nor tokenizer.model, one of which a GGUF file needs. Load the "
            "tokenizer in transformers and call tokenizer.save_pretrained(directory)."
        )
    if files.tokenizer.get("model", {}).get("type") != "BPE":
        raise ContainerError(f"{path / 'tokenizer.json'}: is not BPE, the only kind that is known: choose another one")
    if files.tokenizer["model"].get("byte_fallback"):
        return _scored(files, files.tokenizer, vocab_size, stated if has_prefix is None else has_prefix)
    return _byte_level(files, files.tokenizer, vocab_size)


def _read_json(file: Path) -> dict[str, Any] | None:
    if not file.is_file():
        return None
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{file}: can't be read as JSON ({error}): download it again") from error
    if not isinstance(value, dict):
        raise ModelError(f"{file}: holds {type(value).__name__}, not an object: download it again")
    return value


class _Table:
    """Tokens by id while they are gathered; ids that nothing fills are unused."""

    def __init__(self, size: int) -> None:
        self.tokens = [f"[PAD{index}]" for index in range(size)]
        self.scores = [_UNUSED_SCORE] * size
        self.types = [_TYPE.UNUSED] * size

    def put(self, index: int, token: str, kind: gguf.TokenType, score: float) -> None:
        self.tokens[index], self.types[index], self.scores[index] = token, kind, score

    def put_added(self, index: int, token: str, *, is_special: bool) -> None:
        if is_special or _LOOKS_SPECIAL.fullmatch(token):
            self.put(index, token, _TYPE.CONTROL, _ADDED_SCORE)
        else:
            # llama.cpp looks for these in the text as it is.
            self.put(index, token.replace("▁", " "), _TYPE.USER_DEFINED, _ADDED_SCORE)


def _sentencepiece(files: _Files, size: int, has_prefix: bool | None) -> Vocabulary:
    table = _Table(size)
    for index, piece in enumerate(read_pieces(files.path / "tokenizer.model")[:size]):
        table.put(index, piece.text, piece.type, piece.score)
    for token, index in files.added.items():
        if index < size:
            table.put(index, token, _TYPE.USER_DEFINED, _ADDED_SCORE)
    listed = files.settings.get("added_tokens_decoder", {})
    for index, token in ((int(index), token) for index, token in listed.items()):
        if index < size:
            table.put_added(index, token["content"], is_special=bool(token.get("special")))
    for token in (files.tokenizer or {}).get("added_tokens", ()):
        index = token["id"]
        is_known = str(index) in listed or index >= size or table.types[index] in (_TYPE.UNKNOWN, _TYPE.CONTROL)
        if not is_known:
            table.put_added(index, token["content"], is_special=token["special"])
    if has_prefix is None and files.tokenizer is not None and not begins_with_space(files.tokenizer):
        has_prefix = False
    return Vocabulary("llama", "default", table.tokens, table.types, table.scores, has_prefix)


def _scored(files: _Files, tokenizer: Mapping[str, Any], size: int, has_prefix: bool | None) -> Vocabulary:
    model = tokenizer["model"]
    if model.get("ignore_merges"):
        raise ContainerError(
            f"{files.path / 'tokenizer.json'}: has byte_fallback and ignore_merges, which llama.cpp has not together: "
            "choose another container"
        )
    table = _Table(_checked_size(files, tokenizer, size))
    scores = token_scores(tokenizer)
    lowest = -float(len(model["merges"]))
    for token, index in model["vocab"].items():
        kind = _TYPE.BYTE if _BYTE.fullmatch(token) else _TYPE.NORMAL
        table.put(index, token, kind, scores.get(token, lowest))
    for token, index, is_special in _added(files, tokenizer):
        table.put_added(index, token, is_special=is_special)
    if has_prefix is None and not begins_with_space(tokenizer):
        has_prefix = False
    return Vocabulary("llama", "default", table.tokens, table.types, table.scores, has_prefix)


def _byte_level(files: _Files, tokenizer: Mapping[str, Any], size: int) -> Vocabulary:
    file = files.path / "tokenizer.json"
    normalizer = tokenizer.get("normalizer") or {}
    # llama.cpp leaves text as it is; NFC changes only text that is rarely written.
    if normalizer and normalizer.get("type") != "NFC" and normalizer.get("normalizers") != []:
        raise ContainerError(f"{file}: llama.cpp has no normalizer like {normalizer}: choose another container")
    model = tokenizer["model"]
    if model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"):
        raise ContainerError(f"{file}: marks parts of words, which llama.cpp's BPE does not: choose another container")
    table = _Table(_checked_size(files, tokenizer, size))
    for token, index in model["vocab"].items():
        table.put(index, token, _TYPE.NORMAL, 0.0)
    for token, index, is_special in _added(files, tokenizer):
        table.put_added(index, token, is_special=is_special)
    return Vocabulary("gpt2", pre_tokenizer_name(tokenizer), table.tokens, table.types, None, None)


def _checked_size(files: _Files, tokenizer: Mapping[str, Any], size: int) -> int:
    ids = [*tokenizer["model"]["vocab"].values(), *(index for _, index, _ in _added(files, tokenizer))]
    if max(ids) >= size:
        raise ContainerError(
            f"{files.path}: the tokenizer has a token {max(ids)}, but config.json a vocab_size of {size}; "
            "tokenizer and model do not belong together"
        )
    return size


def _added(files: _Files, tokenizer: Mapping[str, Any]) -> list[tuple[str, int, bool]]:
    """Token, id, is special: those that the files add, and those that tokenizer_config.json gives a role."""
    found = {token["content"]: (token["id"], bool(token["special"])) for token in tokenizer.get("added_tokens", ())}
    for index, token in files.settings.get("added_tokens_decoder", {}).items():
        found.setdefault(token["content"], (int(index), bool(token.get("special"))))
    vocab = tokenizer["model"]["vocab"]
    for key, value in files.settings.items():
        content = value.get("content") if isinstance(value, dict) else value
        if key.endswith("_token") and isinstance(content, str) and (content in found or content in vocab):
            found[content] = (found[content][0] if content in found else vocab[content], True)
    return [(token, index, is_special) for token, (index, is_special) in found.items()]


def _check_distinct(path: Path, tokens: Sequence[str]) -> None:
    seen: set[str] = set()
    for token in tokens:
        if token in seen:
            raise ContainerError(
                f"{path}: two tokens read {token!r}, and llama.cpp stops at such a file: choose another container"
            )
        seen.add(token)


def add_vocabulary(writer: gguf.GGUFWriter, path: Path, vocabulary: Vocabulary) -> None:
    """Add all of `tokenizer.*`, with special tokens, merges and the chat template from the files in `path`."""
    _check_distinct(path, vocabulary.tokens)
    is_bpe = vocabulary.scores is None
    if vocabulary.has_prefix is not None:
        writer.add_add_space_prefix(vocabulary.has_prefix)
    writer.add_tokenizer_model(vocabulary.model)
    writer.add_tokenizer_pre(vocabulary.pre)
    writer.add_token_list(vocabulary.tokens)
    if vocabulary.scores is not None:
        writer.add_token_scores(vocabulary.scores)
    writer.add_token_types(vocabulary.types)
    # What it says about pairs of texts is of no use to a model that generates.
    logging.getLogger(gguf.vocab.__name__).setLevel(logging.ERROR)
    try:
        special = gguf.SpecialVocab(path, load_merges=is_bpe, n_vocab=None if is_bpe else len(vocabulary.tokens))
    except (ValueError, OSError, TypeError, KeyError, AttributeError) as error:
        raise ModelError(f"{path}: tokenizer_config.json can't be read ({error}): download it again") from error
    # Where nothing is said llama.cpp adds BOS for some kinds of tokenizer; tokenizer.json always says it.
    special.add_special_token.setdefault("bos", not (path / "tokenizer.json").is_file())
    special.add_to_gguf(writer, quiet=True)
