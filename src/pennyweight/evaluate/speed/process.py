"""The other side of `worker`: a process that one model has for itself."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any

from pennyweight.core import errors
from pennyweight.core.errors import ModelError, PennyweightError, killed_by
from pennyweight.evaluate.speed.base import Asked, Kind

_PACKAGE = str(Path(__file__).parents[3])
_SECONDS_TO_END = 10


class Process:
    """A worker, from its start to the end of a `with`. `ready` is its first answer; `cpu_s` the seconds of processor
    time that it had used at its last one.

    What it raises is raised here: the same class of ours, else ModelError with its last words.
    """

    def __init__(self, kind: Kind, path: Path, asked: Asked) -> None:
        self._path = path
        self.cpu_s = 0.0
        self._words = tempfile.TemporaryFile()  # noqa: SIM115  # closed in __exit__
        # However this process found the package, that one must find the same.
        paths = os.pathsep.join([_PACKAGE, *filter(None, [os.environ.get("PYTHONPATH")])])
        command = [
            sys.executable,
            "-m",
            "pennyweight.evaluate.speed.worker",
            kind,
            str(path),
            json.dumps(asdict(asked)),
        ]
        self._child = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._words, text=True,
            env=os.environ | {"PYTHONPATH": paths},
        )  # fmt: skip
        self.ready: dict[str, Any] = {}

    def __enter__(self) -> Process:
        try:
            self.ready = self._answer()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def ask(self, **question: Any) -> dict[str, Any]:
        """The answer to a question that `worker` knows."""
        assert self._child.stdin is not None
        try:
            print(json.dumps(question), file=self._child.stdin, flush=True)
        except BrokenPipeError:
            # It has ended; why, is what its answer says.
            pass
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._child.stdout is not None
        line = self._child.stdout.readline()
        if not line:
            raise ModelError(f"{self._path} could not be measured: {self._last_words()}")
        found: dict[str, Any] = json.loads(line)
        if "error" in found:
            name, text = found["error"]
            raised: type[PennyweightError] = getattr(errors, name)
            raise raised(text)
        self.cpu_s = found.pop("cpu_s")
        return found

    def _last_words(self) -> str:
        code = self._child.wait()
        if code < 0:
            return f"its process was {killed_by(-code)}"
        self._words.seek(0)
        said = self._words.read().decode(errors="replace").strip().splitlines()
        return said[-1] if said else "its process ended without a word"

    def close(self) -> None:
        for pipe in (self._child.stdin, self._child.stdout):
            if pipe is not None:
                try:
                    pipe.close()
                except BrokenPipeError:
                    pass
        try:
            self._child.wait(_SECONDS_TO_END)
        except subprocess.TimeoutExpired:
            self._child.kill()
            self._child.wait()
        self._words.close()
