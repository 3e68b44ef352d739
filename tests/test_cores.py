"""The host thread's core: chosen by speed, given back afterwards."""

from __future__ import annotations

import os

import pytest

from replay import cores


@pytest.fixture
def affinity(monkeypatch: pytest.MonkeyPatch) -> list[set[int]]:
    """Calls that set this thread's cores, made on a machine of four."""
    calls: list[set[int]] = []
    monkeypatch.setattr(cores, "ALL", frozenset({3, 4, 5, 6}))
    monkeypatch.setattr(os, "sched_setaffinity", lambda pid, chosen: calls.append(set(chosen)))
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {3, 4, 5, 6})
    return calls


def test_the_core_whose_slowest_round_is_fastest_is_taken(
    affinity: list[set[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Round by round, core by core: 4 is fastest twice, but slow once.
    rounds = iter([20, 10, 30, 15, 20, 10, 30, 15, 20, 90, 30, 16])
    monkeypatch.setattr(cores, "_round_ns", lambda: next(rounds))
    assert cores.quietest() == (6, 16)


def test_the_cores_before_come_back(
    affinity: list[set[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cores, "quietest", lambda: (5, 90))
    with cores.on_quiet_core():
        assert affinity == [{5}]
    assert affinity == [{5}, {3, 4, 5, 6}]


def test_a_core_that_has_become_slow_is_left(
    affinity: list[set[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = iter([(5, 100), (3, 130)])
    monkeypatch.setattr(cores, "quietest", lambda: next(chosen))
    rounds = iter([115, 125, 150])
    monkeypatch.setattr(cores, "_round_ns", lambda: next(rounds))
    with cores.on_quiet_core() as core:
        assert core is not None
        core.keep()
        assert affinity == [{5}]
        core.keep()
        assert affinity == [{5}, {3}]
        core.keep()  # slow as it is, it was the fastest
        assert affinity == [{5}, {3}]


def test_machines_of_few_cores_are_left_alone(
    affinity: list[set[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cores, "ALL", frozenset({0, 1}))
    with cores.on_quiet_core() as core:
        assert core is None
    assert affinity == []


def test_this_threads_cores_are_as_before() -> None:
    before = os.sched_getaffinity(0)
    with cores.on_quiet_core():
        pass
    assert os.sched_getaffinity(0) == before
