"""From readings to a hardware profile, its YAML file, and whether it counts as calibrated.

A value that was measured says so: its source begins with :data:`MEASURED`. What was not measured
this time is kept from a base profile; unless that is an earlier calibration of the same profile,
its source then begins with :data:`PROVISIONAL`. A profile is calibrated if every value was
measured, but for `configs.hardware.MODEL_FIELDS`, which come with a model's timings.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

import yaml

from configs.hardware import MODEL_FIELDS, CurvePoint, Hardware
from configs.load import validated
from replay.calibrate.stats import SPREAD, Reading, Unit

MEASURED = "measured: moesim calibrate"
PROVISIONAL = "provisional; "

_SIGNIFICANT = 4
_LONG_NUMBER = re.compile(r"^( *(?:value|spread): )(\d{4,})$", re.MULTILINE)
_PLAIN = ("name", "calibrated")
_LISTS = ("link_curve", "also_measured")
_NESTED = "predictor_ns"

Entry = dict[str, Any]


def update(
    base: Hardware,
    name: str,
    machine: str,
    readings: Sequence[Reading],
    points: Sequence[CurvePoint],
    date: str | None = None,
) -> Hardware:
    """The profile `name`: what was read on `machine`, and the rest from `base`.

    Raises UserError for a value that is out of the profile's bounds.
    """
    same = base.name == name
    data = base.model_dump()
    kept = data if same else _not_ours(data, base.name)
    entries = _entries(kept)
    # Only the same machine's curve and other values stay beside new ones.
    curve = [point.model_dump() for point in points]
    others = {other["name"]: other for other in kept["also_measured"]} if same else {}
    kinds = {point.kind for point in points}
    old_curve = [p for p in kept["link_curve"] if p["kind"] not in kinds] if same else []
    for reading in readings:
        entry = _entry(reading, machine, date)
        if reading.name in entries:
            entries[reading.name] = entry
        else:
            others[reading.name] = {"name": reading.name, **entry, "unit": reading.unit}
    for field, entry in entries.items():
        entries[field] = _marked(entry)
    calibrated = all(
        entry["source"].startswith(MEASURED)
        for field, entry in entries.items()
        if field not in MODEL_FIELDS
    )
    result = {
        "name": name,
        "calibrated": calibrated,
        **{field: entry for field, entry in entries.items() if "." not in field},
        _NESTED: {field.split(".")[1]: e for field, e in entries.items() if "." in field},
        "link_curve": [*old_curve, *curve],
        "also_measured": list(others.values()),
    }
    return validated(Hardware, result, f"calibration of {name}")


def not_measured(hardware: Hardware) -> list[str]:
    """Fields whose values were not measured by a calibration."""
    entries = _entries(hardware.model_dump())
    return [name for name, entry in entries.items() if not entry["source"].startswith(MEASURED)]


def render(hardware: Hardware) -> str:
    """The profile as a YAML file, which `load_hardware` reads back to the same profile."""
    data = hardware.model_dump()
    head = {name: data[name] for name in _PLAIN}
    parts = [f"# Written by moesim calibrate. {_heading(hardware)}\n{_yaml(head)}"]
    parts += [_yaml({n: e}) for n, e in _entries(data).items() if "." not in n]
    parts.append(_yaml({_NESTED: data[_NESTED]}))
    if data["link_curve"]:
        lines = [f"  - {_flow(point)}" for point in data["link_curve"]]
        parts.append("link_curve:\n" + "\n".join(lines) + "\n")
    if data["also_measured"]:
        parts.append(_yaml({"also_measured": list(data["also_measured"])}))
    return "\n".join(parts)


def _heading(hardware: Hardware) -> str:
    missing = not_measured(hardware)
    return f"Not measured: {', '.join(missing)}." if missing else "All values measured."


def _entries(data: Entry) -> dict[str, Entry]:
    """`{value, source, spread}` by field, nested ones with a dot."""
    plain = {*_PLAIN, *_LISTS, _NESTED}
    entries = {name: entry for name, entry in data.items() if name not in plain}
    return entries | {f"{_NESTED}.{name}": entry for name, entry in data[_NESTED].items()}


def _not_ours(data: Entry, base: str) -> Entry:
    """A profile's data whose sources name the profile they come from."""
    marked = {name: _from(entry, base) for name, entry in _entries(data).items()}
    plain = {name: entry for name, entry in marked.items() if "." not in name}
    nested = {name.split(".")[1]: entry for name, entry in marked.items() if "." in name}
    return {**data, **plain, _NESTED: nested}


def _from(entry: Entry, base: str) -> Entry:
    told = entry["source"].removeprefix(PROVISIONAL)
    return {**entry, "source": f"{PROVISIONAL}from {base}; {told}"}


def _marked(entry: Entry) -> Entry:
    source = entry["source"]
    if source.startswith((MEASURED, PROVISIONAL)):
        return entry
    return {**entry, "source": f"{PROVISIONAL}{source}"}


def _entry(reading: Reading, machine: str, date: str | None) -> Entry:
    value = reading.value
    when = f", {date}" if date else ""
    source = f"{MEASURED}, {machine}{when}; {reading.how}"
    if value.repeats < 2:
        return {"value": _rounded(value.value, reading.unit), "source": source}
    return {
        "value": _rounded(value.value, reading.unit),
        "source": f"{source}; spread is {SPREAD} of {value.repeats} repeats",
        "spread": _rounded(value.spread, reading.unit),
    }


def _rounded(value: float, unit: Unit) -> float | int:
    if unit == "fraction":
        return round(value, 4)
    if unit in ("ns", "bytes") or value == 0:
        return round(value)
    digits = _SIGNIFICANT - 1 - math.floor(math.log10(abs(value)))
    return round(round(value, digits))


def _yaml(data: Entry) -> str:
    text = yaml.safe_dump(_plain(data), sort_keys=False, width=96, allow_unicode=True)
    return _LONG_NUMBER.sub(lambda match: f"{match[1]}{int(match[2]):_}", text)


def _plain(value: Any) -> Any:
    """Without what is None; whole numbers as such."""
    if isinstance(value, dict):
        return {key: _plain(each) for key, each in value.items() if each is not None}
    if isinstance(value, list):
        return [_plain(each) for each in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _flow(point: Entry) -> str:
    text = yaml.safe_dump(point, sort_keys=False, default_flow_style=True, width=1000)
    return text.strip()
