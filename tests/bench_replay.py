"""How fast the replay engine is beside what bounds it, in one process on one GPU and one model.

    python -m tests.bench_replay --geometry olmoe-1b-7b --out FILE.json

1. A decode step of one token with all experts on the GPU, its token on the host at the end:
   transformers' own eager step (its experts implementations, DynamicCache and StaticCache), the
   whole step as one CUDA graph, and the engine under `resident`: graphs cut at every experts call,
   decisions in Python. The uncut graph computes its experts by the engine's kernels, since not all
   of transformers' can be captured. All get the same tokens and choose their own experts. Rounds
   are interleaved in changing order; each begins with a prompt, and its first steps are left out.
2. lru at 25 and 50 % on the trace, beside max(link time, HBM floor): bytes copied a token by the
   link's rate, bytes that a step must read by the memory's, both measured in this run.
3. The host's time an event under lru by what it did, from the engine's ledger.

On a plain CPU (`--model DIR --device cpu`) it rehearses: no graphs, no rates of memory and link.
"""

from __future__ import annotations

import argparse
import gc
import json
import random
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from time import perf_counter_ns
from typing import Any

import numpy as np
import torch
import transformers
from transformers import DynamicCache

import policies
from configs.files import write_atomically
from policies.capacity import plan_memory
from policies.core import DecisionCore
from policies.interface import PolicyData, Shape
from replay.breakdown import Marks
from replay.model import ReplayModel
from replay.open import command_line, open_model, weights_of
from replay.play import ForcedStep, Measured, Replay, Session, _no_collection, static_cache
from replay.point import replay_point
from replay.slots import SlotPool
from sim.inputs import Inputs
from sim.point import Point
from sim.spans import COPY, DECIDE, EXPERTS, GPU, ISSUE, SEGMENT, STEP
from tracer.trace import Trace

PROMPT_TOKENS = 16
SETTLING = 3  # steps of every round that are left out
AT_MOST = {"eager": 0.25, "uncut": 1.25}
HOST_US_AT_MOST = 25
BUDGETS = ("25%", "50%")
IMPLEMENTATIONS = ("grouped_mm", "batched_mm", "eager")
UNCUT, REPLAY = "one uncut graph", "replay, resident"


class Whole:
    """All experts on the device in one pool, shared by transformers' modules and our kernels.

    Expert e of layer l is in slot l * experts + e.
    """

    def __init__(self, ready: ReplayModel, device: torch.device) -> None:
        store, experts = ready.store, ready.num_experts
        self.pool = SlotPool(ready.layout, store.layers * experts, device)
        for layer, module in enumerate(ready.modules):
            own = slice(layer * experts, (layer + 1) * experts)
            self.pool.memory[own].copy_(store.memory[layer])
            module._parameters.update({n: view[own] for n, view in self.pool.views.items()})


class OwnStep:
    """transformers' decode step, kernel by kernel."""

    def __init__(self, model: Any, implementation: str, capacity: int, *, static: bool) -> None:
        self._model = model
        self._implementation = implementation
        self._capacity = capacity
        self._static = static
        self._cache: Any = None

    def begin(self, prompt: torch.Tensor) -> None:
        self._model.set_experts_implementation(self._implementation)
        config = self._model.config
        whole = static_cache(config, self._capacity) if self._static else None
        self._cache = whole or DynamicCache(config=config)
        self._model(prompt, past_key_values=self._cache, use_cache=True, logits_to_keep=1)

    def step(self, token: torch.Tensor) -> int:
        output = self._model(token, past_key_values=self._cache, use_cache=True, logits_to_keep=1)
        return int(output.logits[:, -1].argmax(-1))

    def end(self) -> None:
        self._cache = None


