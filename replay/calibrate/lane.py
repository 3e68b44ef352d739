"""The CPU lane as the engine runs it: its process, its threads, the store's experts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from time import perf_counter_ns

import numpy as np
import torch

from configs.timings import CpuTimes, GroupTime
from replay.calibrate.model import Traffic
from replay.calibrate.rig import CalibrationError
from replay.calibrate.stats import excess, median_ns
from replay.cuda_driver import CopyStream
from replay.play import Session

_REPEATS = 30
_WARM_UPS = 3
_TRAIN = 40  # copies back to back
_MOST_TOKENS = 256


class LaneRig:
    """A session's lane under measurement; each group is of other experts, so that no cache helps.

    A decode step's group: k experts, each for a token of every line of the session's batch.
    ``readback_ns``: as the machine's profile has it.
    """

    def __init__(self, session: Session, readback_ns: int) -> None:
        ready = session.ready
        self.session = session
        self.lane = session.lane()
        self.readback_ns = readback_ns
        self.top_k = ready.top_k
        self._layers, self._experts = len(ready.modules), ready.num_experts
        width = self.lane.width
        self._lines = session.rows
        self._most = min(_MOST_TOKENS, session.most_tokens)
        rows = max(self._most, self._lines)
        self._hidden = torch.randn((rows, width), device=session.device).to(torch.bfloat16)
        self._out = torch.zeros_like(self._hidden).repeat(self.top_k, 1)
        self._turn = 0

    def start(self, experts: int, tokens: int) -> int:
        """Hand a group over; ns that it took."""
        self._turn += 1
        layer = self._turn % self._layers
        first = self._turn // self._layers * experts
        chosen = [(first + each) % self._experts for each in range(experts)]
        ids = np.tile(np.array(chosen, np.int64), (tokens, 1))
        began = perf_counter_ns()
        self.lane.start(layer, chosen, ids, self._hidden[:tokens])
        return perf_counter_ns() - began

    def once(self, experts: int, tokens: int) -> int:
        """Ns from a group's hand-over until its result is there."""
        self.start(experts, tokens)
        began = perf_counter_ns()
        while not self.lane.done():
            pass
        return perf_counter_ns() - began

    def groups(self) -> Iterator[GroupTime]:
        """Of one token by experts, and of one expert by tokens.

        In rounds over all sizes: a while in which the threads are slow, such as the first tenth of
        a second after they have started, is no size's alone.
        """
        found: dict[tuple[int, int], list[int]] = {size: [] for size in self._sizes()}
        for _ in range(_WARM_UPS + _REPEATS):
            for (experts, tokens), taken in found.items():
                taken.append(self.once(experts, tokens))
        for (experts, tokens), taken in found.items():
            ns = median_ns(taken[_WARM_UPS:])
            yield GroupTime(experts=experts, tokens=tokens, ns=ns)

    def _sizes(self) -> list[tuple[int, int]]:
        many = [2**n for n in range(1, self._most.bit_length()) if 2**n <= self._most]
        # A prefill may leave more experts to the CPU than a token has.
        wanted = {*range(1, self.top_k + 1), 2 * self.top_k, 4 * self.top_k}
        wide = sorted(count for count in wanted if count <= self._widest())
        return [(1, 1), *((1, tokens) for tokens in many), *((count, 1) for count in wide[1:])]

    def _widest(self) -> int:
        return min(self._experts, self.session.most_tokens * self.top_k)

    def start_ns(self) -> int:
        """Host time of a decode step's hand-over."""
        found = []
        for _ in range(_REPEATS):
            found.append(self._start_step())
            while not self.lane.done():
                pass
        return median_ns(found)

    def combine_ns(self) -> int:
        """From the end of the launch that fetches a decode step's result until it is seen done."""
        done = torch.cuda.Event()
        found = []
        for _ in range(_REPEATS):
            self._step()
            torch.cuda.synchronize()
            self.lane.finish(self._out)
            began = perf_counter_ns()
            done.record()
            while not done.query():
                pass
            found.append(perf_counter_ns() - began)
        return max(median_ns(found) - self.readback_ns, 0)

    def slowdown(self) -> float:
        """By which a decode step's group takes longer while copies run."""
        alone = [self._step() for _ in range(_REPEATS)]
        traffic = Traffic(self.session)
        traffic.begin()
        beside: list[int] = []
        while len(beside) < _REPEATS:
            took = self._step()
            if traffic.ended():
                break
            beside.append(took)
        traffic.finish()
        if not beside:
            raise CalibrationError("copies ended before the first group on the CPU beside them")
        alone += [self._step() for _ in range(_REPEATS)]
        return excess(alone, beside).value

    def link_slowdown(self) -> float:
        """By which copies of one expert, back to back, take longer while the CPU computes."""
        train = Train(self.session)
        alone, beside = [], []
        train.run(_nothing)
        for _ in range(_REPEATS // 3):
            alone.append(train.run(_nothing))
            beside.append(train.run(self._keep_computing))
            while not self.lane.done():
                pass
        train.close()
        return excess(alone, beside).value

    def _keep_computing(self) -> None:
        if self.lane.done():
            self._start_step()

    def _start_step(self) -> int:
        return self.start(self.top_k, self._lines)

    def _step(self) -> int:
        return self.once(self.top_k, self._lines)


class Train:
    """Copies of one expert each, handed over at once."""

    def __init__(self, session: Session) -> None:
        nbytes = session.ready.layout.nbytes
        self._nbytes = nbytes
        self._copies = CopyStream(torch.cuda.Stream().cuda_stream, _TRAIN)
        self._memory = session.ready.store.memory.view(-1, nbytes)
        self._slots = torch.empty((_TRAIN, nbytes), dtype=torch.uint8, device=session.device)

    def run(self, meanwhile: Callable[[], None]) -> int:
        """Ns from the second copy's begin to the last one's landing."""
        meanwhile()
        events = [
            self._copies.copy(
                self._slots[index].data_ptr(),
                self._memory[index * 7 % len(self._memory)].data_ptr(),
                self._nbytes,
            )
            for index in range(_TRAIN)
        ]
        first = 0
        for event in events:
            while not self._copies.landed(event):
                meanwhile()
            first = first or perf_counter_ns()
        return perf_counter_ns() - first

    def close(self) -> None:
        """All have landed."""
        self._copies.close()


def cpu_times(session: Session, readback_ns: int) -> CpuTimes:
    """Everything that the simulator asks of the lane."""
    rig = LaneRig(session, readback_ns)
    return CpuTimes(
        threads=rig.lane.threads,
        groups=tuple(rig.groups()),
        start_ns=rig.start_ns(),
        combine_ns=rig.combine_ns(),
        slowdown=rig.slowdown(),
        link_slowdown=rig.link_slowdown(),
    )


def _nothing() -> None:
    pass
