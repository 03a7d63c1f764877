"""A GGUF file in, a GGUF file out: what was not quantized is what it was, to the bit."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from pennyweight.core.errors import CheckpointError, ContainerError, DataError, ModelError, ShapeError, UsageError
from pennyweight.evaluate.verify import verify
from pennyweight.models.gguf.fields import FieldValue
from pennyweight.models.gguf.file import read_gguf
from pennyweight.models.gguf.imatrix import Importance, read_imatrix, write_imatrix
from pennyweight.models.gguf.layout import split_layout
from pennyweight.models.gguf.types import BLOCK_TYPES
from pennyweight.pipeline.imatrix import imatrix
from pennyweight.pipeline.options import Options
from pennyweight.pipeline.records import BlockDone
from pennyweight.pipeline.run import quantize
from pennyweight.plan.budget import Budget
from pennyweight.schemes import parse_scheme
from pennyweight.solvers.base import Statistics
from pennyweight.solvers.nearest import Nearest
from tests.pipeline import tiny
from tests.pipeline.gguf_files import BLIND, odd_model, tiny_file, tiny_model

ARCHITECTURES = ("llama", "mamba", "bert", "gemma3n", "not-invented-yet")
CHANGED = {"general.file_type", "general.quantization_version"}
# Nearest to q4_k, q5_0 and q6_k of Gaussian weights: noise below a tenth in amplitude.
LARGEST_ERROR = 0.1


def _fields(path: Path) -> dict[str, tuple[Any, ...]]:
    """By the gguf package's reader: key -> types and the bytes of the value's parts, in order."""
    found = gguf.GGUFReader(path).fields.items()
    return {key: (field.types, [bytes(part) for part in field.parts[2:]]) for key, field in found if key[:4] != "GGUF"}


def _tensors(path: Path) -> dict[str, Any]:
    return {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}


def _decoded(tensor: Any) -> np.ndarray[Any, Any]:
    return np.asarray(gguf.quants.dequantize(tensor.data, tensor.tensor_type), dtype=np.float32)


def _record(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((out / "pennyweight.json").read_text(encoding="utf-8"))
    return found


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_all_metadata_and_all_that_stays_goes_along_to_the_bit(architecture: str, tmp_path: Path) -> None:
    source = odd_model(tmp_path / "odd-f16.gguf", architecture)
    report = quantize(str(source), tmp_path / "out", BLIND)
    before, after = _fields(source), _fields(tmp_path / "out" / "model.gguf")
    assert list(before) == list(after)
    assert {key for key in before if before[key] != after[key]} == CHANGED
    assert read_gguf(tmp_path / "out" / "model.gguf").alignment == 64
    old, new = _tensors(source), _tensors(tmp_path / "out" / "model.gguf")
    assert list(old) == list(new)
    types = {name: new[name].tensor_type.name for name in new if new[name].tensor_type != old[name].tensor_type}
    assert types == {
        "blk.0.ffn_down_exps.weight": "Q4_K", "blk.0.attn_q.weight": "Q4_K", "token_embd.weight": "Q6_K",
        "blk.1.attn_output.weight": "Q5_0", "output.weight": "Q6_K", "blk.1.ffn_down.weight": "Q4_K",
    }  # fmt: skip
    for name in old:
        assert list(old[name].shape) == list(new[name].shape)
        if name not in types:
            assert bytes(old[name].data) == bytes(new[name].data), name
        else:
            w = _decoded(old[name])
            assert np.square(_decoded(new[name]) - w).sum() < LARGEST_ERROR**2 * np.square(w).sum(), name
    assert report.kept == {
        "blk.1.ffn_up": "it is Q8_0 in the file, not one of F32, F16, BF16: it stays as it is",
        "blk.1.ffn_gate": "it is IQ2_XXS in the file, not one of F32, F16, BF16: it stays as it is",
        "blk.1.odd_width": report.kept["blk.1.odd_width"],
    }
    assert "do not divide 33 inputs" in report.kept["blk.1.odd_width"]
    assert report.sites == 8


def test_a_plan_says_what_each_tensor_and_all_experts_of_a_layer_become(tmp_path: Path) -> None:
    source = odd_model(tmp_path / "odd.gguf")
    options = replace(BLIND, at=("blk.0.ffn_down_exps.*=q8_0", "token_embd=q4_0"), keep=("output",))
    quantize(str(source), tmp_path / "out", options)
    types = {name: tensor.tensor_type.name for name, tensor in _tensors(tmp_path / "out" / "model.gguf").items()}
    assert types["blk.0.ffn_down_exps.weight"] == "Q8_0"
    assert (types["token_embd.weight"], types["output.weight"]) == ("Q4_0", "F32")
    with pytest.raises(ContainerError, match="GGUF holds all experts of a layer as one type"):
        quantize(str(source), tmp_path / "no", replace(BLIND, at=("blk.0.ffn_down_exps.1=q8_0",)))
    assert tiny.traces(tmp_path, "no") == []


def test_experts_that_are_kept_stay_in_their_order(tmp_path: Path) -> None:
    source = odd_model(tmp_path / "odd.gguf")
    quantize(str(source), tmp_path / "out", replace(BLIND, keep=("blk.0.ffn_down_exps.*",)))
    name = "blk.0.ffn_down_exps.weight"
    assert bytes(_tensors(tmp_path / "out" / "model.gguf")[name].data) == bytes(_tensors(source)[name].data)


def test_a_split_file_gives_the_same_as_the_whole(tmp_path: Path) -> None:
    whole = odd_model(tmp_path / "odd.gguf")
    file = read_gguf(whole)
    entries = [(name, one.shape, one.type_number, one.size_bytes) for name, one in file.tensors.items()]
    (tmp_path / "split").mkdir()
    parts = split_layout("odd", file.fields, entries, max_file_bytes=8000, alignment=64)
    assert len(parts) > 2
    for part in parts:
        raw = bytearray(part.size_bytes)
        raw[: len(part.header)] = part.header
        for name, position in part.positions.items():
            raw[position : position + file.tensors[name].size_bytes] = bytes(file.tensors[name].read().numpy())
        (tmp_path / "split" / part.file).write_bytes(raw)
    quantize(str(whole), tmp_path / "out", BLIND)
    for number, given in enumerate((tmp_path / "split" / parts[0].file, tmp_path / "split")):
        quantize(str(given), tmp_path / f"out-{number}", BLIND)
        assert (tmp_path / f"out-{number}" / "model.gguf").read_bytes() == (tmp_path / "out/model.gguf").read_bytes()
    with pytest.raises(CheckpointError, match="is part 2 of"):
        quantize(str(tmp_path / "split" / parts[1].file), tmp_path / "no", BLIND)


def _matrix(path: Path, *, legacy: bool) -> dict[str, torch.Tensor]:
    """Importances that differ by a thousand from column to column, of experts each in its own way."""
    torch.manual_seed(1)
    wide, narrow = 10 ** (3 * torch.rand(3, 256)), 10 ** torch.rand(1, 256)
    made = {"blk.0.ffn_down_exps.weight": wide, "blk.0.attn_q.weight": narrow}
    entries = {name: Importance(values, torch.full((len(values),), 512)) for name, values in made.items()}
    write_imatrix(path, entries, dataset="t", chunk_size=512, chunk_count=1, legacy=legacy)
    return made


@pytest.mark.parametrize("legacy", [False, True], ids=["gguf", "dat"])
def test_importances_reach_the_scales_of_each_expert(tmp_path: Path, legacy: bool) -> None:
    source = odd_model(tmp_path / "odd.gguf")
    made = _matrix(tmp_path / "imatrix", legacy=legacy)
    # What a file says: means went through a product and a quotient.
    entries = read_imatrix(tmp_path / "imatrix")
    said = {name: entries[name].values.reshape(values.shape) for name, values in made.items()}
    options = replace(BLIND, calibration=None, importance=str(tmp_path / "imatrix"))
    report = quantize(str(source), tmp_path / "out", options)
    old, new = _tensors(source), _tensors(tmp_path / "out" / "model.gguf")
    scheme = parse_scheme("q4_k")
    for name, importance in made.items():
        assert torch.allclose(importance, said[name])
        matrices = torch.tensor(old[name].data.astype(np.float32)).reshape(len(importance), -1, 256)
        expected = [
            BLOCK_TYPES["Q4_K"].pack(Nearest().solve(w, scheme, Statistics(torch.diag(one))).weight)
            for w, one in zip(matrices, said[name], strict=True)
        ]
        blind = [BLOCK_TYPES["Q4_K"].pack(Nearest().solve(w, scheme, Statistics()).weight) for w in matrices]
        assert bytes(new[name].data) == bytes(torch.cat(expected).numpy())
        assert bytes(new[name].data) != bytes(torch.cat(blind).numpy())
    record = _record(tmp_path / "out")
    assert record["recipe"]["importance"] == "imatrix"
    assert record["recipe"]["inputs"].keys() == {"odd.gguf", "--importance"}
    assert report.fallbacks.keys() == {"blk.1.attn_output", "blk.1.ffn_down", "output"}


def test_an_expert_that_saw_no_token_counts_its_inputs_alike(tmp_path: Path) -> None:
    source = odd_model(tmp_path / "odd.gguf")
    values = torch.rand(3, 256) + 0.1
    entry = Importance(values, torch.tensor([5, 0, 5]))
    entries = {"blk.0.ffn_down_exps.weight": entry}
    write_imatrix(tmp_path / "m", entries, dataset="t", chunk_size=5, chunk_count=1)
    report = quantize(str(source), tmp_path / "out", replace(BLIND, importance=str(tmp_path / "m")))
    assert "saw no tokens" in report.fallbacks["blk.0.ffn_down_exps.1"][0]
    assert "blk.0.ffn_down_exps.0" not in report.fallbacks


@pytest.mark.parametrize(
    ("entries", "error", "message"),
    [
        ({"blk.0.attn_q.weight": (1, 128)}, ShapeError, "blk.0.attn_q.weight: the importance matrix has 128 values"),
        ({"blk.9.attn_q.weight": (1, 256)}, DataError, "has none of the 9 weights of this model"),
    ],
)
def test_a_matrix_of_another_model_is_refused(
    tmp_path: Path, entries: dict[str, tuple[int, int]], error: type[Exception], message: str
) -> None:
    source = odd_model(tmp_path / "odd.gguf")
    made = {name: Importance(torch.ones(shape), torch.ones(shape[0]).long()) for name, shape in entries.items()}
    write_imatrix(tmp_path / "m", made, dataset="t", chunk_size=5, chunk_count=1)
    with pytest.raises(error, match=message):
        quantize(str(source), tmp_path / "out", replace(BLIND, importance=str(tmp_path / "m")))
    assert tiny.traces(tmp_path) == []


def test_a_budget_is_kept_without_running_the_model(tmp_path: Path) -> None:
    source = odd_model(tmp_path / "odd.gguf")
    uniform = quantize(str(source), tmp_path / "uniform", BLIND)
    report = quantize(str(source), tmp_path / "out", replace(BLIND, scheme=None, budget=Budget("bpw", uniform.bpw)))
    assert report.bpw <= uniform.bpw
    assert "the model was not run" in report.notes[0]
    with pytest.raises(UsageError, match="can't be reached"):
        quantize(str(source), tmp_path / "no", replace(BLIND, scheme=None, budget=Budget("bpw", 1.0)))


class _Stop(Exception):
    pass


def test_a_run_ended_early_goes_on_to_the_same_bytes(tmp_path: Path) -> None:
    source = odd_model(tmp_path / "odd.gguf")

    def stop(done: BlockDone) -> None:
        raise _Stop

    with pytest.raises(_Stop):
        quantize(str(source), tmp_path / "out", BLIND, tell=stop)
    assert not (tmp_path / "out").exists()
    assert quantize(str(source), tmp_path / "out", BLIND).resumed_blocks == 1
    quantize(str(source), tmp_path / "whole", BLIND)
    assert tiny.digests(tmp_path / "out") == tiny.digests(tmp_path / "whole")
    assert tiny.traces(tmp_path) == ["out"]


def test_what_needs_data_is_refused_for_a_model_that_cannot_be_run(tmp_path: Path) -> None:
    source = odd_model(tmp_path / "odd.gguf", "not-invented-yet")
    told = quantize(str(source), tmp_path / "out", Options(runtime="llama.cpp")).notes
    assert told[0].startswith("no calibration data was used: transformers cannot run the model: it does not read ")
    for change in ({"solver": "gptq"}, {"calibration": "built-in"}, {"transform": "awq"}):
        with pytest.raises(ModelError, match=f"--{next(iter(change))} .*transformers cannot run the model"):
            quantize(str(source), tmp_path / "no", Options(runtime="llama.cpp", **change))
    for change in ({"runtime": "transformers"}, {"rotate": True, "calibration": "none"}):
        with pytest.raises(UsageError, match="give --for llama.cpp|leave it out"):
            quantize(str(source), tmp_path / "no", Options(**{"runtime": "llama.cpp", **change}))
    assert tiny.traces(tmp_path, "no") == []


def test_a_file_that_is_no_model_is_refused(tmp_path: Path) -> None:
    _matrix(tmp_path / "m.gguf", legacy=False)
    with pytest.raises(CheckpointError, match="does not say general.architecture"):
        quantize(str(tmp_path / "m.gguf"), tmp_path / "out", BLIND)
    (tmp_path / "n.gguf").write_bytes((tmp_path / "m.gguf").read_bytes())
    with pytest.raises(ModelError, match="name the one that you mean"):
        quantize(str(tmp_path), tmp_path / "out", BLIND)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A file that transformers runs too, and what was made of it with calibration."""
    directory = tmp_path_factory.mktemp("runnable")
    file = tiny_file(directory)
    options = Options(scheme="q4_0", runtime="llama.cpp", effort="fast", calibration=(tiny.words(),), samples=8,
                      length=24)  # fmt: skip
    quantize(str(file), directory / "out", options)
    return file, directory / "out"