class UncutStep:
    """The whole step in one CUDA graph, with the engine's kernels on a full pool."""

    @torch.inference_mode()
    def __init__(self, ready: ReplayModel, pool: SlotPool, capacity: int) -> None:
        from replay.graphs import _capturable_masks, require_kernels

        self._model = ready.model
        self._kernels = require_kernels(ready.modules, pool.views)
        self._layers = {id(module): layer for layer, module in enumerate(ready.modules)}
        self._num_experts = ready.num_experts
        self._cache = static_cache(ready.model.config, capacity)
        self._token = torch.zeros((1, 1), dtype=torch.long, device=pool.memory.device)
        self._chosen = torch.empty(1, dtype=torch.long, pin_memory=True)
        self._reached = torch.cuda.Event()
        self._graph = torch.cuda.CUDAGraph()
        with self._own_experts(), _capturable_masks():
            self._forward(self._token)  # compiles, and makes the cache's tensors
            torch.cuda.synchronize()
            with torch.cuda.graph(self._graph):
                self._forward(self._token)
        self._cache.reset()

    def begin(self, prompt: torch.Tensor) -> None:
        self._cache.reset()
        with self._own_experts():
            self._forward(prompt)
        torch.cuda.synchronize()

    def step(self, token: torch.Tensor) -> int:
        self._token.copy_(token)
        self._graph.replay()
        self._reached.record()
        while not self._reached.query():
            pass
        return int(self._chosen[0])

    def end(self) -> None:
        pass

    def _forward(self, tokens: torch.Tensor) -> None:
        output = self._model(tokens, past_key_values=self._cache, use_cache=True, logits_to_keep=1)
        self._chosen.copy_(output.logits[:, -1].argmax(-1), non_blocking=True)

    def _own_experts(self) -> Any:
        from replay.graphs import _as_experts

        return _as_experts(self._model, self._experts)

    def _experts(self, module: Any, hidden: torch.Tensor, *args: Any, **named: Any) -> torch.Tensor:
        ids, weights = (*args, *named.values())[:2]
        layer = self._layers[id(module)]
        kernel = self._kernels[layer]
        rows, top_k = ids.shape
        slots = (ids + layer * self._num_experts).to(torch.int16).reshape(-1)
        act = hidden.new_empty((rows * top_k, kernel.inner))
        out = hidden.new_empty((rows * top_k, kernel.width))
        kernel.launch(hidden, slots, act, out)
        weighted = out * weights.reshape(-1, 1)
        return weighted.view(rows, top_k, -1).sum(1).to(hidden.dtype)


def resident_core(ready: ReplayModel) -> DecisionCore:
    layers = len(ready.modules)
    shape = Shape(layers, ready.num_experts, ready.top_k, (ready.layout.nbytes,) * layers)
    info = policies.get("resident")
    params, options = info.parse({})
    built = info.build(params, PolicyData(shape))
    plan = plan_memory(shape, built.scope, ready.num_experts * sum(shape.bytes_by_layer))
    return DecisionCore(shape, plan, built, options)


def forced(tokens: np.ndarray) -> list[ForcedStep]:
    """A prompt, then a token a step; the model chooses its experts."""
    prompt = ForcedStep(0, True, (0,), (), tokens[:PROMPT_TOKENS], None)
    rest = enumerate(tokens[PROMPT_TOKENS:].reshape(-1, 1), start=1)
    return [prompt, *(ForcedStep(index, False, (), (), token, None) for index, token in rest)]


Round = tuple[list[float], list[int]]
"""Milliseconds of the steps that count, and the tokens chosen in all of them."""


@torch.inference_mode()
def round_of(stepper: OwnStep | UncutStep, tokens: np.ndarray, device: torch.device) -> Round:
    inputs = torch.from_numpy(tokens[None]).to(device)
    stepper.begin(inputs[:, :PROMPT_TOKENS])
    taken, chosen = [], []
    with _no_collection():
        for at in range(PROMPT_TOKENS, len(tokens)):
            began = perf_counter_ns()
            chosen.append(stepper.step(inputs[:, at : at + 1]))
            taken.append((perf_counter_ns() - began) / 1e6)
    stepper.end()
    return taken[SETTLING:], chosen


def replayed_round(session: Session, tokens: np.ndarray) -> tuple[Round, Measured]:
    measured = Replay(session, resident_core(session.ready)).run(forced(tokens))
    times = measured.times
    taken = [(end - begin) / 1e6 for begin, end in zip(times.begin, times.end, strict=True)]
    return (taken[1 + SETTLING :], measured.tokens[1:]), measured


def steppers(session: Session) -> Iterator[tuple[str, OwnStep | UncutStep]]:
    """What replay is compared with, by name; the model's default implementation comes first."""
    ready, capacity = session.ready, session.kv_capacity
    whole = Whole(ready, session.device)
    default = ready.model.config._experts_implementation
    for name in dict.fromkeys((default, *IMPLEMENTATIONS)):
        for static in (False, True):
            cache = "StaticCache" if static else "DynamicCache"
            yield f"eager, {name}, {cache}", OwnStep(ready.model, name, capacity, static=static)
    if session.device.type == "cuda":
        yield UNCUT, UncutStep(ready, whole.pool, capacity)


