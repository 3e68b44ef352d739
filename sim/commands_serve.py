"""`moesim serve`: many requests, arrivals, batches."""

from __future__ import annotations

import json
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic import ValidationError

from configs.units import format_bytes
from sim.options import (
    BudgetOption,
    DtypeOption,
    ExpertBudgetOption,
    FitShareOption,
    GeometryOption,
    HardwareOption,
    LinkOption,
    MaxTokensOption,
    PolicyOption,
    SeedOption,
    SettingsOption,
    TimingsOption,
    TouchOrderOption,
    TraceOption,
    WindowOption,
)

_BATCH_ROWS = 8


def register(app: typer.Typer) -> None:
    """Add the command to the app."""
    app.command("serve")(serve_command)


def serve_command(
    trace: TraceOption,
    hardware: HardwareOption,
    policy: PolicyOption,
    arrivals: Annotated[
        str,
        typer.Option(
            "--arrivals", help="poisson, closed, or a file: an Azure CSV, a Mooncake JSONL."
        ),
    ],
    rate: Annotated[
        float | None, typer.Option("--rate", help="Of poisson arrivals: requests a second.")
    ] = None,
    users: Annotated[
        int | None, typer.Option("--users", help="Of closed arrivals: who ask again once answered.")
    ] = None,
    think_ms: Annotated[
        float, typer.Option("--think-ms", help="Of closed arrivals: from answer to next question.")
    ] = 0.0,
    rate_scale: Annotated[
        float, typer.Option("--rate-scale", help="Of a file: how many times as dense.")
    ] = 1.0,
    requests: Annotated[
        int | None,
        typer.Option("--requests", help="How many; default: all of a file, or as many as traced."),
    ] = None,
    lengths: Annotated[
        str,
        typer.Option("--lengths", help="trace: the drawn requests' own; scaled, exact: a file's."),
    ] = "trace",
    scheduler: Annotated[
        str, typer.Option("--scheduler", help="continuous or static batching.")
    ] = "continuous",
    batch: Annotated[int, typer.Option("--batch", help="Most requests at a time.")] = 8,
    context: Annotated[
        int | None,
        typer.Option("--context", help="KV cache of a request, tokens; default: the longest's."),
    ] = None,
    kv_tokens: Annotated[
        int | None,
        typer.Option("--kv-tokens", help="KV cache in all, tokens; default: batch x context."),
    ] = None,
    prefill_chunk: Annotated[
        int | None,
        typer.Option("--prefill-chunk", help="Most prefill rows of a request a step."),
    ] = None,
    step_tokens: Annotated[
        int | None, typer.Option("--step-tokens", help="Most rows of a step, all together.")
    ] = None,
    mixed: Annotated[
        bool,
        typer.Option("--mixed/--no-mixed", help="Prefill and decode rows in one step, or apart."),
    ] = True,
    slo_ttft_ms: Annotated[
        float | None, typer.Option("--slo-ttft-ms", help="Objective: time to the first token.")
    ] = None,
    slo_tpot_ms: Annotated[
        float | None, typer.Option("--slo-tpot-ms", help="Objective: time per output token.")
    ] = None,
    arrival_seed: Annotated[
        int, typer.Option("--arrival-seed", help="Seed of poisson arrivals.")
    ] = 0,
    budget: BudgetOption = None,
    expert_budget: ExpertBudgetOption = None,
    geometry: GeometryOption = None,
    dtype: DtypeOption = None,
    timings: TimingsOption = None,
    link: LinkOption = None,
    settings: SettingsOption = None,
    max_tokens: MaxTokensOption = None,
    window: WindowOption = 2,
    touch_order: TouchOrderOption = "last-use",
    fit_share: FitShareOption = None,
    seed: SeedOption = 0,
    out: Annotated[
        Path | None,
        typer.Option("--out", help="New directory for result.json and a row a request and step."),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="One JSON object on stdout, nothing else.")
    ] = False,
) -> None:
    """Serve many requests: arrivals, batching, and KV memory beside expert memory.

    Example: moesim serve --trace sample --geometry olmoe-1b-7b --hardware rtx4090-pcie4
    --policy lru --budget 8GiB --arrivals poisson --rate 0.2 --requests 100 --batch 4
    """
    from sim.commands import parse_point, parse_settings, progress_bar, tell_notes
    from sim.serving import serve_point
    from tracer.trace import Trace

    point = parse_point(
        policy=policy,
        params=parse_settings(settings or []),
        hardware=hardware,
        budget=budget,
        expert_budget=expert_budget,
        link=link,
        geometry=geometry,
        dtype=dtype,
        timings=timings,
        window=window,
        touch_order=touch_order,
        max_tokens=max_tokens,
        fit_share=fit_share,
        seed=seed,
    )
    service = _parse_service(
        arrivals=arrivals,
        rate=rate,
        rate_scale=rate_scale,
        users=users,
        think_ms=think_ms,
        requests=requests,
        lengths=lengths,
        scheduler=scheduler,
        batch=batch,
        context=context,
        kv_tokens=kv_tokens,
        prefill_chunk=prefill_chunk,
        step_tokens=step_tokens,
        mixed=mixed,
        slo_ttft_ms=slo_ttft_ms,
        slo_tpot_ms=slo_tpot_ms,
        arrival_seed=arrival_seed,
    )
    opened = Trace.open(trace)
    tell_notes(opened)
    began = time.perf_counter()
    with ExitStack() as shown:
        bar = progress_bar()
        task = bar.add_task("requests", total=None)

        def progress(done: int, total: int) -> None:
            if done == 1:  # the run has begun: before, an error is all there is to show
                shown.enter_context(bar)
            bar.update(task, completed=done, total=total)

        result = serve_point(opened, point, service, out, progress).result
    for note in result["notes"]:
        print(f"moesim: note: {note}", file=sys.stderr)
    _tell_speed(result, time.perf_counter() - began)
    if as_json:
        print(json.dumps(result, indent=2, allow_nan=False))
        return
    for line in table(result):
        print(line)


