"""A transformers model built without its weights, and where its repeated blocks are."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from pennyweight.core.errors import ModelError, first_line

# Parts of a multimodal model that are never quantized, by the names that transformers gives them.
_TOWERS = ("vision", "visual", "audio", "image", "speech", "video", "mtp", "codec")


# What a config that does not fit its model class raises, beside errors of our own.
_MISFITS = (ValueError, KeyError, OSError, TypeError, AttributeError, ImportError, RuntimeError, ZeroDivisionError)

_FILLING = {"normal_", "uniform_", "trunc_normal_"}


class _WithoutMemory(TorchFunctionMode):
    """torch.empty gives meta tensors: large parameters take no memory, computed buffers (rotary tables) are real.

    Meta tensors are not filled: torch would do it in Python, with the help of sympy.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.empty:
            kwargs["device"] = "meta"
        filled = args[0] if args else kwargs.get("tensor")
        if getattr(func, "__name__", "") in _FILLING and isinstance(filled, torch.Tensor) and filled.is_meta:
            return filled
        return func(*args, **kwargs)


def read_config(path: Path, *, trust_remote_code: bool = False) -> Any:
    """The transformers config of a model directory; raises ModelError."""
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    if not (path / "config.json").is_file():
        raise ModelError(f"{path} has no config.json: give a Hugging Face model directory (config.json, *.safetensors)")
    try:
        return AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code, local_files_only=True)
    except (*_MISFITS, StrictDataclassError) as error:
        raise ModelError(
            f"{path}/config.json cannot be used: {first_line(error)}. Known model types are those of the installed "
            "transformers; a model that brings its own code needs --trust-remote-code."
        ) from error


def build(config: Any, *, trust_remote_code: bool = False) -> nn.Module:
    """The model that `config.architectures` names (else a causal or plain model), float32, parameters on "meta"."""
    return _built(_plain(config), dtype=torch.float32, trust_remote_code=trust_remote_code)


def build_to_run(config: Any, *, dtype: torch.dtype, trust_remote_code: bool = False) -> nn.Module:
    """The same in `dtype` as its users run it, with its cache and its own way with experts."""
    return _built(_unquantized(config), dtype=dtype, trust_remote_code=trust_remote_code)


def _built(plain: Any, *, dtype: torch.dtype, trust_remote_code: bool) -> nn.Module:
    if getattr(plain, "is_encoder_decoder", False):
        raise ModelError(
            f"{plain.model_type}: models with an encoder and a decoder are not taken: quantize a decoder or an encoder"
        )
    try:
        with _WithoutMemory(), _quiet():
            model = _native(plain, dtype) or _by_auto_class(plain, dtype, trust_remote_code=trust_remote_code)
    except ModelError:
        raise
    except _MISFITS as error:
        raise ModelError(
            f"transformers cannot build a model of type {plain.model_type!r} from this config: {first_line(error)}"
        ) from error
    assert isinstance(model, nn.Module)
    _empty_parameters(model)
    return model.eval()


def _plain(config: Any) -> Any:
    """A copy without a cache, which would keep the keys and values of a block's first run, also for runs with other
    weights."""
    plain = _unquantized(config)
    for part in (plain, plain.get_text_config()):
        part.use_cache = False
    # Experts are observed where each one's linear map is called, so they must not run as one grouped product.
    plain._experts_implementation = "eager"
    return plain


def _unquantized(config: Any) -> Any:
    """A copy that does not speak of the quantization of the checkpoint, which is undone on reading."""
    plain = deepcopy(config)
    for part in (plain, plain.get_text_config()):
        if hasattr(part, "quantization_config"):
            del part.quantization_config
    return plain


def _native(config: Any, dtype: torch.dtype) -> Any:
    """The class of transformers itself that the config names; None where the model's own code must say."""
    import transformers

    cls = getattr(transformers, (config.architectures or [""])[0], None)
    if cls is None or not type(config).__module__.startswith("transformers."):
        return None
    return cls._from_config(config, dtype=dtype)


def _by_auto_class(config: Any, dtype: torch.dtype, *, trust_remote_code: bool) -> Any:
    from transformers import AutoModel, AutoModelForCausalLM

    for auto in (AutoModelForCausalLM, AutoModel):
        try:
            return auto.from_config(config, dtype=dtype, trust_remote_code=trust_remote_code)  # type: ignore[no-untyped-call]
        except ValueError as error:
            reason = first_line(error)
    raise ModelError(f"transformers cannot build a model of type {config.model_type!r}: {reason}")


def _empty_parameters(model: nn.Module) -> None:
    """Every parameter on "meta", those too that were made as ones or zeros; tied ones stay tied."""
    made: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                empty = nn.Parameter(parameter.detach().to("meta"), requires_grad=False)
                module._parameters[name] = made.setdefault(id(parameter), empty)


@contextmanager
def _quiet() -> Iterator[None]:
    from transformers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        logging.set_verbosity(level)


def find_blocks(model: nn.Module) -> list[str]:
    """Names of the repeated blocks of the language part, in order: the ModuleList with the most weights outside
    vision and audio towers. Raises ModelError."""
    sizes: dict[str, int] = {}
    for name, module in model.named_modules():
        nested = any(name.startswith(outer + ".") for outer in sizes)
        tower = any(word in part for part in name.lower().split(".") for word in _TOWERS)
        if isinstance(module, nn.ModuleList) and len(module) and not nested and not tower:
            sizes[name] = sum(parameter.numel() for parameter in module.parameters())
    if not sizes or max(sizes.values()) == 0:
        raise ModelError(
            f"{type(model).__name__}: no repeated blocks were found (no ModuleList with weights outside vision and "
            "audio towers), so it cannot be streamed block by block"
        )
    widest = max(sizes, key=lambda name: sizes[name])
    blocks = model.get_submodule(widest)
    assert isinstance(blocks, nn.ModuleList)
    config: Any = model.config
    layers = getattr(config.get_text_config(), "num_hidden_layers", None)
    if isinstance(layers, int) and len(blocks) < layers:
        raise ModelError(
            f"{type(model).__name__}: {layers} layers are made of {len(blocks)} blocks ({widest}): a model that uses a "
            "block more than once cannot be streamed block by block"
        )
    return [f"{widest}.{index}" for index in range(len(blocks))]


def call_arguments(model: nn.Module, input_ids: torch.Tensor) -> dict[str, Any]:
    """Keyword arguments of one forward pass over token ids [batch, tokens] without padding and without a cache."""
    accepted = inspect.signature(model.forward).parameters
    arguments: dict[str, Any] = {"input_ids": input_ids}
    if "use_cache" in accepted:
        arguments["use_cache"] = False
    return arguments
