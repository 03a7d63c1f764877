"""Rotation of the residual stream and of heads: the same model, exactly; and what cannot be rotated."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from pennyweight.core.errors import ModelError
from pennyweight.core.parallel import one_thread_per_operation
from pennyweight.models.residual import rotated
from pennyweight.models.rotated import RotatedCheckpoint
from pennyweight.models.streamed import StreamedModel
from tests.models.families import FAMILIES, build, save, token_batches
from tests.transforms.blocks import InDouble

# float64 throughout: what a few thousand additions in another order leave.
EXACT = 1e-9
# Routers that compute in float32 whatever the model's type.
FLOAT32 = {"deepseek-v3": 1e-7}
CAN = [
    "llama", "llama-tied", "mistral", "qwen2", "qwen3", "gemma", "phi3", "phi", "gpt2", "opt", "gpt-neox", "mixtral",
    "qwen2-moe", "gpt-oss", "llama4", "granite-moe", "deepseek-v3",
]  # fmt: skip
CANNOT = {
    "gemma2": "a normalization of what is added",
    "gemma3": "a normalization of what is added",
    "bert": "no normalization of the residual stream is read by linear maps alone",
    "llava": "multi_modal_projector.* is not known",
    "qwen2-vl": "one last normalization",
}


def model_of(family: str) -> nn.Module:
    known = FAMILIES[family]
    return build(known.architecture, known.config).double()


def written(checkpoint: RotatedCheckpoint, directory: Path) -> Path:
    """The rotated tensors as a model directory of their own."""
    directory.mkdir()
    config = json.loads((checkpoint.path / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, **checkpoint.config_changes}))
    tensors = {name: checkpoint.read(name) for name in checkpoint.tensors}
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    return directory


def logits(model: Any) -> Tensor:
    with torch.no_grad(), one_thread_per_operation(), InDouble():
        found = model(input_ids=token_batches((2,), 16)[0], use_cache=False).logits
    assert isinstance(found, Tensor)
    return found


def loaded(plain: Any, directory: Path) -> Any:
    """The model in `directory` in float64, as transformers loads it, with the buffers that `plain` computes with."""
    again = type(plain).from_pretrained(directory, dtype=torch.float64)
    for name, buffer in plain.named_buffers():
        again.get_submodule(name.rpartition(".")[0])._buffers[name.rpartition(".")[2]] = buffer
    again.config._experts_implementation = plain.config._experts_implementation = "eager"
    return again


def of(model: StreamedModel) -> RotatedCheckpoint:
    assert isinstance(model.checkpoint, RotatedCheckpoint)
    return model.checkpoint


@pytest.mark.parametrize("family", CAN)
def test_a_rotated_model_is_the_same_model(family: str, tmp_path: Path) -> None:
    plain = model_of(family)
    turned = of(rotated(StreamedModel(save(plain, tmp_path / "plain")), stored=torch.float64))
    again = loaded(plain, written(turned, tmp_path / "turned"))
    expected = logits(plain)
    assert (logits(again) - expected).abs().max() <= FLOAT32.get(family, EXACT) * expected.abs().max()


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_every_matrix_of_a_block_is_rotated(family: str, tmp_path: Path) -> None:
    model = StreamedModel(save(model_of(family), tmp_path))
    turned = of(rotated(model))
    for site in model.sites:
        before, after = model.checkpoint.read(site.tensor), turned.read(site.tensor)
        assert (before - after).norm() > 0.5 * before.norm(), site.name
    # A head of 8 channels is turned as well, by one Hadamard matrix.
    [values] = {
        step.rotation.tile
        for name, steps in turned.steps.items()
        for step in steps
        if "v_proj" in name and step.axis != -1
    }
    assert values == 8


@pytest.mark.parametrize("family", CANNOT)
def test_what_cannot_be_rotated_is_said_in_a_sentence(family: str, tmp_path: Path) -> None:
    model = StreamedModel(save(model_of(family), tmp_path))
    with pytest.raises(ModelError, match=f"cannot be rotated: .*{CANNOT[family]}"):
        rotated(model)


def test_a_tied_head_stays_tied_where_the_last_norm_allows_it(tmp_path: Path) -> None:
    plain = model_of("llama-tied")
    with torch.no_grad():
        plain.model.norm.weight.fill_(1.5)  # type: ignore[union-attr,operator]
    model = rotated(StreamedModel(save(plain, tmp_path / "plain")), stored=torch.float64)
    assert model.tied_head
    assert (of(model).added, of(model).config_changes) == ({}, {})
    again = loaded(plain, written(of(model), tmp_path / "turned"))
    assert (logits(again) - logits(plain)).abs().max() <= EXACT * logits(plain).abs().max()


def test_an_untied_head_is_a_tensor_more_and_the_config_says_so(tmp_path: Path) -> None:
    model = StreamedModel(save(build("LlamaForCausalLM", FAMILIES["llama-tied"].config), tmp_path))
    turned = rotated(model)
    assert (model.tied_head, turned.tied_head) == (True, False)
    assert set(turned.checkpoint.tensors) - set(model.checkpoint.tensors) == {"lm_head.weight"}
    assert of(turned).config_changes == {"tie_word_embeddings": False}


def test_tensors_keep_their_types_and_rows_can_be_read_alone(tmp_path: Path) -> None:
    save(model_of("qwen2").to(torch.bfloat16), tmp_path)
    model = StreamedModel(tmp_path)
    turned = of(rotated(model, seed=3))
    assert dict(turned.tensors) == dict(model.checkpoint.tensors)
    for name, info in turned.tensors.items():
        whole = turned.read(name)
        assert (whole.dtype, tuple(whole.shape)) == (info.dtype, info.shape)
        assert torch.equal(turned.read(name, slice(3, 9)), whole[3:9])
    assert torch.equal(turned.read("model.norm.weight"), torch.ones(32, dtype=torch.bfloat16))


def test_the_seed_decides_and_nothing_else(tmp_path: Path) -> None:
    model = StreamedModel(save(model_of("llama"), tmp_path))
    one, same, other = (of(rotated(model, seed=seed)).read("lm_head.weight") for seed in (1, 1, 2))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


def test_outliers_of_a_channel_are_spread(tmp_path: Path) -> None:
    model = StreamedModel(save(model_of("llama"), tmp_path))
    name = "model.layers.0.mlp.gate_proj.weight"
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    tensors[name][:, 3] *= 50
    save_file(tensors, file, {"format": "pt"})
    model = StreamedModel(tmp_path)
    before, after = model.checkpoint.read(name), of(rotated(model)).read(name)

    def peak(w: Tensor) -> float:
        return float(w.abs().amax(1).mean() / w.square().mean().sqrt())

    assert peak(before) > 4
    assert peak(after) < 0.6 * peak(before)


def test_no_block_is_given_a_cache(tmp_path: Path) -> None:
    for family in ("granite-moe", "llava"):
        model = StreamedModel(save(build(FAMILIES[family].architecture, FAMILIES[family].config), tmp_path / family))
        stream = model.start(token_batches((1,), 8))
        for _, arguments in stream.arguments[0]:
            assert arguments.get("cache", arguments.get("past_key_values")) is None
