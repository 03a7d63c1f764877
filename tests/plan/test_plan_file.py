"""Plan files: what is written comes back, what is written by hand is understood or refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pennyweight.core.errors import UsageError
from pennyweight.plan.plan_file import read_plan_file, write_plan_file
from pennyweight.schemes import Scheme, parse_scheme

SITES = ["model.layers.0.self_attn.q_proj", "model.layers.0.mlp.down_proj", "model.layers.1.mlp.down_proj", "lm_head"]
Q, DOWN_0, DOWN_1, HEAD = SITES
INT4, INT6 = parse_scheme("int4-g128"), parse_scheme("int6-g32")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "plan.json"


def hand_written(path: Path, sites: Any, **more: Any) -> Path:
    path.write_text(json.dumps({"pennyweight_plan": 1, "sites": sites, **more}))
    return path


def write(path: Path, schemes: dict[str, Scheme | None]) -> None:
    write_plan_file(
        path,
        schemes,
        sites=SITES,
        model="a/model",
        runtime="vllm",
        budget={"size": "4GB"},
        size_bytes=3_999,
        predicted_loss=0.25,
    )


def test_a_plan_file_reads_like_this(path: Path) -> None:
    write(path, {HEAD: None, DOWN_1: INT6, DOWN_0: INT6, Q: INT4})
    assert (
        path.read_text()
        == """{
  "pennyweight_plan": 1,
  "model": "a/model",
  "runtime": "vllm",
  "budget": {
    "size": "4GB"
  },
  "size_bytes": 3999,
  "predicted_loss": 0.25,
  "sites": {
    "model.layers.0.self_attn.q_proj": "int4-g128",
    "model.layers.0.mlp.down_proj": "int6-g32",
    "model.layers.1.mlp.down_proj": "int6-g32",
    "lm_head": "keep"
  }
}
"""
    )


def test_what_was_written_is_read_back_in_the_models_order(path: Path) -> None:
    schemes = {
        HEAD: None,
        DOWN_1: INT6,
        DOWN_0: parse_scheme("nf4-g64"),
        Q: parse_scheme("uint4-g32-offset-uint6x8.f16"),
    }
    write(path, schemes)
    assert read_plan_file(path).schemes(SITES) == schemes
    assert list(read_plan_file(path).schemes(SITES)) == SITES
    assert [file.name for file in path.parent.iterdir()] == ["plan.json"]


def test_three_lines_are_enough_and_later_ones_win(path: Path) -> None:
    hand_written(path, {"*": "int4-g128", "*.down_proj": "int6-g32", "lm_head": "keep"})
    assert read_plan_file(path).schemes(SITES) == {Q: INT4, DOWN_0: INT6, DOWN_1: INT6, HEAD: None}
    hand_written(path, {"lm_head": "keep", "*.down_proj": "int6-g32", "*": "int4-g128"})
    assert set(read_plan_file(path).schemes(SITES).values()) == {INT4}
    hand_written(path, {"*": "int4-g128", DOWN_1: "keep", "model.layers.[01].mlp.*": "int6-g32", "lm_?ead": "int6-g32"})
    assert read_plan_file(path).schemes(SITES) == {Q: INT4, DOWN_0: INT6, DOWN_1: INT6, HEAD: INT6}
    hand_written(path, dict.fromkeys(reversed(SITES), "keep"))
    assert list(read_plan_file(path).schemes(SITES)) == SITES


def test_a_site_whose_name_looks_like_a_pattern_is_itself(path: Path) -> None:
    hand_written(path, {"*": "int4-g128", "experts[0]": "keep"})
    assert read_plan_file(path).schemes(["experts[0]", "experts0"]) == {"experts[0]": None, "experts0": INT4}


@pytest.mark.parametrize(
    ("sites", "says"),
    [
        ({"*": "int4-g128", "lm_haed": "keep"}, "no site 'lm_haed'; the nearest name is 'lm_head'"),
        ({"*": "int4-g128", "zzz": "keep"}, "no site 'zzz'; it has model.layers.0.self_attn.q_proj, .* and 1 more"),
        ({"*": "int4-g128", "*.up_proj": "keep"}, r"no site '\*.up_proj'; "),
        ({"*": "int4-g"}, r"\*: 'int4-g' is not the name of a scheme: .*or keep"),
        ({"*": "int4-g128", "lm_head": "int99-g128"}, "lm_head: .*int99"),
        ({"*": "int4-g128", "lm_head": None}, "lm_head: None is not the name of a scheme"),
        ({"*": "int4-g128", "lm_head": 4}, "lm_head: 4 is not the name of a scheme"),
        ({"*_proj": "int4-g128"}, "1 of 4 sites have no entry: lm_head. "),
        ({}, "4 of 4 sites have no entry: model.layers.0.self_attn.q_proj, .* and 1 more. "),
        (["lm_head"], '"sites" has to be an object'),
    ],
)
def test_entries_that_cannot_be_read_are_named(path: Path, sites: Any, says: str) -> None:
    with pytest.raises(UsageError, match=f"plan.json: .*{says}"):
        read_plan_file(hand_written(path, sites)).schemes(SITES)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{", "plan.json is not a plan file: .*line 1"),
        ("[]", 'is not a plan file: it has to be a JSON object with "pennyweight_plan": 1'),
        ('{"sites": {}}', 'is not a plan file: it has to be a JSON object with "pennyweight_plan": 1'),
        ('{"pennyweight_plan": 2, "sites": {}}', "a plan file of version 2; version 1 can be read"),
        ('{"pennyweight_plan": 1}', '"sites" has to be an object'),
        ('{"pennyweight_plan": 1, "site": {}}', "unknown key 'site'; there are pennyweight_plan, model, .*, sites"),
        ('{"pennyweight_plan": 1, "sites": {"*": "keep", "*": "int4-g128"}}', "'\\*' is there twice"),
    ],
)
def test_files_that_are_no_plan_are_refused(path: Path, text: str, says: str) -> None:
    path.write_text(text)
    with pytest.raises(UsageError, match=f"plan.json.*{says}" if "plan.json" not in says else says):
        read_plan_file(path).schemes(SITES)


def test_a_file_that_is_not_there_or_not_text(path: Path) -> None:
    with pytest.raises(UsageError, match="plan.json cannot be read \\(No such file"):
        read_plan_file(path).schemes(SITES)
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UsageError, match="plan.json is not a plan file"):
        read_plan_file(path).schemes(SITES)
