"""Ways to lose work or memory that are easy to miss."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from pennyweight.core.errors import UsageError
from pennyweight.core.parallel import one_thread_per_operation
from pennyweight.evaluate.proved import quantize
from pennyweight.kernels.native import kernel_table
from pennyweight.models.streamed import StreamedModel
from pennyweight.pipeline import rows
from pennyweight.pipeline.output import Output
from pennyweight.pipeline.records import BlockDone
from tests.pipeline import tiny


def test_finished_work_is_kept_when_the_output_came_to_exist_meanwhile(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"

    def somebody_else_writes(done: BlockDone) -> None:
        if done.index + 1 == done.total:
            out.mkdir()
            (out / "theirs").write_text("mine")

    with pytest.raises(UsageError, match="finished work is kept"):
        tiny.run(model, out, tell=somebody_else_writes)
    assert (out / "theirs").read_text() == "mine"
    (out / "theirs").unlink()
    assert tiny.run(model, out).resumed_blocks == 3


def test_other_kernels_do_not_continue_a_run(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(done: BlockDone) -> None:
        raise KeyboardInterrupt

    native_name = kernel_table() or "torch"
    with pytest.raises(KeyboardInterrupt):
        tiny.run(model, tmp_path / "out", tell=stop)
    monkeypatch.setenv("PENNYWEIGHT_KERNELS", "torch")
    report = tiny.run(model, tmp_path / "out")
    assert report.resumed_blocks == (1 if native_name == "torch" else 0)


def test_sites_without_data_are_solved_in_parts_and_written_as_they_are_done(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = replace(tiny.OPTIONS, solver="nearest", calibration="none")
    tiny.run(model, tmp_path / "at-once", options)
    monkeypatch.setattr(rows, "_PART", 700)
    happened: list[str] = []
    solve, write = rows.solve_site, Output.write
    monkeypatch.setattr(rows, "solve_site", lambda *a: happened.append("solved") or solve(*a))
    monkeypatch.setattr(Output, "write", lambda *a: happened.append("written") or write(*a))
    tiny.run(model, tmp_path / "in-parts", options)
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("at-once", "in-parts")]
    assert weights[0] == weights[1]
    assert happened.count("written") == 3 * 7
    assert happened.count("solved") > 2 * happened.count("written")
    first_block = happened[: happened.index("written") + 10]
    assert "solved" in first_block[first_block.index("written") :]


def test_looking_up_tokens_reads_their_rows_only(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    streamed = StreamedModel(model)
    whole = streamed.weights.read("model.embed_tokens.weight")
    read: list[str] = []
    original = type(streamed.weights).read
    monkeypatch.setattr(type(streamed.weights), "read", lambda self, name: read.append(name) or original(self, name))
    ids = torch.tensor([[5, 3, 5, 9]])
    stream = streamed.start([ids])
    assert "model.embed_tokens.weight" not in read
    torch.testing.assert_close(stream.hidden[0], whole[ids], rtol=0, atol=0)


def test_advancing_equals_running_the_block(model: Path) -> None:
    streamed = StreamedModel(model)
    batches = [torch.arange(24).reshape(2, 12), torch.arange(12).reshape(1, 12)]
    stream = streamed.start(batches)
    with one_thread_per_operation(), streamed.opened(0) as block:
        expected = streamed.run_block(block, 0, stream)
        streamed.advance(block, 0, stream)
    assert all(torch.equal(found, wanted) for found, wanted in zip(stream.hidden, expected, strict=True))


@pytest.mark.slow
@pytest.mark.promise
def test_what_only_vllm_takes_is_verified_weight_by_weight(tmp_path: Path) -> None:
    source = tiny.mixtral(tmp_path / "mixtral")
    report = quantize(
        source,
        tmp_path / "out",
        scheme="int4-g32-asym",
        runtime="vllm",
        solver="nearest",
    )
    assert report.verified == "partial"
    assert "not verified in vllm" in report.verification["reason"]
