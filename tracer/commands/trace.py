"""`moesim trace`: record the routing of a transformers model."""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from configs.errors import UserError
from tracer.extra import require_extra

if TYPE_CHECKING:
    from tracer.prompts import Prompt

_RECORD = {
    "probs": "gate_probs",
    "norms": "gate_norms",
    "embedding": "embedding",
    "hidden": "gate_inputs",
}
_ALL = "probs,norms,embedding,hidden,lookahead=3,timings"
_INTERRUPTED = 130


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("trace")(trace_command)


def trace_command(
    model: Annotated[
        str, typer.Option("--model", help="Directory of a transformers model, or a hub id.")
    ],
    out: Annotated[Path, typer.Option("--out", help="Directory to write; must be new or empty.")],
    prompts: Annotated[
        Path | None,
        typer.Option("--prompts", help="A .txt (one prompt), .jsonl, .jsonl.gz or .csv."),
    ] = None,
    text_stdin: Annotated[
        bool, typer.Option("--text-stdin", help="Read one prompt from stdin.")
    ] = False,
    max_new_tokens: Annotated[
        int, typer.Option("--max-new-tokens", help="Tokens to generate a request, at most.")
    ] = 128,
    batch_size: Annotated[
        int, typer.Option("--batch-size", help="Requests that run together.")
    ] = 1,
    device: Annotated[str, typer.Option("--device", help="auto, cpu or cuda.")] = "auto",
    dtype: Annotated[
        str, typer.Option("--dtype", help="bf16, fp16, fp32; auto: as the checkpoint is.")
    ] = "auto",
    sample: Annotated[
        str | None,
        typer.Option("--sample", help="temperature,top_p,seed such as 0.8,0.95,0; else greedy."),
    ] = None,
    record: Annotated[
        str,
        typer.Option(
            "--record",
            help="Beside ids and weights: probs, norms, embedding, hidden, lookahead=D, timings, "
            "by commas; or all.",
        ),
    ] = "",
    field: Annotated[
        str | None, typer.Option("--field", help="Where the text is, if not in text or prompt.")
    ] = None,
    lines: Annotated[bool, typer.Option("--lines", help="A text holds one prompt a line.")] = False,
    domain: Annotated[
        str | None, typer.Option("--domain", help="Kind of the prompts that name none.")
    ] = None,
    limit: Annotated[int | None, typer.Option("--limit", help="Only the first N prompts.")] = None,
    max_prompt_tokens: Annotated[
        int | None, typer.Option("--max-prompt-tokens", help="Cut longer prompts.")
    ] = None,
    ignore_eos: Annotated[
        bool, typer.Option("--ignore-eos", help="Go on after the model ends a text.")
    ] = False,
    shard_rows: Annotated[
        int | None,
        typer.Option("--shard-rows", help="Tokens a file, and in memory; default 256 MiB of them."),
    ] = None,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run code that comes with the model.")
    ] = False,
) -> None:
    """Record a trace: what a transformers model routes on your prompts.

    Ctrl-C keeps what was recorded.

    Example: moesim trace --model ./OLMoE-1B-7B --prompts prompts.jsonl --out traces/olmoe
    --batch-size 4 --record probs,lookahead=3
    """
    require_extra("moesim trace")
    columns, lookahead, timings = _parse_record(record)
    from huggingface_hub.utils import logging as hub_logging
    from transformers.utils import logging

    from tracer.load_model import resolve_device
    from tracer.record import Options, Sampling
    from tracer.record import record as run

    options = Options(
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        sampling=Sampling(**_parse_sample(sample)),
        columns=columns,
        lookahead=lookahead,
        timings=timings,
        max_prompt_tokens=max_prompt_tokens,
        ignore_eos=ignore_eos,
        shard_rows=shard_rows,
    )
    chosen, name = _prompts(prompts, text_stdin, field, lines, domain, limit)
    logging.set_verbosity_error()
    hub_logging.set_verbosity_error()
    logging.disable_progress_bar()
    with _stop_flag() as stopped, _progress() as progress:
        ended = run(
            model,
            chosen,
            out,
            options,
            prompt_set=name,
            device=resolve_device(device),
            dtype=dtype,
            trust_remote_code=trust_remote_code,
            progress=progress,
            stopped=stopped,
        )
    print(f"{out}: {ended.requests} of {ended.total} requests, {ended.tokens} tokens")
    if stopped():
        print("moesim: interrupted: what was recorded is kept", file=sys.stderr)
        raise SystemExit(_INTERRUPTED)


