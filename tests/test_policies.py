"""Every policy on a short story whose decisions were worked out by hand from its published rule.

Stories are written as :func:`tests.driver.story` tells them: `step.layer | needed, hits starred |
-left +landed ~prefetched kept/replaced`. With one layer a key is its expert.
"""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import policies
from policies.core import DecisionCore
from policies.errors import PolicyError
from policies.interface import PolicyData, Shape
from policies.oracle_prefetch import perturb
from tests.driver import (
    EXPERT_BYTES,
    Log,
    Steps,
    make_core,
    policy_data,
    run_instant,
    shape_of,
    story,
    table,
    told,
    total,
)


def one_layer(*events: list[int]) -> list[list[list[int]]]:
    """A step each."""
    return [[event] for event in events]


def play(
    name: str, shape: Shape, steps: Steps, *, data: PolicyData | None = None, **given: Any
) -> tuple[DecisionCore, str]:
    log: Log = []
    core = make_core(name, data or policy_data(shape, steps), log=log, **given)
    run_instant(core, steps)
    return core, story(log)


def test_every_policy_has_a_story_here_or_in_a_file_of_its_own():
    files = [Path(__file__), *Path(__file__).parent.glob("test_policy_*.py")]
    text = "\n".join(path.read_text(encoding="utf-8") for path in files)
    told_of = re.findall(r"^def test_(\w+)", text, re.MULTILINE)
    missing = [
        name
        for name in policies.names()
        if not any(test.startswith(name.replace("-", "_") + "_") for test in told_of)
    ]
    assert missing == []


# ---------------------------------------------------------------------- recency


def test_lru_evicts_the_one_touched_longest_ago():
    steps = one_layer([0, 1], [2], [1], [0, 3], [3, 0], [1])
    _, log = play("lru", shape_of(1, 4), steps, slots=2)
    assert log == told("""
        0.0 | 0 1 | +0 +1
        1.0 | 2 | -0 +2           # oldest first: 0 1
        2.0 | 1* |
        3.0 | 0 3 | -2 +0 -1 +3   # oldest first: 2 1
        4.0 | 3* 0* |             # touched in this order
        5.0 | 1 | -3 +1
    """)


def test_lru_keeps_layers_apart():
    steps = [[[0], [4]], [[1], [4]], [[0], [5]]]
    _, log = play("lru", shape_of(2, 4), steps, slots=2)
    assert log == told("""
        0.0 | 0 | +0
        0.1 | 4 | +4
        1.0 | 1 | -0 +1           # one slot a layer; 4 is older, but of layer 1
        1.1 | 4* |
        2.0 | 0 | -1 +0
        2.1 | 5 | -4 +5
    """)


def test_lru_runs_an_event_that_does_not_fit_in_waves_residents_first():
    steps = one_layer([3], [0, 1, 2, 3])
    core, log = play("lru", shape_of(1, 4), steps, slots=2)
    assert log == told("""
        0.0 | 3 | +3
        # waves 3 0 | 1 2; touched in the order 0 1 2 3, so 0 leaves before 3
        1.0 | 0 1 2 3* | +0 -0 +1 -3 +2
    """)
    assert total(core, "waves") == 3
    assert core.tally.collision_misses == 0


def test_lru_in_strict_order_throws_out_what_the_same_event_needs_later():
    steps = one_layer([3], [0, 1, 2, 3])
    core, log = play("lru", shape_of(1, 4), steps, slots=2, order="touch")
    assert log == told("""
        0.0 | 3 | +3
        # waves 0 1 | 2 3: 3 was resident, leaves for 1, and comes back: a collision miss
        1.0 | 0 1 2 3* | +0 -3 +1 -0 +2 -1 +3
    """)
    assert core.tally.collision_misses == 1
    assert (total(core, "hits"), total(core, "misses")) == (1, 4)


