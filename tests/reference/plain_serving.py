"""The rules of docs/serving.md a second time: plain loops over time, without SimPy or queues.

Steps take as long as ``step_ns(prefill rows, decode rows, requests)`` says.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

NOT_YET = -1


@dataclass
class Job:
    prompt: int
    decode: int
    context: int = 0
    arrival: int = NOT_YET
    scheduled: int = NOT_YET
    first_token: int = NOT_YET
    first_decode: int = NOT_YET
    finish: int = NOT_YET
    computed: int = 0

    @property
    def held(self) -> int:
        return self.context + self.prompt + self.decode

    @property
    def prompt_left(self) -> int:
        return max(0, self.prompt - self.computed)


def plain_serving(
    jobs: list[Job],
    *,
    arrivals: list[int] | None = None,
    users: int = 0,
    think_ns: int = 0,
    batch: int,
    kv_tokens: int,
    chunk: int | None,
    step_tokens: int | None,
    mixed: bool,
    static: bool,
    step_ns: Callable[[int, int, int], int],
) -> list[tuple[int, int, dict[int, int]]]:
    """Fills in the jobs' times; returns each step's begin, end and rows by job."""
    asks = list(arrivals) if arrivals is not None else [0] * min(users, len(jobs))
    steps = []
    batch_members: list[int] = []
    now = 0
    while any(job.finish == NOT_YET for job in jobs):
        for place, at in enumerate(sorted(asks)):
            if at <= now:
                jobs[place].arrival = at
        running = [i for i in admitted_order(jobs) if jobs[i].finish == NOT_YET]
        if not running:
            batch_members = []
        queue = [
            i for i, job in enumerate(jobs) if job.arrival != NOT_YET and job.scheduled == NOT_YET
        ]
        holding = batch_members if static else running
        may_admit = not (static and running)
        room = kv_tokens - sum(jobs[i].held for i in holding)
        fits = bool(may_admit and queue and len(running) < batch and jobs[queue[0]].held <= room)
        any_prompt = any(jobs[i].prompt_left for i in running)
        any_prompt = any_prompt or (fits and jobs[queue[0]].prompt > 0)
        rows: dict[int, int] = {}
        for i in running:
            if not jobs[i].prompt_left and (mixed or not any_prompt):
                rows[i] = 1

        def left(rows: dict[int, int] = rows) -> int:
            return 10**9 if step_tokens is None else step_tokens - sum(rows.values())

        def prompt_rows(i: int) -> int:
            return min(jobs[i].prompt_left, 10**9 if chunk is None else chunk, left())

        for i in running:
            if jobs[i].prompt_left:
                rows[i] = prompt_rows(i)
        while may_admit and queue and left() > 0:
            first = jobs[queue[0]]
            if len(running) == batch or first.held > room:
                break
            if not mixed and (first.prompt > 0) != any_prompt:
                break
            i = queue.pop(0)
            first.scheduled = now
            room -= first.held
            running.append(i)
            rows[i] = prompt_rows(i) if first.prompt else 1
        if static and not batch_members:
            batch_members = list(running)
        rows = {i: rows[i] for i in running if rows.get(i)}
        if not rows:
            now = min(at for at in asks if at > now)
            continue
        prefill = sum(count for i, count in rows.items() if jobs[i].prompt_left)
        end = now + step_ns(prefill, sum(rows.values()) - prefill, len(rows))
        steps.append((now, end, rows))
        for i, count in rows.items():
            job = jobs[i]
            was_prompt = job.prompt_left > 0
            job.computed += count
            if was_prompt and not job.prompt_left:
                job.first_token = end
            if not was_prompt and job.first_decode == NOT_YET:
                job.first_decode = end
            if job.computed == job.prompt + job.decode:
                job.finish = end
                if arrivals is None and len(asks) < len(jobs):
                    asks.append(end + think_ns)
        now = end
    return steps


def admitted_order(jobs: list[Job]) -> list[int]:
    """First come, first served: in order of arrival, which is that of the list."""
    return [i for i, job in enumerate(jobs) if job.scheduled != NOT_YET]
