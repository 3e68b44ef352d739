"""Examples in docs and docstrings run, and what they name exists."""

from __future__ import annotations

import doctest
import importlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize("name", ["sim", "configs.units"])
def test_docstring_examples(name: str) -> None:
    result = doctest.testmod(importlib.import_module(name))
    assert result.attempted > 0
    assert result.failed == 0


def test_readme_examples() -> None:
    result = doctest.testfile(str(ROOT / "README.md"), module_relative=False)
    assert result.attempted > 0
    assert result.failed == 0


@pytest.mark.parametrize("path", ["README.md", "docs/decisions.md", "docs/contract.md"])
def test_files_that_the_docs_name_exist(path: str) -> None:
    text = (ROOT / path).read_text(encoding="utf-8")
    links = re.findall(r"\]\(([^)#:]+)\)", text)
    quoted = re.findall(r"`((?:tests|docs|policies|sim|configs|tracer)/[\w./-]+\.\w+)", text)
    for name in {*links, *quoted} - {"policies/your_policy.py"}:
        assert (ROOT / name).exists() or (ROOT / path).parent.joinpath(name).exists(), name
