"""Who comes when: recorded files, Poisson, or users who ask again once they are answered."""

from __future__ import annotations

import csv
import hashlib
import heapq
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from configs.errors import UserError
from configs.load import parse_json
from sim.serving.config import CLOSED, POISSON, Service

Ints = npt.NDArray[np.int64]

_NS_PER_S, _NS_PER_MS = 10**9, 10**6
_MOST_TOKENS = 1 << 31
_MOST_NS = 1 << 60
_STAMP = re.compile(
    r"(\d{4}-\d\d-\d\d)[ T](\d\d:\d\d:\d\d)(?:\.(\d{1,9}))?(?:Z|\+00:00)?", re.ASCII
)
_WHOLE = re.compile(r"-?\d{1,20}", re.ASCII)
AZURE_FIELDS = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")
MOONCAKE_FIELDS = ("timestamp", "input_length", "output_length")


@dataclass(frozen=True)
class Recorded:
    """Arrivals of a file, in order.

    ``times_ns``: from the first one, int64 [n]; ``prompts``, ``outputs``: tokens, int64 [n];
    ``lines``: where in the file, int64 [n]; ``kind``: azure or mooncake.
    """

    path: Path
    kind: str
    sha256: str
    times_ns: Ints
    prompts: Ints
    outputs: Ints
    lines: Ints

    def where(self, index: int) -> str:
        """File and row of an arrival, for messages."""
        return f"{self.path}, row {self.lines[index]}"


def read_arrivals(path: Path) -> Recorded:
    """An Azure CSV or a Mooncake JSON Lines file, told apart by content.

    Raises UserError, with file, row and value, for fields that are missing or no whole numbers,
    lengths below 1, times that are negative or run back, and files without a request.
    """
    if not path.is_file():
        raise UserError(
            f"--arrivals {path}: neither poisson nor closed, and no such file; give one of them"
        )
    data = path.read_bytes()
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise UserError(f"{path}: is no text; give an Azure CSV or a Mooncake JSONL file") from None
    is_json = text.lstrip()[:1] == "{"
    rows = _mooncake(text, path) if is_json else _azure(text, path)
    found: list[tuple[int, int, int, int]] = []
    for line, time_ns, prompt, output in rows:
        if found and time_ns < found[-1][1]:
            raise UserError(
                f"{path}, row {line}: it arrives {found[-1][1] - time_ns} ns before the row above; "
                "sort the file by time"
            )
        found.append((line, time_ns, prompt, output))
    if not found:
        raise UserError(f"{path}: there is no request in it")
    first = found[0][1]
    if found[-1][1] - first > _MOST_NS:
        raise UserError(
            f"{path}, row {found[-1][0]}: it arrives more than 36 years after the first"
        )
    lines, times, prompts, outputs = zip(*found, strict=True)
    return Recorded(
        path=path,
        kind="mooncake" if is_json else "azure",
        sha256=hashlib.sha256(data).hexdigest(),
        times_ns=np.array([time - first for time in times], np.int64),
        prompts=np.array(prompts, np.int64),
        outputs=np.array(outputs, np.int64),
        lines=np.array(lines, np.int64),
    )


def _azure(text: str, path: Path) -> Iterator[tuple[int, int, int, int]]:
    """(row, ns, prompt tokens, output tokens) of each line; rows as an editor counts them."""
    reader = csv.reader(text.splitlines())
    header = [name.strip() for name in next(_until_damaged(reader, path), [])]
    missing = [name for name in AZURE_FIELDS if name not in header]
    if missing:
        raise UserError(
            f"{path}: the first row has no column {missing[0]}; give an Azure CSV "
            f"({','.join(AZURE_FIELDS)}) or a Mooncake JSONL file ({', '.join(MOONCAKE_FIELDS)})"
        )
    places = [header.index(name) for name in AZURE_FIELDS]
    for fields in _until_damaged(reader, path):
        where = f"{path}, row {reader.line_num}"
        if not fields:
            continue
        if len(fields) <= max(places):
            raise UserError(f"{where}: it has {len(fields)} fields, {max(places) + 1} are needed")
        stamp, prompt, output = (fields[place].strip() for place in places)
        yield (
            reader.line_num,
            _stamp_ns(stamp, where),
            _tokens(prompt, "ContextTokens", where),
            _tokens(output, "GeneratedTokens", where),
        )


def _until_damaged(reader: Any, path: Path) -> Iterator[list[str]]:
    """Rows of a line each: no field of these files has a line's end in it."""
    last = reader.line_num
    try:
        for fields in reader:
            if reader.line_num > last + 1:
                raise csv.Error("a field goes on over lines")
            last = reader.line_num
            yield fields
    except csv.Error as error:
        raise UserError(
            f"{path}, row {last + 1}: no CSV ({error}); is a quote left open?"
        ) from None


def _stamp_ns(text: str, where: str) -> int:
    match = _STAMP.fullmatch(text)
    try:
        if match is None:
            raise ValueError(text)
        seconds = int(np.datetime64(f"{match[1]}T{match[2]}", "s").astype(np.int64))
    except ValueError:
        raise UserError(
            f"{where}: TIMESTAMP {text!r:.60} is no time such as 2023-11-16 18:17:03.9799600"
        ) from None
    return seconds * _NS_PER_S + int((match[3] or "0").ljust(9, "0"))


