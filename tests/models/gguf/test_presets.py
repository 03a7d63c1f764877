"""The mixes of llama-quantize against what it says itself (tests/golden/gguf/make_presets.py)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from gguf import GGUFValueType

from pennyweight.models.gguf.conversion import Conversion
from pennyweight.models.gguf.fields import FieldValue
from pennyweight.models.gguf.presets import PRESETS, preset_types
from pennyweight.models.gguf.types import BLOCK_TYPES

GOLDEN: dict[str, Any] = json.loads((Path(__file__).parents[2] / "golden" / "gguf" / "presets.json").read_text())


def layers_of(tensor: str, one: dict[str, Any]) -> list[str]:
    return [tensor.replace("*", str(layer)) for layer in range(one["block_count"] if "*" in tensor else 1)]


def as_model(one: dict[str, Any]) -> Conversion:
    numbers = {
        "block_count": one["block_count"],
        "attention.head_count": one["head_count"],
        "attention.head_count_kv": one["head_count_kv"],
    }
    fields = {f"{one['architecture']}.{key}": FieldValue.of(n, GGUFValueType.UINT32) for key, n in numbers.items()}
    shapes = {name: tuple(shape) for tensor, shape in one["shapes"].items() for name in layers_of(tensor, one)}
    return Conversion(one["architecture"], fields, {}, {}, {}, shapes, one["expert_count"])


def said(counted: str) -> list[str | None]:
    """The types that "q6_K*2 f16" counts."""
    names = {kind.name.lower(): kind.name for kind in BLOCK_TYPES.values()}
    found: list[str | None] = []
    for word in counted.split():
        kind, _, count = word.partition("*")
        found += [None if kind in ("keep", "f16") else names[kind.lower()]] * int(count or 1)
    return found


@pytest.mark.parametrize("name", GOLDEN)
def test_every_tensor_has_the_type_that_llama_quantize_gives_it(name: str) -> None:
    one = GOLDEN[name]
    for preset in PRESETS:
        for has_data in (False, True):
            informed = one["types"].get(f"{preset} with importance")
            table = informed if has_data and informed else one["types"][preset]
            expected = {
                member: kind
                for tensor, counted in table.items()
                for member, kind in zip(layers_of(tensor, one), said(counted), strict=True)
            }
            assert preset_types(preset, as_model(one), has_data=has_data) == expected, (preset, has_data)


def test_every_mix_was_asked_for() -> None:
    assert all(set(PRESETS) <= set(one["types"]) for one in GOLDEN.values())
