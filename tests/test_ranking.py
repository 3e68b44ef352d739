from __future__ import annotations

import io
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from configs.errors import UserError
from sim import SweepConfig, sweep
from sim.advice import recommend
from sim.front import knee, pareto, without_slivers
from sim.ranking import rank
from sim.selection import middle_budget, prepare
from sim.tables import render_ranking
from sim.wording import three_figures
from tracer.trace import Trace

GIB = 2**30
EXPERTS = 8 * GIB
FIXED = GIB
GPU = 16 * GIB
BOUNDS = ("belady", "oracle-prefetch", "accuracy-q")
PREFETCHERS = ("next-gate", "oracle-prefetch", "accuracy-q")


def point(policy: str, share: float, tpot_ms: float | None, **changes: Any) -> dict[str, Any]:
    """A row as a sweep writes it, made up: its parts add up to its TPOT."""
    slots = round(EXPERTS * share)
    stall = 0.0 if tpot_ms is None else tpot_ms / 2
    late = policy in PREFETCHERS
    row = {
        "status": "ok",
        "error": None,
        "policy": policy,
        "label": policy,
        "oracle": policy in BOUNDS,
        "lossless": policy != "skip",
        "prefetches": late,
        "time_dependent": late,
        "hardware": "gpu-a",
        "link_bytes_per_s": 24_000_000_000,
        "geometry": "model-a",
        "expert_dtype": "bf16",
        "timing": "estimated",
        "trace.digest": "0123456789abcdef",
        "trace.model": "model-a-twin",
        "point.budget": None,
        "point.window": 2,
        "point.max_tokens": None,
        "budget_bytes": FIXED + slots,
        "expert_budget_bytes": slots,
        "memory.peak_bytes": FIXED + slots,
        "memory.gpu_memory_bytes": GPU,
        "memory.expert_bytes_total": EXPERTS,
        "tpot_ms.mean": tpot_ms,
        "ttft_ms.mean": 100.0,
        "decode.accesses": 1000,
        "decode.asked": 1000,
        "decode.hits": round(1000 * share),
        "decode.late": 50 if late else 0,
        "decode.hit_rate": share,
        "h2d_bytes_per_token": 2e6,
        "breakdown_ms.host": stall / 2,
        "breakdown_ms.segments": stall / 4,
        "breakdown_ms.experts": stall / 4,
        "breakdown_ms.stall_late": stall if late else 0.0,
        "breakdown_ms.stall_miss": 0.0 if late else stall,
        "breakdown_ms.stall_cpu": 0.0,
        **changes,
    }
    row["memory.fits"] = row["memory.peak_bytes"] <= row["memory.gpu_memory_bytes"]
    return row


def failed(policy: str, error: str) -> dict[str, Any]:
    """A row of a point that failed: configuration and registry's flags, no result."""
    return {
        "status": "failed",
        "error": error,
        "policy": policy,
        "label": policy,
        "oracle": False,
        "lossless": True,
        "prefetches": False,
    }


TPOT_MS = {
    "on-demand": (80.0, 80.0, 80.0),
    "lru": (40.0, 20.0, 10.0),
    "lfu": (50.0, 19.9, 10.1),
    "static": (60.0, 30.0, 15.0),
    "next-gate": (41.0, 25.0, 9.0),
    "belady": (30.0, 15.0, 8.8),
    "oracle-prefetch": (20.0, 12.0, 8.6),
    "accuracy-q": (39.0, 18.0, 9.5),
}


def rows(shares: tuple[float, ...] = (0.25, 0.5, 0.75), **changes: Any) -> list[dict[str, Any]]:
    """Eight policies at three budgets, and all experts resident."""
    table = [
        point(policy, share, tpot, **changes)
        for policy, values in TPOT_MS.items()
        for share, tpot in zip(shares, values, strict=True)
    ]
    return [point("resident", 1.0, 5.0, **changes), *table]


def sweep_frame(*extra: dict[str, Any]) -> pd.DataFrame:
    """The sweep of :func:`rows`, and a failed point, on one machine."""
    return pd.DataFrame([*rows(), failed("slru", "needs more slots"), *extra])


def rendered(frame: pd.DataFrame, **console: Any) -> str:
    out = io.StringIO()
    render_ranking(Console(file=out, **console), frame)
    return out.getvalue()


# ---------------------------------------------------------------------- Pareto front

small = st.integers(1, 6)


