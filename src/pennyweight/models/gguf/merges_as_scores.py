"""A SentencePiece-like BPE tokenizer of tokenizer.json as tokens with scores, which is how llama.cpp stores one.

The tokenizers library joins the neighbours whose merge has the lowest rank; llama.cpp those that form the token with
the highest score. Both are the same where a token's merges are all the ways to cut it in two, and follow each other.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pennyweight.core.errors import ContainerError

_SPACE = "▁"


def token_scores(tokenizer: Mapping[str, Any]) -> dict[str, float]:
    """Score of each token that a merge makes: minus the rank of its first merge.

    Raises ContainerError where llama.cpp would join other tokens than the merges say.
    """
    merges = [_pair(merge) for merge in tokenizer["model"]["merges"]]
    scores: dict[str, float] = {}
    last = ""
    for rank, (left, right) in enumerate(merges):
        if left + right != last and left + right in scores:
            raise _refused(f"the merges of {left + right!r} do not follow each other")
        last = left + right
        scores.setdefault(last, -float(rank))
    _check_all_cuts(set(merges), tokenizer["model"]["vocab"], scores)
    return scores


def _pair(merge: str | list[str]) -> tuple[str, str]:
    left, right = merge.split(" ") if isinstance(merge, str) else merge
    return left, right


def _check_all_cuts(merges: set[tuple[str, str]], vocab: Mapping[str, int], scores: Mapping[str, float]) -> None:
    # What can be on either side of a join: single characters, and what joins make.
    parts = scores.keys() | {token for token in vocab if len(token) == 1}
    for token in scores:
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in parts and right in parts and (left, right) not in merges:
                raise _refused(f"{token!r} has no merge of {left!r} and {right!r}")


def _refused(reason: str) -> ContainerError:
    return ContainerError(
        f"tokenizer.json: llama.cpp can't follow its merges: {reason}. Add the tokenizer.model of which it was "
        "made, or choose another container."
    )


def begins_with_space(tokenizer: Mapping[str, Any]) -> bool:
    """Whether a space is put before text; raises ContainerError for what llama.cpp does not do to text."""
    begins = False
    normalizer, splitter = tokenizer.get("normalizer"), tokenizer.get("pre_tokenizer")
    for step in _steps(normalizer, "normalizers"):
        if step == {"type": "Prepend", "prepend": _SPACE}:
            begins = True
        elif step != {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}:
            raise _unknown("normalizer", step)
    for step in _steps(splitter, "pretokenizers"):
        if step.get("type") == "Metaspace" and step.get("replacement") == _SPACE:
            begins = step.get("prepend_scheme", "always") != "never" and step.get("add_prefix_space", True)
            if step.get("split", True):
                _check_words(tokenizer)
        # After the normalizer there is no space left to split at.
        elif not (step.get("type") == "Split" and step.get("pattern") == {"String": " "} and normalizer):
            raise _unknown("pre_tokenizer", step)
    return begins


def _check_words(tokenizer: Mapping[str, Any]) -> None:
    for merge in tokenizer["model"]["merges"]:
        joined = "".join(_pair(merge))
        if _SPACE in joined[1:]:
            raise _refused(f"{joined!r} holds a space, and the tokenizer splits there")


def _steps(definition: Mapping[str, Any] | None, parts: str) -> list[Mapping[str, Any]]:
    if definition is None:
        return []
    return list(definition[parts]) if definition.get("type") == "Sequence" else [definition]


def _unknown(what: str, step: Mapping[str, Any]) -> ContainerError:
    return ContainerError(
        f"tokenizer.json: llama.cpp has no {what} like {dict(step)} for this kind of tokenizer. "
        "Choose another container."
    )