def test_lru_global_evicts_across_layers():
    steps = [[[0], [3]], [[0], [4]], [[1], [4]]]
    _, log = play("lru-global", shape_of(2, 3), steps, slots=2)
    assert log == told("""
        0.0 | 0 | +0
        0.1 | 3 | +3
        1.0 | 0* |
        1.1 | 4 | -3 +4           # oldest first: 3 0
        2.0 | 1 | -0 +1           # oldest first: 0 4
        2.1 | 4* |
    """)


def test_lru_global_never_hits_when_the_pool_is_smaller_than_a_token_cycle():
    steps = [[[0], [3], [6]]] * 10
    for slots, hits in [(2, 0), (3, 27)]:
        core, _ = play("lru-global", shape_of(3, 3), steps, slots=slots)
        assert total(core, "hits") == hits


def test_lru_global_frees_bytes_until_the_newcomer_fits():
    # Layer 0's experts weigh 10 bytes, layer 1's 30; the pool holds 50.
    steps = [[[0, 1], [3]], [[], [4]], [[2], [4]]]
    _, log = play("lru-global", shape_of(2, 3, 2, (10, 30)), steps, budget=50)
    assert log == told("""
        0.0 | 0 1 | +0 +1
        0.1 | 3 | +3              # 50 of 50 bytes
        1.1 | 4 | -0 -1 -3 +4     # 10 + 10 are not enough for 30
        2.0 | 2 | +2              # 20 bytes were left over
        2.1 | 4* |
    """)


def test_slru_promotes_on_the_second_hit_and_evicts_from_probation_first():
    steps = one_layer([0, 1], [0], [0], [1], [1], [2, 3], [4], [3], [3], [5], [6], [0, 2, 7])
    _, log = play("slru", shape_of(1, 8), steps, slots=4)
    # Oldest first, probation (hits) / protected, which holds 2 of the 4 slots:
    assert log == told("""
        0.0 | 0 1 | +0 +1              # 0 1 /
        1.0 | 0* |                     # 1 0(1) /
        2.0 | 0* |                     # 1 / 0
        3.0 | 1* |                     # 1(1) / 0
        4.0 | 1* |                     # / 0 1
        5.0 | 2 3 | +2 +3              # 2 3 / 0 1
        6.0 | 4 | -2 +4                # 3 4 / 0 1; plain LRU would evict 0
        7.0 | 3* |                     # 4 3(1) / 0 1
        8.0 | 3* |                     # 4 0 / 1 3; protected is over-full, 0 falls back
        9.0 | 5 | -4 +5                # 0 5 / 1 3
        10.0 | 6 | -0 +6               # 5 6 / 1 3
        11.0 | 0 2 7 | -5 +0 -6 +2 -1 +7
    """)


def test_slru_lets_the_least_recent_of_the_protected_fall_back():
    both = [0, 1]
    steps = one_layer(both, both, both, [0], [2], [2], [2], [3], [4])
    _, log = play("slru", shape_of(1, 8), steps, slots=4)
    assert (
        log.splitlines()[3:]
        == told("""
        3.0 | 0* |                     # / 1 0
        4.0 | 2 | +2                   # 2 / 1 0
        5.0 | 2* |
        6.0 | 2* |                     # 1 / 0 2
        7.0 | 3 | +3                   # 1 3 / 0 2
        8.0 | 4 | -1 +4
    """).splitlines()
    )


def test_slru_without_a_protected_segment_is_lru():
    steps = one_layer([0, 1], [0], [0], [2], [1], [3, 0], [2], [0])
    segmented = play("slru", shape_of(1, 4), steps, slots=2, protected=0.0)[1]
    assert segmented == play("lru", shape_of(1, 4), steps, slots=2)[1]


