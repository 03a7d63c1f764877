"""Plans by name: what llama.cpp's quantizer mixes, as plans of ours."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import pytest

from pennyweight.core.errors import UsageError
from pennyweight.pipeline.job import Job
from pennyweight.pipeline.options import Options
from pennyweight.pipeline.prepare import prepare
from pennyweight.plan.plan_file import PlanEntries, PlanName, given_plan
from tests.pipeline import tiny

DEMO = Path(__file__).parents[2] / "src" / "pennyweight" / "demo_model"
GOLDEN: dict[str, Any] = json.loads((DEMO.parents[2] / "tests" / "golden" / "gguf" / "presets.json").read_text())
# No data, and the quickest way to codes: types are what is looked at.
BLIND = Options(runtime="llama.cpp", solver="nearest", fit="minmax", effort="fast", calibration="none")
SHORT = {"blk.*.attn_q": "self_attn.q_proj", "blk.*.attn_k": "self_attn.k_proj", "blk.*.attn_v": "self_attn.v_proj",
         "blk.*.attn_output": "self_attn.o_proj", "blk.*.ffn_gate": "mlp.gate_proj", "blk.*.ffn_up": "mlp.up_proj",
         "blk.*.ffn_down": "mlp.down_proj"}  # fmt: skip


def prepared(name: str, model: Path = DEMO, **changes: Any) -> Job:
    return prepare(str(model), replace(BLIND, plan=PlanName(name), **changes), None)


@pytest.mark.parametrize("name", ["Q4_0", "Q4_K_S", "Q4_K_M", "Q3_K_L", "Q2_K_S", "IQ4_XS", "TQ2_0"])
def test_sites_have_the_types_that_llama_quantize_gives_their_tensors(name: str) -> None:
    job = prepared(name)
    expected = {"model.embed_tokens": GOLDEN["the shipped model"]["types"][name]["token_embd.weight"].lower()}
    for tensor, site in SHORT.items():
        kinds = GOLDEN["the shipped model"]["types"][name][f"{tensor}.weight"].lower().split()
        runs = [kind.partition("*") for kind in kinds]
        each = [kind for kind, _, count in runs for _ in range(int(count or 1))]
        expected |= {f"model.layers.{layer}.{site}": kind for layer, kind in enumerate(each)}
    assert {site: scheme.name for site, scheme in job.plan.schemes.items()} == expected
    assert job.plan.kept == {}


@pytest.mark.parametrize("has_data", [False, True])
def test_some_types_depend_on_whether_there_is_data(tmp_path: Path, *, has_data: bool) -> None:
    model = tiny.llama(tmp_path / "llama", hidden_size=256, intermediate_size=256, num_hidden_layers=8)
    changes = {"calibration": (tiny.words(),), "samples": 2, "length": 24} if has_data else {}
    schemes = prepared("Q4_0", model, **changes).plan.schemes
    down = [schemes[f"model.layers.{layer}.mlp.down_proj"].name for layer in range(8)]
    assert down == ["q4_1" if has_data else "q4_0", *["q4_0"] * 7]


def test_experts_share_the_type_of_their_stack(tmp_path: Path) -> None:
    model = tiny.mixtral(
        tmp_path / "mixtral", hidden_size=256, intermediate_size=256, num_hidden_layers=1, num_local_experts=8
    )
    found = {name: scheme.name for name, scheme in prepared("MXFP4_MOE", model).plan.schemes.items()}
    experts = {name: kind for name, kind in found.items() if ".experts." in name}
    assert len(experts) == 24
    assert set(experts.values()) == {"mxfp4_ggml"}
    assert {kind for name, kind in found.items() if name not in experts} == {"q8_0"}
    attention = prepared("Q4_K_M", model).plan.schemes
    short = {name.rpartition(".")[2]: scheme.name for name, scheme in attention.items() if "self_attn" in name}
    assert short == {"q_proj": "q4_k", "k_proj": "q8_0", "v_proj": "q8_0", "o_proj": "q5_k"}


def test_the_file_says_which_mix_it_is(tmp_path: Path) -> None:
    tiny.run(DEMO, tmp_path / "out", replace(BLIND, plan=PlanName("Q4_0")))
    reader = gguf.GGUFReader(tmp_path / "out" / "model.gguf")
    assert reader.fields["general.file_type"].contents() == gguf.LlamaFileType.MOSTLY_Q4_0
    types = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
    assert types["token_embd.weight"] == "Q6_K"
    assert types["blk.3.ffn_down.weight"] == "Q4_0"
    assert types["blk.3.ffn_norm.weight"] == "F32"


def test_what_the_user_decides_of_a_site_goes_first() -> None:
    plan = prepared("Q4_K_M", keep=("model.embed_tokens",), at=("*.0.*.down_proj=q8_0",)).plan
    assert plan.kept == {"model.embed_tokens": "--keep model.embed_tokens"}
    assert plan.schemes["model.layers.0.mlp.down_proj"].name == "q8_0"
    assert plan.schemes["model.layers.1.mlp.gate_proj"].name == "q4_k"


def test_inputs_that_no_block_divides_stay_in_float(tmp_path: Path) -> None:
    plan = prepared("Q4_K_M", tiny.llama(tmp_path / "llama", hidden_size=48, intermediate_size=64)).plan
    assert plan.kept["model.layers.0.self_attn.q_proj"] == "as in Q4_K_M"
    assert plan.schemes["model.layers.0.mlp.down_proj"].name in ("q5_0", "q8_0")


def test_a_file_goes_before_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert given_plan("Q4_K_M") == PlanName("Q4_K_M")
    Path("Q4_K_M").write_text('{"pennyweight_plan": 1, "sites": {"*": "q4_0"}}')
    assert given_plan("Q4_K_M") == PlanEntries("Q4_K_M", {"*": "q4_0"})
    with pytest.raises(UsageError, match="cannot be read"):
        given_plan(Path("Q6_K"))


def test_neither_a_file_nor_a_name_is_refused_before_the_model_is_opened() -> None:
    with pytest.raises(UsageError, match=r"plam\.json: there is no such file, .* llama\.cpp knows: Q2_K, .*Q4_K_M"):
        prepared("plam.json", Path("no/such/model"))
    with pytest.raises(UsageError, match=r"no such file, and transformers knows no plan by name"):
        prepared("Q4_K_M", Path("no/such/model"), runtime="transformers")
