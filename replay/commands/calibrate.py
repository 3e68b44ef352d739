"""`moesim calibrate`: measure this machine and write its hardware profile."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import IO, Annotated, Any

import typer

from configs.errors import UserError
from configs.files import write_atomically
from configs.hardware import CurvePoint, Hardware, load_hardware
from replay.calibrate.stats import Reading


def register(app: typer.Typer) -> None:
    """Add the command to the program."""
    app.command("calibrate")(calibrate_command)


def calibrate_command(
    out: Annotated[Path, typer.Option("--out", help="Profile to write; its stem is its name.")],
    base: Annotated[
        str, typer.Option("--base", help="Profile whose values stay where nothing is measured.")
    ] = "h200-pcie5",
    only: Annotated[
        str | None,
        typer.Option("--only", help="Parts: link,memory,host,slowdown,cpu,predictors."),
    ] = None,
    date: Annotated[
        str | None, typer.Option("--date", help="Date to note in the sources; none by default.")
    ] = None,
    log: Annotated[
        Path | None, typer.Option("--log", help="JSON lines go here instead of stdout.")
    ] = None,
    figure: Annotated[
        Path | None, typer.Option("--figure", help="Directory of the figure; default: beside out.")
    ] = None,
    replace: Annotated[
        bool, typer.Option("--replace", help="Replace what is there: profile, figure, log.")
    ] = False,
    geometry: Annotated[
        str | None,
        typer.Option("--geometry", help="Measure a model's times instead, random weights."),
    ] = None,
    model: Annotated[
        str | None, typer.Option("--model", help="Measure a checkpoint's times instead.")
    ] = None,
    kv_tokens: Annotated[
        int, typer.Option("--kv-tokens", help="With a model: capacity of the KV cache, tokens.")
    ] = 1024,
    prefill_tokens: Annotated[
        str, typer.Option("--prefill-tokens", help="With a model: prefills to measure.")
    ] = "8,64,512",
    batch_size: Annotated[
        str, typer.Option("--batch-size", help="With a model: requests at a time, 1 or 1,4,8.")
    ] = "1",
    cpu: Annotated[
        bool, typer.Option("--cpu", help="With a model: experts on the CPU, too.")
    ] = False,
    cpu_threads: Annotated[
        int | None,
        typer.Option("--cpu-threads", min=1, help="With --cpu; default: physical cores less two."),
    ] = None,
) -> None:
    """Measure what this machine's GPU, link and host can do, and write its hardware profile.

    With --geometry or --model, measure that model's times instead, for the profile of --base: what
    `moesim simulate --timings FILE` reads. Needs a CUDA GPU; about two minutes. Every value of a
    profile goes out as a JSON line as soon as it is known; with --only and --base FILE the parts
    can be measured in several runs.

    Example: moesim calibrate --out configs/hardware/my-gpu.yaml --base rtx4090-pcie4
    """
    from tracer.extra import require_extra

    require_extra("moesim calibrate")
    if geometry is not None or model is not None:
        sizes = _model_sizes(geometry, model, prefill_tokens, batch_size, only)
        _calibrate_model(
            geometry, model, base, kv_tokens, sizes, out, replace, cpu=cpu, cpu_threads=cpu_threads
        )
        return
    if cpu or cpu_threads is not None:
        raise UserError("--cpu and --cpu-threads go with --geometry or --model")
    from replay.calibrate.cuda import CudaRig
    from replay.calibrate.rig import Sizes

    job = prepare(out, base, only, date, log, figure, replace)
    run(job, CudaRig(), Sizes())


def _model_sizes(
    geometry: str | None, model: str | None, prefill_tokens: str, batch_size: str, only: str | None
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Sizes of prefill, and of batches."""
    from replay.calibrate.model_file import parse_sizes

    if only is not None:
        raise UserError("--only names parts of a machine: leave it out with --geometry or --model")
    if geometry is not None and model is not None:
        raise UserError("give --geometry NAME or --model DIRECTORY, one of them")
    return (
        parse_sizes(prefill_tokens, "--prefill-tokens"),
        parse_sizes(batch_size, "--batch-size", "requests", 1),
    )


