"""The expert memory and the plan that shares out its slots."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from policies.capacity import plan_memory, smallest_budget, uneven_plan
from policies.errors import PolicyError
from policies.interface import Shape
from policies.memory import ABSENT, COPYING, QUEUED, RESIDENT, ExpertMemory
from tests.driver import shape_of

# Two layers of three experts; those of layer 1 are smaller.
UNEVEN = shape_of(2, 3, 2, (30, 20))
EVEN = shape_of(2, 3, 2, 10)


def memory_of(shape: Shape, scope: str, budget: int, **plan: Any) -> ExpertMemory:
    return ExpertMemory(shape, plan_memory(shape, scope, budget, **plan))


# ---------------------------------------------------------------------- shape


def test_keys_run_through_experts_then_layers_then_precisions():
    shape = Shape(2, 3, 2, (30, 20), low_bytes_by_layer=(8, 5))
    assert shape.precisions == 2
    assert shape.keys == 12
    assert [shape.layer_of(key) for key in range(12)] == [0, 0, 0, 1, 1, 1] * 2
    assert [shape.bytes_of(key) for key in (0, 3, 6, 9)] == [30, 20, 8, 5]


# ---------------------------------------------------------------------- when it is full


def test_each_pool_has_to_have_been_full_once_not_all_at_a_time():
    memory = memory_of(EVEN, "layer", 20)
    memory.take(0)
    assert not memory.full
    memory.release(0)
    memory.take(3)
    assert memory.full
    memory.release(3)
    assert memory.full


def test_a_pool_is_full_where_no_expert_fits_in_full():
    shape = Shape(1, 4, 2, (30,), low_bytes_by_layer=(10,))
    memory = memory_of(shape, "layer", 65)
    memory.take(0)
    memory.take(4)  # at low bits: 25 are left, room for two more of those
    assert memory.full
    memory.release(0)
    assert memory.full


def test_the_smallest_expert_of_a_pool_counts():
    memory = memory_of(UNEVEN, "global", 77)
    memory.take(0)
    assert not memory.full
    memory.take(3)
    assert not memory.full  # 27 are left, and those of layer 1 take 20
    memory.take(4)
    assert memory.full


# ---------------------------------------------------------------------- the plan


def test_a_layer_scope_gives_each_layer_the_same_slots_and_rounds_down():
    plan = plan_memory(UNEVEN, "layer", 149)
    assert plan.capacity == (2, 2)
    assert plan.pool_of_layer == (0, 1)
    assert plan.used_bytes == 100


def test_a_layer_never_gets_more_slots_than_it_has_experts():
    plan = plan_memory(UNEVEN, "layer", 10_000)
    assert plan.capacity == (3, 3)
    assert plan.used_bytes == 150


def test_a_global_pool_counts_slots_where_sizes_are_equal():
    plan = plan_memory(EVEN, "global", 49)
    assert (plan.capacity, plan.by_bytes, plan.used_bytes) == ((4,), False, 40)


def test_a_global_pool_counts_bytes_where_sizes_differ():
    plan = plan_memory(UNEVEN, "global", 77)
    assert (plan.capacity, plan.by_bytes, plan.used_bytes) == ((77,), True, 77)
    assert plan.unit_of_layer == (30, 20)


def test_a_global_pool_never_exceeds_all_experts():
    assert plan_memory(UNEVEN, "global", 10_000).used_bytes == 150


def test_two_precisions_are_counted_in_bytes_by_layer():
    shape = Shape(2, 3, 2, (30, 20), low_bytes_by_layer=(8, 5))
    plan = plan_memory(shape, "layer", 120)
    assert (plan.capacity, plan.by_bytes) == ((60, 40), True)


def test_staging_is_taken_from_the_budget_top_k_at_most():
    plan = plan_memory(EVEN, "layer", 60, needs_staging=True)
    assert (plan.capacity, plan.staging_slots, plan.used_bytes) == ((2, 2), 2, 60)


def test_staging_shrinks_before_a_layer_loses_its_last_slot():
    plan = plan_memory(EVEN, "layer", 30, needs_staging=True)
    assert (plan.capacity, plan.staging_slots) == ((1, 1), 1)


def test_staging_slots_hold_the_largest_expert():
    assert plan_memory(UNEVEN, "layer", 110, staging_slots=2).used_bytes == 50 + 60


def test_without_a_cache_all_slots_are_staging_slots():
    plan = plan_memory(UNEVEN, "staging", 70, needs_staging=True)
    assert (plan.capacity, plan.staging_slots, plan.used_bytes) == ((0,), 2, 60)
    assert plan_memory(UNEVEN, "staging", 10_000, needs_staging=True).staging_slots == 3


def test_uneven_plans_name_their_own_slots():
    plan = uneven_plan(UNEVEN, (1, 3), 1)
    assert (plan.capacity, plan.used_bytes) == ((1, 3), 30 + 60 + 30)


@pytest.mark.parametrize(
    ("scope", "staging", "smallest"),
    [("layer", None, 50), ("layer", 2, 110), ("global", None, 30), ("global", 1, 60)],
)
def test_the_error_states_the_smallest_budget_and_that_one_works(scope, staging, smallest):
    with pytest.raises(PolicyError, match=f"smallest that can run is {smallest} bytes"):
        plan_memory(UNEVEN, scope, smallest - 1, staging_slots=staging)
    assert plan_memory(UNEVEN, scope, smallest, staging_slots=staging).used_bytes <= smallest


@pytest.mark.parametrize(("scope", "smallest"), [("layer", 80), ("global", 60), ("staging", 30)])
def test_the_smallest_budget_holds_a_staging_slot_where_one_is_needed(scope, smallest):
    with pytest.raises(PolicyError, match=f"smallest that can run is {smallest} bytes"):
        plan_memory(UNEVEN, scope, smallest - 1, needs_staging=True)
    assert plan_memory(UNEVEN, scope, smallest, needs_staging=True).staging_slots == 1


def test_refusing_admission_without_staging_is_an_error():
    with pytest.raises(PolicyError, match="staging_slots is 0"):
        plan_memory(EVEN, "layer", 1000, staging_slots=0, needs_staging=True)


@given(
    sizes=st.lists(st.integers(1, 50), min_size=1, max_size=4),
    experts=st.integers(1, 6),
    scope=st.sampled_from(["layer", "global", "staging"]),
    spare=st.integers(0, 500),
    needs_staging=st.booleans(),
)
def test_a_plan_never_uses_more_than_the_budget(sizes, experts, scope, spare, needs_staging):
    shape = shape_of(len(sizes), experts, 2, tuple(sizes))
    least = 1 if needs_staging and scope != "staging" else 0
    budget = smallest_budget(shape, scope, least) + spare
    plan = plan_memory(shape, scope, budget, needs_staging=needs_staging)
    assert plan.used_bytes <= budget
    assert scope == "staging" or min(plan.capacity) >= 1
    assert plan.staging_slots >= needs_staging


# ---------------------------------------------------------------------- the memory


def test_a_slot_is_taken_copying_and_given_back():
    memory = memory_of(EVEN, "layer", 20)
    memory.take(1)
    assert (memory.state[1], memory.free, memory.slot_of) == (COPYING, [0, 1], {1: 0})
    memory.state[1] = RESIDENT
    assert memory.residents() == [1]
    memory.release(1)
    assert (memory.state[1], memory.free, memory.slot_of) == (ABSENT, [1, 1], {})


def test_slots_are_numbered_through_the_pools_then_staging_lowest_first():
    memory = memory_of(EVEN, "layer", 60, staging_slots=2)
    for key in (4, 1, 0):
        memory.take(key)
    memory.take_staging(2)
    memory.take_staging(5)
    assert memory.slot_of == {1: 0, 0: 1, 4: 2, 2: 4, 5: 5}


def test_a_freed_slot_is_the_next_one_taken():
    memory = memory_of(EVEN, "layer", 40)
    for key in (0, 1):
        memory.take(key)
    memory.release(0)
    memory.take(2)
    assert memory.slot_of == {1: 1, 2: 0}


def test_slots_counted_in_bytes_have_no_numbers():
    memory = memory_of(UNEVEN, "global", 55)
    memory.take(0)
    assert memory.free == [25]
    memory.take(3)
    assert memory.free == [5]
    assert memory.slot_of == {}


def test_a_low_bit_copy_takes_its_own_bytes():
    shape = Shape(1, 2, 1, (30,), low_bytes_by_layer=(8,))
    memory = memory_of(shape, "layer", 60)
    memory.take(0)
    memory.take(3)
    assert (memory.free, memory.occupied_bytes()) == ([22], 38)


def test_staging_counts_as_occupied_but_not_as_resident():
    memory = memory_of(EVEN, "layer", 40, staging_slots=2)
    memory.take_staging(0)
    memory.take(1)
    memory.state[0] = memory.state[1] = RESIDENT
    assert memory.residents() == [1]
    assert memory.occupied_bytes() == 20
    assert (memory.staging_free, memory.free) == (1, [0, 1])
    memory.release(0)
    assert (memory.staging_free, memory.free) == (2, [0, 1])


def test_a_queued_expert_occupies_nothing():
    memory = memory_of(EVEN, "layer", 20)
    memory.state[0] = QUEUED
    assert memory.occupied_bytes() == 0


def test_a_swap_exchanges_roles_without_moving_anything():
    """The staged expert keeps its slot as a resident; the slot of the one that left is staging."""
    memory = memory_of(EVEN, "layer", 30, staging_slots=1)
    memory.take(0)
    memory.take_staging(1)
    memory.state[0] = memory.state[1] = RESIDENT
    memory.swap(1, 0)
    assert memory.residents() == [1]
    assert (memory.state[0], memory.free, memory.staging_free) == (ABSENT, [0, 1], 1)
    memory.take_staging(2)
    assert memory.slot_of == {1: 2, 2: 0}


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_full_means_no_pool_has_room_for_one_more(scope):
    memory = memory_of(UNEVEN, scope, 50)
    assert not memory.full
    memory.take(0)
    assert not memory.full
    memory.take(3)
    assert memory.full


@given(moves=st.lists(st.tuples(st.integers(0, 5), st.booleans()), max_size=40))
def test_every_slot_has_one_holder_and_all_come_back(moves):
    memory = memory_of(EVEN, "layer", 60, staging_slots=2)
    for key, staged in moves:
        if memory.state[key] != ABSENT:
            memory.release(key)
        elif staged and memory.staging_free:
            memory.take_staging(key)
        elif memory.free[memory.pool_of[key]]:
            memory.take(key)
        held = [key for key, state in enumerate(memory.state) if state != ABSENT]
        assert sorted(memory.slot_of) == held
        assert len(set(memory.slot_of.values())) == len(held)
        assert memory.occupied_bytes() == 10 * len(held)
    for key in sorted(memory.slot_of):
        memory.release(key)
    assert (memory.free, memory.staging_free, memory.occupied_bytes()) == ([2, 2], 2, 0)
