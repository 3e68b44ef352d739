"""Examples in docs and docstrings run, and what they name exists."""

from __future__ import annotations

import doctest
import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize("name", ["sim", "sim.serving", "configs.units"])
def test_docstring_examples(name: str) -> None:
    result = doctest.testmod(importlib.import_module(name))
    assert result.attempted > 0
    assert result.failed == 0


def test_readme_examples() -> None:
    result = doctest.testfile(str(ROOT / "README.md"), module_relative=False)
    assert result.attempted > 0
    assert result.failed == 0


def test_the_policy_of_the_readme_works() -> None:
    """In a process of its own: registering a policy lasts as long as the process."""
    block = re.search(r'```python\n("""First in.*?)```', (ROOT / "README.md").read_text(), re.S)
    assert block is not None
    run = (
        "\nfrom sim import simulate\n"
        "for policy, more in (('fifo', {}), ('next-gate', {'cache': 'fifo'})):\n"
        "    row = simulate('sample', policy=policy, params=more, hardware='t4-pcie3',\n"
        "                   expert_budget='25%', max_tokens=150)\n"
        "    assert row.loc[0, 'decode.hits'] > 0\n"
    )
    code = block.group(1) + run
    ran = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stderr


@pytest.mark.parametrize(
    "path",
    [
        "README.md",
        "docs/decisions.md",
        "docs/contract.md",
        "docs/serving.md",
        "docs/advise.md",
        "docs/report.md",
        "docs/scaling.md",
    ],
)
def test_files_that_the_docs_name_exist(path: str) -> None:
    text = (ROOT / path).read_text(encoding="utf-8")
    links = re.findall(r"\]\(([^)#:]+)\)", text)
    quoted = re.findall(r"`((?:tests|docs|policies|sim|configs|tracer)/[\w./-]+\.\w+)", text)
    for name in {*links, *quoted} - {"policies/your_policy.py"}:
        assert (ROOT / name).exists() or (ROOT / path).parent.joinpath(name).exists(), name
