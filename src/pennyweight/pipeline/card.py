"""The README of an artefact."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pennyweight.pipeline.records import Recipe, SiteRecord
from pennyweight.plan.plan import Plan


def model_card(source: Path, recipe: Recipe, plan: Plan, records: Sequence[SiteRecord]) -> str:
    """What the artefact is, how it was made and how to load it, above the original model's card."""
    original = source / "README.md"
    body = original.read_text(encoding="utf-8", errors="replace") if original.is_file() else ""
    front, body = _front_matter(body)
    notes = sum(bool(record.notes) for record in records)
    lines = [
        f"# {source.name}, quantized",
        "",
        f"Weights of {len(plan.schemes)} linear maps stored as `{recipe.scheme}`, chosen by `{recipe.solver}`"
        f" ({_data(recipe)}); {len(plan.kept)} kept in float. Made by Pennyweight.",
        "",
        "```python",
        "from transformers import AutoModelForCausalLM" if recipe.container else "",
        'model = AutoModelForCausalLM.from_pretrained("path/to/this/directory")   # or AutoModel for an encoder',
        "```",
        "",
        "Needs `transformers` and **`compressed-tensors` 0.18 or later**: older versions misread codes of 3, 5, 6 and 7 bits.",
        "What each layer lost, what was kept in float and why, hashes and verification: `pennyweight.json`"
        + (f" ({notes} layers carry notes)." if notes else "."),
        "Not verified in vLLM." if recipe.runtime == "vllm" else "",
    ]
    text = "\n".join(line for line in lines if line is not None) + "\n"
    return front + text + (f"\n---\n\n{body}" if body.strip() else "")


def _data(recipe: Recipe) -> str:
    data = recipe.calibration
    return "no calibration data" if data is None else f"{data.samples} windows of {data.length} tokens"


def _front_matter(card: str) -> tuple[str, str]:
    """The YAML block at the head of a model card (licence, tags) and the rest."""
    if card.startswith("---\n") and "\n---" in card[4:]:
        end = card.index("\n---", 4) + 4
        return card[:end].rstrip() + "\n\n", card[end:].lstrip("-\n")
    return "", card
