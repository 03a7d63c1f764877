"""Whatever plan an artefact has, the loaded model computes what the model with the decoded weights computes."""

from __future__ import annotations

import importlib
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import pennyweight as pw
from pennyweight.core.errors import CheckpointError, ModelError, UsageError
from pennyweight.core.parallel import allowed_threads
from pennyweight.inference.experts import PackedStack
from pennyweight.inference.modules import PackedEmbedding, PackedLinear
from tests.containers import artefacts
from tests.containers.artefacts import write
from tests.inference.loaded import TOLERANCE, decoded_model, distance, logits
from tests.models.families import FAMILIES, build

# The schemes, by what about them has to be read in a way of its own.
SCHEMES = ("int2-g16", "int3-g32", "int4-g32", "int5-g32-asym", "int6-g16", "int7-g32", "int8-channel", "int4-tensor",
           "int4-g32-asym", "int3-channel-asym", "mxfp4", "mxfp8", "fp8_e4m3-channel", "fp8_e4m3-tensor",
           "nvfp4")  # fmt: skip
MIXED = {"q_proj": "int4-g32", "k_proj": "int2-g16-asym", "v_proj": None, "gate": "mxfp4", "up": "int3-channel",
         r"0\..*down": "fp8_e4m3-channel", r"1\..*down": "nvfp4", "o_proj": "int5-g32"}  # fmt: skip


def _packed(model: Any) -> dict[str, PackedLinear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, PackedLinear)}


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_scheme_is_packed_and_multiplies_as_its_decoded_weights(scheme: str, tmp_path: Path) -> None:
    src = artefacts.llama(tmp_path / "model")
    artefact = write(src, src.plan(scheme), tmp_path / "out")
    model = pw.load(artefact.directory, activations="exact", cache=False)
    assert len(_packed(model)) == model.load_report.packed == 14
    assert model.load_report.decoded == {}
    assert distance(logits(model), logits(decoded_model(src, artefact))) < TOLERANCE


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_plan_that_transformers_cannot_load_is_loaded(dtype: torch.dtype, tmp_path: Path) -> None:
    """Other schemes inside q/k/v, zero points beside none, and one of the three in float."""
    src = artefacts.llama(tmp_path / "model", dtype=dtype)
    artefact = write(src, src.plan(MIXED), tmp_path / "out")
    model = pw.load(artefact.directory, activations="exact", cache=False, dtype=torch.float32)
    assert len(_packed(model)) == 12
    assert isinstance(model.model.layers[0].self_attn.v_proj, torch.nn.Linear)
    assert ["model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.k_proj"] in model.load_report.shared
    # A bfloat16 model's weights were rounded once more where they were decoded.
    bound = TOLERANCE if dtype == torch.float32 else 2e-2
    assert distance(logits(model), logits(decoded_model(src, artefact).float())) < bound


def test_experts_of_different_schemes_run_in_the_models_own_forward(tmp_path: Path) -> None:
    src = artefacts.qwen2_moe(tmp_path / "model")
    rules = {r"experts\.0\.gate": "int4-g32-asym", r"experts\.1\.up": None, r"experts\.2\.": "mxfp8",
             r"experts\.3\.down": "int2-g16", "": "int6-g32"}  # fmt: skip
    artefact = write(src, src.plan(rules), tmp_path / "out")
    model = pw.load(artefact.directory, activations="exact", cache=False)
    assert isinstance(model.model.layers[0].mlp.experts.gate_up_proj, PackedStack)
    assert isinstance(model.model.layers[0].mlp.experts.down_proj, PackedStack)
    assert not [name for name, p in model.named_parameters() if p.ndim == 3]
    assert distance(logits(model), logits(decoded_model(src, artefact))) < TOLERANCE


@pytest.mark.parametrize("family", ["llama-tied", "qwen2", "gemma3", "phi3", "phi", "opt", "gpt-neox", "mixtral",
                                    "qwen3-moe", "deepseek-v3", "bert", "llava", "gemma3-vision",
                                    "qwen2-vl"])  # fmt: skip
