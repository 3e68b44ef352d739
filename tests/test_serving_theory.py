"""Serving against theory: M/D/1, closed loops, and steps that were worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest

from sim.serving.arrivals import Open, poisson_ns
from sim.serving.schedule import Rules
from tests.served import STEP, all_of, at, run, users, workload

ONE_ROW = [(0, 1)] * 3
REQUESTS = 12_000


def many(**changes: object) -> Rules:
    return Rules(**{"batch": 2, "kv_tokens": 10**6, **changes})  # type: ignore[arg-type]


# ---------------------------------------------------------------------- M/D/1


def regenerative(waits: np.ndarray) -> tuple[float, float]:
    """Mean wait and its standard error.

    Busy periods begin with a wait of zero and are independent of each other, so the mean wait is a
    ratio of two means over them, whose variance is that of (sum of waits - mean x customers) over
    busy periods, by (number of them x customers each squared).
    """
    first = np.flatnonzero(waits == 0)
    sums = np.add.reduceat(waits.astype(float), first)
    customers = np.diff(np.append(first, len(waits)))
    mean = sums.sum() / customers.sum()
    residual = sums - mean * customers
    return mean, float(np.sqrt((residual**2).sum())) / customers.sum()


@pytest.mark.parametrize("load", [0.3, 0.6, 0.8])
def test_the_mean_wait_of_m_d_1(load: float) -> None:
    """Pollaczek and Khinchine: rho S / (2 (1 - rho)); M/M/1's, twice as long, is told apart."""
    arrivals = poisson_ns(load / STEP * 1e9, REQUESTS, seed=11)
    ran = run(workload(ONE_ROW), Open(arrivals), REQUESTS)
    waits = np.array(all_of(ran, "scheduled")) - np.array(all_of(ran, "arrival"))
    lindley = [0]
    for gap in np.diff(arrivals).tolist():
        lindley.append(max(0, lindley[-1] + STEP - gap))
    assert waits.tolist() == lindley
    mean, error = regenerative(waits)
    theory = load * STEP / (2 * (1 - load))
    assert error < theory / 8
    assert abs(mean - theory) < 4 * error
    assert abs(mean - 2 * theory) > 4 * error
    busy = 1 - ran.machine.idle_ns / ran.machine.times.end[-1]
    # Of n exponential gaps the mean is within 4 / sqrt(n) of its own, relatively.
    assert busy == pytest.approx(load, rel=4 / np.sqrt(REQUESTS))
    queue = ran.little["queue"]
    assert queue["mean_number"] == pytest.approx(
        queue["arrivals_per_s"] * queue["mean_time_ms"] / 1e3
    )


# ---------------------------------------------------------------------- closed loops


def test_two_users_by_hand() -> None:
    """S = 160, Z = 100: the second waits for the first, and from then on the server is busy."""
    ran = run(workload(ONE_ROW), users(2, 100, 6), 6)
    assert all_of(ran, "arrival") == [0, 0, 260, 420, 580, 740]
    assert all_of(ran, "scheduled") == [0, 160, 320, 480, 640, 800]
    assert all_of(ran, "finish") == [160, 320, 480, 640, 800, 960]
    assert ran.machine.idle_ns == 0


def test_one_user_thinks_by_hand() -> None:
    ran = run(workload(ONE_ROW), users(1, 40, 3), 3)
    assert all_of(ran, "arrival") == all_of(ran, "scheduled") == [0, 200, 400]
    assert all_of(ran, "finish") == [160, 360, 560]
    assert ran.machine.idle_ns == 80


@pytest.mark.parametrize(
    ("number", "think_ns"), [(1, 0), (1, 500), (3, 1000), (3, 100), (8, 500), (8, 5000)]
)
def test_the_interactive_response_time_law(number: int, think_ns: int) -> None:
    """X = N / (R + Z), and X = min(1 / S, N / (S + Z)) with constant service and thinking."""
    count = 400
    ran = run(workload(ONE_ROW), users(number, think_ns, count), count)
    arrival, finish = np.array(all_of(ran, "arrival")), np.array(all_of(ran, "finish"))
    # From an answer in the middle to a later one: whole cycles, no start-up, no run-out.
    begin, end = count // 4, 3 * count // 4
    rate = (end - begin) / (finish[end] - finish[begin])
    response = (finish - arrival)[begin:end].mean()
    edge = number / (end - begin)  # cycles that the two ends cut
    assert rate * (response + think_ns) == pytest.approx(number, rel=edge)
    assert rate == pytest.approx(min(1 / STEP, number / (STEP + think_ns)), rel=edge)
    assert rate <= 1 / STEP


def test_batches_serve_more_users_in_the_same_steps() -> None:
    """A step takes as long with four rows as with one: four places, four times the rate."""
    rates = []
    for batch in (1, 4):
        ran = run(workload([(0, 5)]), users(4, 0, 40), 40, rules=many(batch=batch))
        rates.append(40 / ran.machine.times.end[-1])
    assert rates[1] == pytest.approx(4 * rates[0])


# ---------------------------------------------------------------------- schedulers by hand

THREE = [(0, 1), (0, 3), (0, 2)]


def test_continuous_batches_by_hand() -> None:
    """The third takes the first's place after one step."""
    ran = run(workload(THREE), at(0, 0, 0), 3, rules=many())
    assert all_of(ran, "scheduled") == [0, 0, STEP]
    assert all_of(ran, "finish") == [STEP, 3 * STEP, 3 * STEP]
    assert ran.machine.log.requests == [2, 2, 2]


