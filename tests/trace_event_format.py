"""The Trace Event Format, written down from its text alone: a JSON schema, and what no schema says.

Source: "Trace Event Format" by the authors of Chrome's trace viewer, which
https://chromium.googlesource.com/catapult/+/HEAD/docs/trace-event-format.md points to
(https://docs.google.com/document/d/1CvAClvFfyA5R-PhYUmn5OOQtYMH4h6I0nSsKchNAySU). Its sections are
named beside the rules. All phases of the text are here, also those that moesim does not write, so
that the check does not follow from what it checks. Perfetto reads the same format and, as the text
asks, refuses spans of one thread that overlap without nesting (https://perfetto.dev/docs/faq).
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from typing import Any, NoReturn

from jsonschema import Draft202012Validator

Event = dict[str, Any]

DURATION, ASYNC, FLOW, OBJECT = ("B", "E"), ("b", "n", "e"), ("s", "t", "f"), ("N", "O", "D")
OLD_ASYNC = ("S", "T", "p", "F")
PHASES = (
    *DURATION,
    *ASYNC,
    *FLOW,
    *OBJECT,
    *OLD_ASYNC,
    *("X", "i", "I", "C", "P", "M", "V", "v", "R", "c", "(", ")"),
)
_WITH_ID = (*ASYNC, *FLOW, *OBJECT, *OLD_ASYNC, "(", ")")
_METADATA = {  # "Metadata Events": name, and the argument that it must have
    "process_name": ("name", "string"),
    "process_labels": ("labels", "string"),
    "process_sort_index": ("sort_index", "number"),
    "thread_name": ("name", "string"),
    "thread_sort_index": ("sort_index", "number"),
}


def _phase(phases: Iterable[str], **rule: Any) -> dict[str, Any]:
    return {"if": {"properties": {"ph": {"enum": [*phases]}}}, "then": rule}


def _metadata(name: str, argument: str, kind: str) -> dict[str, Any]:
    arguments = {"required": [argument], "properties": {argument: {"type": kind}}}
    return {
        "if": {"properties": {"ph": {"const": "M"}, "name": {"const": name}}},
        "then": {"properties": {"args": arguments}},
    }


SCHEMA: dict[str, Any] = {
    "$schema": "https://json-schema.org/draft/2020-12/schema",
    "title": "Trace Event Format, JSON Object Format",
    "type": "object",
    "required": ["traceEvents"],
    "properties": {
        "traceEvents": {"type": "array", "items": {"$ref": "#/$defs/event"}},
        "displayTimeUnit": {"enum": ["ms", "ns"]},
        "systemTraceEvents": {"type": "string"},
        "otherData": {"type": "object"},
        "powerTraceAsString": {"type": "string"},
        "stackFrames": {"type": "object"},
        "samples": {"type": "array"},
        "controllerTraceDataKey": {"type": "string"},
    },
    "$defs": {
        "event": {
            "type": "object",
            "required": ["ph", "pid", "tid"],
            "properties": {
                "ph": {"enum": [*PHASES]},
                "name": {"type": "string"},
                "cat": {"type": "string"},
                "ts": {"type": "number"},
                "tts": {"type": "number"},
                "dur": {"type": "number", "minimum": 0},
                "tdur": {"type": "number", "minimum": 0},
                "pid": {"type": "integer"},
                "tid": {"type": "integer"},
                "args": {"type": "object"},
                "cname": {"type": "string"},
                "id": {"type": ["string", "integer"]},
            },
            "allOf": [
                _phase(sorted({*PHASES} - {"M"}), required=["ts"]),
                _phase(sorted({*PHASES} - {"E"}), required=["name"]),  # "Duration Events"
                _phase(["X"], required=["dur"]),  # "Complete Events"
                _phase(["i", "I"], properties={"s": {"enum": ["g", "p", "t"]}}),
                _phase(
                    ["C"],
                    required=["args"],
                    properties={"args": {"additionalProperties": {"type": "number"}}},
                ),
                _phase(_WITH_ID, anyOf=[{"required": ["id"]}, {"required": ["id2"]}]),
                _phase([*ASYNC, *FLOW], required=["cat"]),
                _phase(["f"], properties={"bp": {"const": "e"}}),  # "Flow Events": binding point
                _phase(
                    ["M"],
                    required=["name", "args"],
                    properties={"name": {"enum": [*_METADATA]}},
                ),
                *(_metadata(name, *wanted) for name, wanted in _METADATA.items()),
            ],
        }
    },
}


def read_strictly(text: str | bytes) -> Any:
    """JSON without what only Python takes for JSON: NaN and infinities."""
    return json.loads(text, parse_constant=_refuse)


def _refuse(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON")


def problems_of(trace: Any) -> list[str]:
    """What in a parsed trace is against the format; a viewer shows all of one that has none."""
    found = [
        f"{'/'.join(map(str, error.absolute_path)) or 'trace'}: {error.message[:200]}"
        for error in Draft202012Validator(SCHEMA).iter_errors(trace)
    ]
    if found:
        return found
    events: list[Event] = trace["traceEvents"]
    return [*_unnamed(events), *_unnested(events), *_unpaired(events), *_loose_flows(events)]


def _track(event: Event) -> tuple[int, int]:
    return event["pid"], event["tid"]


def _unnamed(events: list[Event]) -> Iterator[str]:
    """ "Metadata Events": a process and a thread that show events have a name, and one only."""
    named = Counter(
        (event["name"], event["pid"], event["tid"] if event["name"] == "thread_name" else None)
        for event in events
        if event["ph"] == "M"
    )
    yield from (f"{name} is given {times} times" for name, times in named.items() if times > 1)
    shown = {_track(event) for event in events if event["ph"] != "M"}
    for pid in sorted({pid for pid, _ in shown}):
        if not named["process_name", pid, None]:
            yield f"process {pid} has no name"
    for pid, tid in sorted(shown):
        if not named["thread_name", pid, tid]:
            yield f"thread {tid} of process {pid} has no name"


def _ns(microseconds: float) -> int:
    return round(microseconds * 1000)


def _unnested(events: list[Event]) -> Iterator[str]:
    """ "Duration Events", "Complete Events": on a thread, spans nest; B and E balance."""
    tracks: dict[tuple[int, int], list[tuple[int, int, str]]] = defaultdict(list)
    opened: dict[tuple[int, int], list[Event]] = defaultdict(list)
    for event in events:
        track = _track(event)
        if event["ph"] == "X":
            begin = _ns(event["ts"])
            tracks[track].append((begin, begin + _ns(event["dur"]), event["name"]))
        elif event["ph"] == "B":
            opened[track].append(event)
        elif event["ph"] == "E":
            if not opened[track]:
                yield f"{track}: an E at {event['ts']} ends nothing"
                continue
            begun = opened[track].pop()
            if event["ts"] < begun["ts"]:
                yield f"{track}: {begun['name']} ends before it begins"
            tracks[track].append((_ns(begun["ts"]), _ns(event["ts"]), begun["name"]))
    for track, left in opened.items():
        yield from (f"{track}: {event['name']} does not end" for event in left)
    for track, spans in tracks.items():
        around: list[tuple[int, int, str]] = []
        for span in sorted(spans, key=lambda span: (span[0], -span[1])):
            while around and around[-1][1] <= span[0]:
                around.pop()
            if around and span[1] > around[-1][1]:
                yield f"{track}: {span[2]} at {span[0]} ns overlaps {around[-1][2]}"
            around.append(span)


def _unpaired(events: list[Event]) -> Iterator[str]:
    """ "Async Events", "Flow Events": what begins under an id ends under it, in order of time."""
    for first, step, last in (ASYNC, FLOW):
        open_now: Counter[tuple[Any, ...]] = Counter()
        of_kind = [event for event in events if event["ph"] in (first, step, last)]
        order = {first: 0, step: 1, last: 2}
        for event in sorted(of_kind, key=lambda event: (event["ts"], order[event["ph"]])):
            identity = json.dumps(event.get("id", event.get("id2")), sort_keys=True)
            scope = event["name"] if first == "s" else event.get("scope")
            key = (event["cat"], scope, identity)
            if event["ph"] == first:
                open_now[key] += 1
            elif not open_now[key]:
                yield f"{event['ph']} of {key} begins nowhere"
            elif event["ph"] == last:
                open_now[key] -= 1
        yield from (f"{key} does not end" for key, times in open_now.items() if times)


def _loose_flows(events: list[Event]) -> Iterator[str]:
    """ "Flow Events": each end of an arrow lies in a span of its thread."""
    spans: dict[tuple[int, int], list[tuple[int, int]]] = defaultdict(list)
    for event in events:
        if event["ph"] == "X":
            begin = _ns(event["ts"])
            spans[_track(event)].append((begin, begin + _ns(event["dur"])))
    for event in events:
        if event["ph"] in FLOW:
            at = _ns(event["ts"])
            if not any(begin <= at <= end for begin, end in spans[_track(event)]):
                yield f"{event['ph']} {event['name']} at {event['ts']} lies in no span"
