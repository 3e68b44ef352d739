"""Names of policies, what each can do, and how it is built.

A policy registers itself from its own file::

    @register("lru", summary="...", source="...")
    def build(params, data): return Policy(Lru())

Every module in this package is imported by :func:`policies.names`, so a new file is a new policy.
"""

from __future__ import annotations

import difflib
import functools
import importlib
import math
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from policies.core import ORDERS
from policies.errors import PolicyError
from policies.interface import Options, Policy, PolicyData
from policies.slots import SPREADS

Params = Mapping[str, Any]
Builder = Callable[[Params, PolicyData], Policy]


@dataclass(frozen=True)
class Param:
    """One parameter: its type, default, bounds (inclusive) or choices, and a line of help."""

    kind: type
    default: Any
    help: str
    low: float | None = None
    high: float | None = None
    choices: tuple[str, ...] | Callable[[], tuple[str, ...]] = ()

    @property
    def allowed(self) -> tuple[str, ...]:
        """The choices there are by now; empty: any value."""
        return self.choices() if callable(self.choices) else self.choices

    def parse(self, owner: str, name: str, value: object) -> Any:
        """``value`` (text from a command line or a YAML scalar) as this parameter's type."""
        where = f"{owner}: parameter {name}={value}"
        parsed = self._convert(where, value)
        choices = self.allowed
        if choices and parsed not in choices:
            close = difflib.get_close_matches(str(parsed), choices, 1)
            hint = f" (did you mean {close[0]}?)" if close else ""
            raise PolicyError(f"{where} is not one of {', '.join(choices)}{hint}")
        if isinstance(parsed, float) and not math.isfinite(parsed):
            raise PolicyError(f"{where} is not a finite number")
        if self.low is not None and parsed < self.low:
            raise PolicyError(f"{where} is below {self.low}")
        if self.high is not None and parsed > self.high:
            raise PolicyError(f"{where} is above {self.high}")
        return parsed

    def _convert(self, where: str, value: object) -> Any:
        if self.kind is bool:
            words = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
            word = str(value).lower()
            if word not in words:
                raise PolicyError(f"{where} is neither true nor false")
            return words[word]
        if self.kind is str:
            return str(value)
        if isinstance(value, bool):
            raise PolicyError(f"{where} is not a number")
        try:
            return self.kind(_plain_number(str(value)))
        except ValueError:
            wanted = {int: "a whole number", float: "a number"}[self.kind]
            raise PolicyError(f"{where} is not {wanted}") from None


def _plain_number(text: str) -> str:
    """Python also reads `1_0` and the digits of other scripts."""
    if "_" in text or not text.isascii():
        raise ValueError(text)
    return text


#: Options that any policy takes beside its own parameters.
COMMON: dict[str, Param] = {
    "order": Param(
        str, "cached-first", "execution order in an event; id and touch are strict", choices=ORDERS
    ),
    "chunks": Param(int, 1, "pieces an expert is copied in", low=1, high=64),
    "staging_slots": Param(
        int, -1, "slots for experts refused admission; -1: top-k where the cache refuses", low=-1
    ),
    "preempt": Param(bool, True, "at a gate, cancel the layer's queued prefetches that were wrong"),
    "reset": Param(bool, False, "empty the cache at every request"),
    "slots": Param(
        str,
        "even",
        "slots a layer: even, or by what they would have brought on requests set aside",
        choices=SPREADS,
    ),
}


