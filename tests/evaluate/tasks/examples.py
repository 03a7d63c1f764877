"""Items, files of them, and an encoder, for the tests of tasks."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import transformers

from tests.pipeline import tiny

DEMO = Path(__file__).parents[3] / "src" / "pennyweight" / "demo_model"


def write(path: Path, items: Iterable[Any]) -> Path:
    path.write_text("".join(json.dumps(item) + "\n" for item in items), encoding="utf-8")
    return path


def held_out() -> list[str]:
    """Words that the shipped model never saw."""
    return (DEMO / "held-out.txt").read_text(encoding="utf-8").split()


def continuations(words: list[str], count: int, *, length: int = 12, seed: int = 0) -> list[dict[str, Any]]:
    """Which of three pieces of the text, of 1 to 4 words, comes after so many words of it."""
    chosen = random.Random(seed)
    items = []
    for _ in range(count):
        start = chosen.randrange(len(words) - length - 4)
        places = [start + length, *(chosen.randrange(len(words) - 4) for _ in range(2))]
        choices = [" " + " ".join(words[place : place + chosen.randint(1, 4)]) for place in places]
        order = chosen.sample(range(3), 3)
        context = " ".join(words[start : start + length])
        items.append({"context": context, "choices": [choices[one] for one in order], "answer": order.index(0)})
    return items


def blanks(words: list[str], count: int, *, seed: int = 0) -> list[dict[str, str]]:
    """The next word after 5 to 15 words of the text."""
    chosen = random.Random(seed)
    items = []
    for _ in range(count):
        start, length = chosen.randrange(len(words) - 16), chosen.randint(5, 15)
        items.append({"context": " ".join(words[start : start + length]), "target": " " + words[start + length]})
    return items


def pairs(words: list[str], count: int, *, seed: int = 0) -> list[dict[str, Any]]:
    """Pieces of the text, and how many of their words were left as they were."""
    chosen = random.Random(seed)
    items = []
    for _ in range(count):
        start, length, changed = chosen.randrange(len(words) - 9), chosen.randint(4, 9), chosen.randint(0, 4)
        a = words[start : start + length]
        places = chosen.sample(range(length), changed)
        b = [chosen.choice(words) if place in places else word for place, word in enumerate(a)]
        items.append({"a": " ".join(a), "b": " ".join(b), "score": 5 - changed, "id": len(items)})
    return items


def bert(directory: Path) -> Path:
    sizes = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
    config = transformers.BertConfig(vocab_size=tiny.VOCABULARY, max_position_embeddings=96, **sizes)
    return tiny.save(transformers.BertModel, config, directory)
