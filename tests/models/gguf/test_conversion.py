"""Against what llama.cpp's own converter wrote (tests/golden/gguf), and against what a model computes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from pennyweight.core.errors import ContainerError, ShapeError
from pennyweight.models.base import TensorInfo
from pennyweight.models.checkpoint import open_checkpoint
from pennyweight.models.gguf.conversion import Conversion, conversion
from pennyweight.models.gguf.fields import FieldValue
from pennyweight.models.gguf.stored import Stored
from tests.models.gguf.tiny import DEMO, GOLDEN, MODELS, ROOT, digest, directory_name, plain, values, write_model

STORIES = ROOT / "../shared/data/models/stories260K"


def golden(name: str) -> dict[str, Any]:
    facts: dict[str, Any] = json.loads((GOLDEN / f"{name}.json").read_text())
    return facts


def converted(path: Path, **config_changes: Any) -> Conversion:
    config = json.loads((path / "config.json").read_text()) | config_changes
    return conversion(path, config, open_checkpoint(path).tensors)


def model(tmp_path: Path, name: str) -> Path:
    facts = golden(name)
    return write_model(tmp_path / directory_name(name), facts["config"], facts["tensors"])


def stored_tensors(path: Path, plan: Conversion) -> dict[str, Tensor]:
    """All tensors of the GGUF file in float32, experts stacked."""
    checkpoint = open_checkpoint(path)
    found = {name: torch.full(shape, torch.nan) for name, shape in plan.shapes.items()}
    for name, tensor in plan.extra.items():
        found[name][...] = tensor
    for name, parts in plan.places.items():
        for stored in parts:
            target = found[stored.tensor] if stored.expert is None else found[stored.tensor][stored.expert]
            target[...] = stored.apply(checkpoint.read(name)).float()
    return found


def said(field: FieldValue) -> list[Any]:
    """A field as a golden file has it."""
    kinds = [field.kind.name] if field.count is None else ["ARRAY", field.kind.name]
    return [kinds, plain(field.value)]


@pytest.mark.parametrize("name", MODELS)
def test_metadata_is_that_of_the_converter(tmp_path: Path, name: str) -> None:
    plan = converted(model(tmp_path, name))
    assert {key: said(field) for key, field in plan.fields.items()} == golden(name)["fields"]


@pytest.mark.parametrize("name", MODELS)
def test_tensors_are_those_of_the_converter_bit_by_bit(tmp_path: Path, name: str) -> None:
    path = model(tmp_path, name)
    plan = converted(path)
    found = {
        tensor: ["F32", list(value.shape), digest(value.numpy().tobytes())]
        for tensor, value in stored_tensors(path, plan).items()
    }
    assert found == golden(name)["stored"]
    assert plan.places.keys() | plan.dropped.keys() == golden(name)["tensors"].keys()


def test_float32_is_kept_for_what_llama_cpp_never_quantizes(tmp_path: Path) -> None:
    plan = converted(model(tmp_path, "mixtral"))
    kept = {stored.tensor for parts in plan.places.values() for stored in parts if stored.is_float32}
    norms = {f"blk.{layer}.{norm}.weight" for layer in (0, 1) for norm in ("attn_norm", "ffn_norm")}
    assert kept == norms | {"blk.0.ffn_gate_inp.weight", "blk.1.ffn_gate_inp.weight", "output_norm.weight"}


def test_fused_experts_are_stored_as_separate_ones_are(tmp_path: Path) -> None:
    path = model(tmp_path, "qwen3-moe")
    separate = {name: values(name, shape) for name, shape in golden("qwen3-moe")["tensors"].items()}
    prefix = "model.layers.1.mlp.experts"
    part = {
        kind: torch.stack([separate[f"{prefix}.{expert}.{kind}_proj.weight"] for expert in range(4)])
        for kind in ("gate", "up", "down")
    }
    fused = {f"{prefix}.gate_up_proj": torch.cat([part["gate"], part["up"]], 1), f"{prefix}.down_proj": part["down"]}
    rest = {name: tensor for name, tensor in separate.items() if not name.startswith(prefix)}
    tensors = {name: TensorInfo(tensor.dtype, tuple(tensor.shape)) for name, tensor in {**rest, **fused}.items()}
    plan = conversion(path, json.loads((path / "config.json").read_text()), tensors)
    found = {stored.tensor: stored.apply(fused[name]) for name in fused for stored in plan.places[name]}
    assert found.keys() == {f"blk.1.ffn_{kind}_exps.weight" for kind in part}
    for kind in part:
        assert torch.equal(found[f"blk.1.ffn_{kind}_exps.weight"], part[kind])
        assert plan.shapes[f"blk.1.ffn_{kind}_exps.weight"] == tuple(part[kind].shape)


def test_of_a_model_for_images_the_text_model_is_taken(tmp_path: Path) -> None:
    facts = golden("gemma-3")
    path = write_model(tmp_path / "model", facts["config"], facts["tensors"])
    config = {"model_type": "gemma3", "text_config": facts["config"]}
    tensors = {f"language_model.{name}": info for name, info in open_checkpoint(path).tensors.items()}
    tensors["vision_tower.vision_model.head.weight"] = TensorInfo(torch.float32, (3, 3))
    plan = conversion(path, config, tensors)
    assert list(plan.dropped) == ["vision_tower.vision_model.head.weight"]
    assert plan.shapes == {name: tuple(shape) for name, (_, shape, _) in facts["stored"].items()}


def test_rows_for_which_there_is_no_token_are_left_out(tmp_path: Path) -> None:
    path = model(tmp_path, "llama-2")
    tensors = {**open_checkpoint(path).tensors, "model.embed_tokens.weight": TensorInfo(torch.float32, (640, 64))}
    plan = conversion(path, json.loads((path / "config.json").read_text()), tensors)
    (stored,) = plan.places["model.embed_tokens.weight"]
    assert stored.shape == (608, 64)
    assert torch.equal(stored.apply(torch.arange(640.0)[:, None]), torch.arange(608.0)[:, None])


def test_a_head_that_is_tied_is_dropped(tmp_path: Path) -> None:
    path = model(tmp_path, "llama-2")
    assert list(converted(path, tie_word_embeddings=True).dropped) == ["lm_head.weight"]


def test_a_model_from_the_hubs_cache_has_its_repositorys_name(tmp_path: Path) -> None:
    facts = golden("qwen3")
    snapshot = tmp_path / "models--Qwen--Qwen3-7B-Chat/snapshots/0123456789abcdef"
    fields = converted(write_model(snapshot, facts["config"], facts["tensors"])).fields
    assert fields["general.name"].value == "Qwen3 7B Chat"
    assert fields["general.basename"].value == "Qwen3"
    assert fields["general.organization"].value == "Qwen"


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("llama", {"model_type": "gpt_neox"}, "model_type 'gpt_neox' can't be written as GGUF; known are llama, mis"),
        ("llama", {"hidden_act": "gelu"}, "activation 'gelu', but llama.cpp computes 'silu'"),
        ("llama", {"vocab_size": 4000}, "a token 4095, but config.json a vocab_size of 4000"),
        ("qwen3", {"rope_parameters": {"rope_type": "llama3", **MODELS["llama-3.1"][1]["rope_parameters"]}}, "llama3"),
        ("gemma-2", {"layer_types": ["full_attention"] * 2}, "layer 0 has full_attention, but llama.cpp computes sli"),
        ("qwen3-moe", {"norm_topk_prob": False}, "norm_topk_prob is false, but llama.cpp makes"),
        ("mixtral", {"num_local_experts": 5}, "blk.0.ffn_gate_exps.weight: the checkpoint has 4 experts"),
        ("llama-2", {"num_hidden_layers": 1}, "model.layers.1.*: llama.cpp's llama has no such tensor"),
    ],
)
def test_what_llama_cpp_would_compute_otherwise_is_refused(
    tmp_path: Path, name: str, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ContainerError, match=message):
        converted(model(tmp_path, name), **changes)


def rotate_halves(x: Tensor, angles: Tensor) -> Tensor:
    """Rope of transformers: value i of a head turns with value i + half. x [heads, dim], angles [dim / 2]."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * angles.cos() - second * angles.sin(), second * angles.cos() + first * angles.sin()], -1)


