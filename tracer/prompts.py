"""Prompts to record: read from text, JSON lines, CSV or a pipe, each with its domain if known.

==============  =====================================================================
.txt            the whole file is one prompt; by lines, each line that is not empty
.jsonl (.gz)    an object a line: its field `text` or `prompt`, another one by `field`
                (`turns.0`: the first of a list), or `messages` (chat)
.csv            its column `text` or `prompt`, another one by `field`
==============  =====================================================================

Objects and rows may have a `domain` (code, prose, ...).
"""

from __future__ import annotations

import csv
import gzip
import hashlib
import io
import json
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NotRequired, TypedDict

from configs.errors import UserError
from configs.load import parse_json

DEFAULT_FIELDS = ("text", "prompt")
FORMATS = (".txt", ".jsonl", ".jsonl.gz", ".csv")


class Prompt(TypedDict):
    """A text to go on with or a chat to answer, and the kind of text it is (code, prose, ...).

    `messages` is a list of {"role": ..., "content": ...}; `text` is empty where it is given.
    """

    domain: str | None
    text: str
    messages: NotRequired[list[dict[str, Any]]]


def read_prompts(
    path: str | Path,
    *,
    field: str | None = None,
    lines: bool = False,
    domain: str | None = None,
    limit: int | None = None,
) -> list[Prompt]:
    """Read a file of prompts, its format by its name; `limit`: the first so many.

    `field`: where the text is, instead of `text` or `prompt`; `lines`: a .txt holds one prompt a
    line; `domain`: of the prompts that have none. A file or entry that does not fit is a UserError
    that names it.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such file; give prompts as {', '.join(FORMATS)}")
    return _first(lambda: _read(path, field, lines), limit, domain, str(path))


def text_prompts(
    data: bytes,
    where: str,
    *,
    lines: bool = False,
    domain: str | None = None,
    limit: int | None = None,
) -> list[Prompt]:
    """Make prompts of a UTF-8 text: one, or one a line, the first `limit` of them.

    `where` names it in the UserError if it is empty or no UTF-8.
    """
    return _first(lambda: _texts(_decode(data, where), lines), limit, domain, where)


def _first(
    read: Callable[[], Iterator[Prompt]], limit: int | None, domain: str | None, where: str
) -> list[Prompt]:
    if limit is not None and limit < 1:
        raise UserError(f"limit {limit}: give 1 or more")
    prompts = [prompt | {"domain": prompt["domain"] or domain} for prompt in islice(read(), limit)]
    if not prompts:
        raise UserError(f"{where}: holds no prompts; give at least one")
    return prompts


def prompts_sha256(prompts: Sequence[Prompt]) -> str:
    """Digest of the prompts as JSON lines: of their file, where that is `json.dumps` a line."""
    lines = (json.dumps(prompt, ensure_ascii=False) + "\n" for prompt in prompts)
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _read(path: Path, field: str | None, lines: bool) -> Iterator[Prompt]:
    kind = next((suffix for suffix in FORMATS if path.name.lower().endswith(suffix)), None)
    if kind is None:
        raise UserError(f"{path}: prompts are {', '.join(FORMATS)}; rename or convert it")
    text = _text(path, zipped=kind.endswith(".gz"))
    if kind == ".txt":
        if field is not None:
            raise UserError(f"{path}: a .txt has no fields; drop --field {field}")
        return _texts(text, lines)
    if lines:
        raise UserError(f"{path}: --lines is for .txt; its entries are prompts already")
    entries = _csv(path, text) if kind == ".csv" else _jsonl(path, text)
    return (_prompt(content, field, where) for where, content in entries)


def _text(path: Path, zipped: bool) -> str:
    try:
        data = gzip.decompress(path.read_bytes()) if zipped else path.read_bytes()
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise UserError(f"{path}: not a whole gzip file ({error}); fetch it again") from error
    return _decode(data, str(path))


def _decode(data: bytes, where: str) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: not UTF-8 ({error}); convert it") from error


def _texts(text: str, lines: bool) -> Iterator[Prompt]:
    for part in text.splitlines() if lines else [text]:
        if part.strip():
            yield {"domain": None, "text": part}


def _jsonl(path: Path, text: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            content = parse_json(line)
        except ValueError as error:
            raise UserError(f"{where}: not valid JSON ({error}); mend the line") from error
        if not isinstance(content, dict):
            raise UserError(f"{where}: {content!r} is no object with a field text or prompt")
        _refuse_half_characters(content, where)
        yield where, content


def _refuse_half_characters(content: Mapping[str, Any], where: str) -> None:
    # JSON may escape one half of a surrogate pair, which no text and no tokenizer can hold.
    try:
        json.dumps(content, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        half = ascii(error.object[error.start])
        raise UserError(f"{where}: {half} is half a character; mend the line") from error


def _csv(path: Path, text: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    # Any length: a field ends with the text.
    csv.field_size_limit(max(len(text), csv.field_size_limit()))
    # Strict: a quote that is never closed must not swallow the prompts after it.
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    try:
        names = reader.fieldnames or []
        if len(set(names)) < len(names):
            raise UserError(f"{path}, line 1: a column is named twice; rename one")
        for row in reader:
            where = f"{path}, line {reader.line_num}"
            if None in row:
                raise UserError(f"{where}: more fields than columns; quote texts with commas")
            yield where, row
    except csv.Error as error:
        where = f"{path}, line {reader.line_num}"
        raise UserError(f"{where}: not valid CSV ({error}); mend the line") from error


def _prompt(content: Mapping[str, Any], field: str | None, where: str) -> Prompt:
    domain = content.get("domain") or None
    if domain is not None and not isinstance(domain, str):
        raise UserError(f"{where}: domain {domain!r} must be a text")
    if field == "":
        raise UserError("--field is empty; name a field")
    if field is None and "messages" in content:
        return {"domain": domain, "text": "", "messages": _messages(content["messages"], where)}
    names = [field] if field else [name for name in DEFAULT_FIELDS if name in content]
    if not names:
        raise UserError(
            f"{where}: no field text or prompt among {', '.join(map(str, content))}; name it by"
            " --field"
        )
    text = _look_up(content, names[0])
    if not isinstance(text, str) or not text:
        raise UserError(f"{where}: {names[0]} {text!r} must be a text, not empty")
    return {"domain": domain, "text": text}


def _look_up(content: Any, field: str) -> Any:
    """The value at a dotted path; None where there is none."""
    for key in field.split("."):
        if isinstance(content, list) and key.isdigit() and int(key) < len(content):
            content = content[int(key)]
        elif isinstance(content, Mapping):
            content = content.get(key)
        else:
            return None
    return content


def _messages(messages: Any, where: str) -> list[dict[str, Any]]:
    fits = isinstance(messages, list) and all(
        isinstance(each, dict) and isinstance(each.get("role"), str) and "content" in each
        for each in messages
    )
    if not fits or not messages:
        raise UserError(f"{where}: messages must be a list of objects with role and content")
    return messages
