"""The command line as a process: what it imports, what it prints where, and how it ends when it is stopped."""

from __future__ import annotations

import json
import os
import pty
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.pipeline import tiny

ROOT = Path(__file__).parents[2]
ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT / "src")}
MAIN = [sys.executable, "-m", "pennyweight.cli.main"]
# DESIGN: `--help` answers in under 0.3 s. Counted in processor time, which a busy machine does not stretch much.
HELP_S = 0.3
HEAVY = {"torch", "transformers", "numpy", "safetensors", "huggingface_hub"}
# Of what a plan with known costs has no use for, what takes longest to import.
UNUSED_BY_A_PLAN = {
    "torch._dynamo",
    "torch.distributed._functional_collectives",
    "torch.distributed.tensor",
    "scipy.optimize",
    "sympy",
    "onnx",
    "matplotlib",
    "compressed_tensors",
    "pennyweight.containers.onnx",
    "pennyweight.models.network",
}


def _run(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [*MAIN, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, check=False, timeout=200)


@pytest.mark.parametrize(
    "command",
    [(), ("quantize",), ("evaluate",), ("verify",), ("inspect",), ("run",), ("bench",), ("convert",), ("demo",)],
)
def test_help_imports_nothing_heavy(command: tuple[str, ...]) -> None:
    code = f"""
import sys
from pennyweight.cli.main import app
try:
    app([*{command!r}, "--help"])
except SystemExit as end:
    assert end.code == 0
print("\\nMODULES", *sys.modules)
"""
    shown = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=ENVIRONMENT, check=True
    ).stdout
    assert "Usage:" in shown
    assert not HEAVY & set(shown.split("MODULES")[1].split())


def test_help_is_quick() -> None:
    def seconds() -> float:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert _run("quantize", "--help").returncode == 0
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    assert min(seconds() for _ in range(4)) < HELP_S