def test_least_stale_evicts_what_earlier_passes_touched_layer_by_layer_first_in_first_out():
    steps = [
        [[0], [3]],
        [[1], [4]],
        [[2], [4]],
        [[2], [5]],
        [[0, 1], [3]],
        [[0, 1], [3, 4]],
    ]
    _, log = play("least-stale", shape_of(2, 3), steps, slots=3)
    assert log == told("""
        0.0 | 0 | +0
        0.1 | 3 | +3
        1.0 | 1 | +1
        1.1 | 4 | -0 +4           # stale: 0, 3; layer 0 first
        2.0 | 2 | -1 +2           # stale: 1, 3, 4
        2.1 | 4* |
        3.0 | 2* |
        3.1 | 5 | -3 +5           # stale: 3, then 4, in the order they came
        4.0 | 0 1 | -2 +0 -4 +1   # stale: 2, then 4 and 5 of layer 1
        4.1 | 3 | -5 +3
        5.0 | 0* 1* |
        5.1 | 3* 4 | -0 +4        # nothing is stale: layer 0's first come leaves
    """)


def test_least_stale_evicts_first_layers_first_where_all_belong_to_this_pass():
    steps = [[[0], [3], [6]]] * 2
    _, log = play("least-stale", shape_of(3, 3), steps, slots=2)
    assert log == told("""
        0.0 | 0 | +0
        0.1 | 3 | +3
        0.2 | 6 | -0 +6           # 0 and 3 are of this pass
        1.0 | 0 | -3 +0           # stale: 3, 6
        1.1 | 3 | -6 +3           # stale: 6
        1.2 | 6 | -0 +6
    """)


# ---------------------------------------------------------------------- frequency


def test_lfu_counts_outlive_eviction_and_ties_leave_by_lowest_expert():
    steps = one_layer([0, 1], [0], [2], [1], [3], [0])
    _, log = play("lfu", shape_of(1, 4), steps, slots=2)
    assert log == told("""
        0.0 | 0 1 | +0 +1
        1.0 | 0* |
        2.0 | 2 | -1 +2           # uses 0:2 1:1
        3.0 | 1 | -2 +1           # uses 0:2 2:1; 1's second
        4.0 | 3 | -0 +3           # uses 0:2 1:2, a tie
        5.0 | 0 | -3 +0           # uses 1:2 3:1
    """)


def test_lfu_decay_admits_only_what_beats_the_smallest_resident_by_theta():
    steps = one_layer([0, 1], [0], [2], [2], [3, 1], [3])
    given: dict[str, Any] = {"gamma": 0.5, "theta": 0.75, "staging_slots": 1}
    _, log = play("lfu-decay", shape_of(1, 4), steps, slots=3, **given)
    # Decayed counts, the use in progress included; two slots and one for staging:
    assert log == told("""
        0.0 | 0 1 | +0 +1         # free slots are filled without asking
        1.0 | 0* |
        2.0 | 2 | +2              # 2: 1 against 1: 1/4 + 3/4, not above: refused
        3.0 | 2 | -1 +2           # 2: 3/2 against 1: 1/8 + 3/4
        # residents 0: 3/16, 2: 3/4; 1: 17/16 > 15/16 enters for 0, 3: 1 < 3/2 does not for 2
        4.0 | 3 1 | +3 -0 +1
        5.0 | 3 | -2 +3           # residents 2: 3/8, 1: 17/32; 3: 3/2 > 9/8
    """)


def test_lfu_decay_without_decay_or_threshold_still_refuses_ties():
    steps = one_layer([0], [1], [1])
    _, log = play("lfu-decay", shape_of(1, 2), steps, slots=2, gamma=1.0, theta=0.0)
    assert log == told("""
        0.0 | 0 | +0
        1.0 | 1 | +1              # one use each
        2.0 | 1 | -0 +1           # two against one
    """)


