"""One point's result as a flat row of a table."""

from __future__ import annotations

import json
import sys
import traceback
from typing import Any

import policies
from configs.errors import UserError
from policies.errors import PolicyError
from sim.point import Point, PointRunner, produced_by

Row = dict[str, Any]


def run_row(runner: PointRunner, name: str, point: Point) -> Row:
    """Run a point, ``name`` its id; an error becomes the row's ``error``."""
    info = policies.get(point.policy)
    head = {
        "point_id": name,
        "status": "ok",
        "error": None,
        "policy": point.policy,
        "label": point.label,
        "oracle": info.oracle,
        "lossless": info.lossless,
        "prefetches": info.prefetches,
        "time_dependent": info.time_dependent or info.prefetches,
        "fitted": info.fitted or point.params.get("slots", "even") != "even",
        **{f"point.{name}": cell(value) for name, value in point.model_dump().items()},
        "trace.digest": runner.inputs.trace.digest,
        **made_by(),
    }
    try:
        result = runner.run(point)
    except (UserError, PolicyError) as error:
        return {**head, "status": "failed", "error": str(error)}
    except Exception as error:  # a fault of ours must not stop the other points; it stays visible
        traceback.print_exc(file=sys.stderr)
        return {**head, "status": "failed", "error": f"internal error: {error!r}"}
    del result["point"]
    return {**head, **flatten(result)}


def made_by() -> Row:
    """Version and commit, as a row has them."""
    return {f"produced_by.{name}": value for name, value in produced_by().items()}


def flatten(nested: dict[str, Any], prefix: str = "") -> Row:
    """Nested dicts as one, keys joined by dots; empty dicts and lists become JSON text."""
    flat: Row = {}
    for name, value in nested.items():
        key = f"{prefix}{name}"
        if isinstance(value, dict) and name != "params":
            flat.update(flatten(value, f"{key}."))
        else:
            flat[key] = cell(value)
    return flat


def cell(value: Any) -> Any:
    """A value that a table can hold."""
    return canonical(value) if isinstance(value, dict | list | tuple) else value


def canonical(value: Any) -> str:
    """JSON text that is the same for equal values."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
