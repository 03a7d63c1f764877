"""Who writes when, and what the figures are made of; no process is started."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from pennyweight.core.errors import UsageError
from pennyweight.evaluate.speed import bench, race
from pennyweight.evaluate.speed.base import Asked
from pennyweight.evaluate.speed.entry import Entry
from pennyweight.evaluate.speed.race import Racer, speed_ratios

LOG: list[str] = []
# Seconds to the first token and after it, of the warm text and of three rounds.
SECONDS = {
    "a": [(9.0, 9.0), (0.5, 2.0), (0.25, 4.0), (1.0, 1.0)],
    "b": [(7.0, 7.0), (1.0, 1.0), (1.0, 1.0), (1.0, 1.0)],
}
READS = [100.0, 300.0, 500.0, 700.0, 900.0, 1100.0, 1300.0, 1500.0, 1700.0]
END = dict(bytes_per_token=50, resident_bytes=5, mapped_bytes=2, peak_bytes=6)


class _Process:
    """In the place of a real one."""

    fresh: bool = True

    def __init__(self, kind: str, path: Path, asked: Any) -> None:
        self.name = path.name
        facts: dict[str, Any] = {}
        if kind == "packed":
            facts = dict(is_fresh=_Process.fresh, cache="file", cache_bytes=3, packed=2, packed_bytes=40, notes=["hm"])
        self.ready = dict(load_s=8.0 if _Process.fresh else 2.0, import_s=1.0, libraries_bytes=1, facts=facts)
        _Process.fresh = False
        self._texts, self._reads = iter(SECONDS.get(self.name, [])), iter(READS)

    def __enter__(self) -> _Process:
        LOG.append(f"open {self.name}")
        return self

    def __exit__(self, *_: object) -> None: ...

    def close(self) -> None:
        LOG.append(f"close {self.name}")

    def ask(self, **question: Any) -> dict[str, Any]:
        LOG.append(self.name)
        if "read" in question:
            return {"bytes_per_s": next(self._reads)}
        if "end" in question:
            return END
        first, after = next(self._texts)
        return {"first_s": first, "decode_s": after}


@pytest.fixture
def racers(monkeypatch: pytest.MonkeyPatch) -> list[Racer]:
    monkeypatch.setattr(race, "Process", _Process)
    monkeypatch.setattr(_Process, "fresh", True)
    LOG.clear()
    entries = [Entry("A", Path("a"), "packed", 64, 10), Entry("B", Path("b"), "llama.cpp", 64, 20)]
    return [Racer(ExitStack(), entry, Asked(2), prompt=8, tokens=4) for entry in entries]


def _raced(racers: list[Racer]) -> list[float]:
    memory: Any = _Process("memory", Path("-"), None)
    return race.race(racers, memory, 3, lambda done, total: LOG.append(f"{done}/{total}"))


def test_models_write_in_turns_between_readings_of_memory(racers: list[Racer]) -> None:
    # The first process packed: its time is kept, and another one is measured.
    assert LOG == ["open a", "close a", "open a", "a", "open b", "b"]
    LOG.clear()
    assert _raced(racers) == READS
    assert [*"-a-b-", "1/3", *"-b-a-", "2/3", *"-a-b-", "3/3"] == LOG


def test_figures_are_those_of_the_bursts(racers: list[Racer]) -> None:
    _raced(racers)
    first, second = (racer.result() for racer in racers)
    assert (first.first_load_s, first.load_s, second.first_load_s) == (8.0, 2.0, None)
    assert (first.cold_first_token_s, second.cold_first_token_s) == (1 + 2 + 9, 1 + 2 + 7)
    spread = first.decode_tokens_per_s
    assert (spread.median, spread.lowest, spread.highest) == (2.0, 1.0, 4.0)
    assert first.decode_bytes_per_s.median == 50 * 2.0
    assert first.prompt_tokens_per_s.median == 8 / 0.5
    assert first.first_token_s.highest == 1.0
    # 100, 50 and 200 bytes a second beside readings whose means are 200, 1000 (it came last in that round) and 1400.
    assert first.share.highest == 100 / 200
    assert first.share.lowest == 50 / 1000
    assert first.share.median == 200 / 1400
    assert (first.packed, first.notes, second.packed, second.notes) == (2, ["hm"], 0, [])
    assert (first.activations, second.activations) == ("int8", None)


def test_ratios_are_medians_of_the_rounds(racers: list[Racer]) -> None:
    _raced(racers)
    assert speed_ratios(*racers) == {"prompt_tokens_per_s": 2.0, "decode_tokens_per_s": 0.5}


@pytest.mark.parametrize(
    ("contexts", "asked", "expected"),
    [((512, None), None, 448), ((None,), None, 512), ((4096, 2048), None, 512), ((512,), 448, 448)],
)
def test_a_prompt_leaves_room_for_what_is_written(
    contexts: tuple[int | None, ...], asked: int | None, expected: int
) -> None:
    assert bench._prompt([Entry("m", Path("m"), "packed", context, 1) for context in contexts], asked, 64) == expected


def test_a_context_that_is_too_short_is_refused() -> None:
    entries = [Entry("m", Path("m"), "packed", context, 1) for context in (None, 4096, 512)]
    with pytest.raises(UsageError, match="512 tokens, too few for 449 of a prompt and 64 after them"):
        bench._prompt(entries, 449, 64)
    with pytest.raises(UsageError, match="too few for 1 of a prompt and 512"):
        bench._prompt(entries, None, 512)


def test_what_a_reader_should_know_is_said(racers: list[Racer]) -> None:
    _raced(racers)
    packed, other = (racer.result() for racer in racers)
    assert bench._of_machine(0.1) == bench._of_machine(None) == []
    assert "others used 25 %" in bench._of_machine(0.25)[0]
    assert [line.split(": ")[1][:18] for line in bench._of_model(packed, 51)] == [
        "hm",
        "the native library",
        "what a token reads",
    ]
    assert bench._of_model(other, 50) == bench._of_model(other, None) == []