@dataclass(frozen=True)
class PolicyInfo:
    """A registered policy: name, one line, paper, capability flags, parameters, builder."""

    name: str
    summary: str
    source: str
    build: Builder = field(repr=False)
    params: Mapping[str, Param] = field(default_factory=dict)
    #: this policy's own defaults of common options, by name
    defaults: Mapping[str, Any] = field(default_factory=dict)
    lossless: bool = True
    oracle: bool = False
    time_dependent: bool = False
    prefetches: bool = False
    fitted: bool = False
    needs_all: bool = False
    reads_costs: bool = False
    reads_signals: bool = False
    #: predictions follow from the routing alone and are worked out for many steps at once
    in_blocks: bool = False
    columns: Callable[[Params], tuple[str, ...]] = lambda params: ()
    #: dtype of the low-bit copies that mixed precision needs; None: experts have one precision
    low_dtype: Callable[[Params], str | None] = lambda params: None

    @property
    def flags(self) -> str:
        """Capability flags as one word each."""
        words = [
            "lossless" if self.lossless else "lossy",
            "oracle" if self.oracle else "causal",
            "time-dependent" if self.time_dependent or self.prefetches else "exact",
        ]
        words += ["prefetch"] * self.prefetches + ["fitted"] * self.fitted
        return " ".join(words)

    def parts(self, params: Params) -> tuple[PolicyInfo, ...]:
        """The policy itself and, where its parameter ``cache`` names one, the rule beneath."""
        beneath = params.get("cache")
        return (self,) if beneath is None else (self, get(beneath))

    def all_columns(self, params: Params) -> tuple[str, ...]:
        """Columns that the policy and the cache rule beneath read; own parameters, parsed."""
        own = self.columns(params)
        others = [
            part.columns({name: param.default for name, param in part.params.items()})
            for part in self.parts(params)[1:]
        ]
        return tuple(dict.fromkeys(sum(others, own)))

    def learns(self, options: Options) -> bool:
        """Whether requests must be set aside: for the policy, or for its slots a layer."""
        return self.fitted or options.slots != "even"

    def asks_signals(self, params: Params) -> bool:
        """Whether the policy or the cache rule beneath reads signals."""
        return any(part.reads_signals for part in self.parts(params))

    def parse(self, given: Mapping[str, object]) -> tuple[dict[str, Any], Options]:
        """Own parameters (defaults filled in) and the common options among ``given``."""
        known = {**COMMON, **self.params}
        defaults = {name: param.default for name, param in known.items()} | dict(self.defaults)
        values = self.parse_given({**defaults, **given})
        staging = values["staging_slots"]
        options = Options(
            order=values["order"],
            chunks=values["chunks"],
            staging_slots=None if staging < 0 else staging,
            preempt=values["preempt"],
            reset=values["reset"],
            slots=values["slots"],
        )
        return {name: values[name] for name in self.params}, options

    def parse_given(self, given: Mapping[str, object]) -> dict[str, Any]:
        """Only the parameters and common options that are ``given``, parsed."""
        known = {**COMMON, **self.params}
        for name in given:
            if name not in known:
                raise PolicyError(
                    f"{self.name}: parameter '{name}' is unknown{_closest(name, known)}; "
                    f"it takes {', '.join(sorted(known))}"
                )
        return {name: known[name].parse(self.name, name, value) for name, value in given.items()}


_REGISTRY: dict[str, PolicyInfo] = {}


def register(name: str, **traits: Any) -> Callable[[Builder], Builder]:
    """Decorator: the function builds the policy ``name``; ``traits`` as in :class:`PolicyInfo`."""

    def decorate(build: Builder) -> Builder:
        if name in _REGISTRY:
            raise RuntimeError(f"policy {name} is registered twice")
        for option in traits.get("defaults", {}):
            if option not in COMMON:
                raise RuntimeError(f"policy {name}: {option} is no common option")
        _REGISTRY[name] = PolicyInfo(name=name, build=build, **traits)
        return build

    return decorate


@functools.cache
def _load_all() -> None:
    package = importlib.import_module("policies")
    for module in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"policies.{module.name}")


def names() -> list[str]:
    """All policy names, sorted."""
    _load_all()
    return sorted(_REGISTRY)


def get(name: str) -> PolicyInfo:
    """The policy called ``name``; unknown: an error that lists the names and the closest."""
    known = names()
    if name not in _REGISTRY:
        raise PolicyError(
            f"policy '{name}' is unknown{_closest(name, known)}; choose one of {', '.join(known)}"
        )
    return _REGISTRY[name]


def _closest(name: str, known: Mapping[str, object] | list[str]) -> str:
    close = difflib.get_close_matches(name.lower(), list(known), 1, cutoff=0.4)
    return f" (did you mean {close[0]}?)" if close else ""
