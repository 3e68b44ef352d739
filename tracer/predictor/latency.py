"""How long one prediction takes: one token through one layer's MLP, ranking included.

The layers take turns, so that weights come from memory as they do in a forward step.
"""

from __future__ import annotations

from collections.abc import Callable
from time import perf_counter_ns
from typing import Any

import numpy as np
import torch

from tracer.predictor.model import Predictor

_WARM_UP = 100
_MEASURED = 1000


def measure_latency(predictor: Predictor) -> dict[str, dict[str, Any]]:
    """Median, 10th and 90th percentile in ns, on the CPU and on CUDA where there is a GPU.

    On CUDA: from the call until the ids are there (the device is waited for).
    """
    measured = {"cpu": _measure(predictor.to("cpu"), "cpu", lambda: None)}
    measured["cpu"]["threads"] = torch.get_num_threads()
    if torch.cuda.is_available():
        measured["cuda"] = _measure(predictor.to("cuda"), "cuda", torch.cuda.synchronize)
        measured["cuda"]["gpu"] = torch.cuda.get_device_name()
    return measured


def _measure(predictor: Predictor, device: str, wait: Callable[[], None]) -> dict[str, Any]:
    gate_input = torch.zeros(1, predictor.info.hidden_size, device=device)
    times = []
    for index in range(_WARM_UP + _MEASURED):
        wait()
        begin = perf_counter_ns()
        predictor.predict(gate_input, index % predictor.info.layers)
        wait()
        times.append(perf_counter_ns() - begin)
    p10, median, p90 = np.percentile(times[_WARM_UP:], (10, 50, 90)).round().astype(int).tolist()
    return {"median_ns": median, "p10_ns": p10, "p90_ns": p90}