def _parse_record(text: str) -> tuple[tuple[str, ...], int, bool]:
    """Columns, look-ahead and whether to time, of `--record`."""
    wanted = [part.strip() for part in (_ALL if text == "all" else text).split(",") if part.strip()]
    columns, lookahead = ["weights"], 0
    for part in wanted:
        name, _, value = part.partition("=")
        if name == "lookahead" and value.isascii() and value.isdecimal():
            lookahead = int(value)
        elif part in _RECORD:
            columns.append(_RECORD[part])
        elif part != "timings":
            raise UserError(
                f"--record {part!r}: choose of {', '.join(_RECORD)}, lookahead=1 to 9, timings,"
                " or all"
            )
    return tuple(dict.fromkeys(columns)), lookahead, "timings" in wanted


def _parse_sample(text: str | None) -> dict[str, Any]:
    """Fields of Sampling; greedy without `--sample`."""
    if text is None:
        return {}
    parts = text.split(",")
    kinds: tuple[tuple[str, Callable[[str], Any]], ...]
    kinds = (("temperature", float), ("top_p", float), ("seed", int))
    try:
        if len(parts) > len(kinds):
            raise ValueError
        return {name: kind(part) for (name, kind), part in zip(kinds, parts, strict=False)}
    except ValueError:
        raise UserError(
            f"--sample {text!r}: give temperature,top_p,seed such as 0.8,0.95,0"
        ) from None


def _prompts(
    path: Path | None,
    text_stdin: bool,
    field: str | None,
    lines: bool,
    domain: str | None,
    limit: int | None,
) -> tuple[list[Prompt], str]:
    from tracer.prompts import read_prompts, text_prompts

    if (path is None) != text_stdin:
        raise UserError("give --prompts FILE or --text-stdin, one of them")
    if path is not None:
        read = read_prompts(path, field=field, lines=lines, domain=domain, limit=limit)
        return read, path.name.split(".")[0]
    if field is not None:
        raise UserError(f"--field {field}: a text has no fields")
    text = sys.stdin.buffer.read()
    return text_prompts(text, "stdin", lines=lines, domain=domain, limit=limit), "stdin"


@contextmanager
def _stop_flag() -> Iterator[Callable[[], bool]]:
    """Turn the first Ctrl-C (or SIGTERM) into a wish to stop after the step; the second ends."""
    asked: list[int] = []

    def note(number: int, _: object) -> None:
        if asked:
            raise KeyboardInterrupt
        asked.append(number)
        print("\nmoesim: stopping after this step", file=sys.stderr)

    previous = {each: signal.signal(each, note) for each in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: bool(asked)
    finally:
        for each, handler in previous.items():
            signal.signal(each, handler)


@contextmanager
def _progress() -> Iterator[Callable[[Any], None]]:
    """A bar of requests on stderr with tokens a second."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    begin: list[float] = []
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeElapsedColumn(),
        console=Console(stderr=True),
    ) as bar:
        task = bar.add_task("requests", total=None, rate="loading the model")

        def show(state: Any) -> None:
            now = time.monotonic()
            begin.append(now) if not begin else None
            seconds = now - begin[0]
            rate = f"{state.tokens / seconds:,.0f} tokens/s" if seconds > 0 else ""
            bar.update(task, completed=state.requests, total=state.total, rate=rate)

        yield show
