"""A quantized output head: its codes from first principles, read by transformers, resumed, and left alone."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from pennyweight.core.errors import ContainerError, UsageError, WeightError
from pennyweight.core.parallel import one_thread_per_operation
from pennyweight.evaluate.inventory import inventory
from pennyweight.evaluate.proved import quantize
from pennyweight.models import text
from pennyweight.models.streamed import StreamedModel
from pennyweight.pipeline import rows
from pennyweight.pipeline.prepare import prepare
from pennyweight.pipeline.records import BlockDone
from pennyweight.schemes import parse_scheme
from pennyweight.solvers.base import Statistics
from pennyweight.solvers.gptq import Gptq
from pennyweight.solvers.qronos import Qronos
from tests.pipeline import tiny
from tests.pipeline.tiny import OPTIONS, VOCABULARY

WITH_HEAD = replace(OPTIONS, at=("lm_head=int8-g16",))
BLOCKS = 3
# A Hessian that was summed by another library moves few codes, each to a neighbour.
SAME_CODES = 0.995


class _Stop(Exception):
    pass


def quantization_config(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((out / "config.json").read_text())["quantization_config"]
    return found


def head_inputs(path: Path, windows: Tensor) -> Tensor:
    """What the head of the model in `path` is given, by transformers, float64 [tokens, width]."""
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    seen: list[Tensor] = []
    model.lm_head.register_forward_pre_hook(lambda module, args: seen.append(args[0].detach()))
    with torch.no_grad():
        for ids in text.batches(windows):
            model(input_ids=ids)
    return torch.cat([x.flatten(0, 1) for x in seen]).double()


@pytest.mark.parametrize(("solver", "name"), [(Gptq(), "gptq"), (Qronos(), "qronos")])
def test_codes_are_those_of_the_solver_on_what_both_models_give_the_head(
    model: Path, tmp_path: Path, solver: Gptq | Qronos, name: str
) -> None:
    options = replace(OPTIONS, at=("lm_head=int4-g16",), solver=name)
    job = prepare(str(model), options, None)
    assert job.windows is not None
    out = tmp_path / "out"
    tiny.run(model, out, options)
    x, original = head_inputs(out, job.windows), head_inputs(model, job.windows)
    stats = Statistics((x.T @ x / len(x)).float(), (original.T @ x / len(x)).float())
    w = load_file(model / "model.safetensors")["lm_head.weight"]
    with one_thread_per_operation():
        expected = solver.solve(w, parse_scheme("int4-g16-f32"), stats).weight
        float_stats = Statistics((original.T @ original / len(x)).float(), stats.cross)
        blind = solver.solve(w, parse_scheme("int4-g16-f32"), float_stats).weight
    site = job.model.head
    assert site is not None
    stored = load_file(out / "model.safetensors")
    parts = {key: value for key, value in stored.items() if key.startswith("lm_head.")}
    found = job.container.decode(site, job.plan.schemes["lm_head"], parts)
    same = (found.codes == expected.codes).float().mean()
    assert same >= SAME_CODES
    # The stream of the original would have given others.
    assert (found.codes == blind.codes).float().mean() < same - 0.02


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("scheme", "head", "targets"),
    [
        ("int4-g16", "int8-g16", ["lm_head"]),
        ("int4-g16", "int4-g16", ["Linear"]),
        ("int8-g16", "int8-g16", ["Linear"]),
        ("int4-g16-asym", "int4-g16-asym", ["Linear"]),
    ],
)
def test_transformers_computes_with_our_weights(
    tmp_path: Path, dtype: torch.dtype, scheme: str, head: str, targets: list[str]
) -> None:
    source = tiny.llama(tmp_path / "model", dtype=dtype)
    report = quantize(
        source,
        tmp_path / "out",
        scheme=scheme,
        at=[f"lm_head={head}"],
        effort="fast",
        calibration=(tiny.words(),),
        samples=8,
    )
    assert report.verified == "full"
    assert report.verification["largest_difference"] == 0
    assert (report.sites, report.kept, report.changed) == (22, {}, {})
    config = quantization_config(tmp_path / "out")
    assert config["ignore"] == []
    assert list(config["config_groups"].values())[-1]["targets"] == targets
    assert "lm_head.weight" not in load_file(tmp_path / "out" / "model.safetensors")
    # The same by hand: the runtime's logits, and those of the weights as we decode them.
    ours = StreamedModel(tmp_path / "out")
    theirs: Any = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    ids = torch.arange(20)[None]
    with torch.no_grad():
        theirs(input_ids=ids)
    assert torch.equal(theirs.lm_head.weight.float(), ours.weights.read("lm_head.weight"))


def test_sizes_count_the_head(model: Path, tmp_path: Path, done: tuple[Path, Any]) -> None:
    report = tiny.run(model, tmp_path / "out", WITH_HEAD)
    blocks = 21 * [parse_scheme("int4-g16-f32")]
    shapes = [site.shape for site in StreamedModel(model).sites]
    schemes = [*blocks, parse_scheme("int8-g16-f32")]
    bits = sum(scheme.storage_bits(shape) for scheme, shape in zip(schemes, shapes, strict=True))
    assert report.bpw_sites == pytest.approx(bits / sum(out * inputs for out, inputs in shapes), abs=1e-4)
    saved = 8 * (4 * VOCABULARY * 32) - parse_scheme("int8-g16-f32").storage_bits((VOCABULARY, 32)) - 8 * 16
    weights = inventory(str(model)).weights
    assert report.bpw == pytest.approx(done[1].bpw - saved / weights, abs=1e-3)


def test_without_the_option_the_head_stays_as_it_is_and_nobody_is_alarmed(model: Path, done: tuple[Path, Any]) -> None:
    out, report = done
    assert (report.sites, report.kept, report.fallbacks) == (21, {}, {})
    assert quantization_config(out)["ignore"] == ["lm_head"]
    before, after = (load_file(path / "model.safetensors") for path in (model, out))
    assert torch.equal(before["lm_head.weight"], after["lm_head.weight"])


def test_the_head_changes_nothing_in_the_blocks(model: Path, tmp_path: Path, done: tuple[Path, Any]) -> None:
    tiny.run(model, tmp_path / "out", WITH_HEAD)
    without, with_head = (load_file(path / "model.safetensors") for path in (done[0], tmp_path / "out"))
    shared = [name for name in without if name != "lm_head.weight"]
    assert set(with_head) - set(shared) == {f"lm_head.weight_{part}" for part in ("packed", "scale", "shape")}
    assert all(torch.equal(without[name], with_head[name]) for name in shared)


def test_it_is_told_recorded_and_said_in_the_card(model: Path, tmp_path: Path) -> None:
    told: list[BlockDone] = []
    tiny.run(model, tmp_path / "out", WITH_HEAD, tell=told.append)
    assert [(one.index, one.total) for one in told] == [(index, BLOCKS + 1) for index in range(BLOCKS + 1)]
    [record] = told[-1].sites
    assert (record.name, record.scheme, record.notes) == ("lm_head", "int8-g16-f32", ())
    assert record.rows == OPTIONS.samples * OPTIONS.length
    assert record.error > 0
    found = json.loads((tmp_path / "out" / "pennyweight.json").read_text())
    assert found["recipe"]["plan"]["lm_head"] == "int8-g16-f32"
    assert found["plan"]["schemes"]["lm_head"] == "int8-g16-f32"
    assert found["sites"][-1]["name"] == "lm_head"
    assert "`int4-g16-f32` and `int8-g16-f32`" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize("block", [BLOCKS - 1, BLOCKS])
@pytest.mark.parametrize("changes", [{}, {"solver": "qronos"}, {"solver": "nearest", "calibration": "none"}])
def test_a_run_ended_before_or_after_the_head_goes_on_to_the_same_bytes(
    model: Path, tmp_path: Path, block: int, changes: dict[str, Any]
) -> None:
    options = replace(WITH_HEAD, **changes)
    tiny.run(model, tmp_path / "whole", options)

    def stop(done: BlockDone) -> None:
        if done.index == block:
            raise _Stop

    with pytest.raises(_Stop):
        tiny.run(model, tmp_path / "out", options, tell=stop)
    assert tiny.run(model, tmp_path / "out", options).resumed_blocks == block + 1
    assert tiny.digests(tmp_path / "out") == tiny.digests(tmp_path / "whole")


def test_a_run_ended_while_the_head_was_solved_goes_on_to_the_same_bytes(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: object) -> None:
        raise _Stop

    tiny.run(model, tmp_path / "whole", WITH_HEAD)
    with monkeypatch.context() as patched:
        patched.setattr("pennyweight.pipeline.blocks.solve_by_rows", fail)
        with pytest.raises(_Stop):
            tiny.run(model, tmp_path / "out", WITH_HEAD)
    assert tiny.run(model, tmp_path / "out", WITH_HEAD).resumed_blocks == BLOCKS
    assert tiny.digests(tmp_path / "out") == tiny.digests(tmp_path / "whole")


# Qronos's targets are products, whose last bits depend on their number of rows.
@pytest.mark.parametrize("solver", ["gptq", "nearest"])
def test_rows_are_solved_part_after_part_to_the_same_codes(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, solver: str
) -> None:
    options = replace(WITH_HEAD, solver=solver, calibration=OPTIONS.calibration)
    tiny.run(model, tmp_path / "whole", options)
    monkeypatch.setattr(rows, "_LARGE_PART", 50 * 32)
    read: list[slice | None] = []
    original = rows.stored_matrix
    monkeypatch.setattr(rows, "stored_matrix", lambda *args: read.append(args[2]) or original(*args))
    tiny.run(model, tmp_path / "parts", options)
    assert read == [slice(start, min(start + 50, VOCABULARY)) for start in range(0, VOCABULARY, 50)]
    one, other = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "parts"))
    assert one == other


def test_the_loss_weighs_the_tokens_of_the_head_too(model: Path, tmp_path: Path) -> None:
    notes = {}
    for is_aware in (False, True):
        out = tmp_path / str(is_aware)
        notes[is_aware] = tiny.run(model, out, replace(WITH_HEAD, loss_aware=is_aware)).fallbacks
    assert notes == {False: {}, True: {}}
    scales = [load_file(tmp_path / name / "model.safetensors")["lm_head.weight_packed"] for name in ("False", "True")]
    assert not torch.equal(*scales)


def test_damaged_weights_of_the_head_are_named(model: Path, tmp_path: Path) -> None:
    source = tiny.llama(tmp_path / "model")
    tensors = load_file(source / "model.safetensors")
    tensors["lm_head.weight"][7, 3] = torch.nan
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(WeightError, match=r"lm_head\.weight: 1 of"):
        tiny.run(source, tmp_path / "out", WITH_HEAD)
    assert tiny.traces(tmp_path) == []


@pytest.mark.promise
def test_a_tied_head_can_be_quantized_once_a_rotation_has_untied_it(tmp_path: Path) -> None:
    source = tiny.llama(tmp_path / "model", tie_word_embeddings=True)
    tensors = load_file(source / "model.safetensors")
    tensors["model.norm.weight"] = torch.linspace(0.5, 1.5, 32)
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        UsageError, match=r"--at lm_head=int8-g16: lm_head shares its weight with model.embed_tokens.weight"
    ):
        tiny.run(source, tmp_path / "out", WITH_HEAD)
    report = quantize(
        source, tmp_path / "out", scheme="int4-g16", at=["lm_head=int8-g16"], effort="fast", rotate=True, recover=True,
        calibration=(tiny.words(2000),), length=24,
    )  # fmt: skip
    assert (report.verified, report.sites) == ("full", 22)
    assert report.verification["largest_difference"] == 0


def test_what_cannot_be_is_refused_with_a_reason(model: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is not the name of a scheme"):
        replace(OPTIONS, at=("lm_head=int99",)).check()
    with pytest.raises(ContainerError, match="lm_head cannot be int8-g16-f32: lm_head: vLLM reads"):
        tiny.run(model, tmp_path / "out", replace(WITH_HEAD, scheme="int4-g32", runtime="vllm"))
    with pytest.raises(ContainerError, match="zero points only by decoding every layer with one and the same scheme"):
        tiny.run(model, tmp_path / "out", replace(WITH_HEAD, scheme="int4-g16-asym"))
    assert tiny.traces(tmp_path) == []


def test_an_encoder_has_no_head_to_quantize(tmp_path: Path) -> None:
    config = transformers.BertConfig(vocab_size=VOCABULARY, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                                     num_attention_heads=4, max_position_embeddings=64)  # fmt: skip
    source = tiny.save(transformers.BertModel, config, tmp_path / "model")
    with pytest.raises(UsageError, match="--at lm_head=int8-g16: BertModel has no output head"):
        tiny.run(source, tmp_path / "out", WITH_HEAD)
