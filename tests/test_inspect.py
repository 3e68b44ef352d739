from __future__ import annotations

import io
import json
import tempfile
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import typer
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from typer.testing import CliRunner, Result

from configs.errors import UserError
from tests.traces import ALL_COLUMNS, make_geometry, make_trace
from tracer.commands.inspect import register
from tracer.inspect import as_json, draw_inspection, inspect_trace, render, subject
from tracer.inspect.figures import draw_topics, missing_topics
from tracer.trace import DECODE, PREFILL, Trace, TraceWriter, append_column, load_arrays


def write_steps(path: Path, steps: list[tuple[int, list[int], list[list[int]]]]) -> Trace:
    """Write steps (phase, requests of its rows, expert ids of its rows), the same in all layers."""
    fields = {"model_id": "t", "geometry": make_geometry(), "recording": {"generator": "test"}}
    requests = sorted({request for _, rows, _ in steps for request in rows})
    following = dict.fromkeys(requests, 0)
    with TraceWriter(path, fields) as writer:
        for phase, rows, ids in steps:
            position = []
            for request in rows:
                position.append(following[request])
                following[request] += 1
            writer.write_step(
                request=rows,
                row=np.arange(len(rows)),
                phase=phase,
                position=position,
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


def test_overlap_of_single_layers(tmp_path: Path) -> None:
    fields = {"model_id": "t", "geometry": make_geometry(), "recording": {"generator": "test"}}
    with TraceWriter(tmp_path / "t", fields) as writer:
        for at, ids in enumerate(([[0, 1], [0, 1], [0, 1]], [[0, 1], [1, 2], [6, 7]])):
            writer.write_step(
                request=[0], row=[0], phase=DECODE, position=at, token_id=-1, experts=[ids]
            )
        writer.close([{"request": 0, "prompt_tokens": 0, "output_tokens": 3}])
    row = inspect_trace(Trace.open(tmp_path / "t"))["overlap"].iloc[0]
    assert (row["lowest_layer"], row["overlap"], row["highest_layer"]) == (0, 0.5, 1)


def test_domains(tmp_path: Path) -> None:
    """Two requests a domain that choose apart: half of the accesses are elsewhere."""
    trace = make_trace(tmp_path / "t", requests=4, prompt=0, output=1)  # code, prose, maths, code
    requests = trace.requests().assign(domain=["code", "prose", "code", None])
    ids = np.array([[0, 1], [4, 5], [0, 1], [4, 5]])
    with TraceWriter(
        tmp_path / "u",
        {"model_id": "t", "geometry": make_geometry(), "recording": {"generator": "test"}},
    ) as writer:
        for request in range(4):
            writer.write_step(
                request=[request],
                row=[0],
                phase=DECODE,
                position=0,
                token_id=-1,
                experts=np.tile(ids[request], (1, 3, 1)),
            )
        writer.close(requests)
    summary = inspect_trace(Trace.open(tmp_path / "u"))
    domains = summary["domains"]
    assert domains["domain"].tolist() == ["code", "prose", "unknown"]
    assert domains["requests"].tolist() == [2, 1, 1]
    assert domains["elsewhere"].tolist() == [0.5] * 3
    # One request alone is always half elsewhere; two that differ are not at all.
    assert domains["chance"][1:].tolist() == [0.5] * 2
    assert 0 < domains["chance"][0] < 0.5
    shares = summary["domain_popularity"].pivot(
        index=["domain", "layer"], columns="expert", values="share"
    )
    assert shares.loc[("code", 1)].tolist() == [0.5, 0.5, 0, 0, 0, 0, 0, 0]
    assert shares.loc[("unknown", 2)].tolist() == [0, 0, 0, 0, 0.5, 0.5, 0, 0]


def test_a_single_domain_is_like_all(tmp_path: Path) -> None:
    trace = make_trace(tmp_path / "t", requests=1)
    domains = inspect_trace(trace)["domains"]
    assert domains[["elsewhere", "chance"]].to_numpy().tolist() == [[0, 0]]


def test_distinct_experts_of_a_batch(tmp_path: Path) -> None:
    """Three requests of 2, 1 and 2 decode tokens, recorded one after the other."""
    steps = [
        (PREFILL, [0, 0], [[6, 7], [6, 7]]),
        (DECODE, [0], [[0, 1]]),
        (DECODE, [0], [[0, 1]]),
        (DECODE, [1], [[0, 2]]),
        (DECODE, [2], [[4, 5]]),
        (DECODE, [2], [[0, 1]]),
    ]
    batches = inspect_trace(write_steps(tmp_path / "t", steps))["batches"]
    # Index 0: requests 0 and 1 (2 is left over); index 1: 0 and 2.
    assert batches[["batch", "groups", "distinct"]].to_numpy().tolist() == [[1, 5, 2], [2, 2, 2.5]]
    assert batches["uniform"].tolist() == pytest.approx([2, 8 * (1 - 0.75**2)])
    chosen = np.array([4, 3, 1, 0, 1, 1]) / 5
    assert batches["skewed"].tolist() == pytest.approx([2, (1 - (1 - chosen) ** 2).sum()])


def test_without_decoding_there_is_no_batch_and_no_overlap(tmp_path: Path) -> None:
    summary = inspect_trace(write_steps(tmp_path / "t", [(PREFILL, [0, 0], [[0, 1], [1, 2]])]))
    assert summary["batches"].empty
    assert summary["overlap"]["overlap"].isna().all()
    assert summary["hits"]["phase"].unique().tolist() == ["prefill"]


def test_predictions(tmp_path: Path) -> None:
    """Decode tokens that choose 0 1: predicted right, half right in k, and wrong."""
    steps = [(PREFILL, [0], [[2, 3]]), *[(DECODE, [0], [[0, 1]])] * 3]
    trace = write_steps(tmp_path / "t", steps)
    ids = np.full((4, 3, 4), -1, np.int16)
    ids[:, :2] = np.array([[0, 1, 2, 3], [1, 0, 2, 3], [4, 1, 0, 5], [4, 5, 6, 7]])[:, None]
    append_column(tmp_path / "t", "learned_1", [ids])
    table = inspect_trace(Trace.open(trace.path))["predictions"]
    learned = table[table["predictor"] == "learned"]
    assert learned["layer"].tolist() == [1, 2]
    assert learned["distance"].tolist() == [1, 1]
    assert learned["tokens"].tolist() == [3, 3]
    assert learned["top_k_share"].tolist() == pytest.approx([3 / 6] * 2)
    assert learned["top_2k_share"].tolist() == pytest.approx([4 / 6] * 2)
    popular = table[table["predictor"] == "popularity"]
    assert popular["top_k_share"].tolist() == [1.0] * 3
    assert popular["layer"].tolist() == [0, 1, 2]


def test_without_predictions_there_is_no_accuracy(bigmoe_trace: Trace) -> None:
    assert inspect_trace(bigmoe_trace)["predictions"].empty


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


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), batch=st.integers(1, 3), prompt=st.integers(0, 3))
def test_predictions_by_brute_force(seed: int, batch: int, prompt: int) -> None:
    names = ["lookahead_1", "lookahead_2", "learned_1"]
    with tempfile.TemporaryDirectory() as scratch:
        trace = make_trace(
            Path(scratch) / "t",
            seed=seed,
            batch=batch,
            prompt=prompt,
            columns=names,
            shard_rows=7,
        )
        arrays = trace.load(["phase", "experts", *names])
        table = inspect_trace(trace)["predictions"].set_index(["predictor", "distance", "layer"])
    decode = np.flatnonzero(arrays["phase"] == DECODE)
    for name, predictor in zip(names, ("next gate", "next gate", "learned"), strict=True):
        ahead = int(name[-1])
        for layer in range(ahead, 3):
            right = [
                [
                    len(
                        set(arrays[name][row, layer - ahead, :width].tolist())
                        & set(arrays["experts"][row, layer].tolist())
                    )
                    for row in decode
                ]
                for width in (2, 4)
            ]
            found = table.loc[(predictor, ahead, layer), ["top_k_share", "top_2k_share"]]
            assert found.tolist() == pytest.approx((np.mean(right, axis=1) / 2).tolist())
    assert len(table) == 2 + 1 + 2 + 3


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), batch=st.integers(1, 3), experts=st.sampled_from([8, 70]))
def test_batches_by_brute_force(seed: int, batch: int, experts: int) -> None:
    """Requests of one length: groups are the same at every index; how they were recorded is not."""
    with tempfile.TemporaryDirectory() as scratch:
        trace = make_trace(
            Path(scratch) / "t", experts=experts, requests=5, output=3, seed=seed, batch=batch
        )
        arrays = trace.load(["request", "phase", "experts"])
        table = inspect_trace(trace)["batches"].set_index("batch")
    chosen = [
        arrays["experts"][(arrays["request"] == request) & (arrays["phase"] == DECODE)]
        for request in range(5)
    ]
    groups = {1: [(0,), (1,), (2,), (3,), (4,)], 2: [(0, 2), (1, 3)], 4: [(0, 1, 2, 3)]}
    for size, members in groups.items():
        sizes = [
            len({expert for r in group for expert in chosen[r][at, layer].tolist()})
            for group in members
            for at in range(3)
            for layer in range(3)
        ]
        assert table["distinct"][size] == pytest.approx(np.mean(sizes))
        assert table["groups"][size] == 3 * len(members)
    assert table.index.tolist() == [1, 2, 4]


