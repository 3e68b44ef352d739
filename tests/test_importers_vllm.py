"""vLLM's routed experts: files made here by its documented layouts."""

from __future__ import annotations

import base64
import io
import json
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
from tracer.importers.vllm import import_vllm
from tracer.trace import DECODE, PREFILL, Trace

OLMOE, DEEPSEEK = "olmoe-1b-7b", "deepseek-v2-lite"


def routed(rows: int, model: str = OLMOE, seed: int = 0) -> NDArray:
    geometry = load_geometry(model)
    rng = np.random.default_rng(seed)
    return random_ids(
        rng, (rows, geometry.num_moe_layers), geometry.num_experts, geometry.top_k
    ).astype(np.int16)


def answer(experts: Any, prompt: int = 3, output: int = 5, **more: Any) -> dict[str, Any]:
    """An answer of vllm serve."""
    usage = {"prompt_tokens": prompt, "completion_tokens": output, "total_tokens": prompt + output}
    choice = {"index": 0, "text": "...", "routed_experts": experts, "finish_reason": "length"}
    return {"id": "cmpl-1", "object": "text_completion", "choices": [choice], "usage": usage} | more


def as_base64(array: NDArray) -> str:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return base64.b64encode(buffer.getvalue()).decode()


def imported(tmp_path: Path, src: Path, model: str = OLMOE, **options: Any) -> Trace:
    import_vllm(src, model, tmp_path / "out", **options)
    return Trace.open(tmp_path / "out")


def refuse(src: Path, message: str, model: str = OLMOE, **options: Any) -> None:
    before = sorted(src.parent.iterdir())
    with pytest.raises(UserError, match=message) as caught:
        import_vllm(src, model, src.parent / "out", **options)
    assert str(src) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert sorted(src.parent.iterdir()) == before


def saved(path: Path, content: Any) -> Path:
    if path.suffix == ".npy":
        np.save(path, content)
    elif path.suffix == ".npz":
        np.savez(path, **content)
    else:
        path.write_text(json.dumps(content))
    return path


def test_an_array_and_the_prompts_length(tmp_path: Path) -> None:
    experts = routed(7)
    trace = imported(tmp_path, saved(tmp_path / "a.npy", experts), prompt_tokens=3)
    arrays = trace.load(trace.columns())
    np.testing.assert_array_equal(arrays["experts"], experts)
    assert arrays["phase"].tolist() == [PREFILL] * 3 + [DECODE] * 4
    assert arrays["step"].tolist() == [0, 0, 0, 1, 2, 3, 4]
    assert arrays["row"].tolist() == [0, 1, 2, 0, 0, 0, 0]
    assert arrays["position"].tolist() == list(range(7))
    assert (arrays["token_id"] == -1).all()
    assert "weights" not in trace.columns()
    assert trace.requests()[["prompt_tokens", "output_tokens"]].to_numpy().tolist() == [[3, 5]]
    assert trace.manifest.geometry == load_geometry(OLMOE)


def test_a_directory_is_a_request_each_in_the_order_of_names(tmp_path: Path) -> None:
    src = tmp_path / "answers"
    src.mkdir()
    for seed, name in enumerate(["b.npz", "a.npz"]):
        content = {
            "routed_experts": routed(5 + seed, seed=seed),
            "prompt_token_ids": np.arange(2),
            "token_ids": np.arange(10, 14 + seed),
        }
        saved(src / name, content)
    (src / "notes.txt").write_text("not read")
    trace = imported(tmp_path, src)
    arrays = trace.load(["request", "token_id", "experts", "step"])
    assert arrays["request"].tolist() == [0] * 6 + [1] * 5
    assert arrays["token_id"].tolist() == [0, 1, 10, 11, 12, 13, 0, 1, 10, 11, 12]
    np.testing.assert_array_equal(arrays["experts"][6:], routed(5, seed=0))
    assert arrays["step"].tolist() == [0, 0, 1, 2, 3, 4, 5, 5, 6, 7, 8]
    assert trace.requests()["output_tokens"].tolist() == [5, 4]


