"""The loop of our own says what transformers says, or says why it does not run a model."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import pennyweight as pw
from pennyweight.inference.decoder import Decoder, decoder_parts
from pennyweight.kernels.native import VARIABLE, native
from tests.containers import artefacts
from tests.containers.artefacts import write
from tests.inference.loaded import TOLERANCE
from tests.models.families import FAMILIES, build

pytestmark = pytest.mark.skipif(native() is None, reason="the native library was not built")

_WIDE = dict(FAMILIES["llama"].config) | {"head_dim": 16, "num_attention_heads": 4, "num_key_value_heads": 2}
_SITES = r"layers\.\d+\.(self_attn|mlp)\.\w+_proj$"
# Architecture, and what its config says beside the common part.
RUN: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", {}),
    "llama-tied": ("LlamaForCausalLM", {"tie_word_embeddings": True}),
    "llama-biased": ("LlamaForCausalLM", {"attention_bias": True, "mlp_bias": True}),
    "llama-one-key-head": ("LlamaForCausalLM", {"num_key_value_heads": 1, "head_dim": 48}),
    "llama-scaled": ("LlamaForCausalLM", dict(FAMILIES["llama-rope-scaled"].config) | _WIDE),
    "qwen2": ("Qwen2ForCausalLM", {}),
    "qwen3": ("Qwen3ForCausalLM", {}),
    "mistral": ("MistralForCausalLM", {"sliding_window": 5}),
    "gelu": ("LlamaForCausalLM", {"hidden_act": "gelu_pytorch_tanh"}),
}
# Why it is not run.
NOT_RUN: dict[str, tuple[str, dict[str, Any], str]] = {
    "gemma2": ("Gemma2ForCausalLM", {}, "softcap"),
    "phi3": ("Phi3ForCausalLM", {}, "has no .*q_proj"),
    "olmo2": ("Olmo2ForCausalLM", {}, "has no input_layernorm"),
    "granite": ("GraniteForCausalLM", {"residual_multiplier": 0.3}, "of their spread away"),
    "dynamic": (
        "LlamaForCausalLM",
        {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
        "'dynamic'",
    ),
    "narrow": ("LlamaForCausalLM", {"head_dim": 8}, "heads of 8"),
    "relu": ("LlamaForCausalLM", {"hidden_act": "relu"}, "activation"),
}


def loaded(architecture: str, config: dict[str, Any], directory: Path, **options: Any) -> Any:
    built: Any = build(architecture, _WIDE | config)
    auto = getattr(transformers, architecture)
    src = artefacts.source(built, directory / "model", sites=_SITES, auto=auto)
    artefact = write(src, src.plan("int8-channel"), directory / "out")
    return pw.load(artefact.directory, **{"activations": "exact", "cache": False} | options)


def _reference(model: Any, ids: list[int]) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = model(input_ids=torch.tensor([ids])).logits[0].float()
    return logits


@pytest.mark.parametrize("name", RUN)
def test_each_logit_is_that_of_the_model(name: str, tmp_path: Path) -> None:
    architecture, config = RUN[name]
    model = loaded(architecture, config, tmp_path)
    parts = decoder_parts(model)
    assert parts.why_not is None
    ids = torch.randint(3, 100, (40,), generator=torch.Generator().manual_seed(2)).tolist()
    expected = _reference(model, ids)
    decoder = Decoder(parts, positions=len(ids))
    # The first ones together, the others one by one and in a group.
    for start, stop in [(0, 17), *((at, at + 1) for at in range(17, 30)), (30, 40)]:
        found = decoder.logits(ids[start:stop])
        assert (found - expected[stop - 1]).abs().max() < TOLERANCE * expected.abs().max()


@pytest.mark.parametrize("name", NOT_RUN)
def test_what_is_not_run_says_why(name: str, tmp_path: Path) -> None:
    architecture, config, why = NOT_RUN[name]
    parts = decoder_parts(loaded(architecture, config, tmp_path))
    assert parts.why_not is not None
    assert re.search(why, parts.why_not)


def test_a_prompt_of_several_chunks_is_one_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = loaded("LlamaForCausalLM", {}, tmp_path)
    ids = torch.randint(3, 100, (50,), generator=torch.Generator().manual_seed(2)).tolist()
    whole = Decoder(decoder_parts(model), positions=50).logits(ids)
    monkeypatch.setattr("pennyweight.inference.decoder._CHUNK", 7)
    assert (Decoder(decoder_parts(model), positions=50).logits(ids) - whole).abs().max() < 1e-5 * whole.abs().max()


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_threads_change_nothing(threads: int, tmp_path: Path) -> None:
    model = loaded("LlamaForCausalLM", {}, tmp_path, activations="int8")
    before = torch.get_num_threads()
    found = []
    for count in (1, threads):
        torch.set_num_threads(count)
        found.append(Decoder(decoder_parts(model), positions=20).logits(list(range(3, 23))))
    torch.set_num_threads(before)
    assert torch.equal(*found)


@pytest.mark.parametrize("kernels", [] if native() is None else native().kernel_tables())
def test_every_instruction_set_gives_the_same_text(
    kernels: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(VARIABLE, kernels)
    model = loaded("Qwen3ForCausalLM", {}, tmp_path, dtype=torch.bfloat16)
    parts = decoder_parts(model)
    assert parts.why_not is None
    ids = list(range(3, 33))
    expected = _reference(model.float(), ids)[-1]
    found = Decoder(parts, positions=30).logits(ids)
    # The model's own numbers are rounded to bfloat16, ours are not.
    assert (found - expected).abs().max() < 0.03 * expected.abs().max()


def test_float_maps_and_a_float_head_are_run_too(tmp_path: Path) -> None:
    built: Any = build("LlamaForCausalLM", _WIDE)
    src = artefacts.source(built, tmp_path / "model", sites=_SITES, auto=transformers.LlamaForCausalLM)
    plan = src.plan({"down_proj": None, "k_proj": None, "": "int8-channel"})
    model = pw.load(write(src, plan, tmp_path / "out").directory, activations="exact", cache=False)
    parts = decoder_parts(model)
    assert parts.why_not is None
    ids = list(range(3, 30))
    expected = _reference(model, ids)[-1]
    assert (Decoder(parts, positions=27).logits(ids) - expected).abs().max() < TOLERANCE * expected.abs().max()
