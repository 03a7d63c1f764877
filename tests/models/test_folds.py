"""Folds of streamed models, and which of their parameters can be written again."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from pennyweight.models.folds import FoldFinder, can_be_written, kept_types
from pennyweight.models.streamed import StreamedModel
from pennyweight.transforms.rescale import rescale_
from tests.models.families import FAMILIES, build, save

# float32, and a norm that is stored in bfloat16.
ROUNDING = 1e-5


def streamed(family: str, directory: Path, dtype: torch.dtype = torch.bfloat16) -> StreamedModel:
    known = FAMILIES[family]
    return StreamedModel(save(build(known.architecture, known.config).to(dtype), directory))


@pytest.mark.parametrize("family", ["llama", "gemma", "granite-moe", "llava", "qwen2-vl", "gpt2"])
def test_rescaled_folds_of_a_bfloat16_model_keep_the_function_and_can_be_stored(family: str, tmp_path: Path) -> None:
    model = streamed(family, tmp_path)
    finder = FoldFinder(model)
    quantized = [site.name for site in model.sites_of(1)]
    with model.opened(1) as block:
        expected = finder.run(block, 1, finder.hidden)
        stored = kept_types(model, 1, quantized)
        folds = finder.find(block, 1)
        assert len(folds) >= 3
        for fold in folds:
            assert can_be_written(model, 1, fold, quantized)
            rescale_(block, fold, torch.exp2(2 * torch.rand(fold.size) - 1), stored=stored)
        for name, dtype in stored.items():
            parameter = block.get_parameter(name)
            assert torch.equal(parameter, parameter.to(dtype).float())
        found = finder.run(block, 1, finder.hidden)
    assert (found - expected).abs().max() <= ROUNDING * expected.abs().max()


def test_blocks_of_one_kind_are_looked_at_once(tmp_path: Path) -> None:
    model = streamed("deepseek-v3", tmp_path)
    finder = FoldFinder(model)
    found = []
    for index in (0, 1, 1):
        with model.opened(index) as block:
            found.append(finder.find(block, index))
    assert found[1] is found[2]
    assert found[0] is not found[1]


def test_what_holds_no_quantized_site_is_kept_in_its_type(tmp_path: Path) -> None:
    model = streamed("mixtral", tmp_path, torch.float16)
    every = [site.name for site in model.sites_of(0)]
    assert kept_types(model, 0, every) == dict.fromkeys(
        ("input_layernorm.weight", "post_attention_layernorm.weight", "mlp.gate.weight"), torch.float16
    )
    some = [name for name in every if "v_proj" not in name]
    assert "self_attn.v_proj.weight" in kept_types(model, 0, some)


def test_a_kept_parameter_that_is_merged_while_loading_cannot_be_written(tmp_path: Path) -> None:
    model = streamed("mixtral", tmp_path)
    every = [site.name for site in model.sites_of(0)]
    finder = FoldFinder(model)
    with model.opened(0) as block:
        folds = {fold.producer[0].parameter: fold for fold in finder.find(block, 0)}
    norm = folds["post_attention_layernorm.weight"]
    assert can_be_written(model, 0, norm, every)
    attention = [name for name in every if "self_attn" in name]
    assert not can_be_written(model, 0, norm, attention)
    assert can_be_written(model, 0, folds["input_layernorm.weight"], attention)


def test_a_module_that_is_run_in_a_blocks_place_sees_its_input(tmp_path: Path) -> None:
    model = streamed("llama", tmp_path)
    finder = FoldFinder(model)

    class Doubled(nn.Module):
        def forward(self, hidden: torch.Tensor, **_: object) -> torch.Tensor:
            return 2 * hidden

    assert torch.equal(finder.run(Doubled(), 0, finder.hidden), 2 * finder.hidden)