def _parse_service(**fields: Any) -> Any:
    """A Service; a field out of bounds is named as its option."""
    from sim.commands_compare import named_option
    from sim.serving import Service

    try:
        return Service(**fields)
    except ValidationError as error:
        raise named_option(error) from None


def _tell_speed(result: dict[str, Any], seconds: float) -> None:
    accesses = result["decode"]["accesses"] + result["prefill"]["accesses"]
    print(
        f"moesim: simulated {result['requests']} requests in {seconds:.1f} s: "
        f"{result['requests'] / seconds:,.0f} requests/s, {accesses / seconds:,.0f} accesses/s",
        file=sys.stderr,
    )


def table(result: dict[str, Any]) -> list[str]:
    """The figures that a person looks for first."""
    from sim.commands import loss_line

    service, batch, kv = result["service"], result["batches"], result["kv"]
    timing = "" if result["timing"] == "calibrated" else f" ({result['timing']} timing)"
    lines = [
        f"{result['label']} on {result['hardware']}, {result['geometry']}{timing}",
        f"  arrivals   {_arrivals(result['arrivals'])}; {result['requests']} requests, "
        f"{service['scheduler']} batches of up to {service['batch']}",
        *_drawn(result),
        _memory(result),
        f"  served     {result['requests_per_s']:.4g} requests/s, "
        f"{result['output_tokens_per_s']:.4g} tokens/s, busy {result['utilisation']:.1%} of "
        f"{result['duration_ms'] / 1e3:.1f} s",
        *_goodput(result["goodput"]),
        f"  {'ms':12} {'mean':>10} {'p50':>10} {'p90':>10} {'p99':>10}",
    ]
    for name in ("queueing", "ttft", "first_decode", "tpot", "itl", "service", "e2el"):
        lines.append(_latency(name, result[f"{name}_ms"]))
    lines.append(
        f"  batch      {batch['mean']:.2f} requests mean, {batch['max']} at most, "
        f"{batch['steps']} steps; KV {kv['high_water_tokens']} of {kv['pool_tokens']} tokens at "
        "most"
    )
    lines += [_hits(phase, result[phase]) for phase in ("decode", "prefill")]
    lines += filter(None, [loss_line(result["quality"]["decode"])])
    lines.append(
        f"  link       {result['h2d_bytes_per_token'] / 1e6:.1f} MB a row, "
        f"busy {result['link_busy_share']:.1%} of the time"
    )
    return lines + _by_batch(batch["decode_by_requests"])


