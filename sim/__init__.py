"""The simulator: a trace and a policy in, latencies out, on modelled hardware.

>>> from sim import simulate
>>> row = simulate("sample", policy="lru", hardware="h200-pcie5", expert_budget="25%",
...                geometry="olmoe-1b-7b", max_tokens=200)
>>> row.loc[0, "policy"], int(row.loc[0, "decode.accesses"] > 0)
('lru', 1)

=========  ==============================================================
point      one point: configuration and run
inputs     a trace's events, shared by points
budget     GPU memory by use
timing     how long things take
machine    the SimPy model: host thread, GPU stream, copy engine
link       the copy engine
gpu        the compute stream
stretch    a part of a run as a timeline for Perfetto
metrics    latencies, hits, bytes, time by cause
serving    many requests: arrivals, batches
sweeps     many points
rows       a point's result as a row of a table
running    a sweep's points, here or in workers
backends   whose workers: joblib's own processes, Dask, Ray
ranking    who wins where, in tables and words
plots      figures
fit_engine another engine, from a few of its speeds
advising   how much memory, which policy, what would help
=========  ==============================================================
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd

from sim.advising import Advice, Question, advise
from sim.point import Point, inputs_for, run_point
from sim.rows import flatten
from sim.sweeps import SweepConfig, load_config, read_results, sweep
from tracer.trace import Trace

__all__ = [
    "Advice",
    "Point",
    "Question",
    "SweepConfig",
    "advise",
    "load_config",
    "read_results",
    "run_point",
    "simulate",
    "sweep",
]


def simulate(trace: str | Path | Trace, **point: Any) -> pd.DataFrame:
    """Simulate one point; returns one row, columns as a sweep's.

    ``trace``: a directory, ``"sample"``, or an opened trace; ``point``: the fields of
    :class:`sim.point.Point` (``policy``, ``hardware``, ``expert_budget`` or ``budget``, ...).
    """
    opened = trace if isinstance(trace, Trace) else Trace.open(trace)
    chosen = Point(**point)
    return pd.DataFrame([flatten(run_point(inputs_for(opened, chosen), chosen))])
