"""The command line as a test runs it: in this process."""

from __future__ import annotations

from typing import NamedTuple


class Ran(NamedTuple):
    """How a run of `moesim` ended, and what it printed."""

    code: int
    out: str
    err: str
