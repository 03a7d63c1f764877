"""Networks by name, as a command line has them."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from inspect import signature
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from pennyweight.core.errors import DataError, ModelError, UsageError, first_line
from pennyweight.models.config_json import read_config_json
from pennyweight.models.network.arrays import ARRAY_FILES, array_batches
from pennyweight.models.text import (
    BUILT_IN,
    batches,
    check_vocabulary,
    context_length,
    documents,
    load_tokenizer,
    passages,
)

_GENERATIVE = ("ForCausalLM", "ForConditionalGeneration", "LMHeadModel")


@dataclass(frozen=True)
class TextAmount:
    """How much text becomes batches: as many texts as `samples` windows of `length` tokens would hold, drawn by `seed`;
    of longer ones pieces."""

    samples: int = 128
    length: int = 128
    seed: int = 0


@dataclass(frozen=True)
class NamedNetwork:
    """A network, and batches for calibration; or, where there are none, `example`: inputs to capture it with."""

    net: nn.Module
    batches: list[Any] | None
    example: Any = None


def named_network(
    source: str, calibration: str | None, *, text: TextAmount | None = None, trust_remote_code: bool = False
) -> NamedNetwork:
    """The network that `source` names, with the batches that `calibration` names.

    source       "FILE.py:NAME" or "package.module:NAME", NAME a torch module or a function without arguments that makes
                 one; a .pt2 file of torch.export.save; or a directory of transformers
    calibration  "FILE.py:NAME", NAME an iterable of batches or a function that gives one; a file of arrays (.npz, .npy,
                 .safetensors) as the network takes them, samples along the first axis; for networks that read text
                 also a text file, .jsonl, a directory or "built-in"; "none" or None

    Code that is named is run. Raises UsageError, ModelError, DataError.
    """
    path = Path(source)
    if path.is_dir():
        return _of_transformers(path, calibration, text=text or TextAmount(), trust_remote_code=trust_remote_code)
    net = _exported(path) if path.suffix == ".pt2" else _made(source)
    if calibration not in (None, "none"):
        return NamedNetwork(net, named_batches(str(calibration)))
    example = getattr(net, "example_input_array", None)
    if example is None:
        raise UsageError(
            f"{source} cannot be captured without inputs to run it on: give --calibration a file of arrays or "
            "FILE.py:NAME, or give the module an attribute example_input_array"
        )
    return NamedNetwork(net, None, example)


def named_batches(calibration: str) -> list[Any]:
    """Batches of "FILE.py:NAME" or of a file of arrays; see named_network. Raises UsageError, DataError."""
    if Path(calibration).suffix in ARRAY_FILES:
        return list(array_batches(Path(calibration)))
    made = _named(calibration)
    if callable(made) and not isinstance(made, Iterable):
        made = made()
    if not isinstance(made, Iterable):
        raise DataError(f"{calibration} is a {type(made).__name__}: give an iterable of batches, or a function for one")
    batches = list(made)
    if not batches:
        raise DataError(f"{calibration} yields no batch: give one or more")
    return batches


def _exported(path: Path) -> nn.Module:
    if not path.is_file():
        raise ModelError(f"{path} does not exist: give a file of torch.export.save")
    try:
        return torch.export.load(path).module(check_guards=False)
    except Exception as error:
        raise ModelError(f"{path} cannot be opened ({error}): write it with torch.export.save") from error


def _made(source: str) -> nn.Module:
    made = _named(source)
    if callable(made) and not isinstance(made, nn.Module):
        made = made()
    if not isinstance(made, nn.Module):
        raise ModelError(f"{source} gives a {type(made).__name__}: name a torch module, or a function that makes one")
    return made


def _named(place: str) -> Any:
    """The object of "FILE.py:NAME" or "package.module:NAME"."""
    file, colon, name = place.rpartition(":")
    if not colon or not name.isidentifier():
        raise UsageError(
            f"{place} is neither a directory nor a file that is known here: give FILE.py:NAME, a .pt2 file or a "
            "directory of transformers for a network, FILE.py:NAME or a file of arrays for batches"
        )
    module = _module_of(file)
    if not hasattr(module, name):
        known = [n for n in vars(module) if not n.startswith("_")]
        raise UsageError(f"{file} has no {name}; it has {', '.join(known)}")
    return getattr(module, name)


def _module_of(file: str) -> ModuleType:
    path = Path(file)
    if path.suffix == ".py":
        return _run_file(path)
    with _importable(Path()):
        try:
            return importlib.import_module(file)
        except ImportError as error:
            raise UsageError(
                f"{file} cannot be imported ({error}): give FILE.py:NAME or an installed module"
            ) from error


def _run_file(path: Path) -> ModuleType:
    """The module of a file, run once."""
    if not path.is_file():
        raise UsageError(f"{path} does not exist: give FILE.py:NAME")
    known = sys.modules.get(path.stem)
    if known is not None and Path(getattr(known, "__file__", None) or "").resolve() == path.resolve():
        return known
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with _importable(path.parent):
        # Classes find their module by its name while it is being run.
        sys.modules[path.stem] = module
        try:
            spec.loader.exec_module(module)
        except BaseException:
            del sys.modules[path.stem]
            raise
    return module


@contextmanager
def _importable(directory: Path) -> Iterator[None]:
    """What lies in `directory` can be imported."""
    place = str(directory.resolve())
    sys.path.insert(0, place)
    try:
        yield
    finally:
        sys.path.remove(place)


def _of_transformers(path: Path, calibration: str | None, *, text: TextAmount, trust_remote_code: bool) -> NamedNetwork:
    """A model directory of transformers, of the class that its config names."""
    net = _transformers_model(path, trust_remote_code=trust_remote_code)
    if net.main_input_name == "input_ids":
        return _of_text(net, path, calibration, text=text, trust_remote_code=trust_remote_code)
    if calibration not in (None, "none"):
        return NamedNetwork(net, named_batches(str(calibration)))
    example = dict(net.dummy_inputs)
    if net.main_input_name not in example:
        raise UsageError(f"{path} takes {net.main_input_name}: give --calibration a file of arrays of that name")
    return NamedNetwork(net, None, example)


def _transformers_model(path: Path, *, trust_remote_code: bool) -> Any:
    import transformers

    names = [str(name) for name in read_config_json(path).get("architectures") or []]
    if names and names[0].endswith(_GENERATIVE):
        raise UsageError(
            f"{path} is a {names[0]}, which writes text: ONNX files are for networks that answer in one pass; use "
            "--for llama.cpp, transformers or vllm"
        )
    kind = None if trust_remote_code or not names else getattr(transformers, names[0], None)
    try:
        loaded = (kind or transformers.AutoModel).from_pretrained(
            path, dtype=torch.float32, local_files_only=True, trust_remote_code=trust_remote_code
        )
    except (ValueError, OSError, KeyError, TypeError, ImportError, RuntimeError) as error:
        raise ModelError(f"{path} cannot be loaded by transformers: {first_line(error)}") from error
    return loaded.eval()


def _of_text(
    net: Any, path: Path, calibration: str | None, *, text: TextAmount, trust_remote_code: bool
) -> NamedNetwork:
    """Each text by itself, as a network that answers in one pass is asked about it."""
    if calibration is not None and _names_batches(calibration):
        return NamedNetwork(net, named_batches(calibration))
    source = None if calibration == "none" else calibration or BUILT_IN
    tokenizer = load_tokenizer(path, trust_remote_code=trust_remote_code)
    length = min(text.length, context_length(net.config, net) or text.length)
    windows = passages(
        documents(source or BUILT_IN, tokenizer, paragraphs=True), tokenizer, length=length,
        most=text.samples * length, least=length, seed=text.seed,
    )  # fmt: skip
    check_vocabulary(windows, net.config, [str(path)])
    # A tokenizer may give more than the network has arguments for.
    names = set(tokenizer.model_input_names) & set(signature(net.forward).parameters)
    made = [_tokens(batch, names) for batch in _mixed(batches(windows), text.seed)]
    return NamedNetwork(net, made) if source else NamedNetwork(net, None, made[0])


def _names_batches(calibration: str) -> bool:
    """Whether that is batches, and not text; raises UsageError for a program without a name in it."""
    path, (_, colon, name) = Path(calibration), calibration.rpartition(":")
    if path.suffix == ".py":
        raise UsageError(f"{calibration} is a program: name what gives the batches in it, {calibration}:NAME")
    return path.suffix in ARRAY_FILES or (bool(colon) and name.isidentifier() and not path.exists())


def _mixed(found: Sequence[Tensor], seed: int) -> list[Tensor]:
    """Batches of all lengths in random order, since of many the first are read; first of all one by which a capture can
    tell texts from tokens."""
    order = torch.randperm(len(found), generator=torch.Generator().manual_seed(seed)).tolist()
    mixed = [found[place] for place in order]
    first = next((place for place, batch in enumerate(mixed) if 1 < len(batch) != batch.shape[1]), 0)
    return [mixed.pop(first), *mixed]


def _tokens(ids: Tensor, names: set[str]) -> dict[str, Tensor]:
    made = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "token_type_ids": torch.zeros_like(ids)}
    return {name: tensor for name, tensor in made.items() if name in names}
