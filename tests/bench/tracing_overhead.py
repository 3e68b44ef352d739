"""What tracing costs a decode step: traced and untraced steps alternate in one run.

    python -m tests.bench.tracing_overhead --geometry qwen1.5-moe-a2.7b --device cuda --out DIR

Eager decoding of one token is bound by the host, which launches thousands of small kernels: what a
tracer does on the host adds to a step as it is, what it does on the GPU mostly hides. So all that a
recording does is part of a traced step: hooks, stacking and copying the columns, and fetching and
writing the step before, the shards that come due included. An untraced step is the model alone: the
hooks are gone, and the tap is entered and left outside the timed part.

Both steps of a pair decode the same token at the same position of the same cache, in an order that
alternates; their logits must be equal bit for bit. Two measures for each case:

- step: the device is synchronised around each step; the ratio traced/untraced of each pair;
- throughput: blocks of 20 steps without a synchronisation of ours, the ratio of each pair.

Each is the median over pairs with its 95 % interval by bootstrap, and the ratio of the sums, which
has the rare steps that write a shard in full. Weights are random: speed does not depend on them.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import transformers

from replay.published import transformers_config
from tracer.columns import DECODE
from tracer.modelinfo import describe_model
from tracer.tap import RoutingTap
from tracer.writer import TraceWriter

CASES = {
    "ids+weights": {"columns": ("weights",)},
    "ids+weights+timings": {"columns": ("weights",), "timings": True},
    "everything": {
        "columns": ("weights", "gate_probs", "gate_norms", "embedding", "gate_inputs"),
        "lookahead": 3,
        "timings": True,
    },
}
BLOCK = 20
SHARD_ROWS = 256
PROMPT_TOKENS = 64
WARM_UP = 10


def build(geometry, device, dtype, layers=None):
    """The model with random weights, made on the device; `layers`: only the first so many."""
    config = transformers_config(geometry)
    if layers is not None:
        config.num_hidden_layers = layers
        # Made for the whole model by the configuration; one entry a layer.
        if getattr(config, "layer_types", None):
            config.layer_types = config.layer_types[:layers]
    torch.manual_seed(0)
    with torch.device(device):
        return transformers.AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


class Decoder:
    """One decode step again and again, at the same position of one cache."""

    def __init__(self, model):
        self.model = model
        self.cuda = model.device.type == "cuda"
        # On one CPU thread the process's own time is the step's, whatever else the machine does.
        self.clock = time.perf_counter if self.cuda else time.process_time
        generator = torch.Generator().manual_seed(0)
        size = (1, PROMPT_TOKENS)
        prompt = torch.randint(model.config.vocab_size, size, generator=generator)
        output = model(prompt.to(model.device), use_cache=True, logits_to_keep=1)
        self.cache = output.past_key_values
        self.first = output.logits[:, -1].argmax(-1, keepdim=True)
        self.token = self.first

    def step(self):
        output = self.model(
            self.token, past_key_values=self.cache, use_cache=True, logits_to_keep=1
        )
        self.token = output.logits[:, -1].argmax(-1, keepdim=True)
        return output.logits

    def rewind(self):
        surplus = self.cache.get_seq_length() - PROMPT_TOKENS
        if surplus:
            self.cache.crop(-surplus)
        self.token = self.first

    def synchronise(self):
        if self.cuda:
            torch.cuda.synchronize()


class Recorder:
    """What `moesim trace` does after each decode step of one request."""

    def __init__(self, model, fields, directory, case):
        self.tap = RoutingTap(model, **CASES[case])
        self.directory = Path(directory)
        self.writer = TraceWriter(self.directory, fields, shard_rows=SHARD_ROWS)
        self.held = None
        self.steps = 0

    def after_step(self):
        capture = self.tap.take()
        if self.held is not None:
            self.write(self.held)
        self.held = capture

    def write(self, capture):
        columns = capture.result()
        self.writer.write_step(
            request=np.array([0]),
            row=np.array([0]),
            phase=DECODE,
            position=np.array([PROMPT_TOKENS + self.steps]),
            token_id=np.array([0]),
            timings=capture.timings(),
            **columns,
        )
        self.steps += 1

    def close(self):
        if self.held is not None:
            self.write(self.held)
        entry = {"request": 0, "prompt_tokens": PROMPT_TOKENS, "output_tokens": self.steps + 1}
        self.writer.close([entry])
        shutil.rmtree(self.directory)


def timed(decoder, recorder, steps):
    """Seconds of `steps` decode steps from the prompt on, and the last logits."""
    decoder.rewind()
    decoder.synchronise()
    begin = decoder.clock()
    for _ in range(steps):
        logits = decoder.step()
        if recorder is not None:
            recorder.after_step()
    decoder.synchronise()
    return decoder.clock() - begin, logits


def pairs(decoder, recorder, count, steps):
    """Seconds a step of `count` pairs of untraced and traced runs of `steps` steps: [count, 2]."""
    seconds = np.empty((count, 2))
    for index in range(count):
        logits = [None, None]
        for traced in (0, 1) if index % 2 else (1, 0):
            if traced:
                with recorder.tap:
                    took, logits[1] = timed(decoder, recorder, steps)
            else:
                took, logits[0] = timed(decoder, None, steps)
            seconds[index, traced] = took / steps
        if not torch.equal(*logits):
            raise SystemExit("tracing changed the model's output")
    return seconds


def summary(seconds, draws=2000):
    """Median paired ratio and its bootstrap interval, and what the steps took."""
    ratios = seconds[:, 1] / seconds[:, 0]
    rng = np.random.default_rng(0)
    medians = np.median(rng.choice(ratios, (draws, len(ratios))), axis=1)
    low, high = np.quantile(medians, [0.025, 0.975])
    quartiles = np.quantile(ratios, [0.25, 0.75])
    return {
        "pairs": len(ratios),
        "overhead": float(np.median(ratios) - 1),
        "overhead_interval_95": [float(low - 1), float(high - 1)],
        "overhead_quartiles": [float(value - 1) for value in quartiles],
        "overhead_of_sums": float(seconds[:, 1].sum() / seconds[:, 0].sum() - 1),
        "untraced_ms": float(np.median(seconds[:, 0]) * 1e3),
        "traced_ms": float(np.median(seconds[:, 1]) * 1e3),
    }


@torch.inference_mode()
def measure(model, case, count, scratch, fields):
    """Both measures of one case; a third of the pairs' steps go into blocks."""
    decoder = Decoder(model)
    recorder = Recorder(model, fields, Path(scratch) / case.replace("+", "-"), case)
    pairs(decoder, recorder, WARM_UP, 1)
    step = pairs(decoder, recorder, count, 1)
    blocks = pairs(decoder, recorder, max(count // BLOCK, 2), BLOCK)
    recorder.close()
    return {"case": case, "step": summary(step), "throughput": summary(blocks)}


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--geometry", default="qwen1.5-moe-a2.7b", help="name in configs/models")
    parser.add_argument("--model", type=Path, help="a checkpoint's directory, not random weights")
    parser.add_argument("--layers", type=int, help="only the first N layers")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--kernel", help="experts implementation: grouped_mm, batched_mm, eager")
    parser.add_argument("--pairs", type=int, default=500)
    parser.add_argument("--cases", default=",".join(CASES), help="separated by commas")
    parser.add_argument("--out", type=Path, required=True, help="directory for overhead.json")
    options = parser.parse_args(argv)
    options.out.mkdir(parents=True, exist_ok=True)
    dtype = getattr(torch, options.dtype)
    transformers.utils.logging.disable_progress_bar()
    if not options.device.startswith("cuda"):
        torch.set_num_threads(1)
    if options.model:
        load = transformers.AutoModelForCausalLM.from_pretrained
        model = load(options.model, dtype=dtype).to(options.device).eval()
    else:
        model = build(options.geometry, options.device, dtype, options.layers)
    if options.kernel:
        model.set_experts_implementation(options.kernel)
    name = options.model.name if options.model else options.geometry
    cuda = options.device.startswith("cuda")
    about = {
        "model": name,
        "layers": model.config.num_hidden_layers,
        "kernel": model.config._experts_implementation,
        "device": torch.cuda.get_device_name() if cuda else "cpu",
        "dtype": options.dtype,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    print(json.dumps(about), flush=True)
    fields = {**describe_model(model, name), "recording": {"generator": "tests.bench"}}
    cases = []
    with tempfile.TemporaryDirectory() as scratch:
        for case in options.cases.split(","):
            cases.append(measure(model, case, options.pairs, scratch, fields))
            print(json.dumps(cases[-1]), flush=True)
    report = json.dumps({**about, "cases": cases}, indent=2)
    (options.out / "overhead.json").write_text(report + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
