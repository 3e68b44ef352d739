"""Many requests on one machine: arrivals, batching, KV memory beside expert memory.

>>> from sim.serving import serve
>>> served = serve("sample", policy="lru", hardware="rtx4090-pcie4", geometry="olmoe-1b-7b",
...                expert_budget="25%", arrivals="closed", users=2, requests=4, max_tokens=300)
>>> served.result["requests"], served.result["batches"]["max"], len(served.requests)
(4, 2, 4)

=========  ==============================================================
config     what is served, and by which rules
arrivals   recorded files, Poisson, users who ask again
requests   which rows of the trace a request takes
schedule   which rows make up a step
stage      the step in progress, as policies see it
machine    the machine whose steps are formed while time runs
checks     Little's law, conservation of work
metrics    from a run to numbers
run        all of it
=========  ==============================================================
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sim.point import Point
from sim.serving.config import Service
from sim.serving.run import Served, serve_point
from tracer.trace import Trace

__all__ = ["Served", "Service", "serve", "serve_point"]


def serve(trace: str | Path | Trace, *, out: str | Path | None = None, **fields: Any) -> Served:
    """Serve requests drawn from a trace; returns the result, a row a request, a row a step.

    ``trace``: a directory, ``"sample"``, or an opened trace. ``fields``: those of
    :class:`sim.serving.config.Service` (``arrivals``, ``batch``, ...) and of
    :class:`sim.point.Point` (``policy``, ``hardware``, ``budget``, ...). ``out``: also write
    result.json, requests.parquet and steps.parquet to this new directory.
    """
    opened = trace if isinstance(trace, Trace) else Trace.open(trace)
    own = {name: fields.pop(name) for name in Service.model_fields if name in fields}
    directory = None if out is None else Path(out)
    return serve_point(opened, Point(**fields), Service(**own), directory)
