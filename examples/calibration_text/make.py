"""Make the built-in calibration text, `src/pennyweight/models/calibration.txt`.

    python make.py --prose DIR [--out FILE]

Half is English prose in the public domain from the books in DIR, half is source of the standard library of the Python
that runs this file (PSF licence 2); `../demo_model/corpus.py` says which books and which files. Excerpts of both follow
each other in turn, with `<|endoftext|>` between them. Left out:

* every document that the demo model's corpus holds out, and every excerpt that shares a line with the demo model's
  `held-out.txt`, so that evaluating on it stays honest;
* source files that carry a copyright or licence notice of their own.

The same books and the same Python give the same bytes.
"""

from __future__ import annotations

import argparse
import hashlib
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "examples" / "demo_model"))

from corpus import DOMAINS, Document, Domain, read_documents  # noqa: E402

PACKAGE = ROOT / "src" / "pennyweight"
OUT = PACKAGE / "models" / "calibration.txt"
HELD_OUT = PACKAGE / "demo_model" / "held-out.txt"
SEPARATOR = "\n<|endoftext|>\n"
EXCERPTS_PER_DOMAIN = 50
EXCERPT_CHARACTERS = 4_000
# Shorter lines, such as `else:`, are no one's in particular.
TELLING_LINE_CHARACTERS = 40
NOTICE = re.compile(r"copyright|licen[cs]e|all rights reserved", re.IGNORECASE)


def excerpts(documents: Sequence[Document], domain: Domain, held_out: str) -> Iterator[str]:
    """The beginnings of the documents of `domain` that may be used, in an order that depends on their names alone."""
    ours = [document for document in documents if document.domain == domain and not document.is_held_out]
    for document in sorted(ours, key=lambda document: hashlib.sha256(f"calibration {document.name}".encode()).digest()):
        excerpt = document.text[:EXCERPT_CHARACTERS].rpartition("\n")[0].strip("\n")
        is_whole = len(excerpt) > EXCERPT_CHARACTERS // 2
        if is_whole and not NOTICE.search(document.text) and not shares_a_line(excerpt, held_out):
            yield excerpt


def shares_a_line(excerpt: str, held_out: str) -> bool:
    """Whether a line of `excerpt` long enough to be telling is in `held_out`."""
    lines = (line.strip() for line in excerpt.split("\n"))
    return any(line in held_out for line in lines if len(line) >= TELLING_LINE_CHARACTERS)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prose", type=Path, required=True, help="folder that holds the books")
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args()
    documents = read_documents(options.prose)
    held_out = HELD_OUT.read_text(encoding="utf-8")
    chosen = [excerpts(documents, domain, held_out) for domain in DOMAINS]
    turns = [next(source) for _ in range(EXCERPTS_PER_DOMAIN) for source in chosen]
    options.out.write_text(SEPARATOR.join(turns) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
