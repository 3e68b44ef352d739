"""`moesim quality`."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from configs.errors import UserError
from configs.files import prepare_directory
from configs.units import format_bytes
from sim.options import LinkOption, SeedOption, SettingsOption

#: one simulated point as a row of a data frame, such as :func:`sim.simulate`
Simulate = Callable[..., Any]


def register(app: typer.Typer, simulate: Simulate) -> None:
    """Add the command; ``simulate`` times the same policy and budgets on a trace."""

    def quality_command(
        model: Annotated[str, typer.Option("--model", help="Model directory, or hub id.")],
        policy: Annotated[str, typer.Option("--policy", help="A lossy one: swapmoe, hobbit.")],
        text: Annotated[
            Path, typer.Option("--text", help="Held-out text: .txt, .jsonl (field text), .csv.")
        ],
        expert_budgets: Annotated[
            list[str] | None,
            typer.Option("--expert-budget", help="Expert slots: 50%, 8/layer; repeatable."),
        ] = None,
        budgets: Annotated[
            list[str] | None,
            typer.Option("--budget", help="GPU memory for the whole model: 8GiB; repeatable."),
        ] = None,
        settings: SettingsOption = None,
        max_tokens: Annotated[
            int, typer.Option("--max-tokens", help="Tokens to judge, spread over the texts.")
        ] = 4096,
        context: Annotated[
            int, typer.Option("--context", help="At most so many tokens of each text.")
        ] = 512,
        chunk: Annotated[
            int,
            typer.Option("--chunk", help="Tokens a forward pass; 1 is decoding, and slowest."),
        ] = 8,
        device: Annotated[str, typer.Option("--device", help="auto, cpu or cuda.")] = "auto",
        dtype: Annotated[
            str, typer.Option("--dtype", help="auto (the checkpoint's), bf16, fp16 or fp32.")
        ] = "auto",
        trust_remote_code: Annotated[
            bool, typer.Option("--trust-remote-code", help="Run code that comes with the model.")
        ] = False,
        seed: SeedOption = 0,
        trace: Annotated[
            str | None,
            typer.Option("--trace", help="Also simulate the budgets on this trace, or sample."),
        ] = None,
        hardware: Annotated[
            str | None, typer.Option("--hardware", help="Machine to simulate, with --trace.")
        ] = None,
        geometry: Annotated[
            str | None,
            typer.Option("--geometry", help="Model to time instead of the trace's own."),
        ] = None,
        link: LinkOption = None,
        figure: Annotated[
            Path | None,
            typer.Option("--figure", help="Draw the front: FILE.png and FILE.svg."),
        ] = None,
        as_json: Annotated[
            bool, typer.Option("--json", help="One JSON object on stdout, nothing else.")
        ] = False,
    ) -> None:
        """Measure what a lossy policy does to a model: perplexity and next-token agreement.

        Example: moesim quality --model models/mine --policy swapmoe --text heldout.jsonl
        --expert-budget 25% --expert-budget 50% --expert-budget 75% --figure front
        """
        from tracer.extra import require_extra

        if (trace is None) != (hardware is None):
            raise UserError("--trace and --hardware go together: what to simulate, and on what")
        if trace is None and (geometry is not None or link is not None):
            raise UserError("--geometry and --link are of the simulation: give --trace, too")
        require_extra("moesim quality")
        from replay.quality import Job, measure
        from tracer.load_model import load_model, resolve_device
        from tracer.prompts import read_prompts
        from tracer.trace import Trace

        pairs = [(value, None) for value in budgets or []]
        job = Job(
            policy=policy,
            params=_parse_settings(settings or []),
            budgets=[*pairs, *((None, value) for value in expert_budgets or [])],
            max_tokens=max_tokens,
            context=context,
            chunk=chunk,
            seed=seed,
        )
        timed = None if trace is None else Trace.open(trace).manifest.geometry
        if figure is not None:
            prepare_directory(figure.parent, "--figure")
        texts = read_prompts(text)
        loaded = load_model(model, resolve_device(device), dtype, trust_remote_code)
        result = measure(loaded, texts, job, _tell, timed)
        if trace is not None:
            point = {"hardware": hardware, "geometry": geometry, "link": link, "seed": seed}
            _add_times(result, job, simulate, trace, point)
        for note in result["notes"]:
            print(f"moesim: note: {note}", file=sys.stderr)
        print(json.dumps(result, indent=2, allow_nan=False) if as_json else _table(result))
        # Last: what took long has been printed, should another figure be there.
        for path in _draw(result, figure) if figure is not None else []:
            print(f"figure: {path}", file=sys.stderr)

    app.command("quality")(quality_command)


def _parse_settings(settings: list[str]) -> dict[str, str]:
    parsed: dict[str, str] = {}
    for setting in settings:
        name, equals, value = setting.partition("=")
        if not equals or not name or not value:
            raise UserError(f"--set {setting!r} is not key=value, such as --set frequency=8")
        if name in parsed:
            raise UserError(f"--set {name} is given twice")
        parsed[name] = value
    return parsed


def _tell(text: str) -> None:
    print(f"moesim: {text}", file=sys.stderr, flush=True)


def _add_times(
    result: dict[str, Any], job: Any, simulate: Simulate, trace: str, point: dict[str, Any]
) -> None:
    """Simulated time and memory of each budget, and LRU's beside it, judged on equal requests."""
    for (budget, expert_budget), measured in zip(job.budgets, result["budgets"], strict=True):
        own = {**point, "budget": budget, "expert_budget": expert_budget, "fit_share": 0.3}
        timed = simulate(trace, policy=job.policy, params=job.params, **own).loc[0]
        lru = simulate(trace, policy="lru", **own).loc[0]
        measured["tpot_ms"] = float(timed["tpot_ms.mean"])
        measured["lru_tpot_ms"] = float(lru["tpot_ms.mean"])
        measured["simulated_peak_bytes"] = int(timed["memory.peak_bytes"])
    result["simulated"] = {
        "trace": trace,
        "geometry": str(timed["geometry"]),
        "hardware": str(timed["hardware"]),
        "link_bytes_per_s": int(timed["link_bytes_per_s"]),
        "timing": str(timed["timing"]),
    }


