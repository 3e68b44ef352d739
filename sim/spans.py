"""What the host, the link and the GPU did when, and a Chrome trace of it.

A *mark* ends whatever began at the mark before: (end in ns, kind, layer, how many). Simulated and
measured runs tell their host's time in marks of the same kinds.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

STEP, SEGMENT, GPU, DECIDE, ISSUE, EXPERTS, COPY, CPU = range(8)
NAMES = (
    "step",
    "segment launch",
    "wait for GPU",
    "decide",
    "issue copies",
    "experts launch",
    "wait for copy",
    "wait for CPU",
)
"""Of the kinds. STEP: everything between steps' layers; SEGMENT: a segment or the head is launched;
GPU: polled until the device has run everything; DECIDE: a gate event or its next wave; ISSUE: the
window is refilled; EXPERTS: a group, or what adds the CPU's, is launched; COPY: polled until there
is something; CPU: a group is handed to the CPU, or polled until it is computed."""

KERNELS = ("segment", "experts", "head")
"""Names of :mod:`sim.gpu`'s kinds."""

Mark = tuple[int, int, int, int]
Kernel = tuple[int, int, int]
Event = dict[str, Any]

_HOST, _GPU, _LINK = 1, 2, 3
_TRACKS = {_HOST: "host", _GPU: "GPU", _LINK: "link"}


@dataclass(frozen=True)
class ChunkSpan:
    """A chunk on the wire: of which expert, why it was copied, and from when to when, ns."""

    key: int
    source: str
    demand: bool
    begin: int
    end: int


@dataclass(frozen=True)
class Timeline:
    """One run. ``kernels``: (kind, begin, end), none where nobody timed them.

    ``step_begins``, ``step_ends``: of its steps, ns.
    """

    name: str
    marks: Sequence[Mark]
    chunks: Sequence[ChunkSpan]
    kernels: Sequence[Kernel]
    step_begins: Sequence[int]
    step_ends: Sequence[int]


def chrome_trace(timelines: Sequence[Timeline], experts: int, first: int, last: int) -> Event:
    """Trace events of steps ``first`` to ``last``, each run a process; us from the first's begin.

    ``experts``: a layer's, to name copies by layer and expert.
    """
    events: list[Event] = []
    for process, timeline in enumerate(timelines, start=1):
        events += _names(process, timeline.name)
        origin, stop = timeline.step_begins[first], timeline.step_ends[last]
        spans = [*_host(timeline.marks), *_gpu(timeline.kernels), *_link(timeline.chunks, experts)]
        for track, name, begin, end, told in spans:
            if begin < stop and end > origin:
                events.append(
                    {
                        "name": name,
                        "ph": "X",
                        "pid": process,
                        "tid": track,
                        "ts": (begin - origin) / 1e3,
                        "dur": (end - begin) / 1e3,
                        "args": told,
                    }
                )
    return {"traceEvents": events, "displayTimeUnit": "ns"}


Span = tuple[int, str, int, int, Event]


def _names(process: int, name: str) -> Iterator[Event]:
    yield {"name": "process_name", "ph": "M", "pid": process, "tid": 0, "args": {"name": name}}
    for track, title in _TRACKS.items():
        told = {"name": title}
        yield {"name": "thread_name", "ph": "M", "pid": process, "tid": track, "args": told}


def _host(marks: Sequence[Mark]) -> Iterator[Span]:
    begin = marks[0][0] if marks else 0
    for end, kind, layer, count in marks:
        if end > begin:
            yield _HOST, NAMES[kind], begin, end, {"layer": layer, "count": count}
        begin = end


def _gpu(kernels: Iterable[Kernel]) -> Iterator[Span]:
    for kind, begin, end in kernels:
        yield _GPU, KERNELS[kind], begin, end, {}


def _link(chunks: Iterable[ChunkSpan], experts: int) -> Iterator[Span]:
    for chunk in chunks:
        layer, expert = divmod(chunk.key, experts)
        told = {"layer": layer, "expert": expert, "why": chunk.source}
        why = "demand" if chunk.demand else chunk.source
        yield _LINK, f"{layer}/{expert} {why}", chunk.begin, chunk.end, told
