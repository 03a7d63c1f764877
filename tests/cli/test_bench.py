"""`pennyweight bench`: what it shows of figures that are given."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pennyweight.evaluate.speed.results import Bench, Contestant, Spread
from tests.cli.conftest import Command

ONE = Contestant(
    model="small", runtime="packed", kernels="avx2", activations="int8", rounding={"32": 0.0053}, packed=2,
    packed_bytes=100, decoded={"a.weight": "int4-g24: hm"}, notes=[], size_bytes=3 << 20, cache="small/w.packed",
    cache_bytes=2 << 20, import_s=1.0, load_s=0.125, first_load_s=2.5, cold_first_token_s=1.5,
    first_token_s=Spread(0.25, 0.2, 0.3), prompt_tokens_per_s=Spread(2048.0, 2000.0, 2100.0),
    decode_tokens_per_s=Spread(40.0, 39.0, 41.0), bytes_per_token=1 << 20, decode_bytes_per_s=Spread(5e9, 4e9, 6e9),
    share=Spread(0.5, 0.4, 0.6), resident_bytes=7 << 20, mapped_bytes=None, libraries_bytes=1 << 20,
    peak_bytes=9 << 20,
)  # fmt: skip
OTHER = replace(ONE, model="large", runtime="transformers", kernels=None, activations=None, rounding=None, decoded={},
                cache=None, cache_bytes=0, first_load_s=None)  # fmt: skip
FOUND = Bench(
    rounds=3, prompt_tokens=512, tokens=64, threads=2, is_interleaved=True, load_average=[0.5, 0.25, 0.125],
    others_share=0.25, cache_bytes=1 << 20, read_bytes=256 << 20, read_bytes_per_s=Spread(1e10, 9e9, 1.1e10),
    artefact=ONE, against=OTHER, ratios={"decode_tokens_per_s": 2.5}, notices=["others used 25 %"],
)  # fmt: skip


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What `bench` was asked, which finds FOUND."""
    calls: list[Any] = []

    def measure(*arguments: Any, **options: Any) -> Bench:
        calls.append((arguments, options))
        return FOUND if options["against"] else replace(FOUND, against=None, ratios=None, is_interleaved=False)

    monkeypatch.setattr("pennyweight.evaluate.speed.bench.bench", measure)
    return calls


def test_two_models_stand_beside_each_other(pennyweight: Command, asked: list[Any]) -> None:
    done = pennyweight("bench", "small", "--against", "large", "--threads", 2, "--rounds", 5)
    assert done.exit_code == 0, done.output
    [(arguments, options)] = asked
    assert arguments == ("small",)
    assert (options["against"], options["threads"], options["rounds"], options["prompt_tokens"]) == (
        "large",
        2,
        5,
        None,
    )
    assert (options["tokens"], options["activations"], options["runtime"]) == (64, "int8", "auto")
    lines = [" ".join(line.split()) for line in done.stdout.splitlines()]
    assert lines[0] == "rounds: 3, interleaved; tokens: 512 of a prompt, 64 after the first one; threads: 2"
    assert lines[1] == "small large ratio"
    assert "runtime packed, int8, avx2 transformers" in lines
    assert "decoding, tokens a second 40 (39 to 41) 40 (39 to 41) 2.5 x" in lines
    assert "prompt, tokens a second 2,048 (2,000 to 2,100) 2,048 (2,000 to 2,100)" in lines
    assert "the first time, packing 2.5 -" in lines
    assert "packed weights, kept 2.0 MiB -" in lines
    assert "% of reading memory 50 (40 to 60) 50 (40 to 60)" in lines
    assert not any("mapped" in line for line in lines)
    assert "reading 256.0 MiB of memory: 10 (9 to 11) GB a second" in lines
    assert "small: int8 changes normally distributed inputs by 0.53 % in groups of 32" in lines
    assert "small: packed weights are kept in small/w.packed" in lines
    assert "small: kept as floats: a.weight: int4-g24: hm" in lines
    assert lines[-1] == "load average before: 0.50, 0.25, 0.12"
    assert done.stderr == "note: others used 25 %\n"


def test_one_model_stands_alone(pennyweight: Command, asked: list[Any]) -> None:
    lines = [" ".join(line.split()) for line in pennyweight("bench", "small").stdout.splitlines()]
    assert lines[:3] == [
        "rounds: 3; tokens: 512 of a prompt, 64 after the first one; threads: 2", "small",
        "runtime packed, int8, avx2",
    ]  # fmt: skip


def test_one_json_object_has_everything(pennyweight: Command, asked: list[Any]) -> None:
    done = pennyweight("bench", "small", "--against", "large", "--json")
    found = json.loads(done.stdout)
    assert done.stderr == ""
    assert found["artefact"]["decode_tokens_per_s"] == {"median": 40.0, "lowest": 39.0, "highest": 41.0}
    assert found["against"]["rounding"] is None
    assert (found["ratios"], found["notices"]) == ({"decode_tokens_per_s": 2.5}, ["others used 25 %"])


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (("--threads", 0), 2, "--threads"),
        (("--tokens", 0), 2, "--tokens"),
        (("--activations", "int4"), 2, "give 'exact' or 'int8'"),
        (("--runtime", "vllm"), 2, "give 'auto' or 'transformers'"),
        (("--prompt-tokens", 64), 2, "its context has 64 tokens, too few for 64 of a prompt and 64 after them"),
    ],
)
def test_misuse_ends_with_2(
    pennyweight: Command, artefact: Path, options: tuple[Any, ...], code: int, message: str
) -> None:
    done = pennyweight("bench", artefact, *options)
    assert done.exit_code == code
    assert message in done.stderr


def test_what_is_no_model_ends_with_1(pennyweight: Command, tmp_path: Path) -> None:
    done = pennyweight("bench", tmp_path)
    assert done.exit_code == 1
    assert done.stderr.startswith("error: ")
    assert "has no config.json" in done.stderr
