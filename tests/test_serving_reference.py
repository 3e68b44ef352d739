"""The scheduler beside plain loops written from docs/serving.md, on random cases."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from sim.serving.machine import rules_of
from sim.serving.stage import EventMaker
from tests.reference.plain_serving import Job, plain_serving
from tests.served import RowTiming, all_of, at, run, users, workload
from tracer.workload import TOUCH_ORDERS, distinct, touched

TIMES = ("arrival", "scheduled", "first_token", "first_decode", "finish")
#: beside a segment: the experts' launch and the head
REST = 10 + 50

request_lengths = st.tuples(st.integers(0, 6), st.integers(0, 5)).filter(lambda each: sum(each) > 0)


@st.composite
def cases(draw: Any) -> dict[str, Any]:
    lengths = draw(st.lists(request_lengths, min_size=1, max_size=9))
    batch = draw(st.integers(1, 4))
    longest = max(map(sum, lengths))
    count = len(lengths)
    gaps = st.lists(st.integers(0, 3000), min_size=count, max_size=count)
    return {
        "lengths": lengths,
        "arrivals": draw(st.one_of(st.none(), gaps.map(lambda each: np.cumsum(each).tolist()))),
        "users": draw(st.integers(1, 5)),
        "think_ns": draw(st.sampled_from([0, 1, 1500, 20_000])),
        "batch": batch,
        "kv_tokens": longest + draw(st.integers(0, 2 * longest)),
        "chunk": draw(st.one_of(st.none(), st.integers(1, 4))),
        "step_tokens": draw(st.one_of(st.none(), st.integers(batch, batch + 5))),
        "mixed": draw(st.booleans()),
        "static": draw(st.booleans()),
    }


@settings(max_examples=250, deadline=None)
@given(cases())
@example(
    {
        "lengths": [(0, 2), (4, 1), (0, 3), (2, 2)],
        "arrivals": [0, 0, 0, 0],
        "users": 1,
        "think_ns": 0,
        "batch": 3,
        "kv_tokens": 12,
        "chunk": 2,
        "step_tokens": 4,
        "mixed": False,
        "static": False,
    }
)
def test_steps_and_times_are_those_of_plain_loops(case: dict[str, Any]) -> None:
    lengths, arrivals = case["lengths"], case["arrivals"]
    limits = {name: case[name] for name in ("chunk", "step_tokens", "mixed", "static")}
    rules = rules_of(case["batch"], case["kv_tokens"], **limits)
    count = len(lengths)
    source = users(case["users"], case["think_ns"], count) if arrivals is None else at(*arrivals)
    timing = RowTiming()
    ran = run(workload(lengths), source, count, rules=rules, timing=timing)
    jobs = [Job(prompt, decode) for prompt, decode in lengths]

    def step_ns(prefill: int, decode: int, requests: int) -> int:
        return timing.segment_ns(0, prefill + decode, requests, 0) + REST

    steps = plain_serving(
        jobs,
        arrivals=arrivals,
        users=case["users"],
        think_ns=case["think_ns"],
        batch=case["batch"],
        kv_tokens=case["kv_tokens"],
        step_ns=step_ns,
        **limits,
    )
    for name in TIMES:
        assert all_of(ran, name) == [getattr(job, name) for job in jobs], name
    assert ran.machine.times.begin == [begin for begin, _, _ in steps]
    assert ran.machine.times.end == [end for _, end, _ in steps]
    assert ran.machine.log.requests == [len(rows) for _, _, rows in steps]


@pytest.mark.parametrize("order", [*TOUCH_ORDERS, "best-first"])
@pytest.mark.parametrize("seed", range(4))
def test_events_of_drawn_rows_are_those_of_a_recorded_step(order: str, seed: int) -> None:
    rng = np.random.default_rng(seed)
    rows, layers, experts, width = 40, 3, 8, 3
    ids = np.argsort(rng.random((rows, layers, experts)), -1)[..., :width].astype(np.int16)
    if seed % 2:
        ids[rng.random((rows, layers)) < 0.3] = -1
    maker = EventMaker(ids, experts, order)
    for size in (1, 2, 7, 25):
        chosen = rng.choice(rows, size)
        recorded = distinct(ids[chosen], np.zeros(size, np.int64), 1, experts, order)
        if size == 1:
            assert maker.one(int(chosen[0])) == recorded.step(0)
        else:
            assert maker.several(chosen) == (recorded.step(0), recorded.step_counts(0))


@given(
    st.lists(st.permutations(range(9)).map(lambda ids: ids[:4]), min_size=1, max_size=12),
    st.sampled_from([*TOUCH_ORDERS, "best-first"]),
)
def test_few_tokens_are_counted_as_arrays_count_them(rows: list[list[int]], order: str) -> None:
    recorded = distinct(np.array(rows)[:, None], np.zeros(len(rows), np.int64), 1, 9, order)
    found = touched(rows, order)
    assert (list(found), list(found.values())) == (
        recorded.step(0)[0],
        recorded.step_counts(0)[0],
    )
