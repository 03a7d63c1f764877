"""How llama.cpp calls the way a byte-level BPE tokenizer cuts text into words (`tokenizer.ggml.pre`).

llama.cpp's converter knows a tokenizer by a hash of what it makes of a test text. Here the definition itself in
tokenizer.json is compared with the expressions that llama.cpp implements.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pennyweight.core.errors import ContainerError

# What the ByteLevel pre-tokenizer of the tokenizers library cuts with, and a Digits one.
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_DIGIT = r"\p{N}"

_ENGLISH = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_WORDS = rf"{_ENGLISH}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+"
_OTHER = r" ?[^\s\p{L}\p{N}]+[\r\n]*"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"


def _cased(ending: str, digits: str) -> str:
    """Words that end where lower case turns to upper case."""
    first = r"[^\r\n\p{L}\p{N}]?"
    lower, upper = f"{first}{_UPPER}*{_LOWER}+{ending}", f"{first}{_UPPER}+{_LOWER}*{ending}"
    return rf"{lower}|{upper}|{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_SPACES}"


_LLAMA3 = rf"{_WORDS}|\p{{N}}{{1,3}}|{_OTHER}|{_SPACES}"
_MARKED = r"[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*"

# (expressions in turn, whole words before merges) -> llama.cpp's name.
_NAMES: Mapping[tuple[tuple[str, ...], bool], str] = {
    ((_GPT2,), False): "gpt-2",
    ((_DIGIT, _GPT2), False): "smollm",
    ((_LLAMA3,), True): "llama-bpe",
    ((_LLAMA3,), False): "smaug-bpe",
    ((rf"{_WORDS}|\p{{N}}|{_OTHER}|{_SPACES}",), False): "qwen2",
    ((rf"{_ENGLISH}|{_MARKED}|{_SPACES}",), False): "qwen35",
    ((rf"{_WORDS}|\p{{N}}{{1}}| ?[^\s\p{{L}}\p{{N}}\r\n]+|{_SPACES}",), False): "seed-coder",
    ((_cased("", r"\p{N}"),), True): "tekken",
    ((_cased(f"{_ENGLISH}?", r"\p{N}{1,3}"),), False): "gpt-4o",
}


def pre_tokenizer_name(tokenizer: Mapping[str, Any]) -> str:
    """llama.cpp's name for the pre-tokenizer of a tokenizer.json with a byte-level BPE model.

    Raises ContainerError where llama.cpp has none that cuts text in the same way.
    """
    steps = _steps(tokenizer.get("pre_tokenizer"))
    expressions = tuple(found for step in steps for found in _expressions(step))
    whole_words = bool(tokenizer["model"].get("ignore_merges"))
    name = _NAMES.get((expressions, whole_words))
    if name is None or not any(step.get("type") == "ByteLevel" for step in steps):
        raise ContainerError(
            f"tokenizer.json: llama.cpp has no pre-tokenizer that cuts with {list(expressions)} and "
            f"ignore_merges {whole_words}; known are those of {', '.join(_NAMES.values())}. Choose another container, "
            "or convert the model with llama.cpp's convert_hf_to_gguf.py and give that GGUF file."
        )
    return name


def _steps(definition: Mapping[str, Any] | None) -> list[Mapping[str, Any]]:
    if definition is None:
        return []
    if definition.get("type") == "Sequence":
        return [step for part in definition["pretokenizers"] for step in _steps(part)]
    return [definition]


def _expressions(step: Mapping[str, Any]) -> list[str]:
    kind = step.get("type")
    if kind == "ByteLevel" and not step.get("add_prefix_space"):
        return [_GPT2] if step.get("use_regex", True) else []
    if kind == "Digits" and step.get("individual_digits"):
        return [_DIGIT]
    # All expressions above match any text without gaps: to keep the matches alone is to cut at each.
    keeps_matches = (step.get("behavior"), bool(step.get("invert"))) in (("Isolated", False), ("Removed", True))
    if kind == "Split" and keeps_matches and "Regex" in step["pattern"]:
        return [step["pattern"]["Regex"].replace("\r", r"\r").replace("\n", r"\n")]
    raise ContainerError(
        f"tokenizer.json: llama.cpp has no pre-tokenizer like {dict(step)}. Choose another container, or convert the "
        "model with llama.cpp's convert_hf_to_gguf.py and give that GGUF file."
    )