def test_our_own_calibration_is_used_where_transformers_runs_the_model(runs: tuple[Path, Path]) -> None:
    file, out = runs
    before, after = _fields(file), _fields(out / "model.gguf")
    assert list(before) == list(after)
    assert {key for key in before if before[key] != after[key]} == {"general.file_type"}
    old, new = _tensors(file), _tensors(out / "model.gguf")
    assert list(old) == list(new)
    kept = [name for name in old if old[name].tensor_type == new[name].tensor_type]
    assert len(kept) == 7
    assert all(bytes(old[name].data) == bytes(new[name].data) for name in kept)
    record = _record(out)
    assert (record["recipe"]["solver"], record["recipe"]["calibration"]["samples"]) == ("gptq", 8)
    assert record["notes"] == []
    assert record["recipe"]["inputs"].keys() == {"tiny-f32.gguf"}
    sites = {site["name"]: site for site in record["sites"]}
    assert sites["model.layers.1.mlp.down_proj"]["error"] < sites["model.layers.1.mlp.down_proj"]["error_nearest"]


@pytest.mark.skipif(find_spec("llama_cpp") is None, reason="llama-cpp-python is not installed")
def test_llama_cpp_computes_with_the_weights_that_were_meant(runs: tuple[Path, Path], tmp_path: Path) -> None:
    file, out = runs
    assert verify(out)["verified"] == "full"
    quantize(str(file), tmp_path / "out", replace(BLIND, scheme="q8_0"))
    found = verify(tmp_path / "out")
    assert found["kl_of_runtime"] < 1e-2
    assert found["weights_compared"] == len(_tensors(file))


