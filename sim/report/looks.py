"""One look a policy in all figures of a report, and kinds told apart by line and name.

Choices have Okabe and Ito's colours, solid lines and filled markers; lossy policies the same
colours and dashes; bounds and what-ifs are grey. Markers repeat what colours say.
"""

from __future__ import annotations

import html
import textwrap
from dataclasses import dataclass

import pandas as pd

from configs.figure_style import GREY, INK, LOOKS
from sim.ranking import labels_by_speed
from sim.selection import BASELINE, RESIDENT

KINDS = ("causal", "lossy", "what-if", "bound")
KIND_NAMES = {"causal": "choice", "lossy": "lossy", "what-if": "what-if", "bound": "bound"}
_SYMBOLS = ("circle", "square", "triangle-up", "diamond", "triangle-down", "cross")
_VARIANTS = ("", "-open", "-dot", "-open-dot")
_GREY_SYMBOLS = (
    "hexagon-open",
    "star-square-open",
    "bowtie-open",
    "hourglass-open",
    "pentagon-open",
)
_GREY_DASHES = ("dash", "dot", "dashdot", "longdash", "longdashdot")
_LABEL_COLUMNS = 20


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
                symbol = _SYMBOLS[coloured % len(_SYMBOLS)] + variant
                found.append(Look(label, kind, LOOKS[coloured % len(LOOKS)][0], symbol, dash))
                coloured += 1
            else:
                place = number + (len(_GREY_SYMBOLS) // 2 if kind == "what-if" else 0)
                symbol = _GREY_SYMBOLS[place % len(_GREY_SYMBOLS)]
                dash = _GREY_DASHES[place % len(_GREY_DASHES)]
                found.append(Look(label, kind, GREY, symbol, dash))
    return found


def plain(text: object) -> str:
    """Text for the plotting library, which reads some tags: none of the user's is one."""
    return html.escape(str(text), quote=False)


def wrapped(text: str) -> str:
    """A label on several short lines, for an axis."""
    return "<br>".join(plain(line) for line in textwrap.wrap(text, _LABEL_COLUMNS)) or "-"
