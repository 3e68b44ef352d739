"""The host thread: launches, hand-overs, readback, pinning, and a gate event's decision."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

import policies
from policies.capacity import plan_memory
from policies.core import DecisionCore
from policies.interface import PolicyData, Shape
from replay.calibrate.rig import Pool, Rig, Sizes, Tensor, Work, device_ns, host_ns, spin
from replay.calibrate.stats import Reading, rate, summary
from tracer.workload import Workload

_BUDGET_SHARE = 4  # a quarter of the experts has a slot


def measure_launches(rig: Rig, sizes: Sizes, one_segment: Any, group: Any) -> Iterator[Reading]:
    """Host time of launches and hand-overs. ``one_segment``, ``group``: graphs of one layer."""
    slots = rig.pinned(8 * sizes.top_k)
    table = rig.device_bytes(8 * sizes.top_k)

    def launch_group() -> None:
        rig.copy(table, slots)
        rig.launch(group)

    times = host_ns(rig, lambda: rig.launch(one_segment), sizes.repeats)
    how = "launch of a CUDA graph of a layer's projections, norms, gate and top-k"
    yield Reading("segment_launch_ns", summary(times), "ns", how)
    times = host_ns(rig, launch_group, sizes.repeats)
    how = "slot numbers handed over from pinned memory, then launch of a CUDA graph of a layer's"
    yield Reading("experts_launch_ns", summary(times), "ns", f"{how} top-k experts")
    number = rig.random(1)
    eager = Work("add", lambda: number.add_(1))
    times = host_ns(rig, lambda: rig.run(eager), sizes.repeats)
    yield Reading("eager_launch_ns", summary(times), "ns", "one kernel outside a graph")


def measure_issue(rig: Rig, sizes: Sizes, pinned: Pool) -> Iterator[Reading]:
    """Host time of handing one chunk over, while another is on the link."""
    stream, event = rig.stream(), rig.event(timing=False)
    device = rig.device_bytes(sizes.chunk_bytes)

    def whole() -> None:
        rig.copy(device, pinned.piece(sizes.chunk_bytes), stream)
        rig.record(event, stream)

    def behind(call: Callable[[], object]) -> list[int]:
        times = []
        for _ in range(sizes.repeats):
            whole()
            start = rig.now_ns()
            call()
            times.append(rig.now_ns() - start)
            rig.synchronize()
        return times

    how = f"{sizes.chunk_bytes} bytes from pinned memory to a side stream, then its event"
    yield Reading("copy_issue_ns", summary(behind(whole)), "ns", how)
    piece = pinned.piece(sizes.chunk_bytes)
    bare = behind(lambda: rig.copy(device, piece))
    yield Reading("copy_call_ns", summary(bare), "ns", "the copy alone, on the stream in use")


def measure_readback(rig: Rig, sizes: Sizes, segments: Any) -> Iterator[Reading]:
    """From the end of the GPU's work to the host having the ids. ``segments``: a captured graph."""
    device = float(summary(device_ns(rig, lambda: rig.launch(segments), sizes.repeats)).value)
    ids = segments.output
    host = rig.pinned(ids.numel() * ids.element_size()).view(ids.dtype).view(ids.shape)
    event = rig.event(timing=False)

    def once(wait: Callable[[], object]) -> float:
        rig.synchronize()
        rig.launch(segments)
        launched = rig.now_ns()
        rig.copy(host, ids)
        rig.record(event)
        wait()
        return rig.now_ns() - launched - device

    spun = [once(lambda: spin(rig, event)) for _ in range(sizes.repeats)]
    how = (
        f"ids {list(ids.shape)} to pinned memory, host polls the event; time from the launch's "
        "end, less the work's own time on the GPU"
    )
    yield Reading("readback_ns", summary([max(0.0, time) for time in spun]), "ns", how)
    blocked = [once(lambda: rig.wait(event)) for _ in range(sizes.repeats)]
    how = "the same, the host blocking on the event"
    yield Reading("readback_blocking_ns", summary([max(0.0, t) for t in blocked]), "ns", how)


