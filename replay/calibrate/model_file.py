"""`moesim calibrate --geometry`: one model's times on this machine, as a file."""

from __future__ import annotations

import sys
import time
from contextlib import closing
from pathlib import Path

from configs.errors import UserError
from configs.files import write_atomically
from configs.hardware import load_hardware
from configs.timings import ModelTimes, render


def parse_sizes(text: str, option: str, what: str = "tokens", least: int = 2) -> tuple[int, ...]:
    """Counts such as 8,64,512, going up. Raises UserError naming the option."""
    try:
        sizes = tuple(int(part) for part in text.split(","))
    except ValueError:
        sizes = ()
    if not sizes or min(sizes) < least or max(sizes) > 1_000_000:
        example = ",".join(str(least * size) for size in (4, 8, 16))
        raise UserError(
            f"{option} {text}: give numbers of {what}, {least} or more, such as {example}"
        )
    return tuple(sorted(set(sizes)))


def calibrate_model(
    geometry: str | None,
    model: str | None,
    hardware: str,
    kv_tokens: int,
    prefill_tokens: tuple[int, ...],
    out: Path,
    replace: bool,
    batches: tuple[int, ...] = (1,),
    *,
    cpu: bool = False,
    cpu_threads: int | None = None,
) -> ModelTimes:
    """Measure a geometry's or a checkpoint's times and write them to ``out``.

    ``hardware``: the profile that they go with; its readback time is kept. ``batches``: requests
    at a time, going up; all but the passes is of the first, workspace the most.
    ``cpu``: experts on the CPU, too, on ``cpu_threads`` (None: as many as `moesim replay` takes).
    """
    from replay.calibrate.cuda import CudaRig
    from replay.calibrate.lane import cpu_times
    from replay.calibrate.model import LEAST_KV_TOKENS
    from replay.open import DTYPE, command_line, open_model
    from replay.play import Session
    from replay.validation.machine import model_times, on_usual_host

    if out.suffix not in (".yaml", ".yml"):
        raise UserError(f"--out {out}: name a .yaml file, such as olmoe-1b-7b.yaml")
    if out.exists() and not replace:
        raise UserError(f"{out} exists already: name another file or give --replace")
    if kv_tokens <= max(prefill_tokens):
        raise UserError(
            f"--kv-tokens {kv_tokens}: the cache must hold more than the longest prefill of "
            f"{max(prefill_tokens)} tokens"
        )
    if kv_tokens < LEAST_KV_TOKENS:
        raise UserError(
            f"--kv-tokens {kv_tokens}: calibration itself decodes {LEAST_KV_TOKENS} tokens; give "
            "that or more"
        )
    profile = load_hardware(hardware)
    machine = str(CudaRig().facts())
    name = geometry or Path(str(model)).resolve().name
    began = time.monotonic()
    with closing(open_model(model, geometry, "cuda")) as ready:

        def say(what: str) -> None:
            took = time.monotonic() - began
            print(f"moesim: {took:5.0f} s  {what}", file=sys.stderr, flush=True)

        def measure(batch: int, lane: bool) -> ModelTimes:
            most = max(kv_tokens, batch)
            whole = Session(ready, kv_tokens, rows=batch, most_tokens=most, cpu_threads=cpu_threads)
            with closing(whole) as session:
                # Once to compile and to allocate, once to measure.
                for _ in range(2):
                    session.host_loops_ns.clear()
                    times = model_times(
                        session, profile, name, DTYPE, prefill_tokens, machine, command_line()
                    )
                    say("measured")
                times = on_usual_host(times, session)
                if not lane:
                    return times
                cpu = cpu_times(session, int(profile.readback_ns))
                return times.model_copy(update={"cpu": cpu})

        say("the model is loaded")
        measured = [measure(batch, cpu and batch == batches[0]) for batch in batches]
    passes = tuple(each for times in measured for each in times.passes)
    workspaces = [times.workspace_bytes for times in measured if times.workspace_bytes is not None]
    most = max(workspaces, default=None)
    times = measured[0].model_copy(update={"passes": passes, "workspace_bytes": most})
    out.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(out, render(times).encode())
    return times
