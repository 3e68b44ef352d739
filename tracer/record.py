"""Record a trace from a transformers model as it prefills and decodes.

Prompts run in batches, one after the other: a prefill step of all tokens of a batch's prompts, then
a decode step a drawn token; a request that ended leaves the rows of the later steps (its row of the
batch is computed on, but not recorded). The last drawn token is never fed back. Expert ids and
weights are those that were executed, seen by `tracer.tap`; the model computes what it computes
without the recorder.

What a step recorded is fetched and written while the next one runs.
"""

from __future__ import annotations

import inspect
import platform
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
import transformers
from numpy.typing import NDArray

from configs.errors import UserError
from configs.files import refuse_non_empty
from configs.geometry import Geometry
from tracer.columns import DECODE, PREFILL, column_spec
from tracer.load_model import Loaded, load_model
from tracer.modelinfo import NOT_FINITE, describe_model
from tracer.prompts import Prompt, prompts_sha256
from tracer.tap import Capture, RoutingTap, check_lookahead
from tracer.writer import DEFAULT_SHARD_ROWS, TraceWriter, refuse_unwritable

RECORDABLE = ("weights", "gate_probs", "gate_norms", "embedding", "gate_inputs")
DEFAULT_COLUMNS = ("weights",)
_SHARD_BYTES = 256 << 20
_COLDEST = 1e-6  # logits divided by less overflow
_MAX_STEP_ROWS = np.iinfo(np.int16).max


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn; temperature 0 takes the most likely one."""

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.temperature != 0 and not _COLDEST <= self.temperature < float("inf"):
            raise UserError(
                f"temperature {self.temperature}: give 0 (greedy), or {_COLDEST} or more"
            )
        if not 0.0 < self.top_p <= 1.0:
            raise UserError(f"top_p {self.top_p}: give more than 0, at most 1")
        if not 0 <= self.seed < 2**63:
            raise UserError(f"seed {self.seed}: give 0 or more, below 2**63")

    def draw(self, logits: torch.Tensor, generator: torch.Generator) -> int:
        """Draw a token id from `logits` [vocabulary], on the CPU so that the seed decides alone."""
        probs = torch.softmax(logits.double().cpu() / self.temperature, dim=-1)
        if bool(probs[0].isnan()):  # nan or inf anywhere makes nan of all
            raise UserError(NOT_FINITE)
        ranked, order = probs.sort(descending=True, stable=True)
        likely = ranked.cumsum(0) - ranked < self.top_p
        nucleus = order[likely].sort().values
        edges = probs[nucleus].cumsum(0)
        # Not torch.multinomial: its random numbers depend on the CPU's vector width.
        point = torch.rand(1, generator=generator, dtype=torch.float64) * edges[-1]
        return int(nucleus[torch.searchsorted(edges[:-1], point, right=True)])


@dataclass(frozen=True)
class Options:
    """What to generate and to record.

    `columns`: of RECORDABLE; `lookahead`: predictions for that many MoE layers ahead, 0 for none;
    `timings`: time each layer's parts; `max_prompt_tokens`: cut longer prompts; `ignore_eos`: go on
    after an end token. Raises UserError for a value that does not fit.
    """

    max_new_tokens: int = 128
    batch_size: int = 1
    sampling: Sampling = field(default_factory=Sampling)
    columns: tuple[str, ...] = DEFAULT_COLUMNS
    lookahead: int = 0
    timings: bool = False
    max_prompt_tokens: int | None = None
    ignore_eos: bool = False
    shard_rows: int | None = None

    def __post_init__(self) -> None:
        for name in ("max_new_tokens", "batch_size", "max_prompt_tokens", "shard_rows"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"{name} {value}: give 1 or more")
        unknown = sorted(set(self.columns) - set(RECORDABLE))
        if unknown:
            raise UserError(
                f"cannot record column {unknown[0]!r}: choose of {', '.join(RECORDABLE)}"
            )
        check_lookahead(self.lookahead)


@dataclass
class Progress:
    """How far a recording is: requests ended and in all, token rows recorded."""

    requests: int
    total: int
    tokens: int


def record(
    model_dir: str | Path,
    prompts: Sequence[Prompt],
    out: str | Path,
    options: Options | None = None,
    *,
    prompt_set: str = "prompts",
    device: str = "cpu",
    dtype: str = "auto",
    trust_remote_code: bool = False,
    progress: Callable[[Progress], None] = lambda _: None,
    stopped: Callable[[], bool] = lambda: False,
) -> Progress:
    """Run the model in `model_dir` on `prompts` and write the trace to the new directory `out`.

    Request i samples with seed + i, so that fewer prompts give the beginning of the same trace, and
    batches draw what single requests draw where their logits are the same. `progress` is called
    after every step; once `stopped()` is true, the trace is closed with what was recorded, requests
    in flight with what they have. Raises UserError for wrong values, a model that is not covered or
    cannot be loaded, a prompt longer than the model's context, and an `out` that is not empty.
    """
    options = options or Options()
    if not prompts:
        raise UserError("there are no prompts: give at least one")
    refuse_non_empty(Path(out))
    loaded = load_model(model_dir, device, dtype, trust_remote_code)
    requests = _requests(loaded, prompts, options)
    refuse_unwritable(Path(out))  # now: loading the weights takes long
    model = loaded.weights()
    tap = RoutingTap(model, options.columns, options.lookahead, options.timings)
    fields = {
        **describe_model(model, loaded.name, loaded.revision),
        "recording": _recording(options, tap, device),
        "prompts": {"name": prompt_set, "sha256": prompts_sha256(prompts)},
    }
    shard_rows = options.shard_rows or _shard_rows(fields["geometry"], options)
    state = Progress(0, len(requests), 0)
    with TraceWriter(out, fields, shard_rows=shard_rows) as writer, tap:
        for step in _lagged(_steps(model, tap, requests, options, stopped)):
            _write(writer, step)
            state.tokens += len(step.token_ids)
            state.requests = sum(request.ended for request in requests)
            progress(state)
        writer.close(_requests_table(requests), notes=_notes(requests))
    return state


@dataclass
class Request:
    """A prompt's tokens, what was drawn so far, and the draw of the next token.

    `draw` gets logits [vocabulary]; None: the most likely token.
    """

    index: int
    prompt_ids: list[int]
    domain: str | None = None
    draw: Callable[[torch.Tensor], int] | None = None
    drawn: list[int] = field(default_factory=list)
    steps: int = 0
    ended: bool = False


@dataclass
class Step:
    """The rows of one forward step, [n] each, and their routing on its way to the host."""

    phase: int
    request: NDArray
    row: NDArray
    position: NDArray
    token_ids: NDArray
    capture: Capture


@torch.inference_mode()
def generate_steps(
    model: Any, tap: RoutingTap, batch: Sequence[Request], max_new_tokens: int, ends: frozenset[int]
) -> Iterator[Step]:
    """Prefill a batch, then decode until each request has drawn `max_new_tokens` or an end token.

    A step is yielded when its work was handed to the device, before its next token is drawn: what
    the consumer does meanwhile costs no device time.
    """
    feeder = _Feeder(model, [request.prompt_ids for request in batch], max_new_tokens)
    feed = feeder.prompts()
    for count in range(max_new_tokens):
        output = model(**feed)
        yield feeder.step(tap, batch, DECODE if count else PREFILL)
        tokens = _draw(batch, output.logits[:, -1])
        for request, token in zip(batch, tokens, strict=True):
            if not request.ended:
                request.drawn.append(token)
                request.ended = token in ends or len(request.drawn) == max_new_tokens
        if all(request.ended for request in batch):
            return
        feed = feeder.tokens(tokens, output.past_key_values)


def _draw(batch: Sequence[Request], logits: torch.Tensor) -> list[int]:
    """One token a request from logits [B, vocabulary]; those of ended requests do not matter."""
    if all(request.draw is None for request in batch):
        # Fetched at once: each transfer waits for the device.
        found = torch.stack((logits.argmax(-1), logits.amax(-1).isfinite().long())).tolist()
        likely, finite = found
        if not all(finite):
            raise UserError(NOT_FINITE)
        return list(likely)
    return [
        0 if request.ended else request.draw(row) if request.draw else int(row.argmax())
        for request, row in zip(batch, logits, strict=True)
    ]


class _Feeder:
    """The model's inputs step by step: left padding, its mask, and positions that leave it out."""

    def __init__(self, model: Any, prompts: list[list[int]], max_new_tokens: int) -> None:
        self._device = model.device
        self._lengths = [len(ids) for ids in prompts]
        self._width = width = max(self._lengths)
        self._count = 0
        padded = [[0] * (width - len(ids)) + ids for ids in prompts]
        self._fed = np.array(padded, np.int64)
        self._pads = np.array([width - length for length in self._lengths])
        known = inspect.signature(model.forward).parameters
        self._keep = {"logits_to_keep": 1} if "logits_to_keep" in known else {}
        self._positions = "position_ids" in known
        self._mask = None
        # Without padding the model's own causal path runs, as it does for a single request.
        if self._pads.any():
            mask = np.ones((len(prompts), width + max_new_tokens), np.int64)
            mask[:, :width] = np.arange(width) >= self._pads[:, None]
            self._mask = torch.from_numpy(mask).to(self._device)

    def prompts(self) -> dict[str, Any]:
        """Inputs of the prefill."""
        return self._inputs(self._fed, None)

    def tokens(self, drawn: Sequence[int], cache: Any) -> dict[str, Any]:
        """Inputs of the next decode step."""
        self._count += 1
        self._fed = np.array(drawn, np.int64)[:, None]
        return self._inputs(self._fed, cache)

    def step(self, tap: RoutingTap, batch: Sequence[Request], phase: int) -> Step:
        """Describe the rows of the step just run and take their routing; padding is left out."""
        slots, columns = self._rows(batch)
        width = self._fed.shape[1]
        kept = None
        if len(slots) < self._fed.size:
            # Blocking, from ordinary memory: cheaper than pinning a few numbers.
            kept = torch.from_numpy(slots * width + columns).to(self._device)
        for slot in np.unique(slots):
            batch[slot].steps += 1
        return Step(
            phase=phase,
            request=np.array([request.index for request in batch])[slots],
            # Unique in the step: a prefill's rows are its tokens.
            row=np.arange(len(slots)) if phase == PREFILL else slots,
            position=columns + self._begin() - self._pads[slots],
            token_ids=self._fed[slots, columns],
            capture=tap.take(kept),
        )

    def _begin(self) -> int:
        """Column of the first token fed now, among all columns of the batch."""
        return 0 if self._count == 0 else self._width + self._count - 1

    def _rows(self, batch: Sequence[Request]) -> tuple[NDArray, NDArray]:
        """Batch rows and columns of the tokens to record, by request and then position."""
        running = np.array([not request.ended for request in batch])
        recorded = np.broadcast_to(running[:, None], self._fed.shape)
        if self._count == 0:
            recorded = recorded & (np.arange(self._width) >= self._pads[:, None])
        slots, columns = np.nonzero(recorded)
        return slots, columns

    def _inputs(self, tokens: NDArray, cache: Any) -> dict[str, Any]:
        inputs: dict[str, Any] = {
            "input_ids": torch.from_numpy(tokens).to(self._device),
            "past_key_values": cache,
            "use_cache": True,
            **self._keep,
        }
        if self._mask is None:
            return inputs
        begin, end = self._begin(), self._begin() + tokens.shape[1]
        inputs["attention_mask"] = self._mask[:, :end]
        if self._positions:
            position = (np.arange(begin, end) - self._pads[:, None]).clip(min=0)
            inputs["position_ids"] = torch.from_numpy(position).to(self._device)
        return inputs


