"""Tiny random models, quantized by nearest rounding, written with our container and opened with transformers."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from pennyweight.containers.base import ModelFacts
from pennyweight.containers.compressed_tensors import CompressedTensors
from pennyweight.models.base import Site
from pennyweight.plan.plan import Plan
from pennyweight.schemes import QuantizedWeight, Scheme, fit_scales, parse_scheme
from pennyweight.solvers.nearest import round_to_nearest

CONTAINER = CompressedTensors()
TOKENS = torch.arange(24).reshape(2, 12)


def quantize_nearest(w: Tensor, scheme: Scheme) -> QuantizedWeight:
    """Min-max scales and the nearest code of each weight."""
    return round_to_nearest(w, scheme, fit_scales(w, scheme, fit="minmax"))


@dataclass(frozen=True)
class Source:
    """A checkpoint on disk: its tensors, its sites and what else a container must know."""

    directory: Path
    tensors: Mapping[str, Tensor]
    sites: tuple[Site, ...]
    facts: ModelFacts
    auto: Any

    def site(self, name: str) -> Site:
        return next(site for site in self.sites if site.name == name)

    def plan(self, schemes: Mapping[str, str | None] | str) -> Plan:
        """`schemes` maps regexes (the first that is found in a site's name) to a scheme's name, or None to keep."""
        rules = {"": schemes} if isinstance(schemes, str) else schemes
        chosen = {site.name: next((rules[r] for r in rules if re.search(r, site.name)), None) for site in self.sites}
        kind = getattr(torch, self.facts.dtype)
        return Plan(
            schemes={name: parse_scheme(text).with_scale_dtype(kind) for name, text in chosen.items() if text},
            kept={name: "asked for" for name, text in chosen.items() if not text},
        )


def source(model: Any, directory: Path, *, sites: str, auto: Any = transformers.AutoModelForCausalLM) -> Source:
    """Saves `model`; every matrix whose name matches the regex `sites` is a site, experts by name."""
    model.save_pretrained(directory)
    tensors = load_file(directory / "model.safetensors")
    matrices = [name.removesuffix(".weight") for name, t in tensors.items() if name.endswith(".weight") and t.ndim == 2]
    is_conv = model.config.model_type == "gpt2"
    found = []
    for name in matrices:
        if re.search(sites, name):
            shape = tuple(tensors[f"{name}.weight"].shape)
            kind = "expert" if re.search(r"\.experts\.\d+\.", name) else "conv1d" if is_conv else "linear"
            kind = "head" if name == "lm_head" else kind
            numbers = re.findall(r"\d+", name)
            block = int(numbers[0]) if numbers else model.config.num_hidden_layers
            found.append(
                Site(name, shape[::-1] if is_conv else shape, block, kind, f"{name}.weight", transposed=is_conv)
            )
    linears = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    named = {site.name for site in found if site.kind != "head"}
    facts = ModelFacts(
        model_type=model.config.model_type,
        linear_names=tuple(name for name in linears if name not in named),
        tied_head=bool(model.config.tie_word_embeddings),
        dtype=str(model.dtype).removeprefix("torch."),
    )
    return Source(directory, tensors, tuple(found), facts, auto)


@dataclass(frozen=True)
class Artefact:
    directory: Path
    decoded: Mapping[str, Tensor]


def write(src: Source, plan: Plan, out: Path, *, runtime: str = "transformers", **overrides: Any) -> Artefact:
    """The quantized directory, whatever `why_not` says; `overrides` replace keys of the quantization config."""
    tensors, decoded = dict(src.tensors), dict(src.tensors)
    for site in src.sites:
        if site.name in plan.schemes:
            w = tensors.pop(site.tensor)
            weight = quantize_nearest(w.T.contiguous() if site.transposed else w, plan.schemes[site.name])
            dense = weight.dequantize(w.dtype)
            decoded[site.tensor] = dense.T.contiguous() if site.transposed else dense
            tensors.update(CONTAINER.encode(site, weight))
    return save(src, tensors, decoded, CONTAINER.config(plan, src.sites, src.facts, runtime=runtime) | overrides, out)


def save(
    src: Source, tensors: Mapping[str, Tensor], decoded: Mapping[str, Tensor], config: Mapping[str, Any], out: Path
) -> Artefact:
    out.mkdir(parents=True)
    settings = json.loads((src.directory / "config.json").read_text())
    (out / "config.json").write_text(json.dumps(settings | {"quantization_config": dict(config)}))
    save_file(dict(tensors), out / "model.safetensors", metadata={"format": "pt"})
    return Artefact(out, decoded)


@dataclass(frozen=True)
class Outcome:
    """What transformers made of an artefact. `difference` is the largest one of the outputs, None if it failed."""

    keys_are_right: bool
    difference: float | None
    error: str

    @property
    def is_equal(self) -> bool:
        return self.keys_are_right and self.difference == 0


def outcome(src: Source, artefact: Artefact) -> Outcome:
    """Opens the artefact with transformers and compares its output with that of the decoded weights."""
    try:
        model, info = src.auto.from_pretrained(artefact.directory, output_loading_info=True)
        wrong = {key: value for key, value in info.items() if value}
        got = _output(model)
    except Exception as error:
        return Outcome(False, None, f"{type(error).__name__}: {error}")
    plain = artefact.directory.parent / f"{artefact.directory.name}-decoded"
    plain.mkdir()
    (plain / "config.json").write_bytes((src.directory / "config.json").read_bytes())
    save_file(dict(artefact.decoded), plain / "model.safetensors", metadata={"format": "pt"})
    expected = _output(src.auto.from_pretrained(plain))
    return Outcome(not wrong, (got - expected).abs().max().item(), repr(wrong))


def _output(model: Any) -> Tensor:
    with torch.no_grad():
        result = model.eval()(input_ids=TOKENS % model.config.vocab_size)
    output = result.logits if "logits" in result else result.last_hidden_state
    assert isinstance(output, Tensor)
    return output.float()


# ---- models


def seeded(build: Any, config: Any, **kwargs: Any) -> Any:
    torch.manual_seed(0)
    return build(config).to(**kwargs) if kwargs else build(copy.deepcopy(config))


LLAMA = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
             vocab_size=64, max_position_embeddings=64)  # fmt: skip
LINEARS = r"layers\.\d+\..*(proj|fc|dense|query_key_value)"


def llama(directory: Path, *, dtype: torch.dtype = torch.float32, sites: str = LINEARS, **changes: Any) -> Source:
    config = transformers.LlamaConfig(**(LLAMA | {"tie_word_embeddings": False} | changes))
    return source(seeded(transformers.LlamaForCausalLM, config, dtype=dtype), directory, sites=sites)


def opt(directory: Path) -> Source:
    config = transformers.OPTConfig(hidden_size=64, ffn_dim=96, num_hidden_layers=2, num_attention_heads=4,
                                    vocab_size=64, max_position_embeddings=64, word_embed_proj_dim=64)  # fmt: skip
    return source(seeded(transformers.OPTForCausalLM, config), directory, sites=r"layers\.\d+\.")


def neox(directory: Path) -> Source:
    config = transformers.GPTNeoXConfig(hidden_size=64, intermediate_size=96, num_hidden_layers=2,
                                        num_attention_heads=4, vocab_size=64, max_position_embeddings=64)  # fmt: skip
    return source(seeded(transformers.GPTNeoXForCausalLM, config), directory, sites=r"layers\.\d+\.(att|mlp)")


def bert(directory: Path) -> Source:
    config = transformers.BertConfig(hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
                                     vocab_size=64, max_position_embeddings=64)  # fmt: skip
    model = seeded(transformers.BertModel, config)
    return source(
        model, directory, sites=r"encoder\.layer\.\d+\..*(query|key|value|dense)", auto=transformers.AutoModel
    )


def gpt2(directory: Path) -> Source:
    config = transformers.GPT2Config(n_embd=64, n_layer=2, n_head=4, vocab_size=64, n_positions=64)
    return source(seeded(transformers.GPT2LMHeadModel, config), directory, sites=r"h\.\d+\.")


def qwen2_moe(directory: Path) -> Source:
    config = transformers.Qwen2MoeConfig(**LLAMA, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32,
                                         shared_expert_intermediate_size=32, tie_word_embeddings=False)  # fmt: skip
    return source(seeded(transformers.Qwen2MoeForCausalLM, config), directory, sites=r"layers\.\d+\..*_proj$")


def mixtral(directory: Path) -> Source:
    config = transformers.MixtralConfig(**LLAMA, num_local_experts=4, num_experts_per_tok=2, tie_word_embeddings=False)
    return source(seeded(transformers.MixtralForCausalLM, config), directory, sites=r"layers\.\d+\..*(_proj|\.w\d)$")


def granite_moe(directory: Path) -> Source:
    """Keeps all experts of a layer in one 3-D tensor of the checkpoint; only its attention is made of sites."""
    config = transformers.GraniteMoeConfig(
        **LLAMA, num_local_experts=4, num_experts_per_tok=2, tie_word_embeddings=False
    )
    return source(seeded(transformers.GraniteMoeForCausalLM, config), directory, sites=r"self_attn.*_proj$")