def test_real_decoding_reuses_experts(gpt_oss_trace: Trace, tmp_path: Path) -> None:
    columns = ["request", "step", "phase", "experts"]
    gpt_oss_trace.export_arrays(tmp_path / "arrays", columns, 0, 8_000)
    summary = inspect_trace(load_arrays(tmp_path / "arrays"))
    # All 64,794 tokens: 65 %.
    assert summary["reuse"]["hit_share"][8 - 1] == pytest.approx(0.65, abs=0.03)
    overlap = summary["overlap"].set_index("lag")["overlap"]
    assert overlap[1] > overlap[8] > overlap[64] > summary["overlap"]["chance"][0]
    hits = summary["hits"].set_index(["policy", "slots"])["hit_share"]
    assert hits["lru", 8] == pytest.approx(summary["reuse"]["hit_share"][8 - 1])
    assert hits["belady", 8] > hits["lru", 8] + 0.1
    batches = summary["batches"]
    assert (batches["distinct"][1:] < batches["uniform"][1:]).all()


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
        "Accesses to other experts than all domains",
        "Hit rate of a cache a layer",
        "among the predicted ones",
        "Distinct experts of a batch",
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


def test_a_model_of_one_moe_layer_has_no_later_gate(tmp_path: Path) -> None:
    trace = make_trace(tmp_path / "t", layers=1, columns=["weights", "lookahead_1"])
    summary = inspect_trace(trace)
    assert "predictions" in missing_topics(summary)
    draw_topics(summary, subject(trace), tmp_path / "figures")
    assert "nan" not in rendered(trace)


