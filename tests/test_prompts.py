import gzip
import json

import pytest

from configs.errors import UserError
from tracer.prompts import read_prompts, text_prompts


def test_prompts_are_read_as_written(tmp_path):
    prompts = [{"domain": "code", "text": "a\u2028b\n"}, {"domain": "prose", "text": "ü"}]
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps(prompt) + "\n" for prompt in prompts))
    assert read_prompts(path) == prompts


def test_the_format_is_told_by_the_name(tmp_path):
    lines = '{"prompt": "a", "question": "q", "turns": ["x", "y"]}\n\n{"text": "b", "domain": ""}\n'
    (tmp_path / "p.jsonl").write_text(lines)
    (tmp_path / "p.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    (tmp_path / "p.csv").write_text('domain,prompt\ncode,"a\nb"\n,c\n')
    (tmp_path / "p.txt").write_text("one\n\ntwo\n")
    texts = {
        path.name: [(prompt["domain"], prompt["text"]) for prompt in read_prompts(path)]
        for path in tmp_path.iterdir()
    }
    assert texts == {
        "p.jsonl": [(None, "a"), (None, "b")],
        "p.jsonl.gz": [(None, "a"), (None, "b")],
        "p.csv": [("code", "a\nb"), (None, "c")],
        "p.txt": [(None, "one\n\ntwo\n")],
    }
    by_line = read_prompts(tmp_path / "p.txt", lines=True, domain="prose")
    assert by_line == [{"domain": "prose", "text": t} for t in ("one", "two")]
    first = read_prompts(tmp_path / "p.jsonl", field="turns.1", domain="chat", limit=1)
    assert first == [{"domain": "chat", "text": "y"}]
    assert read_prompts(tmp_path / "p.jsonl", field="question", limit=1)[0]["text"] == "q"


def test_messages_are_kept_for_the_template(tmp_path):
    messages = [{"role": "user", "content": "hello"}]
    path = tmp_path / "chat.jsonl"
    path.write_text(json.dumps({"domain": "chat", "messages": messages}) + "\n")
    assert read_prompts(path) == [{"domain": "chat", "text": "", "messages": messages}]


def test_public_prompt_sets_are_read(shared):
    prompts = shared / "prompts"
    assert len(read_prompts(prompts / "HumanEval.jsonl.gz")) == 164
    assert len(read_prompts(prompts / "gsm8k_test.jsonl", field="question", limit=9)) == 9
    assert len(read_prompts(prompts / "mt_bench.jsonl", field="turns.0")) == 80
    assert len({prompt["domain"] for prompt in read_prompts(prompts / "heldout_text.jsonl")}) >= 4


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"domain": "code", "text": "x"}\n{"domain": ', "line 2: not valid JSON"),
        ("[" * 100_000, "line 1: not valid JSON (nested too deeply)"),
        ('["code", "x"]', "line 1: ['code', 'x'] is no object"),
        ('{"domain": 7, "text": "x"}', "line 1: domain 7 must be a text"),
        ('{"domain": "code", "text": 3}', "line 1: text 3 must be a text"),
        ('{"domain": "code", "text": ""}', "line 1: text '' must be a text"),
        ('{"question": "x"}', "line 1: no field text or prompt among question; name it by --field"),
        ('{"messages": []}', "line 1: messages must be a list of objects with role and content"),
        ('{"messages": [{"role": "user"}]}', "line 1: messages must be a list of objects"),
        ('{"text": "x \\ud800"}', r"line 1: '\ud800' is half a character"),
        ('{"text": "x", "domain": "\\udfff"}', r"line 1: '\udfff' is half a character"),
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


@pytest.mark.parametrize(
    ("name", "content", "options", "message"),
    [
        ("p.md", b"x", {}, "prompts are .txt, .jsonl"),
        ("p.txt", b"\xff", {}, "not UTF-8"),
        ("p.txt", b"x", {"field": "text"}, "a .txt has no fields"),
        ("p.jsonl", b'{"text": "x"}', {"lines": True}, "--lines is for .txt"),
        ("p.jsonl", b'{"turns": ["x"]}', {"field": "turns.1"}, "turns.1 None must be a text"),
        ("p.jsonl", b'{"text": "x"}', {"limit": 0}, "limit 0: give 1 or more"),
        ("p.jsonl.gz", b"x", {}, "not a whole gzip file"),
        (
            "p.jsonl.gz",
            gzip.compress(b"x", mtime=0)[:10] + b"\xff" * 9,
            {},
            "not a whole gzip file",
        ),
        ("p.csv", b"question\nx\n", {}, "line 2: no field text or prompt among question"),
        ("p.csv", b'text\n"never closed\nmore\n', {}, "not valid CSV (unexpected end of data)"),
        ("p.csv", b"text\nan answer, cut\n", {}, "line 2: more fields than columns"),
        ("p.csv", b"text,text\na,b\n", {}, "line 1: a column is named twice"),
        ("p.jsonl", b'{"text": "x"}', {"field": ""}, "--field is empty"),
    ],
)
def test_files_that_do_not_fit_are_named(tmp_path, name, content, options, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError) as error:
        read_prompts(tmp_path / name, **options)
    assert message in str(error.value)


def test_a_text_is_one_prompt_or_one_a_line():
    assert text_prompts(b"a\nb\n", "stdin") == [{"domain": None, "text": "a\nb\n"}]
    assert [p["text"] for p in text_prompts(b"a\n\nb", "stdin", lines=True)] == ["a", "b"]
    assert len(text_prompts(b"a\nb\nc", "stdin", lines=True, limit=2)) == 2
    with pytest.raises(UserError, match="stdin: holds no prompts"):
        text_prompts(b" \n", "stdin")
    with pytest.raises(UserError, match="stdin: not UTF-8"):
        text_prompts(b"\xff\xfe", "stdin")
    with pytest.raises(UserError, match="limit -1: give 1 or more"):
        text_prompts(b"a\nb", "stdin", lines=True, limit=-1)


def test_a_csv_field_may_be_long(tmp_path):
    path = tmp_path / "p.csv"
    path.write_text('text\n"' + "word " * 40_000 + '"\n')
    assert len(read_prompts(path)[0]["text"]) == 200_000
