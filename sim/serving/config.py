"""What is served, and by which rules: everything beside the point that decides a serving run."""

from __future__ import annotations

import os
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from configs.errors import UserError

POISSON, CLOSED = "poisson", "closed"
TRACE, SCALED, EXACT = "trace", "scaled", "exact"
_MOST = 1 << 31
_MOST_MS = 86_400_000.0  # a day


class Service(BaseModel):
    """A serving workload and its scheduler; docs/serving.md says what each means.

    ``arrivals``: ``poisson`` (with ``rate``, requests/s), ``closed`` (with ``users`` and
    ``think_ms``), or a recorded file, whose gaps ``rate_scale`` divides. ``requests``: how many
    (None: all of a file, otherwise as many as the trace has). ``lengths``: of TRACE, SCALED, EXACT.
    ``batch``: most requests at a time. ``context``: tokens of KV cache of one request (None: the
    longest request's); ``kv_tokens``: of all together (None: batch x context). ``prefill_chunk``:
    most prefill rows of a request a step, ``step_tokens``: most rows of a step.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    arrivals: str
    rate: float | None = Field(default=None, gt=0, le=1e9, allow_inf_nan=False)
    rate_scale: float = Field(default=1.0, gt=0, le=1e9, allow_inf_nan=False)
    users: int | None = Field(default=None, ge=1, le=_MOST)
    think_ms: float = Field(default=0.0, ge=0, le=_MOST_MS, allow_inf_nan=False)
    requests: int | None = Field(default=None, ge=1, le=10_000_000)
    lengths: Literal["trace", "scaled", "exact"] = "trace"
    scheduler: Literal["continuous", "static"] = "continuous"
    batch: int = Field(default=8, ge=1, le=65_536)
    context: int | None = Field(default=None, ge=1, le=_MOST)
    kv_tokens: int | None = Field(default=None, ge=1, le=_MOST)
    prefill_chunk: int | None = Field(default=None, ge=1, le=_MOST)
    step_tokens: int | None = Field(default=None, ge=1, le=_MOST)
    mixed: bool = True
    slo_ttft_ms: float | None = Field(default=None, gt=0, le=_MOST_MS, allow_inf_nan=False)
    slo_tpot_ms: float | None = Field(default=None, gt=0, le=_MOST_MS, allow_inf_nan=False)
    arrival_seed: int = Field(default=0, ge=0, le=2**62)

    @field_validator("arrivals", mode="before")
    @classmethod
    def _path_as_text(cls, value: object) -> object:
        return os.fspath(value) if isinstance(value, os.PathLike) else value

    @property
    def recorded(self) -> bool:
        """Whether arrivals come from a file."""
        return self.arrivals not in (POISSON, CLOSED)

    def check(self) -> None:
        """Raise UserError for fields that do not go together."""
        self._check_arrivals()
        if self.lengths != TRACE and not self.recorded:
            raise UserError(
                f"--lengths {self.lengths}: {self.arrivals} arrivals have no lengths of their own; "
                "leave it out, or give --arrivals FILE"
            )
        if self.step_tokens is not None and self.step_tokens < self.batch:
            raise UserError(
                f"--step-tokens {self.step_tokens} is less than --batch {self.batch}: a step must "
                "hold a row of each request"
            )

    def _check_arrivals(self) -> None:
        if self.recorded and self.arrivals.lower() in (POISSON, CLOSED):
            raise UserError(
                f"--arrivals {self.arrivals}: write {self.arrivals.lower()} (other names are files)"
            )
        poisson, closed = self.arrivals == POISSON, self.arrivals == CLOSED
        needed = {
            "--rate": (poisson, self.rate is not None, "requests a second"),
            "--users": (closed, self.users is not None, "how many ask in turn"),
        }
        for option, (wanted, given, what) in needed.items():
            if wanted and not given:
                raise UserError(f"--arrivals {self.arrivals} needs {option}: {what}")
            if given and not wanted:
                raise UserError(
                    f"{option} does not go with --arrivals {self.arrivals}: leave it out"
                )
        if self.think_ms and not closed:
            raise UserError(f"--think-ms does not go with --arrivals {self.arrivals}: leave it out")
        if self.rate_scale != 1 and not self.recorded:
            raise UserError(f"--rate-scale does not go with --arrivals {self.arrivals}")
