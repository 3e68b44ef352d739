from __future__ import annotations

import io
import tempfile
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from configs.errors import UserError
from tests.traces import make_geometry, make_trace
from tracer.inspect import draw_inspection, inspect_trace, render
from tracer.trace import DECODE, PREFILL, Trace, TraceWriter


def write_steps(path: Path, steps: list[tuple[int, list[int], list[list[int]]]]) -> Trace:
    """Write steps (phase, requests of its rows, expert ids of its rows), the same in all layers."""
    fields = {"model_id": "t", "geometry": make_geometry(), "recording": {"generator": "test"}}
    requests = sorted({request for _, rows, _ in steps for request in rows})
    with TraceWriter(path, fields) as writer:
        for phase, rows, ids in steps:
            writer.write_step(
                request=rows,
                row=np.arange(len(rows)),
                phase=phase,
                position=0,
                token_id=-1,
                experts=np.repeat(np.array(ids)[:, None], 3, axis=1),
            )
        writer.close([{"request": r, "prompt_tokens": 0, "output_tokens": 1} for r in requests])
    return Trace.open(path)


def value(table: pd.DataFrame, quantity: str) -> int:
    return int(table.set_index("quantity")["value"][quantity])


# By hand


def test_counts(tmp_path: Path) -> None:
    steps = [(PREFILL, [4, 4, 4], [[0, 1], [1, 2], [1, 0]]), (DECODE, [4, 9], [[0, 1], [2, 3]])]
    counts = inspect_trace(write_steps(tmp_path / "t", steps))["counts"]
    assert value(counts, "requests") == 2
    assert value(counts, "prefill tokens") == 3
    assert value(counts, "decode tokens") == 2
    assert value(counts, "steps") == 2
    assert value(counts, "accesses (token, layer, rank)") == 5 * 3 * 2
    assert value(counts, "look-ups (step, layer, expert)") == 3 * (3 + 4)


def test_skew(tmp_path: Path) -> None:
    steps = [(DECODE, [0], ids) for ids in ([[0, 1]], [[0, 1]], [[0, 2]], [[0, 3]])]
    summary = inspect_trace(write_steps(tmp_path / "t", steps))
    shares = np.array([4, 2, 1, 1]) / 8
    row = summary["skew"].iloc[0]
    assert row["top_10_share"] == 0.5  # 1 of 8 experts
    assert row["top_25_share"] == 0.75  # 2
    assert row["top_50_share"] == 1.0  # 4
    assert row["entropy"] == pytest.approx(-(shares * np.log(shares)).sum() / np.log(8))
    popularity = summary["popularity"].query("layer == 2")
    assert popularity["accesses"].tolist() == [4, 2, 1, 1, 0, 0, 0, 0]
    assert popularity["share"].sum() == 1


def test_uniform_popularity_has_entropy_one(tmp_path: Path) -> None:
    steps = [(DECODE, [0], [[2 * i, 2 * i + 1]]) for i in range(4)]
    skew = inspect_trace(write_steps(tmp_path / "t", steps))["skew"]
    assert skew["entropy"].tolist() == pytest.approx([1.0] * 3)
    assert skew["top_25_share"].tolist() == [0.25] * 3


def test_overlap_is_within_a_request_and_without_prefill(tmp_path: Path) -> None:
    steps = [
        (PREFILL, [0, 0], [[0, 1], [0, 1]]),
        (DECODE, [0, 1], [[0, 1], [6, 7]]),
        (DECODE, [0, 1], [[1, 2], [6, 7]]),
        (DECODE, [0], [[0, 1]]),
    ]
    overlap = inspect_trace(write_steps(tmp_path / "t", steps))["overlap"].set_index("lag")
    # Request 0 repeats one of two experts twice, request 1 both.
    assert overlap["overlap"][1] == pytest.approx((1 + 1 + 2) / 6)
    assert overlap["overlap"][2] == 1.0
    assert overlap["overlap"].loc[3:].isna().all()
    # Chosen by 2, 3, 1, 2, 2 of the 5 decode tokens.
    assert overlap["chance"][1] == pytest.approx((4 + 9 + 1 + 4 + 4) / 25 / (10 / 5))


