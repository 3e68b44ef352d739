"""A small sweep for reports, and a page read as a browser reads it."""

from __future__ import annotations

import json
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pandas as pd
from plotly.offline import get_plotlyjs

from sim import SweepConfig, sweep
from sim.sweeps import PARQUET_FILE, read_results

VALIDATION = Path(__file__).resolve().parents[1] / "validation" / "h200" / "locked-olmoe"
HOSTILE = '<script>window.pwned=1</script><img src=x onerror="window.pwned=1">'
KINDS = {
    "causal": {"resident", "on-demand", "lru", "slru"},
    "lossy": {"hobbit"},
    "what-if": {"accuracy-q"},
    "bound": {"belady", "oracle-prefetch cache=belady"},
}


def swept(out: Path, **changes: Any) -> Path:
    """A finished sweep of all kinds of policies on two machines."""
    fields: dict[str, Any] = {
        "trace": "sample",
        "geometry": "olmoe-1b-7b",
        "hardware": ("laptop-pcie4x8", "h200-pcie5"),
        "expert_budgets": ("25%", "50%"),
        "max_tokens": 60,
        "policies": (
            *("resident", "on-demand", "lru", "slru", "hobbit", "accuracy-q", "belady"),
            {"name": "oracle-prefetch", "set": {"cache": "belady"}},
        ),
        **changes,
    }
    sweep(SweepConfig(**fields), out=out)
    return out


def edited(results: Path, out: Path, change: Any) -> Path:
    """A copy of a results directory whose table went through ``change``."""
    shutil.copytree(results, out)
    frame = change(read_results(out).astype(object))
    pd.DataFrame(frame).infer_objects().to_parquet(out / PARQUET_FILE, index=False)
    return out


def hostile(frame: pd.DataFrame) -> pd.DataFrame:
    """Names that a page must not take for its own, and a point that failed."""
    frame.loc[frame["label"] == "slru", "label"] = f"slru path={HOSTILE}"
    frame["trace.model"] = HOSTILE
    row = frame.index[(frame["label"] == "lru")][0]
    frame.loc[row, ["status", "error"]] = ["failed", f"boom {HOSTILE}"]
    frame.loc[row, [name for name in frame if name.startswith(("tpot_ms", "memory."))]] = None
    return frame


class Page(HTMLParser):
    """Tags with their attributes, and the text outside scripts and styles."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self._hidden = False
        self.source = path.read_text(encoding="utf-8")
        library = f"<script>{get_plotlyjs()}</script>"
        assert self.source.count(library) == 1
        self.feed(self.source.replace(library, "<script></script>"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._hidden = tag in ("script", "style")

    def handle_endtag(self, tag: str) -> None:
        self._hidden = False

    def handle_data(self, data: str) -> None:
        if not self._hidden:
            self.text += data

    def named(self, tag: str) -> list[dict[str, str | None]]:
        """Attributes of every such tag."""
        return [attrs for name, attrs in self.tags if name == tag]

    @property
    def words(self) -> str:
        """The text with single spaces."""
        return " ".join(self.text.split())


def validation_summary() -> Any:
    """What the validation says of itself."""
    return json.loads((VALIDATION / "report.json").read_text())["summary"]
