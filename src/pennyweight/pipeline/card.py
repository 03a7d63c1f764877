"""The README of an artefact."""

from __future__ import annotations

from pathlib import Path

from pennyweight.pipeline.records import COPIED, Recipe
from pennyweight.plan.plan import Plan

_CARD = """# {name}, quantized

Weights of {sites} linear maps stored as {scheme}, {how}; {kept} kept in float. Made by Pennyweight.

{usage}What each layer lost, what was kept in float and why, hashes and verification: `pennyweight.json`{notes}.
"""
_OURS, _REST = "quantized_by: pennyweight", "\n---\n\n"


def model_card(source: Path, recipe: Recipe, plan: Plan, *, name: str, notes: int, usage: str) -> str:
    """What the artefact is, how it was made and how it is loaded (`usage`), above the original's card in `source`."""
    original = source / "README.md"
    body = original.read_text(encoding="utf-8", errors="replace") if original.is_file() else ""
    front, body = _front_matter(body.replace("\r\n", "\n"))
    if _OURS in front:
        # Of a card of ours only what it kept of the original's goes on.
        body = body.partition(_REST)[2]
    card = _CARD.format(
        name=name,
        sites=len(plan.schemes),
        scheme=_schemes(plan),
        how=_how(recipe),
        kept=len(plan.kept),
        usage=usage,
        notes=f" ({notes} layers carry notes)" if notes else "",
    )
    if recipe.runtime == "vllm":
        card += "Not verified in vLLM.\n"
    return _with_ours(front, name) + card + (f"{_REST}{body}" if body.strip() else "")


def _schemes(plan: Plan) -> str:
    names = [f"`{name}`" for name in dict.fromkeys(scheme.name for scheme in plan.schemes.values())]
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _how(recipe: Recipe) -> str:
    if recipe.solver == COPIED:
        return "copied code by code from another container"
    return f"chosen by `{recipe.solver}` ({_data(recipe)})"


def _data(recipe: Recipe) -> str:
    data = recipe.calibration
    if recipe.importance is not None:
        return f"importances of `{recipe.importance}`"
    if data is None:
        return "no calibration data"
    return f"{data.samples} windows of {'at most ' if data.varies else ''}{data.length} tokens"


def _front_matter(card: str) -> tuple[list[str], str]:
    """The lines of the YAML block at the head of a model card (licence, tags), and the rest."""
    lines = card.split("\n")
    if lines[0] != "---" or "---" not in lines[1:]:
        return [], card
    end = lines.index("---", 1)
    return lines[1:end], "\n".join(lines[end + 1 :]).lstrip("\n")


def _with_ours(front: list[str], name: str) -> str:
    """A YAML block that keeps what the original's says and, for a model of the Hub, names it."""
    ours = {"base_model": f'"{name}"', "base_model_relation": "quantized", "quantized_by": "pennyweight"}
    given = {line.split(":")[0] for line in front}
    if "base_model" in given or "/" not in name:
        # The card may name one base model only, and by its Hub id.
        del ours["base_model"], ours["base_model_relation"]
    added = [f"{key}: {value}" for key, value in ours.items() if key not in given]
    return "\n".join(["---", *front, *added, "---", "", ""])