def test_lfu_decay_outlives_the_range_of_floating_point():
    steps = one_layer(*[[0], [1]] * 400, [2], [2], [1])
    _, log = play("lfu-decay", shape_of(1, 3), steps, slots=3, gamma=0.01, staging_slots=1)
    # Counts fall to a hundredth a step. 2: 1 beats 0: 1e-4 at once, with 1: 1e-2 there.
    assert log.splitlines()[-3:] == ["800.0 | 2 | -0 +2", "801.0 | 2* |", "802.0 | 1* |"]


def test_lfru_weighs_frequency_against_age():
    steps = one_layer([0, 1], [2], [1], [1], [], [], [2], [3], [0])
    _, log = play("lfru", shape_of(1, 4), steps, slots=2)
    assert log == told("""
        0.0 | 0 1 | +0 +1
        1.0 | 2 | -0 +2           # 0: 1/2, 1: 1/2, a tie
        2.0 | 1* |
        3.0 | 1* |
        6.0 | 2* |
        7.0 | 3 | -1 +3           # 1: 3/5, 2: 2/2; plain LFU would evict 2
        8.0 | 0 | -3 +0           # 2: 2/3, 3: 1/2
    """)


def test_lfru_counts_an_age_of_one_for_the_step_in_progress():
    steps = one_layer([1], [1], [], [], [0], [2])
    _, log = play("lfru", shape_of(1, 4), steps, slots=2)
    assert log == told("""
        0.0 | 1 | +1
        1.0 | 1* |
        4.0 | 0 | +0
        5.0 | 2 | -1 +2           # 1: 2/5, 0: 1/2
    """)


# ---------------------------------------------------------------------- no admission


def test_static_holds_the_most_popular_of_other_requests_and_never_changes():
    steps = one_layer([0, 1], [0, 2], [3])
    shape = shape_of(1, 4)
    data = policy_data(shape, steps, popularity=np.array([[1, 5, 3, 5]]))
    core, log = play("static", shape, steps, data=data, slots=4)
    assert log == told("""
        0.0 | 0 1* | +0
        1.0 | 0 2 | +0 +2         # staged, then forgotten
        2.0 | 3* |
    """)
    assert core.tally.evictions == 0
    assert core.tally.warm_bytes == 2 * EXPERT_BYTES


def test_static_ties_go_to_the_lowest_expert_in_each_layer():
    shape = shape_of(2, 3)
    popularity = np.array([[2, 2, 2], [0, 1, 1]])
    core = make_core("static", policy_data(shape, [], popularity=popularity), slots=4)
    assert core.memory.residents() == [0, 4]


def test_static_misses_beyond_the_staging_slots_run_in_waves():
    steps = one_layer([1, 2, 0, 3])
    shape = shape_of(1, 4)
    data = policy_data(shape, steps, popularity=np.array([[9, 0, 0, 0]]))
    core = make_core("static", data, slots=2)
    waves = run_instant(core, steps)
    assert [(wave.ready, wave.landed) for wave in waves] == [((0,), (1,)), ((), (2,)), ((), (3,))]


def test_static_learns_from_popularity_alone():
    """What is judged cannot change the resident set: it is given the counts and nothing else."""
    shape = shape_of(1, 4)
    popularity = np.array([[0, 3, 1, 2]])
    for steps in (one_layer([0], [0], [0]), one_layer([2, 3])):
        data = PolicyData(shape=shape, popularity=popularity)
        core, _ = play("static", shape, steps, data=data, slots=3, staging_slots=1)
        assert core.memory.residents() == [1, 3]


def test_static_without_popularity_says_what_it_lacks():
    with pytest.raises(PolicyError, match="requests to learn from"):
        make_core("static", PolicyData(shape=shape_of(1, 4)), slots=4)


def test_on_demand_copies_every_expert_for_every_event():
    steps = one_layer([0, 1], [1, 0, 2])
    core, log = play("on-demand", shape_of(1, 4), steps, slots=2)
    assert log == told("""
        0.0 | 0 1 | +0 +1
        1.0 | 1 0 2 | +1 +0 +2    # waves 1 0 | 2
    """)
    assert total(core, "waves") == 3
    assert core.memory.occupied_bytes() == 0


