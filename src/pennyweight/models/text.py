"""Text into windows of token ids, for calibration and for evaluation."""

from __future__ import annotations

import hashlib
import json
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pennyweight.core.errors import DataError, ModelError, first_line

BUILT_IN = "built-in"
# Marks the end of a document in plain text files, as in TinyStories.
_SEPARATOR = "<|endoftext|>"
_CLAUSE_END = re.compile(r"(?<=[.!?;:])\s+")
_BLANK_LINE = re.compile(r"\n\s*\n")
_LINE = re.compile(r"\n")
# Lines: text with fewer blank ones than one in so many is one text a line, with stray ones between.
_LONGEST_PARAGRAPH = 50
# Tokens of a batch: enough rows for an efficient product, few enough to leave one batch for each thread.
_BATCH_TOKENS = 512


@dataclass(frozen=True)
class Prefixes:
    """The special tokens that a tokenizer puts around a text: BOS; [CLS] and [SEP]."""

    before: list[int]
    after: list[int]


def load_tokenizer(path: Path, *, trust_remote_code: bool = False) -> Any:
    """The tokenizer of a model directory; raises ModelError."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code, local_files_only=True)
    except (ValueError, OSError, KeyError, TypeError, ImportError) as error:
        raise ModelError(
            f"{path} has no tokenizer that can be loaded ({first_line(error)}): add its tokenizer files, or use "
            "--calibration none"
        ) from error


def documents(source: str, tokenizer: Any, *, paragraphs: bool = False) -> list[str]:
    """The documents of `source`: a text file, a .jsonl with `text` or `messages` (through the chat template), a
    directory of such files (and .md), or "built-in"; with `paragraphs` those of plain text, which are cut at blank
    lines, or into lines where there are few of these, and every other one of the built-in text into its clauses.
    Raises DataError."""
    if source == BUILT_IN:
        built_in = files("pennyweight.models").joinpath("calibration.txt").read_text(encoding="utf-8")
        found = _plain(built_in, paragraphs=paragraphs)
        return _long_and_short(found) if paragraphs else found
    path = Path(source)
    if not path.exists():
        raise DataError(f"{source} does not exist: give a text file, a .jsonl file, a directory of them, or 'none'")
    parts = (
        sorted(p for p in path.rglob("*") if p.is_file() and p.suffix in (".txt", ".jsonl", ".md"))
        if path.is_dir()
        else [path]
    )
    read = (document for part in parts for document in _file_documents(part, tokenizer, paragraphs=paragraphs))
    found = [document for document in read if document.strip()]
    if not found:
        raise DataError(f"{source} holds no text: give a text file, or a .jsonl with `text` or `messages` in each line")
    return found


def _plain(text: str, *, paragraphs: bool) -> list[str]:
    documents = text.split(_SEPARATOR)
    if not paragraphs:
        return documents
    parts, lines = (
        [part.strip() for document in documents for part in cut.split(document) if part.strip()]
        for cut in (_BLANK_LINE, _LINE)
    )
    blank = len(parts) - sum(bool(document.strip()) for document in documents)
    return parts if _LONGEST_PARAGRAPH * blank > len(lines) else lines


def _long_and_short(paragraphs: Sequence[str]) -> list[str]:
    """Every other paragraph clause by clause: encoders are asked about both."""
    return [part for n, text in enumerate(paragraphs) for part in (_CLAUSE_END.split(text) if n % 2 else [text])]


def _file_documents(path: Path, tokenizer: Any, *, paragraphs: bool) -> list[str]:
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text ({error.reason} at byte {error.start}): give plain text") from error
    if path.suffix not in (".jsonl", ".json"):
        return _plain(text, paragraphs=paragraphs)
    lines = [(number, line) for number, line in enumerate(text.splitlines(), 1) if line.strip()]
    return [_record(path, number, line, tokenizer) for number, line in lines]


def _record(path: Path, number: int, line: str, tokenizer: Any) -> str:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(
            f"{path}, line {number}: not valid JSON ({error.msg}): one object a line is expected"
        ) from error
    if isinstance(record, dict) and isinstance(record.get("text"), str):
        return str(record["text"])
    if isinstance(record, dict) and isinstance(record.get("messages"), list):
        if not getattr(tokenizer, "chat_template", None):
            raise DataError(
                f"{path}, line {number}: `messages` need a chat template and this tokenizer has none: give `text`"
            )
        return _chat(path, number, record["messages"], tokenizer)
    raise DataError(f"{path}, line {number}: an object with a `text` string or a `messages` list is expected")


def _chat(path: Path, number: int, messages: list[Any], tokenizer: Any) -> str:
    from jinja2 import TemplateError

    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False))
    except (TemplateError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise DataError(f"{path}, line {number}: the chat template does not take these `messages`: {error}") from error


def special_tokens(tokenizer: Any) -> Prefixes:
    """What the tokenizer puts before and after a text, found on a text of one token."""
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    full = list(tokenizer("a")["input_ids"])
    for start in range(len(full) - len(bare) + 1):
        if full[start : start + len(bare)] == list(bare):
            return Prefixes(full[:start], full[start + len(bare) :])
    return Prefixes([], [])


def windows(
    texts: Iterable[str], tokenizer: Any, *, length: int, count: int | None = None, seed: int | None = None
) -> Tensor:
    """Token ids int64 [windows, length] cut from `texts` one after the other, each window with its special tokens.

    `count` windows are drawn without replacement in the order of the text (`seed`), all when None. Raises DataError
    where there is less than one window.
    """
    special = special_tokens(tokenizer)
    body = _room(length, special)
    ids: list[int] = []
    for text in texts:
        # Documents of one text file follow each other as they would in training.
        ids.extend([*special.after, *special.before] if ids else [])
        ids.extend(_ids(text, tokenizer, special))
    total = len(ids) // body
    if total == 0:
        raise too_little(len(ids), length)
    table = torch.tensor(ids[: total * body]).reshape(total, body)
    if count is not None and count < total:
        generator = torch.Generator().manual_seed(seed or 0)
        table = table[torch.randperm(total, generator=generator)[:count].sort().values]
    before = torch.tensor(special.before, dtype=torch.int64).expand(len(table), -1)
    after = torch.tensor(special.after, dtype=torch.int64).expand(len(table), -1)
    return torch.cat([before, table, after], dim=1)


def too_little(tokens: int, length: int) -> DataError:
    """What to say of a text that does not fill one window of `length` tokens."""
    return DataError(
        f"the text has {tokens} tokens, fewer than one window of {length}: give more text or a smaller --length"
    )


def _room(length: int, special: Prefixes) -> int:
    """Tokens of text in a window of `length`; raises DataError where there is none."""
    body = length - len(special.before) - len(special.after)
    if body < 2:
        raise DataError(f"windows of {length} tokens leave no room for text: give at least {length - body + 2}")
    return body


def _ids(text: str, tokenizer: Any, special: Prefixes) -> list[int]:
    """The tokens of `text` without special ones around it, of which a chat template may write the first."""
    found = list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
    is_double = bool(special.before) and found[: len(special.before)] == special.before
    return found[len(special.before) :] if is_double else found


def passages(
    texts: Iterable[str],
    tokenizer: Any,
    *,
    length: int,
    most: int | None = None,
    least: int = 1,
    seed: int | None = None,
) -> list[Tensor]:
    """Each of `texts` by itself, as an encoder gets it: token ids int64 [tokens] with its special tokens, those of more
    than `length` tokens in several pieces.

    They are drawn without replacement, in the order of the text, for as long as the next one leaves no more than
    `most` tokens in all (`seed`); all when None. Raises DataError for texts of fewer than `least` tokens in all.
    """
    special = special_tokens(tokenizer)
    body = _room(length, special)
    found: list[Tensor] = []
    for text in texts:
        ids = _ids(text, tokenizer, special)
        pieces = (ids[start : start + body] for start in range(0, len(ids), body))
        found += [torch.tensor([*special.before, *piece, *special.after]) for piece in pieces]
    if not found:
        raise DataError("the text has no tokens: give more text")
    total = sum(map(len, found))
    if total < least:
        raise too_little(total, least)
    if most is None or most >= total:
        return found
    generator = torch.Generator().manual_seed(seed or 0)
    kept: list[int] = []
    tokens = 0
    for index in torch.randperm(len(found), generator=generator).tolist():
        tokens += len(found[index])
        if tokens > most and kept:
            break
        kept.append(index)
    return [found[index] for index in sorted(kept)]


def batches(token_windows: Iterable[Tensor]) -> list[Tensor]:
    """Windows [tokens] in batches [windows, tokens] of about five hundred tokens: those of equal length together, from
    short to long, so that nothing is padded. The cut depends on nothing but the lengths."""
    by_length: dict[int, list[Tensor]] = defaultdict(list)
    for window in token_windows:
        by_length[len(window)].append(window)
    return [
        batch
        for length, windows in sorted(by_length.items())
        for batch in torch.split(torch.stack(windows), max(1, _BATCH_TOKENS // length))
    ]


def digest(token_windows: Sequence[Tensor] | Tensor) -> str:
    """The hash of their ids, and of their lengths where these differ."""
    lengths = [len(window) for window in token_windows]
    found = hashlib.sha256()
    for window in token_windows:
        found.update(window.contiguous().numpy().tobytes())
    if len(set(lengths)) > 1:
        found.update(torch.tensor(lengths).numpy().tobytes())
    return found.hexdigest()


def context_length(config: Any, module: nn.Module | None = None) -> int | None:
    """The longest input that the model was made for, if its config says. In a `module` that counts positions from
    behind a padding index, as RoBERTa and its kin do, those before it are taken by no token."""
    text: Any = config.get_text_config()
    limit = getattr(text, "max_position_embeddings", None)
    if not limit:
        return None
    tables = [] if module is None else [part for name, part in module.named_modules() if "position" in name]
    skipped = [
        table.padding_idx + 1
        for table in tables
        if isinstance(table, nn.Embedding) and table.padding_idx is not None and table.num_embeddings == limit
    ]
    return int(limit) - max(skipped, default=0)


def check_vocabulary(token_windows: Iterable[Tensor], config: Any, names: Sequence[str] = ("tokenizer",)) -> None:
    """Raises DataError where a token id lies outside the model's vocabulary."""
    size = getattr(config.get_text_config(), "vocab_size", None)
    largest = max(int(window.max()) for window in token_windows)
    if size is not None and largest >= size:
        raise DataError(
            f"{names[0]}: token id {largest} is outside the model's vocabulary of {size}: "
            "the tokenizer and the model do not belong together"
        )