def _tokens(value: object, field: str, where: str) -> int:
    """A whole number of tokens, at least 1."""
    is_text = isinstance(value, str) and _WHOLE.fullmatch(value) is not None
    if not is_text and (not isinstance(value, int) or isinstance(value, bool)):
        raise UserError(f"{where}: {field} {value!r:.60} is no whole number of tokens")
    tokens = int(str(value))
    if not 1 <= tokens <= _MOST_TOKENS:
        raise UserError(f"{where}: {field} is {tokens}; a request has 1 to {_MOST_TOKENS} tokens")
    return tokens


def _mooncake(text: str, path: Path) -> Iterator[tuple[int, int, int, int]]:
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{path}, row {number}"
        try:
            fields = parse_json(line)
        except ValueError:
            raise UserError(f"{where}: is no JSON object; give one a row") from None
        if not isinstance(fields, dict):
            raise UserError(f"{where}: is no JSON object; give one a row")
        for name in MOONCAKE_FIELDS:
            if name not in fields:
                raise UserError(f"{where}: field {name} is missing; add it")
        yield (
            number,
            _milliseconds_ns(fields["timestamp"], where),
            _tokens(fields["input_length"], "input_length", where),
            _tokens(fields["output_length"], "output_length", where),
        )


def _milliseconds_ns(value: Any, where: str) -> int:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not 0 <= value <= _MOST_NS / _NS_PER_MS:
        raise UserError(
            f"{where}: timestamp {value!r:.60} is no number of milliseconds from 0 on; mend it"
        )
    return round(float(value) * _NS_PER_MS)


def poisson_ns(rate: float, count: int, seed: int) -> Ints:
    """Arrivals of a Poisson process of ``rate`` a second, int64 [count], the first after a gap."""
    gaps = np.random.default_rng(seed).exponential(_NS_PER_S / rate, count)
    times = np.rint(np.cumsum(gaps))
    if times[-1] > _MOST_NS:
        raise UserError(
            f"--rate {rate:g}: {count} requests take more than 36 years to arrive; raise the rate"
        )
    arrivals: Ints = times.astype(np.int64)
    return arrivals


def scaled_ns(times_ns: Ints, rate_scale: float) -> Ints:
    """The same arrivals, ``rate_scale`` times as dense."""
    if rate_scale == 1:
        return times_ns
    with np.errstate(over="ignore"):
        scaled = np.rint(times_ns / rate_scale)
    if scaled[-1] > _MOST_NS:
        raise UserError(
            f"--rate-scale {rate_scale:g}: the last request arrives after more than 36 years"
        )
    arrivals: Ints = scaled.astype(np.int64)
    return arrivals


class Source:
    """Arrivals as they come: :meth:`next_ns` says when the next one is, :meth:`take` takes it."""

    #: ns of the next arrival; None: nobody comes unless somebody is answered
    def next_ns(self) -> int | None:
        raise NotImplementedError

    def take(self) -> int:
        """The next arrival's time."""
        raise NotImplementedError

    def answered(self, now: int) -> None:
        """A request that was taken is finished."""


class Open(Source):
    """Arrivals that wait for nobody."""

    def __init__(self, times_ns: Ints) -> None:
        self._times: list[int] = times_ns.tolist()
        self._taken = 0

    def next_ns(self) -> int | None:
        """None: all have come."""
        return self._times[self._taken] if self._taken < len(self._times) else None

    def take(self) -> int:
        """In order."""
        self._taken += 1
        return self._times[self._taken - 1]


class Closed(Source):
    """``users`` who all ask at 0, and again ``think_ns`` after each answer; ``count`` in all."""

    def __init__(self, users: int, think_ns: int, count: int) -> None:
        self._coming = [0] * min(users, count)
        self._left = count - len(self._coming)
        self._think_ns = think_ns

    def next_ns(self) -> int | None:
        """None: everybody waits, or has asked for the last time."""
        return self._coming[0] if self._coming else None

    def take(self) -> int:
        """The earliest."""
        return heapq.heappop(self._coming)

    def answered(self, now: int) -> None:
        """Its user thinks, then asks again, while there is something to ask."""
        if self._left:
            self._left -= 1
            heapq.heappush(self._coming, now + self._think_ns)


@dataclass(frozen=True)
class Coming:
    """All that is known of a service's arrivals. ``recorded``: None where they are no file's."""

    count: int
    start: Callable[[], Source]
    facts: dict[str, Any]
    recorded: Recorded | None = None


def coming(service: Service, trace_requests: int) -> Coming:
    """The arrivals that a service names. ``trace_requests``: how many where it names no number."""
    if service.arrivals == CLOSED:
        assert service.users is not None
        users, count = service.users, service.requests or trace_requests
        think_ns = round(service.think_ms * _NS_PER_MS)
        closed = {"kind": CLOSED, "users": users, "think_ms": service.think_ms}
        return Coming(count, lambda: Closed(users, think_ns, count), closed)
    if service.arrivals == POISSON:
        assert service.rate is not None
        count = service.requests or trace_requests
        times = poisson_ns(service.rate, count, service.arrival_seed)
        poisson = {"kind": POISSON, "rate_per_s": service.rate, "seed": service.arrival_seed}
        return Coming(count, lambda: Open(times), poisson)
    recorded = read_arrivals(Path(service.arrivals))
    there = len(recorded.times_ns)
    count = service.requests or there
    if count > there:
        raise UserError(f"--requests {count}: {recorded.path} has {there}; give at most as many")
    kept = scaled_ns(recorded.times_ns[:count], service.rate_scale)
    facts = {
        "kind": recorded.kind,
        "file": recorded.path.name,
        "sha256": recorded.sha256,
        "rows": there,
        "rate_scale": service.rate_scale,
    }
    return Coming(count, lambda: Open(kept), facts, recorded)
