"""Which folds are found in the blocks of every family, and that nothing else is."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from pennyweight.transforms.base import Fold
from pennyweight.transforms.heads import head_size
from pennyweight.transforms.structure import find_folds
from tests.transforms.blocks import Alone, block_of

QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
GATE_UP = ("mlp.gate_proj", "mlp.up_proj")
VALUES = {"self_attn.v_proj": ("self_attn.o_proj",)}
UP = {"mlp.up_proj": ("mlp.down_proj",)}
LLAMA = {"input_layernorm": QKV, "post_attention_layernorm": GATE_UP} | VALUES | UP
MIXTURE = {
    "input_layernorm": QKV,
    "post_attention_layernorm": ("mlp.gate", "mlp.experts.gate_up_proj"),
    "mlp.experts.gate_up_proj": ("mlp.experts.down_proj",),
} | VALUES
# Producer -> readers, by module.
EXPECTED = {
    "llama": LLAMA,
    "mistral": LLAMA,
    "qwen2": LLAMA,
    "qwen3": LLAMA,
    "gemma": LLAMA,
    "gemma2": {"input_layernorm": QKV, "pre_feedforward_layernorm": GATE_UP} | VALUES | UP,
    "llava": LLAMA,
    "phi3": {
        "input_layernorm": ("self_attn.qkv_proj",),
        "post_attention_layernorm": ("mlp.gate_up_proj",),
        "self_attn.qkv_proj": ("self_attn.o_proj",),
        "mlp.gate_up_proj": ("mlp.down_proj",),
    },
    "phi": {"input_layernorm": (*QKV, "mlp.fc1"), "self_attn.v_proj": ("self_attn.dense",)},
    "gpt2": {"ln_1": ("attn.c_attn",), "ln_2": ("mlp.c_fc",), "attn.c_attn": ("attn.c_proj",)},
    "opt": {
        "self_attn_layer_norm": QKV,
        "final_layer_norm": ("fc1",),
        "self_attn.v_proj": ("self_attn.out_proj",),
        "fc1": ("fc2",),
    },
    "gpt-neox": {
        "input_layernorm": ("attention.query_key_value",),
        "post_attention_layernorm": ("mlp.dense_h_to_4h",),
        "attention.query_key_value": ("attention.dense",),
    },
    "mixtral": MIXTURE,
    "qwen3-moe": MIXTURE,
    "gpt-oss": {"input_layernorm": QKV, "post_attention_layernorm": ("mlp.router", "mlp.experts.gate_up_proj")}
    | VALUES,
    "bert": {"attention.self.value": ("attention.output.dense",)},
}


def shown(folds: list[Fold]) -> dict[str, tuple[str, ...]]:
    return {
        fold.producer[0].parameter.removesuffix(".weight"): tuple(
            reader.parameter.removesuffix(".weight") for reader in fold.readers
        )
        for fold in folds
    }


@pytest.mark.parametrize("family", EXPECTED)
def test_every_fold_of_a_family_is_found_and_no_other(family: str) -> None:
    alone = block_of(family, 1)
    assert shown(find_folds(alone.block, alone.run)) == EXPECTED[family]


@pytest.mark.parametrize("family", ["llama", "gemma", "opt", "mixtral"])
def test_float32_shows_the_same_folds(family: str) -> None:
    alone = block_of(family, 1)
    alone = Alone(alone.block.float(), alone.hidden.float(), as_float(alone.arguments), is_exact=False)
    assert shown(find_folds(alone.block, alone.run)) == EXPECTED[family]


def as_float(arguments: dict[str, object]) -> dict[str, object]:
    def one(value: object) -> object:
        if isinstance(value, Tensor) and value.is_floating_point():
            return value.float()
        return tuple(map(one, value)) if isinstance(value, tuple) else value

    return {name: one(value) for name, value in arguments.items()}


@pytest.mark.parametrize("family", ["llama", "gemma", "gpt-neox", "mixtral"])
def test_the_block_is_left_as_it_was(family: str) -> None:
    alone = block_of(family)
    before = {name: parameter.clone() for name, parameter in alone.block.named_parameters()}
    find_folds(alone.block, alone.run)
    assert all(torch.equal(parameter, before[name]) for name, parameter in alone.block.named_parameters())


def by_producer(alone: Alone) -> dict[str, Fold]:
    return {fold.producer[0].parameter: fold for fold in find_folds(alone.block, alone.run)}


def test_heads_that_repeat_tie_their_channels() -> None:
    fold = by_producer(block_of("llama"))["self_attn.v_proj.weight"]
    # Four query heads of 8 on two heads of values.
    heads = torch.arange(16).reshape(2, 1, 8).expand(2, 2, 8).reshape(-1)
    assert fold.size == 16
    assert torch.equal(fold.readers[0].source, heads)


def test_gemma_norms_scale_by_one_more_than_their_weight() -> None:
    folds = by_producer(block_of("gemma"))
    assert folds["input_layernorm.weight"].producer[0].style == "one-plus"
    assert by_producer(block_of("llama"))["input_layernorm.weight"].producer[0].style == "scaled"


def test_biases_belong_to_what_they_are_added_to() -> None:
    folds = by_producer(block_of("qwen2"))
    names = [part.parameter for part in folds["self_attn.v_proj.weight"].producer]
    assert names == ["self_attn.v_proj.weight", "self_attn.v_proj.bias"]


@pytest.mark.parametrize(
    ("family", "parameter", "rows"),
    [
        ("phi3", "self_attn.qkv_proj.weight", list(range(48, 64))),
        ("phi3", "mlp.gate_up_proj.weight", list(range(48, 96))),
        ("gpt2", "attn.c_attn.weight", list(range(64, 96))),
        ("gpt-neox", "attention.query_key_value.weight", [i for i in range(96) if i // 8 % 3 == 2]),
        ("mixtral", "mlp.experts.gate_up_proj", list(range(48, 96))),
    ],
)
def test_the_rows_of_a_fused_matrix_that_make_the_channels_are_found(
    family: str, parameter: str, rows: list[int]
) -> None:
    assert by_producer(block_of(family))[parameter].producer[0].rows.tolist() == rows


def test_no_fold_is_claimed_where_an_expert_was_not_run() -> None:
    class Mixture(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.RMSNorm(8)
            self.experts = nn.ModuleList(nn.Linear(8, 8, bias=False) for _ in range(2))

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = x + self.experts[self.chosen](self.norm(x))
            return out

        chosen = 0

    block = Mixture().double()
    x = torch.randn(5, 8, dtype=torch.float64)
    assert find_folds(block, lambda module: module(x)) == []
    block.experts = block.experts[:1]
    assert shown(find_folds(block, lambda module: module(x))) == {"norm": ("experts.0",)}


class Plain(nn.Module):
    """x + second(act(first(x)))"""

    def __init__(self, activation: nn.Module) -> None:
        super().__init__()
        self.first, self.second, self.activation = nn.Linear(8, 12), nn.Linear(12, 8), activation

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.second(self.activation(self.first(x)))
        return out


@pytest.mark.parametrize(
    ("activation", "is_fold"),
    [(nn.ReLU(), True), (nn.LeakyReLU(), True), (nn.Identity(), True), (nn.GELU(), False), (nn.ReLU6(), False)],
)
def test_only_homogeneous_activations_let_scales_through(activation: nn.Module, is_fold: bool) -> None:
    block = Plain(activation).double()
    x = 5 * torch.randn(40, 8, dtype=torch.float64)
    assert bool(find_folds(block, lambda module: module(x))) == is_fold


def test_a_channel_that_no_token_lights_is_scaled_like_its_neighbours() -> None:
    block = Plain(nn.ReLU()).double()
    with torch.no_grad():
        block.first.bias[5] = -1e3
    x = torch.randn(40, 8, dtype=torch.float64)
    [fold] = find_folds(block, lambda module: module(x))
    assert fold.readers[0].source.tolist() == list(range(12))


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt-neox", "phi3", "bert"])
def test_heads_are_as_long_as_the_config_says(family: str) -> None:
    alone = block_of(family)
    sizes = [head_size(alone.block, alone.run, fold) for fold in find_folds(alone.block, alone.run)]
    assert sorted(size for size in sizes if size > 1) == [8]
