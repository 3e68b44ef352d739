"""`moesim replay`: one policy on the device."""

from __future__ import annotations

import json
import sys
from contextlib import closing
from typing import Annotated, Any

import typer

from configs.errors import UserError
from configs.units import format_bytes
from sim.options import (
    BudgetOption,
    ExpertBudgetOption,
    FitShareOption,
    MaxTokensOption,
    PolicyOption,
    SettingsOption,
    TraceOption,
    WindowOption,
)


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("replay")(replay_command)


def replay_command(
    trace: TraceOption,
    policy: PolicyOption,
    hardware: Annotated[
        str, typer.Option("--hardware", help="Profile of this machine: costs that policies read.")
    ],
    model: Annotated[
        str | None, typer.Option("--model", help="Directory of a transformers model.")
    ] = None,
    geometry: Annotated[
        str | None, typer.Option("--geometry", help="Random weights of a model's shapes instead.")
    ] = None,
    budget: BudgetOption = None,
    expert_budget: ExpertBudgetOption = None,
    settings: SettingsOption = None,
    routing: Annotated[
        str,
        typer.Option(
            "--routing",
            help="Whose experts run: trace, or model (its own choice on the trace's text).",
        ),
    ] = "trace",
    link_scale: Annotated[
        float, typer.Option("--link-scale", help="Emulate a link so many times slower.")
    ] = 1.0,
    max_tokens: MaxTokensOption = None,
    window: WindowOption = 2,
    fit_share: FitShareOption = None,
    device: Annotated[str, typer.Option("--device", help="auto, cpu or cuda.")] = "auto",
    cpu_threads: Annotated[
        int | None,
        typer.Option(
            "--cpu-threads",
            min=1,
            help="Threads for experts left to the CPU; default: physical cores less two.",
        ),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="One JSON object on stdout, nothing else.")
    ] = False,
) -> None:
    """Run a policy on real hardware: a trace's routing, real copies, real kernels.

    The text is the trace's, token by token, in its batches. With --routing model the experts are
    those that the model chooses for it, and policies that read what the trace recorded of its own
    routing, or its future, are refused.

    Example: moesim replay --geometry olmoe-1b-7b --trace sample --policy lru --expert-budget 25%
    --hardware h200-pcie5
    """
    from tracer.extra import require_extra

    require_extra("moesim replay")
    from replay.open import open_model, weights_of
    from replay.play import Session
    from replay.point import ROUTINGS, replay_point
    from sim.commands import parse_point, parse_settings
    from sim.point import inputs_for, timed_geometry
    from tracer.trace import Trace

    if not 1 <= link_scale <= 100:
        raise UserError(f"--link-scale {link_scale:g}: give 1 (the link as it is) to 100")
    if routing not in ROUTINGS:
        raise UserError(f"--routing {routing}: choose {' or '.join(ROUTINGS)}")
    point = parse_point(
        policy=policy,
        params=parse_settings(settings or []),
        hardware=hardware,
        budget=budget,
        expert_budget=expert_budget,
        geometry=geometry,
        window=window,
        max_tokens=max_tokens,
        fit_share=fit_share,
    )
    inputs = inputs_for(Trace.open(trace), point)
    timed_geometry(inputs, point)  # another shape is told before a model is loaded
    with closing(open_model(model, geometry, device)) as ready:
        workload = inputs.workload(point.touch_order)
        with closing(Session.for_workloads(ready, workload, cpu_threads=cpu_threads)) as session:
            run = replay_point(session, inputs, point, link_scale=link_scale, routing=routing)
        result = {**run.result, "weights": ready.source, "device": str(session.device)}
        told = weights_of(ready)
    for note in result["notes"]:
        print(f"moesim: note: {note}", file=sys.stderr)
    if as_json:
        print(json.dumps(result, indent=2, allow_nan=False))
        return
    _print(result, told)


def _print(result: dict[str, Any], told: str) -> None:
    itl, decode = result["itl_ms"], result["decode"]
    emulated = (
        f", link emulated x{result['link_scale']:g} slower" if result["link_scale"] > 1 else ""
    )
    print(f"{result['label']} on {result['device']}, {result['geometry']} (measured{emulated})")
    print(told)
    if result["batch"] > 1:
        print(f"batch    {result['batch']} requests at a time")
    if result["routing_agreement"] is not None:
        share = f"{result['routing_agreement']:.1%}"
        print(f"routing  the model's own on the trace's text; {share} of the trace's experts")
    memory = result["memory"]
    slots = f"{memory['slots']} expert slots, {format_bytes(memory['slots_bytes'])}"
    peak = result["peak_memory_bytes"]
    print(f"memory   {slots}" + (f"; peak {format_bytes(peak)}" if peak else ""))
    if itl["mean"] is not None:
        print(f"token    {itl['mean']:.3f} ms mean, {itl['p50']:.3f} p50, {itl['p90']:.3f} p90")
    if result["ttft_ms"]["mean"] is not None:
        print(f"ttft     {result['ttft_ms']['mean']:.1f} ms mean")
    if decode["accesses"]:
        shares = (decode[name] / decode["accesses"] for name in ("hits", "late", "misses"))
        hits, late, misses = (f"{share:.1%}" for share in shares)
        print(f"decode   {hits} hits, {late} late, {misses} missed")
    if decode["cpu"]:
        share = decode["cpu"] / decode["accesses"]
        print(f"cpu      {share:.1%} of the experts, on {result['cpu_threads']} threads")
    print(f"link     {format_bytes(round(result['h2d_bytes_per_token']))} a token")
    parts = {name: value for name, value in result["breakdown_ms"].items() if value}
    print("time     " + ", ".join(f"{name} {value:.3f}" for name, value in parts.items()) + " ms")
