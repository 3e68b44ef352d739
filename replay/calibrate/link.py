"""The link: time of a copy by size, alone, in a queue and beside a busy GPU; and the fit of it.

A copy's time, in the terms of docs/contract.md, is `copy_issue_ns` on the host, then the start-up
on an idle link (or the gap behind the copy before), then bytes over rate. The fit takes both curves
at once, since they share the rate, and weighs each size by its own time, so that small copies count
as much as large ones.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from configs.hardware import CurvePoint
from replay.calibrate.rig import (
    GIB,
    CalibrationError,
    Pool,
    Rig,
    Sizes,
    Tensor,
    device_ns,
    fill,
    spin,
)
from replay.calibrate.stats import Reading, Value, summary

ALONE, BUSY, QUEUED = "pinned_h2d", "pinned_h2d_gpu_busy", "pinned_h2d_back_to_back"

Samples = dict[int, list[float]]
"""Times in ns by size in bytes, one a round."""


@dataclass(frozen=True)
class LinkFit:
    """Rate in bytes/s, start-up and gap in ns; never negative."""

    bytes_per_s: float
    startup_ns: float
    gap_ns: float

    def alone_ns(self, nbytes: int) -> float:
        """A copy on an idle link, issue left out."""
        return self.startup_ns + nbytes * 1e9 / self.bytes_per_s

    def queued_ns(self, nbytes: int) -> float:
        """A copy behind another."""
        return self.gap_ns + nbytes * 1e9 / self.bytes_per_s


def fit_link(alone: Mapping[int, float], queued: Mapping[int, float]) -> LinkFit:
    """Weighted least squares of start-up, gap and rate; times in ns by size in bytes.

    ``alone`` without the issue. A start-up or gap that would come out negative is 0. Raises
    CalibrationError where time does not grow with size.
    """
    rows = [(1.0, 0.0, float(n), time) for n, time in alone.items()]
    rows += [(0.0, 1.0, float(n), time) for n, time in queued.items()]
    table = np.array(rows)
    free = [0, 1, 2]
    while True:
        weighted = table / table[:, 3:]
        solution, *_ = np.linalg.lstsq(weighted[:, free], np.ones(len(rows)), rcond=None)
        found = dict(zip(free, solution.tolist(), strict=True))
        negative = [column for column in free if column != 2 and found[column] < 0]
        if not negative:
            break
        free.remove(min(negative, key=lambda column: found[column]))
    if found[2] <= 0:
        raise CalibrationError("the link's time does not grow with the size of a copy")
    return LinkFit(1e9 / found[2], found.get(0, 0.0), found.get(1, 0.0))


class Link:
    """Times copies on one rig. ``pinned`` is a pool that the rig has pinned."""

    def __init__(self, rig: Rig, sizes: Sizes, pinned: Pool) -> None:
        self._rig = rig
        self._sizes = sizes
        self._pinned = pinned
        self._stream = rig.stream()
        self._event = rig.event(timing=False)
        self._device = rig.device_bytes(max(*sizes.copies, sizes.chunk_bytes))
        self._pageable = Pool(rig.pageable(4 * max(sizes.copies)))
        fill(self._pageable.buffer)

    def copy_ns(self, dst: Tensor, src: Tensor) -> tuple[int, int]:
        """Host time of the hand-over, and from the call until the host sees the copy landed."""
        rig, stream, event = self._rig, self._stream, self._event
        start = rig.now_ns()
        rig.copy(dst, src, stream)
        rig.record(event, stream)
        issued = rig.now_ns()
        return issued - start, spin(rig, event) - start

    def curve(self, kind: str) -> tuple[Samples, Samples]:
        """Issue and whole times by size. ``kind``: memory and direction."""
        issue: Samples = {n: [] for n in self._sizes.copies}
        whole: Samples = {n: [] for n in self._sizes.copies}
        for turn in range(self._sizes.rounds + 1):
            for nbytes in self._sizes.copies:
                handed, landed = self.copy_ns(*self._ends(kind, nbytes))
                if turn:  # the first round warms up
                    issue[nbytes].append(handed)
                    whole[nbytes].append(landed)
        return issue, whole

    def busy_curve(self, background: Background) -> Samples:
        """Whole times of copies from pinned memory while the GPU computes."""
        whole: Samples = {n: [] for n in self._sizes.copies}
        for _ in range(self._sizes.rounds):
            for nbytes in self._sizes.copies:
                ends = self._ends(ALONE, nbytes)
                background.top_up()
                _, landed = self.copy_ns(*ends)
                if background.running:
                    whole[nbytes].append(landed)
        self._rig.synchronize()
        _require_most(whole, self._sizes.rounds, "the GPU was not busy during the copies")
        return whole

    def queued_curve(self) -> Samples:
        """Device time of a copy in a queue of copies, each with its event, as the replay does."""
        share: Samples = {n: [] for n in self._sizes.copies}
        for turn in range(self._sizes.rounds + 1):
            for nbytes in self._sizes.copies:
                copies = max(4, min(self._sizes.queue, GIB // nbytes))
                time = self.train(nbytes, copies).wait_ns()
                if turn:
                    share[nbytes].append(time / copies)
        return share

    def train(self, nbytes: int, copies: int, skip: int = 0) -> Train:
        """A queue of copies, handed over while a large one keeps the link busy.

        The train's time begins after its first `skip` copies.
        """
        rig, stream = self._rig, self._stream
        begin, end = rig.event(), rig.event()
        rig.copy(*self._ends(ALONE, self._device.numel()), stream)
        for index in range(copies):
            if index == skip:
                rig.record(begin, stream)
            rig.copy(*self._ends(ALONE, nbytes), stream)
            rig.record(self._event, stream)
        rig.record(end, stream)
        return Train(rig, begin, end)

    def _ends(self, kind: str, nbytes: int) -> tuple[Tensor, Tensor]:
        memory, direction = kind.split("_")[:2]
        pool = self._pinned if memory == "pinned" else self._pageable
        host, device = pool.piece(nbytes), self._device[:nbytes]
        return (device, host) if direction == "h2d" else (host, device)


@dataclass(frozen=True)
class Train:
    """Copies under way."""

    rig: Rig
    begin: Any
    end: Any

    @property
    def running(self) -> bool:
        return not self.rig.done(self.end)

    def wait_ns(self) -> float:
        """Wait for it; its device time."""
        spin(self.rig, self.end)
        return self.rig.elapsed_ns(self.begin, self.end)


class Background:
    """A graph that is launched again and again, so that the GPU has work for `ahead_ns`."""

    def __init__(self, rig: Rig, graph: Any, ahead_ns: float) -> None:
        self._rig = rig
        self._graph = graph
        once = float(np.median(device_ns(rig, lambda: rig.launch(graph), 5)))
        self._ends = [rig.event(timing=False) for _ in range(int(ahead_ns / once) + 2)]
        self._last = self._ends[-1]
        self._at = 0

    def top_up(self) -> None:
        """Launch as many as have ended."""
        for _ in self._ends:
            oldest = self._ends[self._at]
            if not self._rig.done(oldest):
                return
            self._rig.launch(self._graph)
            self._rig.record(oldest)
            self._last = oldest
            self._at = (self._at + 1) % len(self._ends)

    @property
    def running(self) -> bool:
        """Whether the GPU still has work."""
        return not self._rig.done(self._last)


def measure_link(rig: Rig, sizes: Sizes, link: Link, decode: Any) -> Iterator[Reading | CurvePoint]:
    """Curves of all kinds, and what is fitted to them. ``decode``: a graph for a busy GPU."""
    issue, whole = link.curve(ALONE)
    yield from points(ALONE, whole)
    queued = link.queued_curve()
    yield from points(QUEUED, queued)
    yield from _fitted(sizes, issue, whole, queued)
    largest = max(sizes.copies)
    background = Background(rig, decode, ahead_ns=1.5 * summary(whole[largest]).value + 1e6)
    yield from points(BUSY, link.busy_curve(background))
    for kind in ("pinned_d2h", "pageable_h2d", "pageable_d2h"):
        _, other = link.curve(kind)
        yield from points(kind, other)
        times = other[largest]
        yield Reading(
            f"{kind}_bytes_per_s",
            summary([largest * 1e9 / time for time in times]),
            "bytes/s",
            f"copies of {largest} bytes",
        )


def points(kind: str, samples: Samples) -> list[CurvePoint]:
    """Curve points of a kind, by size."""
    return [_point(kind, nbytes, summary(times)) for nbytes, times in samples.items()]


def _point(kind: str, nbytes: int, time: Value) -> CurvePoint:
    return CurvePoint.model_validate(
        {
            "kind": kind,
            "bytes": nbytes,
            "ns": max(1, round(time.value)),
            "spread_ns": round(time.spread),
        }
    )


def _fitted(sizes: Sizes, issue: Samples, whole: Samples, queued: Samples) -> Iterator[Reading]:
    alone = {
        n: [time - handed for time, handed in zip(whole[n], issue[n], strict=True)]
        for n in whole
        if n >= sizes.fit_from
    }
    behind = {n: queued[n] for n in alone}
    fits = [
        fit_link({n: alone[n][turn] for n in alone}, {n: behind[n][turn] for n in behind})
        for turn in range(sizes.rounds)
    ]
    best = fit_link(_medians(alone), _medians(behind))
    off = residuals(best, _medians(alone), _medians(behind))
    how = (
        f"fit of time = start-up (gap) + bytes / rate, {min(alone)} to {max(alone)} bytes, pinned, "
        f"host to device, alone and back to back; the fit is off by {_rms(off):.1%} "
        f"(root mean square), {max(map(abs, off)):.1%} at most"
    )
    yield _from_fit("link_bytes_per_s", best.bytes_per_s, [f.bytes_per_s for f in fits], how)
    yield _from_fit("link_startup_ns", best.startup_ns, [f.startup_ns for f in fits], how)
    yield _from_fit("link_gap_ns", best.gap_ns, [f.gap_ns for f in fits], how)
    smallest = min(whole)
    yield Reading(
        "small_copy_ns",
        summary(whole[smallest]),
        "ns",
        f"{smallest} bytes from pinned memory, from the call until the host sees it landed",
    )


def residuals(fit: LinkFit, alone: Mapping[int, float], queued: Mapping[int, float]) -> list[float]:
    """How far the fit is off each time, as a fraction of that time."""
    off = [fit.alone_ns(n) / time - 1 for n, time in alone.items()]
    return off + [fit.queued_ns(n) / time - 1 for n, time in queued.items()]


def _from_fit(name: str, value: float, rounds: Sequence[float], how: str) -> Reading:
    unit = "bytes/s" if name.endswith("per_s") else "ns"
    return Reading(name, Value(value, summary(rounds).spread, len(rounds)), unit, how)  # type: ignore[arg-type]


def _medians(samples: Samples) -> dict[int, float]:
    return {n: summary(times).value for n, times in samples.items()}


def _rms(values: Sequence[float]) -> float:
    return float(np.sqrt(np.mean(np.square(values))))


def _require_most(samples: Samples, rounds: int, what: str) -> None:
    few = [n for n, times in samples.items() if 2 * len(times) < rounds]
    if few:
        raise CalibrationError(f"{what} in most of the rounds at {few[0]} bytes")
