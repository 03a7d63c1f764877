"""GGUF artefacts of every family in llama.cpp itself: mixed plans, budgets, resume, recovery, damage."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch

from pennyweight.core.errors import CheckpointError, VerificationError
from pennyweight.evaluate import verify_gguf
from pennyweight.evaluate.compare import evaluate
from pennyweight.evaluate.generate import generate
from pennyweight.evaluate.inventory import inventory
from pennyweight.evaluate.verify import verify
from pennyweight.models.gguf.stored import Stored
from pennyweight.pipeline.records import BlockDone, RunReport
from pennyweight.plan.budget import Budget
from pennyweight.train.recovery.finish import Recovery
from tests.evaluate.gguf_models import FAMILIES, NEAREST, OPTIONS, family
from tests.pipeline import tiny

pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed: pip install 'pennyweight[llama-cpp]'")

_ATTENTION = ("*.q_proj=q6_k", "*.k_proj=iq4_xs", "*.v_proj=q8_0")
_DENSE = (*_ATTENTION, "*.0.mlp.up_proj=q2_k", "*.1.mlp.up_proj=q3_k", "*.0.mlp.gate_proj=q4_0")
# A layer's experts are one tensor: what is kept or given another type is that of all of them.
_MIXED: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "qwen3_moe": ((*_ATTENTION, "*.0.*.down_proj=q3_k", "*.1.*.gate_proj=iq4_nl"), ("*.1.*.up_proj",)),
    "mixtral": ((*_ATTENTION, "*.0.*.w1=mxfp4_ggml", "*.1.*.w3=q5_0"), ("*.1.*.w1",)),
}


def _worker(artefact: Path, extent: str, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    """The fresh process's work done in this one, which takes no seconds of imports."""
    capsys.readouterr()
    verify_gguf.main([str(artefact), extent])
    found: dict[str, Any] = json.loads(capsys.readouterr().out.splitlines()[-1])
    return found