def _calibrate_model(
    geometry: str | None,
    model: str | None,
    base: str,
    kv_tokens: int,
    sizes: tuple[tuple[int, ...], tuple[int, ...]],
    out: Path,
    replace: bool,
    *,
    cpu: bool,
    cpu_threads: int | None,
) -> None:
    from replay.calibrate.model_file import calibrate_model

    prefills, batches = sizes
    times = calibrate_model(
        geometry,
        model,
        base,
        kv_tokens,
        prefills,
        out,
        replace,
        batches,
        cpu=cpu,
        cpu_threads=cpu_threads,
    )
    decode = times.passes[0]
    print(
        f"{out}: {times.geometry} on {times.hardware}: segments {sum(decode.segment_ns) / 1e6:.3f} "
        f"ms a token, experts {decode.experts_ns(decode.experts[-1].experts) / 1e3:.1f} us a launch"
    )


class Job:
    """What to measure and where it goes; checked before anything is measured."""

    def __init__(
        self, out: Path, base: Hardware, parts: list[str], date: str | None, log: Path | None
    ) -> None:
        self.out = out
        self.base = base
        self.parts = parts
        self.date = date
        self.log = log
        self.figures = out.parent

    @property
    def name(self) -> str:
        """The profile's."""
        return self.out.stem


def prepare(
    out: Path,
    base: str,
    only: str | None,
    date: str | None,
    log: Path | None,
    figure: Path | None,
    replace: bool,
) -> Job:
    """Check the options. Raises UserError, naming the option."""
    from replay.calibrate.figure import figure_paths
    from replay.calibrate.program import parse_parts

    if out.suffix not in (".yaml", ".yml"):
        raise UserError(f"--out {out}: name a .yaml file, such as configs/hardware/my-gpu.yaml")
    job = Job(out, load_hardware(base), parse_parts(only), date, log)
    job.figures = figure or out.parent
    for path in (out, *figure_paths(job.figures, job.name), *([log] if log else [])):
        if path.is_dir():
            raise UserError(f"{path} is a directory: name a file")
        if not replace and path.exists() and path.stat().st_size:
            raise UserError(f"{path} exists already: name another file or give --replace")
    return job


def run(job: Job, rig: Any, sizes: Any) -> Hardware:
    """Measure, then write profile and figure."""
    from replay.calibrate.figure import draw
    from replay.calibrate.profile import not_measured, render, update
    from replay.calibrate.program import measure

    machine = rig.facts()
    started = time.monotonic()
    with _log(job.log) as stream:
        _put(stream, {"machine": asdict(machine)})
        readings, points = _collect(measure(rig, sizes, job.parts), stream, started)
    hardware = update(job.base, job.name, str(machine), readings, points, job.date)
    job.out.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(job.out, render(hardware).encode())
    _say(f"{job.out}: {'calibrated' if hardware.calibrated else 'not calibrated'}", started)
    missing = not_measured(hardware)
    if missing:
        _say(f"not measured, kept from {job.base.name}: {', '.join(missing)}", started)
    if hardware.link_curve:
        paths = draw(hardware, job.figures, job.name)
        _say(f"figure: {', '.join(map(str, paths))}", started)
    return hardware


def _collect(
    results: Iterable[str | Reading | CurvePoint], stream: IO[str], started: float
) -> tuple[list[Reading], list[CurvePoint]]:
    """Log what comes, as it comes."""
    readings: list[Reading] = []
    points: list[CurvePoint] = []
    for result in results:
        if isinstance(result, str):
            _say(result, started)
        elif isinstance(result, CurvePoint):
            points.append(result)
            _put(stream, result.model_dump())
        else:
            readings.append(result)
            _put(stream, {**asdict(result), **asdict(result.value)})
    return readings, points


@contextmanager
def _log(path: Path | None) -> Iterator[IO[str]]:
    """The log file; stdout, which is not ours to close, without one."""
    if path is None:
        yield sys.stdout
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as stream:
        yield stream


def _put(stream: IO[str], line: dict[str, Any]) -> None:
    stream.write(json.dumps(line, allow_nan=False) + "\n")
    stream.flush()


def _say(text: str, started: float) -> None:
    print(f"moesim: {time.monotonic() - started:5.0f} s  {text}", file=sys.stderr, flush=True)
