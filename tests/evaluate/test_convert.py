"""An artefact in another container: the same weights, in the real readers; what cannot be held is named."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from safetensors.torch import load_file, save_file

import pennyweight
from pennyweight.containers.gguf import Gguf
from pennyweight.core.errors import ContainerError, ModelError, UsageError, VerificationError
from pennyweight.evaluate import verify_gguf, verify_worker
from pennyweight.evaluate.converted import convert
from pennyweight.models.checkpoint import open_checkpoint
from pennyweight.pipeline.records import RunReport
from tests.evaluate.gguf_models import NEAREST, family
from tests.pipeline import tiny

_MISSING = "llama-cpp-python is not installed: pip install 'pennyweight[llama-cpp]'"
DEMO = Path(pennyweight.__file__).parent / "demo_model"
UP = "model.layers.1.mlp.up_proj"
# Products that bfloat16 holds: all values are 0 or have one or two bits, and bfloat16 has eight.
_EXACT = ("int2-g32", "mxfp4")


def _quantized(model: Path, out: Path, scheme: str, **options: Any) -> Path:
    tiny.run(model, out, replace(NEAREST, **{"runtime": "transformers", "scheme": scheme, **options}))
    return out


def _converted(artefact: Path, out: Path, runtime: str = "llama.cpp", **options: Any) -> RunReport:
    return convert(artefact, out, runtime=runtime, **{"verification": "none", **options})


def _worker(artefact: Path, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    """What the fresh process of `verify` finds."""
    if any(artefact.glob("*.gguf")):
        pytest.importorskip("llama_cpp", reason=_MISSING)
    worker = verify_gguf if any(artefact.glob("*.gguf")) else verify_worker
    capsys.readouterr()
    worker.main([str(artefact), "full"])
    found: dict[str, Any] = json.loads(capsys.readouterr().out.splitlines()[-1])
    return found


def _gguf_weight(artefact: Path, name: str) -> tuple[str, torch.Tensor]:
    """Type and decoded weight of a tensor, by the gguf package alone."""
    [found] = [one for one in gguf.GGUFReader(artefact / "model.gguf").tensors if one.name == name]
    return found.tensor_type.name, torch.tensor(gguf.quants.dequantize(found.data, found.tensor_type))


def _read_by_compressed_tensors(artefact: Path, name: str, capsys: pytest.CaptureFixture[str]) -> torch.Tensor:
    from pennyweight.evaluate.runtime_decoder import RuntimeDecoder
    from pennyweight.models.streamed import StreamedModel

    return RuntimeDecoder(StreamedModel(artefact)).read(name)


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """llama with 512 instead of 288 inputs where 256 would not divide them."""
    return family("llama", tmp_path_factory.mktemp("convert") / "model", intermediate_size=512)


@pytest.fixture(scope="session")
def packed(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _quantized(model, tmp_path_factory.mktemp("convert-packed") / "packed", "int4-g128")


@pytest.fixture(scope="session")
def q4_0(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GGUF artefact whose embedding and head are in float."""
    keep = ("model.embed_tokens", "lm_head")
    return _quantized(model, tmp_path_factory.mktemp("convert-q4") / "q4", "q4_0", runtime="llama.cpp", keep=keep)


# ---- to llama.cpp


def test_codes_and_scales_of_int4_become_q4_0_as_they_are(packed: Path, tmp_path: Path) -> None:
    report = _converted(packed, tmp_path / "out")
    assert set(report.changed.values()) == {
        "q4_0 with the codes of int4-g128-bf16, computed in float32 and no longer rounded to bfloat16"
    }
    assert report.kept == {}
    stored = load_file(packed / "model.safetensors")
    for site, name in ((UP, "blk.1.ffn_up.weight"), ("model.layers.0.mlp.down_proj", "blk.0.ffn_down.weight")):
        # Eight codes a word, the first one lowest; each is the value plus 8.
        words = stored[f"{site}.weight_packed"].long() & 0xFFFFFFFF
        values = torch.stack([(words >> 4 * place) & 15 for place in range(8)], dim=-1).flatten(1).double() - 8
        scales = stored[f"{site}.weight_scale"].double().repeat_interleave(128, dim=1)
        kind, weight = _gguf_weight(tmp_path / "out", name)
        assert kind == "Q4_0"
        assert torch.equal(weight.double(), values * scales)
        # What transformers computes from the same numbers, in the type of the scales.
        assert not torch.equal(weight.bfloat16().float(), weight)


