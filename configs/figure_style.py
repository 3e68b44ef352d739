"""One look for all figures: style, colours, and how they are saved.

Colours are Okabe and Ito's, which the colour-blind tell apart; markers repeat them. The same figure
gives the same bytes.
"""

from __future__ import annotations

import io
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from configs.errors import UserError

DPI = 150
INK, GREY, PALE = "#222222", "#6E6E6E", "#C4C4C4"
BLUE, ORANGE, GREEN = "#0072B2", "#D55E00", "#009E73"
LOOKS = (
    (BLUE, "o"),
    (ORANGE, "s"),
    (GREEN, "^"),
    ("#CC79A7", "D"),
    ("#56B4E9", "v"),
    ("#E69F00", "P"),
)
STYLE: Any = {
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": "#DDDDDD",
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "svg.hashsalt": "moesim",
}


def save_figure(figure: Figure, out_dir: Path, name: str) -> list[Path]:
    """Write NAME.png and NAME.svg, both drawn before either is written; returns the paths.

    A file that is there already is left alone if it is the same, and is a UserError if it is not.
    """
    metadata: dict[str, dict[str, Any]] = {"png": {"Software": None}, "svg": {"Date": None}}
    drawn = {}
    for suffix, facts in metadata.items():
        buffer = io.BytesIO()
        figure.savefig(buffer, format=suffix, dpi=DPI, metadata=facts)
        drawn[out_dir / f"{name}.{suffix}"] = buffer.getvalue()
    _refuse_to_replace(drawn.items())
    out_dir.mkdir(parents=True, exist_ok=True)
    for path, content in drawn.items():
        path.write_bytes(content)
    return list(drawn)


def _refuse_to_replace(drawn: Iterable[tuple[Path, bytes]]) -> None:
    for path, content in drawn:
        if path.exists() and path.read_bytes() != content:
            raise UserError(f"{path}: another figure is there: remove it or name another directory")
