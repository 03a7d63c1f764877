"""The fresh process of `verify`: prints one JSON object as the last line of standard output."""

from __future__ import annotations

import gc
import importlib
import json
import math
import sys
import time
import warnings
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pennyweight.core.memory import available_memory_bytes, peak_memory_bytes
from pennyweight.evaluate.runtime_decoder import RuntimeDecoder
from pennyweight.models.streamed import StreamedModel
from pennyweight.models.text import context_length

_WINDOWS, _TOKENS = 2, 48


def main(arguments: list[str]) -> None:
    started = time.perf_counter()
    warnings.simplefilter("ignore")
    path, extent = Path(arguments[0]), arguments[1]
    trust_remote_code = "--trust-remote-code" in arguments
    ours = StreamedModel(path, trust_remote_code=trust_remote_code)
    needed = sum(math.prod(info.shape) * info.dtype.itemsize for info in ours.checkpoint.tensors.values())
    # The runtime holds the packed and the decoded model at once, and the first forward pass adds its own.
    fits = 2.5 * needed < available_memory_bytes()
    if extent == "full" and fits:
        found = _whole(path, ours, trust_remote_code=trust_remote_code)
    else:
        found = _by_weight(ours, fits=fits)
    found |= {"seconds": round(time.perf_counter() - started, 3), "peak_memory_bytes": peak_memory_bytes()}
    print(json.dumps(found))


@dataclass(frozen=True)
class _Seen:
    """What the runtime made of the artefact: its complaints, its logits, the types of its parameters."""

    problems: list[str]
    logits: Tensor
    kinds: dict[str, torch.dtype]
    attention: str


def _whole(path: Path, ours: StreamedModel, *, trust_remote_code: bool) -> dict[str, Any]:
    """Load in the runtime and compare logits."""
    tokens = min(_TOKENS, context_length(ours.config) or _TOKENS)
    ids = torch.randint(0, _vocabulary(ours), (_WINDOWS, tokens), generator=torch.Generator().manual_seed(0))
    seen = _run_runtime(path, ours, ids, trust_remote_code=trust_remote_code)
    problems, theirs = seen.problems, seen.logits
    if problems:
        return {"verified": "failed", "problems": problems}
    logits = _run_decoded(ours, ids, seen.kinds, seen.attention)
    difference = float((theirs.double() - logits.double()).abs().max())
    allowed = 0.0 if theirs.dtype == torch.float32 else _unit_in_last_place(theirs)
    if not difference <= allowed:
        problems.append(
            f"its logits differ from those of our decoded weights by {difference:.3g} (allowed {allowed:.3g}): "
            "the runtime computes with other weights"
        )
    return {
        "verified": "full",
        "runtime": f"transformers {_version('transformers')}, compressed-tensors {_version('compressed-tensors')}",
        "dtype": str(theirs.dtype).removeprefix("torch."),
        "largest_difference": difference,
        "allowed_difference": allowed,
        "problems": problems,
    }


def _run_runtime(path: Path, ours: StreamedModel, ids: Tensor, *, trust_remote_code: bool) -> _Seen:
    transformers: Any = importlib.import_module("transformers")
    transformers.utils.logging.set_verbosity_error()
    auto = transformers.AutoModelForCausalLM if ours.is_decoder else transformers.AutoModel
    brings_code = hasattr(ours.config, "auto_map")
    named = None if brings_code else getattr(transformers, (ours.config.architectures or [""])[0], None)
    model, info = (named or auto).from_pretrained(
        path,
        dtype="auto",
        output_loading_info=True,
        experts_implementation="eager",
        local_files_only=True,
        trust_remote_code=trust_remote_code,
    )
    # What the original's model has no place for either is no fault of the artefact.
    info["unexpected_keys"] = set(info["unexpected_keys"]) - set(ours.weights.unused)
    problems = [f"{kind.replace('_', ' ')}: {sorted(map(str, info[kind]))[:5]}" for kind in _KEYS if info[kind]]
    if problems:
        return _Seen(problems, torch.empty(0), {}, "")
    logits = _forward(model, ids, is_decoder=ours.is_decoder)
    kinds = {name: parameter.dtype for name, parameter in model.named_parameters()}
    return _Seen([], logits, kinds, model.config._attn_implementation)


_KEYS = ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs")


def _run_decoded(ours: StreamedModel, ids: Tensor, kinds: dict[str, torch.dtype], attention: str) -> Tensor:
    """The same model with our decoded weights, in the types that the runtime uses."""
    gc.collect()
    model = ours.module
    model.config._attn_implementation = attention  # type: ignore[union-attr]
    [(common, _)] = Counter(kinds.values()).most_common(1)
    loaded: dict[int, nn.Parameter] = {}
    for name, parameter in list(model.named_parameters(remove_duplicate=False)):
        if id(parameter) not in loaded:
            kind = kinds.get(name, common)
            loaded[id(parameter)] = nn.Parameter(ours.weights.read(name).to(kind), requires_grad=False)
        owner, _, last = name.rpartition(".")
        model.get_submodule(owner)._parameters[last] = loaded[id(parameter)]
    for name, buffer in model.named_buffers():
        if name in ours.weights.sources:
            buffer.copy_(ours.weights.read(name))
    return _forward(model, ids, is_decoder=ours.is_decoder)


def _forward(model: nn.Module, ids: Tensor, *, is_decoder: bool) -> Tensor:
    with torch.no_grad():
        out = model.eval()(input_ids=ids)
    result = out.logits if is_decoder else out.last_hidden_state
    assert isinstance(result, Tensor)
    return result


def _unit_in_last_place(values: Tensor) -> float:
    largest = float(values.double().abs().max())
    return torch.finfo(values.dtype).eps * 2.0 ** math.floor(math.log2(largest)) if largest else 0.0


def _by_weight(ours: StreamedModel, *, fits: bool) -> dict[str, Any]:
    """Every quantized weight through the runtime's own decoder, one at a time."""
    problems: list[str] = []
    runtime = RuntimeDecoder(ours)
    for name in runtime.names:
        if not runtime.has_scheme(name):
            problems.append(f"{name}: it is packed, but the runtime finds no scheme for it in config.json")
        elif not torch.equal(runtime.read(name).float(), ours.checkpoint.read(f"{name}.weight").float()):
            problems.append(f"{name}: the runtime's decoder gives other weights than ours")
    reason = "asked for" if fits else "the decoded model does not fit in memory"
    if not runtime.names:
        problems.append("it holds no quantized weight that the runtime would decode")
    return {"verified": "partial", "reason": reason, "weights_compared": len(runtime.names), "problems": problems[:5]}


def _vocabulary(ours: StreamedModel) -> int:
    return int(ours.config.get_text_config().vocab_size)


def _version(name: str) -> str:
    from pennyweight.core.version import versions

    return versions()[name]


if __name__ == "__main__":
    main(sys.argv[1:])
