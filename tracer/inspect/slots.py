"""Hit rate against slots: per-layer LRU and Belady with forced admission, all budgets in one pass.

The rules are the simulator's: hits are judged when a step's gate is known, all of the step's
experts are admitted, victims are never members of the wave in progress, ties leave by lowest
expert, recency is by last use, the cache starts empty and outlives requests. So the hits are those
of the policies `lru` and `belady`, to the last one.

While no step needs more experts than the smallest cache has slots, a larger cache holds all that a
smaller one does, and a look-up's *depth* in one stack says which caches hit (Mattson, Gecsei,
Slutz, Traiger, IBM Systems Journal 9(2), 1970). A step that needs more runs in waves, and the
inclusion breaks for both policies: the last wave of a smaller cache can be an expert that a larger
one has thrown out. Then every budget keeps its own content, side by side in one array.
"""

from __future__ import annotations

from heapq import heapify, heappop, heappushpop
from itertools import pairwise, repeat

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from tracer.workload import Ragged, next_use

POLICIES = ("lru", "belady")
MOST_SLOT_COUNTS = 32

Lookups = list[tuple[NDArray, NDArray]]


def slot_counts(num_experts: int, top_k: int) -> list[int]:
    """Slots a layer to evaluate: from k to E, at most about MOST_SLOT_COUNTS of them, evenly.

    Below k even one token runs in waves. A quarter and a half of E are among them where they can.
    """
    points = min(num_experts - top_k + 1, MOST_SLOT_COUNTS)
    spread = np.linspace(top_k, num_experts, points).round().astype(int).tolist()
    marks = [slots for slots in (num_experts // 4, num_experts // 2) if slots >= top_k]
    return sorted({*spread, *marks})


def lookups_by_layer(events: Ragged, num_experts: int) -> Lookups:
    """Each layer's look-ups in touch order: expert ids and the steps that need them, int64 [n]."""
    event = np.repeat(np.arange(len(events)), np.diff(events.offsets))
    layer, step = event % events.layers, event // events.layers
    ids = events.keys - layer * num_experts
    by_layer = np.argsort(layer, kind="stable")
    bounds = np.searchsorted(layer[by_layer], np.arange(events.layers + 1))
    return [(ids[by_layer[a:b]], step[by_layer[a:b]]) for a, b in pairwise(bounds)]


def hits_by_slots(
    events: Ragged,
    lookups: Lookups,
    distances: list[NDArray],
    prefill: NDArray,
    num_experts: int,
    slots: list[int],
) -> pd.DataFrame:
    """Hits of all layers together: policy, slots, phase, accesses, hits, hit_share.

    `lookups`: of `events`, by :func:`lookups_by_layer`; `distances`: theirs, by
    `reuse.reuse_distances`; `prefill` bool [steps]: whether a step computes prompt tokens (mixed
    steps do; the simulator counts them so).
    """
    largest = int(np.diff(events.offsets).max())
    if largest <= min(slots):
        depths = {
            "lru": distances,
            "belady": [belady_depths(ids, step, num_experts) for ids, step in lookups],
        }
        hits = {name: _hits_by_depth(depths[name], lookups, prefill, slots) for name in POLICIES}
    else:
        hits = {
            name: _hits_side_by_side(events, prefill, num_experts, slots, name) for name in POLICIES
        }
    return _table(hits, lookups, prefill, slots)


def _table(
    hits: dict[str, NDArray], lookups: Lookups, prefill: NDArray, slots: list[int]
) -> pd.DataFrame:
    in_prefill = sum(int(prefill[step].sum()) for _, step in lookups)
    accesses = {"decode": sum(len(ids) for ids, _ in lookups) - in_prefill, "prefill": in_prefill}
    rows = [
        (policy, count, phase, accesses[phase], int(hits[policy][row, column]))
        for policy in POLICIES
        for column, phase in enumerate(accesses)
        if accesses[phase]
        for row, count in enumerate(slots)
    ]
    table = pd.DataFrame(rows, columns=["policy", "slots", "phase", "accesses", "hits"])
    table["hit_share"] = table["hits"] / table["accesses"]
    return table


def _hits_by_depth(
    depths: list[NDArray], lookups: Lookups, prefill: NDArray, slots: list[int]
) -> NDArray:
    """Look-ups with a depth below each number of slots: int64 [slots, decode and prefill]."""
    hits = np.zeros((len(slots), 2), np.int64)
    for depth, (_, step) in zip(depths, lookups, strict=True):
        for phase in (0, 1):
            counts = np.bincount(depth[prefill[step] == phase], minlength=max(slots))
            hits[:, phase] += np.cumsum(counts)[np.array(slots) - 1]
    return hits


def belady_depths(ids: NDArray, step: NDArray, num_experts: int) -> NDArray:
    """Depth of each look-up in the stack of Belady's caches at its step's begin, int64 [n].

    A cache of C slots hits where the depth is below C; E: the expert is new. Valid for caches that
    hold the largest step. Level C of the stack is the expert that C + 1 slots hold and C do not.
    """
    never = int(step[-1]) + 1 if len(step) else 0
    bounds = [*np.flatnonzero(np.diff(step, prepend=-1)).tolist(), len(ids)]
    following = _next_steps(ids, step, never)
    # Smaller is better: the nearer next use, among equals the higher expert.
    codes = (following * num_experts + num_experts - 1 - ids).tolist()
    members = ids.tolist()
    code_of: list[int | None] = [None] * num_experts
    depths = []
    stack: list[int] = []
    for start, stop in pairwise(bounds):
        old = [code_of[expert] for expert in members[start:stop]]
        levels = [num_experts if code is None else stack.index(code) for code in old]
        depths += levels
        stack = _restack(stack, sorted(levels), codes[start:stop])
        for expert, code in zip(members[start:stop], codes[start:stop], strict=True):
            code_of[expert] = code
    return np.array(depths, np.int64)


def _restack(stack: list[int], levels: list[int], members: list[int]) -> list[int]:
    """The stack after a step that needs the experts at `levels` (ascending; beyond it: new).

    Its `members` (codes after the step) go to the top. From there down, a level keeps the best of
    those that no level above kept and its own; one that a member left has none of its own.
    """
    size = len(members)
    top = stack[:size]
    for level in reversed(levels):
        if level < size:
            del top[level]
    heapify(top)
    after, next_level = members.copy(), size
    for level in levels:
        if size <= level < len(stack):
            after.extend(map(heappushpop, repeat(top), stack[next_level:level]))
            after.append(heappop(top))
            next_level = level + 1
    if top:
        after.extend(map(heappushpop, repeat(top), stack[next_level:]))
        return after + sorted(top)
    return after + stack[next_level:]


def _next_steps(ids: NDArray, step: NDArray, never: int) -> NDArray:
    order = np.argsort(ids, kind="stable")
    same = ids[order[1:]] == ids[order[:-1]]
    following = np.full(len(ids), never, np.int64)
    following[order[:-1][same]] = step[order[1:][same]]
    return following


def _hits_side_by_side(
    events: Ragged, prefill: NDArray, num_experts: int, slots: list[int], policy: str
) -> NDArray:
    """Hits of every budget by its own content: int64 [slots, decode and prefill]."""
    caches = _Caches(events.layers, num_experts, np.array(slots))
    worth = _worth(events, num_experts, policy)
    hits = np.zeros((len(slots), 2), np.int64)
    bounds = events.offsets[:: events.layers]
    sizes = np.diff(events.offsets).reshape(-1, events.layers)
    for index, (start, stop) in enumerate(pairwise(bounds.tolist())):
        layer, expert = np.divmod(events.keys[start:stop].astype(np.int64), num_experts)
        found = caches.step(layer, expert, worth[start:stop], sizes[index])
        hits[:, int(prefill[index])] += found
    return hits


def _worth(events: Ragged, num_experts: int, policy: str) -> NDArray:
    """What each look-up makes its expert worth keeping, int64 [entries]: larger stays longer."""
    if policy == "lru":
        return np.arange(1, len(events.keys) + 1)
    # Among equal next uses the higher expert stays.
    return events.keys % num_experts - next_use(events).astype(np.int64) * num_experts


class _Caches:
    """Content of one cache a layer and budget: bool [L, E, budgets]."""

    def __init__(self, layers: int, num_experts: int, slots: NDArray) -> None:
        self._slots = slots
        self._resident = np.zeros((layers, num_experts, len(slots)), bool)
        self._worth = np.zeros((layers, num_experts), np.int64)
        self._rows = np.arange(layers)[:, None]

    def step(self, layer: NDArray, expert: NDArray, worth: NDArray, sizes: NDArray) -> NDArray:
        """Look up and admit a step's experts [n], in touch order by layer; hits, [budgets].

        `sizes` [L]: how many of them each layer has.
        """
        self._worth[layer, expert] = worth
        hit = self._resident[layer, expert]
        if not hit.all():
            self._admit(layer, expert, hit, sizes)
        return hit.sum(axis=0)

    def _admit(self, layer: NDArray, expert: NDArray, hit: NDArray, sizes: NDArray) -> None:
        """Keep the last wave and, of the others there before it, those worth most."""
        resident, slots = self._resident, self._slots
        waves = sizes[:, None] > slots
        last_begins = np.maximum(-(-sizes[:, None] // slots) - 1, 0) * slots
        room = slots - (sizes[:, None] - last_begins)
        if waves.any():
            place = _places(hit, sizes)
            last = place >= last_begins[layer]
            resident &= ~waves[:, None, :]
            resident[layer, expert] = (place >= last_begins[layer] - slots) & ~last
        else:
            last = np.ones_like(hit)
            resident[layer, expert] = False
        order = np.argsort(-self._worth, axis=1)
        best_first = resident[self._rows, order]
        best_first &= np.cumsum(best_first, axis=1, dtype=np.int16) <= room[:, None, :]
        resident[self._rows, order] = best_first
        resident[layer, expert] |= last


def _places(hit: NDArray, sizes: NDArray) -> NDArray:
    """Place of each member in its event's order of execution, [n, budgets]: hits, then misses."""
    begins = np.cumsum(sizes) - sizes
    before_hits = np.cumsum(hit, axis=0) - hit
    before_misses = np.cumsum(~hit, axis=0) - ~hit
    total = np.vstack([before_hits, before_hits[-1:] + hit[-1:]])
    first = np.repeat(begins, sizes)
    ends = np.repeat(begins + sizes, sizes)
    hits_of_event = total[ends] - before_hits[first]
    return np.where(
        hit,
        before_hits - before_hits[first],
        hits_of_event + before_misses - before_misses[first],
    )