def test_families_are_loaded_as_transformers_would_have_them(family: str, tmp_path: Path) -> None:
    known = FAMILIES[family]
    built: Any = build(known.architecture, known.config)
    # The widths of these models are multiples of 8 only: one scale a row.
    auto = getattr(transformers, known.architecture)
    wanted = "|".join(re.escape(name.removesuffix(".weight")) for name in known.expected())
    src = artefacts.source(built, tmp_path / "model", sites=f"^({wanted})$", auto=auto)
    artefact = write(src, src.plan("int8-channel"), tmp_path / "out")
    model = pw.load(artefact.directory, activations="exact", cache=False)
    assert type(model) is auto
    assert model.load_report.decoded == {}
    assert model.load_report.packed == len(src.sites)
    assert model.load_report.notes == []
    shared = {tuple(sorted(names)) for names in model.load_report.shared}
    if "experts" not in str(known.sites):
        expected = {tuple(sorted(f"{known.prefix}.{b}.{n}" for n in names)) for b in range(2) for names in known.shared}
        assert {names for names in expected if names[0] in _packed(model)} <= shared
    assert distance(logits(model), logits(decoded_model(src, artefact))) < TOLERANCE


def test_what_cannot_be_packed_is_decoded_and_said(tmp_path: Path) -> None:
    src = artefacts.llama(tmp_path / "model", intermediate_size=88)
    artefact = write(src, src.plan({"down": "int4-g8", "": "int4-g32"}), tmp_path / "out")
    for is_cached in (False, True, True):
        model = pw.load(artefact.directory, activations="exact", cache=is_cached)
        assert set(model.load_report.decoded) == {f"model.layers.{i}.mlp.down_proj.weight" for i in range(2)}
        assert "8 of 88 columns share a scale" in model.load_report.decoded["model.layers.0.mlp.down_proj.weight"]
        assert distance(logits(model), logits(src.auto.from_pretrained(src.directory))) > TOLERANCE
    assert distance(logits(model), logits(decoded_model(src, artefact))) < TOLERANCE


def test_a_packed_head_is_one(tmp_path: Path) -> None:
    src = artefacts.llama(tmp_path / "model", sites=artefacts.LINEARS + "|lm_head")
    artefact = write(src, src.plan("int8-channel"), tmp_path / "out")
    model = pw.load(artefact.directory, activations="exact", cache=False)
    assert isinstance(model.lm_head, PackedLinear)
    assert distance(logits(model), logits(decoded_model(src, artefact))) < TOLERANCE


@pytest.mark.parametrize("is_tied", [True, False])
def test_a_packed_embedding_shares_its_matrix_with_a_tied_head(is_tied: bool, tmp_path: Path) -> None:
    src = artefacts.llama(tmp_path / "model", sites="embed_tokens", tie_word_embeddings=is_tied)
    artefact = write(src, src.plan("int5-g32"), tmp_path / "out")
    model = pw.load(artefact.directory, activations="exact", cache=False)
    assert isinstance(model.model.embed_tokens, PackedEmbedding)
    assert isinstance(model.lm_head, PackedLinear) == is_tied
    if is_tied:
        assert model.lm_head.packed.storage.data_ptr() == model.model.embed_tokens.packed.storage.data_ptr()
    assert distance(logits(model), logits(decoded_model(src, artefact))) < TOLERANCE


def test_eight_bit_activations_are_near_and_are_the_default(tmp_path: Path) -> None:
    src = artefacts.llama(tmp_path / "model")
    artefact = write(src, src.plan("int4-g32"), tmp_path / "out")
    model = pw.load(artefact.directory, cache=False)
    assert model.load_report.activations == "int8"
    assert 1e-4 < distance(logits(model), logits(decoded_model(src, artefact))) < 0.05


def test_a_model_generates_with_its_cache_as_transformers_does(tmp_path: Path) -> None:
    src = artefacts.llama(tmp_path / "model")
    artefact = write(src, src.plan("int4-g32"), tmp_path / "out")
    model = pw.load(artefact.directory, activations="exact", cache=False)
    ids, kind = artefacts.TOKENS[:1, 1:6], dict(max_new_tokens=8, do_sample=False)
    expected = decoded_model(src, artefact).generate(ids, **kind)
    assert torch.equal(model.generate(ids, **kind), expected)