def full_residency(session: Session, steps: int, rounds: int) -> dict[str, Any]:
    """Times of every way to decode, interleaved; a way that fails is left out with its reason."""
    ways = dict(steppers(session))
    default = session.ready.model.config._experts_implementation
    taken: dict[str, list[list[float]]] = {name: [] for name in (*ways, REPLAY)}
    refused: dict[str, str] = {}
    agree: dict[str, list[float]] = {name: [] for name in taken}
    host: dict[str, Any] = {}
    for number in range(rounds + 1):  # the first warms up
        drawn = np.random.default_rng(number).integers(
            session.vocabulary, size=PROMPT_TOKENS + SETTLING + steps
        )
        order = list(taken)
        random.Random(number).shuffle(order)
        chosen: dict[str, list[int]] = {}
        for name in order:
            if name in refused:
                continue
            if name == REPLAY:
                (times, chosen[name]), measured = replayed_round(session, drawn)
                decode = np.arange(len(measured.times.begin)) > 0
                host = host_times(measured, decode, len(session.ready.modules))
                del measured
                free()
            else:
                try:
                    times, chosen[name] = round_of(ways[name], drawn, session.device)
                except Exception as error:
                    if not name.startswith("eager"):
                        raise
                    refused[name] = " ".join(str(error).split())[:200]
                    continue
            if number:
                taken[name].append(times)
        for name, tokens in chosen.items():
            agree[name].append(float(np.mean(np.equal(tokens, chosen[REPLAY]))))
    return {
        "default_implementation": default,
        "ways": {name: spread(each) for name, each in taken.items() if name not in refused},
        "refused": refused,
        "ratios": {
            name: ratios(taken[REPLAY], each)
            for name, each in taken.items()
            if name != REPLAY and name not in refused
        },
        "same_tokens": {name: float(np.mean(each)) for name, each in agree.items() if each},
        "host_us_an_event": host,
    }


def spread(rounds: list[list[float]]) -> dict[str, Any]:
    steps = np.concatenate(rounds)
    low, middle, high = np.percentile(steps, [10, 50, 90])
    return {
        "median_ms": float(middle),
        "p10_ms": float(low),
        "p90_ms": float(high),
        "steps": len(steps),
        "medians_of_rounds_ms": [float(np.median(each)) for each in rounds],
    }


def ratios(ours: list[list[float]], theirs: list[list[float]]) -> dict[str, float]:
    """Of the medians over all steps; lowest and highest of the rounds' own."""
    paired = [np.median(a) / np.median(b) for a, b in zip(ours, theirs, strict=True)]
    whole = np.median(np.concatenate(ours)) / np.median(np.concatenate(theirs))
    return {"ratio": float(whole), "low": float(min(paired)), "high": float(max(paired))}


# ---------------------------------------------------------------------- host time


def host_times(measured: Measured, decode: np.ndarray, layers: int) -> dict[str, Any]:
    """The host's time an event of decode, us, by what it did; waiting and copies apart.

    ``decode``: bool [steps], those that do. ``sum``: what the limit is for: launching the
    segment, deciding, refilling where no chunk was named, launching groups. Host work that a wait
    hides (landings, refills) is in the wait. ``a_step``: between steps' layers.
    """
    marks = Marks.of(measured)
    steps = int(decode.sum())
    counting = (marks.step >= 0) & decode[np.maximum(marks.step, 0)]
    inside = counting & (marks.layer >= 0) & (marks.layer < layers)
    copies = inside & (marks.kind == ISSUE) & (marks.count > 0)
    kinds = {
        "segment_launch": inside & (marks.kind == SEGMENT),
        "decide": inside & (marks.kind == DECIDE),
        "refill_without_copies": inside & (marks.kind == ISSUE) & ~copies,
        "experts_launch": inside & (marks.kind == EXPERTS),
    }
    counted = np.logical_or.reduce(list(kinds.values()))
    event = (np.cumsum(decode) - 1)[np.maximum(marks.step, 0)] * layers + marks.layer
    sums = np.bincount(event[counted], marks.duration[counted], steps * layers) / 1e3
    apart = {
        "issue_copies": copies,
        "wait_for_gpu_and_readback": inside & (marks.kind == GPU),
        "wait_for_copies": inside & (marks.kind == COPY),
    }

    def mean_us(chosen: np.ndarray, count: int) -> float:
        return float(marks.duration[chosen].sum()) / count / 1e3

    low, middle, high = np.percentile(sums, [10, 50, 90])
    events = steps * layers
    return {
        "events": events,
        "sum": {
            "mean": float(sums.mean()),
            "median": float(middle),
            "p10": float(low),
            "p90": float(high),
        },
        "mean_by_kind": {name: mean_us(chosen, events) for name, chosen in kinds.items()},
        "mean_apart": {name: mean_us(chosen, events) for name, chosen in apart.items()},
        "chunks_an_event": float(marks.count[copies].sum()) / events,
        "groups_an_event": float(kinds["experts_launch"].sum()) / events,
        "us_a_copy": mean_us(copies, max(int(marks.count[copies].sum()), 1)),
        "a_step": mean_us(counting & (marks.kind == STEP), steps),
    }


