"""Options that several commands share: what a point is made of."""

from __future__ import annotations

from typing import Annotated

import typer

TraceOption = Annotated[str, typer.Option("--trace", help="Trace directory, or sample.")]
HardwareOption = Annotated[
    str, typer.Option("--hardware", help="Name in configs/hardware, or a YAML file.")
]
PolicyOption = Annotated[str, typer.Option("--policy", help="See moesim policies.")]
BudgetOption = Annotated[
    str | None,
    typer.Option("--budget", help="GPU memory for the whole model: 8GiB. This or --expert-budget."),
]
ExpertBudgetOption = Annotated[
    str | None,
    typer.Option("--expert-budget", help="GPU memory for expert slots: 4000MiB, 25%, 8/layer."),
]
GeometryOption = Annotated[
    str | None, typer.Option("--geometry", help="Time this model instead of the trace's own.")
]
DtypeOption = Annotated[
    str | None, typer.Option("--dtype", help="Precision of the experts: bf16, fp8, int4 ...")
]
TimingsOption = Annotated[
    str | None,
    typer.Option("--timings", help="File of the model's measured times on this hardware."),
]
LinkOption = Annotated[
    str | None, typer.Option("--link", help="Link rate, GB/s unless a unit is given.")
]
SettingsOption = Annotated[
    list[str] | None,
    typer.Option("--set", help="Policy parameter or common option, key=value; repeatable."),
]
MaxTokensOption = Annotated[
    int | None,
    typer.Option("--max-tokens", help="Only the trace's first N tokens, prefill included."),
]
WindowOption = Annotated[
    int, typer.Option("--window", help="Copies queued in hardware; more delay demand copies.")
]
TouchOrderOption = Annotated[
    str, typer.Option("--touch-order", help="Recency in a step: last-use, first-use, id.")
]
FitShareOption = Annotated[
    float | None,
    typer.Option("--fit-share", help="Share of the requests that fitted policies learn from."),
]
BatchOption = Annotated[
    int, typer.Option("--batch", help="Requests that run together; 1: as recorded.")
]
ContextOption = Annotated[
    int | None,
    typer.Option("--context", help="KV tokens to reserve for a request; the longest without it."),
]
SeedOption = Annotated[int, typer.Option("--seed", help="Seed of policies that draw.")]
