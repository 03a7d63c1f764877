"""What every container must keep: codes come back as they were, and what is predicted is what is written."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from pennyweight.containers.base import Container
from pennyweight.core.registry import provided
from pennyweight.formats.integer import Int
from pennyweight.models.base import Site, TensorInfo
from pennyweight.schemes import PerChannel, PerGroup, PerTensor, QuantizedWeight, ScaleSpec, Scheme, ZeroSpec

CONTAINERS: list[Container] = list(provided("containers").values())
each_container = pytest.mark.parametrize("container", CONTAINERS, ids=lambda container: container.name)

granularities = st.one_of(
    st.just(PerTensor()), st.just(PerChannel()), st.sampled_from([1, 4, 16, 32, 128]).map(PerGroup)
)
schemes = st.builds(
    Scheme,
    element=st.builds(Int, st.integers(2, 8), st.booleans()),
    granularity=granularities,
    scale=st.sampled_from([ScaleSpec("float16"), ScaleSpec("bfloat16"), ScaleSpec("float32")]),
    zero=st.sampled_from([None, ZeroSpec()]),
)
shapes = st.tuples(st.integers(1, 70), st.one_of(st.integers(1, 70), st.sampled_from([128, 256])))
sites = st.builds(lambda shape: Site("model.layers.0.mlp.up_proj", shape, 0, "linear", "up.weight"), shapes)


def random_weight(scheme: Scheme, shape: tuple[int, int], seed: int) -> QuantizedWeight:
    """Any codes, zero points and scales of the scheme, negative scales and zeros among them."""
    generator = torch.Generator().manual_seed(seed)
    expected = scheme.scale_shape(shape)
    scales = torch.randn(expected, generator=generator).to(scheme.scale.torch_dtype)
    scales[torch.rand(expected, generator=generator) < 0.1] = 0
    low, high = int(scheme.element.smallest), int(scheme.element.largest)
    zeros = torch.randint(low, high + 1, expected, generator=generator).to(torch.int16) if scheme.zero else None
    codes = torch.randint(0, 2**scheme.element.bits, shape, generator=generator, dtype=torch.uint8)
    return QuantizedWeight(codes, scales, zeros, scheme)


@each_container
@settings(max_examples=120, deadline=None)
@given(scheme=schemes, site=sites, seed=st.integers(0, 1000))
def test_codes_come_back_and_entries_are_what_is_written(
    container: Container, scheme: Scheme, site: Site, seed: int
) -> None:
    assume(any(container.why_not(scheme, site, runtime=runtime) is None for runtime in container.runtimes))
    weight = random_weight(scheme, site.shape, seed)
    tensors = container.encode(site, weight)
    entries = container.entries(site, scheme)
    assert list(tensors) == list(entries)
    for name, tensor in tensors.items():
        assert TensorInfo(tensor.dtype, tuple(tensor.shape)) == entries[name], name
        assert tensor.is_contiguous()
    back = container.decode(site, scheme, tensors)
    assert torch.equal(back.codes, weight.codes)
    assert torch.equal(back.scales, weight.scales)
    assert back.scheme == scheme
    assert (back.zeros is None) == (weight.zeros is None)
    if back.zeros is not None and weight.zeros is not None:
        assert back.zeros.dtype == weight.zeros.dtype
        assert torch.equal(back.zeros, weight.zeros)


@each_container
@settings(max_examples=100, deadline=None)
@given(scheme=schemes, site=sites)
def test_a_site_takes_what_its_scheme_says_and_at_most_padding_more(
    container: Container, scheme: Scheme, site: Site
) -> None:
    assume(any(container.why_not(scheme, site, runtime=runtime) is None for runtime in container.runtimes))
    stored_bits = 8 * sum(info.size_bytes for info in container.entries(site, scheme).values())
    rows, groups = scheme.scale_shape(site.shape)
    # Rows of codes and columns of zero points end at whole words; the shape is two int64.
    padding_bits = 31 * (site.shape[0] + (groups if scheme.zero else 0)) + 128
    assert scheme.storage_bits(site.shape) <= stored_bits <= scheme.storage_bits(site.shape) + padding_bits
    if site.shape[1] % 32 == 0 and scheme.zero is None:
        assert stored_bits == scheme.storage_bits(site.shape) + 128
    assert rows in (1, site.shape[0])


@each_container
@settings(max_examples=60, deadline=None)
@given(scheme=schemes, site=sites, changes=st.sampled_from([{}, {"kind": "conv1d", "transposed": True}]))
def test_a_refusal_is_a_sentence_that_names_the_site(
    container: Container, scheme: Scheme, site: Site, changes: dict[str, Any]
) -> None:
    place = Site(**(vars(site) | changes))
    for runtime in container.runtimes:
        reason = container.why_not(scheme, place, runtime=runtime)
        assert reason is None or (place.name in reason and len(reason) > 40)
