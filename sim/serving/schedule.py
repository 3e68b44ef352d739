"""Which requests' rows make up the next step: static or continuous batching, chunked prefills."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from sim.serving.requests import Request

#: (request, rows of it that the step computes)
Share = tuple[Request, int]
UNLIMITED = 1 << 62


@dataclass(frozen=True)
class Rules:
    """What a step may hold.

    ``batch``: requests; ``kv_tokens``: of the KV pool; ``chunk``: prefill rows of a request;
    ``step_tokens``: rows; ``mixed``: prefill and decode rows together; ``static``: a batch is
    formed only when the one before is over.
    """

    batch: int
    kv_tokens: int
    chunk: int = UNLIMITED
    step_tokens: int = UNLIMITED
    mixed: bool = True
    static: bool = False


class Scheduler:
    """First come, first served, nobody overtakes. docs/serving.md has the rules in words.

    ``waiting``: arrived and not admitted; ``running``: admitted and not finished, in order of
    admission; ``lines``: requests that the batch in progress was formed with (static);
    ``kv_reserved``: tokens of the pool that admitted requests hold.
    """

    def __init__(self, rules: Rules) -> None:
        self.rules = rules
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []
        self.lines = 0
        self.kv_reserved = 0
        self._is_open = True

    def form(self) -> tuple[list[Share], list[Request]]:
        """The next step's shares in order of admission, and who is admitted with it.

        No shares: nobody is there.
        """
        rules, running = self.rules, self.running
        self._is_open = not (rules.static and running)
        filling = [request for request in running if request.done < request.prompt]
        fills = bool(filling) or (self._may_enter() and self.waiting[0].prompt > 0)
        only_fill = fills and not rules.mixed
        decoding = len(running) - len(filling)
        left = rules.step_tokens - (0 if only_fill else decoding)
        rows: dict[int, int] = {}
        for request in filling:
            rows[request.index] = taken = self._filled(request, left)
            left -= taken
        admitted = []
        while left > 0 and self._may_enter() and self._is_of_kind(self.waiting[0], fills):
            request = self.waiting.popleft()
            admitted.append(request)
            taken = self._filled(request, left) if request.prompt else 1
            rows[request.index] = taken
            left -= taken
            self._enter(request)
        own = 0 if only_fill else 1
        shares = [(request, rows.get(request.index, own)) for request in running]
        return [share for share in shares if share[1]], admitted

    def complete(self, shares: list[Share], end: int) -> list[Request]:
        """The step's rows are computed; returns who is finished."""
        finished = []
        for request, rows in shares:
            before = request.done
            request.done = done = before + rows
            if done >= request.prompt:
                if before < request.prompt:
                    request.first_token = end
                elif before == request.prompt:
                    request.first_decode = end
            if done == request.rows:
                request.finish = end
                finished.append(request)
        if finished:
            self._leave(finished)
        return finished

    def _may_enter(self) -> bool:
        """Whether the first who waits finds a place in the batch and in the KV pool."""
        rules = self.rules
        if not (self._is_open and self.waiting) or len(self.running) >= rules.batch:
            return False
        return self.kv_reserved + self.waiting[0].kv_tokens <= rules.kv_tokens

    def _is_of_kind(self, request: Request, fills: bool) -> bool:
        """Without mixing, a step of prefills admits prefills, one of decode rows those without."""
        return self.rules.mixed or (request.prompt > 0) == fills

    def _filled(self, request: Request, left: int) -> int:
        return max(0, min(self.rules.chunk, request.prompt - request.done, left))

    def _enter(self, request: Request) -> None:
        self.running.append(request)
        self.kv_reserved += request.kv_tokens
        self.lines = len(self.running)

    def _leave(self, finished: list[Request]) -> None:
        """Places are free at once; of a static batch, when all of it has finished."""
        gone = {request.index for request in finished}
        self.running[:] = [each for each in self.running if each.index not in gone]
        if not self.rules.static:
            self.kv_reserved -= sum(request.kv_tokens for request in finished)
        elif not self.running:
            self.kv_reserved = 0
