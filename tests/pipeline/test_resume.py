"""Ended early and started again: the same bytes; other inputs or options: a fresh start."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from pennyweight.core.errors import SpaceError, UsageError, VerificationError
from pennyweight.pipeline.journal import Journal, only_writer
from pennyweight.pipeline.records import BlockDone, RunReport, SiteRecord
from tests.pipeline import tiny
from tests.pipeline.tiny import OPTIONS

Done = tuple[Path, RunReport]
BLOCKS = 3


class _Stop(Exception):
    pass


def _stop_after(block: int, error: BaseException) -> Callable[[BlockDone], None]:
    def tell(done: BlockDone) -> None:
        if done.index == block:
            raise error

    return tell


def _work(parent: Path) -> Path:
    [found] = [path for path in parent.iterdir() if path.name.startswith(".out.work-")]
    return found


@pytest.mark.parametrize("block", range(BLOCKS))
@pytest.mark.parametrize("error", [_Stop(), KeyboardInterrupt()], ids=["crash", "interrupt"])
def test_a_run_ended_after_any_block_goes_on_to_the_same_bytes(
    model: Path, done: Done, tmp_path: Path, block: int, error: BaseException
) -> None:
    with pytest.raises(type(error)) as ended:
        tiny.run(model, tmp_path / "out", tell=_stop_after(block, error))
    assert f"{block + 1} finished blocks are kept in {_work(tmp_path)}" in ended.value.__notes__[-1]
    assert not (tmp_path / "out").exists()
    told: list[BlockDone] = []
    report = tiny.run(model, tmp_path / "out", tell=told.append)
    assert report.resumed_blocks == block + 1
    assert [one.resumed for one in told] == [index <= block for index in range(BLOCKS)]
    assert tiny.digests(tmp_path / "out") == tiny.digests(done[0])
    assert tiny.traces(tmp_path) == ["out"]
    assert json.loads((tmp_path / "out" / "run.json").read_text())["resumed_blocks"] == block + 1


def test_ended_again_and_again(model: Path, done: Done, tmp_path: Path) -> None:
    for block in range(BLOCKS):
        with pytest.raises(_Stop):
            tiny.run(model, tmp_path / "out", tell=_stop_after(block, _Stop()))
    assert tiny.run(model, tmp_path / "out").resumed_blocks == BLOCKS
    assert tiny.digests(tmp_path / "out") == tiny.digests(done[0])


def test_ended_before_a_block_is_finished_leaves_no_trace(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise _Stop

    monkeypatch.setattr("pennyweight.pipeline.run.run_blocks", fail)
    with pytest.raises(_Stop):
        tiny.run(model, tmp_path / "out")
    assert tiny.traces(tmp_path) == []


def test_a_data_free_run_resumes_too(model: Path, tmp_path: Path) -> None:
    options = replace(OPTIONS, solver="nearest", calibration="none")
    tiny.run(model, tmp_path / "whole", options)
    with pytest.raises(_Stop):
        tiny.run(model, tmp_path / "out", options, tell=_stop_after(0, _Stop()))
    assert tiny.run(model, tmp_path / "out", options).resumed_blocks == 1
    assert tiny.digests(tmp_path / "out") == tiny.digests(tmp_path / "whole")


@pytest.mark.parametrize(
    "changes", [dict(scheme="int4-g32"), dict(seed=5), dict(fit="minmax"), dict(calibration=(tiny.words(seed=9),))]
)
def test_another_recipe_starts_afresh_and_names_what_was_left(
    model: Path, tmp_path: Path, changes: dict[str, object]
) -> None:
    with pytest.raises(_Stop):
        tiny.run(model, tmp_path / "out", tell=_stop_after(1, _Stop()))
    left = _work(tmp_path)
    report = tiny.run(model, tmp_path / "out", replace(OPTIONS, **changes))  # type: ignore[arg-type]
    assert report.resumed_blocks == 0
    assert report.leftovers == [left.name]
    assert left.is_dir()


def test_another_model_starts_afresh(model: Path, tmp_path: Path) -> None:
    mine = tmp_path / "model"
    shutil.copytree(model, mine)
    with pytest.raises(_Stop):
        tiny.run(mine, tmp_path / "out", tell=_stop_after(1, _Stop()))
    raw = bytearray((mine / "model.safetensors").read_bytes())
    raw[-1] ^= 1
    (mine / "model.safetensors").write_bytes(raw)
    assert tiny.run(mine, tmp_path / "out").resumed_blocks == 0


@pytest.mark.parametrize("tail", [b'{"part": "block 1", "si', b"\x00\xff\x00", b"[]\n", b'{"part": "block 9"}\n'])
def test_a_damaged_end_of_the_journal_is_dropped(model: Path, done: Done, tmp_path: Path, tail: bytes) -> None:
    with pytest.raises(_Stop):
        tiny.run(model, tmp_path / "out", tell=_stop_after(0, _Stop()))
    with (_work(tmp_path) / "journal.jsonl").open("ab") as file:
        file.write(tail)
    assert tiny.run(model, tmp_path / "out").resumed_blocks == 1
    assert tiny.digests(tmp_path / "out") == tiny.digests(done[0])


def test_a_block_whose_last_line_was_cut_is_done_again(model: Path, done: Done, tmp_path: Path) -> None:
    with pytest.raises(_Stop):
        tiny.run(model, tmp_path / "out", tell=_stop_after(1, _Stop()))
    journal = _work(tmp_path) / "journal.jsonl"
    journal.write_bytes(journal.read_bytes()[:-20])
    assert tiny.run(model, tmp_path / "out").resumed_blocks == 1
    assert tiny.digests(tmp_path / "out") == tiny.digests(done[0])


def test_weight_files_that_are_gone_start_afresh(model: Path, done: Done, tmp_path: Path) -> None:
    with pytest.raises(_Stop):
        tiny.run(model, tmp_path / "out", tell=_stop_after(1, _Stop()))
    (_work(tmp_path) / "model.safetensors").unlink()
    tiny.run(model, tmp_path / "out")
    assert tiny.digests(tmp_path / "out") == tiny.digests(done[0])


def test_a_failed_verification_leaves_the_output_where_it_can_be_looked_at(
    model: Path, done: Done, tmp_path: Path
) -> None:
    def fail(directory: Path) -> dict[str, object]:
        raise VerificationError(f"{directory}: no")

    with pytest.raises(VerificationError) as failed:
        tiny.run(model, tmp_path / "out", verify=fail)
    assert "3 finished blocks are kept" in failed.value.__notes__[0]
    assert not (tmp_path / "out").exists()
    assert tiny.run(model, tmp_path / "out").resumed_blocks == BLOCKS
    assert tiny.digests(tmp_path / "out") == tiny.digests(done[0])


def test_a_disk_that_fills_up_keeps_the_finished_blocks(
    model: Path, done: Done, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, told = os.pwrite, []

    def pwrite(descriptor: int, data: object, offset: int) -> int:
        if len(told) >= 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(descriptor, data, offset)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "pwrite", pwrite)
    with pytest.raises(SpaceError, match="no space is left for the output: make room there") as full:
        tiny.run(model, tmp_path / "out", tell=told.append)
    assert "2 finished blocks are kept" in full.value.__notes__[0]
    monkeypatch.undo()
    assert tiny.run(model, tmp_path / "out").resumed_blocks == 2
    assert tiny.digests(tmp_path / "out") == tiny.digests(done[0])


def test_a_resumed_run_asks_only_for_the_room_it_still_needs(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    monkeypatch.setattr("pennyweight.pipeline.run.check_space", lambda where, needed: asked.append(needed))
    with pytest.raises(_Stop):
        tiny.run(model, tmp_path / "out", tell=_stop_after(1, _Stop()))
    tiny.run(model, tmp_path / "out")
    assert asked[1] < asked[0]


def test_only_one_run_works_in_a_directory(model: Path, tmp_path: Path) -> None:
    with pytest.raises(_Stop):
        tiny.run(model, tmp_path / "out", tell=_stop_after(1, _Stop()))
    with only_writer(_work(tmp_path)), pytest.raises(UsageError, match="another run is making the same output"):
        tiny.run(model, tmp_path / "out")
    assert tiny.run(model, tmp_path / "out").resumed_blocks == 2


def test_a_journal_gives_back_what_it_was_told(tmp_path: Path) -> None:
    record = SiteRecord("a.b", "int4-g16-f32", 0.1, 1 / 3, 7, ("one", "two"))
    journal = Journal.open(tmp_path)
    journal.add("kept", [])
    journal.add("block 0", [record])
    again = Journal.open(tmp_path)
    assert again.finished == {"kept": [], "block 0": [record]}
    assert again.blocks == 1


_CHILD = """
import sys, time, torch
sys.path[:0] = [{root!r}, {root!r} + "/src"]
torch.set_num_threads(2)
from pathlib import Path
from tests.pipeline import tiny
def tell(done):
    print("block", done.index, flush=True)
    if done.index == 1:
        time.sleep(60)
tiny.run(Path({model!r}), Path({out!r}), tell=tell)
"""


@pytest.mark.slow
@pytest.mark.promise
@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_a_killed_process_is_continued_to_the_same_bytes(
    model: Path, done: Done, tmp_path: Path, end: signal.Signals
) -> None:
    root = str(Path(__file__).parents[2])
    code = _CHILD.format(root=root, model=str(model), out=str(tmp_path / "out"))
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as child:
        assert child.stdout is not None
        lines = [child.stdout.readline(), child.stdout.readline()]
        assert lines == [b"block 0\n", b"block 1\n"]
        time.sleep(0.2)
        child.send_signal(end)
        child.wait(30)
        child.stderr.read()  # type: ignore[union-attr]
    assert child.returncode != 0
    assert not (tmp_path / "out").exists()
    assert tiny.run(model, tmp_path / "out").resumed_blocks == 2
    assert tiny.digests(tmp_path / "out") == tiny.digests(done[0])