@pytest.mark.parametrize(
    ("scheme", "kind"),
    [
        ("int2-g32", "Q4_0"), ("int3-channel", "Q4_0"), ("int5-g64", "Q5_0"), ("int6-g32", "Q8_0"),
        ("int8-g128", "Q8_0"),
        ("int4-g32-asym", "Q5_0"), ("int3-g32-asym", "Q4_0"), ("mxfp4", "MXFP4"),
    ],
)  # fmt: skip
def test_each_scheme_becomes_the_smallest_type_that_holds_its_numbers(
    model: Path, tmp_path: Path, scheme: str, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    packed = _quantized(model, tmp_path / "packed", scheme)
    report = _converted(packed, tmp_path / "out")
    found, weight = _gguf_weight(tmp_path / "out", "blk.1.ffn_up.weight")
    assert found == kind
    theirs = _read_by_compressed_tensors(packed, UP, capsys)
    assert torch.equal(weight.to(theirs.dtype), theirs)
    assert report.verification["codes_compared"] == 14
    assert report.verification["codes_wider"] == (0 if scheme in _EXACT else 14)


@pytest.mark.slow
@pytest.mark.promise
def test_the_model_that_is_shipped_goes_to_llama_cpp_and_back(tmp_path: Path) -> None:
    pytest.importorskip("llama_cpp", reason=_MISSING)
    packed = _quantized(DEMO, tmp_path / "packed", "int4-g128")
    there = convert(packed, tmp_path / "there", runtime="llama.cpp")
    assert (there.verified, there.verification["codes_compared"]) == ("full", 28)
    back = convert(tmp_path / "there", tmp_path / "back", runtime="transformers")
    assert (back.verified, back.verification["largest_difference"]) == ("full", 0.0)
    first, last = (load_file(path / "model.safetensors") for path in (packed, tmp_path / "back"))
    name = "model.layers.2.self_attn.q_proj"
    assert torch.equal(first[f"{name}.weight_packed"], last[f"{name}.weight_packed"])
    assert torch.equal(first[f"{name}.weight_scale"].float().repeat_interleave(4, 1), last[f"{name}.weight_scale"])


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "gemma2"])
@pytest.mark.slow
@pytest.mark.promise
def test_other_families_are_what_llama_cpp_computes(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    packed = _quantized(family(name, tmp_path / "model"), tmp_path / "packed", "int4-g32")
    report = _converted(packed, tmp_path / "out")
    assert report.kept == {}
    assert _worker(tmp_path / "out", capsys)["problems"] == []
    _converted(tmp_path / "out", tmp_path / "back", "transformers")
    assert _worker(tmp_path / "back", capsys)["problems"] == []


def test_mixed_plans_and_float_sites_go_along(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    packed = _quantized(
        model, tmp_path / "packed", "int4-g64", at=("*.v_proj=int8-g32", "lm_head=int8-g128"), keep=("*.0.*.o_proj",)
    )
    report = _converted(packed, tmp_path / "out")
    assert report.kept == {"model.layers.0.self_attn.o_proj": "it is in float in the artefact that was converted"}
    types = {one.name: one.tensor_type.name for one in gguf.GGUFReader(tmp_path / "out" / "model.gguf").tensors}
    assert types["output.weight"] == types["blk.0.attn_v.weight"] == "Q8_0"
    assert types["blk.0.attn_output.weight"] == types["token_embd.weight"] == "BF16"
    assert _worker(tmp_path / "out", capsys)["problems"] == []


def test_scales_that_float16_lacks_are_named_and_may_stay_in_float(packed: Path, tmp_path: Path) -> None:
    mine = Path(shutil.copytree(packed, tmp_path / "mine"))
    tensors = load_file(mine / "model.safetensors")
    tensors[f"{UP}.weight_scale"][3, 1] = 2.0**-30
    save_file(tensors, mine / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        ContainerError, match=f"codes of 1 weights: {UP}: 4 of its 4096 scales are no float16 numbers.*--allow-float"
    ):
        _converted(mine, tmp_path / "out")
    assert tiny.traces(tmp_path) == []
    report = _converted(mine, tmp_path / "out", allow_float=True)
    assert list(report.kept) == [UP]
    kind, weight = _gguf_weight(tmp_path / "out", "blk.1.ffn_up.weight")
    assert kind == "BF16"
    assert float(weight[3, 128:256].abs().max()) <= 8 * 2.0**-30
    record = json.loads((tmp_path / "out" / "pennyweight.json").read_text())
    assert list(record["found"]["conversion"]["kept"]) == [UP]


# ---- to transformers


def test_q4_0_becomes_a_float32_model_with_the_same_weights(
    q4_0: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = _converted(q4_0, tmp_path / "out", "transformers")
    assert set(report.changed.values()) == {"int4-g32-f32 with the codes of q4_0"}
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "float32"
    _, theirs = _gguf_weight(q4_0, "blk.1.ffn_up.weight")
    assert torch.equal(_read_by_compressed_tensors(tmp_path / "out", UP, capsys), theirs)
    found = _worker(tmp_path / "out", capsys)
    assert (found["problems"], found["largest_difference"]) == ([], 0)


def test_mxfp4_needs_no_float32(model: Path, tmp_path: Path) -> None:
    keep = ("model.embed_tokens", "lm_head")
    made = _quantized(model, tmp_path / "made", "mxfp4_ggml", runtime="llama.cpp", keep=keep)
    _converted(made, tmp_path / "out", "transformers")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"


@pytest.mark.parametrize("scheme", ["q6_k", "q3_k", "iq4_xs", "q5_0", "q8_0"])
def test_symmetric_types_go_to_transformers_with_their_embedding_in_float(
    model: Path, tmp_path: Path, scheme: str, capsys: pytest.CaptureFixture[str]
) -> None:
    made = _quantized(model, tmp_path / "made", scheme, runtime="llama.cpp", keep=("lm_head",))
    with pytest.raises(ContainerError, match="codes of 1 weights: model.embed_tokens: transformers and vLLM read"):
        _converted(made, tmp_path / "out", "transformers")
    report = _converted(made, tmp_path / "out", "transformers", allow_float=True)
    assert list(report.kept) == ["model.embed_tokens"]
    found = _worker(tmp_path / "out", capsys)
    assert (found["problems"], found["largest_difference"]) == ([], 0)


def test_types_with_minima_stay_behind_by_name(model: Path, tmp_path: Path) -> None:
    made = _quantized(
        model, tmp_path / "made", "q4_0", runtime="llama.cpp", at=("*.up_proj=q4_k",), keep=("model.embed_tokens",)
    )
    with pytest.raises(ContainerError, match="codes of 2 weights: model.layers.0.mlp.up_proj: .*offsets"):
        _converted(made, tmp_path / "out", "transformers")
    report = _converted(made, tmp_path / "out", "transformers", allow_float=True)
    assert sorted(report.kept) == ["model.layers.0.mlp.up_proj", UP]


def test_vllm_gets_no_weights_that_it_would_round(q4_0: Path, packed: Path, tmp_path: Path) -> None:
    with pytest.raises(ContainerError, match="codes of 14 weights: .* scales are no bfloat16 numbers"):
        _converted(q4_0, tmp_path / "out", "vllm")
    with pytest.raises(ContainerError, match="loads the model in bfloat16, which would round"):
        _converted(q4_0, tmp_path / "out", "vllm", allow_float=True)
    assert _converted(packed, tmp_path / "out", "vllm").verification["codes_wider"] == 0


# ---- records and hostile input


def test_the_record_names_the_source_and_the_bytes_are_always_the_same(packed: Path, tmp_path: Path) -> None:
    for name in ("one", "two"):
        _converted(packed, tmp_path / name)
    assert tiny.digests(tmp_path / "one") == tiny.digests(tmp_path / "two")
    record = json.loads((tmp_path / "one" / "pennyweight.json").read_text())
    original = json.loads((packed / "pennyweight.json").read_text())
    assert record["recipe"]["solver"] == "copied"
    assert record["recipe"]["inputs"]["model.safetensors"] == original["outputs"]["model.safetensors"]
    assert record["plan"]["schemes"][UP] == "q4_0"
    told = record["found"]["conversion"]
    assert told["schemes"][f"{UP}.weight"] == "int4-g128-bf16"
    assert told["recipe"] == original["recipe"]
    # What the sites had lost against the original model is still known.
    assert [(site["name"], site["error"]) for site in record["sites"]] == [
        (site["name"], site["error"]) for site in original["sites"]
    ]
    card = (tmp_path / "one" / "README.md").read_text()
    assert "copied code by code from another container" in card
    assert "from_pretrained" not in card
    config = json.loads((tmp_path / "one" / "config.json").read_text())
    assert "quantization_config" not in config
    assert (tmp_path / "one" / "tokenizer.json").read_bytes() == (packed / "tokenizer.json").read_bytes()


def test_a_writer_that_changes_a_code_is_caught(packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = Gguf.encode

    def off(self: Gguf, site: Any, weight: Any) -> dict[str, torch.Tensor]:
        found = real(self, site, weight)
        if site.name == UP:
            found[site.tensor][5, 7] ^= 0x10
        return found

    monkeypatch.setattr(Gguf, "encode", off)
    with pytest.raises(VerificationError, match=f"{UP}.weight: it is not the weight of the artefact any more"):
        _converted(packed, tmp_path / "out")
    assert tiny.traces(tmp_path) == []


def _act_order(artefact: Path) -> None:
    tensors = load_file(artefact / "model.safetensors")
    tensors[f"{UP}.weight_g_idx"] = (torch.arange(256) % 2).int()
    save_file(tensors, artefact / "model.safetensors", metadata={"format": "pt"})


def _infinite(artefact: Path) -> None:
    tensors = load_file(artefact / "model.safetensors")
    tensors[f"{UP}.weight_scale"][0, 0] = float("inf")
    save_file(tensors, artefact / "model.safetensors", metadata={"format": "pt"})


def _truncated(artefact: Path) -> None:
    raw = (artefact / "model.safetensors").read_bytes()
    (artefact / "model.safetensors").write_bytes(raw[:-1000])


def _broken_record(artefact: Path) -> None:
    (artefact / "pennyweight.json").write_text("{")


def _no_tokenizer(artefact: Path) -> None:
    (artefact / "tokenizer.json").unlink()


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (_act_order, "stored in no scheme"), (_infinite, "scales are no numbers"), (_truncated, "model.safetensors"),
        (_broken_record, "pennyweight.json is damaged"), (_no_tokenizer, "tokenizer"),
    ],
)  # fmt: skip
def test_harmed_artefacts_are_refused_in_a_sentence(
    packed: Path, tmp_path: Path, harm: Callable[[Path], None], message: str
) -> None:
    mine = Path(shutil.copytree(packed, tmp_path / "mine"))
    harm(mine)
    with pytest.raises((ModelError, ContainerError), match=message):
        _converted(mine, tmp_path / "out")
    assert tiny.traces(tmp_path) == []


def test_a_record_of_another_shape_is_no_harm(packed: Path, tmp_path: Path) -> None:
    for number, said in enumerate(("[]", '{"sites": 3}', '{"sites": [{"name": "a", "error": "x"}, 4], "recipe": []}')):
        mine = Path(shutil.copytree(packed, tmp_path / f"mine{number}"))
        (mine / "pennyweight.json").write_text(said)
        assert _converted(mine, tmp_path / f"out{number}").sites == 14


def test_what_cannot_be_converted_at_all(model: Path, packed: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no codes that could be copied"):
        _converted(model, tmp_path / "out")
    with pytest.raises(UsageError, match="--for abacus"):
        _converted(packed, tmp_path / "out", "abacus")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "a").touch()
    with pytest.raises(UsageError, match="not an empty directory"):
        _converted(packed, tmp_path / "full")
    made = _quantized(model, tmp_path / "made", "q4_k", runtime="llama.cpp", keep=("lm_head",))
    with pytest.raises(ContainerError, match="cannot hold any code of this model"):
        _converted(made, tmp_path / "out", "transformers", allow_float=True)
    assert open_checkpoint(packed).stored_bytes
    assert tiny.traces(tmp_path) == []
