"""The bytes of pack-quantized against compressed-tensors' own, its configuration, and the sentences of its refusals."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import replace

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.compressors.pack_quantized import PackedQuantizationCompressor
from compressed_tensors.quantization import QuantizationConfig
from hypothesis import given, settings
from hypothesis import strategies as st

from pennyweight.containers.base import ModelFacts
from pennyweight.containers.compressed_tensors import MINIMUM_VERSION
from pennyweight.containers.compressed_tensors_targets import patterns
from pennyweight.core.errors import ContainerError
from pennyweight.models.base import Site
from pennyweight.plan.plan import Plan
from pennyweight.schemes import Scheme, parse_scheme
from tests.containers.artefacts import CONTAINER, quantize_nearest

FACTS = ModelFacts("llama", ("lm_head",), tied_head=False, dtype="bfloat16")
LEAVES = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")


def site(name: str = "model.layers.0.mlp.up_proj", shape: tuple[int, int] = (48, 128), **changes: object) -> Site:
    numbers = re.findall(r"\d+", name)
    made = Site(name, shape, int(numbers[0]), "expert" if ".experts." in name else "linear", f"{name}.weight")
    return replace(made, **changes)  # type: ignore[arg-type]


def scheme(name: str) -> Scheme:
    return parse_scheme(name).with_scale_dtype(torch.bfloat16)


def decoder(layers: int = 3, experts: int = 0) -> list[Site]:
    names = [f"model.layers.{layer}.{leaf}" for layer in range(layers) for leaf in LEAVES]
    names += [f"model.layers.{layer}.mlp.experts.{i}.{leaf}" for layer in range(layers) for i in range(experts)
              for leaf in ("gate_proj", "up_proj", "down_proj")]  # fmt: skip
    return [site(name) for name in names]


def plan_of(sites: list[Site], rules: Mapping[str, str | None]) -> Plan:
    chosen = {s.name: next(rules[r] for r in rules if re.search(r, s.name)) for s in sites}
    return Plan({n: scheme(t) for n, t in chosen.items() if t}, {n: "kept" for n, t in chosen.items() if not t})


@pytest.mark.parametrize("name", [f"int{bits}-{rest}" for bits in range(2, 9) for rest in
                                  ("g32", "g32-asym", "channel", "channel-asym", "tensor", "tensor-asym")])  # fmt: skip
def test_the_librarys_own_decoder_gives_the_decoded_weight(name: str) -> None:
    place, torch_scheme = site(shape=(13, 96)), scheme(name)
    weight = quantize_nearest(torch.randn(13, 96) + 0.5, torch_scheme)
    tensors = {key.removeprefix(f"{place.name}."): value for key, value in CONTAINER.encode(place, weight).items()}
    config = CONTAINER.config(Plan({place.name: torch_scheme}), [place], FACTS, runtime="transformers")
    theirs = QuantizationConfig.model_validate({k: v for k, v in config.items() if k != "dequantize"})
    group = theirs.config_groups["group_0"]
    decoded = PackedQuantizationCompressor.decompress(tensors, group)["weight"]
    assert torch.equal(decoded, weight.dequantize(torch.bfloat16))


@pytest.mark.parametrize("name", ["fp8_e4m3-channel", "fp8_e4m3-tensor", "mxfp8", "mxfp4", "nvfp4"])
def test_the_librarys_own_decoder_gives_the_decoded_weight_of_small_floats(name: str) -> None:
    place, torch_scheme = site(shape=(13, 96)), scheme(name)
    weight = quantize_nearest(torch.randn(13, 96) * torch.rand(13, 1) + 0.5, torch_scheme)
    tensors = {key.removeprefix(f"{place.name}."): value for key, value in CONTAINER.encode(place, weight).items()}
    config = CONTAINER.config(Plan({place.name: torch_scheme}), [place], FACTS, runtime="transformers")
    group = QuantizationConfig.model_validate(config).config_groups["group_0"]
    reader = BaseCompressor.get_value_from_registry(group.format)
    assert torch.equal(reader.decompress(tensors, group)["weight"], weight.dequantize(torch.bfloat16))


def test_a_parent_that_its_reciprocal_does_not_lead_back_to_is_refused() -> None:
    weight = quantize_nearest(torch.randn(4, 64), scheme("nvfp4"))
    assert weight.parents is not None
    with pytest.raises(ContainerError, match=r"nvfp4 with the parent 0.904808.*use a power of two"):
        CONTAINER.encode(site(shape=(4, 64)), replace(weight, parents=torch.tensor([[0.9048081636428833]])))


def test_decode_names_what_is_missing_or_wrong() -> None:
    place, kind = site(), scheme("int4-g32-asym")
    tensors = CONTAINER.encode(place, quantize_nearest(torch.randn(48, 128), kind))
    with pytest.raises(ContainerError, match=r"up_proj.weight_zero_point: nothing found"):
        CONTAINER.decode(place, kind, {k: v for k, v in tensors.items() if "zero" not in k})
    with pytest.raises(ContainerError, match=r"weight_packed: torch.int32 \(48, 16\) found, .* \(48, 12\) expected"):
        CONTAINER.decode(place, scheme("int3-g32-asym"), tensors)
    with pytest.raises(ContainerError, match=r"\(48, 128\) given, \(48, 64\) expected"):
        CONTAINER.encode(site(shape=(48, 64)), quantize_nearest(torch.randn(48, 128), kind))


# ---- configuration


def test_one_scheme_targets_every_linear_but_the_listed_ones() -> None:
    sites = decoder()
    config = CONTAINER.config(
        plan_of(sites, {r"0\.mlp\.down": None, "": "int4-g32"}), sites, FACTS, runtime="transformers"
    )
    group = config["config_groups"]["group_0"]
    assert group["targets"] == ["Linear"]
    assert (group["weights"]["num_bits"], group["weights"]["group_size"]) == (4, 32)
    assert group["weights"]["symmetric"] is True
    assert config["ignore"] == ["model.layers.0.mlp.down_proj", "lm_head"]
    assert config["quantization_status"] == "compressed"
    assert config["version"].startswith(MINIMUM_VERSION)
    assert "dequantize" not in config
    assert json.loads(json.dumps(config)) == config


def test_zero_points_ask_for_decoding_while_loading() -> None:
    sites = decoder()
    asymmetric = CONTAINER.config(plan_of(sites, {"": "int4-g32-asym"}), sites, FACTS, runtime="transformers")
    assert asymmetric["dequantize"] is True


def test_several_schemes_name_their_sites_compactly_and_experts_come_first() -> None:
    sites = decoder(40, experts=8)
    plan = plan_of(sites, {"experts": "int3-g32", r"\.(1|7)\.mlp": "int8-channel", "": "int4-g32"})
    config = CONTAINER.config(plan, sites, FACTS, runtime="transformers")
    first = config["config_groups"]["group_0"]
    assert first["weights"]["num_bits"] == 3
    assert all(target.startswith("re:") and "experts" in target for target in first["targets"])
    assert len(json.dumps(config)) < 8000


def test_patterns_name_single_numbers_where_others_are_not_meant() -> None:
    everything = [f"a.{i}.experts.{j}.up" for i in range(4) for j in range(4)]
    assert patterns(everything, among=everything) == [r"re:^a\.\d+\.experts\.\d+\.up$"]
    assert patterns(everything[:8], among=everything) == [r"re:^a\.(0|1)\.experts\.\d+\.up$"]
    assert patterns(everything[3:9], among=everything) == [
        r"re:^a\.(1)\.experts\.\d+\.up$",
        r"re:^a\.0\.experts\.(3)\.up$",
        r"re:^a\.2\.experts\.(0)\.up$",
    ]
    assert patterns(everything[:1], among=everything) == ["a.0.experts.0.up"]


TEMPLATES = ("a.{}.q", "a.{}.experts.{}.up", "b.{}.x.{}.y.{}.z", "head", "a.{}.q_extra", "a.{}-{}.q")


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_patterns_match_exactly_the_names_given(data: st.DataObject) -> None:
    number = st.integers(0, 3)
    name = st.builds(lambda t, i, j, k: t.format(i, j, k), st.sampled_from(TEMPLATES), number, number, number)
    everything = data.draw(st.lists(name, unique=True, min_size=1, max_size=40))
    wanted = data.draw(st.lists(st.sampled_from(everything), unique=True))
    found = patterns(wanted, among=everything)
    matches = {
        name
        for name in everything
        for target in found
        if (re.match(target[3:], name) if target.startswith("re:") else target == name)
    }
    assert matches == set(wanted)


# ---- sentences


@pytest.mark.parametrize(
    ("name", "changes", "said"),
    [
        ("uint4-g32", {}, "use int4"),
        ("nf4-g64", {}, "has no layout for it, only for signed integers"),
        ("int4-g32-offset", {}, "has no layout for it"),
        ("int4-g32-fzero", {}, "has no layout for it"),
        ("ternary-channel", {}, "has no layout for it"),
        ("bal2-g64", {}, "has no layout for it"),
        ("fp8_e4m3-g32", {}, "fp8_e4m3-channel"),
        ("fp8_e5m2-channel", {}, "fp8_e4m3-channel"),
        ("fp4_e2m1-g16-e8m0", {}, "mxfp4 and nvfp4"),
        ("q4_0", {}, "float32"),
        ("q4_k", {}, "has no layout for it"),
        ("mxfp4_ggml", {}, "has no layout for it"),
        ("int4-g48", {}, "128 inputs cannot be split into groups of 48"),
        ("int4-g32", {"kind": "conv1d", "transposed": True}, "GPT-2's weights are stored transposed"),
        ("int4-g32", {"kind": "expert", "index": 2}, "keeps its experts together"),
        ("int4-g32", {"kind": "expert", "rows": (0, 48)}, "keeps its experts together"),
    ],
)
@pytest.mark.parametrize("runtime", ["transformers", "vllm"])
def test_what_cannot_be_packed_is_refused_in_a_sentence(
    name: str, changes: dict[str, object], said: str, runtime: str
) -> None:
    reason = CONTAINER.why_not(scheme(name), site(**changes), runtime=runtime)
    assert reason is not None
    assert said in reason
    assert "model.layers.0.mlp.up_proj" in reason


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("int3-g32", "4 and 8 bits only"),
        ("int8-g32-asym", "zero points at 4 bits only"),
        ("int4-tensor", "int4-channel"),
        ("int4-g16", "groups of 32, 64 or 128"),
        ("int4-g32", None),
        ("int4-g128-asym", None),
        ("int8-g64", None),
        ("int4-channel-asym", None),
        ("int8-channel", None),
        ("fp8_e4m3-channel", None),
        ("mxfp4", "not been proved with vLLM"),
        ("nvfp4", "one global scale for all that it merges"),
    ],
)
def test_vllm_takes_what_its_kernels_take(name: str, said: str | None) -> None:
    reason = CONTAINER.why_not(scheme(name), site(), runtime="vllm")
    assert reason is None if said is None else reason is not None and said in reason
    assert CONTAINER.why_not(scheme(name), site(), runtime="transformers") is None


@pytest.mark.parametrize(
    ("rules", "said"),
    [
        ({"": "int4-g32"}, None),
        ({r"\d\.mlp\.down": "int8-g32", "": "int4-g32-asym"}, None),
        ({r"layers\.0": "int8-channel", "": "int4-g32"}, None),
        ({"experts": None, "": "int4-g32"}, None),
        (
            {"q_proj": "int8-g32", "": "int4-g32"},
            "q_proj has int8-g32-bf16 and model.layers.0.self_attn.k_proj has int4",
        ),
        ({r"1\.mlp\.gate": None, "": "int4-g32"}, "gate_proj has float and model.layers.1.mlp.up_proj has int4-g32"),
        ({r"experts\.1\.": "int8-g32", "": "int4-g32"}, "merges the two"),
        ({r"experts.*down": "int8-g32", "": "int4-g32"}, "merges the two"),
        ({"": None}, "no site has a scheme"),
        ({"": "int4-g32-f32"}, "float32 scales in a bfloat16 model would be cast"),
    ],
)
def test_vllm_needs_one_scheme_for_what_it_merges(rules: dict[str, str | None], said: str | None) -> None:
    sites = decoder(2, experts=2)
    reason = CONTAINER.why_not_plan(plan_of(sites, rules), sites, FACTS, runtime="vllm")
    assert reason is None if said is None else reason is not None and said in reason
