"""moe-trace's CSV: logs made here as the tool writes them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from configs.errors import UserError
from configs.geometry import load_geometry
from tests.traces import random_ids
from tracer.importers.moe_trace import import_moe_trace
from tracer.trace import DECODE, PREFILL, Trace

MODEL = "deepseek-v2-lite"  # 26 MoE layers, 1 to 26, of 27; 64 experts, top-6
LAYERS, EXPERTS, TOP_K = 26, 64, 6


def routing(rows: int) -> NDArray:
    """Random routing in which neighbours share their first expert, as real ones often do."""
    experts = random_ids(np.random.default_rng(0), (rows, LAYERS), EXPERTS - 1, TOP_K)
    experts[..., 0] = EXPERTS - 1
    return experts


def log(experts: NDArray, passes: list[int], model_layers: range = range(1, 27)) -> list[str]:
    """Lines as the tool writes them: pass, layer, token, rank; the last layer's last token only."""
    lines = []
    ends = np.cumsum(passes)
    for end, size in zip(ends, passes, strict=True):
        part = experts[end - size : end]
        for index, layer in enumerate(model_layers):
            ran = part[-1:] if index == LAYERS - 1 else part
            lines += [f"{layer},{expert}" for expert in ran[:, index].reshape(-1)]
    return lines


def without_stride(experts: NDArray, prompt: int) -> NDArray:
    """A prefill as the tool's first version read it: the first tokens' rankings, flat."""
    read = experts.copy()
    ranking = random_ids(np.random.default_rng(1), (LAYERS, prompt), EXPERTS, EXPERTS)
    flat = ranking.reshape(LAYERS, -1)[:, : prompt * TOP_K]
    read[:prompt] = flat.reshape(LAYERS, prompt, TOP_K).transpose(1, 0, 2)
    return read


def saved(path: Path, lines: list[str]) -> Path:
    path.write_text("".join(f"{line}\n" for line in lines))
    return path


def imported(tmp_path: Path, lines: list[str], **options: Any) -> Trace:
    import_moe_trace(saved(tmp_path / "log.csv", lines), MODEL, tmp_path / "out", **options)
    return Trace.open(tmp_path / "out")


def refuse(tmp_path: Path, lines: list[str], message: str, **options: Any) -> None:
    src = saved(tmp_path / "log.csv", lines)
    with pytest.raises(UserError, match=message) as caught:
        import_moe_trace(src, MODEL, tmp_path / "out", **options)
    assert str(src) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert sorted(tmp_path.iterdir()) == [src]


@pytest.mark.parametrize("header", [[], ["layer,expert"], ["layer,expert\r"]])
def test_a_log_is_one_request(tmp_path: Path, header: list[str]) -> None:
    experts = routing(12)
    end = "\r" if header == ["layer,expert\r"] else ""
    lines = header + [line + end for line in log(experts, [4, 4, 1, 1, 1, 1])]
    trace = imported(tmp_path, lines, prompt_tokens=9)
    arrays = trace.load(trace.columns())
    absent = np.zeros(experts.shape, bool)
    absent[[0, 1, 2, 4, 5, 6], 25] = True
    np.testing.assert_array_equal(arrays["experts"], np.where(absent, -1, experts))
    assert arrays["phase"].tolist() == [PREFILL] * 9 + [DECODE] * 3
    assert arrays["step"].tolist() == [0] * 4 + [1] * 4 + [2, 3, 4, 5]
    assert arrays["position"].tolist() == list(range(12))
    assert (arrays["token_id"] == -1).all()
    assert "weights" not in trace.columns()
    assert trace.requests()[["prompt_tokens", "output_tokens"]].to_numpy().tolist() == [[9, 4]]


def test_a_shorter_last_pass_ends_the_prompt(tmp_path: Path) -> None:
    trace = imported(tmp_path, log(routing(9), [4, 3, 1, 1]))
    assert trace.requests()["prompt_tokens"].tolist() == [7]


@pytest.mark.parametrize("passes", [[5, 1, 1], [4, 4, 1, 1], [1, 1, 1]])
def test_an_uncertain_end_of_the_prompt_must_be_given(tmp_path: Path, passes: list[int]) -> None:
    lines = log(routing(sum(passes)), passes)
    refuse(tmp_path, lines, "where the prompt ends is not certain; give --prompt-tokens")
    wrong = 3 if passes[0] > 1 else 9
    refuse(tmp_path, lines, f"no pass ends after {wrong} tokens", prompt_tokens=wrong)
    (tmp_path / "log.csv").unlink()
    prompt = max(passes[0], sum(size for size in passes if size > 1))
    trace = imported(tmp_path, lines, prompt_tokens=prompt)
    assert trace.requests()["prompt_tokens"].tolist() == [prompt]


