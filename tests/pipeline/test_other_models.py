"""Architectures other than Llama through the whole pipeline, and containers other than compressed-tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor

from pennyweight.containers.base import Container, ModelFacts
from pennyweight.core.errors import ContainerError
from pennyweight.evaluate.compare import evaluate
from pennyweight.models.base import Site, TensorInfo
from pennyweight.pipeline.output import weight_entries
from pennyweight.plan.plan import Plan
from pennyweight.schemes import QuantizedWeight, Scheme, parse_scheme
from tests.pipeline import tiny
from tests.pipeline.tiny import OPTIONS


@dataclass(frozen=True)
class Floats(Container):
    """A container for tests: decoded weights in float32 under the original's name and in its layout."""

    name: str = "floats"
    runtimes: tuple[str, ...] = ("transformers",)

    def why_not(self, scheme: Scheme, site: Site, *, runtime: str) -> str | None:
        return None

    def why_not_plan(self, plan: Plan, sites: Sequence[Site], facts: ModelFacts, *, runtime: str) -> str | None:
        return None

    def entries(self, site: Site, scheme: Scheme) -> Mapping[str, TensorInfo]:
        return {site.tensor: TensorInfo(torch.float32, site.shape[::-1] if site.transposed else site.shape)}

    def encode(self, site: Site, weight: QuantizedWeight) -> dict[str, Tensor]:
        w = weight.dequantize(torch.float32)
        return {site.tensor: w.T.contiguous() if site.transposed else w}

    def decode(self, site: Site, scheme: Scheme, tensors: Mapping[str, Tensor]) -> QuantizedWeight:
        w = tensors[site.tensor].T if site.transposed else tensors[site.tensor]
        return QuantizedWeight(torch.empty(site.shape, dtype=torch.uint8), torch.ones(1, 1), None, _Decoded(w))  # type: ignore[arg-type]

    def config(self, plan: Plan, sites: Sequence[Site], facts: ModelFacts, *, runtime: str) -> None:
        return None

    def usage(self, *, is_decoder: bool) -> str:
        return ""


@dataclass(frozen=True)
class _Decoded:
    w: Tensor


def test_gpt2_passes_the_pipeline_and_evaluate(tmp_path: Path) -> None:
    source = tiny.gpt2(tmp_path / "model")
    report = tiny.run(source, tmp_path / "out", replace(OPTIONS, scheme="int8-g16"), container=Floats())
    assert report.sites == 8
    out = tmp_path / "out"
    before, after = load_file(source / "model.safetensors"), load_file(out / "model.safetensors")
    for name in ("transformer.h.0.attn.c_attn.weight", "transformer.h.1.mlp.c_proj.weight"):
        assert before[name].shape == after[name].shape
        error = (before[name] - after[name]).norm() / before[name].norm()
        assert 0 < error < 0.02
    found = evaluate(str(out), against=str(source), source=tiny.text_file(tmp_path), length=24)
    assert found.kl_mean is not None
    assert 0 < found.kl_mean < 0.1


@pytest.mark.parametrize("make", [tiny.mixtral, tiny.opt, tiny.neox], ids=["mixtral", "opt", "gpt-neox"])
def test_transformers_loads_other_architectures(make: Any, tmp_path: Path) -> None:
    source = make(tmp_path / "model")
    report = tiny.run(source, tmp_path / "out")
    assert report.kept == {}
    loaded, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values()), info
    with torch.no_grad():
        assert loaded(torch.arange(12)[None]).logits.isfinite().all()


def test_experts_that_saw_too_little_are_reported(tmp_path: Path) -> None:
    source = tiny.mixtral(tmp_path / "model")
    report = tiny.run(source, tmp_path / "out")
    assert report.sites == 3 * (4 + 4 * 3)
    assert report.fallbacks
    assert all("block_sparse_moe.experts" in name for name in report.fallbacks)
    assert f"({len(report.fallbacks)} layers carry notes)" in (tmp_path / "out" / "README.md").read_text()


def test_matrices_of_one_tensor_are_quantized_together_or_not_at_all() -> None:
    tensors = {"experts": TensorInfo(torch.float32, (2, 4, 8)), "norm": TensorInfo(torch.float32, (8,))}
    source: Any = SimpleNamespace(tensors=tensors)
    sites = [Site(f"experts.{i}", (4, 8), 0, "expert", "experts", index=i) for i in range(2)]
    scheme = parse_scheme("int4-channel")

    @dataclass(frozen=True)
    class Slices(Floats):
        def entries(self, site: Site, scheme: Scheme) -> Mapping[str, TensorInfo]:
            return {site.name: TensorInfo(torch.float32, site.shape)}

    both = Plan({site.name: scheme for site in sites})
    assert list(weight_entries(Slices(), both, sites, source)) == ["norm", "experts.0", "experts.1"]
    with pytest.raises(ContainerError, match="1 of the 2 matrices in it would be quantized and the others lost"):
        weight_entries(Slices(), Plan({"experts.0": scheme}), sites, source)
