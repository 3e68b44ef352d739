"""`moesim serve` on the command line: what it prints, and wrong input in one line, exit code 2."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from sim.serving.machine import ServingMachine
from tests.traces import make_trace

HEADER = "TIMESTAMP,ContextTokens,GeneratedTokens\n"
GOOD = "2023-11-16 18:17:03.9799600,4,5\n"


@pytest.fixture(scope="module")
def trace_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("serve") / "trace"
    make_trace(path, requests=3, prompt=4, output=6, seed=3, columns=("lookahead_1",))
    return path


@pytest.fixture(scope="module")
def decode_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("serve") / "decode"
    make_trace(path, requests=3, prompt=0, output=6)
    return path


def words(trace: Path, **changes: object) -> list[object]:
    options: dict[str, object] = {
        "trace": trace,
        "hardware": "rtx4090-pcie4",
        "policy": "lru",
        "expert_budget": "50%",
        "arrivals": "closed",
        "users": 2,
        **changes,
    }
    found: list[object] = ["serve"]
    for name, value in options.items():
        if value is not None:
            found += [f"--{name.replace('_', '-')}", value]
    return found


def refused(moesim: Any, command: list[object], *said: str) -> None:
    ran = moesim(*command)
    assert ran.code == 2, ran.err
    assert ran.out == ""
    assert len(ran.err.strip().splitlines()) == 1, ran.err
    assert ran.err.startswith("moesim: error: ")
    for text in said:
        assert text in ran.err


def test_json_is_one_object(moesim: Any, trace_dir: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    ran = moesim(*words(trace_dir, out=out), "--json")
    assert ran.code == 0
    result = json.loads(ran.out)
    assert result == json.loads((out / "result.json").read_text())
    assert result["requests"] == 3
    assert "requests/s" in ran.err
    assert moesim(*words(trace_dir), "--json").out == ran.out


def test_the_table_declares_what_was_made_up(
    moesim: Any,
    trace_dir: Path,
    decode_dir: Path,
    tmp_path: Path,
) -> None:
    path = tmp_path / "a.csv"
    path.write_text(HEADER + GOOD + "2023-11-16 18:17:04,9,20\n" * 4)
    changes = {"arrivals": path, "users": None, "lengths": "scaled", "slo_tpot_ms": 1000}
    ran = moesim(*words(trace_dir, **changes))
    assert ran.code == 0
    for text in (
        "a.csv (azure)",
        "prompts x 0.4444",
        "outputs x 0.35",
        "each used up to 2 times",
        "estimated timing",
        "goodput",
        "queueing",
        "waves/event",
    ):
        assert text in ran.out, text
    (heads,) = re.findall(r"^  ms .*p99$", ran.out, re.MULTILINE)
    for row in re.findall(r"^  (?:queueing|first_decode|e2el) .*", ran.out, re.MULTILINE):
        assert len(row) == len(heads)
    assert "none in this trace" in moesim(*words(decode_dir)).out


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("a.csv", "", "no column TIMESTAMP"),
        ("a.csv", HEADER, "no request"),
        ("a.csv", "TIMESTAMP,ContextTokens\n", "no column GeneratedTokens"),
        ("a.csv", HEADER + GOOD + "2023-11-16 18:17:03,4,5\n", "row 3: it arrives 979960000 ns"),
        ("a.csv", HEADER + "yesterday,4,5\n", "row 2: TIMESTAMP 'yesterday'"),
        ("a.csv", HEADER + "2023-13-16 18:17:03,4,5\n", "row 2: TIMESTAMP '2023-13-16"),
        ("a.csv", HEADER + "2023-11-16 18:17:03,4\n", "row 2: it has 2 fields, 3 are needed"),
        ("a.csv", HEADER + "2023-11-16 18:17:03,0,5\n", "row 2: ContextTokens is 0"),
        ("a.csv", HEADER + "2023-11-16 18:17:03,4,-5\n", "row 2: GeneratedTokens is -5"),
        ("a.csv", HEADER + "2023-11-16 18:17:03,4,5.5\n", "GeneratedTokens '5.5' is no whole"),
        ("a.csv", HEADER + "2023-11-16 18:17:03,4,1" + "0" * 18 + "\n", "1 to 2147483648 tokens"),
        ("a.csv", HEADER + '"2023-11-16 18:17:03,4,5\n' + GOOD * 5000, "row 2: no CSV"),
        ("a.csv", HEADER + GOOD + '"2023-11-16 18:17:03,4,5\n' + GOOD, "row 3: no CSV"),
        ("m.jsonl", '{"timestamp": -1, "input_length": 1, "output_length": 1}', "timestamp -1"),
        ("m.jsonl", '{"timestamp": NaN, "input_length": 1, "output_length": 1}', "timestamp nan"),
        ("m.jsonl", '{"timestamp": "0", "input_length": 1, "output_length": 1}', "timestamp '0'"),
        ("m.jsonl", '{"timestamp": 0, "input_length": 1}', "row 1: field output_length is missing"),
        ("m.jsonl", '{"timestamp": 0, "input_length": true, "output_length": 1}', "input_length"),
        ("m.jsonl", '{"timestamp": 0, "input_length": 1, "output_length": 0}', "is 0; a request"),
        ("m.jsonl", '{"timestamp": 0,', "row 1: is no JSON object"),
        (
            "m.jsonl",
            '{"timestamp": 5, "input_length": 1, "output_length": 1}\n'
            '{"timestamp": 4, "input_length": 1, "output_length": 1}',
            "row 2: it arrives 1000000 ns before the row above",
        ),
    ],
)
def test_a_bad_file_is_one_line_with_row_and_value(
    moesim: Any,
    trace_dir: Path,
    tmp_path: Path,
    name: str,
    text: str,
    said: str,
) -> None:
    path = tmp_path / name
    path.write_text(text)
    refused(moesim, words(trace_dir, arrivals=path, users=None), name, said)


def test_a_file_that_is_no_text(moesim: Any, trace_dir: Path, tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(b"\xff\xfe\x00\x81")
    refused(moesim, words(trace_dir, arrivals=path, users=None), "a.csv: is no text")
    refused(moesim, words(trace_dir, arrivals=tmp_path, users=None), "no such file")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"arrivals": "possion", "users": None}, "possion: neither poisson nor closed"),
        ({"users": None}, "needs --users"),
        ({"users": 0}, "--users 0"),
        ({"arrivals": "poisson", "users": None}, "needs --rate"),
        ({"arrivals": "poisson", "users": None, "rate": 0}, "--rate 0"),
        ({"arrivals": "poisson", "users": None, "rate": -1}, "--rate -1"),
        ({"arrivals": "poisson", "users": None, "rate": "nan"}, "--rate nan"),
        ({"arrivals": "poisson", "users": None, "rate": 1e-9}, "36 years"),
        ({"arrivals": "poisson", "rate": 1}, "--users does not go with --arrivals poisson"),
        ({"rate": 1}, "--rate does not go with --arrivals closed"),
        (
            {"arrivals": "poisson", "users": None, "rate": 1, "think_ms": 5},
            "--think-ms does not go",
        ),
        ({"think_ms": -1}, "--think-ms -1"),
        ({"rate_scale": 2}, "--rate-scale does not go"),
        ({"lengths": "scaled"}, "--lengths scaled: closed arrivals have no lengths"),
        ({"lengths": "long"}, "--lengths long"),
        ({"scheduler": "fair"}, "--scheduler fair: input should be 'continuous' or 'static'"),
        ({"batch": 0}, "--batch 0"),
        ({"requests": 0}, "--requests 0"),
        ({"prefill_chunk": 0}, "--prefill-chunk 0"),
        ({"step_tokens": 7}, "--step-tokens 7 is less than --batch 8"),
        ({"slo_ttft_ms": 0}, "--slo-ttft-ms 0"),
        ({"slo_tpot_ms": 0}, "--slo-tpot-ms 0"),
        ({"slo_tpot_ms": -3}, "--slo-tpot-ms -3"),
        ({"context": 9}, "--context 9: request 0 needs 10 tokens of KV cache and can never fit"),
        ({"kv_tokens": 9}, "--kv-tokens 9: request 0 needs 10"),
        ({"policy": "belady"}, "belady knows the steps to come"),
        ({"policy": "oracle-prefetch"}, "formed while time runs"),
        ({"policy": "accuracy-q"}, "moesim simulate --policy accuracy-q"),
        ({"policy": "lur"}, "did you mean lru"),
        ({"expert_budget": None}, "needs a budget"),
        ({"expert_budget": None, "budget": "20KiB", "context": 10_000}, "20KiB is too small"),
        ({"geometry": "mixtral-8x7b"}, "can only drive a model of its own"),
    ],
)
def test_bad_options_are_one_line(
    moesim: Any,
    trace_dir: Path,
    changes: dict[str, object],
    said: str,
) -> None:
    refused(moesim, words(trace_dir, **changes), said)


def test_too_little_memory_says_what_the_kv_pool_takes(moesim: Any, trace_dir: Path) -> None:
    command = words(trace_dir, expert_budget=None, budget="1MiB", context=4096, batch=8)
    refused(moesim, command, "2.00 MiB KV cache")


def test_lengths_beyond_the_trace_name_row_and_value(
    moesim: Any,
    trace_dir: Path,
    tmp_path: Path,
) -> None:
    path = tmp_path / "a.csv"
    path.write_text(HEADER + GOOD + "2023-11-16 18:17:04,4,8\n" * 2)
    command = words(trace_dir, arrivals=path, users=None, lengths="exact")
    refused(moesim, command, "a.csv, row 3: 8 output tokens", "has 7", "2 of 3 requests")
    path.write_text(HEADER + "2023-11-16 18:17:04,5,7\n")
    refused(moesim, command, "a.csv, row 2: 5 prompt tokens", "has 4")
    command = words(trace_dir, arrivals=path, users=None, requests=2)
    refused(moesim, command, "--requests 2", "has 1")


def test_a_request_that_can_never_fit_names_its_row(
    moesim: Any,
    trace_dir: Path,
    tmp_path: Path,
) -> None:
    path = tmp_path / "a.csv"
    path.write_text(HEADER + "2023-11-16 18:17:03,1,2\n2023-11-16 18:17:04,4,5\n")
    command = words(
        trace_dir, arrivals=path, users=None, lengths="exact", kv_tokens=7, context=8, batch=2
    )
    refused(moesim, command, "--kv-tokens 7: request 1", "row 3", "needs 8 tokens")


def test_no_prefills_no_objective_for_the_first_token(moesim: Any, decode_dir: Path) -> None:
    refused(moesim, words(decode_dir, slo_ttft_ms=5), "--slo-ttft-ms 5", "no prefill rows")
    assert moesim(*words(decode_dir, slo_tpot_ms=5)).code == 0


def test_nothing_is_written_over(moesim: Any, trace_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "kept").write_text("mine")
    refused(moesim, words(trace_dir, out=tmp_path), "not empty")
    refused(moesim, words(trace_dir, out=tmp_path / "kept"), "is a file")
    assert (tmp_path / "kept").read_text() == "mine"


def test_a_place_that_cannot_be_made_is_refused_before_the_run(
    monkeypatch: pytest.MonkeyPatch, moesim: Any, trace_dir: Path, tmp_path: Path
) -> None:
    def never(self: object) -> None:
        raise AssertionError("it ran")

    monkeypatch.setattr(ServingMachine, "run", never)
    (tmp_path / "file").touch()
    refused(moesim, words(trace_dir, out=tmp_path / "file" / "new"), "--out", "is no directory")


def test_arrivals_beyond_all_numbers_are_one_line(
    moesim: Any, trace_dir: Path, tmp_path: Path
) -> None:
    path = tmp_path / "a.csv"
    path.write_text(HEADER + GOOD + GOOD.replace("2023", "2024"))
    options = words(trace_dir, arrivals=path, users=None, rate_scale=5e-324)
    refused(moesim, options, "--rate-scale", "36 years")


def test_batches_beyond_the_measured_ones_name_the_option(
    moesim: Any,
    tmp_path: Path,
) -> None:
    from tests.test_timings import a_pass, model_times, written

    file = written(tmp_path, model_times(a_pass(1)))
    command = words(
        Path("sample"), geometry="olmoe-1b-7b", hardware="h200-pcie5", timings=file, batch=3
    )
    refused(moesim, command, "this run has up to 3 together")