def test_a_prompt_does_not_go_on_after_a_short_pass(tmp_path: Path) -> None:
    refuse(tmp_path, log(routing(9), [4, 3, 1, 1]), "but after 7;", prompt_tokens=8)


@pytest.mark.parametrize("prompt", [3, 12])
def test_a_prefill_read_without_strides_is_refused(tmp_path: Path, prompt: int) -> None:
    experts = without_stride(routing(prompt + 3), prompt)
    lines = log(experts, [prompt, 1, 1, 1])
    refuse(tmp_path, lines, "line 1: .*share no expert.*--decode-only", prompt_tokens=prompt)
    trace = imported(tmp_path, lines, prompt_tokens=prompt, decode_only=True)
    arrays = trace.load(["experts", "position", "phase"])
    np.testing.assert_array_equal(arrays["experts"], experts[prompt:])
    assert arrays["position"].tolist() == [prompt, prompt + 1, prompt + 2]
    assert (arrays["phase"] == DECODE).all()
    lengths = trace.requests()[["prompt_tokens", "output_tokens"]].to_numpy().tolist()
    assert lengths == [[prompt, 4]]


def put(index: int, line: str) -> Callable[[list[str]], None]:
    def change(lines: list[str]) -> None:
        lines[index] = line

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (put(30, "2,64"), r"line 31: expert 64 is outside \[0, 64\) of deepseek-v2-lite"),
        (put(30, "2;5"), "line 31: '2;5' is not 'layer,expert'"),
        (put(30, "-1,5"), "line 31: '-1,5' is not"),
        (put(30, "2,5,6"), "line 31: "),
        (put(0, "phase,token,layer,rank,expert"), "line 1: 'phase,token,layer,rank,expert'"),
        (put(24, "2,63"), None),
        (put(25, "2,63"), "line 25: an expert occurs twice in the 6 lines of one token"),
        (put(30, "3,5"), "line 32: layer 2 where layer 4 of deepseek"),
        (put(0, "0,5"), "line 1: layer 0 where layer 1 of deepseek-v2-lite follows"),
        (lambda lines: lines.pop(26), "line 25: layer 2 has 23 lines, expected 24"),
        (lambda lines: lines.pop(), "layer 26 has 5 lines, expected 6"),
        (lambda lines: lines.__delitem__(slice(-6, None)), "ends at layer 25: the file is cut off"),
        (
            lambda lines: lines.extend(log(routing(3), [3])),
            "line 919: a pass of 3 tokens after a shorter one: more than one",
        ),
        (lambda lines: lines.clear(), "holds no accesses"),
        (lambda lines: lines.__setitem__(slice(None), ["layer,expert"]), "holds no accesses"),
    ],
)
def test_logs_that_do_not_fit(
    tmp_path: Path, change: Callable[[list[str]], None], message: str | None
) -> None:
    lines = log(routing(6), [4, 1, 1])
    change(lines)
    if message is None:
        imported(tmp_path, lines, prompt_tokens=4)
    else:
        refuse(tmp_path, lines, message, prompt_tokens=4)


def test_files_that_are_no_log(tmp_path: Path) -> None:
    src = saved(tmp_path / "log.csv", log(routing(6), [4, 1, 1]))
    src.write_bytes(src.read_bytes()[:-1])
    with pytest.raises(UserError, match="line 918: the line has no end: the file is cut off"):
        import_moe_trace(src, MODEL, tmp_path / "out")
    src.write_bytes(b"1,2\n\xff\n")
    with pytest.raises(UserError, match=r"line 2: .* is not 'layer,expert'"):
        import_moe_trace(src, MODEL, tmp_path / "out")
    with pytest.raises(UserError, match="no such file"):
        import_moe_trace(tmp_path / "nowhere", MODEL, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_log_of_prefill_alone_has_nothing_to_decode(tmp_path: Path) -> None:
    lines = log(routing(4), [4])
    refuse(tmp_path, lines, "no decode pass", prompt_tokens=4, decode_only=True)


def test_the_top_k_is_the_models(tmp_path: Path) -> None:
    assert load_geometry(MODEL).top_k == TOP_K
    lines = log(routing(6)[..., :5], [4, 1, 1])
    refuse(tmp_path, lines, "expected 18 for top-6", prompt_tokens=4)


@given(
    data=st.binary(max_size=60) | st.from_regex(r"([0-3],[0-9]{1,2}\r?\n){0,30}").map(str.encode)
)
def test_any_bytes_are_refused_in_one_line(
    tmp_path_factory: pytest.TempPathFactory, data: bytes
) -> None:
    src = tmp_path_factory.mktemp("bytes") / "log.csv"
    src.write_bytes(data)
    with pytest.raises(UserError) as caught:
        import_moe_trace(src, MODEL, src.parent / "out")
    assert "\n" not in str(caught.value)
