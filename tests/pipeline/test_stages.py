"""Stages of a block: which sites they hold, and that later ones see what earlier ones really give."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path

import pytest
import torch
from torch import Tensor

from pennyweight.models.streamed import StreamedModel
from pennyweight.pipeline.collect import Streams, collect
from pennyweight.pipeline.stages import stages_of
from tests.models.families import FAMILIES, build, save, token_batches

# Sums of float32 over a few hundred rows, in another order.
TOLERANCE = 1e-5
STAGES = {
    "llama": ["q_proj k_proj v_proj", "o_proj", "gate_proj up_proj", "down_proj"],
    "mixtral": ["q_proj k_proj v_proj", "o_proj", "w1 w3", "w2"],
    "gpt-neox": ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"],
    "gpt2": ["c_attn", "c_proj", "c_fc", "c_proj"],
}


def opened(name: str, directory: Path) -> StreamedModel:
    return StreamedModel(save(build(FAMILIES[name].architecture, FAMILIES[name].config), directory))


@pytest.mark.parametrize("name", STAGES)
def test_sites_with_one_input_stand_together_in_the_order_of_their_calls(name: str, tmp_path: Path) -> None:
    model = opened(name, tmp_path)
    stream = model.start(token_batches((3,)))
    with model.opened(0) as block:
        stages = stages_of(model, block, model.sites_of(0), stream)
    kinds = [" ".join(dict.fromkeys(site.name.rsplit(".", 1)[-1] for site in stage)) for stage in stages]
    assert kinds == STAGES[name]
    assert sorted(site.name for stage in stages for site in stage) == sorted(site.name for site in model.sites_of(0))


def test_a_later_stage_sees_the_changed_weights_and_the_original_model_does_not(tmp_path: Path) -> None:
    model = opened("llama", tmp_path)
    streams = Streams.of(model.start(token_batches((2, 3))), has_original=True)
    assert streams.original is not None
    with model.opened(0) as block:
        _, [o_proj], *_ = stages = stages_of(model, block, model.sites_of(0), streams.quantized)
        reference = deepcopy(block)
        for site in stages[0]:
            model.matrix(site).mul_(1.5)
        found = collect(model, block, [o_proj], streams, reference=reference, hands_on=False)[o_proj.name].stats
        before, x = (_inputs_of_o(model, each, streams) for each in (reference, block))
        outputs = model.run_block(reference, 0, streams.original)
        assert all(one is other for one, other in zip(streams.original.hidden, streams.quantized.hidden, strict=True))
        collect(model, block, stages[-1], streams, reference=reference)
    assert not torch.allclose(before, x)
    for moment, expected in ((found.hessian, x.T @ x / len(x)), (found.cross, before.T @ x / len(x))):
        assert moment is not None
        assert (moment - expected).abs().max() <= TOLERANCE * expected.abs().max()
    for handed_on, output in zip(streams.original.hidden, outputs, strict=True):
        assert torch.equal(handed_on, output)


def _inputs_of_o(model: StreamedModel, block: torch.nn.Module, streams: Streams) -> Tensor:
    seen: list[Tensor] = []
    projection = block.get_submodule("self_attn.o_proj")
    handle = projection.register_forward_pre_hook(
        lambda module, args: seen.append(args[0].detach().double().flatten(0, -2))
    )
    for batch in range(len(streams.quantized.hidden)):
        model.run_block(block, 0, streams.quantized, batches=[batch])
    handle.remove()
    return torch.cat(seen)