def test_reuse_distances(tmp_path: Path) -> None:
    steps = [(DECODE, [0], [ids]) for ids in ([0, 1], [2, 3], [1, 0], [1, 4], [0, 2])]
    summary = inspect_trace(write_steps(tmp_path / "t", steps))
    # New: 0 1 2 3 4. Depth when looked up again: 1 after [2 3] 2, 0 3; 1 after [1 0] 1; then the
    # order is 4 1 0 3 2: 0 has 2 before it, 2 has 4.
    hits = {1: 0, 2: 1, 3: 3, 4: 4, 5: 5, 6: 5, 7: 5, 8: 5}
    found = summary["reuse"].set_index("slots")["hit_share"]
    assert found.to_dict() == pytest.approx({slots: n / 10 for slots, n in hits.items()})
    row = summary["reuse_by_layer"].iloc[1]
    assert row["lookups"] == 10
    assert row["first_share"] == 0.5
    assert row["median"] == np.inf
    assert row["lru_25_share"] == 0.1  # 2 slots


def test_distinct_experts_by_tokens_in_the_step(tmp_path: Path) -> None:
    steps = [
        (PREFILL, [0, 0, 0], [[0, 1], [1, 2], [2, 0]]),
        (DECODE, [0, 1], [[0, 1], [0, 1]]),
        (DECODE, [0, 1], [[0, 1], [2, 3]]),
        (DECODE, [0], [[0, 1]]),
    ]
    distinct = inspect_trace(write_steps(tmp_path / "t", steps))["distinct"]
    rows = distinct[["phase", "tokens", "steps", "distinct"]].to_numpy().tolist()
    assert rows == [["decode", 1, 1, 2.0], ["decode", 2, 2, 3.0], ["prefill", 3, 1, 3.0]]
    assert distinct["uniform"].tolist() == pytest.approx([2.0, 3.5, 8 * (1 - 0.75**3)])


def test_a_step_of_both_phases_is_mixed(tmp_path: Path) -> None:
    fields = {"model_id": "t", "geometry": make_geometry(), "recording": {"generator": "test"}}
    with TraceWriter(tmp_path / "t", fields) as writer:
        writer.write_step(
            request=[0, 1],
            row=[0, 1],
            phase=[PREFILL, DECODE],
            position=0,
            token_id=-1,
            experts=np.tile(np.array([0, 1]), (2, 3, 1)),
        )
        writer.close([{"request": r, "prompt_tokens": 1, "output_tokens": 1} for r in (0, 1)])
    assert inspect_trace(Trace.open(tmp_path / "t"))["distinct"]["phase"].tolist() == ["mixed"]


def test_layers_that_did_not_run_are_left_out(bigmoe_trace: Trace) -> None:
    summary = inspect_trace(bigmoe_trace)
    lookups = summary["reuse_by_layer"]["lookups"]
    decode = 128 * 6
    assert lookups[47] == decode + 6
    prefill = summary["distinct"].set_index("phase")["distinct"]["prefill"]
    assert lookups.sum() - 48 * decode == pytest.approx(48 * prefill)
    assert value(summary["counts"], "accesses (token, layer, rank)") == 44_766


# Against brute force


