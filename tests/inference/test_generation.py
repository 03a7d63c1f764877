"""transformers' `generate` by the native decoder gives what the model's own forward gives, whatever is asked."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DynamicCache

from pennyweight.inference.decoder import Decoder, decoder_parts
from pennyweight.inference.generation import _CACHE, PackedCache
from pennyweight.kernels.native import native
from tests.containers import artefacts
from tests.inference.loaded import TOLERANCE
from tests.inference.test_decoder import RUN, loaded

pytestmark = pytest.mark.skipif(native() is None, reason="the native library was not built")

IDS = artefacts.TOKENS[:1, 1:8]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return loaded("LlamaForCausalLM", {}, tmp_path_factory.mktemp("generation"))


def generated(model: Any, ids: torch.Tensor = IDS, **options: Any) -> Any:
    asked = {"max_new_tokens": 12, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    return model.generate(ids, **asked | options)


def cache_of(outputs: Any) -> Any:
    return getattr(outputs, _CACHE)


def own(model: Any, **given: Any) -> Any:
    """The model's own forward."""
    with torch.no_grad():
        return type(model).forward(model, **given)


@pytest.mark.parametrize("name", RUN)
def test_tokens_logits_and_the_cache_are_those_of_the_model(name: str, tmp_path: Path) -> None:
    architecture, config = RUN[name]
    model = loaded(architecture, config, tmp_path)
    found = generated(model)
    expected = generated(model, use_cache=False)
    assert isinstance(cache_of(found), PackedCache)
    assert torch.equal(found.sequences, expected.sequences)
    largest = max(float(one.abs().max()) for one in expected.logits)
    assert max(float((a - b).abs().max()) for a, b in zip(found.logits, expected.logits, strict=True)) < (
        TOLERANCE * largest
    )
    plain = cache_of(own(model, input_ids=found.sequences[:, :-1], use_cache=True))
    cache = cache_of(found)
    assert cache.get_seq_length() == plain.get_seq_length()
    assert isinstance(cache, PackedCache)
    assert len(cache.layers) == len(plain.layers)
    assert type(cache) is DynamicCache
    for one, other in zip(cache.layers, plain.layers, strict=True):
        for a, b in ((one.keys, other.keys), (one.values, other.values)):
            assert a.shape == b.shape
            assert (a - b).abs().max() < TOLERANCE * b.abs().max()


def test_a_text_goes_on_with_the_cache_of_another_call(model: Any) -> None:
    whole = generated(model).sequences
    first = generated(model, max_new_tokens=5)
    cache = cache_of(first)
    second = generated(model, first.sequences, max_new_tokens=7, **{_CACHE: cache})
    assert isinstance(cache, PackedCache)
    assert torch.equal(second.sequences, whole)


def test_all_logits_of_further_tokens_come_from_the_model_itself(model: Any) -> None:
    cache = cache_of(generated(model, max_new_tokens=4))
    ids = generated(model).sequences
    past = cache.get_seq_length()
    expected = own(model, input_ids=ids).logits[:, past:]
    with torch.no_grad():
        found = model(input_ids=ids[:, past:], **{_CACHE: cache}).logits
    assert type(cache) is DynamicCache
    assert (found - expected).abs().max() < TOLERANCE * expected.abs().max()


def test_a_long_text_gets_more_room(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pennyweight.inference.generation._ROOM", 1)
    expected = generated(model, use_cache=False, max_new_tokens=40).sequences
    assert torch.equal(generated(model, max_new_tokens=40).sequences, expected)


def _padded() -> dict[str, Any]:
    mask = torch.ones_like(IDS)
    mask[0, :2] = 0
    return {"attention_mask": mask}


OTHERS: dict[str, Callable[[], dict[str, Any]]] = {
    "beams": lambda: {"num_beams": 3},
    "padding": _padded,
    "hidden states": lambda: {"output_hidden_states": True},
    "attentions": lambda: {"output_attentions": True},
    "two texts": lambda: {"ids": torch.cat([IDS, IDS.flip(1)])},
    "a static cache": lambda: {"cache_implementation": "static"},
}  # fmt: skip


@pytest.mark.parametrize("name", OTHERS)
def test_what_the_decoder_does_not_do_is_left_to_the_model(name: str, model: Any) -> None:
    asked = OTHERS[name]()
    ids = asked.pop("ids", IDS)
    found = generated(model, ids, **asked)
    assert not isinstance(cache_of(found), PackedCache)
    plain = copy.copy(model)
    del plain.forward
    assert "forward" not in vars(plain)
    assert torch.equal(found.sequences, generated(plain, ids, **asked).sequences)


@pytest.mark.parametrize("strategy", [{"prompt_lookup_num_tokens": 3}, {"do_sample": True, "top_k": 5}])
def test_other_strategies_give_what_they_gave(strategy: dict[str, Any], model: Any) -> None:
    plain = copy.copy(model)
    del plain.forward
    drawn = []
    for one in (model, plain):
        torch.manual_seed(0)
        drawn.append(generated(one, **strategy).sequences)
    assert torch.equal(*drawn)


def test_gradients_and_training_are_the_model_s_own(model: Any) -> None:
    cache = DynamicCache()
    model(input_ids=IDS[:, :1], **{_CACHE: cache})
    assert type(cache) is DynamicCache
    with torch.no_grad():
        model.train()
        try:
            model(input_ids=IDS[:, :1], **{_CACHE: DynamicCache()})
            assert type(cache) is DynamicCache
        finally:
            model.eval()


def test_hooks_are_called_and_later_weights_are_seen(tmp_path: Path) -> None:
    model = loaded("LlamaForCausalLM", {}, tmp_path)
    before = generated(model).logits[0]
    seen = []
    handle = model.model.layers[0].mlp.register_forward_hook(lambda *_: seen.append(1))
    assert torch.allclose(generated(model).logits[0], before, atol=TOLERANCE * float(before.abs().max()))
    assert len(seen) == 12
    handle.remove()
    assert isinstance(cache_of(generated(model)), PackedCache)
    with torch.no_grad():
        model.model.norm.weight.mul_(2)
    found = generated(model).logits[0]
    assert (found - generated(model, use_cache=False).logits[0]).abs().max() < TOLERANCE * found.abs().max()
    assert not torch.allclose(found, before, rtol=0.1)


def test_copies_go_their_own_way(tmp_path: Path) -> None:
    model = loaded("LlamaForCausalLM", {}, tmp_path)
    before = generated(model).logits[0]
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.model.norm.weight.mul_(2)
    assert not torch.allclose(generated(twin).logits[0], before, rtol=0.1)
    assert torch.equal(generated(model).logits[0], before)


def test_keys_and_values_stay_when_room_is_made(model: Any) -> None:
    decoder = Decoder(decoder_parts(model), positions=3)
    ids = IDS[0].tolist()
    decoder.logits(ids[:3])
    before = [decoder.keys_and_values(block) for block in range(decoder.blocks)]
    decoder.logits(ids[3:])
    assert decoder.length == len(ids)
    for block, pair in enumerate(before):
        for one, other in zip(pair, decoder.keys_and_values(block), strict=True):
            assert torch.equal(one, other[:, :, :3])