def test_a_file_that_says_more_than_transformers_understands_is_not_run(
    runs: tuple[Path, Path], tmp_path: Path
) -> None:
    file = read_gguf(runs[0])
    added = {"llama.attention.scale": FieldValue.of(0.5, gguf.GGUFValueType.FLOAT32)}
    entries = [(name, one.shape, one.type_number, one.size_bytes) for name, one in file.tensors.items()]
    [part] = split_layout("odd", {**file.fields, **added}, entries, max_file_bytes=1 << 40)
    data = b"".join(bytes(one.read().numpy()) + bytes(-one.size_bytes % 32) for one in file.tensors.values())
    (tmp_path / "odd.gguf").write_bytes(part.header + data)
    told = quantize(str(tmp_path / "odd.gguf"), tmp_path / "out", Options(scheme="q4_0", runtime="llama.cpp")).notes
    assert told[0].endswith("what it makes of the file does not say llama.attention.scale")


def test_a_gguf_file_can_become_another_container(runs: tuple[Path, Path], tmp_path: Path) -> None:
    options = Options(scheme="int4-g16", calibration="none")
    quantize(str(runs[0]), tmp_path / "out", options)
    assert verify(tmp_path / "out")["verified"] == "full"


def test_a_tiny_model_is_what_its_file_says(tmp_path: Path) -> None:
    """The model and its GGUF file calibrate alike: the same weights, the same text, the same codes."""
    model = tiny_model(tmp_path / "model")
    file = tiny_file(tmp_path, model)
    again = _as_model(model, file, tmp_path / "again")
    options = Options(scheme="q4_0", runtime="llama.cpp", effort="fast", calibration=(tiny.words(),), samples=8,
                      length=24)  # fmt: skip
    quantize(str(file), tmp_path / "from-file", options)
    quantize(str(again), tmp_path / "from-model", options)
    assert _data(tmp_path / "from-file") == _data(tmp_path / "from-model")


