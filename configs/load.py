"""Named YAML files and files of the user's own, read into pydantic models with one-line errors."""

from __future__ import annotations

import copy
import difflib
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import lru_cache
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any, TypeVar, cast

import yaml
from pydantic import BaseModel, ValidationError

from configs.errors import UserError

PROVENANCE = "provenance"
"""Name of the field that `configs.hardware` makes of the sources, which no file has."""

Model = TypeVar("Model", bound=BaseModel)

_sent: ContextVar[Mapping[str, str]] = ContextVar("_sent", default={})  # noqa: B039, never changed


def names_in(folder: str) -> list[str]:
    """Names of the shipped YAML files of a folder of this package, sorted."""
    files = (resources.files("configs") / folder).iterdir()
    return sorted(f.name.removesuffix(".yaml") for f in files if f.name.endswith(".yaml"))


def find(name_or_path: str | os.PathLike[str], folder: str, what: str) -> Traversable:
    """The shipped file of that name, or the user's file.

    Text with a path separator or a YAML suffix, and any PathLike, is a path.
    Raises UserError for a file that is missing and for a name that is unknown.
    """
    text = os.fspath(name_or_path)
    if text in names_in(folder):
        return resources.files("configs") / folder / f"{text}.yaml"
    if not _is_path(name_or_path):
        raise unknown_name(what, text, names_in(folder), "or give the path of a YAML file")
    if text in _sent.get():
        return cast(Traversable, _SentFile(text, _sent.get()[text]))
    path = Path(text)
    if not path.is_file():
        known = ", ".join(names_in(folder))
        raise UserError(f"{what} file {text!r} is not there; mend the path, or use one of: {known}")
    return path


def user_files(names: Iterable[str], folder: str) -> dict[str, str]:
    """Text of those of `names` that are paths of the user's files, by path, for `sent_files`."""
    paths = sorted(set(names) - set(names_in(folder)))
    return {path: Path(path).read_text(encoding="utf-8") for path in paths}


@contextmanager
def sent_files(texts: Mapping[str, str]) -> Iterator[None]:
    """Within the block these paths have these texts: files of another machine's user."""
    before = _sent.set(texts)
    try:
        yield
    finally:
        _sent.reset(before)


@dataclass(frozen=True)
class _SentFile:
    """What `read_yaml` needs of a file."""

    path: str
    text: str

    def read_text(self, encoding: str) -> str:
        return self.text

    def __str__(self) -> str:
        return self.path


def unknown_name(what: str, name: str, known: Sequence[str], hint: str = "") -> UserError:
    """The error for a name that is not in a list: it lists all names and the closest one."""
    close = difflib.get_close_matches(name.lower(), known, n=1, cutoff=0.4)
    closest = f" did you mean {close[0]!r}?" if close else ""
    tail = f"; {hint}" if hint else ""
    return UserError(f"unknown {what} {name!r};{closest} known: {', '.join(known)}{tail}")


def read_yaml(cls: type[Model], file: Traversable) -> Model:
    """A model validated from a YAML file. Raises UserError naming file, field and value."""
    return validated(cls, _mapping(file), str(file))


def validated(cls: type[Model], data: Any, where: str) -> Model:
    """A model validated from plain data; `where` names its origin in the UserError raised."""
    try:
        return cls.model_validate(data)
    except ValidationError as error:
        raise UserError(f"{where}: {first_problem(error)}") from None


def parse_json(text: str | bytes) -> Any:
    """Plain data from JSON. Raises ValueError for all else, nesting beyond Python's depth too."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def first_problem(error: ValidationError) -> str:
    """One of a validation's problems, in one line with field and value.

    A field that is not known comes first, since its misspelling also makes another one missing.
    """
    problems = error.errors(include_url=False)
    unknown = [p for p in problems if p["type"] == "extra_forbidden"]
    missing = [_field(p["loc"]) for p in problems if p["type"] == "missing"]
    if unknown:
        instead = f" (missing: {', '.join(missing)})" if missing else ""
        return (
            f"field {_field(unknown[0]['loc'])!r} is not known; "
            f"remove it or mend its spelling{instead}"
        )
    problem = problems[0]
    field = _field(problem["loc"])
    text = problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "missing":
        return f"field {field!r} is missing; add it"
    if not field:
        return text
    return f"field {field!r}: {text} (got {_short(problem['input'])})"


def _mapping(file: Traversable) -> dict[str, Any]:
    try:
        data = copy.deepcopy(_parsed(file.read_text(encoding="utf-8")))
    except RecursionError:
        raise UserError(f"{file}: nested too deeply; write lines of 'field: value'") from None
    except (yaml.YAMLError, ValueError) as error:  # ValueError: no text, a number or date too large
        reason = " ".join(str(error).split())
        raise UserError(f"{file}: not valid YAML, mend it: {reason}") from None
    if not isinstance(data, dict):
        raise UserError(f"{file}: holds {data!r:.40}, not lines of the form 'field: value'")
    return data


@lru_cache(maxsize=64)
def _parsed(text: str) -> Any:
    """A sweep reads the same files for each of its points; an edited one has another text."""
    return yaml.load(text, Loader=_UniqueKeyLoader)


class _UniqueKeyLoader(yaml.SafeLoader):
    """YAML lets a later key replace an earlier one without a word; here it is an error.

    So is a whole number of any size.
    """

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue  # the base class refuses it
            if key.value in seen:
                raise yaml.MarkedYAMLError(
                    problem=f"field {key.value!r} is given twice", problem_mark=key.start_mark
                )
            seen.add(key.value)
        return super().construct_mapping(node, deep)

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        number = super().construct_yaml_int(node)
        if number.bit_length() > 63:
            raise yaml.MarkedYAMLError(
                problem="the number is beyond 64 bits", problem_mark=node.start_mark
            )
        return number


_UniqueKeyLoader.add_constructor("tag:yaml.org,2002:int", _UniqueKeyLoader.construct_yaml_int)


def _is_path(name_or_path: str | os.PathLike[str]) -> bool:
    if not isinstance(name_or_path, str):
        return True
    return os.sep in name_or_path or name_or_path.endswith((".yaml", ".yml"))


def _field(location: tuple[int | str, ...]) -> str:
    return ".".join(str(part) for part in location if part != PROVENANCE)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
