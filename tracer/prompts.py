"""Prompts to record: JSON lines of {"domain": ..., "text": ...}."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TypedDict

from configs.errors import UserError


class Prompt(TypedDict):
    """A text to go on with, and the kind of text it is (code, prose, ...)."""

    domain: str
    text: str


def read_prompts(path: str | Path) -> list[Prompt]:
    """Read a JSON-lines file of prompts; a line that is none is a UserError that names it."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such file; give JSON lines with domain and text")
    lines = path.read_text(encoding="utf-8").split("\n")
    prompts = [_parse(line, f"{path}, line {i}") for i, line in enumerate(lines, 1) if line.strip()]
    if not prompts:
        raise UserError(f"{path}: holds no prompts; give at least one line with domain and text")
    return prompts


def prompts_sha256(prompts: Sequence[Prompt]) -> str:
    """Digest of the prompts as JSON lines: of their file, where that is `json.dumps` a line."""
    lines = (json.dumps(prompt, ensure_ascii=False) + "\n" for prompt in prompts)
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _parse(line: str, where: str) -> Prompt:
    try:
        content = json.loads(line)
    except ValueError as error:
        raise UserError(f"{where}: not valid JSON ({error}); mend the line") from error
    if not isinstance(content, dict):
        raise UserError(f"{where}: {content!r} is no object with domain and text")
    for field in ("domain", "text"):
        if not isinstance(content.get(field), str) or not content[field]:
            raise UserError(f"{where}: {field} {content.get(field)!r} must be a text, not empty")
    return {"domain": content["domain"], "text": content["text"]}