def test_importances_mean_the_same_for_a_model_and_its_file(tmp_path: Path) -> None:
    model = tiny_model(tmp_path / "model")
    file = tiny_file(tmp_path, model)
    again = _as_model(model, file, tmp_path / "again")
    imatrix(again, tmp_path / "m", calibration=(tiny.words(),), samples=4, length=24)
    options = Options(scheme="q4_0", runtime="llama.cpp", importance=str(tmp_path / "m"))
    assert not quantize(str(file), tmp_path / "from-file", options).fallbacks
    assert not quantize(str(again), tmp_path / "from-model", options).fallbacks
    assert _data(tmp_path / "from-file") == _data(tmp_path / "from-model")


def _data(out: Path) -> dict[str, bytes]:
    return {name: bytes(tensor.data) for name, tensor in _tensors(out / "model.gguf").items()}


NAMES = {
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj", "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
}  # fmt: skip
ENDS = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight",
        "output.weight": "lm_head.weight"}  # fmt: skip
HEADS = {"attn_q": 4, "attn_k": 2}


def _as_model(model: Path, file: Path, directory: Path) -> Path:
    """The file's weights as a directory for transformers, read by the gguf package; rope's pairs become halves."""
    shutil.copytree(model, directory)
    weights = {}
    for name, tensor in _tensors(file).items():
        w = torch.tensor(np.array(tensor.data))
        if name in ENDS:
            weights[ENDS[name]] = w
            continue
        _, block, kind, _ = name.split(".")
        if kind in HEADS:
            w = w.reshape(HEADS[kind], -1, 2, w.shape[1]).transpose(1, 2).reshape(w.shape)
        weights[f"model.layers.{block}.{NAMES[kind]}.weight"] = w.contiguous()
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    return directory