@pytest.mark.parametrize("kind", ["gptq", "awq"])
def test_checkpoints_of_others_are_packed_where_their_groups_lie_together(kind: str, tmp_path: Path) -> None:
    src = artefacts.llama(tmp_path / "model", dtype=torch.float16)
    tensors, dense = dict(src.tensors), dict(src.tensors)
    layer: Any = importlib.import_module(f"tests.models.decoders.test_{kind}").linear
    for site in src.sites:
        del tensors[site.tensor]
        odd = {"order": True} if kind == "gptq" and site.name.endswith("0.mlp.down_proj") else {}
        made, weight = layer(out=site.shape[0], inputs=site.shape[1], groups=2, **odd)
        # Weights of this model's size, of what are numbers up to 15 times a scale.
        made["l.scales"], dense[site.tensor] = made["l.scales"] / 256, weight / 256
        tensors |= {f"{site.name}.{name.removeprefix('l.')}": tensor.contiguous() for name, tensor in made.items()}
    config = {"quant_method": kind, "bits": 4, "group_size": 32, "version": "gemm"}
    artefact = artefacts.save(src, tensors, dense, config, tmp_path / "out")
    model = pw.load(artefact.directory, activations="exact", dtype=torch.float32, cache=False)
    assert model.load_report.packed == (13 if kind == "gptq" else 14)
    assert set(model.load_report.decoded) == ({"model.layers.0.mlp.down_proj.weight"} if kind == "gptq" else set())
    # Rounded to float16 where they were decoded.
    assert distance(logits(model), logits(decoded_model(src, artefact).float())) < 2e-3


def test_a_whole_model_is_one_graph(tmp_path: Path) -> None:
    src = artefacts.llama(tmp_path / "model")
    model = pw.load(write(src, src.plan("int4-g32"), tmp_path / "out").directory, cache=False)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        assert torch.equal(compiled(input_ids=artefacts.TOKENS).logits, logits(model))
        program = torch.export.export(model, (), {"input_ids": artefacts.TOKENS, "use_cache": False})
        assert torch.equal(program.module()(input_ids=artefacts.TOKENS, use_cache=False).logits, logits(model))


def test_a_loaded_model_is_not_saved_under_names_that_nobody_reads(tmp_path: Path) -> None:
    src = artefacts.llama(tmp_path / "model")
    model = pw.load(write(src, src.plan("int4-g32"), tmp_path / "out").directory, cache=False)
    with pytest.raises(UsageError, match="copy its directory instead"):
        model.save_pretrained(tmp_path / "saved")


# ---- what cannot be loaded


def test_a_float_model_is_refused_with_what_to_do(tmp_path: Path) -> None:
    src = artefacts.llama(tmp_path / "model")
    with pytest.raises(ModelError, match="its weights are floats.*pennyweight quantize"):
        pw.load(src.directory)


def test_settings_that_do_not_exist_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="activations='int4': give 'exact' or 'int8'"):
        pw.load(tmp_path, activations="int4")
    with pytest.raises(UsageError, match="dtype=torch.int8"):
        pw.load(tmp_path, dtype=torch.int8)
    with pytest.raises(ModelError, match="no such path"):
        pw.load(tmp_path / "nothing")


def test_a_truncated_and_a_missing_file_are_named(tmp_path: Path) -> None:
    src = artefacts.llama(tmp_path / "model")
    artefact = write(src, src.plan("int4-g32"), tmp_path / "out")
    pw.load(artefact.directory)
    shutil.copytree(artefact.directory, tmp_path / "short")
    file = tmp_path / "short" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="truncated"):
        pw.load(tmp_path / "short")
    file.unlink()
    with pytest.raises(ModelError, match="holds no weights"):
        pw.load(tmp_path / "short")
    config = json.loads((artefact.directory / "config.json").read_text())
    (artefact.directory / "config.json").write_text(json.dumps(config | {"hidden_size": 128}))
    with pytest.raises(CheckpointError, match="do not belong together"):
        pw.load(artefact.directory)


def test_a_models_own_operations_run_on_one_thread_and_nothing_stays_changed(tmp_path: Path) -> None:
    src = artefacts.llama(tmp_path / "model")
    model = pw.load(write(src, src.plan("int4-g32"), tmp_path / "out").directory, cache=False)
    seen = []
    model.model.layers[0].input_layernorm.register_forward_hook(
        lambda *_: seen.append((torch.get_num_threads(), allowed_threads()))
    )
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        logits(model)
        assert (torch.get_num_threads(), allowed_threads()) == (3, 3)
        with pytest.raises(TypeError):
            model(input_ids="no tokens")
        assert (torch.get_num_threads(), allowed_threads()) == (3, 3)
    finally:
        torch.set_num_threads(before)
    assert seen == [(1, 3)]