@settings(max_examples=50)
@given(st.lists(st.tuples(small, small, st.sampled_from(["lru", "belady", "skip"])), min_size=1))
def test_front_is_what_brute_force_finds(spots: list[tuple[int, int, str]]) -> None:
    frame = pd.DataFrame(
        [
            point(policy, 0.1, float(tpot), label=f"{policy} {i}", **{"memory.peak_bytes": memory})
            for i, (memory, tpot, policy) in enumerate(spots)
        ]
    )
    own = {(memory, tpot) for memory, tpot, policy in spots if policy == "lru"}
    expected = sorted(
        (memory, tpot)
        for memory, tpot in own
        if not any(m <= memory and t <= tpot and (m, t) != (memory, tpot) for m, t in own)
    )
    line = pareto(frame)
    found = list(zip(line["memory.peak_bytes"], line["tpot_ms.mean"], strict=True))
    assert found == expected


def test_front_keeps_the_first_of_equal_points_and_none_that_does_not_fit() -> None:
    frame = pd.DataFrame(
        [
            point("lru", 0.5, 10.0),
            point("lfu", 0.5, 10.0),
            point("slru", 0.75, 1.0, **{"memory.gpu_memory_bytes": GIB}),
        ]
    )
    assert pareto(frame)["label"].tolist() == ["lfu"]


def test_front_of_two_systems_is_refused() -> None:
    frame = pd.DataFrame([*rows(), *rows(hardware="gpu-b")])
    with pytest.raises(ValueError, match="one system, not to 2: gpu-a, 24 GB/s; gpu-b, 24 GB/s"):
        pareto(frame)


def test_knee_is_farthest_below_the_chord() -> None:
    line = pd.DataFrame({"memory.peak_bytes": [0, 1, 2, 10], "tpot_ms.mean": [100.0, 40, 35, 0]})
    bend = knee(line)
    assert bend is not None
    assert bend["memory.peak_bytes"] == 1  # 1 - 0.1 - 0.4 = 0.5 below, against 0.45 and 0