def test_resident_hits_from_the_first_event_on():
    steps = [[[0, 1], [4]], [[3], [6, 5]]]
    core, log = play("resident", shape_of(2, 4), steps, slots=8)
    assert log == told("""
        0.0 | 0* 1* |
        0.1 | 4* |
        1.0 | 3* |
        1.1 | 6* 5* |
    """)
    assert (core.tally.chunks, core.tally.warm_bytes) == (0, 8 * EXPERT_BYTES)


def test_resident_needs_all_of_it():
    with pytest.raises(PolicyError, match="warm set does not fit"):
        make_core("resident", policy_data(shape_of(2, 4), []), slots=6)


# ---------------------------------------------------------------------- Belady


def test_belady_evicts_the_farthest_next_use_and_must_admit():
    steps = one_layer([0], [1], [2], [0], [1], [2], [3])
    _, log = play("belady", shape_of(1, 4), steps, slots=2)
    assert log == told("""
        0.0 | 0 | +0
        1.0 | 1 | +1
        2.0 | 2 | -1 +2           # next uses 0:3 1:4, its own 5
        3.0 | 0* |
        4.0 | 1 | -0 +1           # next uses 0:never 2:5
        5.0 | 2* |
        6.0 | 3 | -1 +3           # never again 1, 2: a tie
    """)


def test_belady_global_compares_next_uses_across_layers():
    steps = [[[0], [3]], [[1], [3]], [[0], [4]]]
    _, log = play("belady-global", shape_of(2, 3), steps, slots=2)
    assert log == told("""
        0.0 | 0 | +0
        0.1 | 3 | +3
        1.0 | 1 | -0 +1           # next uses, in events: 0:4 3:3
        1.1 | 3* |
        2.0 | 0 | -1 +0           # never again 1, 3: a tie
        2.1 | 4 | -0 +4           # never again 0, 3: a tie
    """)


def test_belady_bypass_declines_what_is_used_later_than_the_resident():
    steps = one_layer([0], [1], [0], [1], [2], [1])
    _, log = play("belady-bypass", shape_of(1, 3), steps, slots=2, staging_slots=1)
    assert log == told("""
        0.0 | 0 | +0
        1.0 | 1 | +1              # next uses 0:2 1:3: through staging
        2.0 | 0* |
        3.0 | 1 | -0 +1           # next uses 0:never 1:5
        4.0 | 2 | +2              # next uses 1:5 2:never: through staging
        5.0 | 1* |
    """)


def test_belady_bypass_keeps_a_staged_expert_in_the_place_of_a_member():
    steps = one_layer([0], [0, 1], [1])
    core, log = play("belady-bypass", shape_of(1, 2), steps, slots=2, staging_slots=1)
    assert log == told("""
        0.0 | 0 | +0
        1.0 | 0* 1 | +1 1/0       # 0 is a member: it stays until computed, then 1 has its slot
        2.0 | 1* |
    """)
    assert core.tally.evictions == 1


def test_belady_bypass_spares_a_resident_where_a_member_is_needed_later_still():
    steps = one_layer([0], [1], [0, 2], [2], [1, 2])
    _, log = play("belady-bypass", shape_of(1, 3), steps, slots=3, staging_slots=1)
    assert log == told("""
        0.0 | 0 | +0
        1.0 | 1 | +1
        2.0 | 0* 2 | +2 2/0       # next uses 0:never 1:4 2:3: not 1, but 0 gives way
        3.0 | 2* |
        4.0 | 1* 2* |
    """)


def test_belady_bypass_passes_through_few_staging_slots_in_waves():
    steps = one_layer([0], [1, 2, 3], [0, 3])
    core, log = play("belady-bypass", shape_of(1, 4), steps, slots=2, staging_slots=1)
    assert log == told("""
        0.0 | 0 | +0
        1.0 | 1 2 3 | +1 +2 +3    # 3 is needed again with 0, not nearer: a tie stays out
        2.0 | 0* 3 | +3
    """)
    assert total(core, "waves") == 5