def measure_pinning(rig: Rig, sizes: Sizes) -> Iterator[Reading]:
    """Bytes a second that become pinned, in memory untouched, touched, and by the allocator."""
    fresh, touched, made = [], [], []
    kept = []
    for repeat in range(sizes.pin_repeats):
        buffer = rig.pageable(sizes.pin_bytes)
        fresh.append(_once(rig, lambda buffer=buffer: rig.register(buffer)))  # type: ignore[misc]
        rig.unregister(buffer)
        buffer.fill_(1)
        touched.append(_once(rig, lambda buffer=buffer: rig.register(buffer)))  # type: ignore[misc]
        rig.unregister(buffer)
        # Each of another size: the allocator would hand out the same block again.
        size = sizes.pin_bytes >> (repeat + 1)
        made.append(_once(rig, lambda size=size: kept.append(rig.pinned(size))) / size)  # type: ignore[misc]
    amount = sizes.pin_bytes
    for name, value, how in (
        ("pin_fresh_bytes_per_s", rate(amount, fresh), f"untouched memory, {amount} bytes"),
        ("pin_touched_bytes_per_s", rate(amount, touched), f"touched memory, {amount} bytes"),
    ):
        yield Reading(name, value, "bytes/s", f"cudaHostRegister of {how}")
    how = f"PyTorch's pinned allocator, new blocks of {amount // 2} bytes and less"
    yield Reading("pin_allocator_bytes_per_s", rate(1, made), "bytes/s", how)


def _once(rig: Rig, call: Callable[[], object]) -> float:
    start = rig.now_ns()
    call()
    return float(rig.now_ns() - start)


def measure_decision(trace: Any, sizes: Sizes, clock: Callable[[], int]) -> Iterator[Reading]:
    """Host time of a gate event: ids to keys, the event before ended, classified, copies queued.

    LRU with a quarter of the experts in slots, on a trace's decode steps; ``clock`` in ns.
    """
    geometry = trace.manifest.geometry
    workload = Workload(
        trace.load(["request", "step", "phase", "position", "experts"]), geometry.num_experts
    )
    shape = Shape(
        layers=geometry.num_moe_layers,
        experts=geometry.num_experts,
        top_k=geometry.top_k,
        bytes_by_layer=geometry.expert_bytes_by_layer,
    )
    times = _gates(_core(shape), workload, shape, sizes.decisions, clock)
    how = f"DecisionCore.gate under lru, {len(times)} events of {geometry.name}'s trace"
    yield Reading("decision_ns", summary(times), "ns", how)


def _core(shape: Shape) -> DecisionCore:
    info = policies.get("lru")
    values, options = info.parse({})
    policy = info.build(values, PolicyData(shape))
    budget = sum(shape.bytes_by_layer) * shape.experts // _BUDGET_SHARE
    return DecisionCore(shape, plan_memory(shape, policy.scope, budget), policy, options)


def _gates(
    core: DecisionCore, workload: Workload, shape: Shape, limit: int, clock: Callable[[], int]
) -> list[int]:
    times: list[int] = []
    for step in workload.steps():
        decode = step.prefill_tokens == 0
        core.step_begin(step.index, "decode" if decode else "prefill")
        for layer, keys in enumerate(workload.events.step(step.index)):
            if not keys:
                continue
            base = layer * shape.experts
            ids = torch.tensor([key - base for key in keys])
            time = _gate(core, layer, ids, base, clock)
            if decode:
                times.append(time)
        core.experts_done(shape.layers - 1)
        core.step_end()
        if len(times) >= limit:
            break
    return times


def _gate(core: DecisionCore, layer: int, ids: Tensor, base: int, clock: Callable[[], int]) -> int:
    start = clock()
    if layer:
        core.experts_done(layer - 1)
    wave = core.gate(layer, [base + expert for expert in ids.tolist()])
    time = clock() - start
    core.land_demands(core.start_demands())
    while not wave.last:
        wave = core.next_wave()
        core.land_demands(core.start_demands())
    return time