def test_a_tooth_beside_a_winner_is_no_knee() -> None:
    staged = {"memory.peak_bytes": round(0.97 * (FIXED + EXPERTS // 2))}
    frame = pd.DataFrame(
        [point("static", 0.5, 60.0, **staged), point("lru", 0.5, 20.0), point("lru", 0.75, 10.0)]
    )
    line = pareto(frame)
    assert line["label"].tolist() == ["static", "lru", "lru"]
    assert knee(line) is not None
    assert without_slivers(line)["label"].tolist() == ["lru", "lru"]
    assert "Best value" not in recommend(frame)[0].text


@pytest.mark.parametrize("tpot", [[100.0, 0.0], [100.0, 50.0, 0.0], [100.0, 90.0, 0.0]])
def test_a_front_that_does_not_bend_has_no_knee(tpot: list[float]) -> None:
    memory = np.linspace(0, 10, len(tpot))
    assert knee(pd.DataFrame({"memory.peak_bytes": memory, "tpot_ms.mean": tpot})) is None


# ---------------------------------------------------------------------- ranking


def test_rank_sorts_each_kind_by_tpot() -> None:
    ranked = rank(sweep_frame())
    group = ranked[ranked["expert_share"] == 0.5]
    assert group[["kind", "place", "policy"]].to_numpy().tolist() == [
        ["causal", 1, "lfu"],
        ["causal", 2, "lru"],
        ["causal", 3, "next-gate"],
        ["causal", 4, "static"],
        ["causal", 5, "on-demand"],
        ["what-if", 1, "accuracy-q"],
        ["bound", 1, "oracle-prefetch"],
        ["bound", 2, "belady"],
    ]


def test_rank_compares_with_on_demand_and_the_fastest_bound() -> None:
    ranked = rank(sweep_frame()).set_index(["expert_share", "policy"])
    lru = ranked.loc[(0.5, "lru")]
    assert lru["times_faster"] == pytest.approx(80 / 20)
    assert lru["faster_than"] == "on-demand"
    assert lru["bound"] == "oracle-prefetch"
    assert lru["gap_to_bound"] == pytest.approx(1 - 12 / 20)
    assert lru["hit_rate"] == 0.5
    assert lru["late_share"] == 0
    assert lru["mb_per_token"] == 2
    assert lru["stall_ms"] == pytest.approx(10)
    assert lru["tie"]  # 20.0 against 19.9
    assert not ranked.loc[(0.5, "next-gate"), "tie"]
    assert ranked.loc[(0.5, "next-gate"), "late_share"] == 0.05


def test_rank_without_on_demand_or_bounds_compares_with_the_slowest() -> None:
    ranked = rank(pd.DataFrame([point("lru", 0.5, 10.0), point("static", 0.5, 30.0)]))
    assert ranked["faster_than"].tolist() == ["static", "static"]
    assert ranked["times_faster"].tolist() == [3, 1]
    assert ranked["gap_to_bound"].isna().all()


def test_lossy_policies_are_ranked_apart_and_never_picked() -> None:
    loss = {"quality.decode.changed_share": 0.3, "quality.decode.lost_mass_share": 0.125}
    frame = sweep_frame(point("skip", 0.5, 1.0, **loss))
    ranked = rank(frame)
    shares = ranked.set_index("policy")[["changed_share", "lost_share"]]
    assert shares.loc["skip"].tolist() == [0.3, 0.125]
    assert shares.drop("skip").isna().all(axis=None)
    words = "skip is lossy: 30.0 % of the experts changed, 12.5 % of the gate weight lost"
    assert words in rendered(frame)
    assert ranked.loc[ranked["policy"] == "skip", "kind"].tolist() == ["lossy"]
    assert "skip" not in recommend(frame)[0].text
    assert "skip" not in pareto(frame)["label"].tolist()


def test_a_repeated_point_counts_once() -> None:
    assert len(rank(sweep_frame(point("lru", 0.5, 20.0)))) == len(rank(sweep_frame()))


def test_links_that_are_nearly_equal_stay_apart() -> None:
    rates = (12_000_000_000, 12_010_000_000, 12_040_000_000)
    points = prepare(
        pd.DataFrame([point("lru", 0.25, 10.0, link_bytes_per_s=rate) for rate in rates])
    )
    assert points["system"].tolist() == [f"gpu-a, {rate} GB/s" for rate in ("12", "12.01", "12.04")]


def test_budgets_that_are_nearly_equal_stay_apart() -> None:
    """But for what is rounding to whole bytes."""
    shares = (0.125, 0.3333, 0.33340, 0.5, 0.5 + 1e-9)
    points = prepare(pd.DataFrame([point("lru", share, 10.0) for share in shares]))
    named = dict(zip(points["expert_share"].round(4), points["budget"], strict=True))
    assert named == {0.125: "12.5 %", 0.3333: "33.33 %", 0.3334: "33.34 %", 0.5: "50 %"}


def test_systems_are_named_by_what_varies() -> None:
    frame = pd.DataFrame(
        [
            point("lru", 0.5, 10.0),
            point("lru", 0.5, 11.0, **{"point.window": 4}),
            point("lru", 0.5, 12.0, hardware="gpu-b", link_bytes_per_s=12_500_000_000),
        ]
    )
    assert list(dict.fromkeys(prepare(frame)["system"])) == [
        "gpu-a, 24 GB/s, window 2",
        "gpu-a, 24 GB/s, window 4",
        "gpu-b, 12.5 GB/s, window 2",
    ]


def test_middle_budget_is_one_where_policies_compete() -> None:
    assert middle_budget(prepare(sweep_frame())) == EXPERTS // 2


@pytest.mark.parametrize(
    ("value", "text"),
    [(4.922, "4.92"), (9.996, "10.0"), (71.79, "71.8"), (1077.4, "1077"), (float("nan"), "-")],
)
def test_three_figures(value: float, text: str) -> None:
    assert three_figures(value) == text


# ---------------------------------------------------------------------- recommendation


def test_recommendation_in_words() -> None:
    (advice,) = recommend(sweep_frame())
    assert str(advice).splitlines() == [
        "gpu-a, 24 GB/s (estimated time: differences under 2 % are not to be trusted)",
        "  On this GPU of 16.0 GiB: 100 %: everything fits, the policy does not matter (5.00 ms a "
        "token in 9.0 GiB; compute and host are the limit).",
        "  With less memory: 75 %, 7.0 GiB, 9.00 ms (next-gate); 50 %, 5.0 GiB, 20.0 ms (lru, "
        "lfu); 25 %, 3.0 GiB, 40.0 ms (lru).",
        "  By budget: lru from 25 % up to 50 % (lfu is as good at 50 %); next-gate at 75 %.",
        "  Policy-limited at 25 % and 50 %: an oracle that knows the future (oracle-prefetch) "
        "would take 40 to 50 % less time in the same memory: the most that a better policy could "
        "gain.",
        "  Capacity-limited at 75 %: even an oracle that knows the future (oracle-prefetch) would "
        "take only 4 % less time in the same memory: more memory or a faster link would help.",
        "  Doubling the memory for experts (50 to 100 %) saves more (75 %) than any better policy "
        "could (40 %): memory first.",
        "  Doubling the memory for experts (25 to 50 %) saves about as much (50 %) as the best "
        "policy could (50 %).",
        "  Best value for little memory: lru with 50 % of the experts, 20.0 ms a token in 5.0 GiB.",
    ]


def test_recommendation_in_numbers() -> None:
    (advice,) = recommend(sweep_frame())
    assert (advice.policy, advice.budget, advice.tpot_ms) == ("resident", "100 %", 5.0)
    assert advice.expert_budget_bytes == EXPERTS
    assert advice.gpu_memory_bytes == FIXED + EXPERTS
    assert [(w.policy, w.from_budget, w.to_budget) for w in advice.winners] == [
        ("lru", "25 %", "50 %"),
        ("next-gate", "75 %", "75 %"),
    ]
    assert [verdict.limit for verdict in advice.verdicts] == ["policy", "policy", "capacity"]


def test_policies_that_tie_over_a_whole_run_are_named() -> None:
    frame = pd.DataFrame([point("lru", 0.5, 10.0), point("lfu", 0.5, 10.2)])
    (advice,) = recommend(frame)
    assert advice.winners[0].ties == ("lfu",)
    assert (
        "On this GPU of 16.0 GiB: lru (lfu is as good) with 50 % of the experts: 10.0 ms a token "
        "in 5.0 GiB." in advice.text
    )


def test_the_pick_is_the_fastest_that_fits_by_the_name_of_its_run() -> None:
    """lfu is a little faster at 50 %, lru as good there and best below: the table says so too."""
    frame = pd.DataFrame([row for row in rows() if row["expert_budget_bytes"] <= EXPERTS // 2])
    (advice,) = recommend(frame)
    assert (advice.policy, advice.budget, advice.tpot_ms) == ("lru", "50 %", 20.0)
    assert "lru (lfu is as good) with 50 % of the experts: 20.0 ms" in advice.text


def test_who_is_as_good_over_a_part_of_a_run_is_named() -> None:
    shares = (0.2, 0.4, 0.6)
    pairs = {"lru": (30.0, 20.0, 10.0), "lfu": (40.0, 20.1, 10.1)}
    frame = pd.DataFrame(
        [
            point(policy, share, tpot)
            for policy, values in pairs.items()
            for share, tpot in zip(shares, values, strict=True)
        ]
    )
    assert (
        "By budget: lru from 20 % up to 60 % (lfu is as good from 40 % up)."
        in recommend(frame)[0].text
    )
    pairs["lfu"] = (30.1, 20.1, 15.0)
    frame.loc[frame["label"] == "lfu", "tpot_ms.mean"] = pairs["lfu"]
    assert "(lfu is as good up to 40 %)" in recommend(frame)[0].text


@pytest.mark.parametrize(
    ("large_ms", "words"),
    [
        (18.0, "saves less (10 %) than a better policy could (50 %): policy first."),
        (10.1, "saves about as much (50 %) as the best policy could (50 %)."),
        (5.0, "saves more (75 %) than any better policy could (50 %): memory first."),
    ],
)
def test_memory_or_policy_first(large_ms: float, words: str) -> None:
    frame = pd.DataFrame(
        [point("lru", 0.25, 20.0), point("lru", 0.5, large_ms), point("belady", 0.25, 10.0)]
    )
    text = recommend(frame)[0].text
    assert f"Doubling the memory for experts (25 to 50 %) {words}" in text


def test_where_everything_is_resident_no_policy_is_named() -> None:
    """lru has all experts too, and a bound there bounds nothing."""
    frame = pd.DataFrame(
        [point("lru", 0.5, 20.0), point("belady", 0.5, 10.0)]
        + [point(policy, 1.0, 5.0) for policy in ("lru", "resident", "belady")]
    )
    (advice,) = recommend(frame)
    assert "100 %: everything fits, the policy does not matter (5.00 ms" in advice.text
    assert advice.policy == "resident"
    assert [winner.to_budget for winner in advice.winners] == ["50 %"]
    assert [verdict.budget for verdict in advice.verdicts] == ["50 %"]
    lines = [" ".join(line.split()) for line in rendered(frame).splitlines()]
    assert "100 % 9.0 all resident 5.00 - - 5.00" in lines


def test_just_over_the_margin_is_no_tie() -> None:
    frame = pd.DataFrame([point("lru", 0.5, 10.0), point("lfu", 0.5, 10.21)])
    assert recommend(frame)[0].winners[0].ties == ()


def test_what_does_not_fit_is_not_recommended() -> None:
    frame = pd.DataFrame(rows(**{"memory.gpu_memory_bytes": 6 * GIB}))
    (advice,) = recommend(frame)
    assert [winner.to_budget for winner in advice.winners] == ["50 %"]
    assert advice.budget in ("25 %", "50 %")
    assert "75 % needs 7.0 GiB and 100 % needs 9.0 GiB: do not fit." in advice.text


def test_on_demand_does_not_win_where_only_it_fits() -> None:
    """It takes no more memory at a larger budget, so it is no answer to having one."""
    small = {"memory.peak_bytes": FIXED}
    baseline = [point("on-demand", share, 80.0, **small) for share in (0.5, 1.5)]
    frame = pd.DataFrame([point("lru", 0.5, 40.0), point("lru", 1.5, 6.0), *baseline])
    frame["memory.gpu_memory_bytes"] = 8 * GIB
    frame["memory.fits"] = frame["memory.peak_bytes"] <= 8 * GIB
    (advice,) = recommend(frame)
    assert [(winner.policy, winner.to_budget) for winner in advice.winners] == [("lru", "50 %")]
    assert pareto(frame)["label"].tolist() == ["on-demand", "lru"]
    assert "does not fit" in rendered(frame)
    assert rank(frame)["saturated"].tolist() == [False, False, False, True]


def test_nothing_fits() -> None:
    frame = pd.DataFrame(rows(**{"memory.gpu_memory_bytes": 2 * GIB}))
    (advice,) = recommend(frame)
    assert advice.policy is None
    assert "Nothing fits the GPU's 2.0 GiB: the smallest is" in advice.text
    assert "does not fit" in rendered(frame)


def test_bounds_alone_are_no_choice() -> None:
    (advice,) = recommend(pd.DataFrame([point("belady", 0.5, 10.0)]))
    assert advice.policy is None
    assert "No causal, lossless policy was swept" in advice.text


def test_without_a_bound_the_limit_is_unknown() -> None:
    (advice,) = recommend(pd.DataFrame([point("lru", 0.5, 10.0)]))
    assert advice.verdicts[0].limit == "unknown"
    assert "Unknown at 50 % whether a better policy would help" in advice.text


@pytest.mark.parametrize("stand_in", ["accuracy-q", "belady"])
def test_what_is_slower_than_a_policy_does_not_bound_it(stand_in: str) -> None:
    frame = pd.DataFrame([point("next-gate", 0.5, 10.0), point(stand_in, 0.5, 12.0)])
    assert recommend(frame)[0].verdicts[0].limit == "unknown"


def test_a_bound_on_caching_alone_is_called_so() -> None:
    frame = pd.DataFrame([point("lru", 0.5, 10.0), point("belady", 0.5, 9.5)])
    (advice,) = recommend(frame)
    assert advice.verdicts[0].limit == "capacity"
    assert "(by caching: no bound that prefetches was swept)" in advice.text


def test_calibrated_time_is_not_called_estimated() -> None:
    frame = pd.DataFrame(rows(timing="calibrated"))
    assert "estimated" not in recommend(frame)[0].text
    assert "estimated" not in rendered(frame)


def test_budgets_of_the_whole_model_keep_their_names() -> None:
    frame = pd.DataFrame(
        [
            point("lru", 0.5, 10.0, **{"point.budget": "5GiB"}),
            point("lru", 2.0, 5.0, **{"point.budget": "17GiB"}),
        ]
    )
    points = prepare(frame)
    assert points["budget"].tolist() == ["5GiB", "17GiB"]
    assert points["expert_share"].tolist() == [0.5, 1.0]
    assert "lru with 5GiB in all: 10.0 ms a token" in recommend(frame)[0].text


def test_every_system_has_its_own_recommendation() -> None:
    frame = pd.DataFrame([*rows(), *rows(link_bytes_per_s=12_000_000_000)])
    assert [advice.system for advice in recommend(frame)] == ["gpu-a, 12 GB/s", "gpu-a, 24 GB/s"]


# ---------------------------------------------------------------------- tables


def test_tables_for_a_pipe_are_plain_and_narrow() -> None:
    text = rendered(sweep_frame())
    assert text.isascii()
    assert max(len(line) for line in text.splitlines()) <= 100
    assert "gpu-a, 24 GB/s: fastest policy by budget" in text
    assert "gap %: time that the fastest bound (oracle-prefetch) would save" in text
    assert "gpu-a, 24 GB/s, budget 50 %: 4.0 GiB of experts (speed-up over on-demand)" in text
    lines = [" ".join(line.split()) for line in text.splitlines()]
    assert "50 % 5.0 lru 20.0 = lfu 19.9 12.0" in lines
    assert "lru 20.0 = 4.00 40.0 50.0 0.0 10.0 2.00 100" in lines
    assert "oracle-prefetch 12.0 bound 6.67 - 50.0 5.0 6.00 2.00 100" in lines


@pytest.mark.parametrize("width", [60, 80, 100, 200])
def test_tables_for_a_terminal_keep_to_its_width(width: int) -> None:
    text = rendered(sweep_frame(), force_terminal=True, width=width, color_system=None)
    tables = [line for line in text.splitlines() if "budget" not in line and ": " not in line]
    assert max(len(line) for line in tables) <= min(width, 100)
    assert "─" in text
    assert "next-gate" in text
    assert ("TTFT ms" in text) == (width >= 100)


def test_long_tables_are_cut_and_say_so() -> None:
    shares = [0.02 * (1 + i) for i in range(30)]
    many = [point("lru", share, 1 / share) for share in shares]
    crowd = [point("lru", shares[14], 50.0 + i, label=f"lru gamma={i}") for i in range(20)]
    text = rendered(pd.DataFrame([*many, *crowd]))
    assert "12 of 30 budgets" in text
    assert "16 of 21 policies, without lru gamma=14, lru gamma=15, lru gamma=16" in text
    assert "lru gamma=19" in text  # the slowest stays in sight
    assert len(text.splitlines()) < 50


def test_one_budget_needs_no_table_of_winners() -> None:
    text = rendered(pd.DataFrame([point("lru", 0.5, 10.0), point("lfu", 0.5, 9.0)]))
    assert "by budget" not in text
    assert "speed-up over lru" in text


def test_a_label_is_not_markup() -> None:
    frame = pd.DataFrame([point("lru", 0.5, 10.0, label="lru [bold]"), point("lfu", 0.5, 9.0)])
    assert "lru [bold]" in rendered(frame)


# ---------------------------------------------------------------------- input errors


@pytest.mark.parametrize("function", [pareto, rank, recommend, rendered])
@pytest.mark.parametrize(
    ("frame", "message"),
    [
        (pd.DataFrame(), "no point of this sweep succeeded: it has no points"),
        (
            pd.DataFrame([failed("lru", "too small"), failed("lfu", "other")]),
            "no point of this sweep succeeded: 2 failed, the first with: too small",
        ),
        (pd.DataFrame([point("lru", 0.5, None)]), "no point of this sweep decoded a token"),
        (pd.DataFrame({"a": [1]}), "column status is missing"),
        (pd.DataFrame({"status": ["ok"]}), "column policy is missing"),
    ],
)
def test_nothing_to_rank(function: Any, frame: pd.DataFrame, message: str) -> None:
    with pytest.raises(UserError, match=message):
        function(frame)


def test_failed_points_and_column_types_do_not_matter() -> None:
    plain = pd.DataFrame(rows())
    mixed = sweep_frame()
    assert mixed["memory.fits"].dtype == object
    pd.testing.assert_frame_equal(rank(plain), rank(mixed), check_dtype=False)
    pd.testing.assert_frame_equal(rank(plain), rank(plain.sample(frac=1, random_state=0)))


# ---------------------------------------------------------------------- on a real sweep


@pytest.mark.parametrize(
    "budgets", [{"expert_budgets": ("2/layer", "50%")}, {"budgets": ("2GiB", "1KiB")}]
)
def test_results_of_a_sweep_are_ranked(tiny_trace: Trace, budgets: dict[str, Any]) -> None:
    names = ("resident", "on-demand", "lru", "next-gate", "belady")
    config = SweepConfig(
        trace="tiny",
        policies=[{"name": name} for name in names],
        hardware=("t4-pcie3",),
        **budgets,
    )
    frame = sweep(config, trace=tiny_trace)
    (advice,) = recommend(frame)
    assert advice.system == "t4-pcie3, 12.3 GB/s"
    assert advice.policy in names[:-1]
    assert set(rank(frame)["policy"]) == set(names)
    assert advice.system in rendered(frame)
