import json
import subprocess
import sys
from pathlib import Path

import pytest

from configs.errors import UserError
from tracer.prompts import read_prompts

PROJECT = Path(__file__).resolve().parents[1]


def test_prompts_are_read_as_written(tmp_path):
    prompts = [{"domain": "code", "text": "a\u2028b\n"}, {"domain": "prose", "text": "ü"}]
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps(prompt) + "\n" for prompt in prompts))
    assert read_prompts(path) == prompts


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"domain": "code", "text": "x"}\n{"domain": ', "line 2: not valid JSON"),
        ('["code", "x"]', "line 1: ['code', 'x'] is no object"),
        ('{"text": "x"}', "line 1: domain None must be a text"),
        ('{"domain": "code", "text": 3}', "line 1: text 3 must be a text"),
        ('{"domain": "code", "text": ""}', "line 1: text '' must be a text"),
        ("\n", "holds no prompts"),
    ],
)
def test_bad_prompts_name_file_line_and_value(tmp_path, content, message):
    path = tmp_path / "prompts.jsonl"
    path.write_text(content)
    with pytest.raises(UserError) as error:
        read_prompts(path)
    assert str(path) in str(error.value)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_an_absent_prompt_file_is_named(tmp_path):
    with pytest.raises(UserError, match=r"none\.jsonl: no such file"):
        read_prompts(tmp_path / "none.jsonl")


def test_without_torch_the_recorder_names_the_install_command():
    program = (
        "import runpy, sys; sys.modules['torch'] = None;"
        "runpy.run_module('tracer.record', run_name='__main__')"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=PROJECT
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert "pip install 'moesim[gpu]'" in done.stderr
    assert done.stderr.count("\n") == 1