def test_a_servers_answers_line_by_line(tmp_path: Path) -> None:
    experts = [routed(7, seed=1), routed(6, seed=2)]
    lines = [
        answer(as_base64(experts[0].astype(np.uint8))),
        answer(as_base64(experts[1]), prompt=6, output=1, prompt_token_ids=[5, 4, 3, 2, 1, 0]),
    ]
    src = tmp_path / "answers.jsonl"
    src.write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    trace = imported(tmp_path, src)
    arrays = trace.load(["experts", "token_id", "phase"])
    np.testing.assert_array_equal(arrays["experts"], np.concatenate(experts))
    assert arrays["token_id"].tolist() == [-1] * 7 + [5, 4, 3, 2, 1, 0]
    lengths = trace.requests()[["prompt_tokens", "output_tokens"]].to_numpy().tolist()
    assert lengths == [[3, 5], [6, 1]]


@pytest.mark.parametrize("generated", [4, 5])
def test_prompt_and_generated_rows_apart(tmp_path: Path, generated: int) -> None:
    """The layout of 0.21; a row of the last generated token is no step and is left out."""
    prompt, output = routed(3, seed=1), routed(generated, seed=2)
    prompt[:2] = -1  # cached
    content = answer(output.tolist(), prompt_routed_experts=prompt.tolist())
    trace = imported(tmp_path, saved(tmp_path / "a.json", content))
    arrays = trace.load(["experts", "position", "phase", "row"])
    np.testing.assert_array_equal(arrays["experts"], np.concatenate([prompt[2:], output[:4]]))
    assert arrays["position"].tolist() == [2, 3, 4, 5, 6]
    assert arrays["phase"].tolist() == [PREFILL] + [DECODE] * 4
    assert trace.requests()[["prompt_tokens", "output_tokens"]].to_numpy().tolist() == [[3, 5]]


def test_dense_layers_are_left_out(tmp_path: Path) -> None:
    """Before 0.21 the array had all decoder layers, zeros in those without experts."""
    moe = routed(4, DEEPSEEK)
    whole = np.zeros((4, 27, 6), np.int32)
    whole[:, 1:] = moe
    trace = imported(tmp_path, saved(tmp_path / "a.npy", whole), DEEPSEEK, prompt_tokens=2)
    np.testing.assert_array_equal(trace.load(["experts"])["experts"], moe)


def test_ids_in_a_dense_layer_are_of_another_model(tmp_path: Path) -> None:
    whole = np.zeros((4, 27, 6), np.int32)
    whole[:, 1:] = routed(4, DEEPSEEK)
    whole[3, 0, 2] = 9
    src = saved(tmp_path / "a.npy", whole)
    refuse(src, "row 3: .*layer that is dense in deepseek-v2-lite", DEEPSEEK, prompt_tokens=2)


def test_a_prompt_in_chunks(tmp_path: Path) -> None:
    src = saved(tmp_path / "a.npy", routed(8))
    trace = imported(tmp_path, src, prompt_tokens=5, prefill_chunk=2)
    arrays = trace.load(["step", "row", "phase"])
    assert arrays["step"].tolist() == [0, 0, 1, 1, 2, 3, 4, 5]
    assert arrays["row"].tolist() == [0, 1, 0, 1, 0, 0, 0, 0]


def test_a_prompt_longer_than_a_step_needs_chunks(tmp_path: Path) -> None:
    experts = np.tile(routed(1), (32_769, 1, 1))
    src = saved(tmp_path / "a.npy", experts)
    refuse(src, "32769 tokens in one prefill step.*give --prefill-chunk", prompt_tokens=32_769)
    trace = imported(tmp_path, src, prompt_tokens=32_769, prefill_chunk=8192)
    assert trace.load(["step"])["step"][-1] == 4