def _types(artefact: Path) -> dict[str, str]:
    """Tensor -> the name of its type, as the gguf package reads them."""
    return {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(artefact / "model.gguf").tensors}


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its head is not tied."""
    return family("llama", tmp_path_factory.mktemp("gguf-llama") / "model")


@pytest.fixture(scope="session")
def made(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, RunReport]:
    """The calibrated artefact of it in the default scheme."""
    out = tmp_path_factory.mktemp("gguf-made") / "out"
    return out, tiny.run(llama, out, OPTIONS)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[] if name in ("llama", "qwen3_moe") else [pytest.mark.slow, pytest.mark.promise])
        for name in FAMILIES
    ],
)
def test_a_mixed_plan_of_each_family_is_what_llama_cpp_computes(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    at, keep = _MIXED.get(name, (_DENSE, ("*.1.self_attn.o_proj",)))
    report = tiny.run(
        family(name, tmp_path / "model"), tmp_path / "out", replace(NEAREST, scheme="q5_k", at=at, keep=keep)
    )
    types = _types(tmp_path / "out")
    assert {types[f"blk.{block}.attn_q.weight"] for block in (0, 1)} == {"Q6_K"}
    assert types["blk.1.attn_k.weight"] == "IQ4_XS"
    assert types["blk.0.attn_output.weight"] == "Q5_K"
    if name not in _MIXED:
        assert [types[f"blk.{block}.ffn_up.weight"] for block in (0, 1)] == ["Q2_K", "Q3_K"]
        # 256 does not divide 288 inputs; what is kept has the checkpoint's type.
        assert [types[f"blk.{block}.ffn_down.weight"] for block in (0, 1)] == ["Q5_1", "Q5_1"]
        assert types["blk.1.attn_output.weight"] == "BF16"
    assert report.kept
    assert all("--keep" in reason for reason in report.kept.values())
    found = _worker(tmp_path / "out", "full", capsys)
    assert (found["verified"], found["problems"]) == ("full", [])
    assert found["kl_decoded"] < 1e-5
    # Its own kernels round activations; other weights would be far beyond that.
    assert found["kl_of_runtime"] < 0.01
    partly = _worker(tmp_path / "out", "blocks", capsys)
    assert (partly["weights_compared"], partly["problems"]) == (len(types), [])


@pytest.mark.slow
@pytest.mark.promise
def test_q6_k_falls_back_to_q8_0_and_narrow_ones_to_iq4_nl(llama: Path, tmp_path: Path) -> None:
    for scheme, other in (("q6_k", "Q8_0"), ("q3_k", "IQ4_NL"), ("q4_k", "Q5_0")):
        tiny.run(llama, tmp_path / scheme, replace(NEAREST, scheme=scheme))
        types = _types(tmp_path / scheme)
        assert types["blk.0.ffn_down.weight"] == other
        assert types["blk.0.ffn_up.weight"] == scheme.upper()


def test_a_head_that_is_not_tied_and_the_embedding_get_six_bits_at_least(made: tuple[Path, RunReport]) -> None:
    types = _types(made[0])
    assert (types["output.weight"], types["token_embd.weight"], types["blk.0.attn_q.weight"]) == (
        "Q6_K",
        "Q6_K",
        "Q4_K",
    )
    assert made[1].sites == 2 * 7 + 2


def test_the_main_job_says_what_it_verified_in_a_fresh_process(made: tuple[Path, RunReport]) -> None:
    found = verify(made[0])
    assert found["verified"] == "full"
    assert found["runtime"].startswith("llama.cpp of llama-cpp-python ")
    assert "problems" not in found


def test_a_text_is_continued_by_llama_cpp(made: tuple[Path, RunReport], capsys: pytest.CaptureFixture[str]) -> None:
    asked: dict[str, Any] = dict(max_tokens=6, temperature=0.0, seed=0, device="cpu")
    text, tokens, _ = generate(str(made[0]), "It was a dark night", **asked, is_streamed=True)
    assert capsys.readouterr().out == text + "\n"
    assert 1 <= tokens <= 6
    assert generate(str(made[0]), "It was a dark night", **asked)[:2] == (text, tokens)
    warm = [generate(str(made[0]), "It", **(asked | {"temperature": 5.0, "seed": seed}))[0] for seed in (1, 1, 2)]
    assert warm[0] == warm[1] != warm[2]


def test_its_types_are_what_inspect_finds(made: tuple[Path, RunReport]) -> None:
    found = inventory(str(made[0]))
    kinds = {site.name: site.stored_as for site in found.sites}
    assert kinds["model.layers.0.mlp.down_proj"] == "q5_0"
    assert kinds["model.layers.0.mlp.up_proj"] == "q4_k"
    assert kinds["lm_head"] == "q6_k"
    assert found.other_codes == {"model.embed_tokens.weight": "q6_k"}


class _Stop(Exception):
    pass


@pytest.mark.slow
@pytest.mark.promise
def test_a_run_that_crashed_goes_on_to_the_same_bytes(
    llama: Path, made: tuple[Path, RunReport], tmp_path: Path
) -> None:
    def stop(done: BlockDone) -> None:
        raise _Stop

    with pytest.raises(_Stop):
        tiny.run(llama, tmp_path / "out", OPTIONS, tell=stop)
    report = tiny.run(llama, tmp_path / "out", OPTIONS)
    assert report.resumed_blocks == 1
    assert tiny.digests(tmp_path / "out") == tiny.digests(made[0])


def test_evaluation_reads_the_file(llama: Path, made: tuple[Path, RunReport], text: str) -> None:
    out, report = made
    found = evaluate(str(out), against=str(llama), source=text, length=32, samples=4)
    assert found.kl_mean is not None
    assert 0 < found.kl_mean < 0.5
    assert found.bpw == report.bpw
    assert found.size_bytes == report.size_bytes
    assert found.size_bytes == sum(file.stat().st_size for file in out.rglob("*"))


@pytest.mark.slow
@pytest.mark.promise
@pytest.mark.parametrize("budget", [Budget("bpw", 4.9), Budget("bpw", 6.3), Budget("size", 2_400_000.0)], ids=str)
def test_no_budget_is_exceeded(llama: Path, tmp_path: Path, budget: Budget) -> None:
    report = tiny.run(llama, tmp_path / "out", replace(OPTIONS, budget=budget))
    taken = report.bpw if budget.kind == "bpw" else sum(f.stat().st_size for f in (tmp_path / "out").iterdir())
    assert 0.8 * budget.value < taken <= budget.value
    reader = gguf.GGUFReader(tmp_path / "out" / "model.gguf")
    weights = sum(int(tensor.n_elements) for tensor in reader.tensors)
    # Norms, and nothing else, are of another size in the file than in the checkpoint.
    assert report.bpw == pytest.approx(8 * sum(int(t.n_bytes) for t in reader.tensors) / weights, rel=1e-3)


@pytest.mark.slow
@pytest.mark.promise
def test_recovery_changes_the_file_and_lowers_the_loss(
    llama: Path, made: tuple[Path, RunReport], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = replace(OPTIONS, scheme="q3_k", samples=24, recover=True)
    tiny.run(llama, tmp_path / "without", replace(options, recover=False))
    tiny.run(llama, tmp_path / "out", options, finish=Recovery.of(options))
    found = json.loads((tmp_path / "out" / "pennyweight.json").read_text())["found"]["finish"]
    assert found["held_out_after"] < found["held_out_before"], found
    assert (tmp_path / "out/model.gguf").read_bytes() != (tmp_path / "without/model.gguf").read_bytes()
    assert _worker(tmp_path / "out", "full", capsys)["problems"] == []


# ---- damage


@pytest.fixture
def mine(made: tuple[Path, RunReport], tmp_path: Path) -> Path:
    """A copy that a test may tamper with."""
    return Path(shutil.copytree(made[0], tmp_path / "mine"))


def _position(artefact: Path, tensor: str) -> tuple[int, int]:
    [found] = [one for one in gguf.GGUFReader(artefact / "model.gguf").tensors if one.name == tensor]
    return int(found.data_offset), int(found.n_bytes)


def _truncate(artefact: Path) -> None:
    file = artefact / "model.gguf"
    with file.open("r+b") as stream:
        stream.truncate(file.stat().st_size - 4096)


def _change_byte(artefact: Path) -> None:
    raw = bytearray((artefact / "model.gguf").read_bytes())
    raw[_position(artefact, "blk.1.ffn_up.weight")[0] + 1234] ^= 4
    (artefact / "model.gguf").write_bytes(raw)


def _swap(artefact: Path) -> None:
    """Two tensors of one shape and type take each other's names."""
    raw = (artefact / "model.gguf").read_bytes()
    one, other = b"blk.0.attn_q.weight", b"blk.1.attn_q.weight"
    raw = raw.replace(one, b"\0" * len(one)).replace(other, one).replace(b"\0" * len(one) + b"\x02", other + b"\x02")
    (artefact / "model.gguf").write_bytes(raw)


