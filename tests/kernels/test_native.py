"""The native library and its loader."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator

import pytest

import pennyweight
from pennyweight.core.errors import MissingExtraError, UsageError
from pennyweight.kernels.native import VARIABLE, forget, native

KNOWN_SETS = {
    "avx512bf16",
    "avxvnni",
    "avx2",
    "fma",
    "avx512f",
    "avx512bw",
    "avx512vl",
    "avx512vnni",
    "neon",
    "asimddp",
    "amx_int8",
}
# Older compilers do not know these, and build no kernels for them.
NEWEST_SETS = {"avxvnni", "avx512vnni", "avx512bf16", "amx_int8"}


@pytest.fixture(autouse=True)
def _no_choice_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)


@pytest.fixture
def library():
    built = native()
    if built is None:
        pytest.skip("the native library was not built")
    return built


@pytest.fixture
def not_built(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    # None in sys.modules makes the import fail, as it does where the library is not there.
    monkeypatch.setitem(sys.modules, "pennyweight._native", None)
    forget()
    yield
    forget()


def test_the_library_has_the_version_of_the_package(library) -> None:
    assert library.version() == pennyweight.__version__


def test_instruction_sets_are_known_names_without_repetition(library) -> None:
    found = library.instruction_sets()
    assert set(found) <= KNOWN_SETS
    assert len(found) == len(set(found))


def test_instruction_sets_agree_with_the_kernel(library) -> None:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as stream:
            flags = next((line for line in stream if line.startswith("flags")), "").split()
    except OSError:
        pytest.skip("this system has no /proc/cpuinfo")
    if not flags:
        pytest.skip("this processor's flags have other names in /proc/cpuinfo")
    names = {"avxvnni": "avx_vnni", "avx512vnni": "avx512_vnni", "avx512bf16": "avx512_bf16"}
    x86 = KNOWN_SETS - {"neon", "asimddp"}
    there = {name for name in x86 if names.get(name, name) in flags}
    assert there - NEWEST_SETS <= set(library.instruction_sets()) <= there


def test_torch_forces_the_plain_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "torch")
    assert native() is None


def test_an_empty_choice_is_no_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    unset = native()
    monkeypatch.setenv(VARIABLE, "")
    assert native() is unset


def test_an_unknown_choice_is_refused_with_the_allowed_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "avx9")
    with pytest.raises(UsageError, match=r"avx9.*auto, native, amx, .*, scalar, torch"):
        native()


@pytest.mark.usefixtures("not_built")
def test_without_the_library_auto_falls_back() -> None:
    assert native() is None


@pytest.mark.usefixtures("not_built")
def test_without_the_library_native_is_an_error_that_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "native")
    with pytest.raises(MissingExtraError, match=r"C\+\+17 compiler"):
        native()


def test_where_the_library_is_required_it_loads(monkeypatch: pytest.MonkeyPatch, library) -> None:
    monkeypatch.setenv(VARIABLE, "native")
    assert native() is importlib.import_module("pennyweight._native") is library
