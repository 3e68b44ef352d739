"""Train a predictor on a trace, keep its weights, add its predictions to a trace, report."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from configs.errors import UserError
from configs.files import refuse_non_empty, write_atomically
from configs.geometry import Geometry
from configs.units import format_bytes
from tracer.manifest import TrainedPredictor, sha256_of
from tracer.predictor.data import RowSource, refuse_without_gate_inputs
from tracer.predictor.evaluate import PHASES, Accuracy, predictions, predictors_of
from tracer.predictor.latency import measure_latency
from tracer.predictor.model import Predictor, PredictorInfo
from tracer.predictor.split import Split, prompt_digests, split_requests
from tracer.predictor.train import (
    TRAINING_BYTES,
    Epoch,
    Recipe,
    default_hidden_units,
    train,
)
from tracer.trace import Trace, append_column, refuse_sample

PREDICTORS_DIR = "predictors"
SUFFIX = ".safetensors"
KINDS = ("promoe",)
_VALIDATION_MEMORY = 0.2


@dataclass(frozen=True)
class Options:
    """What a user chooses; None: the default that depends on model or trace.

    `memory_bytes`: gate inputs held at a time. `weights_only`: leave the trace as it is.
    """

    kind: str = "promoe"
    stride: int = 2
    hidden_units: int | None = None
    epochs: int = 30
    seed: int = 0
    device: str = "auto"
    test_share: float = 0.3
    memory_bytes: int = 8 * 2**30
    out: Path | None = None
    weights_only: bool = False

    def check(self, num_moe_layers: int) -> None:
        """Raise UserError for the first option that is out of bounds."""
        if self.kind not in KINDS:
            raise UserError(f"--kind {self.kind!r} is not known; choose {' or '.join(KINDS)}")
        longest = min(9, num_moe_layers - 1)
        if not 1 <= self.stride <= longest:
            raise UserError(f"--stride {self.stride}: this trace's layers allow 1 to {longest}")
        if self.hidden_units is not None and self.hidden_units < 1:
            raise UserError(f"--hidden-units {self.hidden_units}: give at least 1")
        if self.epochs < 1:
            raise UserError(f"--epochs {self.epochs}: give at least 1")
        if not 0 <= self.seed < 2**63:
            raise UserError(f"--seed {self.seed}: give 0 to 2**63 - 1")
        if not 0 < self.test_share < 1:
            raise UserError(f"--test-share {self.test_share}: give a share between 0 and 1: 0.3")


def train_predictor(
    trace: Trace, options: Options, told: Callable[[Epoch], None] = lambda epoch: None
) -> dict[str, Any]:
    """Train, save weights and report beside each other, add the column; return the report.

    The report's `latency` and `seconds` are measured and differ from run to run; they stand in the
    report's file only, never in the manifest. Raises UserError for options out of bounds, a trace
    without gate inputs, and a column or a file that is there already.
    """
    manifest = trace.manifest
    options.check(manifest.geometry.num_moe_layers)
    refuse_without_gate_inputs(trace)
    device = resolve_device(options.device)
    _refuse_too_wide(manifest.geometry, options, device)
    name = f"{options.kind}_s{options.stride}{SUFFIX}"
    out = options.out or trace.path / PREDICTORS_DIR / name
    _refuse_overwriting(trace, out, options)
    out.parent.mkdir(parents=True, exist_ok=True)
    began = time.perf_counter()
    digests = prompt_digests(trace)
    split = split_requests(digests, _domains(trace), options.test_share, options.seed)
    predictor, trained = _fit(trace, split, digests, options, device, told)
    trained_s = time.perf_counter() - began
    sha256 = predictor.save(out)
    report = _apply(trace, predictor, out, sha256, digests, append=not options.weights_only)
    report |= {
        "training": trained,
        "latency": measure_latency(predictor),
        "seconds": {
            "training": round(trained_s, 3),
            "total": round(time.perf_counter() - began, 3),
        },
    }
    write_atomically(out.with_suffix(".json"), (json.dumps(report, indent=2) + "\n").encode())
    return report


def apply_predictor(trace: Trace, weights: Path, device: str = "auto") -> dict[str, Any]:
    """Add the predictions of trained weights to a trace of the same model; return the report.

    Requests whose prompts trained are told by their token ids, and listed as such. Raises UserError
    for another model's trace, one without gate inputs, and a column that is there already.
    """
    from tracer.predictor import load

    refuse_without_gate_inputs(trace)
    predictor = load(weights, device=resolve_device(device))
    manifest = trace.manifest
    predictor.info.refuse_other(manifest.model_id, manifest.geometry, str(trace.path))
    refuse_sample(trace)
    _refuse_column(trace, predictor.info.column)
    sha256 = sha256_of(weights.read_bytes())
    return _apply(trace, predictor, weights, sha256, prompt_digests(trace), append=True)


def resolve_device(name: str) -> str:
    """`auto` is CUDA where there is a GPU. Raises UserError for cuda without one."""
    if name not in ("auto", "cpu", "cuda"):
        raise UserError(f"--device {name!r} is not known; choose auto, cpu or cuda")
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch finds no CUDA GPU here; choose cpu or auto")
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return name


def _refuse_too_wide(geometry: Geometry, options: Options, device: str) -> None:
    """Raise UserError where weights, gradients and the optimiser's state have no room."""
    units = options.hidden_units or 0
    into, experts = geometry.hidden_size + 1, geometry.num_experts
    parameters = (geometry.num_moe_layers - options.stride) * (into * units + (units + 1) * experts)
    needed, there = TRAINING_BYTES * parameters, _memory_bytes(device)
    if needed > there:
        raise UserError(
            f"--hidden-units {units}: training takes {format_bytes(needed)} for the weights alone, "
            f"and {device} has {format_bytes(there)}: give fewer"
        )


