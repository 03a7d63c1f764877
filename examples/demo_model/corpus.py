"""The text that the demo model learns from, what is held out of it, and its tokenizer.

Sources, about half and half by tokens:

* **English prose**, `bronte.txt`, `darwin.txt`, `dubois.txt` and `tinyshakespeare.txt` in the folder given with
  `--prose`: novels of the Brontës, natural history by Darwin, essays and novels by W. E. B. Du Bois, plays by
  Shakespeare. All in the public domain.
* **Python source**: the standard library of the interpreter that runs this file, under the PSF licence 2
  (https://docs.python.org/3/license.html). Left out: third-party packages, test folders, the `encodings` tables,
  `pydoc_data`, and files that are mostly numbers.

Held out, before the tokenizer is trained: a document (one Python file, or one region of about 8,000 characters
of a book) whose name has a SHA-256 that is a multiple of `HELD_OUT_ONE_IN`.
"""

from __future__ import annotations

import hashlib
import re
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor

BEGIN, END = "<|begin_of_text|>", "<|end_of_text|>"
BEGIN_ID, END_ID = 0, 1
VOCABULARY = 4096
BOOKS = ("bronte.txt", "darwin.txt", "dubois.txt", "tinyshakespeare.txt")
REGION_CHARACTERS = 8_000
HELD_OUT_ONE_IN = 32
EXCERPT_CHARACTERS = 6_000
EXCERPTS_PER_DOMAIN = 4
WRAPPED_LINE_CHARACTERS = 50
TABLE_DIGIT_SHARE = 0.15
SHORTEST_SOURCE = 200
# How an interpreter was built: another text on every machine.
BUILD_RECORD = "_sysconfigdata"
SKIPPED_FOLDERS = frozenset({"site-packages", "test", "tests", "idle_test", "encodings", "pydoc_data"})

Domain = Literal["prose", "python"]
DOMAINS: tuple[Domain, ...] = ("prose", "python")


@dataclass(frozen=True)
class Document:
    """One piece of text that is either trained on whole or held out whole."""

    name: str
    domain: Domain
    text: str

    @property
    def is_held_out(self) -> bool:
        """Whether the document is kept from all training, of the tokenizer too."""
        digest = hashlib.sha256(self.name.encode()).digest()
        return int.from_bytes(digest[:8], "big") % HELD_OUT_ONE_IN == 0


@dataclass(frozen=True)
class Corpus:
    """Training tokens [tokens] of each domain, int64, and the tokenizer that made them."""

    tokens: dict[Domain, Tensor]
    tokenizer: Tokenizer
    held_out: str


def read_documents(prose: Path) -> list[Document]:
    """Every document of both domains, in a fixed order."""
    return [*read_books(prose), *read_standard_library()]


def read_books(folder: Path) -> list[Document]:
    """The books in `folder`, each cut into regions; raises FileNotFoundError if one is absent."""
    documents = []
    for name in BOOKS:
        path = folder / name
        if not path.is_file():
            raise FileNotFoundError(f"{path}: not found; --prose must name a folder that holds {', '.join(BOOKS)}.")
        for index, region in enumerate(split_regions(unwrap(path.read_text(encoding="utf-8")))):
            documents.append(Document(f"{name}:{index}", "prose", region))
    return documents


def read_standard_library() -> list[Document]:
    """The Python files of the running interpreter's standard library that people would read as code."""
    root = Path(sysconfig.get_path("stdlib"))
    documents = []
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root)
        if name.name.startswith(BUILD_RECORD):
            continue
        if SKIPPED_FOLDERS.isdisjoint(name.parts) and (text := read_source(path)):
            documents.append(Document(name.as_posix(), "python", text))
    return documents


def read_source(path: Path) -> str | None:
    """The text of a source file; None where it is not UTF-8, nearly empty, or a table of numbers."""
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return None
    digits = sum(character.isdigit() for character in text)
    return text if len(text) >= SHORTEST_SOURCE and digits < TABLE_DIGIT_SHARE * len(text) else None


