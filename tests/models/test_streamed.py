"""Checkpoints of every shape and age, what is refused, and what a streamed model may not depend on."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from pennyweight.core.errors import CheckpointError, ModelError
from pennyweight.core.parallel import parallel_map
from pennyweight.models.skeleton import build as build_empty
from pennyweight.models.streamed import StreamedModel
from pennyweight.pipeline.collect import Streams, collect
from tests.models.families import FAMILIES, build, save, token_batches

# Two libraries add float32 products up in different orders: a few units in the last place of the largest output.
OUTPUT_TOLERANCE = 2e-6
# A model of 7 B weights, 27 GB in float32, is built in what its modules take, on a processor that others use too.
BUILD_SECONDS = 1.5
BUILD_BYTES = 300e6


def run(directory: Path, batches: list[Tensor], **options: Any) -> list[Tensor]:
    """Output of each batch, block by block."""
    model = StreamedModel(directory, **options)
    stream = model.start(batches)
    for index in range(len(model.blocks)):
        with model.opened(index) as block:
            stream.hidden = model.run_block(block, index, stream)
    with model.finishing(stream) as finish:
        return parallel_map(finish, range(len(batches)))


def plain(model: nn.Module, batches: list[Tensor]) -> list[Tensor]:
    with torch.no_grad():
        outs = [model(input_ids=ids) for ids in batches]
    return [out.logits if hasattr(out, "logits") else out.last_hidden_state for out in outs]


def assert_close(ours: list[Tensor], theirs: list[Tensor]) -> None:
    for a, b in zip(ours, theirs, strict=True):
        assert (a - b).abs().max() <= OUTPUT_TOLERANCE * b.abs().max()


def rewrite(directory: Path, change: Callable[[dict[str, Tensor]], Mapping[str, Tensor]]) -> Path:
    """The checkpoint in `directory` with other tensors."""
    file = directory / "model.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in change(load_file(file)).items()}, file)
    return directory


def reconfigure(directory: Path, **changes: Any) -> Path:
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, **changes}))
    return directory


@pytest.fixture(scope="module")
def llama() -> nn.Module:
    return build("LlamaForCausalLM", FAMILIES["llama"].config)


@pytest.mark.parametrize("counts", [(1,), (2, 2, 2), (5, 1)])
def test_windows_of_any_count_give_the_plain_models_output(
    llama: nn.Module, tmp_path: Path, counts: tuple[int, ...]
) -> None:
    batches = token_batches(counts)
    assert_close(run(save(llama, tmp_path), batches), plain(llama, batches))


def test_a_sharded_checkpoint_is_read(llama: nn.Module, tmp_path: Path) -> None:
    save(llama, tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert_close(run(tmp_path, token_batches()), plain(llama, token_batches()))


def test_a_sharded_mixture_whose_experts_lie_in_several_files_is_read(tmp_path: Path) -> None:
    model = build("MixtralForCausalLM", FAMILIES["mixtral"].config)
    save(model, tmp_path, max_shard_size="20KB")
    assert_close(run(tmp_path, token_batches()), plain(model, token_batches()))


def test_a_bfloat16_checkpoint_is_computed_in_float32(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    save(build("Qwen3ForCausalLM", FAMILIES["qwen3"].config).to(torch.bfloat16), tmp_path)
    assert load_file(tmp_path / "model.safetensors")["model.norm.weight"].dtype == torch.bfloat16
    reference = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert_close(run(tmp_path, token_batches()), plain(reference, token_batches()))


@pytest.mark.parametrize("kept", ["lm_head.weight", "model.embed_tokens.weight", "both"])
def test_a_tied_head_is_found_under_either_name(tmp_path: Path, kept: str) -> None:
    model = build("LlamaForCausalLM", FAMILIES["llama-tied"].config)

    def change(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        shared = tensors.pop("model.embed_tokens.weight")
        names = ("lm_head.weight", "model.embed_tokens.weight") if kept == "both" else (kept,)
        return tensors | {name: shared.clone() for name in names}

    rewrite(save(model, tmp_path), change)
    assert_close(run(tmp_path, token_batches()), plain(model, token_batches()))
    assert StreamedModel(tmp_path).tied_head


def test_a_head_that_differs_from_the_embedding_is_not_tied_whatever_the_config_says(
    llama: nn.Module, tmp_path: Path
) -> None:
    reconfigure(save(llama, tmp_path), tie_word_embeddings=True)
    assert_close(run(tmp_path, token_batches()), plain(llama, token_batches()))
    assert not StreamedModel(tmp_path).tied_head


def test_old_names_of_layer_norms_are_understood(tmp_path: Path) -> None:
    model = build("BertModel", FAMILIES["bert"].config)

    def change(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        old = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
        renamed = dict(tensors)
        for name in tensors:
            for new, before in old.items():
                if name.endswith(new):
                    renamed[name.replace(new, before)] = renamed.pop(name)
        return renamed

    rewrite(save(model, tmp_path), change)
    assert_close(run(tmp_path, token_batches()), plain(model, token_batches()))


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama"])
def test_names_with_and_without_the_base_models_prefix_are_understood(tmp_path: Path, family: str) -> None:
    model = build(FAMILIES[family].architecture, FAMILIES[family].config)
    prefix = f"{model.base_model_prefix}."

    def change(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        if family == "bert":
            return {prefix + name: tensor for name, tensor in tensors.items()}
        return {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}

    rewrite(save(model, tmp_path), change)
    assert_close(run(tmp_path, token_batches()), plain(model, token_batches()))
    assert all(site.name.startswith(prefix) == (family == "bert") for site in StreamedModel(tmp_path).sites)


@pytest.mark.parametrize("family", ["gemma2", "bert", "opt", "qwen3-moe"])
def test_results_do_not_depend_on_the_number_of_threads(tmp_path: Path, family: str) -> None:
    save(build(FAMILIES[family].architecture, FAMILIES[family].config), tmp_path)
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        try:
            model = StreamedModel(tmp_path)
            stream = model.start(token_batches((4, 3, 3)))
            with model.opened(0) as block:
                found = collect(model, block, model.sites_of(0), Streams(stream))
            results.append((run(tmp_path, token_batches((4, 3, 3))), found))
        finally:
            torch.set_num_threads(2)
    for outputs, found in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(outputs, results[0][0], strict=True))
        for name, statistics in found.items():
            first = results[0][1][name]
            assert statistics.stats.hessian is not None
            assert first.stats.hessian is not None
            assert torch.equal(statistics.stats.hessian, first.stats.hessian)
            assert (statistics.rows, statistics.notes) == (first.rows, first.notes)


def test_blocks_leave_no_weights_in_memory(llama: nn.Module, tmp_path: Path) -> None:
    model = StreamedModel(save(llama, tmp_path))
    stream = model.start(token_batches())
    with model.opened(1) as block:
        assert not any(parameter.is_meta for parameter in block.parameters())
    with model.finishing(stream) as finish:
        finish(0)
    assert all(parameter.is_meta for parameter in model.module.parameters())
    assert not model._outside


def test_a_large_model_is_built_fast_and_without_its_weights() -> None:
    from transformers import LlamaConfig

    config = LlamaConfig(architectures=["LlamaForCausalLM"])
    assert (config.hidden_size, config.num_hidden_layers) == (4096, 32)
    before, started = psutil.Process().memory_info().rss, time.process_time()
    model = build_empty(config)
    assert time.process_time() - started < BUILD_SECONDS
    assert psutil.Process().memory_info().rss - before < BUILD_BYTES
    assert sum(parameter.numel() for parameter in model.parameters()) > 6e9


# -- what is refused ----------------------------------------------------------------------------------------------


def test_an_encoder_decoder_is_refused_by_name(tmp_path: Path) -> None:
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(vocab_size=50, d_model=16, d_ff=16, d_kv=8, num_layers=1, num_heads=2)
    save(T5ForConditionalGeneration(config), tmp_path)
    with pytest.raises(ModelError, match="t5: models with an encoder and a decoder"):
        StreamedModel(tmp_path)


def test_a_model_without_blocks_is_refused(tmp_path: Path) -> None:
    from transformers import ResNetConfig, ResNetModel

    config = ResNetConfig(embedding_size=8, hidden_sizes=[8], depths=[1], num_channels=1, layer_type="basic")
    save(ResNetModel(config), tmp_path)
    with pytest.raises(ModelError, match="ResNetModel"):
        StreamedModel(tmp_path).start(token_batches())


def test_a_model_that_uses_a_block_twice_is_refused(tmp_path: Path) -> None:
    save(build("AlbertModel", {**FAMILIES["bert"].config, "embedding_size": 16}), tmp_path)
    with pytest.raises(ModelError, match="more than once"):
        StreamedModel(tmp_path)


def test_an_unknown_model_type_is_refused(llama: nn.Module, tmp_path: Path) -> None:
    reconfigure(save(llama, tmp_path), model_type="llama99")
    with pytest.raises(ModelError, match="llama99.*--trust-remote-code"):
        StreamedModel(tmp_path)


@pytest.mark.parametrize("changes", [{"hidden_size": "wide"}, {"num_attention_heads": 0}, {"hidden_act": "sigh"}])
def test_a_config_that_makes_no_model_is_refused(llama: nn.Module, tmp_path: Path, changes: dict[str, Any]) -> None:
    reconfigure(save(llama, tmp_path), **changes)
    with pytest.raises(ModelError):
        StreamedModel(tmp_path)


def test_a_missing_tensor_is_named(llama: nn.Module, tmp_path: Path) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    rewrite(save(llama, tmp_path), lambda tensors: {n: t for n, t in tensors.items() if n != name})
    with pytest.raises(CheckpointError, match=name):
        StreamedModel(tmp_path)


def test_a_tensor_of_another_shape_is_named_before_anything_runs(llama: nn.Module, tmp_path: Path) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    rewrite(save(llama, tmp_path), lambda tensors: tensors | {name: torch.zeros(47, 32)})
    with pytest.raises(CheckpointError, match=rf"{name}.*\(47, 32\).*\(48, 32\)"):
        StreamedModel(tmp_path)


def test_a_missing_expert_is_an_error_that_names_its_layer(tmp_path: Path) -> None:
    save(build("MixtralForCausalLM", FAMILIES["mixtral"].config), tmp_path)
    name = "model.layers.1.block_sparse_moe.experts.2.w1.weight"
    rewrite(tmp_path, lambda tensors: {n: t for n, t in tensors.items() if n != name})
    with pytest.raises(CheckpointError, match=r"model\.layers\.1\.block_sparse_moe\.experts"):
        StreamedModel(tmp_path)


def test_tensors_without_a_place_are_noted(llama: nn.Module, tmp_path: Path) -> None:
    rewrite(save(llama, tmp_path), lambda tensors: tensors | {"model.layers.0.extra": torch.zeros(3)})
    assert StreamedModel(tmp_path).weights.unused == ["model.layers.0.extra"]


OWN_CODE = """
import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput


class TinyConfig(PretrainedConfig):
    model_type = "tiny-of-its-own"

    def __init__(self, width=16, num_hidden_layers=2, vocab_size=100, **kwargs):
        self.width, self.num_hidden_layers, self.vocab_size = width, num_hidden_layers, vocab_size
        super().__init__(**kwargs)


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x, scale):
        return x + self.down(self.up(x).relu()) * scale


class TinyForCausalLM(PreTrainedModel):
    config_class = TinyConfig

    def __init__(self, config):
        super().__init__(config)
        self.embed = nn.Embedding(config.vocab_size, config.width)
        self.blocks = nn.ModuleList(Block(config.width) for _ in range(config.num_hidden_layers))
        self.lm_head = nn.Linear(config.width, config.vocab_size, bias=False)
        self.gain = nn.Parameter(torch.ones(config.width))
        self.register_buffer("shift", torch.zeros(config.width))
        self.post_init()

    def get_input_embeddings(self):
        return self.embed

    def get_output_embeddings(self):
        return self.lm_head

    def forward(self, input_ids):
        x = self.embed(input_ids) + self.shift
        for number, block in enumerate(self.blocks):
            x = block(x, scale=number + 1)
        return CausalLMOutput(logits=self.lm_head(self.gain * x))
"""


@pytest.fixture
def own_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model directory whose model's code is in it."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    directory = tmp_path / "own"
    directory.mkdir()
    (directory / "modeling_tiny.py").write_text(OWN_CODE)
    names = {"AutoConfig": "modeling_tiny.TinyConfig", "AutoModelForCausalLM": "modeling_tiny.TinyForCausalLM"}
    config = {"model_type": "tiny-of-its-own", "architectures": ["TinyForCausalLM"], "auto_map": names}
    (directory / "config.json").write_text(json.dumps({**config, "width": 16, "num_hidden_layers": 2}))
    shapes: dict[str, tuple[int, ...]] = {"embed.weight": (100, 16), "lm_head.weight": (100, 16)}
    shapes |= {"gain": (16,), "shift": (16,)}
    for block in range(2):
        shapes |= {f"blocks.{block}.up.weight": (32, 16), f"blocks.{block}.up.bias": (32,)}
        shapes |= {f"blocks.{block}.down.weight": (16, 32), f"blocks.{block}.down.bias": (16,)}
    tensors = {name: torch.randn(shape) for name, shape in shapes.items()}
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


def test_code_that_a_model_brings_is_refused_unless_trusted(own_code: Path) -> None:
    with pytest.raises(ModelError, match="--trust-remote-code"):
        StreamedModel(own_code)


def test_trusted_code_that_a_model_brings_is_run(own_code: Path) -> None:
    tensors = load_file(own_code / "model.safetensors")
    batches = token_batches()

    def expected(ids: Tensor) -> Tensor:
        x = tensors["embed.weight"][ids] + tensors["shift"]
        for block in range(2):
            up, down = f"blocks.{block}.up", f"blocks.{block}.down"
            hidden = (x @ tensors[f"{up}.weight"].T + tensors[f"{up}.bias"]).relu()
            x = x + (hidden @ tensors[f"{down}.weight"].T + tensors[f"{down}.bias"]) * (block + 1)
        return (tensors["gain"] * x) @ tensors["lm_head.weight"].T

    assert_close(run(own_code, batches, trust_remote_code=True), [expected(ids) for ids in batches])
