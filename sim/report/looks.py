"""One look a policy in all figures of a report, and kinds told apart by line and name.

Choices have Okabe and Ito's colours, solid lines and filled markers; lossy policies the same
colours and dashes; bounds and what-ifs are grey. Markers repeat what colours say.
"""

from __future__ import annotations

import html
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import pandas as pd

from configs.figure_style import GREY, INK, LOOKS
from sim.ranking import labels_by_speed
from sim.selection import BASELINE, RESIDENT

KINDS = ("causal", "lossy", "what-if", "bound")
KIND_NAMES = {"causal": "choice", "lossy": "lossy", "what-if": "what-if", "bound": "bound"}
SYMBOLS = ("circle", "square", "triangle-up", "diamond", "triangle-down", "cross")
_VARIANTS = ("", "-open", "-dot", "-open-dot")
_GREY_SYMBOLS = {
    "what-if": ("pentagon-open", "octagon-open", "star-triangle-up-open"),
    "bound": ("hexagon-open", "star-square-open", "bowtie-open", "hourglass-open"),
}
_GREY_DASHES = ("dash", "dot", "dashdot", "longdash", "longdashdot")
_LABEL_COLUMNS = 20
_LINE_PIXELS, _LEAST_PIXELS = 16, 34


@dataclass(frozen=True)
class Look:
    """How a policy is drawn; ``name`` says its kind where that is not a choice."""

    label: str
    kind: str
    colour: str
    symbol: str
    dash: str

    @property
    def name(self) -> str:
        """The label with its kind."""
        return self.label if self.kind == "causal" else f"{self.kind}: {self.label}"


def looks_of(points: pd.DataFrame) -> list[Look]:
    """A look for every policy of prepared points: kinds in order, the fastest of each first."""
    kinds = points.groupby("label")["kind"].first()
    policies = points.groupby("label")["policy"].first()
    speed = labels_by_speed(points)
    found: list[Look] = []
    coloured = 0
    for kind in KINDS:
        of_kind = [label for label in speed if kinds[label] == kind]
        for number, label in enumerate(of_kind):
            if policies[label] in (BASELINE, RESIDENT):
                symbol = "x-thin-open" if policies[label] == BASELINE else "star"
                found.append(Look(label, kind, INK, symbol, "solid"))
            elif kind in ("causal", "lossy"):
                dash = "solid" if kind == "causal" else "dash"
                variant = _VARIANTS[coloured // len(LOOKS) % len(_VARIANTS)]
                symbol = SYMBOLS[coloured % len(SYMBOLS)] + variant
                found.append(Look(label, kind, LOOKS[coloured % len(LOOKS)][0], symbol, dash))
                coloured += 1
            else:
                symbols = _GREY_SYMBOLS[kind]
                symbol = symbols[number % len(symbols)]
                dash = _GREY_DASHES[number % len(_GREY_DASHES)]
                found.append(Look(label, kind, GREY, symbol, dash))
    return found


def plain(text: object) -> str:
    """Text for the plotting library, which reads some tags: none of the user's is one."""
    return html.escape(str(text), quote=False)


def in_template(text: object) -> str:
    """:func:`plain` text for what the plotting library fills in: nothing of it is a field."""
    return plain(text).replace("%{", "&#37;{")


def wrapped(text: str, columns: int = _LABEL_COLUMNS) -> str:
    """A label on several short lines, for an axis or a legend."""
    return "<br>".join(plain(line) for line in _lines(text, columns)) or "-"


def pitch_of(names: Sequence[str]) -> int:
    """Pixels from one of these names to the next on an axis, so that no two touch."""
    lines = [len(_lines(name, _LABEL_COLUMNS)) for name in names]
    most = max([(one + other) / 2 for one, other in pairwise(lines)], default=1.0)
    return max(_LEAST_PIXELS, round(most * _LINE_PIXELS) + 4)


def _lines(text: str, columns: int) -> list[str]:
    return textwrap.wrap(text, columns, break_on_hyphens=False)