def test_belady_bypass_does_not_fill_a_slot_whose_resident_is_needed_in_a_later_wave():
    # In order of touch with one slot for staging, waves 1 | 2 0*: 1 would do as well as 2, but 0
    # has not been computed when 1 leaves staging.
    steps = one_layer([0], [1, 2, 0], [1, 2])
    core, log = play(
        "belady-bypass", shape_of(1, 3), steps, slots=2, staging_slots=1, order="touch"
    )
    assert log == told("""
        0.0 | 0 | +0
        1.0 | 1 2 0* | +1 +2 2/0
        2.0 | 1 2* | +1
    """)
    assert core.tally.collision_misses == 0


def test_belady_needs_the_future():
    with pytest.raises(PolicyError, match="needs the future"):
        make_core("belady", PolicyData(shape=shape_of(1, 4)), slots=4)


# ---------------------------------------------------------------------- prefetching

# Three layers of four experts; keys 0-3, 4-7, 8-11.
LAYERED = shape_of(3, 4)


def lookahead(*steps: list[list[int]]) -> list[list[list[int]]]:
    """What the gate of l + d says of layer l's input, as keys of layer l."""
    return [[[4 * layer + e for e in ids] for layer, ids in enumerate(step)] for step in steps]


def test_next_gate_predicts_each_layer_one_ahead():
    steps = [[[0], [5], [11]], [[0], [6], [9]]]
    columns = {"lookahead_1": lookahead([[1, 2], [3, 0], []], [[1, 2], [0, 1], []])}
    data = policy_data(LAYERED, steps, lookahead=columns)
    core, log = play("next-gate", LAYERED, steps, data=data, slots=6)
    # Two slots a layer, two predictions a gate.
    assert log == told("""
        0.0 | 0 | +0 ~5 ~6
        0.1 | 5* | ~11 ~8
        0.2 | 11* |
        1.0 | 0* |                # 5 and 6 again: both are there
        1.1 | 6* | -11 ~9         # 8 and 9: 8 is touched, 11 is the oldest
        1.2 | 9* |
    """)
    tally = core.tally
    assert (tally.predicted, tally.predicted_right, tally.predictable) == (8, 4, 4)
    assert (tally.prefetch_issued, tally.prefetch_used) == (5, 4)
    assert tally.wasted_prefetch_bytes == EXPERT_BYTES


def test_next_gate_at_depth_2_serves_both_next_layers_from_the_first_gate():
    shape = shape_of(4, 4)
    steps = [[[0], [5], [11], [14]]]
    columns = {
        # Only the first gate's prediction at distance 1 is used: layer 1 has no earlier one.
        "lookahead_1": lookahead([[1], [0], [0], []]),
        "lookahead_2": lookahead([[3], [2], [], []]),
    }
    data = policy_data(shape, steps, lookahead=columns)
    _, log = play("next-gate", shape, steps, data=data, slots=8, depth=2)
    assert log == told("""
        0.0 | 0 | +0 ~5 ~11
        0.1 | 5* | ~14
        0.2 | 11* |
        0.3 | 14* |
    """)


@pytest.mark.parametrize(("overfetch", "fetched"), [(0.5, 1), (1.0, 2), (1.5, 3)])
def test_next_gate_overfetch_is_a_multiple_of_top_k(overfetch, fetched):
    steps = [[[0], [7]]]
    shape = shape_of(2, 4, top_k=2)
    columns = {"lookahead_1": lookahead([[0, 1, 2, 3], []])}
    data = policy_data(shape, steps, lookahead=columns)
    core, _ = play("next-gate", shape, steps, data=data, slots=8, overfetch=overfetch)
    assert core.tally.prefetch_issued == fetched