# ---------------------------------------------------------------------- beside the bounds


def step_bytes(ready: ReplayModel, cache: Any) -> dict[str, int]:
    """Bytes that a decode step must read: weights outside the experts, top-k experts, KV cache.

    Of an embedding that is not the head's weights too, one row alone is read.
    """
    model = ready.model
    outside = sum(each.numel() * each.itemsize for each in model.parameters())
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    if embedding is not head:
        outside -= embedding.numel() * embedding.itemsize
    held = [part for layer in cache.layers for part in (layer.keys, layer.values)]
    return {
        "outside_experts": outside,
        "experts": len(ready.modules) * ready.top_k * ready.layout.nbytes,
        "kv_cache": sum(part.numel() * part.itemsize for part in held),
    }


def memory_rate() -> tuple[float, str]:
    """Bytes a second that a simple kernel reads from the GPU's memory, and how it was read."""
    from replay.calibrate.compute import measure_memory
    from replay.calibrate.cuda import CudaRig
    from replay.calibrate.rig import Sizes

    for reading in measure_memory(CudaRig(), Sizes()):
        if reading.name == "gpu_bytes_per_s":
            return reading.value.value, reading.how
    raise AssertionError("no bandwidth")


def beside_bounds(
    session: Session, inputs: Inputs, points: list[Point], floor: dict[str, Any] | None
) -> list[dict[str, Any]]:
    """lru on the trace, its TPOT beside what the link and the memory need at least."""
    link = None
    if floor is not None:
        from replay.calibrate.model import measure_link

        link = measure_link(session).bytes_per_s
    found = []
    for point in (points[0], *points):  # the first warms up
        run = replay_point(session, inputs, point)
        decode = np.array([step.prefill_tokens == 0 for step in run.setting.workload.steps()])
        # Without prefetches every miss is a copy, and there are no others.
        copied = run.result["decode"]["misses"] * session.ready.layout.nbytes
        told = {
            "policy": point.policy,
            "budget": point.expert_budget,
            "decode_tokens": run.result["tokens"]["decode"],
            "tpot_ms": run.result["itl_ms"],
            "bytes_a_token": copied / run.result["tokens"]["decode"],
            "breakdown_ms": run.result["breakdown_ms"],
            "host_us_an_event": host_times(run.measured, decode, len(session.ready.modules)),
        }
        if floor is not None and link is not None:
            link_ms = told["bytes_a_token"] / link * 1e3
            bound = max(link_ms, floor["floor_ms"])
            told |= {
                "link_bytes_per_s": link,
                "link_ms": link_ms,
                "bound_ms": bound,
                "tpot_over_bound": told["tpot_ms"]["mean"] / bound,
            }
        found.append(told)
        del run
        free()
    return found[1:]


def free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


# ---------------------------------------------------------------------- what is told


def lines(told: dict[str, Any]) -> Iterator[str]:
    whole = told["full_residency"]
    yield f"{told['model']} on {told['device']}; {told['weights']}"
    yield f"transformers' default experts: {whole['default_implementation']}"
    yield ""
    head = f"{'a decode step, all experts there':34} {'ms, median':>10} {'p10 to p90':>18}"
    yield f"{head}     replay / it     same greedy tokens"
    for name, each in whole["ways"].items():
        span = f"{each['p10_ms']:.3f} to {each['p90_ms']:.3f}"
        ratio = whole["ratios"].get(name)
        beside = ""
        if ratio is not None:
            beside = f"{ratio['ratio']:.3f} ({ratio['low']:.3f} to {ratio['high']:.3f})"
            beside += f"   {whole['same_tokens'][name]:.0%}"
        yield f"{name:34} {each['median_ms']:10.3f} {span:>18}     {beside}"
    for name, why in whole["refused"].items():
        yield f"{name:34} failed: {why}"
    floor = told["floor"]
    if floor is not None:
        yield from _targets(whole)
        rate, nbytes = floor["memory_bytes_per_s"] / 1e12, sum(floor["bytes"].values()) / 1e9
        yield ""
        yield f"HBM floor: {nbytes:.3f} GB at {rate:.3f} TB/s: {floor['floor_ms']:.3f} ms a step"
        resident = whole["ways"][REPLAY]["median_ms"] / floor["floor_ms"]
        yield f"replay, resident: {resident:.2f}x the floor"
    for each in told["lru"]:
        yield ""
        yield f"lru {each['budget']}: {each['tpot_ms']['mean']:.3f} ms a token" + _bound(each)
        yield from _host(each["host_us_an_event"])
        if floor is not None:
            mean = each["host_us_an_event"]["sum"]["mean"]
            verdict = "met" if mean <= HOST_US_AT_MOST else "MISSED"
            yield f"  host, us an event: {mean:.1f}, at most {HOST_US_AT_MOST}: {verdict}"
    yield ""
    yield "replay, resident:"
    yield from _host(whole["host_us_an_event"])