@pytest.mark.parametrize("damage", [_truncate, _change_byte, _swap], ids=lambda damage: damage.__name__)
def test_a_damaged_file_is_not_what_its_record_says(mine: Path, damage: Callable[[Path], None]) -> None:
    before = (mine / "model.gguf").read_bytes()
    damage(mine)
    assert (mine / "model.gguf").read_bytes() != before
    with pytest.raises(VerificationError, match="model.gguf is not the file that was written"):
        verify(mine)


def test_without_a_record_a_truncated_file_is_refused(mine: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (mine / "pennyweight.json").unlink()
    _truncate(mine)
    with pytest.raises(CheckpointError, match="truncated|ends"):
        _worker(mine, "full", capsys)


def test_rows_in_the_wrong_order_are_seen_by_llama_cpp_alone(
    llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A writer and a reader of ours that are wrong in the same way."""
    monkeypatch.setattr(Stored, "row_order", lambda self, rows: None)
    monkeypatch.setattr(Stored, "invert", lambda self, stored: stored)
    tiny.run(llama, tmp_path / "out", NEAREST)
    [problem] = _worker(tmp_path / "out", "full", capsys)["problems"]
    assert "nats of KL from ours" in problem


def test_what_llama_cpp_decodes_otherwise_is_named(
    made: tuple[Path, RunReport], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = verify_gguf.decoded_rows

    def off(tensor: Any, rows: slice) -> torch.Tensor:
        found = real(tensor, rows)
        return found * 1.001 if tensor.name == "blk.0.attn_v.weight" else found

    monkeypatch.setattr(verify_gguf, "decoded_rows", off)
    # Too little for logits to tell.
    for extent in ("full", "blocks"):
        assert _worker(made[0], extent, capsys)["problems"] == [
            "blk.0.attn_v.weight: the gguf package decodes other weights than we do"
        ]