def test_next_gate_without_the_column_says_which_and_how_to_record_it():
    columns = {"lookahead_1": lookahead([[1], [], []])}
    data = policy_data(LAYERED, [[[0], [5], [9]]], lookahead=columns)
    with pytest.raises(
        PolicyError, match=r"column lookahead_2, .*moesim trace --record lookahead=3"
    ):
        make_core("next-gate", data, slots=6, depth=2)


def test_oracle_prefetch_looks_into_the_next_step():
    steps = [[[0], [4]], [[1], [4]], [[2], [5]]]
    core, log = play("oracle-prefetch", shape_of(2, 4), steps, slots=2)
    assert log == told("""
        0.- | | ~0                # nobody could announce the first event earlier
        0.0 | 0* | ~4
        0.1 | 4* | -0 ~1          # the next step's first layer
        1.0 | 1* |
        1.1 | 4* | -1 ~2
        2.0 | 2* | -4 ~5
        2.1 | 5* |
    """)
    assert core.tally.wasted_prefetch_bytes == 0


def test_oracle_prefetch_without_wrap_announces_the_first_layers_as_the_step_begins():
    steps = [[[0], [4], [8]], [[1], [4], [9]]]
    _, log = play("oracle-prefetch", LAYERED, steps, slots=3, wrap="no", depth=2)
    assert log == told("""
        0.- | | ~0 ~4
        0.0 | 0* | ~8
        0.1 | 4* |
        0.2 | 8* |
        1.- | | -0 ~1             # layer 1 is known too: 4 is there
        1.0 | 1* | -8 ~9
        1.1 | 4* |
        1.2 | 9* |
    """)


@pytest.mark.parametrize("wrap", [True, False])
@pytest.mark.parametrize("depth", [1, 2])
def test_oracle_prefetch_of_any_depth_leaves_no_miss_where_memory_suffices(depth, wrap):
    steps = random_events(steps=12, layers=3, experts=8, size=2)
    core, _ = play("oracle-prefetch", shape_of(3, 8), steps, slots=24, depth=depth, wrap=wrap)
    assert total(core, "misses") == 0


@pytest.mark.parametrize("name", ["oracle-prefetch", "accuracy-q"])
def test_oracle_prefetch_deeper_than_the_model_is_an_error(name):
    steps = random_events(steps=2, layers=3, experts=8, size=2)
    with pytest.raises(PolicyError, match=r"depth 3 .* give at most 2"):
        play(name, shape_of(3, 8), steps, slots=24, depth=3)


def test_oracle_prefetch_never_throws_out_what_the_event_in_progress_needs():
    # One slot for all: the next event's expert cannot come while 0 is computed.
    steps = [[[0], [4]]]
    _, log = play("oracle-prefetch", shape_of(2, 4), steps, slots=1, cache="lru-global")
    assert log == told("""
        0.- | | ~0
        0.0 | 0* |
        0.1 | 4 | -0 +4
    """)


def random_events(steps: int, layers: int, experts: int, size: int, seed: int = 0) -> Steps:
    rng = np.random.default_rng(seed)
    return [
        [
            [layer * experts + int(expert) for expert in rng.permutation(experts)[:size]]
            for layer in range(layers)
        ]
        for _ in range(steps)
    ]


