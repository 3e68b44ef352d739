"""Times of one model on this machine: the engine itself on made-up routing, a cause at a time.

A decode step's routing is drawn so that so many experts of each event miss: a few experts of a
layer are always asked for, the others in turn, from a cache that cannot hold the turn. No trace, no
policy under test and no point that is judged later takes part.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from time import perf_counter_ns
from typing import TYPE_CHECKING, Any, ClassVar, Self

import numpy as np
import numpy.typing as npt
import torch

import policies
from configs.timings import ExpertsTime, HostTimes, LinkTimes, Pass
from policies.capacity import plan_memory
from policies.core import DecisionCore
from policies.interface import PolicyData, Shape
from replay.breakdown import Marks
from replay.calibrate.rig import CalibrationError
from replay.calibrate.stats import median_ns, steady_mean_ns
from replay.cores import LOOP_NS
from replay.cuda_driver import CopyStream
from replay.gated import MOST_IN_WORDS
from replay.play import ForcedStep, Measured, Replay, Session
from replay.slots import SlotPool
from sim.spans import COPY, DECIDE, EXPERTS, GPU, ISSUE, SEGMENT, STEP

if TYPE_CHECKING:
    from replay.launches import GroupLaunches
    from replay.tiles import TileEvent

Ints = npt.NDArray[np.int64]

DECODE_STEPS = 60
_SETTLING = 8  # steps of a run that are left out: caches fill, clocks rise
_PREFILLS = 6
_DECODES = 8  # steps after each: between prefills other code runs, as in use
_TRAFFIC_BYTES = 4 * 2**30
_LEAST_BLOCK = 8 * 2**20  # of traffic: smaller copies end before the next is handed over
_TRAIN = 40  # copies back to back
_REPEATS = 30
LEAST_KV_TOKENS = DECODE_STEPS + 2 * _REPEATS
"""What the KV cache must hold: steps of a run, then segments that each go on by one."""


@dataclass(frozen=True)
class Run(Marks):
    """A calibration run's marks, the first steps apart: caches fill, clocks rise.

    What the host did is as on one of the usual speed. ``slowness``: how many times as long it took.
    """

    slowness: float = 1.0
    settling: ClassVar[int] = _SETTLING

    @classmethod
    def measured(cls, measured: Measured) -> Self:
        """Of a run that sampled the host."""
        loop_ns = measured.host_loop_ns
        return replace(cls.of(measured).at_usual_speed(loop_ns), slowness=loop_ns / LOOP_NS)

    def settled(self, kind: int) -> npt.NDArray[np.bool_]:
        """Marks of a kind, without those of the first steps."""
        return (self.kind == kind) & (self.step >= self.settling)

    def landings(self) -> npt.NDArray[np.bool_]:
        """Marks that end launches of what has landed, without those of the first steps."""
        return self.launched_as_landed() & self.settled(EXPERTS)

    @property
    def step_ns(self) -> float:
        """Mean time of a step between its layers."""
        between = self.settled(STEP)
        return float(self.duration[between].sum() / len(np.unique(self.step[between])))


class PrefillRun(Run):
    """Of prefills with decode steps between them, whose marks are left out.

    So are the first prefills': they bring the experts in, compile and allocate.
    """

    settling: ClassVar[int] = _PREFILLS // 2 * (1 + _DECODES)

    def settled(self, kind: int) -> npt.NDArray[np.bool_]:
        """Marks of a kind, in prefills."""
        return super().settled(kind) & (self.step % (1 + _DECODES) == 0)


def _mean_of(runs: Sequence[Run], kind: int) -> int:
    """The mean of the runs' means, so that each weighs as much."""
    return round(float(np.mean([run.duration[run.settled(kind)].mean() for run in runs])))


# ---------------------------------------------------------------------- made-up routing