def _memory_bytes(device: str) -> int:
    """Of the device, all of it."""
    if device == "cpu":
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return int(torch.cuda.get_device_properties(device).total_memory)


def _refuse_overwriting(trace: Trace, out: Path, options: Options) -> None:
    column = f"learned_{options.stride}"
    if options.out is None or not options.weights_only:
        refuse_sample(trace)
    if not options.weights_only:
        _refuse_column(trace, column)
    if out.suffix != SUFFIX:
        raise UserError(f"--out {out}: the weights are safetensors; give it that ending")
    if out.exists():
        raise UserError(
            f"{out} exists already: name another --out, or add its predictions with moesim"
            f" apply-predictor --trace {trace.path} --weights {out}"
        )
    report = out.with_suffix(".json")
    if report.exists():
        raise UserError(f"{report} exists already, and the report goes there: name another --out")


def _refuse_column(trace: Trace, column: str) -> None:
    if column in trace.columns():
        raise UserError(
            f"{trace.path}: column {column!r} is there already and is not replaced: choose another"
            " stride, train with --weights-only --out FILE, or start from a copy of the trace"
            " without it"
        )
    refuse_non_empty(trace.path / column)


def _domains(trace: Trace) -> dict[int, str | None]:
    table = trace.requests()
    domains = table["domain"].where(table["domain"].notna(), None)
    return dict(zip(table["request"].tolist(), domains.tolist(), strict=True))


def _fit(
    trace: Trace,
    split: Split,
    digests: dict[int, str],
    options: Options,
    device: str,
    told: Callable[[Epoch], None],
) -> tuple[Predictor, dict[str, Any]]:
    geometry = trace.manifest.geometry
    units = options.hidden_units or default_hidden_units(geometry.hidden_size, geometry.num_experts)
    held_for_validation = int(options.memory_bytes * _VALIDATION_MEMORY)
    rows = RowSource(trace, split.train, options.stride, options.memory_bytes - held_for_validation)
    validation = RowSource(trace, split.validation, options.stride, held_for_validation)
    recipe = Recipe(units, options.epochs, options.seed, device)
    weights, epochs = train(rows, validation, recipe, told)
    info = PredictorInfo(
        kind=options.kind,
        stride=options.stride,
        hidden_units=units,
        seed=options.seed,
        model_id=trace.manifest.model_id,
        num_moe_layers=geometry.num_moe_layers,
        num_experts=geometry.num_experts,
        top_k=geometry.top_k,
        hidden_size=geometry.hidden_size,
        trained_prompts=tuple(
            sorted({digests[request] for request in (*split.train, *split.validation)})
        ),
    )
    trained = {
        "device": device,
        "epochs": epochs,
        "requests": {"train": len(split.train), "validation": len(split.validation)},
        "rows": {"train": rows.rows, "validation": validation.rows},
    }
    return Predictor(info, weights), trained


def _apply(
    trace: Trace,
    predictor: Predictor,
    weights: Path,
    sha256: str,
    digests: dict[int, str],
    *,
    append: bool,
) -> dict[str, Any]:
    info = predictor.info
    prompts = frozenset(info.trained_prompts)
    trained = frozenset(request for request, digest in digests.items() if digest in prompts)
    accuracy = Accuracy(trace.manifest.geometry, info.stride, predictors_of(trace, info.stride))
    column = predictions(trace, predictor, trained, accuracy)

    def entry() -> TrainedPredictor:
        return TrainedPredictor(
            column=info.column,
            kind=info.kind,
            stride=info.stride,
            hidden_units=info.hidden_units,
            seed=info.seed,
            trained_requests=tuple(sorted(trained)),
            heldout_accuracy={
                phase: found for phase in PHASES if (found := accuracy.overall(phase)) is not None
            },
            weights_file=_listed_name(trace.path, weights),
            weights_sha256=sha256,
        )

    if append:
        listed = trace.manifest.predictors
        append_column(
            trace.path, info.column, column, fields=lambda: {"predictors": (*listed, entry())}
        )
    else:
        for _ in column:
            pass
    return _report(predictor, entry(), accuracy, len(digests), append)


def _listed_name(trace_dir: Path, weights: Path) -> str:
    inside, outside = weights.resolve(), trace_dir.resolve()
    if inside.is_relative_to(outside):
        return inside.relative_to(outside).as_posix()
    return weights.name


def _report(
    predictor: Predictor,
    entry: TrainedPredictor,
    accuracy: Accuracy,
    requests: int,
    appended: bool,
) -> dict[str, Any]:
    info = predictor.info
    return {
        "model_id": info.model_id,
        "column": entry.column,
        "appended": appended,
        "kind": entry.kind,
        "stride": entry.stride,
        "seed": entry.seed,
        "hidden_units": entry.hidden_units,
        "parameters_per_layer": info.parameters_per_layer,
        "layers": info.layers,
        "weights_file": entry.weights_file,
        "weights_sha256": entry.weights_sha256,
        "requests": {"trained": len(entry.trained_requests), "all": requests},
        "accuracy": accuracy.report(),
    }