def edit(at: Any, value: int) -> Callable[[NDArray], NDArray]:
    def change(experts: NDArray) -> NDArray:
        experts[at] = value
        return experts

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (edit((5, 3, 1), 64), r"row 5, layer 3, rank 1: .*id 64 is outside \[0, 64\)"),
        (edit((2, 1), 7), "row 2, layer 1: .*expert id 7 occurs twice"),
        (edit((4, 2), -1), r"row 4, layer 2: no expert \(-1\) of a token that ran"),
        (edit((4, 2, 7), -1), r"row 4, layer 2: no expert"),
        (edit((4, 2, 0), -1), "row 4, layer 2, rank 0: experts: a null before"),
        (edit((1, 2, 0), -2), r"id -2 is outside \[0, 64\)"),
        (edit(slice(0, 3), -1), "no token of the prompt has experts"),
        (lambda e: e[:2], "2 rows, but the prompt has 3 tokens: the array is cut off"),
        (lambda e: e[:, :15], r"int16 \[7, 15, 8\], expected integers \[tokens, 16, 8\]"),
        (lambda e: e[:, :, :6], r"\[7, 16, 6\], expected .*top-8"),
        (lambda e: e[0], r"int16 \[16, 8\], expected"),
        (lambda e: e.astype(np.float32), "float32 .*expected integers"),
        (lambda e: e.astype(np.uint64) + 2**63, "no expert's id"),
    ],
)
def test_arrays_that_do_not_fit(
    tmp_path: Path, change: Callable[[NDArray], NDArray], message: str
) -> None:
    refuse(saved(tmp_path / "a.npy", change(routed(7))), message, prompt_tokens=3)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"choices": []}, "0 choices; a request needs one: ask with n=1"),
        ({"error": "busy"}, "no object with 'choices'"),
        (answer(None), "start vllm serve with --enable-return-routed-experts"),
        (answer("A"), "routed_experts is not base64"),
        (answer(as_base64(routed(7))[:80]), "routed_experts: not a readable .npy array"),
        (answer([[[1, 2], [1]]]), "lists of different lengths"),
        (answer(routed(7).tolist(), prompt=0), "prompt_tokens 0 is no number of at least 1"),
        (answer(routed(7).tolist(), output=9), "7 rows, expected 11: 3 tokens of the prompt and 9"),
        (
            answer(routed(7).tolist(), prompt_token_ids=[1, 2]),
            "prompt's length differs: 2 by prompt_token_ids, 3 by the prompt_tokens there",
        ),
        (
            answer(routed(7).tolist(), prompt_token_ids=[1, 50_304, 3]),
            r"token id 50304 at position 1 is outside \[0, 50304\)",
        ),
        (answer(routed(7).tolist(), prompt_token_ids=[[1]]), "prompt_token_ids is int64"),
        (answer(routed(7).tolist(), usage=None), "give --prompt-tokens, or save prompt_token_ids"),
    ],
)
def test_answers_that_do_not_fit(tmp_path: Path, content: Any, message: str) -> None:
    refuse(saved(tmp_path / "a.json", content), message)


def test_a_bad_line_is_named(tmp_path: Path) -> None:
    src = tmp_path / "a.jsonl"
    good = json.dumps(answer(routed(7).tolist()))
    src.write_text(f"{good}\n{good[:-30]}\n")
    refuse(src, "line 2: not valid JSON")
    src.write_text("\n")
    refuse(src, "is empty")


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    src = saved(tmp_path / "a.npy", routed(7))
    refuse(src, "length of the prompt is unknown; give --prompt-tokens")
    src.write_bytes(src.read_bytes()[:-5])
    refuse(src, r"not a readable \.npy array", prompt_tokens=3)
    np.save(src, np.array([{}], object), allow_pickle=True)
    refuse(src, r"not a readable \.npy array.*pickle", prompt_tokens=3)
    archive = saved(tmp_path / "b.npz", {"experts": routed(7)})
    refuse(archive, "no array 'routed_experts', only experts")
    archive.rename(tmp_path / "b.npy")
    refuse(tmp_path / "b.npy", "an archive", prompt_tokens=3)
    refuse(tmp_path / "nowhere.npy", "no such file or directory")
    (tmp_path / "c.csv").write_text("x")
    refuse(tmp_path / "c.csv", "ends in none of")
    (tmp_path / "empty").mkdir()
    refuse(tmp_path / "empty", r"holds no \.npy")


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    src = saved(tmp_path / "a.npy", routed(7))
    out = tmp_path / "out"
    out.mkdir()
    (out / "keep").write_text("mine")
    with pytest.raises(UserError, match="exists and is not empty"):
        import_vllm(src, OLMOE, out, prompt_tokens=3)


@given(data=st.binary(max_size=300))
def test_any_bytes_are_refused_in_one_line(
    tmp_path_factory: pytest.TempPathFactory, data: bytes
) -> None:
    directory = tmp_path_factory.mktemp("bytes")
    for suffix in (".npy", ".npz", ".json", ".jsonl"):
        src = directory / f"a{suffix}"
        src.write_bytes(data)
        with pytest.raises(UserError) as caught:
            import_vllm(src, OLMOE, directory / "out", prompt_tokens=3)
        assert "\n" not in str(caught.value)