def needed(shape: Shape, rows: int) -> int:
    """Distinct experts of a made-up event of ``rows`` tokens: at most half of a layer's are there.

    More than that and no choice of misses would be left; real rows share experts, too.
    """
    return max(min(rows * shape.top_k, shape.experts // 2), shape.top_k)


def routing(
    shape: Shape, steps: int, misses: int, slots: int, first: int = 0, rows: int = 1
) -> Iterator[ForcedStep]:
    """Decode steps of ``rows`` tokens whose events miss ``misses`` experts in an LRU of ``slots``.

    The rows take the event's experts (:func:`needed`) in turn.
    """
    distinct = needed(shape, rows)
    fixed = distinct - misses
    turn = np.arange(fixed, shape.experts)
    if misses and len(turn) - misses < slots - fixed:
        raise ValueError(f"{slots} slots hold the whole turn of {len(turn)} experts")
    share = np.arange(rows * shape.top_k).reshape(rows, shape.top_k) % distinct
    requests = tuple(range(first, first + rows))
    for step in range(steps):
        chosen = np.roll(turn, -step * misses)[:misses]
        ids = np.concatenate((np.arange(fixed), chosen)).astype(np.int64)
        experts = np.tile(ids[share][:, None], (1, shape.layers, 1))
        begins = requests if step == 0 else ()
        ends = requests if step == steps - 1 else ()
        text = np.full(rows, step + 7)
        yield ForcedStep(step, False, begins, ends, text, experts, np.arange(rows))


def spread_routing(shape: Shape, tokens: int, seed: int) -> Ints:
    """Experts of ``tokens`` tokens, distinct within a token, evenly drawn: [tokens, layers, k]."""
    rng = np.random.default_rng(seed)
    draws = rng.random((tokens, shape.layers, shape.experts))
    return np.argpartition(draws, shape.top_k, axis=-1)[..., : shape.top_k].astype(np.int64)


def _core(shape: Shape, policy: str, slots: int) -> DecisionCore:
    """``slots`` a layer."""
    info = policies.get(policy)
    params, options = info.parse({})
    built = info.build(params, PolicyData(shape))
    nbytes = slots * sum(shape.bytes_by_layer)
    return DecisionCore(shape, plan_memory(shape, built.scope, nbytes), built, options)


class ModelRig:
    """A session's model under measurement, with the session's batch.

    ``readback_ns``: as the machine's profile has it.
    """

    def __init__(self, session: Session, readback_ns: int) -> None:
        ready = session.ready
        layers = len(ready.modules)
        self.session = session
        self.shape = Shape(layers, ready.num_experts, ready.top_k, (ready.layout.nbytes,) * layers)
        self.readback_ns = readback_ns

    @cached_property
    def link(self) -> LinkTimes:
        """Copies of one expert, alone and back to back."""
        return measure_link(self.session)

    # ------------------------------------------------------------------ decode

    @cached_property
    def decode(self) -> Pass:
        """A decode step of the whole batch: host, segments, head, experts' launches."""
        few = min(2, self.shape.top_k)
        runs = {
            misses: self._run_decode(misses) for misses in sorted({0, 1, few, self.shape.top_k})
        }
        experts = self._experts_alone()
        return Pass(
            tokens=self.session.rows,
            requests=self.session.rows,
            kv_tokens=self.session.kv_capacity,
            host=self._decode_host(runs),
            **self._chain(runs[0], experts[-1].ns),
            experts=tuple(experts),
        )

    def _run_decode(self, misses: int) -> Run:
        shape, rows = self.shape, self.session.rows
        slots = self._few_slots() if misses else shape.experts
        core = _core(shape, "lru", slots)
        steps = routing(shape, DECODE_STEPS, misses, slots, rows=rows)
        return Run.measured(self._run(core, list(steps)))

    def _run(self, core: DecisionCore, steps: Sequence[ForcedStep]) -> Measured:
        measured = Replay(self.session, core).run(steps, sample_host=True)
        self.session.host_loops_ns.append(measured.host_loop_ns)
        return measured

    def _few_slots(self) -> int:
        """Of a layer, where experts are to miss."""
        shape = self.shape
        return max(min(2 * shape.top_k, shape.experts // 2), needed(shape, self.session.rows))

    def _decode_host(self, runs: dict[int, Run]) -> HostTimes:
        resident, most_missed = runs[0], runs[self.shape.top_k]
        decisions = {n: median_ns(run.duration[run.settled(DECIDE)]) for n, run in runs.items()}
        idle = median_ns(resident.duration[resident.settled(ISSUE)])
        handed = most_missed.settled(ISSUE) & (most_missed.count > 0)
        # Of runs with one or two misses an event, and means: after a wait, calls take longer than
        # back to back, and what is rare and long costs as much as it takes.
        few = [runs[misses] for misses in (1, min(2, self.shape.top_k))]
        launch, each = _mean_of(few, EXPERTS), 0
        if self.session.rows > 1:
            launch, each = _launches_of_batch(few)
        return HostTimes(
            step_ns=round(float(np.mean([run.step_ns for run in few]))),
            segment_launch_ns=_mean_of(few, SEGMENT),
            experts_launch_ns=launch,
            launch_each_ns=each,
            readback_ns=self.readback_ns,
            decision_ns=decisions[0] + idle,
            awaited_ns=_slope(decisions),
            copy_issue_ns=median_ns(
                (most_missed.duration[handed] - idle) // most_missed.count[handed]
            ),
            landing_ns=self._landing_ns(runs[1], launch),
        )

    def _landing_ns(self, run: Run, launch_ns: int) -> int:
        """From the end of an event's one copy to the end of its launch, less a usual launch.

        The copy began as its hand-over ended; the others' launch comes before the wait.
        """
        link = self.link
        copy_ns = link.startup_ns + self.shape.bytes_by_layer[0] * 10**9 // link.bytes_per_s
        waits, handed = (np.flatnonzero(run.settled(kind)) for kind in (COPY, ISSUE))
        issued = handed[np.searchsorted(handed, waits) - 1]
        since = float((run.end[waits + 1] - run.end[issued]).mean())
        landing_ns = since - copy_ns - launch_ns * run.slowness
        return max(round(landing_ns / run.slowness), 0)

    def _chain(self, resident: Run, experts_ns: int) -> dict[str, Any]:
        """Segments and head: what the host waits for, less the experts before and the readback."""
        layers = self.shape.layers
        waited = [self._waited(resident, layer) for layer in range(layers + 1)]
        first = median_ns(resident.duration[resident.settled(GPU) & (resident.layer == 0)])
        segments = [max(first - self.readback_ns, 0)]
        segments += [max(ns - experts_ns - self.readback_ns, 0) for ns in waited[1:]]
        return {"segment_ns": tuple(segments[:layers]), "head_ns": segments[layers]}

    @staticmethod
    def _waited(run: Run, layer: int) -> int:
        """From the experts' launch to the next gate being known."""
        waits = np.flatnonzero(run.settled(GPU) & (run.layer == layer))
        return median_ns(run.end[waits] - run.end[waits - 2])

    def _experts_alone(self) -> list[ExpertsTime]:
        """Launches over some assignments on an idle GPU, until the host sees them done.

        Of one request over 1 to k, each another expert; of a batch over powers of two to all,
        which share experts as :func:`routing` has it.
        """
        shape, rows = self.shape, self.session.rows
        pool = self._pool()
        launches = self._launches(pool)
        rng = np.random.default_rng(0)
        most, distinct = rows * shape.top_k, needed(shape, rows)

        def once(assigned: int, repeat: int) -> int:
            layer = repeat % shape.layers
            slots = rng.choice(pool.slots, distinct, replace=False)
            named = [*slots[np.arange(assigned) % distinct].tolist(), *[-1] * (most - assigned)]
            return _until_done(lambda: launches.launch(layer, named))

        sizes = launch_sizes(rows, shape.top_k)
        _, beside = self.beside_copies
        return [
            ExpertsTime(
                experts=n,
                ns=self._gpu_ns([once(n, r) for r in range(_REPEATS)]),
                beside_ns=beside.get(n),
            )
            for n in sizes
        ]

    def _pool(self) -> SlotPool:
        """Slots to compute from: more than an event needs, so that they are read from memory."""
        shape, session = self.shape, self.session
        count = max(4 * shape.top_k, 2 * needed(shape, session.rows))
        return SlotPool(session.ready.layout, count, session.device)

    @cached_property
    def beside_copies(self) -> tuple[float, dict[int, int]]:
        """What copies beside it do to a segment (a fraction), and to launches of experts (ns).

        Of one assignment and the most that a launch's arguments name, and of those beyond.
        """
        shape, session = self.shape, self.session
        captured = session.captured()
        launches = self._launches(self._pool())
        traffic = Traffic(session)  # while the slots are there: not in their memory
        most, distinct = session.rows * shape.top_k, needed(shape, session.rows)
        slots = (np.arange(most) % distinct).tolist()

        def segment(repeat: int) -> None:
            captured.graphs[1 + repeat % (shape.layers - 1)].replay()

        plain, more = self._beside(segment, traffic)
        found = {}
        for size in launch_sizes(session.rows, shape.top_k):
            if size in (1, min(most, MOST_IN_WORDS)) or size > MOST_IN_WORDS:
                named = [*slots[:size], *[-1] * (most - size)]

                def launch(repeat: int, named: list[int] = named) -> None:
                    launches.launch(repeat % shape.layers, named)

                found[size] = max(self._beside(launch, traffic)[1], 0)
        return max(more / max(plain, 1), 0.0), found

    def _beside(self, launch: Callable[[int], None], traffic: Traffic) -> tuple[int, int]:
        """GPU time alone, and how much longer it takes beside copies."""
        alone, beside = [], []
        for repeat in range(_REPEATS):
            alone.append(_until_done(lambda: launch(repeat)))  # noqa: B023 - runs at once
        traffic.begin()
        for repeat in range(_REPEATS):
            beside.append(_until_done(lambda: launch(repeat), synchronize=False))  # noqa: B023
        if traffic.ended():
            raise CalibrationError("copies ended before the work beside them")
        traffic.finish()
        return self._gpu_ns(alone), self._gpu_ns(beside) - self._gpu_ns(alone)

    def _gpu_ns(self, seen: list[int]) -> int:
        return max(median_ns(seen) - self.readback_ns, 0)

    def _launches(self, pool: SlotPool) -> GroupLaunches:
        from replay.graphs import require_kernels
        from replay.launches import group_launches

        kernels = require_kernels(self.session.ready.modules, pool.views)
        return group_launches(self.session.captured(), kernels)

    # ------------------------------------------------------------------ prefill

    def prefill(self, tokens: int) -> Pass:
        """A prefill of ``tokens``, eagerly: with all experts there, with none, and in waves.

        Of a batch, evenly over its requests.
        """
        shape = self.shape
        there = self._run_prefill("lru", shape.experts, tokens)
        absent = self._run_prefill("on-demand", shape.experts, tokens)
        waves = self._run_prefill("lru", max(shape.experts // 4, shape.top_k), tokens)
        tails = [
            max(median_ns(there.duration[there.settled(GPU) & (there.layer == layer)]), 0)
            for layer in range(shape.layers + 1)
        ]
        tails = [max(tail - self.readback_ns, 0) for tail in tails]
        launches = there.settled(EXPERTS)
        singles = absent.settled(EXPERTS) & (absent.count == 1)
        if not singles.any():  # tiny experts land several at a time
            singles = absent.settled(EXPERTS)
        single = _steady((absent,), lambda _: singles)
        whole, most = median_ns(there.duration[launches]), float(np.mean(there.count[launches]))
        # Of runs with misses: after waits for copies the same work takes longer (on an H200's host
        # 1.4 times as long) than in a prefill whose experts are all there.
        missing = (absent, waves)
        host = self.decode.host.model_copy(
            update={
                "step_ns": round(float(np.mean([run.step_ns for run in missing]))),
                "segment_launch_ns": _steady(missing, lambda run: run.settled(SEGMENT)),
                "experts_launch_ns": single,
                "launch_each_ns": max(round((whole - single) / max(most - 1, 1)), 0),
                **_decisions(waves),
            }
        )
        return Pass(
            tokens=tokens,
            requests=self.session.rows,
            kv_tokens=self.session.kv_capacity,
            host=host,
            segment_ns=tuple(tails[: shape.layers]),
            head_ns=tails[shape.layers],
            experts=tuple(self._tiles_alone(tokens)),
        )

    def _run_prefill(self, policy: str, slots: int, tokens: int) -> Run:
        steps = self.prefill_steps(tokens, slots)
        return PrefillRun.measured(self._run(_core(self.shape, policy, slots), steps))

    def prefill_steps(self, tokens: int, slots: int) -> list[ForcedStep]:
        """Prefills, each followed by decode steps of other requests over the same few experts."""
        steps: list[ForcedStep] = []
        for _ in range(_PREFILLS):
            steps.append(self._prefill_step(tokens, len(steps)))
            steps += self._decode_steps(_DECODES, slots, len(steps))
        return steps

    def _decode_steps(self, count: int, slots: int, index: int) -> list[ForcedStep]:
        """From step ``index`` on, of requests of their own, which end with the last."""
        rows = self.session.rows
        made = routing(self.shape, count, 0, slots, first=index * rows, rows=rows)
        return [replace(step, index=index + step.index) for step in made]

    def _prefill_step(self, tokens: int, index: int) -> ForcedStep:
        """Of requests of their own, which end with it."""
        text = np.arange(tokens) % 97 + 11
        rows = self.session.rows
        seats = np.arange(tokens) * rows // tokens
        requests = tuple(range(index * rows, (index + 1) * rows))
        experts = spread_routing(self.shape, tokens, index)
        return ForcedStep(index, True, requests, requests, text, experts, seats)

    def _tiles_alone(self, tokens: int) -> list[ExpertsTime]:
        """Launches over some and over all experts of an event of a prefill, on an idle GPU."""
        event, needed = self.tile_event(tokens)
        table = []
        for experts in sorted({1, max(len(needed) // 4, 1), len(needed)}):
            group = {expert: slot for slot, expert in enumerate(needed[:experts])}

            def launch(group: dict[int, int] = group) -> None:
                event.restart()
                event.launch(group)

            seen = [_until_done(launch) for _ in range(_REPEATS)]
            table.append(ExpertsTime(experts=experts, ns=self._gpu_ns(seen)))
        return table

    def tile_event(self, tokens: int) -> tuple[TileEvent, list[int]]:
        """An event of a prefill, and the experts that it needs; a pool has a slot for each."""
        from replay.kernels import gated_experts
        from replay.tiles import TileExperts, common_kernel

        shape, session = self.shape, self.session
        pool = SlotPool(session.ready.layout, shape.experts, session.device)
        modules = session.ready.modules
        kernel = common_kernel([gated_experts(module, pool.views) for module in modules])
        assert kernel is not None, "a model with captured decode steps"
        tiles = TileExperts(kernel, shape.experts, shape.top_k, tokens)
        hidden = torch.zeros((tokens, tiles.width), dtype=torch.bfloat16, device=session.device)
        out = hidden.new_empty((tokens * shape.top_k, tiles.width))
        flat = np.ascontiguousarray(spread_routing(shape, tokens, 0)[:, 0]).reshape(-1)
        return tiles.event(hidden, flat, out), np.unique(flat).tolist()

    # ------------------------------------------------------------------ memory

    def workspace_bytes(self, prefill_tokens: int | None) -> int | None:
        """Peak GPU memory of a prefill (None: of none) and decode steps, less :func:`held_bytes`.

        With all that the session keeps for its runs so far. None: the device is no GPU.
        """
        if self.session.device.type != "cuda":
            return None
        gc.collect()  # nothing of the runs before is left
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        slots = self.run_for_memory(prefill_tokens)
        return torch.cuda.max_memory_allocated() - held_bytes(self.session, slots)

    def run_for_memory(self, prefill_tokens: int | None) -> int:
        """A prefill, if any, and two decode steps with few slots; returns how many."""
        slots = self._few_slots()
        steps = [] if prefill_tokens is None else [self._prefill_step(prefill_tokens, 0)]
        steps += self._decode_steps(2, slots, len(steps))
        Replay(self.session, _core(self.shape, "lru", slots)).run(steps)
        return slots * self.shape.layers


def held_bytes(session: Session, slots: int) -> int:
    """GPU memory of non-expert weights, of the KV cache (once a step has run) and of the slots."""
    weights = sum(parameter.nbytes for parameter in session.ready.model.parameters())
    layers: Any = session.cache.layers
    cache = sum(layer.keys.nbytes + layer.values.nbytes for layer in layers)
    return int(weights + cache + slots * session.ready.layout.nbytes)


def _launches_of_batch(runs: Sequence[Run]) -> tuple[int, int]:
    """Mean time of what is launched as it lands, and how much more each further expert costs.

    A batch's first launch of an event is of many experts, whose slots go another way than those of
    the few that land at a time.
    """
    landed = np.concatenate([run.landings() for run in runs])
    others = np.concatenate([run.settled(EXPERTS) for run in runs]) & ~landed
    duration, count = (
        np.concatenate([getattr(run, name) for run in runs]) for name in ("duration", "count")
    )
    alone, first = float(duration[landed].mean()), float(duration[others].mean())
    further = max(float(count[others].mean()) - 1, 1.0)
    return round(alone), max(round((first - alone) / further), 0)


def _steady(runs: Sequence[Run], chosen: Callable[[Run], npt.NDArray[np.bool_]]) -> int:
    """The steady mean of the runs' chosen marks, together."""
    found = steady_mean_ns(np.concatenate([run.duration[chosen(run)] for run in runs]))
    if found is None:
        raise CalibrationError("a calibration run did nothing of what was to be timed")
    return found


def _decisions(run: Run) -> dict[str, int]:
    """Mean time of decisions about first and later waves; the latter where there are any."""
    decided, first = run.settled(DECIDE), run.first_waves()
    found = {"decision_ns": _steady((run,), lambda run: decided & first)}
    if (decided & ~first).any():
        found["next_wave_ns"] = round(float(run.duration[decided & ~first].mean()))
    return found


class Traffic:
    """Copies back to back, to run something beside: experts, or larger blocks of small ones."""

    def __init__(self, session: Session) -> None:
        store = session.ready.store.memory.view(-1)
        nbytes = min(max(session.ready.layout.nbytes, _LEAST_BLOCK), store.numel())
        self._stream = torch.cuda.Stream()
        self._count = max(_TRAFFIC_BYTES // nbytes, 1)
        self._nbytes = nbytes
        self._source = store[: store.numel() // nbytes * nbytes].view(-1, nbytes)
        self._target = torch.empty((_TRAIN, nbytes), dtype=torch.uint8, device=session.device)

    def begin(self) -> None:
        """Hand over some 60 ms of copies, and see the first of them end."""
        self._copies = CopyStream(self._stream.cuda_stream, self._count)
        self._events = [
            self._copies.copy(
                self._target[index % _TRAIN].data_ptr(),
                self._source[index % len(self._source)].data_ptr(),
                self._nbytes,
            )
            for index in range(self._count)
        ]
        while not self._copies.landed(self._events[0]):
            pass

    def ended(self) -> bool:
        """Whether all have landed."""
        return self._copies.landed(self._events[-1])

    def finish(self) -> None:
        """Wait for the rest."""
        self._stream.synchronize()
        self._copies.close()


def launch_sizes(rows: int, top_k: int) -> list[int]:
    """How many assignments to time launches of: all up to k, then in powers of two to all.

    With the least that a launch's arguments do not name: its slots go another way.
    """
    if rows == 1:
        return list(range(1, top_k + 1))
    most = rows * top_k
    sizes = {2**power for power in range((most - 1).bit_length())} | {MOST_IN_WORDS + 1, most}
    return sorted(size for size in sizes if size <= most)


def _until_done(launch: Callable[[], object], *, synchronize: bool = True) -> int:
    """Ns from the end of the launch until the host sees it done, the GPU being idle before."""
    done = torch.cuda.Event()
    if synchronize:
        torch.cuda.synchronize()
    launch()
    began = perf_counter_ns()
    done.record()
    while not done.query():
        pass
    return perf_counter_ns() - began


def _slope(values: dict[int, int]) -> int:
    """Of a line through values by how many experts missed; never below 0."""
    return max(round(float(np.polyfit(list(values), list(values.values()), 1)[0])), 0)


def measure_link(session: Session) -> LinkTimes:
    """Copies of one expert, alone and back to back; the rate is that of a copy's second half.

    Of experts below ``_LEAST_BLOCK`` the rate is that of several in one copy: what a half of a
    small one takes on the wire is lost in how long the host takes to hand it over.
    """
    nbytes = session.ready.layout.nbytes
    stream = torch.cuda.Stream()
    copies = CopyStream(stream.cuda_stream, _TRAIN)
    memory = session.ready.store.memory.view(-1, nbytes)
    together = min(-(-_LEAST_BLOCK // nbytes), len(memory))
    block = together * nbytes
    # Slots of their own, as in a run.
    slots = torch.empty((_TRAIN, block), dtype=torch.uint8, device=session.device)
    rng = np.random.default_rng(0)

    def train(size: int, count: int) -> int:
        """Ns from the end of the first hand-over to the last landing."""
        events, began = [], 0
        first = rng.integers(0, len(memory) - together + 1, count)
        for slot, key in enumerate(first.tolist()):
            events.append(copies.copy(slots[slot].data_ptr(), memory[key].data_ptr(), size))
            began = began or perf_counter_ns()
        for event in events:
            while not copies.landed(event):
                pass
        return perf_counter_ns() - began

    def back_to_back(size: int) -> float:
        return (train(size, _TRAIN) - train(size, 1)) / (_TRAIN - 1)

    train(block, _TRAIN)
    sizes = nbytes, block, block // 2
    rounds = [{size: back_to_back(size) for size in dict.fromkeys(sizes)} for _ in range(9)]
    one, whole, half = (float(np.median([each[size] for each in rounds])) for size in sizes)
    alone = float(np.median([train(nbytes, 1) for _ in range(_REPEATS)]))
    copies.close()
    if whole <= half:
        raise CalibrationError(
            f"copies of {block} bytes take {whole:.0f} ns each, of half as many {half:.0f}: "
            "experts too small, or a link too busy, to measure its rate"
        )
    rate = (block - block // 2) * 1e9 / (whole - half)
    wire = nbytes * 1e9 / rate
    return LinkTimes(
        bytes_per_s=round(rate),
        startup_ns=max(round(alone - wire), 0),
        gap_ns=max(round(one - wire), 0),
    )
