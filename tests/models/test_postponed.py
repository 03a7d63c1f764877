"""Postponed imports: stand-ins while the block lasts, the real thing from its first use on."""

from __future__ import annotations

import importlib
import pkgutil
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import pennyweight
from pennyweight.models.postponed import postponed

MODULE = "pw_postponed_example"
SOURCE = """
class Animal:
    legs = 4
def double(x):
    return 2 * x
"""
# What a run imports must not bring in what it never uses; a process of its own, as this one has imported everything.
LEAN = """
import sys
from pathlib import Path
from pennyweight.models.streamed import StreamedModel
StreamedModel(Path(sys.argv[1]))
unused = {"torch._dynamo", "torch.distributed.tensor", "torch.distributed._functional_collectives", "scipy.optimize"}
print(sorted({*unused, "sympy"} & set(sys.modules)), "__all__" in vars(sys.modules["transformers.models"]))
import torch.distributed.tensor
from transformers.distributed.tensor_parallel import ALL_PARALLEL_STYLES
print(issubclass(torch.distributed.tensor.DTensor, torch.Tensor), "colwise" in ALL_PARALLEL_STYLES)
from transformers.models import gpt2
print(gpt2.GPT2Config.model_type, sys.modules["transformers.models"].llama.LlamaConfig.model_type)
"""


@pytest.fixture(autouse=True)
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / f"{MODULE}.py").write_text(SOURCE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, MODULE, raising=False)


def test_a_use_imports_and_gives_the_real_thing() -> None:
    with postponed([MODULE]):
        from pw_postponed_example import Animal, double  # type: ignore[import-not-found]
    assert MODULE not in sys.modules
    assert not isinstance(1, Animal)
    assert MODULE not in sys.modules
    assert double(4) == 8
    assert MODULE in sys.modules
    assert Animal.legs == 4
    assert isinstance(Animal(), Animal)
    assert isinstance(sys.modules[MODULE].Animal(), Animal)
    assert not isinstance(1, Animal)
    assert issubclass(sys.modules[MODULE].Animal, Animal)


def test_a_use_inside_ends_the_postponement() -> None:
    with postponed([MODULE]):
        from pw_postponed_example import Animal

        class Dog(Animal):  # type: ignore[misc]
            pass

        import pw_postponed_example

        assert Dog.__mro__[1] is pw_postponed_example.Animal
    assert issubclass(Dog, Animal)


def test_annotations_need_no_import() -> None:
    with postponed([MODULE]):
        from pw_postponed_example import Animal

        def pat(animal: Animal | None, other: None | Animal = None) -> None: ...  # noqa: RUF036

    assert MODULE not in sys.modules


def test_what_was_imported_before_stays() -> None:
    import pw_postponed_example

    with postponed([MODULE]):
        from pw_postponed_example import Animal
    assert Animal is pw_postponed_example.Animal


def test_decorators_of_the_compiler_wait_for_something_compiled() -> None:
    code = """
import sys, torch
from pennyweight.models.postponed import postponed
with postponed():
    @torch.compiler.disable
    def double(x):
        "Twice."
        return 2 * x
print(double(4), double.__doc__, "torch._dynamo" in sys.modules)
import torch._dynamo
print(torch._dynamo.disable(lambda x: 3 * x)(4))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["8", "Twice.", "False", "12"]


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A package with a module `apple`, whose own code gives it `names`."""
    name = "pw_postponed_list"
    (tmp_path / name).mkdir()
    (tmp_path / name / "__init__.py").write_text("__all__ = names = ['apple', 'pear']\n")
    (tmp_path / name / "apple.py").write_text("colour = 'red'\n")
    for module in (name, f"{name}.apple"):
        monkeypatch.delitem(sys.modules, module, raising=False)
    return name


def test_a_list_runs_when_it_is_asked(package: str) -> None:
    with postponed([], lists=[package]):
        apple = importlib.import_module(f"{package}.apple")
    listed = sys.modules[package]
    assert apple.colour == "red"
    assert listed.apple is apple
    assert "names" not in vars(listed)
    assert not hasattr(listed, "__wrapped__")
    assert sys.modules[package] is listed
    assert listed.names == ["apple", "pear"]
    assert sys.modules[package] is listed
    assert vars(listed)["names"] is listed.names is listed.__all__
    assert "names" in dir(listed)
    assert listed.apple is sys.modules[f"{package}.apple"] is apple
    with pytest.raises(AttributeError, match="no attribute 'plum'"):
        _ = listed.plum
    assert pkgutil.get_data(package, "__init__.py") is not None


def test_a_list_that_puts_another_in_its_place_keeps_its_modules(package: str, tmp_path: Path) -> None:
    (tmp_path / package / "__init__.py").write_text(
        "import sys, types\nother = types.ModuleType(__name__)\nother.names = ['pear']\nsys.modules[__name__] = other\n"
    )
    with postponed([], lists=[package]):
        apple = importlib.import_module(f"{package}.apple")
    listed = sys.modules[package]
    assert listed.names == ["pear"]
    assert sys.modules[package] is not listed
    assert sys.modules[package].apple is listed.apple is apple


def test_threads_may_ask_a_list_while_others_import_from_it(package: str, tmp_path: Path) -> None:
    for number in range(40):
        (tmp_path / package / f"plum{number}.py").write_text("")
    with postponed([], lists=[package]):
        listed = importlib.import_module(package)
    together = threading.Barrier(8)

    def ask(number: int) -> list[str]:
        together.wait()
        for plum in range(number, 40, 8):
            importlib.import_module(f"{package}.plum{plum}")
        return listed.names

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(ask, range(8))) == [["apple", "pear"]] * 8


def test_a_list_that_is_asked_inside_runs_there(package: str) -> None:
    with postponed([], lists=[package]):
        listed = importlib.import_module(package)
        assert listed.names == ["apple", "pear"]
        assert vars(sys.modules[package])["names"] is listed.names


def test_a_list_that_has_run_stays(package: str) -> None:
    before = importlib.import_module(package)
    with postponed([], lists=[package]):
        assert importlib.import_module(package) is before
    assert "names" in vars(before)


def test_opening_a_model_imports_nothing_that_is_not_used() -> None:
    model = Path(str(pennyweight.__file__)).parent / "demo_model"
    done = subprocess.run([sys.executable, "-c", LEAN, model], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["[] False", "True True", "gpt2 llama"]
