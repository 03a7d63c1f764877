"""Lists of module names written as few patterns: what config.json's `targets` and `ignore` hold."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

# "model.layers.3.mlp.experts.7.up_proj" -> template "model.layers.*.mlp.experts.*.up_proj" and numbers ("3", "7").
_NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")
Numbers = tuple[str, ...]


def patterns(names: Sequence[str], *, among: Iterable[str]) -> list[str]:
    """Patterns that match all of `names` and nothing else of `among`; exact names where a regex saves nothing.

    >>> patterns(["a.0.q", "a.2.q", "head"], among=["a.0.q", "a.1.q", "a.2.q", "head"])
    ['re:^a\\\\.(0|2)\\\\.q$', 'head']
    """
    everything = _by_template(among)
    found: list[str] = []
    for template, wanted in _by_template(names).items():
        found.extend(_patterns_of_template(template, wanted, everything[template]))
    return found


def _by_template(names: Iterable[str]) -> Mapping[str, dict[Numbers, None]]:
    """Template -> the numbers that occur in its places, in order, without repeats."""
    found: dict[str, dict[Numbers, None]] = {}
    for name in names:
        found.setdefault(_NUMBER.sub("*", name), {})[tuple(_NUMBER.findall(name))] = None
    return found


def _patterns_of_template(template: str, wanted: Mapping[Numbers, None], there: Mapping[Numbers, None]) -> list[str]:
    if len(wanted) == 1:
        return [_fill(template, numbers) for numbers in wanted]
    if wanted.keys() >= there.keys():
        return [_regex(template, [r"\d+"] * template.count("*"))]
    first = {numbers[0] for numbers in wanted}
    whole = [number for number in dict.fromkeys(n[0] for n in wanted) if _is_whole(number, wanted, there)]
    found = [_regex(template, [f"({'|'.join(whole)})", *[r"\d+"] * (template.count("*") - 1)])] if whole else []
    # What is left of blocks of which only some experts are wanted: a list of their numbers for each block.
    for number in sorted(first - set(whole), key=int):
        rest = [numbers for numbers in wanted if numbers[0] == number]
        if template.count("*") == 2:
            found.append(_regex(template, [number, f"({'|'.join(n[1] for n in rest)})"]))
        else:
            found.extend(_fill(template, numbers) for numbers in rest)
    return found


def _is_whole(number: str, wanted: Mapping[Numbers, None], there: Mapping[Numbers, None]) -> bool:
    return all(numbers in wanted for numbers in there if numbers[0] == number)


def _fill(template: str, numbers: Numbers) -> str:
    places = iter(numbers)
    return re.sub(r"\*", lambda _: next(places), template)


def _regex(template: str, places: Sequence[str]) -> str:
    parts = [re.escape(part) for part in template.split("*")]
    return "re:^" + "".join(part + place for part, place in zip(parts, [*places, ""], strict=True)) + "$"
