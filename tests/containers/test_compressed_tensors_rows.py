"""What transformers really loads: each row of the table in reference/runtimes.md, 5.11, against the installed version.

Rows that work are opened and compared with the decoded weights, difference 0. Rows that do not are refused by
`why_not` or `why_not_plan`, and written by force to see that transformers still fails: the day that one of these
tests breaks, the rule can go.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from pennyweight.models.base import Site
from pennyweight.schemes import parse_scheme
from tests.containers import artefacts
from tests.containers.artefacts import (
    CONTAINER,
    LINEARS,
    LLAMA,
    Outcome,
    Source,
    outcome,
    quantize_nearest,
    save,
    write,
)

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")

Rules = dict[str, str | None] | str


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Tensors this small only lose time to a second thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Source]:
    @cache
    def built(name: str, **changes: Any) -> Source:
        source: Source = getattr(artefacts, name)(tmp_path_factory.mktemp(name), **changes)
        return source

    return built


def refusal(src: Source, rules: Rules, *, runtime: str = "transformers") -> str | None:
    """What `why_not` says of the first site that it refuses, else what `why_not_plan` says."""
    plan = src.plan(rules)
    for site in src.sites:
        if site.name in plan.schemes and (reason := CONTAINER.why_not(plan.schemes[site.name], site, runtime=runtime)):
            return reason
    return CONTAINER.why_not_plan(plan, src.sites, src.facts, runtime=runtime)


def opened(src: Source, rules: Rules, tmp_path: Path, **overrides: Any) -> Outcome:
    return outcome(src, write(src, src.plan(rules), tmp_path / "out", **overrides))


def check_equal(src: Source, rules: Rules, tmp_path: Path) -> None:
    assert refusal(src, rules) is None
    found = opened(src, rules, tmp_path)
    assert found.is_equal, found


BITS = [f"int{bits}-g32" for bits in range(2, 9)]


@pytest.mark.parametrize("scheme", [*BITS, "int4-channel", "int5-channel", "int8-tensor", "int3-g1"])
def test_symmetric_with_one_scheme_is_equal(scheme: str, build: Callable[..., Source], tmp_path: Path) -> None:
    check_equal(build("llama"), scheme, tmp_path)


@pytest.mark.parametrize("scheme", [*(f"{name}-asym" for name in BITS), "int3-channel-asym", "int4-tensor-asym"])
def test_asymmetric_with_one_scheme_is_equal_because_the_config_says_dequantize(
    scheme: str, build: Callable[..., Source], tmp_path: Path
) -> None:
    src = build("llama")
    check_equal(src, scheme, tmp_path)
    assert CONTAINER.config(src.plan(scheme), src.sites, src.facts, runtime="transformers")["dequantize"] is True


def test_asymmetric_without_dequantize_still_fails(build: Callable[..., Source], tmp_path: Path) -> None:
    found = opened(build("llama"), "int4-g32-asym", tmp_path, dequantize=False)
    assert found.difference is None
    assert "mismatched_sizes" in found.error


@pytest.mark.parametrize("scheme", ["int3-channel", "int3-channel-asym", "int7-g6", "int5-g30-asym"])
def test_sizes_that_fill_no_word_are_equal(scheme: str, build: Callable[..., Source], tmp_path: Path) -> None:
    src = build("llama", hidden_size=60, intermediate_size=90, num_attention_heads=2, num_key_value_heads=1)
    check_equal(src, scheme, tmp_path)


@pytest.mark.parametrize(
    "rules",
    [
        {"down": "int8-channel", "": "int4-g32"},
        {r"layers\.0": "int3-g32", "": "int4-g32"},
        {r"layers\.0.*(q|k)_proj": "int2-g16", r"layers\.1.*o_proj": None, "mlp": "int8-tensor", "": "int5-channel"},
        {r"layers\.0": None, "": "int4-g32"},
    ],
)
def test_different_symmetric_schemes_and_kept_layers_are_equal(
    rules: Rules, build: Callable[..., Source], tmp_path: Path
) -> None:
    check_equal(build("llama"), rules, tmp_path)


MIXED_WITH_ZEROS: Rules = {r"layers\.0": "int3-g32-asym", "": "int4-g32-asym"}


def test_different_asymmetric_schemes_are_refused(build: Callable[..., Source]) -> None:
    said = refusal(build("llama"), MIXED_WITH_ZEROS)
    assert said is not None
    assert "int3-g32-asym-f32 and int4-g32-asym-f32 given" in said
    assert "one scheme for all layers" in said
    assert refusal(build("llama"), {"down": "int4-g32-asym", "": "int4-g32"}) is not None


def test_different_schemes_with_dequantize_are_still_wrong_without_a_word(
    build: Callable[..., Source], tmp_path: Path
) -> None:
    found = opened(build("llama"), {r"layers\.0": "int3-g32", "": "int4-g32"}, tmp_path, dequantize=True)
    assert not found.is_equal
    # The first scheme needs fewer words than the others store, so nothing is reported: not an error, not a key.
    assert found.difference is not None
    assert found.keys_are_right


def test_different_asymmetric_schemes_still_fail(build: Callable[..., Source], tmp_path: Path) -> None:
    assert not opened(build("llama"), MIXED_WITH_ZEROS, tmp_path / "a", dequantize=True).is_equal
    assert not opened(build("llama"), MIXED_WITH_ZEROS, tmp_path / "b").is_equal


# ---- small floats

FLOATS = ["fp8_e4m3-channel", "fp8_e4m3-tensor", "mxfp8", "mxfp4", "nvfp4"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("scheme", FLOATS)
def test_small_floats_are_equal(scheme: str, dtype: torch.dtype, build: Callable[..., Source], tmp_path: Path) -> None:
    check_equal(build("llama", dtype=dtype), scheme, tmp_path)


@pytest.mark.parametrize(
    "rules",
    [
        {"down": "mxfp4", r"layers\.1.*o_proj": None, "": "int4-g32"},
        {"down": "nvfp4", "q_proj": "mxfp8", "k_proj": "fp8_e4m3-channel", "o_proj": "mxfp4", "": "int3-channel"},
    ],
)
def test_small_floats_beside_integers_are_equal(rules: Rules, build: Callable[..., Source], tmp_path: Path) -> None:
    check_equal(build("llama", dtype=torch.bfloat16), rules, tmp_path)


def test_what_decodes_to_bfloat16_is_refused_beside_others_in_another_model_and_still_fails(
    build: Callable[..., Source], tmp_path: Path
) -> None:
    rules: Rules = {"down": "mxfp4", "": "int4-g32"}
    said = refusal(build("llama"), rules)
    assert said is not None
    assert "decodes it to bfloat16" in said
    assert not opened(build("llama"), rules, tmp_path).is_equal


@pytest.mark.parametrize("scheme", ["fp8_e4m3-channel", "fp8_e4m3-tensor"])
def test_experts_of_plain_fp8_are_equal(scheme: str, build: Callable[..., Source], tmp_path: Path) -> None:
    check_equal(build("mixtral"), scheme, tmp_path)


@pytest.mark.parametrize("scheme", ["mxfp8", "mxfp4", "nvfp4"])
def test_experts_of_other_small_floats_are_refused_and_still_fail(
    scheme: str, build: Callable[..., Source], tmp_path: Path
) -> None:
    said = refusal(build("mixtral"), {r"\.experts": scheme, "": "fp8_e4m3-channel"})
    assert said is not None
    assert "decodes experts as packed integers or plain fp8 only" in said
    assert not opened(build("mixtral"), {r"\.experts": scheme, "": "fp8_e4m3-channel"}, tmp_path).is_equal


# ---- embeddings and heads


@pytest.mark.parametrize("tied", [False, True])
def test_a_quantized_embedding_still_fails_without_dequantize(
    tied: bool, build: Callable[..., Source], tmp_path: Path
) -> None:
    src = build("llama", sites=f"{LINEARS}|embed_tokens", tie_word_embeddings=tied)
    config = CONTAINER.config(src.plan("int4-g32"), src.sites, src.facts, runtime="transformers")
    config["config_groups"]["group_0"]["targets"] = ["Linear", "Embedding"]
    groups = {"config_groups": config["config_groups"]}
    assert opened(src, "int4-g32", tmp_path / "plain", **groups).difference is None
    assert opened(src, "int4-g32", tmp_path / "decoded", **groups, dequantize=True).is_equal
    assert not CONTAINER.takes_embeddings
    said = CONTAINER.why_not(parse_scheme("int4-g32-bf16"), Site("embed", (8, 32), -1, "embedding", "embed.weight"),
                             runtime="transformers")  # fmt: skip
    assert said is not None
    assert "read a quantized embedding wrongly" in said


HEADS: list[Rules] = [
    "int4-g32",
    "int8-g32",
    "int4-g32-asym",
    "fp8_e4m3-channel",
    "nvfp4",
    {"lm_head": "int8-channel", "": "int4-g32"},
    {"lm_head": "int8-g64", "down": None, "": "int3-g32"},
    {"lm_head": "fp8_e4m3-channel", "": "int4-g32"},
    {"lm_head": "int6-g16", "": None},
]


@pytest.mark.parametrize("rules", HEADS)
def test_an_untied_head_is_equal(rules: Rules, build: Callable[..., Source], tmp_path: Path) -> None:
    check_equal(build("llama", sites=f"{LINEARS}|lm_head"), rules, tmp_path)


@pytest.mark.parametrize("rules", ["int4-g32", {"lm_head": "int8-channel", "": "int4-g32"}])
def test_the_head_of_a_model_of_experts_is_equal(rules: Rules, build: Callable[..., Source], tmp_path: Path) -> None:
    src = build("mixtral")
    sites = (*src.sites, Site("lm_head", (64, 64), 2, "head", "lm_head.weight"))
    check_equal(replace(src, sites=sites), rules, tmp_path)


def test_a_head_in_float_is_ignored_and_a_packed_one_is_not(build: Callable[..., Source]) -> None:
    src = build("llama", sites=f"{LINEARS}|lm_head")
    for rules, ignored in (({"lm_head": None, "": "int4-g32"}, ["lm_head"]), ("int4-g32", [])):
        plan = src.plan(rules)
        assert CONTAINER.config(plan, src.sites, src.facts, runtime="transformers")["ignore"] == ignored


def test_vllm_is_not_given_a_packed_head(build: Callable[..., Source]) -> None:
    src = build("llama", sites=f"{LINEARS}|lm_head")
    assert "lm_head: vLLM reads a packed output head" in str(refusal(src, "int4-g32", runtime="vllm"))
    assert refusal(src, {"lm_head": None, "": "int4-g32"}, runtime="vllm") is None


@pytest.mark.parametrize("scheme", ["int4-g32", "int8-channel"])
def test_a_packed_head_that_the_config_still_ties_fails(
    scheme: str, build: Callable[..., Source], tmp_path: Path
) -> None:
    """Why a head is no site where the config ties it, whatever the checkpoint holds."""
    src = build("llama", sites=f"{LINEARS}|lm_head")
    artefact = write(src, src.plan(scheme), tmp_path / "out")
    config = json.loads((artefact.directory / "config.json").read_text()) | {"tie_word_embeddings": True}
    (artefact.directory / "config.json").write_text(json.dumps(config))
    found = outcome(src, artefact)
    assert found.difference is None
    assert "has no attribute `weight`" in found.error


@pytest.mark.parametrize("rules", ["int4-g32", "int4-g32-asym"])
def test_a_tied_head_in_float_is_equal(rules: Rules, build: Callable[..., Source], tmp_path: Path) -> None:
    check_equal(build("llama", tie_word_embeddings=True), rules, tmp_path)


# ---- experts


@pytest.mark.parametrize("model", ["qwen2_moe", "mixtral"])
@pytest.mark.parametrize(
    "rules", ["int4-g32", "int3-channel", {r"\.experts": "int3-g32", "": "int4-g32"}, {r"\.experts": "int8-g32"}]
)
def test_symmetric_experts_with_one_scheme_are_equal(
    model: str, rules: Rules, build: Callable[..., Source], tmp_path: Path
) -> None:
    check_equal(build(model), rules, tmp_path)


BROKEN_EXPERTS: dict[str, tuple[Rules, str]] = {
    "asymmetric": ("int4-g32-asym", "without zero points"),
    "other bits in another layer": ({r"layers\.0.*\.experts": "int3-g32", "": "int4-g32"}, "one scheme"),
    "other groups in another layer": ({r"layers\.0.*\.experts": "int4-g16", "": "int4-g32"}, "one scheme"),
    "other bits in one projection": ({r"\.experts.*(down_proj|w2)": "int8-g32", "": "int4-g32"}, "one scheme"),
    "one expert in float": ({r"layers\.0.*\.experts\.2": None, "": "int4-g32"}, "stays in float"),
    "one layer in float": ({r"layers\.0.*\.experts": None, "": "int4-g32"}, "stays in float"),
    "one projection in float": ({r"\.experts.*(down_proj|w2)": None, "": "int4-g32"}, "stays in float"),
    "all in float": ({r"\.experts": None, "": "int4-g32"}, "stays in float"),
    "all in float beside zero points": ({r"\.experts": None, "": "int4-g32-asym"}, "stays in float"),
}


@pytest.mark.parametrize("model", ["qwen2_moe", "mixtral"])
@pytest.mark.parametrize("case", BROKEN_EXPERTS)
def test_experts_that_transformers_cannot_read_are_refused_and_still_fail(
    model: str, case: str, build: Callable[..., Source], tmp_path: Path
) -> None:
    rules, word = BROKEN_EXPERTS[case]
    said = refusal(build(model), rules)
    assert said is not None
    assert word in said
    found = opened(build(model), rules, tmp_path)
    assert not found.is_equal
    if "other bits" in case:
        assert found.keys_are_right, "wrong weights, silently"


@pytest.mark.parametrize("rules", ["int4-g32", "int4-g32-asym"])
def test_experts_stored_as_one_tensor_may_stay_in_float(
    rules: Rules, build: Callable[..., Source], tmp_path: Path
) -> None:
    check_equal(build("granite_moe"), rules, tmp_path)


@pytest.mark.parametrize("decodes", [False, True])
def test_packed_slices_of_experts_stored_as_one_tensor_are_refused_and_still_fail(
    decodes: bool, build: Callable[..., Source], tmp_path: Path
) -> None:
    src = build("granite_moe")
    plan = src.plan("int4-g32")
    scheme = next(iter(plan.schemes.values()))
    tensors, decoded = dict(src.tensors), dict(src.tensors)
    for name in [name for name, tensor in src.tensors.items() if tensor.ndim == 3]:
        slices = [quantize_nearest(w, scheme) for w in tensors.pop(name)]
        decoded[name] = torch.stack([weight.dequantize() for weight in slices])
        for index, weight in enumerate(slices):
            site = Site(f"{name.removesuffix('.weight')}.{index}", weight.shape, 0, "expert", name, index=index)
            said = CONTAINER.why_not(scheme, site, runtime="transformers")
            assert said is not None
            assert "keeps its experts together" in said
            tensors.update(CONTAINER.encode(site, weight))
    for site in src.sites:
        weight = quantize_nearest(tensors.pop(site.tensor), scheme)
        tensors.update(CONTAINER.encode(site, weight))
        decoded[site.tensor] = weight.dequantize()
    config = CONTAINER.config(plan, src.sites, src.facts, runtime="transformers") | {"dequantize": decodes}
    found = outcome(src, save(src, tensors, decoded, config, tmp_path / "out"))
    assert not found.keys_are_right
    assert "gate_up_proj" in found.error


# ---- other architectures


@pytest.mark.parametrize("model", ["opt", "neox", "bert"])
@pytest.mark.parametrize(
    "rules", ["int4-g32", "int3-g16-asym", {r"\.0\..*(query|fc1|q_proj)": "int8-channel", "": "int4-g32"}]
)
def test_other_architectures_are_equal(model: str, rules: Rules, build: Callable[..., Source], tmp_path: Path) -> None:
    check_equal(build(model), rules, tmp_path)


def test_transposed_weights_are_refused_and_still_load_as_random_ones(
    build: Callable[..., Source], tmp_path: Path
) -> None:
    said = refusal(build("gpt2"), "int4-g32")
    assert said is not None
    assert "GPT-2's weights are stored transposed" in said
    found = opened(build("gpt2"), "int4-g32", tmp_path)
    assert found.difference is not None, "no error"
    assert not found.keys_are_right
    assert "missing_keys" in found.error


# ---- types of scales


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scheme", ["int4-g32", "int8-channel", "int4-g32-asym"])
def test_half_precision_models_are_equal(
    dtype: torch.dtype, scheme: str, build: Callable[..., Source], tmp_path: Path
) -> None:
    check_equal(build("llama", dtype=dtype), scheme, tmp_path)


@pytest.mark.parametrize(("dtype", "scheme"), [(torch.bfloat16, "int4-g32-f32"), (torch.float32, "int4-g32-bf16")])
def test_scales_of_another_type_are_refused_and_still_cast(
    dtype: torch.dtype, scheme: str, build: Callable[..., Source], tmp_path: Path
) -> None:
    src = build("llama", dtype=dtype)
    said = refusal(src, scheme)
    assert said is not None
    assert "would be cast" in said
    found = opened(src, scheme, tmp_path)
    assert found.keys_are_right
    assert found.difference


# ---- planted faults: the comparison itself must notice


def test_one_wrong_code_is_noticed(build: Callable[..., Source], tmp_path: Path) -> None:
    src = build("llama")
    artefact = write(src, src.plan("int4-g32"), tmp_path / "out")
    wrong = dict(artefact.decoded)
    name = "model.layers.1.mlp.down_proj.weight"
    wrong[name] = wrong[name].clone()
    wrong[name][0, 0] += 0.01
    assert not outcome(src, artefacts.Artefact(artefact.directory, wrong)).is_equal


def test_the_models_have_the_shape_that_the_rows_need(build: Callable[..., Source]) -> None:
    assert LLAMA["num_hidden_layers"] == 2
    assert any(site.kind == "expert" for site in build("mixtral").sites)
    assert transformers.__version__ >= "5.17"
