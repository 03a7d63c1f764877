"""Call everything that the native library offers; `make sanitize` runs this on an instrumented build.

python tests/native_exercise.py DIR    DIR: where the package is installed; imports nothing but the library
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path


def main(directory: Path) -> None:
    [library] = (directory / "pennyweight").glob("_native*.so")
    spec = importlib.util.spec_from_file_location("_native", library)
    assert spec is not None
    assert spec.loader is not None
    native = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(native)
    print(f"{library.name} {native.version()}:", *native.instruction_sets())


if __name__ == "__main__":
    main(Path(sys.argv[1]))