@pytest.mark.parametrize("q", [0.0, 0.3, 0.85, 1.0])
def test_accuracy_q_is_right_for_a_share_q(q):
    steps = random_events(steps=400, layers=4, experts=16, size=4)
    right = total = 0
    wrong = perturb(table(steps, 4), 16, q, seed=7)
    for step, events in enumerate(steps):
        for keys, guess in zip(events, wrong.step(step), strict=True):
            assert len(set(guess)) == len(keys)
            assert {key // 16 for key in guess} == {keys[0] // 16}
            right += len(set(keys) & set(guess))
            total += len(keys)
    # Binomial: five standard deviations.
    assert abs(right / total - q) <= 5 * math.sqrt(q * (1 - q) / total)


def test_accuracy_q_draws_wrong_experts_evenly():
    steps = random_events(steps=1500, layers=1, experts=8, size=2)
    wrong = perturb(table(steps, 1), 8, 0.0, seed=3)
    counts = np.bincount([key for step in range(1500) for key in wrong.step(step)[0]], minlength=8)
    expected = 3000 / 8
    assert np.abs(counts - expected).max() < 5 * math.sqrt(expected)


def test_accuracy_q_drops_what_cannot_be_wrong():
    """An event that needs all but one expert leaves one to be wrong with."""
    steps = one_layer([0, 1, 2])
    guess = perturb(table(steps, 1), 4, 0.0, seed=0).step(0)[0]
    assert list(guess) == [3]


def test_accuracy_q_repeats_by_seed():
    steps = random_events(steps=30, layers=3, experts=8, size=2)
    shape = shape_of(3, 8)
    stories = [
        play("accuracy-q", shape, steps, data=policy_data(shape, steps, seed=seed), slots=9)[1]
        for seed in (1, 1, 2)
    ]
    assert stories[0] == stories[1]
    assert stories[0] != stories[2]


def test_accuracy_q_at_1_is_the_oracle():
    steps = random_events(steps=30, layers=3, experts=8, size=2)
    shape = shape_of(3, 8)
    sure = play("accuracy-q", shape, steps, slots=9, q=1.0)[1]
    assert sure == play("oracle-prefetch", shape, steps, slots=9, wrap="no")[1]


def test_accuracy_q_reports_its_own_precision():
    steps = random_events(steps=300, layers=3, experts=8, size=2)
    core, _ = play("accuracy-q", shape_of(3, 8), steps, slots=9, q=0.6)
    tally = core.tally
    share = tally.predicted_right / tally.predicted
    assert abs(share - 0.6) < 5 * math.sqrt(0.24 / tally.predicted)


# ---------------------------------------------------------------------- names and parameters


def test_an_unknown_policy_names_the_closest_and_all():
    with pytest.raises(PolicyError, match=r"'lfruu' is unknown \(did you mean lfru\?\).*belady"):
        policies.get("lfruu")


@pytest.mark.parametrize(
    ("name", "given", "message"),
    [
        ("lru", {"depth": 2}, "parameter 'depth' is unknown"),
        ("lru", {"ordr": "id"}, "did you mean order"),
        ("lru", {"order": "random"}, "is not one of cached-first, touch, id"),
        ("lru", {"chunks": 0}, "chunks=0 is below 1"),
        ("lru", {"chunks": "two"}, "is not a whole number"),
        ("lru", {"reset": "maybe"}, "neither true nor false"),
        ("lfu-decay", {"gamma": "nan"}, "is not a finite number"),
        ("lfu-decay", {"theta": -1}, "theta=-1 is below 0"),
        ("accuracy-q", {"q": 1.5}, "q=1.5 is above 1"),
        ("next-gate", {"cache": "belady"}, "is not one of least-stale, lfru, lfu, lru"),
        ("next-gate", {"depth": True}, "is not a number"),
    ],
)
def test_a_bad_parameter_is_named_with_its_value(name, given, message):
    with pytest.raises(PolicyError, match=message):
        policies.get(name).parse(given)


def test_parameters_may_come_as_text():
    values, options = policies.get("accuracy-q").parse({"q": "0.5", "chunks": "3", "preempt": "no"})
    assert values["q"] == 0.5
    assert (options.chunks, options.preempt, options.staging_slots) == (3, False, None)


@pytest.mark.parametrize("name", policies.names())
def test_every_policy_says_what_it_is_and_where_it_is_from(name):
    info = policies.get(name)
    assert info.summary
    assert info.source
    assert info.flags.split()[0] in ("lossless", "lossy")
