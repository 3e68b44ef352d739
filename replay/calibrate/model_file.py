"""`moesim calibrate --geometry`: one model's times on this machine, as a file."""

from __future__ import annotations

import sys
import time
from contextlib import ExitStack, closing
from pathlib import Path

from configs.errors import UserError
from configs.files import write_atomically
from configs.hardware import load_hardware
from configs.timings import ModelTimes, render


def parse_sizes(text: str, option: str) -> tuple[int, ...]:
    """Token counts such as 8,64,512. Raises UserError naming the option."""
    try:
        sizes = tuple(int(part) for part in text.split(","))
    except ValueError:
        sizes = ()
    if not sizes or min(sizes) < 2 or max(sizes) > 1_000_000:
        raise UserError(f"{option} {text}: give token counts of 2 or more, such as 8,64,512")
    return tuple(sorted(set(sizes)))


def calibrate_model(
    geometry: str | None,
    model: str | None,
    hardware: str,
    kv_tokens: int,
    prefill_tokens: tuple[int, ...],
    out: Path,
    replace: bool,
    cpu: bool = False,
    cpu_threads: int | None = None,
) -> ModelTimes:
    """Measure a geometry's or a checkpoint's times and write them to ``out``.

    ``hardware``: the profile that they go with; its readback time is kept. ``cpu``: experts on the
    CPU, too, on ``cpu_threads`` (None: as many as `moesim replay` takes).
    """
    from replay.calibrate.cuda import CudaRig
    from replay.calibrate.lane import cpu_times
    from replay.open import DTYPE, command_line, open_model
    from replay.play import Session
    from replay.validation.machine import model_times

    if out.suffix not in (".yaml", ".yml"):
        raise UserError(f"--out {out}: name a .yaml file, such as olmoe-1b-7b.yaml")
    if out.exists() and not replace:
        raise UserError(f"{out} exists already: name another file or give --replace")
    if kv_tokens <= max(prefill_tokens):
        raise UserError(
            f"--kv-tokens {kv_tokens}: the cache must hold more than the longest prefill of "
            f"{max(prefill_tokens)} tokens"
        )
    profile = load_hardware(hardware)
    machine = str(CudaRig().facts())
    name = geometry or Path(str(model)).resolve().name
    began = time.monotonic()
    with ExitStack() as stack:
        ready = stack.enter_context(closing(open_model(model, geometry, "cuda")))
        print(f"moesim: {time.monotonic() - began:5.0f} s  the model is loaded", file=sys.stderr)
        session = stack.enter_context(closing(Session(ready, kv_tokens, cpu_threads)))
        # Once to compile and to allocate, once to measure.
        for _ in range(2):
            times = model_times(
                session, profile, name, DTYPE, prefill_tokens, machine, command_line()
            )
            took = time.monotonic() - began
            print(f"moesim: {took:5.0f} s  measured", file=sys.stderr, flush=True)
        if cpu:
            lane = cpu_times(session, int(profile.readback_ns))
            times = times.model_copy(update={"cpu": lane})
    out.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(out, render(times).encode())
    return times