def unwrap(text: str) -> str:
    """Join the lines of paragraphs that were wrapped at a fixed width; verse and short lines stay.

    >>> unwrap("A" * 60 + "\\nend.\\n\\n\\nshort\\nverse")[-17:]
    'end.\\n\\nshort\\nverse'
    """
    paragraphs = []
    for paragraph in re.split(r"\n\s*\n", text.replace("\r\n", "\n")):
        lines = [re.sub(r"(?<=\S) {2,}", " ", line.rstrip()) for line in paragraph.strip("\n").split("\n")]
        is_wrapped = len(lines) > 1 and min(map(len, lines[:-1])) >= WRAPPED_LINE_CHARACTERS
        paragraphs.append(" ".join(line.strip() for line in lines) if is_wrapped else "\n".join(lines))
    return "\n\n".join(paragraph for paragraph in paragraphs if paragraph)


def split_regions(text: str) -> list[str]:
    """Cut `text` between paragraphs into regions of at least REGION_CHARACTERS, the last one excepted."""
    regions, region, size = [], [], 0
    for paragraph in text.split("\n\n"):
        region.append(paragraph)
        size += len(paragraph)
        if size >= REGION_CHARACTERS:
            regions.append("\n\n".join(region) + "\n")
            region, size = [], 0
    return [*regions, "\n\n".join(region) + "\n"] if region else regions


def held_out_text(documents: Sequence[Document]) -> str:
    """Excerpts of held-out documents, prose and Python in turn, each cut at a line's end."""
    excerpts: dict[Domain, list[str]] = {domain: [] for domain in DOMAINS}
    for document in sorted(documents, key=lambda document: hashlib.sha256(document.name.encode()).digest()):
        excerpt = document.text[:EXCERPT_CHARACTERS].rpartition("\n")[0]
        if document.is_held_out and len(excerpt) > EXCERPT_CHARACTERS // 2:
            excerpts[document.domain].append(excerpt)
    pairs = zip(excerpts["prose"], excerpts["python"], strict=False)
    return "\n\n".join(excerpt for _, pair in zip(range(EXCERPTS_PER_DOMAIN), pairs, strict=False) for excerpt in pair)


def train_tokenizer(documents: Sequence[Document]) -> Tokenizer:
    """A byte-level BPE tokenizer with GPT-2's splitting rule, which puts BEGIN before each text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[BEGIN, END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((document.text for document in documents), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BEGIN} $A", pair=f"{BEGIN} $A {BEGIN} $B", special_tokens=[(BEGIN, BEGIN_ID)]
    )
    return tokenizer


def build_corpus(prose: Path) -> Corpus:
    """Read, hold out, train the tokenizer on the rest and encode it: BEGIN, text, END for each document."""
    documents = read_documents(prose)
    kept = [document for document in documents if not document.is_held_out]
    tokenizer = train_tokenizer(kept)
    tokens = {domain: encode([d.text for d in kept if d.domain == domain], tokenizer) for domain in DOMAINS}
    return Corpus(tokens, tokenizer, held_out_text(documents))


def encode(texts: Sequence[str], tokenizer: Tokenizer) -> Tensor:
    """Token ids [tokens], int64, of all texts one after the other."""
    encodings = tokenizer.encode_batch(list(texts))
    return torch.tensor([token for encoding in encodings for token in (*encoding.ids, END_ID)])


def load_corpus(prose: Path, work: Path) -> Corpus:
    """The corpus from `work` where an earlier call left it, else built and left there."""
    tokens, tokenizer, held_out = work / "tokens.pt", work / "tokenizer.json", work / "held-out.txt"
    if not tokens.exists():
        corpus = build_corpus(prose)
        work.mkdir(parents=True, exist_ok=True)
        corpus.tokenizer.save(str(tokenizer))
        held_out.write_text(corpus.held_out, encoding="utf-8")
        torch.save(corpus.tokens, tokens)
    return Corpus(torch.load(tokens), Tokenizer.from_file(str(tokenizer)), held_out.read_text(encoding="utf-8"))