def _arrivals(facts: dict[str, Any]) -> str:
    if facts["kind"] == "closed":
        return f"{facts['users']} users, {facts['think_ms']:g} ms between answer and question"
    if facts["kind"] == "poisson":
        return f"poisson, {facts['rate_per_s']:g} a second, seed {facts['seed']}"
    dense = "" if facts["rate_scale"] == 1 else f", {facts['rate_scale']:g} times as dense"
    return f"{facts['file']} ({facts['kind']}{dense})"


def _drawn(result: dict[str, Any]) -> list[str]:
    """What became of lengths and trace: declared, not hidden."""
    lengths, reuse = result["lengths"], result["reuse"]
    text = f"  lengths    {lengths['mode']}: {lengths['prompt_tokens_mean']:.1f} prompt and "
    text += f"{lengths['output_tokens_mean']:.1f} output tokens mean"
    for name in ("prompt", "output"):
        if lengths.get(f"{name}_factor") is not None:
            text += f"; {name}s x {lengths[f'{name}_factor']:.4g}"
            text += f", {lengths[f'{name}_cut']} of them cut"
    used = f"  trace      {reuse['trace_requests']} requests, in order"
    if reuse["reused"]:
        used += f", each used up to {reuse['most_times']} times"
    return [text, used]


def _memory(result: dict[str, Any]) -> str:
    memory = result["memory"]
    over = "" if memory["fits"] else f"; the GPU has {format_bytes(memory['gpu_memory_bytes'])}"
    return (
        f"  memory     {format_bytes(memory['peak_bytes'])} in all: "
        f"{format_bytes(memory['slots_bytes'])} expert slots "
        f"({memory['slots_bytes'] / memory['expert_bytes_total']:.1%}), "
        f"{format_bytes(memory['kv_bytes'])} KV, {format_bytes(memory['workspace_bytes'])} "
        f"workspace{over}"
    )


def _goodput(found: dict[str, Any] | None) -> list[str]:
    if found is None:
        return []
    asked = [
        f"{name} {found[f'slo_{name}_ms']:g} ms"
        for name in ("ttft", "tpot")
        if found[f"slo_{name}_ms"] is not None
    ]
    return [
        f"  goodput    {found['requests_per_s']:.4g} requests/s, {found['share']:.1%} meet "
        f"{' and '.join(asked)}"
    ]


def _latency(name: str, values: dict[str, float | None]) -> str:
    if values["mean"] is None:
        return f"  {name:12} {'none in this trace':>21}"
    figures = " ".join(f"{values[key]:10.3f}" for key in ("mean", "p50", "p90", "p99"))
    return f"  {name:12} {figures}"


def _hits(phase: str, found: dict[str, Any]) -> str:
    if not found["accesses"]:
        return f"  {phase:10} none"
    asked = found["asked"]
    return (
        f"  {phase:10} {found['hit_rate']:.1%} hits, {found['late'] / asked:.1%} late, "
        f"{found['misses'] / asked:.1%} missed of {asked}; "
        f"{found['waves'] / found['events']:.2f} waves an event"
    )


def _by_batch(rows: list[dict[str, Any]]) -> list[str]:
    """Of decode steps, by batch size; at most a few sizes, the largest among them."""
    if len(rows) < 2:
        return []
    every = -(-len(rows) // _BATCH_ROWS)
    lines = ["  requests      steps   experts/event   waves/event    ms/step"]
    for row in rows[::-1][::every][::-1]:
        lines.append(
            f"  {row['requests']:8} {row['steps']:10} {row['distinct_per_event']:15.2f} "
            f"{row['waves_per_event']:13.2f} {row['step_ms']:10.3f}"
        )
    return lines
