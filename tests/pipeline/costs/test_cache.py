"""Costs that are measured once."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pennyweight.evaluate.compare import directory_bytes
from pennyweight.models.streamed import StreamedModel
from pennyweight.pipeline.costs import cache
from pennyweight.pipeline.output import carried_files
from pennyweight.plan.candidates import Candidates
from pennyweight.schemes import parse_scheme
from pennyweight.solvers.gptq import Gptq
from pennyweight.solvers.nearest import Nearest
from tests.models.families import FAMILIES, build, save, token_batches

TWO, THREE, FOUR = (parse_scheme(f"int{bits}-channel-f32") for bits in (2, 3, 4))
Q, K = "model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.k_proj"
GROUPS = [Candidates((Q, K), (FOUR, None, THREE)), Candidates(("model.layers.1.mlp.down_proj",), (THREE,))]
EXPECTED = [[404.0, 0.0, 403.0], [1403.0]]
INPUTS = {"model.safetensors": "abc"}


@dataclass(frozen=True)
class Counting:
    """A cost that says what it was asked: 400 + bits for the first block's groups, 1000 more for the second's."""

    size: float = 1.0
    name: str = "counting"
    asked: list[tuple[tuple[str, ...], tuple[str, ...]]] = field(default_factory=list, repr=False)

    def measure(self, model: StreamedModel, batches: Sequence[Tensor], groups: Sequence[Candidates], **_: Any) -> Any:
        found = []
        for group in groups:
            schemes = [scheme for scheme in group.schemes if scheme is not None]
            self.asked.append((group.sites, tuple(scheme.name for scheme in schemes)))
            base = 400 if ".0." in group.sites[0] else 1400
            found.append([float(base + scheme.element.bits) for scheme in schemes])
        return found


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> StreamedModel:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return StreamedModel(save(build("LlamaForCausalLM", FAMILIES["llama"].config), tmp_path / "model"))


def costs(model: StreamedModel, counting: Counting, groups: Sequence[Candidates] = GROUPS, **changes: Any) -> Any:
    asked: dict[str, Any] = dict(batches=token_batches(), inputs=INPUTS, solver=Nearest(), seed=0) | changes
    batches = asked.pop("batches")
    return cache.cached_costs(counting, model, batches, groups, scratch=model.path.parent / "kept", **asked)


def files(directory: Path) -> list[Path]:
    return sorted(directory.rglob("costs-*"))


def test_only_what_is_missing_is_measured(model: StreamedModel) -> None:
    counting = Counting()
    assert costs(model, counting) == EXPECTED
    assert len(counting.asked) == 2
    assert costs(model, counting) == EXPECTED
    assert len(counting.asked) == 2
    more = [Candidates((K, Q), (TWO, THREE, None)), Candidates((Q,), (None,)), GROUPS[1]]
    assert costs(model, counting, more) == [[402.0, 403.0, 0.0], [0.0], [1403.0]]
    assert counting.asked[2:] == [((K, Q), (TWO.name,))]
    [file] = files(model.path)
    assert file.parent == model.path / ".pennyweight"
    assert len(json.loads(file.read_text())["costs"]["\n".join(sorted((Q, K)))]) == 3


@pytest.mark.parametrize(
    "changes",
    [
        {"inputs": {"model.safetensors": "abd"}},
        {"batches": token_batches(seed=2)},
        {"batches": token_batches((4, 2))},
        {"solver": Gptq()},
        {"solver": Gptq(damping=0.02)},
        {"seed": 1},
    ],
    ids=["weights", "tokens", "fewer", "solver", "setting", "seed"],
)
def test_whatever_costs_depend_on_has_a_file_of_its_own(model: StreamedModel, changes: dict[str, Any]) -> None:
    counting = Counting()
    costs(model, counting)
    assert costs(model, counting, **changes) == EXPECTED
    assert len(counting.asked) == 4
    assert len(files(model.path)) == 2
    other = Counting(size=2.0)
    costs(model, other)
    assert len(other.asked) == 2


def test_how_windows_are_put_into_batches_does_not_matter(model: StreamedModel) -> None:
    counting = Counting()
    costs(model, counting)
    costs(model, counting, batches=list(torch.cat(token_batches()).split(1)))
    assert len(counting.asked) == 2


def test_another_version_measures_again(model: StreamedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    counting = Counting()
    costs(model, counting)
    monkeypatch.setattr(cache, "versions", lambda: {"pennyweight": "another"})
    costs(model, counting)
    assert len(counting.asked) == 4


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: "",
        lambda text: text[: len(text) // 2],
        lambda text: "[]",
        lambda text: text.replace("404.0", "NaN"),
        lambda text: text.replace("404.0", "-404.0"),
        lambda text: text.replace('"key": "', '"key": "0'),
        lambda text: text.replace("404.0", '"many"'),
        lambda text: text.replace("404.0", "null"),
    ],
    ids=["empty", "cut", "list", "nan", "negative", "key", "text", "null"],
)
def test_a_damaged_file_is_ignored_and_written_again(model: StreamedModel, damage: Any) -> None:
    counting = Counting()
    costs(model, counting)
    [file] = files(model.path)
    whole = file.read_text()
    file.write_text(damage(whole))
    assert costs(model, counting) == EXPECTED
    assert len(counting.asked) == 4
    assert file.read_text() == whole


def test_bytes_that_are_no_text_are_ignored_too(model: StreamedModel) -> None:
    costs(model, Counting())
    [file] = files(model.path)
    file.write_bytes(b"\xff\xfe\x00")
    assert costs(model, Counting()) == EXPECTED


def test_where_the_model_cannot_be_written_beside_the_user_s_caches_are_used(
    model: StreamedModel, tmp_path: Path
) -> None:
    # A file in the directory's place stops everybody, root included.
    (model.path / ".pennyweight").write_text("")
    counting = Counting()
    assert costs(model, counting) == costs(model, counting) == EXPECTED
    assert len(counting.asked) == 2
    [file] = files(tmp_path)
    assert file.parent == tmp_path / "cache" / "pennyweight"


def test_where_nothing_can_be_written_costs_are_measured_again(model: StreamedModel, tmp_path: Path) -> None:
    (model.path / ".pennyweight").write_text("")
    (tmp_path / "cache").write_text("")
    counting = Counting()
    assert costs(model, counting) == costs(model, counting) == EXPECTED
    assert len(counting.asked) == 4


def test_costs_are_no_part_of_the_model(model: StreamedModel) -> None:
    before = carried_files(model.path), directory_bytes(model.path)
    costs(model, Counting())
    assert files(model.path)
    assert (carried_files(model.path), directory_bytes(model.path)) == before
