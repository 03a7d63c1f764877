"""An uninterrupted run: what it writes, what it says about it, and that it is the same every time."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from pennyweight.containers.compressed_tensors import CompressedTensors
from pennyweight.core.hashing import sha256
from pennyweight.models.base import Site
from pennyweight.pipeline.records import RunReport
from pennyweight.schemes import fit_scales, parse_scheme
from pennyweight.solvers.base import Statistics
from pennyweight.solvers.nearest import Nearest
from tests.pipeline import tiny
from tests.pipeline.tiny import OPTIONS

Done = tuple[Path, RunReport]


def test_the_artefact_loads_in_transformers_with_its_tokenizer(done: Done) -> None:
    out, _ = done
    loaded, info = transformers.AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not any(info.values()), info
    tokenizer = transformers.AutoTokenizer.from_pretrained(out)
    ids = tokenizer("a bee went", return_tensors="pt")["input_ids"]
    assert ids[0, 0] == 256
    with torch.no_grad():
        assert loaded(ids).logits.isfinite().all()
    assert "bee" in tokenizer.apply_chat_template([{"role": "user", "content": "a bee"}], tokenize=False)


def test_everything_that_travels_with_the_weights_is_there_and_nothing_else(model: Path, done: Done) -> None:
    out, _ = done
    carried = {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json", "LICENSE"}
    ours = {"model.safetensors", "config.json", "README.md", "pennyweight.json", "run.json"}
    assert {file.name for file in out.iterdir()} == carried | ours
    assert all((out / name).read_bytes() == (model / name).read_bytes() for name in carried)


def test_the_card_keeps_the_originals_and_says_what_reads_it(done: Done) -> None:
    card = (done[0] / "README.md").read_text()
    assert card.startswith(
        "---\nlicense: mit\ntags:\n- tiny\nquantized_by: pennyweight\n---\n\n# tiny-llama, quantized\n"
    )
    assert "`compressed-tensors` 0.18 or later" in card
    assert card.endswith("# Tiny\n\n- made by a test\n")


def test_sizes_are_exact(model: Path, done: Done) -> None:
    out, report = done
    assert report.size_bytes == sum(file.stat().st_size for file in out.iterdir())
    stored = sum(t.numel() * t.element_size() for t in load_file(out / "model.safetensors").values())
    weights = sum(t.numel() for t in load_file(model / "model.safetensors").values())
    assert report.bpw == round(8 * stored / weights, 4)
    # int4 in groups of 16 with float32 scales, and two int64 of shape for each of the 21 sites.
    assert report.bpw_sites == pytest.approx(4 + 32 / 16, abs=0.1)


def test_tied_weights_are_counted_once_though_stored_twice(tmp_path: Path) -> None:
    single = tiny.llama(tmp_path / "single", tie_word_embeddings=True)
    tensors = load_file(single / "model.safetensors")
    assert "lm_head.weight" not in tensors
    first = tiny.run(single, tmp_path / "first")
    save_file(
        tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()},
        single / "model.safetensors",
        metadata={"format": "pt"},
    )
    second = tiny.run(single, tmp_path / "second")
    extra = tensors["model.embed_tokens.weight"].numel() * 32 / sum(t.numel() for t in tensors.values())
    assert second.bpw == pytest.approx(first.bpw + extra, abs=1e-3)


def test_the_record_is_complete(model: Path, done: Done) -> None:
    out, report = done
    record = json.loads((out / "pennyweight.json").read_text())
    recipe = record["recipe"]
    assert (recipe["scheme"], recipe["solver"], recipe["runtime"]) == ("int4-g16", "gptq", "transformers")
    assert recipe["calibration"]["samples"] == 12
    assert recipe["inputs"]["model.safetensors"] == sha256(model / "model.safetensors")
    assert recipe["trust_remote_code"] is False
    written = {file.name for file in out.iterdir()} - {"pennyweight.json", "run.json"}
    assert record["outputs"] == {name: sha256(out / name) for name in sorted(written)}
    assert len(record["plan"]["schemes"]) == len(record["sites"]) == report.sites == 21
    assert all(0 < site["error"] <= site["error_nearest"] and site["rows"] == 288 for site in record["sites"])
    assert record["fallbacks"] == {}
    assert record["verification"] == {"verified": "none"}
    assert {"pennyweight", "torch", "transformers", "compressed-tensors"} <= record["versions"].keys()
    assert "seconds" not in (out / "pennyweight.json").read_text()


def test_times_and_memory_are_in_run_json_alone(model: Path, tmp_path: Path) -> None:
    found = {"verified": "full", "seconds": 2.5, "peak_memory_bytes": 77}
    report = tiny.run(model, tmp_path / "out", verify=lambda directory: dict(found))
    measured = json.loads((tmp_path / "out" / "run.json").read_text())
    assert (measured["verify_seconds"], measured["verify_peak_memory_bytes"]) == (2.5, 77)
    assert measured["seconds"] == report.seconds > 0
    assert measured["peak_memory_bytes"] == report.peak_memory_bytes > 10**7
    record = json.loads((tmp_path / "out" / "pennyweight.json").read_text())
    assert record["verification"] == {"verified": "full"}


def test_the_bytes_do_not_depend_on_the_threads_or_the_day(model: Path, done: Done, tmp_path: Path) -> None:
    threads = torch.get_num_threads()
    for count in (1, 2, 3):
        try:
            torch.set_num_threads(count)
            tiny.run(model, tmp_path / str(count))
        finally:
            torch.set_num_threads(threads)
        assert tiny.digests(tmp_path / str(count)) == tiny.digests(done[0])


def test_the_seed_draws_other_windows(model: Path, tmp_path: Path, done: Done) -> None:
    tiny.run(model, tmp_path / "out", replace(OPTIONS, seed=1))
    assert tiny.digests(tmp_path / "out")["model.safetensors"] != tiny.digests(done[0])["model.safetensors"]


def test_a_data_free_run_needs_no_tokenizer_and_rounds_to_nearest(model: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("config.json", "model.safetensors"):
        (bare / name).write_bytes((model / name).read_bytes())
    report = tiny.run(bare, tmp_path / "out", replace(OPTIONS, solver="nearest", calibration="none"))
    assert report.sites == 21
    record = json.loads((tmp_path / "out" / "pennyweight.json").read_text())
    assert record["recipe"]["calibration"] is None
    assert all(site["error"] == site["error_nearest"] and site["rows"] == 0 for site in record["sites"])


@pytest.mark.parametrize("solver", ["nearest", "gptq"])
def test_the_fit_of_scales_is_the_one_asked_for(model: Path, tmp_path: Path, solver: str) -> None:
    for fit in ("minmax", "search"):
        tiny.run(model, tmp_path / fit, replace(OPTIONS, solver=solver, fit=fit))
    minmax, search = (load_file(tmp_path / fit / "model.safetensors") for fit in ("minmax", "search"))
    name = "model.layers.0.self_attn.q_proj.weight"
    scheme = parse_scheme("int4-g16").with_scale_dtype(torch.float32)
    expected = fit_scales(load_file(model / "model.safetensors")[name], scheme, fit="minmax").scales
    assert torch.equal(minmax[f"{name}_scale"], expected)
    assert not torch.equal(minmax[f"{name}_scale"], search[f"{name}_scale"])


def test_data_free_codes_are_those_of_the_solver_alone(model: Path, tmp_path: Path) -> None:
    tiny.run(model, tmp_path / "out", replace(OPTIONS, solver="nearest", calibration="none", fit="minmax"))
    name = "model.layers.1.mlp.down_proj"
    w = load_file(model / "model.safetensors")[f"{name}.weight"]
    scheme = parse_scheme("int4-g16").with_scale_dtype(torch.float32)
    expected = Nearest("minmax").solve(w, scheme, Statistics()).weight
    site = Site(name, (w.shape[0], w.shape[1]), 1, "linear", f"{name}.weight")
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(tensors[key], value) for key, value in CompressedTensors().encode(site, expected).items())


def test_each_block_is_calibrated_on_the_outputs_of_the_quantized_ones(model: Path, tmp_path: Path) -> None:
    """The recorded errors of block 1 follow from the written block 0: they change with its width."""

    def errors(scheme: str) -> list[float]:
        records = {}
        tiny.run(model, tmp_path / scheme, replace(OPTIONS, scheme=scheme), tell=lambda d: records.update({d.index: d}))
        return [record.error_nearest for record in records[1].sites]

    nearly_exact, coarse = errors("int8-g16"), errors("int2-g16")
    assert all(math.isfinite(error) for error in nearly_exact + coarse)
    assert nearly_exact != coarse


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_scales_take_the_type_that_the_model_is_loaded_in(tmp_path: Path, dtype: torch.dtype) -> None:
    source = tiny.llama(tmp_path / "model", dtype=dtype)
    tiny.run(source, tmp_path / "out")
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        assert file.get_tensor("model.layers.0.self_attn.q_proj.weight_scale").dtype == dtype
        assert file.get_tensor("model.norm.weight").dtype == dtype


def test_a_config_without_a_type_gets_the_one_that_the_scales_were_rounded_for(tmp_path: Path) -> None:
    source = tiny.llama(tmp_path / "model", dtype=torch.bfloat16)
    config = json.loads((source / "config.json").read_text())
    config.pop("dtype", None)
    config.pop("torch_dtype", None)
    (source / "config.json").write_text(json.dumps(config))
    tiny.run(source, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"


def test_a_sharded_model_becomes_one_file_without_the_old_index(model: Path, tmp_path: Path, done: Done) -> None:
    sharded = tmp_path / "sharded"
    loaded = transformers.AutoModelForCausalLM.from_pretrained(model)
    loaded.save_pretrained(sharded, max_shard_size="60KB")
    tiny.byte_tokenizer().save_pretrained(sharded)
    assert (sharded / "model.safetensors.index.json").exists()
    tiny.run(sharded, tmp_path / "out")
    assert not (tmp_path / "out" / "model.safetensors.index.json").exists()
    one, other = (load_file(path / "model.safetensors") for path in (tmp_path / "out", done[0]))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_odd_paths_are_paths(model: Path, tmp_path: Path) -> None:
    odd = tmp_path / "ein Modell, größer als 名前"
    odd.symlink_to(model)
    report = tiny.run(odd, tmp_path / "aus gabe ñ")
    assert Path(report.out) == tmp_path / "aus gabe ñ"
    assert (tmp_path / "aus gabe ñ" / "model.safetensors").exists()


def test_an_empty_directory_may_be_written_to(model: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    tiny.run(model, tmp_path / "out")
    assert (tmp_path / "out" / "config.json").exists()
    assert tiny.traces(tmp_path) == ["out"]


def test_settings_of_a_former_quantization_and_modules_of_an_embedder(model: Path, tmp_path: Path) -> None:
    source = tmp_path / "model"
    source.mkdir()
    for file in model.iterdir():
        (source / file.name).write_bytes(file.read_bytes())
    (source / "quantize_config.json").write_text("{}")
    (source / "1_Pooling").mkdir()
    (source / "1_Pooling" / "config.json").write_text('{"pooling_mode_mean_tokens": true}')
    report = tiny.run(source, tmp_path / "out")
    assert not (tmp_path / "out" / "quantize_config.json").exists()
    assert "mean_tokens" in (tmp_path / "out" / "1_Pooling" / "config.json").read_text()
    files = [file for file in (tmp_path / "out").rglob("*") if file.is_file()]
    assert report.size_bytes == sum(file.stat().st_size for file in files)
    assert "1_Pooling/config.json" in json.loads((tmp_path / "out" / "pennyweight.json").read_text())["outputs"]


def test_a_model_can_be_calibrated_on_what_it_writes_itself(model: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(model / name, bare)
    report = tiny.run(bare, tmp_path / "out", replace(OPTIONS, calibration="self"))
    recipe = json.loads((tmp_path / "out" / "pennyweight.json").read_text())["recipe"]
    assert (recipe["calibration"]["source"], recipe["calibration"]["samples"]) == ("self", 12)
    assert report.fallbacks == {}