def _steps(
    model: Any,
    tap: RoutingTap,
    requests: Sequence[Request],
    options: Options,
    stopped: Callable[[], bool],
) -> Iterator[Step]:
    ends = frozenset() if options.ignore_eos else end_tokens(model)
    for first in range(0, len(requests), options.batch_size):
        batch = requests[first : first + options.batch_size]
        for step in generate_steps(model, tap, batch, options.max_new_tokens, ends):
            yield step
            if stopped():
                return


def _lagged(steps: Iterator[Step]) -> Iterator[Step]:
    """Each step after the next one was launched, so that its rows wait for nobody."""
    held = None
    for step in steps:
        if held is not None:
            yield held
        held = step
    if held is not None:
        yield held


def end_tokens(model: Any) -> frozenset[int]:
    """The tokens that end a text of this model."""
    ends = model.generation_config.eos_token_id
    return frozenset([ends] if isinstance(ends, int) else ends or [])


def _requests(loaded: Loaded, prompts: Sequence[Prompt], options: Options) -> list[Request]:
    sampling = options.sampling
    requests = []
    for index, prompt in enumerate(prompts):
        ids = loaded.tokenize(prompt, index)[: options.max_prompt_tokens]
        draw = None
        if sampling.temperature > 0:
            generator = torch.Generator().manual_seed(sampling.seed + index)
            draw = partial(sampling.draw, generator=generator)
        requests.append(Request(index, ids, prompt["domain"], draw))
        if loaded.context and len(ids) + options.max_new_tokens > loaded.context:
            raise UserError(
                f"prompt {index + 1}: {len(ids)} tokens and {options.max_new_tokens} new ones"
                f" exceed the model's context of {loaded.context}; shorten it, cut by"
                " --max-prompt-tokens, or lower --max-new-tokens"
            )
    for first in range(0, len(requests), options.batch_size):
        batch = requests[first : first + options.batch_size]
        rows = sum(len(request.prompt_ids) for request in batch)
        if rows > _MAX_STEP_ROWS:
            raise UserError(
                f"prompts {first + 1} to {first + len(batch)} have {rows} tokens; a step holds at"
                f" most {_MAX_STEP_ROWS}: lower --batch-size or cut by --max-prompt-tokens"
            )
    return requests