def test_a_trace_in_which_no_layer_ran(tmp_path: Path) -> None:
    trace = write_steps(tmp_path / "t", [(DECODE, [0], [[-1, -1]])])
    with pytest.raises(UserError, match="no layer ran for any token"):
        inspect_trace(trace)


def test_json_holds_every_table_and_no_nan(tiny_trace: Trace) -> None:
    summary = inspect_trace(tiny_trace)
    content = json.loads(json.dumps(as_json(tiny_trace, summary), allow_nan=False))
    assert content["model_id"] == "tiny"
    assert content["trace_digest"] == tiny_trace.digest
    for name, table in summary.items():
        rebuilt = pd.DataFrame(content[name])
        assert list(rebuilt) == list(table)
        assert len(rebuilt) == len(table)
    assert content["hits"]["hits"] == summary["hits"]["hits"].tolist()
    assert content["overlap"]["overlap"][-1] is None


def run(*arguments: str | Path) -> Result:
    app = typer.Typer()
    app.callback()(lambda: None)
    register(app)
    return CliRunner().invoke(app, ["inspect", *map(str, arguments)])


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> tuple[Trace, Path, Result]:
    """A trace with all columns, the directory that the command drew to, and what it said."""
    root = tmp_path_factory.mktemp("inspected")
    trace = make_trace(root / "trace", columns=ALL_COLUMNS)
    ran = run(trace.path, "--figures", root / "new", "--figure", root / "one.svg")
    return trace, root / "new", ran