def brute_force_lru_hits(trace: Trace, slots: int) -> int:
    """Hits of an LRU cache of `slots` experts a layer, by hand: look up a step, then touch it."""
    arrays = trace.load(["step", "experts"])
    hits = 0
    for layer in range(trace.manifest.geometry.num_moe_layers):
        cache: list[int] = []  # least recently used first
        for step in np.unique(arrays["step"]):
            used = arrays["experts"][arrays["step"] == step, layer].reshape(-1).tolist()
            hits += len(set(used) & set(cache))
            for expert in used:
                cache = [other for other in cache if other != expert] + [expert]
            cache = cache[-slots:]
    return hits


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    top_k=st.integers(1, 3),
    experts=st.integers(4, 12),
    batch=st.integers(1, 3),
    prompt=st.integers(0, 3),
)
def test_hit_share_is_that_of_lru(
    seed: int, top_k: int, experts: int, batch: int, prompt: int
) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        trace = make_trace(
            Path(scratch) / "t",
            layers=2,
            experts=experts,
            top_k=top_k,
            requests=4,
            prompt=prompt,
            output=6,
            seed=seed,
            batch=batch,
        )
        summary = inspect_trace(trace)
        largest_step = min(max(prompt, batch) * top_k, experts)
        lookups = value(summary["counts"], "look-ups (step, layer, expert)")
        for slots in range(largest_step, experts + 1):
            share = summary["reuse"]["hit_share"][slots - 1]
            assert share * lookups == pytest.approx(brute_force_lru_hits(trace, slots))


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), experts=st.sampled_from([8, 64, 65, 130]))
def test_overlap_and_distinct_by_brute_force(seed: int, experts: int) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        trace = make_trace(
            Path(scratch) / "t", layers=2, experts=experts, top_k=4, requests=2, seed=seed, batch=2
        )
        arrays = trace.load(["request", "step", "phase", "experts"])
        summary = inspect_trace(trace)
    rows = pd.DataFrame({name: arrays[name] for name in ("request", "step", "phase")})
    decode = rows[rows["phase"] == DECODE]
    common = []
    for _, members in decode.groupby("request"):
        for late, early in zip(members.index[3:], members.index, strict=False):
            for layer in range(2):
                pair = (set(arrays["experts"][row, layer].tolist()) for row in (late, early))
                common.append(len(set.intersection(*pair)) / 4)
    assert summary["overlap"]["overlap"][2] == pytest.approx(np.mean(common))
    sizes = [
        len(np.unique(arrays["experts"][members.index, layer]))
        for _, members in decode.groupby("step")
        for layer in range(2)
    ]
    found = summary["distinct"].query("phase == 'decode'")["distinct"].tolist()
    assert found == pytest.approx([np.mean(sizes)])


def test_real_decoding_reuses_experts(gpt_oss_trace: Trace) -> None:
    summary = inspect_trace(gpt_oss_trace)
    assert round(summary["reuse"]["hit_share"][8 - 1], 2) == 0.65
    overlap = summary["overlap"].set_index("lag")["overlap"]
    assert overlap[1] > overlap[8] > overlap[64] > summary["overlap"]["chance"][0]


# For people


def rendered(trace: Trace) -> str:
    console = Console(file=io.StringIO(), width=100)
    render(console, inspect_trace(trace))
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_render_prints_every_table(tiny_trace: Trace) -> None:
    text = rendered(tiny_trace)
    for title in (
        "Trace",
        "Share of a layer's accesses",
        "A decode token's experts",
        "Reuse distance",
        "Distinct experts a layer and step",
    ):
        assert title in text
    assert "nan" not in text
    assert all(len(line) <= 100 for line in text.splitlines())


def test_render_thins_out_many_step_sizes(tmp_path: Path) -> None:
    steps = [(PREFILL, [0] * n, [[0, 1]] * n) for n in range(1, 30)]
    text = rendered(write_steps(tmp_path / "t", steps))
    assert "8 of 29 step sizes" in text
    sizes = [line.split("│")[2].strip() for line in text.splitlines() if "│ prefill │" in line]
    assert sizes[0] == "1"
    assert sizes[-1] == "29"
    assert len(sizes) == 8


@pytest.mark.parametrize("suffix", [".png", ".svg", ".pdf"])
def test_the_figure_is_reproducible(tiny_trace: Trace, tmp_path: Path, suffix: str) -> None:
    paths = [tmp_path / f"{name}{suffix}" for name in ("a", "b")]
    for path in paths:
        draw_inspection(tiny_trace, path)
    assert paths[0].stat().st_size > 5_000
    assert paths[0].read_bytes() == paths[1].read_bytes()


def test_the_figure_overwrites_nothing(tiny_trace: Trace, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_text("mine")
    with pytest.raises(UserError, match=r"a\.png: exists"):
        draw_inspection(tiny_trace, tmp_path / "a.png")
    with pytest.raises(UserError, match=r"a figure ends in one of \.png, \.svg, \.pdf"):
        draw_inspection(tiny_trace, tmp_path / "a.jpg")
    assert (tmp_path / "a.png").read_text() == "mine"


def test_a_trace_of_one_token_can_be_drawn(tmp_path: Path) -> None:
    trace = write_steps(tmp_path / "t", [(DECODE, [0], [[0, 1]])])
    draw_inspection(trace, tmp_path / "new" / "a.png")
    assert (tmp_path / "new" / "a.png").stat().st_size > 5_000
    assert "look-ups" in rendered(trace)