def test_static_batches_by_hand() -> None:
    """The third waits until both are done."""
    ran = run(workload(THREE), at(0, 0, 0), 3, rules=many(static=True))
    assert all_of(ran, "scheduled") == [0, 0, 3 * STEP]
    assert all_of(ran, "finish") == [STEP, 3 * STEP, 5 * STEP]
    assert ran.machine.log.requests == [2, 1, 1, 1, 1]
    assert ran.machine.log.lines == [2, 2, 2, 1, 1]


def test_a_static_batch_is_formed_of_who_is_there() -> None:
    ran = run(workload(THREE), at(5, 6, 7), 3, rules=many(static=True))
    assert all_of(ran, "scheduled") == [5, 5 + STEP, 5 + STEP]
    assert all_of(ran, "finish") == [5 + STEP, 5 + 4 * STEP, 5 + 3 * STEP]


def test_who_arrives_as_a_step_begins_takes_part() -> None:
    ran = run(workload(THREE), at(0, STEP, STEP + 1), 3, rules=many(batch=3))
    assert all_of(ran, "scheduled") == [0, STEP, 2 * STEP]


PROMPTS = [(5, 2), (1, 4)]


def test_a_whole_prompt_is_one_step() -> None:
    ran = run(workload(PROMPTS), at(0, 1), 2, rules=many())
    assert all_of(ran, "first_token") == [STEP, 2 * STEP]
    assert all_of(ran, "finish") == [3 * STEP, 6 * STEP]
    assert ran.machine.log.prefill_rows == [5, 1, 0, 0, 0, 0]
    assert ran.machine.log.decode_rows == [0, 1, 2, 1, 1, 1]


def test_chunks_share_steps_with_decode_rows() -> None:
    """Prompt of five by twos: 2, 2, 1; the other decodes meanwhile."""
    ran = run(workload([(1, 4), (5, 2)]), at(0, 0), 2, rules=many(chunk=2))
    assert ran.machine.log.prefill_rows == [3, 2, 1, 0, 0]
    assert ran.machine.log.decode_rows == [0, 1, 1, 2, 2]
    assert all_of(ran, "first_token") == [STEP, 3 * STEP]
    assert all_of(ran, "first_decode") == [2 * STEP, 4 * STEP]


def test_chunks_apart_from_decode_rows() -> None:
    ran = run(workload([(1, 4), (5, 2)]), at(0, 0), 2, rules=many(chunk=2, mixed=False))
    assert ran.machine.log.prefill_rows == [3, 2, 1, 0, 0, 0, 0]
    assert ran.machine.log.decode_rows == [0, 0, 0, 2, 2, 1, 1]


def test_rows_of_a_step_are_limited() -> None:
    """Three rows a step: decode rows first, the rest for prompts."""
    ran = run(workload([(4, 2), (5, 1)]), at(0, 0), 2, rules=many(step_tokens=3))
    assert ran.machine.log.prefill_rows == [3, 3, 2, 1, 0]
    assert ran.machine.log.decode_rows == [0, 0, 1, 1, 1]
    assert all_of(ran, "scheduled") == [0, STEP]


def test_the_kv_pool_admits_in_order_and_nobody_overtakes() -> None:
    """Four, four and one token of seven: the second does not fit, the third waits behind it."""
    ran = run(workload([(0, 4), (0, 4), (0, 1)]), at(0, 0, 0), 3, rules=many(batch=3, kv_tokens=7))
    assert all_of(ran, "scheduled") == [0, 4 * STEP, 4 * STEP]
    assert ran.server.ledger.kv_most == 5


def test_a_static_batch_holds_its_kv_until_it_is_over() -> None:
    lengths = [(0, 1), (0, 3), (0, 3)]
    rules = {"batch": 3, "kv_tokens": 4}
    static = run(workload(lengths), at(0, 0, 0), 3, rules=many(static=True, **rules))
    continuous = run(workload(lengths), at(0, 0, 0), 3, rules=many(**rules))
    assert all_of(static, "scheduled") == all_of(continuous, "scheduled") == [0, 0, 3 * STEP]


# ---------------------------------------------------------------------- the machine beneath


def test_waves_appear_where_a_batch_needs_more_experts_than_there_are_slots() -> None:
    work = workload([(0, 6)] * 4, experts=8, top_k=2)
    waves = {}
    for batch in (1, 4):
        rules = many(batch=batch)
        ran = run(work, at(0, 0, 0, 0), 4, rules=rules, policy="lru", slots=2)
        log = ran.machine.log
        waves[batch] = log.waves[-1] / log.events[-1]
        assert max(log.experts) <= 8
    assert waves[1] == 1
    assert waves[4] > 1.5


def test_copies_go_on_while_nobody_is_there() -> None:
    """An idle stretch is no step: nothing is demanded in it, and time adds up."""
    ran = run(workload([(0, 2)] * 3), at(0, 10_000, 90_000), 3, policy="lru", slots=2)
    times = ran.machine.times
    busy = sum(end - begin for begin, end in zip(times.begin, times.end, strict=True))
    assert busy + ran.machine.idle_ns == times.end[-1]
    assert ran.machine.idle_ns > 80_000