def test_command_prints_tables_and_draws(drawn: tuple[Trace, Path, Result]) -> None:
    _, directory, ran = drawn
    assert ran.exit_code == 0, ran.output
    assert "Hit rate of a cache a layer" in ran.stdout
    assert f"figure: {directory / 'hits.png'}" in ran.stdout
    assert directory.with_name("one.svg").stat().st_size > 5_000


def test_a_figure_a_topic(drawn: tuple[Trace, Path, Result]) -> None:
    trace, directory, _ = drawn
    before = {path: path.read_bytes() for path in directory.iterdir()}
    summary = inspect_trace(trace)
    assert missing_topics(summary) == {}
    paths = draw_topics(summary, subject(trace), directory)
    topics = ("skew", "domains", "overlap", "reuse", "hits", "predictions", "batches")
    assert [path.name for path in paths] == [
        f"{t}.{kind}" for t in topics for kind in ("png", "svg")
    ]
    assert {path: path.read_bytes() for path in paths} == before
    assert all(len(content) > 5_000 for content in before.values())
    assert "3 MoE layers x 8 experts" in (directory / "hits.svg").read_text(encoding="utf-8")


def test_topics_without_data_are_named(tmp_path: Path) -> None:
    trace = write_steps(tmp_path / "t", [(PREFILL, [0, 0], [[0, 1], [1, 2]])])
    summary = inspect_trace(trace)
    assert sorted(missing_topics(summary)) == ["batches", "domains", "overlap", "predictions"]
    drawn = draw_topics(summary, subject(trace), tmp_path / "figures")
    assert [path.stem for path in drawn[::2]] == ["skew", "reuse", "hits"]
    assert "nan" not in rendered(trace)


def test_another_figure_is_not_replaced(tiny_trace: Trace, tmp_path: Path) -> None:
    (tmp_path / "skew.png").write_text("mine")
    with pytest.raises(UserError, match=r"skew\.png: another figure is there"):
        draw_topics(inspect_trace(tiny_trace), subject(tiny_trace), tmp_path)
    assert (tmp_path / "skew.png").read_text() == "mine"


# The command


def test_command_prints_one_json_object(tiny_trace: Trace, tmp_path: Path) -> None:
    ran = run(tiny_trace.path, "--json", "--figure", tmp_path / "one.png")
    assert ran.exit_code == 0, ran.output
    assert json.loads(ran.stdout)["num_experts"] == 8
    assert "figure: " in ran.stderr


@pytest.mark.parametrize("option", ["--figure", "--figures"])
def test_what_is_in_the_way_is_told_before_measuring(
    tiny_trace: Trace, tmp_path: Path, option: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(trace: Trace) -> None:
        pytest.fail("measured in vain")

    monkeypatch.setattr("tracer.inspect.inspect_trace", never)
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "a.png").write_text("mine")
    target = tmp_path / "taken" / ("a.png" if option == "--figure" else "")
    ran = run(tiny_trace.path, option, target)
    assert isinstance(ran.exception, UserError)
    assert "taken" in str(ran.exception)


def test_command_help_shows_an_example() -> None:
    assert "Example: moesim inspect" in run("--help").stdout