def _draw(result: dict[str, Any], figure: Path) -> list[Path]:
    from replay.front import draw_front

    name = figure.name.removesuffix(".png").removesuffix(".svg")
    return draw_front(result, figure.parent, name)


def _table(result: dict[str, Any]) -> str:
    timed = "simulated" in result
    head = ["budget", "GPU memory", "perplexity", "agreement", "KL, nats", "gate weight", "changed"]
    rows = [[*head, *(("TPOT ms", "lru TPOT ms") if timed else ())]]
    own = result["unmodified"]
    whole = ["unmodified", format_bytes(own["peak_bytes"]), f"{own['perplexity']:.3f}"]
    rows.append([*whole, *[""] * (len(rows[0]) - len(whole))])
    for each in result["budgets"]:
        row = [
            each["budget"],
            format_bytes(each["peak_bytes"]),
            f"{each['perplexity']:.3f}",
            f"{100 * each['next_token_agreement']:.1f} %",
            f"{each['kl_nats']:.4f}",
            f"{100 * each['retained_mass_share']:.1f} %",
            f"{100 * each['changed_share']:.1f} %",
        ]
        if timed:
            row += [f"{each['tpot_ms']:.2f}", f"{each['lru_tpot_ms']:.2f}"]
        rows.append(row)
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True))
        for row in rows
    ]
    judged, chunk = result["tokens"], result["chunk"]
    title = f"{result['model']} under {result['policy']}: {judged} tokens, {chunk} a pass"
    return "\n".join([title, *lines])
