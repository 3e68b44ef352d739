"""Sizes, rates and expert budgets as text: `4000MiB`, `25GB/s`, `25%`, `8/layer`."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from decimal import ROUND_FLOOR, Decimal
from typing import Literal

from configs.errors import UserError

BYTE_UNITS: dict[str, int] = {
    "B": 1,
    "KiB": 2**10,
    "MiB": 2**20,
    "GiB": 2**30,
    "TiB": 2**40,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
}
"""Bytes per unit; `kB` and the all-lower-case spellings are read too, `Gb` (bits) is not."""

_SPELLINGS = {spelling: n for u, n in BYTE_UNITS.items() for spelling in (u, u.lower())}
_SPELLINGS["kB"] = BYTE_UNITS["KB"]
_SPELLINGS["kiB"] = BYTE_UNITS["KiB"]
_QUANTITY = re.compile(r"([+-]?(?:\d+(?:\.\d*)?|\.\d+))\s*([^\d\s].*)?", re.ASCII)
_BYTES_EXAMPLES = "4000MiB, 8GiB or 12.5GB"
_RATE_EXAMPLES = "25GB/s, 900MB/s or 12.5GiB/s"
_BUDGET_EXAMPLES = "4000MiB, 25% or 8/layer"


def parse_bytes(text: str | int) -> int:
    """Bytes from text with a unit (fractions of a byte are cut off), or from a whole number.

    Raises UserError for zero, negative, non-finite and unitless text, and for unknown units.

    >>> parse_bytes("4000MiB"), parse_bytes("12.5GB"), parse_bytes(4096)
    (4194304000, 12500000000, 4096)
    """
    if isinstance(text, str):
        number, unit = _split(text, "size", _BYTES_EXAMPLES)
        if not unit:
            raise UserError(f"size {text!r} has no unit; give one, such as {_BYTES_EXAMPLES}")
        return _whole_bytes(text, number, unit, "size", _BYTES_EXAMPLES)
    if isinstance(text, bool) or not isinstance(text, int):
        raise UserError(f"size {text!r} is not a whole number of bytes; give {_BYTES_EXAMPLES}")
    if text <= 0:
        raise UserError(f"size {text} must be above zero; give {_BYTES_EXAMPLES}")
    return text


def parse_rate(text: str | float, default_unit: str = "GB/s") -> int:
    """Whole bytes per second from text such as `25GB/s`; a bare number is in `default_unit`.

    Raises UserError for zero, negative and non-finite rates and for unknown units.

    >>> parse_rate("25GB/s"), parse_rate("25"), parse_rate(12.5)
    (25000000000, 25000000000, 12500000000)
    """
    if isinstance(text, bool) or not isinstance(text, str | int | float):
        raise UserError(f"rate {text!r} is not a number; give {_RATE_EXAMPLES}")
    plain = text if isinstance(text, str) else _plain(text)
    number, unit = _split(plain, "rate", _RATE_EXAMPLES)
    unit = unit or default_unit
    if not unit.endswith("/s"):
        raise UserError(f"rate {text!r} is not per second; give {_RATE_EXAMPLES}")
    return _whole_bytes(plain, number, unit.removesuffix("/s"), "rate", _RATE_EXAMPLES)


def format_bytes(n: int) -> str:
    """A byte count for people, in binary units.

    >>> format_bytes(4194304000), format_bytes(512)
    ('3.91 GiB', '512 B')
    """
    if abs(n) < 1024:
        return f"{n} B"
    for unit in ("KiB", "MiB", "GiB"):
        shown = f"{n / BYTE_UNITS[unit]:.2f}"
        if abs(float(shown)) < 1024:
            return f"{shown} {unit}"
    return f"{n / BYTE_UNITS['TiB']:.2f} TiB"


@dataclass(frozen=True)
class ExpertBudget:
    """GPU memory for expert slots: bytes, a fraction of all expert bytes, or slots a layer.

    `value` is whole bytes, a fraction in (0, 1], or a whole number of slots. `str()` gives the
    canonical text, which `parse_expert_budget` reads back to an equal budget.
    Raises UserError for a value outside its range.
    """

    kind: Literal["bytes", "fraction", "per_layer"]
    value: float | int

    def __post_init__(self) -> None:
        if self.kind not in ("bytes", "fraction", "per_layer"):
            raise UserError(f"expert budget kind {self.kind!r}: give bytes, fraction or per_layer")
        if not math.isfinite(self.value) or self.value <= 0:
            raise UserError(f"expert budget {self.value} must be above zero: {_BUDGET_EXAMPLES}")
        if self.kind == "fraction" and self.value > 1:
            raise UserError(f"expert budget {self} is over 100% of the expert bytes; give 100%")
        if self.kind != "fraction" and not isinstance(self.value, int):
            raise UserError(f"expert budget {self.value} must be whole, as in {_BUDGET_EXAMPLES}")

    def __str__(self) -> str:
        if self.kind == "bytes":
            return _shortest_bytes(int(self.value))
        if self.kind == "fraction":
            return f"{(Decimal(repr(float(self.value))) * 100).normalize():f}%"
        return f"{self.value}/layer"


def parse_expert_budget(text: str | ExpertBudget) -> ExpertBudget:
    """The budget that `4000MiB`, `25%` (of all expert bytes) or `8/layer` names.

    Raises UserError for zero, negative and non-finite values, a share over 100 %, a part of a
    slot, and unknown units.

    >>> str(parse_expert_budget("4000MiB")), parse_expert_budget("25%").value
    ('4000MiB', 0.25)
    """
    if isinstance(text, ExpertBudget):
        return text
    number, unit = _split(str(text), "expert budget", _BUDGET_EXAMPLES)
    if not unit:
        raise UserError(f"expert budget {text!r} has no unit; give {_BUDGET_EXAMPLES}")
    if unit == "%":
        return _fraction_budget(text, number)
    if unit.replace(" ", "") == "/layer":
        return _per_layer_budget(text, number)
    return ExpertBudget(
        "bytes", _whole_bytes(text, number, unit, "expert budget", _BUDGET_EXAMPLES)
    )


def _fraction_budget(text: str, percent: Decimal) -> ExpertBudget:
    fraction = float(percent / 100)
    if not 0 < fraction <= 1:
        raise UserError(f"expert budget {text!r} must be above 0% and at most 100%")
    return ExpertBudget("fraction", fraction)


def _per_layer_budget(text: str, slots: Decimal) -> ExpertBudget:
    if slots != slots.to_integral_value() or slots <= 0:
        raise UserError(f"expert budget {text!r} must be a whole number of slots, such as 8/layer")
    return ExpertBudget("per_layer", int(slots))


def _split(text: str, what: str, examples: str) -> tuple[Decimal, str]:
    """Number and unit ("" where there is none) of a quantity."""
    match = _QUANTITY.fullmatch(text.strip())
    if not match:
        raise UserError(f"{what} {text!r} is not a number with a unit; give {examples}")
    return Decimal(match.group(1)), (match.group(2) or "").strip()


def _whole_bytes(text: str, number: Decimal, unit: str, what: str, examples: str) -> int:
    if unit not in _SPELLINGS:
        units = ", ".join(BYTE_UNITS)
        raise UserError(f"{what} {text!r}: unknown unit {unit!r} (known: {units}); give {examples}")
    value = int((number * _SPELLINGS[unit]).to_integral_value(ROUND_FLOOR))
    if value <= 0:
        raise UserError(f"{what} {text!r} must be above zero; give {examples}")
    return value


def _plain(number: float) -> str:
    if not math.isfinite(number):
        return str(number)
    return f"{Decimal(repr(number)):f}"


def _shortest_bytes(n: int) -> str:
    texts = [f"{n // size}{unit}" for unit, size in BYTE_UNITS.items() if n % size == 0]
    return min(texts, key=len)
