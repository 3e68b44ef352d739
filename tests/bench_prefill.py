"""What copies and an eager prefill do to each other, a cause at a time, on one GPU.

    python -m tests.bench_prefill --geometry olmoe-1b-7b --out FILE.json

By size of the prefill: a launch over one expert, over eight and over all, alone and beside copies,
and copies back to back, alone and beside such launches one after the other. Then the host's time
for sixty small kernels in a row and for the eager work of a predictor, alone and beside copies.
Medians of interleaved rounds, us.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from time import perf_counter_ns
from typing import Any

import numpy as np
import torch

from configs.files import write_atomically
from policies.interface import Prediction
from replay.calibrate.lane import Train
from replay.calibrate.model import ModelRig, Traffic
from replay.cores import on_quiet_core
from replay.gated import MOST_IN_WORDS
from replay.open import command_line, open_model
from replay.play import Session
from replay.predictors import LEARNED, NEXT_GATE
from replay.tiles import TileEvent

SIZES = (8, 64, 512)
ROUNDS = 9
REPEATS = 20
KERNELS = 60

Launch = Callable[[], None]


def host_ns(work: Launch) -> int:
    """Median time of the host for it; the device is idle before each."""
    found = []
    for _ in range(REPEATS):
        torch.cuda.current_stream().synchronize()
        began = perf_counter_ns()
        work()
        found.append(perf_counter_ns() - began)
    return int(np.median(found))


def device_ns(work: Launch) -> int:
    """Median time from the end of its launch until the host sees it done."""
    found, done = [], torch.cuda.Event()
    for _ in range(REPEATS):
        torch.cuda.current_stream().synchronize()
        work()
        began = perf_counter_ns()
        done.record()
        while not done.query():
            pass
        found.append(perf_counter_ns() - began)
    return int(np.median(found))


class Beside:
    """Something timed alone and beside copies, in turn."""

    def __init__(self, session: Session) -> None:
        self._traffic = Traffic(session)
        self._train = Train(session)
        self._train.run(lambda: None)

    def of(self, timed: Callable[[Launch], int], work: Launch) -> tuple[float, float, bool]:
        """Us alone, us beside copies; whether copies went on to the end each time."""
        alone, beside, lasted = [], [], True
        for _ in range(ROUNDS):
            alone.append(timed(work))
            self._traffic.begin()
            beside.append(timed(work))
            lasted = lasted and not self._traffic.ended()
            self._traffic.finish()
        return float(np.median(alone)) / 1e3, float(np.median(beside)) / 1e3, lasted

    def copies(self, work: Launch) -> tuple[float, float]:
        """Us a copy of one expert, back to back, alone and beside the work again and again."""
        done = torch.cuda.Event()
        done.record()

        def again() -> None:
            if done.query():
                work()
                done.record()

        alone, beside = [], []
        for _ in range(ROUNDS):
            alone.append(self._train.run(lambda: None))
            beside.append(self._train.run(again))
            torch.cuda.current_stream().synchronize()
        count = 39  # of a train of 40, the first apart
        return float(np.median(alone)) / 1e3 / count, float(np.median(beside)) / 1e3 / count


def measure(session: Session) -> Iterator[dict[str, Any]]:
    """A row a measurement."""
    beside = Beside(session)
    for tokens in SIZES:
        event, needed = ModelRig(session, 0).tile_event(tokens)
        for count in sorted({1, min(MOST_IN_WORDS, len(needed)), len(needed)}):
            group = {expert: slot for slot, expert in enumerate(needed[:count])}

            def launch(event: TileEvent = event, group: dict[int, int] = group) -> None:
                event.restart()
                event.launch(group)

            launch()
            row = {"what": "tiles", "tokens": tokens, "experts": count}
            yield {**row, "of": "device", **_told(*beside.of(device_ns, launch))}
            yield {**row, "of": "host", **_told(*beside.of(host_ns, launch))}
            alone, slowed = beside.copies(launch)
            yield {**row, "of": "a copy", "alone_us": alone, "beside_us": slowed}
    small = torch.zeros(2048, device=session.device)

    def kernels() -> None:
        for _ in range(KERNELS):
            small.mul_(1.0)

    yield {"what": f"{KERNELS} kernels", "of": "host", **_told(*beside.of(host_ns, kernels))}
    predictors = session.predictors()
    for tokens in SIZES:
        width = session.ready.model.config.get_text_config().hidden_size
        predictors.hidden = torch.zeros((tokens, width), dtype=torch.bfloat16, device="cuda")
        for source in (NEXT_GATE, LEARNED):
            ready: list[Callable[[], bool]] = []

            def predict(source: str = source, ready: list[Any] = ready) -> None:
                ready[:] = [predictors.start(Prediction(source, 0, 0, []), 0)]

            predict()
            row = {"what": source, "tokens": tokens, "of": "host"}
            yield {**row, **_told(*beside.of(host_ns, predict))}
    predictors.hidden = None


def _told(alone: float, beside: float, lasted: bool) -> dict[str, Any]:
    return {"alone_us": alone, "beside_us": beside, "copies_lasted": lasted}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--geometry", default="olmoe-1b-7b", help="name in configs/models")
    parser.add_argument("--out", type=Path, help="JSON file, new")
    options = parser.parse_args(argv)
    if options.out is not None and options.out.exists():
        parser.error(f"{options.out} exists: name another file")
    if not torch.cuda.is_available():
        parser.error("PyTorch sees no CUDA GPU here")
    told: dict[str, Any] = {
        "command": command_line().replace("moesim", "python -m tests.bench_prefill", 1),
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "rows": [],
    }
    with (
        closing(open_model(None, options.geometry, "cuda")) as ready,
        closing(Session(ready, 600)) as session,
        on_quiet_core(),
        torch.inference_mode(),
    ):
        for row in measure(session):
            print(json.dumps(row), flush=True)
            told["rows"].append(row)
    if options.out is not None:
        write_atomically(options.out, (json.dumps(told, indent=1) + "\n").encode())


if __name__ == "__main__":
    main()
