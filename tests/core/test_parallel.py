"""Parallel work gives what a loop gives."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pennyweight.core.parallel import chunks, one_thread_per_operation, parallel_map


@pytest.fixture(autouse=True)
def _restored_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    assert torch.get_num_threads() == before


@pytest.fixture(params=[1, 2, 3])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    assert torch.get_num_threads() == request.param
    torch.set_num_threads(before)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("count", [0, 1, 2, 50])
def test_results_come_in_the_order_of_the_items(count: int) -> None:
    def late_first(i: int) -> int:
        time.sleep(0.002 if i < 3 else 0)
        return i * i

    assert parallel_map(late_first, iter(range(count))) == [i * i for i in range(count)]


@pytest.mark.usefixtures("threads")
def test_the_first_exception_in_item_order_is_raised_when_nothing_runs_any_more() -> None:
    running: set[int] = set()

    def fail(i: int) -> int:
        running.add(i)
        try:
            time.sleep(0.03 if i == 1 else 0.005)
            if i:
                raise ValueError(f"item {i}")
            return i
        finally:
            running.remove(i)

    with pytest.raises(ValueError, match="item 1"):
        parallel_map(fail, range(6))
    assert not running


def test_several_threads_are_used_and_each_operation_has_one(threads: int) -> None:
    meeting = threading.Barrier(threads)

    def meet(_: int) -> tuple[int, int]:
        meeting.wait(timeout=30)
        return threading.get_ident(), torch.get_num_threads()

    found = parallel_map(meet, range(threads))
    assert len({ident for ident, _ in found}) == threads
    assert {per_operation for _, per_operation in found} == {1}


@pytest.mark.usefixtures("threads")
def test_nested_calls_run_inline() -> None:
    def inner(_: int) -> int:
        return threading.get_ident()

    def outer(_: int) -> bool:
        return set(parallel_map(inner, range(4))) == {threading.get_ident()}

    assert parallel_map(outer, range(8)) == [True] * 8


def test_the_number_of_threads_comes_back_after_an_error(threads: int) -> None:
    def fail_inside() -> None:
        with one_thread_per_operation() as allowed:
            assert (allowed, torch.get_num_threads()) == (threads, 1)
            raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        fail_inside()


@pytest.mark.usefixtures("threads")
def test_nothing_is_recorded_for_gradients_on_any_number_of_threads() -> None:
    parameter = torch.ones(3, requires_grad=True)
    results = parallel_map(lambda i: parameter * i, range(4))
    assert not any(result.requires_grad for result in results)
    assert torch.is_grad_enabled()


@pytest.mark.usefixtures("threads")
def test_tensors_made_in_inference_mode_can_be_written_to() -> None:
    with torch.inference_mode():
        total = torch.zeros(4)
        parallel_map(lambda i: total[i : i + 1].add_(i), range(4))
    assert total.tolist() == [0, 1, 2, 3]


@given(length=st.integers(0, 300), size=st.integers(1, 70))
def test_chunks_cover_everything_once(length: int, size: int) -> None:
    parts = chunks(length, size)
    assert [i for part in parts for i in range(length)[part]] == list(range(length))
    assert all(0 < part.stop - part.start <= size for part in parts)
