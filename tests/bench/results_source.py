"""A trace of docs/policies.md: what model it is timed as, and who is judged."""

from __future__ import annotations

from dataclasses import dataclass

from configs.geometry import Geometry, load_geometry
from sim.inputs import set_aside
from tracer.trace import Trace

PUBLIC = {"olmoe-twin": "olmoe-1b-7b", "qwen2moe-twin": "qwen1.5-moe-a2.7b"}
_MOST_JUDGED, _SHARE_JUDGED = 6, 0.6


@dataclass(frozen=True)
class Source:
    """``judged_count``: None for six requests, or 60 % of fewer; the others are set aside."""

    trace: Trace
    path: str
    judged_count: int | None = None

    @property
    def model(self) -> str:
        return self.trace.manifest.model_id

    @property
    def geometry(self) -> str | None:
        """Model to time; None: the trace's own."""
        return PUBLIC.get(self.model)

    @property
    def timed(self) -> Geometry:
        own = self.trace.manifest.geometry
        return own if self.geometry is None else load_geometry(self.geometry)

    @property
    def batch(self) -> int:
        sampling = self.trace.manifest.recording.sampling
        return int(str(sampling.get("batch_size", 1)))

    @property
    def request_ids(self) -> list[int]:
        return [int(request) for request in self.trace.requests()["request"]]

    @property
    def fit_share(self) -> float:
        """What a sweep is told, so that so many are judged."""
        count = len(self.request_ids)
        wanted = self.judged_count
        if wanted is None:
            wanted = min(_MOST_JUDGED, max(1, round(_SHARE_JUDGED * count)))
        return share_of(count, wanted)

    @property
    def judged(self) -> list[int]:
        fitted = set(set_aside(self.request_ids, self.fit_share))
        return [request for request in self.request_ids if request not in fitted]

    def has(self, column: str) -> bool:
        return column in self.trace.columns()


def share_of(count: int, judged: int) -> float:
    """The fit share at which so many of ``count`` requests are judged."""
    return round((count - judged + 0.3) / count, 4)


def open_source(path: str) -> Source:
    return Source(Trace.open(path), path)
