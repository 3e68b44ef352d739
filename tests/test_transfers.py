"""The transfer queue: chunks, classes, priorities."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from policies.transfers import Copy, TransferQueue, split_chunks


def low(key: int, priority: float = 0.0, layer: int = 0, seq: int | None = None) -> Copy:
    copy = Copy(key, layer, (4, 4, 4), key if seq is None else seq, high=False, source="prefetch")
    copy.priority = priority
    return copy


def high(key: int) -> Copy:
    return Copy(key, 0, (4, 4, 4), key, high=True)


def keys(copies) -> list[int]:
    return [copy.key for copy in copies]


def test_chunks_are_nearly_equal_and_the_larger_come_first():
    assert split_chunks(11, 3) == (4, 4, 3)
    assert split_chunks(12, 3) == (4, 4, 4)
    assert split_chunks(12, 1) == (12,)


@given(nbytes=st.integers(1, 10**9), chunks=st.integers(1, 64))
def test_chunks_sum_to_the_expert(nbytes, chunks):
    pieces = split_chunks(nbytes, chunks)
    assert len(pieces) == chunks
    assert sum(pieces) == nbytes
    assert max(pieces) - min(pieces) <= 1


def test_a_demand_copy_starts_awaited_a_prefetch_does_not():
    assert (high(1).awaited, high(1).demand) == (True, True)
    assert (low(1).awaited, low(1).demand) == (False, False)


def test_a_copy_says_where_it_stands():
    copy = low(7)
    copy.sent, copy.landed = 2, 1
    assert repr(copy) == "Copy(key=7, LOW, 1/2/3, prefetch)"


def test_demand_copies_are_first_in_first_out():
    queue = TransferQueue()
    for key in (3, 1, 2):
        queue.push_high(high(key))
    assert keys(queue.high) == [3, 1, 2]


def test_prefetches_of_one_priority_are_first_in_first_out():
    queue = TransferQueue()
    for key in (3, 1, 2):
        queue.push_low(low(key, seq=10 - key))
    assert keys(queue.low) == [3, 1, 2]


def test_prefetches_go_by_priority_then_arrival():
    queue = TransferQueue()
    for key, priority in enumerate([0.1, 0.9, 0.5, 0.9, 0.5]):
        queue.push_low(low(key, priority))
    assert keys(queue.low) == [1, 3, 2, 4, 0]


@given(priorities=st.lists(st.sampled_from([0.0, 0.25, 0.5, 1.0]), max_size=12))
def test_pushing_one_by_one_is_a_stable_sort(priorities):
    queue = TransferQueue()
    for key, priority in enumerate(priorities):
        queue.push_low(low(key, priority))
    assert keys(queue.low) == sorted(range(len(priorities)), key=lambda key: -priorities[key])


def test_new_priorities_reorder_and_unnamed_copies_keep_theirs():
    queue = TransferQueue()
    for key, priority in enumerate([0.9, 0.5, 0.1]):
        queue.push_low(low(key, priority))
    queue.reprioritise({0: 0.2, 2: 0.7, 99: 1.0})
    assert keys(queue.low) == [2, 1, 0]
    assert [copy.priority for copy in queue.low] == [0.7, 0.5, 0.2]


def test_promotion_moves_a_prefetch_behind_the_demand_copies():
    queue = TransferQueue()
    queue.push_high(high(1))
    copies = [low(2), low(3)]
    for copy in copies:
        queue.push_low(copy)
    queue.promote(copies[1])
    assert (keys(queue.high), keys(queue.low)) == ([1, 3], [2])
    assert copies[1].high
    assert not copies[1].demand


def test_promotion_of_a_copy_wholly_handed_over_queues_nothing():
    queue = TransferQueue()
    copy = low(2)
    copy.sent = 3
    queue.promote(copy)
    assert copy.high
    assert len(queue) == 0


@pytest.mark.parametrize("make", [high, low])
def test_a_copy_is_removed_from_its_own_class(make):
    queue = TransferQueue()
    copy = make(1)
    (queue.push_high if copy.high else queue.push_low)(copy)
    assert len(queue) == 1
    queue.remove(copy)
    assert len(queue) == 0


def test_prefetches_of_a_layer_come_in_queue_order():
    queue = TransferQueue()
    for key, layer, priority in [(0, 1, 0.1), (1, 2, 0.5), (2, 1, 0.9)]:
        queue.push_low(low(key, priority, layer))
    assert keys(queue.low_of(1)) == [2, 0]
    assert keys(queue.low_of(3)) == []


def test_a_paused_queue_is_ready_for_demand_copies_only():
    queue = TransferQueue()
    assert not queue.ready
    queue.push_low(low(1))
    assert queue.ready
    queue.paused = True
    assert not queue.ready
    queue.push_high(high(2))
    assert queue.ready
