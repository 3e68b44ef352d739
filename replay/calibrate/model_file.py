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
) -> ModelTimes:
    """Measure a geometry's or a checkpoint's times and write them to ``out``.

    ``hardware``: the profile that they go with; its readback time is kept.
    """
    from replay.calibrate.cuda import CudaRig
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
    with closing(open_model(model, geometry, "cuda")) as ready:
        print(f"moesim: {time.monotonic() - began:5.0f} s  the model is loaded", file=sys.stderr)
        session = Session(ready, kv_tokens)
        # Once to compile and to allocate, once to measure.
        for _ in range(2):
            times = model_times(
                session, profile, name, DTYPE, prefill_tokens, machine, command_line()
            )
            took = time.monotonic() - began
            print(f"moesim: {took:5.0f} s  measured", file=sys.stderr, flush=True)
    out.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(out, render(times).encode())
    return times
