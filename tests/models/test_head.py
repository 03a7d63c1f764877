"""The output head as a site: where it is one, why it is none elsewhere, and what it is given."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from pennyweight.models.base import Site
from pennyweight.models.residual import rotated
from pennyweight.models.streamed import StreamedModel
from tests.models.families import BLOCKS, FAMILIES, VOCABULARY, WIDTH, build, save, token_batches

# Two libraries add up products of float32 in different orders, through two blocks.
TOLERANCE = 1e-5


def saved(family: str, directory: Path, **changes: Any) -> Path:
    found = FAMILIES[family]
    return save(build(found.architecture, {**found.config, **changes}), directory)


@pytest.mark.parametrize(
    ("family", "why"),
    [
        ("llama-tied", "lm_head shares its weight with model.embed_tokens.weight"),
        ("gpt2", "lm_head shares its weight with transformer.wte.weight"),
        ("bert", "BertModel has no output head"),
    ],
)
def test_a_head_that_is_no_site_says_why(family: str, why: str, tmp_path: Path) -> None:
    model = StreamedModel(saved(family, tmp_path))
    assert model.head is None
    assert why in model.why_no_head
    assert model.sites_of(BLOCKS) == []


def test_a_head_that_only_the_config_ties_is_none(tmp_path: Path) -> None:
    """Whoever loads the result would tie it: a packed weight has no other tensor to be compared with."""
    file = saved("llama", tmp_path) / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"tie_word_embeddings": True}))
    model = StreamedModel(tmp_path)
    assert not model.tied_head
    assert model.head is None
    assert "tie_word_embeddings: false" in model.why_no_head


def test_a_head_that_a_rotation_unties_is_a_site(tmp_path: Path) -> None:
    directory = saved("llama-tied", tmp_path)
    tensors = load_file(directory / "model.safetensors")
    tensors["model.norm.weight"] = torch.linspace(0.5, 1.5, WIDTH)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    model = rotated(StreamedModel(directory))
    assert model.head == Site("lm_head", (VOCABULARY, WIDTH), BLOCKS, "head", "lm_head.weight")


@pytest.mark.parametrize("family", ["llama", "phi", "gemma2", "mixtral"])
def test_the_head_is_given_what_it_is_given_in_the_plain_model(family: str, tmp_path: Path) -> None:
    found = FAMILIES[family]
    plain: Any = build(found.architecture, {**found.config, "tie_word_embeddings": False})
    model = StreamedModel(save(plain, tmp_path))
    seen: list[Tensor] = []
    hook = plain.lm_head.register_forward_pre_hook(lambda module, args: seen.append(args[0].detach()))
    batches = token_batches()
    with torch.no_grad():
        for ids in batches:
            plain(input_ids=ids)
    hook.remove()
    stream = model.run(batches)
    model.enter_head(stream)
    for ours, theirs in zip(stream.hidden, seen, strict=True):
        assert ours.shape == theirs.shape
        assert (ours - theirs).abs().max() <= TOLERANCE * theirs.abs().max()


def test_entering_the_head_does_not_read_its_weight(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = StreamedModel(saved("llama", tmp_path))
    read: list[str] = []
    original = type(model.weights).read
    monkeypatch.setattr(type(model.weights), "read", lambda self, name: read.append(name) or original(self, name))
    model.enter_head(model.start(token_batches()))
    assert "model.norm.weight" in read
    assert "lm_head.weight" not in read
    assert "forward" not in vars(model.module.get_submodule("lm_head"))


def test_the_type_of_the_head_decides_nothing_about_calibration(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    plain: nn.Module = build("LlamaForCausalLM", FAMILIES["llama"].config).to(torch.bfloat16)
    directory = save(plain, tmp_path)
    tensors = load_file(directory / "model.safetensors")
    tensors["lm_head.weight"] = tensors["lm_head.weight"].float()
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    assert StreamedModel(directory).calibrates_in_bfloat16
