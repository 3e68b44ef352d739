"""Prompts for validation: as long as they shall be, each of documents of its own."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("transformers")

from transformers import AutoTokenizer

from tests.bench.validation_prompts import LONGEST, SHORTEST, main


@pytest.fixture
def words(shared: Path) -> list[str]:
    model = str(shared / "models" / "olmoe-twin")
    questions = f"{shared / 'prompts' / 'gsm8k_test.jsonl'}:question"
    return ["--model", model, "--documents", questions, "--seed", "5"]


def prompts_of(path: Path) -> list[str]:
    return [json.loads(line)["text"] for line in path.read_text().splitlines()]


def test_prompts_have_their_lengths_and_documents_of_their_own(
    shared: Path, words: list[str], tmp_path: Path
) -> None:
    out = tmp_path / "prompts.jsonl"
    main([*words, "--lengths", "512,64,8", "--others", "12", "--out", str(out)])
    found = prompts_of(out)
    tokenizer = AutoTokenizer.from_pretrained(shared / "models" / "olmoe-twin")
    lengths = [len(tokenizer(text)["input_ids"]) for text in found]
    assert lengths[:3] == [512, 64, 8]
    assert all(SHORTEST <= length <= LONGEST for length in lengths[3:])
    assert len(set(lengths[3:])) > 6
    with (shared / "prompts" / "gsm8k_test.jsonl").open() as file:
        questions = [json.loads(line)["question"] for line in file]
    used = [
        [index for index, question in enumerate(questions) if part and question.startswith(part)]
        for text in found
        for part in text.split("\n\n")
        if len(part) > 30
    ]
    alone = [index for (index,) in used]
    assert len(alone) == len(set(alone)) >= len(found) - 1  # one of 8 tokens may be short


def test_the_same_seed_gives_the_same_bytes(words: list[str], tmp_path: Path) -> None:
    first, again, other = (tmp_path / f"{name}.jsonl" for name in "abc")
    for path in (first, again):
        main([*words, "--others", "5", "--out", str(path)])
    main([*words[:-1], "6", "--others", "5", "--out", str(other)])
    assert first.read_bytes() == again.read_bytes() != other.read_bytes()


def test_too_few_documents_and_files_that_are_there_end_it(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    short = tmp_path / "short.jsonl"
    short.write_text('{"text": "So few words."}\n')
    out = tmp_path / "out.jsonl"
    few = [*words[:2], "--documents", str(short), "--seed", "1", "--out", str(out)]
    with pytest.raises(SystemExit, match="used up before a prompt has 64 tokens"):
        main([*few, "--lengths", "64"])
    assert not out.exists()
    out.write_text("kept")
    with pytest.raises(SystemExit, match="2"):
        main([*few, "--lengths", "2"])
    assert "name another file" in capsys.readouterr().err
    assert out.read_text() == "kept"