@pytest.mark.slow
def test_a_second_plan_imports_nothing_heavy_that_it_has_no_use_for(model: Path, text: str) -> None:
    asked = ["plan", str(model), "--calibration", text, "--length", "24", "--samples", "8", "--json"]
    assert "costs measured" in _run(*asked, "--bpw", 12).stderr
    code = f"""
import gc, sys
from pennyweight.cli.main import app
try:
    app([*{asked!r}, "--bpw", "13"])
except SystemExit as end:
    assert end.code == 0
print("\\nMODULES", *sys.modules)
print("LIST", "__all__" in vars(sys.modules["transformers.models"]), gc.isenabled(), gc.get_freeze_count() > 100_000)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=ENVIRONMENT, check=True)
    assert "costs measured" not in done.stderr
    modules, state = done.stdout.split("MODULES")[1].split("LIST")
    assert not UNUSED_BY_A_PLAN & set(modules.split())
    assert state.split() == ["False", "True", "True"]


@pytest.mark.slow
@pytest.mark.promise
def test_standard_output_is_one_object_and_standard_error_ours_alone(model: Path, text: str, tmp_path: Path) -> None:
    done = _run("quantize", model, "--out", tmp_path / "out", "--calibration", text, "--scheme", "int4-g16",
                "--length", 24, "--json")  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["verified"] == "full"
    assert found["verification"]["largest_difference"] == 0
    assert [line.split(":")[0] for line in done.stderr.splitlines()] == ["block 1/3", "block 2/3", "block 3/3"]
    assert "\r" not in done.stderr


@pytest.mark.slow
def test_other_commands_are_as_quiet(model: Path, artefact: Path, text: str) -> None:
    for arguments in (
        ("evaluate", artefact, "--against", model, "--text", text, "--length", 24, "--json"),
        ("verify", artefact, "--json"),
        ("inspect", artefact, "--json"),
    ):
        done = _run(*arguments)
        assert (done.returncode, done.stderr) == (0, ""), arguments
        assert isinstance(json.loads(done.stdout), dict)


@pytest.mark.slow
def test_run_says_once_what_it_keeps(artefact: Path) -> None:
    arguments = ("run", artefact, "--prompt", "a bee", "--max-tokens", 3, "--json")
    first, second = _run(*arguments), _run(*arguments)
    assert (first.returncode, second.returncode, second.stderr) == (0, 0, "")
    assert all(line.startswith("packed weights are kept in ") for line in first.stderr.splitlines())
    assert json.loads(first.stdout)["text"] == json.loads(second.stdout)["text"]


@pytest.mark.slow
def test_a_terminal_gets_a_bar(model: Path, text: str, tmp_path: Path) -> None:
    master, slave = pty.openpty()
    command = [*MAIN, "quantize", str(model), "--out", str(tmp_path / "out"), "--calibration", text]
    command += ["--scheme", "int4-g16", "--length", "24", "--verify", "none"]
    subprocess.run(command, stdout=subprocess.DEVNULL, stderr=slave, env=ENVIRONMENT, check=True)
    drawn = os.read(master, 100_000).decode()
    os.close(master)
    os.close(slave)
    assert "blocks [##########....................] 1/3" in drawn


@pytest.mark.slow
@pytest.mark.promise
@pytest.mark.parametrize("end", [signal.SIGINT, signal.SIGKILL], ids=["ctrl-c", "kill -9"])
def test_a_stopped_command_goes_on_to_the_same_bytes(tmp_path: Path, end: signal.Signals) -> None:
    model = tiny.llama(tmp_path / "model", hidden_size=256, intermediate_size=512, num_hidden_layers=24)
    text = tiny.text_file(tmp_path, count=4000)
    how = ["--calibration", text, "--scheme", "int4-g32", "--length", "64", "--verify", "none", "--json"]
    command = ["quantize", str(model), "--out", str(tmp_path / "out"), *how]
    with subprocess.Popen([*MAIN, *command], stderr=subprocess.PIPE, stdout=subprocess.PIPE, env=ENVIRONMENT) as child:
        assert child.stderr is not None
        for _ in range(3):
            assert b"block" in child.stderr.readline()
        child.send_signal(end)
        rest = child.stderr.read().decode()
    assert child.returncode == (1 if end == signal.SIGINT else -9)
    if end == signal.SIGINT:
        assert "interrupted; " in rest
        assert "the same command continues there" in rest.splitlines()[-1]
        assert "Traceback" not in rest
    assert not (tmp_path / "out").exists()
    resumed, whole = _run(*command), _run("quantize", model, "--out", tmp_path / "whole", *how)
    assert json.loads(resumed.stdout)["resumed_blocks"] >= 3
    assert json.loads(whole.stdout)["resumed_blocks"] == 0
    assert tiny.digests(tmp_path / "out") == tiny.digests(tmp_path / "whole")


@pytest.mark.slow
def test_a_disk_that_is_full_ends_in_one_line(model: Path, text: str, tmp_path: Path) -> None:
    """The limit on the size of a file is the nearest to a full disk that needs no file system of its own."""
    code = f"""
import resource, runpy, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, 40_000))
sys.argv = ["pennyweight", "quantize", {str(model)!r}, "--out", {str(tmp_path / "out")!r}, "--calibration", {text!r},
            "--scheme", "int4-g16", "--length", "24"]
runpy.run_module("pennyweight.cli.main", run_name="__main__")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=ENVIRONMENT, check=False)
    assert done.returncode == 1
    assert done.stderr == f"error: {tmp_path}: no space is left for the output: make room there\n"
    assert tiny.traces(tmp_path) == []


@pytest.mark.slow
@pytest.mark.promise
def test_the_demo_shows_the_whole_journey() -> None:
    if not (ROOT / "src/pennyweight/demo_model/model.safetensors").exists():
        pytest.skip("the shipped model is not in this checkout")
    done = _run("demo", "--json")
    assert done.returncode == 0, done.stderr
    rows = {(row["scheme"], row["how"]): row for row in json.loads(done.stdout)["rows"]}
    assert all(row["verified"] == "full" for row in rows.values())
    assert (
        rows["int4-g128", "normal"]["kl_mean"]
        < rows["int4-g128", "fast"]["kl_mean"]
        < rows["int4-g128", "nearest"]["kl_mean"]
    )
    assert rows["int8-g128", "fast"]["kl_mean"] < 1e-3
