"""The whole measurement on the model that the project ships: relations between figures, never seconds."""

from __future__ import annotations

import importlib.util
import math
import os
import shutil
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import pennyweight as pw
from pennyweight.core.errors import MissingExtraError, ModelError, UsageError
from pennyweight.evaluate.speed.base import Asked
from pennyweight.evaluate.speed.entry import entry_of
from pennyweight.evaluate.speed.opened import open_transformers, rounding_error
from pennyweight.evaluate.speed.process import Process
from pennyweight.evaluate.speed.results import Bench
from pennyweight.evaluate.speed.worker import _burst
from tests.pipeline import tiny

DEMO = Path(pw.__file__).parent / "demo_model"
linux = pytest.mark.skipif(sys.platform != "linux", reason="memory is known on Linux")


@pytest.fixture(scope="module")
def artefact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("bench") / "int4"
    pw.quantize(DEMO, out, scheme="int4-g32", solver="nearest", fit="minmax", verification="none")
    return out


@pytest.fixture(scope="module")
def found(artefact: Path) -> Bench:
    told: list[tuple[int, int]] = []
    made = pw.bench(artefact, against=DEMO, prompt_tokens=6, tokens=3, threads=1, rounds=2,
                    tell=lambda *done: told.append(done))  # fmt: skip
    assert told == [(1, 2), (2, 2)]
    return made


def test_both_models_are_measured_in_turns(found: Bench) -> None:
    assert (found.rounds, found.prompt_tokens, found.tokens, found.threads) == (2, 6, 3, 1)
    assert found.is_interleaved
    assert found.against is not None
    assert (found.artefact.runtime, found.against.runtime) == ("packed", "transformers")
    assert found.read_bytes >= max(256 << 20, 4 * (found.cache_bytes or 0))
    assert found.ratios is not None
    assert found.ratios["bytes_per_token"] == found.artefact.bytes_per_token / found.against.bytes_per_token < 0.5
    assert {"prompt_tokens_per_s", "decode_tokens_per_s", "load_s", "size_bytes"} <= found.ratios.keys()


def test_figures_agree_with_each_other(found: Bench) -> None:
    for one in (found.artefact, found.against):
        assert one is not None
        for spread in (one.first_token_s, one.prompt_tokens_per_s, one.decode_tokens_per_s, one.share):
            assert 0 < spread.lowest <= spread.median <= spread.highest
        assert one.share.highest < 2
        assert one.decode_bytes_per_s.highest == one.bytes_per_token * one.decode_tokens_per_s.highest
        assert one.first_token_s.lowest == pytest.approx(found.prompt_tokens / one.prompt_tokens_per_s.highest)
        assert one.cold_first_token_s > one.import_s + one.load_s
    assert found.read_bytes_per_s.lowest > 0
    assert found.others_share is None or 0 <= found.others_share <= 1


def test_what_was_packed_and_kept_is_said(found: Bench, artefact: Path) -> None:
    one = found.artefact
    assert (one.packed, one.decoded, one.activations) == (28, {}, "int8")
    assert one.cache == str(artefact / ".pennyweight-packed" / "weights.packed")
    assert one.cache_bytes == Path(one.cache).stat().st_size >= one.packed_bytes
    # This bench was the first to load it; what is measured is mapped.
    assert one.first_load_s is not None
    assert one.bytes_per_token > one.packed_bytes
    assert one.rounding is not None
    assert list(one.rounding) == ["32"]
    kept = sum(file.stat().st_size for file in artefact.iterdir() if file.is_file())
    assert one.size_bytes == kept


@linux
def test_memory_is_that_of_one_model(found: Bench) -> None:
    for one in (found.artefact, found.against):
        assert one is not None
        assert one.resident_bytes is not None
        assert one.libraries_bytes is not None
        assert one.mapped_bytes is not None
        assert one.resident_bytes - one.libraries_bytes > one.bytes_per_token
        assert one.mapped_bytes < one.resident_bytes <= one.peak_bytes
    assert found.artefact.peak_bytes < found.against.peak_bytes  # type: ignore[union-attr]


