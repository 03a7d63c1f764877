"""What every benchmark writes beside its figures: the command, the versions and the machine; and its tables."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
_PACKAGES = ("torch", "transformers", "tokenizers", "safetensors", "compressed-tensors", "numpy", "scipy")


def options(name: str, description: str, models: Iterable[str]) -> argparse.ArgumentParser:
    """The command line of `python -m benchmarks.NAME`, which measures some `models`; a benchmark may add to it."""
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.{name}", description=description)
    parser.add_argument("--models", default=",".join(models), help="with commas between (default: %(default)s)")
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data", help="models and texts not ours")
    parser.add_argument("--out", type=Path, help="JSON to write, .md beside it (default: in benchmarks/results)")
    return parser


def circumstances(module: str) -> dict[str, Any]:
    """Command line, versions and machine of this run of `python -m module`; no host name, no path of this machine."""
    return {
        "command": " ".join(["python -m", module, *(_without_home(word) for word in sys.argv[1:])]),
        "commit": _commit(),
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in _PACKAGES}},
        "kernels": _kernels(),
        "machine": machine(),
    }


def machine() -> dict[str, Any]:
    """What the figures depend on: processor, its cores and instruction sets, memory, system."""
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return {
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gib": round(pages / 2**30, 1),
        "system": f"{platform.system()} {platform.machine()}",
        "load_average": round(os.getloadavg()[0], 2),
    }


def cache(name: str = "") -> Path:
    """The directory benchmarks/.cache/NAME, made if need be; git ignores it."""
    directory = ROOT / "benchmarks" / ".cache"
    (directory / name).mkdir(parents=True, exist_ok=True)
    (directory / ".gitignore").write_text("*\n", encoding="utf-8")
    return directory / name


def save(name: str, content: Mapping[str, Any], markdown: str, *, out: Path | None) -> None:
    """Write NAME.json (or `out`) and the .md beside it, and print the latter."""
    path = out or RESULTS / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2, default=_plain, ensure_ascii=False) + "\n", encoding="utf-8")
    path.with_suffix(".md").write_text(markdown, encoding="utf-8")
    print(markdown)
    note(f"written: {_without_home(str(path))} and the .md beside it")


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A markdown table; the first column is aligned left, the others right.

    >>> print(table(["a", "b"], [["x", "1"]]))
    | a | b |
    |---|--:|
    | x | 1 |
    """
    lines = [list(head), ["---", *["--:"] * (len(head) - 1)], *[list(row) for row in rows]]
    return "\n".join(
        "|" + "|".join(line) + "|" if i == 1 else f"| {' | '.join(line)} |" for i, line in enumerate(lines)
    )


def heading(title: str, facts: Mapping[str, Any]) -> str:
    """The title of a result and the circumstances in two lines."""
    where = facts["machine"]
    versions = ", ".join(f"{name} {number}" for name, number in facts["versions"].items() if number != "absent")
    return (
        f"# {title}\n\n`{facts['command']}` at {facts['commit']}\n\n{where['processor']}, {where['cores']} cores, "
        f"{where['memory_gib']} GiB, {where['system']}; kernels: {facts['kernels']}; {versions}\n"
    )


def mib(size_bytes: float) -> str:
    return f"{size_bytes / 2**20:,.0f}"


def note(message: str) -> None:
    """Progress, on standard error."""
    print(message, file=sys.stderr, flush=True)


def project_environment() -> dict[str, str]:
    """The environment of a child that imports pennyweight as this process does, and benchmarks."""
    paths = [*filter(None, [os.environ.get("PYTHONPATH")]), str(ROOT)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "HF_HUB_OFFLINE": "1"}
    # What is installed has its byte code; a child that may not keep it would compile all of it each time.
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    return environment


def _kernels() -> str:
    """Which of our kernels a process of ours uses here; asked in a child, so that this process need not load torch."""
    code = "from pennyweight.kernels.native import kernel_table; print(kernel_table() or 'torch')"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=project_environment(), capture_output=True, text=True, check=True)
    return done.stdout.strip()


def _commit() -> str:
    def git(*words: str) -> str:
        done = subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, text=True, check=False)
        return done.stdout.strip() if done.returncode == 0 else ""

    commit = git("rev-parse", "--short=12", "HEAD")
    changed = git("status", "--porcelain", "--", "src", "csrc")
    return (commit or "unknown commit") + (" with changes" if changed else "")


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "absent"


def _without_home(word: str) -> str:
    """Paths in the project as seen from its root, others by their last name alone."""
    if not os.path.isabs(word):
        return word
    return os.path.relpath(word, ROOT) if Path(word).is_relative_to(ROOT.parent) else f".../{Path(word).name}"


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    return str(value)