def rotate_pairs(x: Tensor, angles: Tensor) -> Tensor:
    """Rope of llama.cpp for Llama: value 2i of a head turns with value 2i + 1."""
    first, second = x[..., 0::2], x[..., 1::2]
    turned = [first * angles.cos() - second * angles.sin(), second * angles.cos() + first * angles.sin()]
    return torch.stack(turned, -1).flatten(-2)


@given(heads=st.integers(1, 5), half=st.integers(1, 6), seed=st.integers(0, 99))
def test_rearranged_rows_make_llama_cpps_rope_the_models(heads: int, half: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    q, k = (torch.randn(heads * 2 * half, 3, generator=generator, dtype=torch.float64) for _ in range(2))
    x, y = torch.randn(2, 3, generator=generator, dtype=torch.float64)
    angles, others = torch.randn(2, half, generator=generator, dtype=torch.float64)
    stored = Stored("q", shape=tuple(q.shape), is_float32=False, heads=heads)
    scores = rotate_halves((q @ x).view(heads, -1), angles) * rotate_halves((k @ y).view(heads, -1), others)
    pairs = [(stored.apply(q) @ x).view(heads, -1), (stored.apply(k) @ y).view(heads, -1)]
    theirs = rotate_pairs(pairs[0], angles) * rotate_pairs(pairs[1], others)
    torch.testing.assert_close(scores.sum(-1), theirs.sum(-1))
    # A bias moves as its rows do.
    torch.testing.assert_close(stored.apply(q @ x), stored.apply(q) @ x)


@given(
    heads=st.none() | st.integers(1, 3),
    rows=st.none() | st.tuples(st.integers(0, 2), st.integers(3, 4)),
    added=st.sampled_from([0.0, 1.0]),
    axes=st.integers(1, 3),
)
def test_invert_gives_the_rows_back(heads: int | None, rows: tuple[int, int] | None, added: float, axes: int) -> None:
    unit = 2 * (heads or 1)
    part = None if rows is None else (rows[0] * unit, rows[1] * unit)
    shape = {1: (5 * unit,), 2: (5 * unit, 2), 3: (2, 5 * unit, 2)}[axes]
    checkpoint = torch.arange(float(np.prod(shape))).reshape(shape)
    stored = Stored("x", shape=(), is_float32=False, heads=heads, rows=part, added=added)
    expected = checkpoint if part is None else checkpoint.narrow(max(axes - 2, 0), part[0], part[1] - part[0])
    assert torch.equal(stored.invert(stored.apply(checkpoint)), expected)


def test_row_order_is_none_where_rows_stay_and_refuses_halves_of_pairs() -> None:
    assert Stored("x", shape=(4,), is_float32=True, added=1.0).row_order(4) is None
    with pytest.raises(ShapeError, match="attn_q: 6 rows can't be 2 heads of pairs"):
        Stored("attn_q", shape=(6, 1), is_float32=False, heads=2).row_order(6)


def test_the_demo_model_converts() -> None:
    fields = converted(DEMO).fields
    assert fields["tokenizer.ggml.pre"].value == "gpt-2"
    assert fields["tokenizer.ggml.add_bos_token"].value is True
    assert fields["general.size_label"].value == "13M"


@pytest.mark.skipif(not STORIES.is_dir(), reason="stories260K is not beside the repository")
def test_stories260k_keeps_the_order_of_its_merges() -> None:
    plan = converted(STORIES)
    tokens, scores = plan.fields["tokenizer.ggml.tokens"].value, plan.fields["tokenizer.ggml.scores"].value
    merges = json.loads((STORIES / "tokenizer.json").read_text())["model"]["merges"]
    made = list(dict.fromkeys(left + right for left, right in merges))
    best = sorted(range(len(tokens)), key=lambda index: -scores[index])[: len(made)]
    assert [tokens[index] for index in best] == made
    assert plan.fields["tokenizer.ggml.model"].value == "llama"
    assert not plan.dropped