def test_models_are_run_as_run_runs_them(artefact: Path) -> None:
    for model, runtime, kind in (
        (DEMO, "auto", "transformers"),
        (artefact, "auto", "packed"),
        (artefact, "transformers", "transformers"),
    ):
        entry = entry_of(model, runtime, trust_remote_code=False)  # type: ignore[arg-type]
        assert (entry.kind, entry.context, entry.path) == (kind, 512, model)


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("llama_cpp") is None, reason="llama-cpp-python is not installed")
def test_a_gguf_file_is_measured_in_llama_cpp(tmp_path: Path) -> None:
    out = tmp_path / "gguf"
    pw.quantize(DEMO, out, scheme="q8_0", runtime="llama.cpp", solver="nearest", fit="minmax", verification="none")
    found = pw.bench(out, prompt_tokens=4, tokens=2, threads=1, rounds=1).artefact
    assert (found.runtime, found.kernels, found.activations) == ("llama.cpp", None, None)
    assert 0 < found.bytes_per_token < found.size_bytes
    # Nothing of torch is in its process.
    assert found.libraries_bytes is None or found.libraries_bytes < 100 << 20


def test_a_gguf_file_needs_llama_cpp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error of the process is raised here."""
    shutil.copytree(DEMO, tmp_path / "m")
    hidden = tmp_path / "hidden" / "llama_cpp"
    hidden.mkdir(parents=True)
    (hidden / "__init__.py").write_text("raise ImportError('hidden')")
    monkeypatch.setenv("PYTHONPATH", str(hidden.parent))
    with (
        pytest.raises(MissingExtraError, match=r"pip install 'pennyweight\[llama-cpp\]'"),
        Process("llama.cpp", tmp_path / "m.gguf", Asked(1)),
    ):
        pass


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (dict(threads=0), "threads=0: give 1 or more"),
        (dict(rounds=0), "rounds=0"),
        (dict(tokens=0), "tokens=0"),
        (dict(activations="int4"), "give 'exact' or 'int8'"),
        (dict(runtime="vllm"), "give 'auto' or 'transformers'"),
        (dict(prompt_tokens=500), "its context has 512 tokens, too few for 500 of a prompt and 64 after them"),
    ],
)
def test_settings_that_do_not_exist_are_refused(asked: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        pw.bench(DEMO, **asked)


def test_what_is_no_language_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"has no config\.json"):
        pw.bench(tmp_path)
    (tmp_path / "notes.txt").write_text("no model")
    with pytest.raises(ModelError, match="is no model: give the directory of one, or a GGUF file"):
        pw.bench(tmp_path / "notes.txt")
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    with pytest.raises(ModelError):
        pw.bench(tmp_path / "m.gguf")


def test_a_process_that_is_killed_is_reported(artefact: Path) -> None:
    with Process("memory", artefact, Asked(1, bytes=1 << 20)) as process:
        assert process.ask(read=1)["bytes_per_s"] > 0
        os.kill(process._child.pid, signal.SIGKILL)
        process._child.wait()
        with pytest.raises(ModelError, match="killed by signal 9, probably for lack of memory"):
            process.ask(read=1)
    process.close()


def test_the_last_words_of_a_process_are_told(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"could not be measured: KeyError: 'nothing'"), Process(
        "nothing", tmp_path, Asked(1)  # type: ignore[arg-type]
    ):  # fmt: skip
        pass


def test_a_text_that_ends_is_not_measured() -> None:
    class Short:
        facts: dict[str, Any] = {}  # noqa: RUF012

        def write(self, prompt: int, tokens: int) -> Iterator[int]:
            return iter(range(tokens - 2))

        def touch(self) -> None: ...
        def bytes_per_token(self) -> int: ...

    with pytest.raises(ModelError, match="ended after 3 of 5 tokens"):
        _burst(Short(), prompt=2, tokens=4)


def test_a_token_that_ends_texts_ends_none_here(tmp_path: Path) -> None:
    """A model for which every token does."""
    model = tiny.llama(tmp_path / "m", eos_token_id=list(range(tiny.VOCABULARY)))
    opened = open_transformers(model, Asked(1))
    assert len(list(opened.write(3, 5))) == 5


def _independent(group: int) -> float:
    """E[max^2] by integration; each number but the largest is rounded to steps of largest / 127, evenly."""
    step, square = 1e-3, 0.0
    for number in range(9000):
        x = (number + 0.5) * step
        square += 2 * x * (1 - math.erf(x / math.sqrt(2)) ** group) * step
    return math.sqrt(square * (1 - 1 / group) / 12) / 127


@pytest.mark.parametrize("group", [16, 32, 64, 128])
def test_the_error_of_rounding_is_that_of_normal_numbers(group: int) -> None:
    assert rounding_error(group) == pytest.approx(_independent(group), rel=0.01)
