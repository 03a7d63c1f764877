"""Training in one call."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import pennyweight as pw
from pennyweight.core.errors import CheckpointError, DataError, TrainingError, UsageError
from pennyweight.models.network import QuantizedNetwork
from pennyweight.train.qat.fit import fit
from pennyweight.train.qat.loop import Fitted
from pennyweight.train.qat.options import FitOptions
from pennyweight.train.qat.training import Step
from tests.train.qat.nets import Tagger, labelled, pictures, small

FAST = FitOptions(rate=0.02, warm_up=0.0)


class Told:
    """Remembers what was told, and may stop the training."""

    def __init__(self, stop_after: int | None = None, how: type[BaseException] = KeyboardInterrupt) -> None:
        self.steps: list[Step] = []
        self.end: Fitted | None = None
        self.stop_after, self.how = stop_after, how

    def __call__(self, event: Step | Fitted) -> None:
        if isinstance(event, Fitted):
            self.end = event
            return
        self.steps.append(event)
        if event.done == self.stop_after:
            raise self.how


def same(one: QuantizedNetwork, other: QuantizedNetwork) -> bool:
    tensors = [(weight, other.weights[name]) for name, weight in one.weights.items()]
    equal = all(torch.equal(a.codes, b.codes) and torch.equal(a.scales, b.scales) for a, b in tensors)
    state = other.network.graph.state_dict()
    floats = all(torch.equal(tensor, state[name]) for name, tensor in one.network.graph.state_dict().items())
    return equal and floats and dict(one.activations) == dict(other.activations)


def loss_of(module: nn.Module, batches: list[tuple[Tensor, Tensor]]) -> float:
    with torch.no_grad():
        return sum(float(nn.functional.cross_entropy(module(x), y)) for x, y in batches) / len(batches)


class Shuffled:
    """A loader that shuffles and augments with the global generators of torch, numpy and Python."""

    def __init__(self, batches: list[tuple[Tensor, Tensor]]) -> None:
        self.x, self.y = (torch.cat(parts) for parts in zip(*batches, strict=True))

    def __len__(self) -> int:
        return len(self.x) // 8

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for places in torch.randperm(len(self.x)).split(8):
            noise = torch.randn(len(places), 1, 1, 1) * np.random.rand() * random.random()
            yield self.x[places] + 0.1 * noise, self.y[places]


def test_training_makes_the_loss_smaller_than_rounding_alone() -> None:
    net, batches = small(), labelled(8)
    rounded = pw.train.finish(pw.train.prepare(net, "int2-channel", example=pictures()))
    told = Told()
    options = FitOptions(rate=0.05, objective=pw.train.Objective(alpha=1.0))
    quantized = fit(net, "int2-channel", batches, epochs=6, options=options, tell=told)
    assert loss_of(quantized.simulated(), batches) < 0.7 * loss_of(rounded.simulated(), batches)
    assert [step.done for step in told.steps] == list(range(1, 49))
    assert told.steps[-1].loss < told.steps[0].loss
    assert told.end == Fitted(48, 48, 48, None, False, False, told.steps[-1].oscillations)


def test_without_labels_the_float_network_alone_teaches() -> None:
    net = small()
    batches = [x for x, _ in labelled(6)]
    start = pw.train.finish(pw.train.prepare(net, "int2-channel", example=pictures()))
    quantized = fit(net, "int2-channel", batches, epochs=8, labels=False, options=FitOptions(rate=0.05))
    distances = []
    for one in (start, quantized):
        with torch.no_grad():
            p, q = ((module(pictures(seed=50)) / 2).log_softmax(-1) for module in (net, one.simulated()))
        distances.append(float((p.exp() * (p - q)).sum(-1).mean()))
    assert distances[1] < 0.5 * distances[0]


def test_the_best_on_held_out_data_is_kept() -> None:
    """A rate that ruins the network leaves what training started from."""
    net, batches = small(), labelled(4)
    told = Told()
    options = FitOptions(rate=3.0, warm_up=0.0, frozen_norms=0.0, objective=pw.train.Objective(alpha=0.0))
    quantized = fit(net, "int8-channel", batches[:3], validation=batches[3:], epochs=2, options=options, tell=told)
    assert told.end is not None
    figures = [step.held_out for step in told.steps if step.held_out is not None]
    assert len(figures) == 2
    assert told.end.held_out is not None
    assert told.end.held_out < min(figures)
    assert told.end.step == 0
    started = pw.train.finish(pw.train.prepare(net, "int8-channel", example=pictures()))
    assert torch.equal(quantized.weights["head"].codes, started.weights["head"].codes)


def test_the_figure_that_is_told_is_that_of_the_result() -> None:
    batches = labelled(5)
    told = Told()
    objective = pw.train.Objective(alpha=1.0)
    quantized = fit(
        small(), "w4a8-channel", batches[:4], validation=batches[4:], epochs=3, teacher=None, tell=told,
        options=FitOptions(rate=0.05, checks=2, objective=objective),
    )  # fmt: skip
    assert told.end is not None
    assert told.end.held_out == pytest.approx(loss_of(quantized.simulated(), batches[4:]), rel=1e-6)
    assert sum(step.held_out is not None for step in told.steps) == 6


def test_a_judge_of_the_user_s_own_decides() -> None:
    seen: list[float] = []

    def judge(module: nn.Module) -> float:
        assert not module.training
        seen.append(float(len(seen) == 2))
        return seen[-1]

    told = Told()
    fit(small(), "int4-channel", labelled(2), epochs=4, judge=judge, options=FAST, tell=told)
    assert told.end is not None
    assert told.end.step == 4
    assert told.end.held_out == -1.0


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_statistics_of_norms_stand_still_in_the_last_share_of_the_steps(share: float) -> None:
    means: list[Tensor] = []

    def judge(module: nn.Module) -> float:
        means.append(dict(module.named_buffers())["norm.running_mean"].clone())
        return float(len(means))

    fit(small(), "int4-channel", labelled(2), epochs=4, judge=judge, options=FitOptions(frozen_norms=share))
    moved = [not torch.equal(one, other) for one, other in itertools.pairwise(means[:5])]
    assert moved == [place < 4 * (1 - share) for place in range(4)]


def test_norms_are_estimated_anew_only_where_they_did_not_stand_still() -> None:
    for share, is_reestimated in ((0.0, True), (0.3, False)):
        told = Told()
        fit(small(), "int4-channel", labelled(3), epochs=1, options=FitOptions(frozen_norms=share), tell=told)
        assert told.end is not None
        assert told.end.is_reestimated is is_reestimated


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("stop_after", [3, 7])
def test_a_training_that_was_killed_goes_on_to_the_same_end(tmp_path: Path, stop_after: int, optimizer: Any) -> None:
    """Bit for bit, in the middle of an epoch, with shuffling, augmentation, dropout, freezing and held-out data."""
    loader, held_out = Shuffled(labelled(4)), labelled(1, 16)
    options = FitOptions(
        optimizer=optimizer, freezing=(0.02, 0.001), dampening=0.01, save_every=1, frozen_norms=0.4, accumulate=2
    )

    def run(told: Told, checkpoint: Path | None) -> QuantizedNetwork:
        return fit(
            small(dropout=0.3), "w3a8-channel", loader, validation=held_out, epochs=3, options=options, tell=told,
            checkpoint=checkpoint,
        )  # fmt: skip

    whole, file = Told(), tmp_path / "training.pt"
    wanted = run(whole, None)
    with pytest.raises(SystemExit):
        run(Told(stop_after, SystemExit), file)
    # Whatever else draws numbers meanwhile does not matter.
    torch.manual_seed(99)
    rest = Told()
    found = run(rest, file)
    assert [step.done for step in rest.steps] == list(range(stop_after + 1, 10))
    assert rest.steps == whole.steps[stop_after:]
    assert rest.end == whole.end
    assert same(found, wanted)


def test_a_loader_with_a_generator_of_its_own_is_read_alike(tmp_path: Path) -> None:
    x, y = (torch.cat(parts) for parts in zip(*labelled(3), strict=True))

    def run(told: Told, checkpoint: Path | None) -> QuantizedNetwork:
        loader = DataLoader(TensorDataset(x, y), 8, shuffle=True, generator=torch.Generator().manual_seed(4))
        return fit(
            small(),
            "int4-channel",
            loader,
            epochs=2,
            options=FitOptions(save_every=1),
            tell=told,
            checkpoint=checkpoint,
        )

    wanted = run(Told(), None)
    with pytest.raises(SystemExit):
        run(Told(6, SystemExit), tmp_path / "file")
    assert same(run(Told(), tmp_path / "file"), wanted)


def test_the_same_seed_gives_the_same_and_another_another() -> None:
    loader = Shuffled(labelled(3))
    one, again, other = (
        fit(small(), "int4-channel", loader, epochs=1, options=FitOptions(seed=seed)) for seed in (1, 1, 2)
    )
    assert same(one, again)
    assert not same(one, other)


def drawn() -> tuple[float, ...]:
    return (torch.rand(1).item(), np.random.rand(), random.random())


def test_the_caller_s_random_numbers_are_left_alone() -> None:
    net, loader = small(), Shuffled(labelled(2))
    found = []
    for is_trained in (False, True):
        torch.manual_seed(5)
        np.random.seed(5)
        random.seed(5)
        if is_trained:
            fit(net, "int4-channel", loader, epochs=1)
        found.append(drawn())
    assert found[0] == found[1]


def test_a_checkpoint_of_another_training_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "training.pt"
    fit(small(), "int4-channel", labelled(2), epochs=1, checkpoint=file)
    with pytest.raises(CheckpointError, match=r"of another training \(scheme differ\)"):
        fit(small(), "int3-channel", labelled(2), epochs=1, checkpoint=file)
    file.write_bytes(b"nothing of the kind")
    with pytest.raises(CheckpointError, match="no checkpoint of a training: delete it"):
        fit(small(), "int4-channel", labelled(2), epochs=1, checkpoint=file)


def test_the_keyboard_ends_a_training_with_the_best_so_far() -> None:
    told = Told(stop_after=5)
    batches = labelled(4)
    quantized = fit(small(), "int2-channel", batches, validation=batches, epochs=3, options=FAST, tell=told)
    assert told.end is not None
    assert told.end.is_interrupted
    assert (told.end.step, told.end.done, told.end.total) == (4, 5, 12)
    told = Told(stop_after=4)
    again = fit(small(), "int2-channel", batches, validation=batches, epochs=3, options=FAST, tell=told)
    assert same(quantized, again)


def test_codes_are_frozen_on_the_way() -> None:
    told = Told()
    options = FitOptions(rate=0.2, freezing=(0.005, 0.001), warm_up=0.0)
    fit(small(), "int3-channel", labelled(8), epochs=4, options=options, tell=told)
    assert told.end is not None
    assert told.end.oscillations.frozen > 0.01
    shares = [step.oscillations.frozen for step in told.steps]
    assert shares == sorted(shares)


def test_batches_can_be_accumulated() -> None:
    """Without norms in the way, two halves are the whole, but for the order of sums."""
    net = nn.Sequential(nn.Flatten(), nn.Linear(192, 16), nn.ReLU(), nn.Linear(16, 3))
    batches = labelled(4)
    halves = [(x[half], y[half]) for x, y in batches for half in (slice(0, 6), slice(6, 12))]
    whole, parts = Told(), Told()
    fit(net, "int4-channel", batches, epochs=2, options=FitOptions(), tell=whole)
    fit(net, "int4-channel", halves, epochs=2, options=FitOptions(accumulate=2), tell=parts)
    losses = [[step.loss for step in told.steps] for told in (whole, parts)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    # The last step of an epoch takes what is left.
    left = Told()
    fit(net, "int4-channel", halves[:5], epochs=2, options=FitOptions(accumulate=2), tell=left)
    assert len(left.steps) == 6


def test_rates_warm_up_and_fall_as_a_cosine() -> None:
    told = Told()
    fit(small(), "int4-channel", labelled(10), epochs=2, options=FitOptions(rate=0.1, warm_up=0.2), tell=told)
    rates = [step.rate for step in told.steps]
    assert rates[:4] == pytest.approx([0.025, 0.05, 0.075, 0.1])
    assert rates[4:] == sorted(rates[4:], reverse=True)
    assert rates[12] == pytest.approx(0.05)


def test_autocast_trains_and_the_result_is_that_of_float32() -> None:
    quantized = fit(small(), "w8a8-channel", labelled(3), epochs=1, options=FitOptions(autocast=torch.bfloat16))
    assert quantized.weights["stem"].scales.dtype == torch.float32


def test_mappings_with_labels_train_networks_that_read_tokens() -> None:
    def batches(seed: int) -> dict[str, Tensor]:
        tokens = torch.randint(0, 11, (6, 7), generator=torch.Generator().manual_seed(seed))
        return {"tokens": tokens, "labels": (tokens + 1) % 11}

    told = Told()
    loader = [batches(seed) for seed in range(8)]
    quantized = fit(
        Tagger(), "int4-channel", loader, epochs=6, teacher=None, options=FitOptions(optimizer="adamw", rate=0.02),
        tell=told,
    )  # fmt: skip
    assert told.steps[-1].loss < 0.5 * told.steps[0].loss
    assert set(quantized.weights) == {"embed", "memory.weight_ih_l0", "memory.weight_hh_l0"}


def test_a_teacher_of_the_user_s_own_is_asked_in_eval_mode_and_left_as_it_was() -> None:
    teacher = small(dropout=0.9).train()
    fit(small(), "int4-channel", labelled(2), epochs=1, teacher=teacher, labels=False)
    assert teacher.training
    assert all(parameter.grad is None for parameter in teacher.parameters())


def generator() -> Iterator[tuple[Tensor, Tensor]]:
    yield from labelled(2)


BAD: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "no batches": (lambda: fit(small(), "int4-channel", []), DataError, "the loader yields no batches"),
    "read once": (
        lambda: fit(small(), "int4-channel", iter(labelled(2)), example=pictures()), DataError, "read again"),
    "no labels": (
        lambda: fit(small(), "int4-channel", [pictures()]), DataError,
        "batch of step 1: .*no labels.* or train without them: labels=False"),
    "labels of a kind": (
        lambda: fit(small(), "int4-channel", [(pictures(), ["cat"] * 12)]), DataError, "labels are of type list"),
    "nothing to learn": (
        lambda: fit(small(), "int4-channel", labelled(1), teacher=None, labels=False), UsageError, "neither labels"),
    "no epochs": (lambda: fit(small(), "int4-channel", labelled(1), epochs=0), UsageError, "epochs=0: give 1 or more"),
    "NaN in a batch": (
        lambda: fit(small(), "int4-channel", [*labelled(1), (pictures() * torch.nan, torch.zeros(12))],
                    calibration=labelled(1)),
        DataError, "batch of step 2: x has NaN"),
    "another shape": (
        lambda: fit(small(), "int4-channel", [*labelled(1), (pictures()[:, :2], torch.zeros(12))]), DataError,
        "batch of step 2: x has the shape"),
    "no validation": (
        lambda: fit(small(), "int4-channel", labelled(1), validation=[]), DataError, "validation yields no batches"),
    "a loss that explodes": (
        lambda: fit(small(), "int4-channel", labelled(3), epochs=30, options=FitOptions(rate=1e20, warm_up=0.0)),
        TrainingError, r"step \d+: the loss is (nan|inf); .*lower the rate"),
    "a share": (lambda: FitOptions(warm_up=1.5), UsageError, "warm_up=1.5: it is a share"),
    "a count": (lambda: FitOptions(accumulate=0), UsageError, "accumulate=0: give 1 or more"),
    "a scheme": (lambda: fit(small(), "int4-chanel", labelled(1)), UsageError, "is not the name of a scheme"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_trained_is_an_error_with_a_remedy(name: str) -> None:
    act, kind, message = BAD[name]
    with pytest.raises(kind, match=message):
        act()
