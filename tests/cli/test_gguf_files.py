"""GGUF files through the command: damaged, lying, of no use; one line of error, and nothing left behind."""

from __future__ import annotations

import json
import random
import struct
from pathlib import Path

import pytest

from tests.cli.conftest import Command
from tests.models.gguf import raw
from tests.pipeline import tiny
from tests.pipeline.gguf_files import odd_model

QUANTIZE = ("--for", "llama.cpp", "--scheme", "q4_k", "--calibration", "none", "--verify", "none")
ARCHITECTURE = raw.field(b"general.architecture", raw.STRING, raw.text(b"llama"))


def _weight(offset: int = 0, dims: tuple[int, ...] = (256, 2), kind: int = raw.F32) -> bytes:
    return raw.tensor(b"blk.0.attn_q.weight", dims, kind, offset)


HOSTILE = {
    "empty": b"",
    "no GGUF": b"PK\3\4" + bytes(100),
    "only a header": raw.gguf([ARCHITECTURE]),
    "no data": raw.gguf([ARCHITECTURE], [_weight()]),
    "2**62 tensors": raw.gguf([ARCHITECTURE], [], counts=(2**62, 1)),
    "2**62 fields": raw.gguf([ARCHITECTURE], [], counts=(0, 2**62)),
    "a string of 2**63 bytes": raw.gguf([raw.text(b"k") + struct.pack("<IQ", raw.STRING, 2**63)]),
    "misaligned": raw.gguf([ARCHITECTURE], [_weight(offset=4)], bytes(4096)),
    "beyond the end": raw.gguf([ARCHITECTURE], [_weight(offset=1 << 40)], bytes(4096)),
    "a size that overflows": raw.gguf([ARCHITECTURE], [_weight(dims=(1 << 40, 1 << 40))], bytes(4096)),
    "a type of the future": raw.gguf([ARCHITECTURE], [_weight(kind=250)], bytes(4096)),
    "NaN": raw.gguf([ARCHITECTURE], [_weight()], struct.pack("<512f", *[float("nan")] * 512)),
    "no architecture": raw.gguf([], [_weight()], bytes(4096)),
    "architecture 7": raw.gguf([raw.field(b"general.architecture", raw.UINT32, raw.u32(7))], [_weight()], bytes(4096)),
    "an expert twice": raw.gguf(
        [ARCHITECTURE],
        [raw.tensor(b"e.weight", (32, 2, 2), raw.F32), raw.tensor(b"e.1.weight", (32, 2), raw.F32, 512)],
        bytes(1024),
    ),
}


def _refused(pennyweight: Command, file: Path) -> None:
    done = pennyweight("quantize", file, "--out", file.parent / "out", *QUANTIZE)
    assert done.exit_code == 1, done.output
    assert done.exception is None or isinstance(done.exception, SystemExit)
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("error: ")
    assert tiny.traces(file.parent) == []


@pytest.mark.parametrize("content", HOSTILE.values(), ids=HOSTILE.keys())
def test_a_lying_file_is_one_line_of_error(pennyweight: Command, tmp_path: Path, content: bytes) -> None:
    (tmp_path / "m.gguf").write_bytes(content)
    _refused(pennyweight, tmp_path / "m.gguf")


def test_a_file_cut_anywhere_is_refused(pennyweight: Command, tmp_path: Path) -> None:
    whole = odd_model(tmp_path / "whole.gguf").read_bytes()
    for cut in [*random.Random(0).sample(range(len(whole) - 64), 25), 3, 23, len(whole) - 65]:
        (tmp_path / "m.gguf").write_bytes(whole[:cut])
        _refused(pennyweight, tmp_path / "m.gguf")


def test_a_file_with_any_bytes_changed_ends_in_a_result_or_an_error(pennyweight: Command, tmp_path: Path) -> None:
    whole = odd_model(tmp_path / "whole.gguf").read_bytes()
    chosen = random.Random(1)
    for number in range(40):
        changed = bytearray(whole)
        for _ in range(3):
            changed[chosen.randrange(2600)] = chosen.randrange(256)
        (tmp_path / "m.gguf").write_bytes(changed)
        done = pennyweight("quantize", tmp_path / "m.gguf", "--out", tmp_path / f"out-{number}", *QUANTIZE)
        assert done.exit_code in (0, 1), done.output
        assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
        assert (tmp_path / f"out-{number}").exists() == (done.exit_code == 0)
        assert not list(tmp_path.glob(".out*"))


def test_the_command_says_which_way_was_taken(pennyweight: Command, tmp_path: Path) -> None:
    odd_model(tmp_path / "m.gguf", "not-invented-yet")
    arguments = ("--for", "llama.cpp", "--verify", "none")
    done = pennyweight("quantize", tmp_path / "m.gguf", "--out", tmp_path / "out", *arguments)
    assert done.exit_code == 0
    assert "no calibration data was used: transformers cannot run the model" in done.stdout


def test_inspect_lists_what_is_in_a_file(pennyweight: Command, tmp_path: Path) -> None:
    odd_model(tmp_path / "m.gguf")
    shown = pennyweight("inspect", tmp_path / "m.gguf")
    assert "llama" in shown.stdout
    assert "IQ2_XXS" in shown.stdout
    found = json.loads(pennyweight("inspect", tmp_path, "--json").stdout)
    assert {one["name"]: one["type"] for one in found["tensors"]}["blk.1.ffn_up.weight"] == "Q8_0"
    assert found["fields"]["a.words"] == "3 x STRING"


def test_other_commands_say_what_to_do_with_a_file(pennyweight: Command, tmp_path: Path, text: str) -> None:
    odd_model(tmp_path / "m.gguf")
    done = pennyweight("evaluate", tmp_path / "m.gguf", "--against", tmp_path, "--text", text)
    assert done.exit_code == 1
    assert "pennyweight quantize FILE --for llama.cpp" in done.stderr
    done = pennyweight("quantize", tmp_path / "m.gguf", "--out", tmp_path / "out")
    assert done.exit_code == 2
    assert "give --for llama.cpp" in done.stderr


def test_imatrix_writes_a_file_and_says_of_what(pennyweight: Command, model: Path, text: str, tmp_path: Path) -> None:
    arguments = ("--calibration", text, "--samples", 4, "--length", 24)
    done = pennyweight("imatrix", model, "--out", tmp_path / "m.gguf", *arguments)
    assert done.exit_code == 0, done.stderr
    assert "22 weights, from 4 windows of 24 tokens" in done.stdout
    assert (
        json.loads(pennyweight("imatrix", model, "--out", tmp_path / "m.dat", "--json", *arguments).stdout)["entries"]
        == 22
    )