def _targets(whole: dict[str, Any]) -> Iterator[str]:
    default = whole["default_implementation"]
    for way, most in ((f"eager, {default}, DynamicCache", "eager"), (UNCUT, "uncut")):
        found = whole["ratios"].get(way)
        if found is not None:
            verdict = "met" if found["ratio"] <= AT_MOST[most] else "MISSED"
            yield f"replay / {way}: {found['ratio']:.3f}, at most {AT_MOST[most]}: {verdict}"


def _bound(each: dict[str, Any]) -> str:
    if "bound_ms" not in each:
        return ""
    return (
        f"; link {each['link_ms']:.3f} ms, max(link, HBM) {each['bound_ms']:.3f} ms: "
        f"{each['tpot_over_bound']:.3f}x the bound"
    )


def _host(host: dict[str, Any]) -> Iterator[str]:
    total = host["sum"]
    yield (
        f"  host, us an event: {total['mean']:.1f} mean, {total['median']:.1f} median "
        f"({total['p10']:.1f} to {total['p90']:.1f})"
    )
    for title, kinds in (("of it", host["mean_by_kind"]), ("apart", host["mean_apart"])):
        parts = ", ".join(f"{name.replace('_', ' ')} {us:.1f}" for name, us in kinds.items())
        yield f"    {title}: {parts}"
    yield (
        f"    {host['chunks_an_event']:.2f} copies an event, {host['us_a_copy']:.1f} us each; "
        f"{host['groups_an_event']:.2f} launches; between layers {host['a_step']:.1f} us a step"
    )


def measure(options: argparse.Namespace) -> dict[str, Any]:
    trace = Trace.open(options.trace)
    inputs = Inputs(trace, max_tokens=options.max_tokens)
    points = [
        Point(
            policy="lru",
            hardware=options.hardware,
            geometry=options.geometry,
            expert_budget=budget,
        )
        for budget in BUDGETS
    ]
    with closing(open_model(options.model, options.geometry, options.device)) as ready:
        context = inputs.workload("last-use").max_context
        session = Session(ready, max(context, PROMPT_TOKENS + SETTLING + options.steps + 1))
        cuda = session.device.type == "cuda"
        whole = full_residency(session, options.steps, options.rounds)
        release(ready)
        free()
        floor = None
        if cuda:
            rate, how = memory_rate()
            free()
            nbytes = step_bytes(ready, session.cache)
            floor = {
                "bytes": nbytes,
                "memory_bytes_per_s": rate,
                "how": how,
                "floor_ms": sum(nbytes.values()) / rate * 1e3,
            }
        return {
            "command": command_line().replace("moesim", "python -m tests.bench_replay", 1),
            "model": options.geometry or Path(options.model).name,
            "weights": weights_of(ready),
            "device": torch.cuda.get_device_name() if cuda else "cpu: a rehearsal without graphs",
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "kv_capacity": session.kv_capacity,
            "prompt_tokens": PROMPT_TOKENS,
            "trace": str(options.trace),
            "full_residency": whole,
            "floor": floor,
            "lru": beside_bounds(session, inputs, points, floor),
        }


def release(ready: ReplayModel) -> None:
    """Take the whole experts from transformers' modules again."""
    for module in ready.modules:
        module._parameters.update(dict.fromkeys(module._parameters))


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--geometry", help="name in configs/models: random weights")
    parser.add_argument("--model", help="directory of a checkpoint")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--trace", default="sample", help="of the model's layers, experts, top-k")
    parser.add_argument("--hardware", default="h200-pcie5", help="costs that policies read")
    parser.add_argument("--steps", type=int, default=25, help="that count, a round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--max-tokens", type=int, default=400, help="of the trace, under lru")
    parser.add_argument("--out", type=Path, help="JSON file, new")
    options = parser.parse_args(argv)
    if options.out is not None and options.out.exists():
        parser.error(f"{options.out} exists: name another file")
    transformers.utils.logging.disable_progress_bar()
    told = measure(options)
    print("\n".join(lines(told)))
    if options.out is not None:
        write_atomically(options.out, (json.dumps(told, indent=1) + "\n").encode())


if __name__ == "__main__":
    main()