def _write(writer: TraceWriter, step: Step) -> None:
    columns = step.capture.result()
    writer.write_step(
        request=step.request,
        row=step.row,
        phase=step.phase,
        position=step.position,
        token_id=step.token_ids,
        timings=step.capture.timings(),
        **columns,
    )


def _shard_rows(geometry: Geometry, options: Options) -> int:
    """Rows that keep a shard's arrays below _SHARD_BYTES."""
    names = [*options.columns, "experts"]
    names += [f"lookahead_{distance}" for distance in range(1, options.lookahead + 1)]
    specs = [column_spec(name, geometry) for name in names]
    row_bytes = sum(spec.width * spec.dtype.itemsize for spec in specs)
    return max(min(_SHARD_BYTES // row_bytes, DEFAULT_SHARD_ROWS), 1)


def _requests_table(requests: Sequence[Request]) -> pd.DataFrame:
    """Requests that have rows; a request's tokens are one a step it took part in."""
    begun = [request for request in requests if request.steps]
    return pd.DataFrame(
        {
            "request": [request.index for request in begun],
            "prompt_tokens": [len(request.prompt_ids) for request in begun],
            "output_tokens": [request.steps for request in begun],
            "domain": [request.domain for request in begun],
            "arrival_s": np.nan,
        }
    )


def _notes(requests: Sequence[Request]) -> str:
    ended = sum(request.ended for request in requests)
    if ended == len(requests):
        return ""
    begun = sum(request.steps > 0 for request in requests)
    return f"stopped: {ended} of {len(requests)} requests ended, {begun - ended} were in flight"


def _recording(options: Options, tap: RoutingTap, device: str) -> dict[str, Any]:
    sampling: dict[str, Any] = {
        **asdict(options.sampling),
        "max_new_tokens": options.max_new_tokens,
        "batch_size": options.batch_size,
        "max_prompt_tokens": options.max_prompt_tokens,
        "ignore_eos": options.ignore_eos,
        "experts_kernel": tap.kernel_name,
        "gate_score": tap.score,
    }
    seed = sampling.pop("seed")
    return {
        "generator": "moesim trace",
        "sampling": sampling,
        "seed": seed,
        "software": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "gpu": torch.cuda.get_device_name(device) if device.startswith("cuda") else None,
    }
