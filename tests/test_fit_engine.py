"""Another engine from its speeds: exact recovery, coverage, what is said of misfits, bad input."""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from configs.errors import UserError
from sim.fit_engine import CURVE, LINE, Demand, Fit, Speed, fit_engine
from sim.fit_input import Case, make_curve, parse_accesses, parse_share
from sim.profile import chi_square_95, student_95
from tests.bench import fit_engine_page
from tests.bench.fit_engine_page import BIG_MOE, IMP, blind
from tests.commands import Ran
from tests.traces import make_trace

DEMAND = Demand(48 * 8, 48)
HITS = (0.3, 0.6, 0.8, 0.95)


def time_ms(hit: float, base: float, wait: float, miss: float) -> float:
    """By the text of the module, written a second time."""
    return base + 48 * (1 - hit**8) * wait + 384 * (1 - hit) * miss


def speeds(hits: tuple[float, ...], base: float, wait: float, miss: float) -> list[Speed]:
    return [Speed(hit, 1e3 / time_ms(hit, base, wait, miss)) for hit in hits]


def values(fit: Fit) -> list[float]:
    return [fit.base_ms.value, fit.wait_ms.value, fit.miss_ms.value]


# ---------------------------------------------------------------------- recovery

bases = st.floats(1.0, 50.0)
misses = st.floats(0.05, 2.0)


@given(bases, misses, st.sampled_from([HITS[:2], HITS[1:3], HITS[::3], HITS[:3], HITS]))
def test_a_line_is_recovered_and_predicted(
    base: float, miss: float, hits: tuple[float, ...]
) -> None:
    fit = fit_engine(speeds(hits, base, 0.0, miss), DEMAND)
    assert values(fit) == pytest.approx([base, 0.0, miss], rel=1e-6, abs=1e-9)
    assert fit.form == LINE
    assert fit.fits
    assert fit.unexplained == 0.0
    for hit in (0.1, 0.5, 0.99):
        predicted = fit.predict_ms(hit)
        assert predicted.value == pytest.approx(time_ms(hit, base, 0.0, miss))
        assert predicted.low <= predicted.value <= predicted.high


@given(bases, st.floats(1.0, 4.0), misses)
def test_waiting_layers_are_recovered_from_three_speeds(
    base: float, wait: float, miss: float
) -> None:
    """Where they bend the curve by more than the noise; a line within it is kept."""
    measured = speeds((0.3, 0.9, 0.99), base, wait, miss)
    fit = fit_engine(measured, DEMAND, noise=0.001)
    if fit.form == LINE:
        for speed in measured:
            assert fit.curve_ms(speed.hit_rate) == pytest.approx(speed.ms, rel=0.01)
        return
    assert fit.form == CURVE
    assert values(fit) == pytest.approx([base, wait, miss], rel=1e-5)


@given(bases, st.floats(0.0, 2.0), misses, st.floats(0.0, 1.0))
def test_two_speeds_leave_room_for_what_they_cannot_tell(
    base: float, wait: float, miss: float, hit: float
) -> None:
    """Whatever waits there are: exact speeds, so the truth is within the interval."""
    fit = fit_engine(speeds((0.4, 0.9), base, wait, miss), DEMAND)
    truth = time_ms(hit, base, wait, miss)
    predicted = fit.predict_ms(hit)
    assert predicted.low * (1 - 1e-6) <= truth <= predicted.high * (1 + 1e-6)


@given(bases, misses, st.floats(0.1, 10.0))
def test_units_do_not_matter(base: float, miss: float, factor: float) -> None:
    slow = fit_engine(speeds(HITS[:2], base * factor, 0.0, miss * factor), DEMAND)
    fast = fit_engine(speeds(HITS[:2], base, 0.0, miss), DEMAND)
    for hit in (0.2, 0.7):
        ours, theirs = slow.predict_ms(hit), fast.predict_ms(hit)
        assert ours.value == pytest.approx(theirs.value * factor)
        assert ours.low == pytest.approx(theirs.low * factor)
        assert ours.high == pytest.approx(theirs.high * factor)


@given(st.permutations(range(4)), st.integers(0, 99))
def test_the_order_of_speeds_does_not_matter(order: list[int], seed: int) -> None:
    rng = np.random.default_rng(seed)
    measured = [
        Speed(each.hit_rate, each.tokens_per_s * float(rng.normal(1, 0.05)))
        for each in speeds(HITS, 10.0, 0.2, 0.3)
    ]
    first = fit_engine(measured, DEMAND).predict_ms(0.7)
    again = fit_engine([measured[index] for index in order], DEMAND).predict_ms(0.7)
    assert (again.value, again.low, again.high) == pytest.approx(
        (first.value, first.low, first.high), rel=1e-6
    )


# ---------------------------------------------------------------------- intervals


@pytest.mark.parametrize(
    ("hits", "wait", "asked"),
    [
        ((0.35, 0.95), 0.0, 0.75),
        ((0.35, 0.75), 0.0, 0.95),
        ((0.35, 0.95), 0.5, 0.75),
        ((0.35, 0.75, 0.95), 0.0, 0.6),
        ((0.35, 0.75, 0.95), 0.5, 0.2),
        (HITS, 0.0, 0.7),
        (HITS, 0.5, 0.99),
    ],
)
def test_intervals_hold_speeds_that_were_not_fitted(
    hits: tuple[float, ...], wait: float, asked: float
) -> None:
    """95 % at least, of noisy measurements, the judged one noisy as well."""
    rng = np.random.default_rng(7)
    inside = 0
    for _ in range(200):
        noisy = [
            Speed(hit, 1e3 / (time_ms(hit, 10.0, wait, 0.3) * float(rng.normal(1, 0.03))))
            for hit in hits
        ]
        judged = time_ms(asked, 10.0, wait, 0.3) * float(rng.normal(1, 0.03))
        inside += judged in fit_engine(noisy, DEMAND, noise=0.03).predict_ms(asked)
    assert inside >= 184  # three deviations below 190 of 200


def test_a_line_without_known_layers_has_the_interval_of_propagated_noise() -> None:
    """Two speeds, no waits: the textbook's variance of a line through two points."""
    measured = speeds((0.3, 0.9), 10.0, 0.0, 0.3)
    noise = 1e-3
    fit = fit_engine(measured, Demand(384), noise=noise)
    misses_at = [384 * 0.7, 384 * 0.1, 384 * 0.4]
    share = (misses_at[2] - misses_at[1]) / (misses_at[0] - misses_at[1])
    deviation = math.hypot(share * measured[0].ms, (1 - share) * measured[1].ms) * noise
    both = 1.959964 * math.hypot(deviation, noise * time_ms(0.6, 10.0, 0.0, 0.3))
    predicted = fit.predict_ms(0.6)
    assert predicted.high - predicted.value == pytest.approx(both, rel=0.01)
    assert predicted.value - predicted.low == pytest.approx(both, rel=0.01)


def test_quantiles() -> None:
    """Against tables."""
    tables = {1: 12.706, 2: 4.303, 3: 3.182, 5: 2.571, 10: 2.228, 30: 2.042}
    for freedom, value in tables.items():
        assert student_95(freedom) == pytest.approx(value, abs=6e-4)
    for freedom, value in {1: 3.841, 2: 5.991, 5: 11.070}.items():
        assert chi_square_95(freedom) == pytest.approx(value, rel=0.03)


def test_no_prediction_beats_the_resident_model() -> None:
    """Copies hidden behind computing: the line falls below what computing takes."""
    fit = fit_engine(
        [Speed(0.5, 1e3 / 40), Speed(0.8, 1e3 / 17)], DEMAND, resident_tokens_per_s=100.0
    )
    assert fit.base_ms.value == pytest.approx(17 - (40 - 17) / 115.2 * 76.8)
    assert fit.predict_ms(0.99).value == pytest.approx(10.0)
    assert fit.predict_ms(0.99).low >= 10.0 * 0.94
    assert any("hidden behind computing" in line for line in fit.misfits)


# ---------------------------------------------------------------------- misfits


@pytest.mark.parametrize(
    ("measured", "resident", "words"),
    [
        ([(0.3, 20.0), (0.9, 10.0)], None, "faster with more misses"),
        ([(0.0, 1.0), (0.5, 4.0)], None, "without a miss would take -500 ms"),
        ([(0.2, 10.0), (0.5, 30.0), (0.9, 31.0)], None, "beyond the noise of 3.0%"),
        ([(0.366, 10.5), (0.962, 51.9)], 311.0, "offloading costs 11.2 ms beside its misses"),
    ],
)
def test_what_does_not_fit_is_said_in_one_line(
    measured: list[tuple[float, float]], resident: float | None, words: str
) -> None:
    fit = fit_engine([Speed(*each) for each in measured], DEMAND, resident_tokens_per_s=resident)
    assert not fit.fits
    assert len(fit.misfits) == 1
    assert words in fit.misfits[0]
    assert "\n" not in fit.misfits[0]


def test_a_resident_speed_on_the_curve_is_no_misfit() -> None:
    fit = fit_engine(speeds((0.3, 0.9), 10.0, 0.0, 0.3), DEMAND, resident_tokens_per_s=100.0)
    assert fit.fits


def test_a_curve_that_is_not_above_zero_is_not_predicted() -> None:
    fit = fit_engine([Speed(0.0, 1.0), Speed(0.5, 4.0)], DEMAND)
    with pytest.raises(UserError, match="not above zero"):
        fit.predict_ms(0.9)


def test_speeds_left_out_widen_the_interval() -> None:
    """A speed that the others miss by more than noise: no form that they support predicts well."""
    kinked = [Speed(0.2, 10.0), Speed(0.6, 19.0), Speed(0.9, 26.0)]
    fit = fit_engine(kinked, DEMAND)
    assert len(fit.left_out) == 3
    assert fit.unexplained > 0.05
    plain = replace(fit, unexplained=0.0)
    beyond, without = fit.predict_ms(0.1), plain.predict_ms(0.1)
    assert beyond.high > without.high
    assert beyond.low > kinked[0].ms * 0.9  # more misses take no less time
    between = fit.predict_ms(0.75)
    assert kinked[2].ms * 0.9 < between.low < between.high < kinked[1].ms * 1.1


# ---------------------------------------------------------------------- published figures


def test_the_page_is_what_the_script_makes() -> None:
    root = Path(__file__).resolve().parents[1]
    assert (root / fit_engine_page.PAGE).read_text(encoding="utf-8") == fit_engine_page.page()


def test_no_speed_is_judged_by_a_fit_that_it_took_part_in() -> None:
    for published, count in ((IMP, 2), (IMP, 3), (BIG_MOE, 2)):
        results = blind(published, count)
        choices = math.comb(len(published.speeds), count)
        assert len(results) == choices * (len(published.speeds) - count)
        for each in results:
            assert each.speed not in each.fit.speeds
            assert each.judged not in each.fitted


def test_two_published_speeds_by_hand() -> None:
    """imp at 24 and 244 slots: 243.456 and 14.592 misses, 95.147 and 19.283 ms."""
    (at_73, _) = (each for each in blind(IMP, 2) if each.fitted == (0, 3))
    miss = (1e3 / 10.51 - 1e3 / 51.86) / (243.456 - 14.592)
    base = 1e3 / 51.86 - 14.592 * miss
    assert values(at_73.fit) == pytest.approx([base, 0.0, miss])
    assert at_73.predicted == pytest.approx(1e3 / (base + 99.456 * miss))


# ---------------------------------------------------------------------- input


@pytest.fixture
def moesim(moesim: Callable[..., Ran]) -> Callable[..., Ran]:
    """With the command that all tests of this file run."""
    return functools.partial(moesim, "fit-engine")


POINTS = ("--point", "slots=24,hit=36.6%,tps=10.5", "--point", "hit=0.962,tps=51.9")
SLOTS = ("--point", "slots=2,tps=3", "--point", "slots=4,tps=9", "--trace", "sample")
ACCESSES = ("--accesses", "48x8")


def test_shares_and_accesses() -> None:
    assert parse_share("36.6%") == pytest.approx(0.366)
    assert parse_share(0.5) == 0.5
    assert parse_share("100%") == parse_share(1) == 1.0
    assert parse_accesses("48x8") == Demand(384, 48)
    assert parse_accesses(384) == Demand(384)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], ["no measured speed", "--point"]),
        ([*POINTS[:2], *ACCESSES], ["two different hit rates", "1 given, at 36.6%"]),
        ([*POINTS[:2], *POINTS[:2], *ACCESSES], ["two different hit rates", "2 given"]),
        ([*POINTS], ["accesses", "48x8", "geometry"]),
        (["--point", "hit=120%,tps=3", *POINTS, *ACCESSES], ["120%", "100%"]),
        (["--point", "hit=-1%,tps=3", *POINTS, *ACCESSES], ["-1%", "100%"]),
        (["--point", "hit=36.6,tps=3", *POINTS, *ACCESSES], ["36.6", "percent"]),
        (["--point", "hit=nan,tps=3", *POINTS, *ACCESSES], ["nan"]),
        (["--point", "hit=half,tps=3", *POINTS, *ACCESSES], ["half", "36.6%"]),
        (["--point", "hit=50%,tps=0", *POINTS, *ACCESSES], ["tps", "greater than 0"]),
        (["--point", "hit=50%,tps=-3", *POINTS, *ACCESSES], ["tps", "greater than 0"]),
        (["--point", "hit=50%,tps=inf", *POINTS, *ACCESSES], ["tps", "finite"]),
        (["--point", "hit=50%", *POINTS, *ACCESSES], ["tps", "missing"]),
        (["--point", "tps=3", *POINTS, *ACCESSES], ["neither hit nor slots"]),
        (["--point", "hit=50%,tps=3,tps=4", *POINTS, *ACCESSES], ["tps is given twice"]),
        (["--point", "hit=50%;tps=3", *POINTS, *ACCESSES], ["hit=50%;tps=3"]),
        (["--point", "hit=50%,speed=3", *POINTS, *ACCESSES], ["speed", "not known"]),
        (["--point", "slots=0,hit=1%,tps=3", *POINTS, *ACCESSES], ["slots"]),
        ([*POINTS, *ACCESSES, "--predict", "slots=73"], ["slots=73", "trace"]),
        ([*POINTS, *ACCESSES, "--predict", "hit=50%,tps=3"], ["tps", "not known"]),
        ([*POINTS, "--accesses", "48x"], ["'48x'", "48x8"]),
        ([*POINTS, "--accesses", "0x8"], ["above zero"]),
        ([*POINTS, *ACCESSES, "--geometry", "qwen3-30b-a3b"], ["not both"]),
        ([*POINTS, "--geometry", "qwen3"], ["qwen3", "qwen3-30b-a3b"]),
        ([*POINTS, *ACCESSES, "--noise", "0%"], ["noise"]),
        ([*POINTS, *ACCESSES, "--noise", "3"], ["'3'", "percent"]),
        ([*POINTS, *ACCESSES, "--resident-tps", "-1"], ["resident_tps", "greater than 0"]),
        ([*POINTS, *ACCESSES, "--expert-bytes", "3"], ["'3'", "unit"]),
        ([*POINTS, *ACCESSES, "--link", "fast"], ["fast", "25GB/s"]),
        (["nowhere.yaml"], ["nowhere.yaml", "no such file"]),
        (["nowhere.yaml", *POINTS], ["nowhere.yaml", "--point", "options alone"]),
        (
            [*SLOTS, "--policy", "next-gate"],
            ["next-gate", "hit="],
        ),
    ],
)
def test_bad_input_is_one_line(moesim, arguments: list[str], expected: list[str]) -> None:  # type: ignore[no-untyped-def]
    ran = moesim(*arguments)
    assert ran.code == 2
    assert ran.out == ""
    assert ran.err.startswith("moesim: error: ")
    assert ran.err.count("\n") == 1
    for words in expected:
        assert words in ran.err


def test_the_command_prints_and_draws(moesim, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    arguments = [*POINTS, *ACCESSES, "--predict", "slots=73,hit=74.1%", "--resident-tps", "311"]
    arguments += ["--expert-bytes", "2.86MB", "--link", "25.6GB/s"]
    ran = moesim(*arguments, "--figure", tmp_path / "out" / "imp.png")
    assert ran.code == 0
    assert "does not fit: base is 14.4 ms" in ran.out
    assert "8.6 GB/s in effect" in ran.out
    assert "0.112 ms of it copying" in ran.out
    assert "(73 slots a layer)" in ran.out
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["imp.png", "imp.svg"]


def test_help_has_an_example(moesim) -> None:  # type: ignore[no-untyped-def]
    ran = moesim("--help")
    assert ran.code == 0
    assert "Example: moesim fit-engine" in " ".join(ran.out.split())


def test_json_is_one_object(moesim) -> None:  # type: ignore[no-untyped-def]
    ran = moesim(*POINTS, *ACCESSES, "--predict", "hit=100%", "--expert-bytes", "2.86MB", "--json")
    result = json.loads(ran.out)
    assert result["fits"] is True
    assert result["accesses_per_token"] == 384
    assert result["base_ms"]["value"] == pytest.approx(14.4, abs=0.05)
    assert result["effective_bytes_per_s"]["value"] == pytest.approx(8.6e9, rel=0.01)
    (prediction,) = result["predictions"]
    assert prediction["misses_per_token"] == 0
    assert prediction["tokens_per_s"]["value"] == pytest.approx(1e3 / result["base_ms"]["value"])


def test_a_file_means_the_same_as_options(moesim, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    file = tmp_path / "case.yaml"
    file.write_text(
        "points:\n  - {slots: 24, hit: 36.6%, tps: 10.5}\n  - {hit: 0.962, tps: 51.9}\n"
        "predict:\n  - {hit: 74.1%}\ngeometry: qwen3-30b-a3b\ndtype: int4\nnoise: 3%\n"
    )
    options = ["--geometry", "qwen3-30b-a3b", "--dtype", "int4", "--noise", "3%"]
    by_options = moesim(*POINTS, "--predict", "hit=74.1%", *options)
    assert by_options.code == 0
    assert moesim(file).out == by_options.out


def test_hits_are_simulated_where_slots_are_given(tmp_path: Path) -> None:
    from sim import simulate
    from tracer.trace import Trace

    make_trace(
        tmp_path / "t", layers=3, experts=8, top_k=2, requests=3, prompt=4, output=12, seed=3
    )
    places = [{"slots": 3, "tps": 10.0}, {"slots": 6, "tps": 20.0}]
    case = Case.model_validate(
        {"points": places, "predict": [{"slots": 4}], "trace": str(tmp_path / "t")}
    )
    curve = make_curve(case)
    assert curve.fit.demand == Demand(6, 3)
    trace = Trace.open(tmp_path / "t")
    for slots, hit in ((3, curve.points[0][1].hit_rate), (4, curve.places[0][1])):
        row = simulate(trace, policy="lru", hardware="t4-pcie3", expert_budget=f"{slots}/layer")
        assert hit == row.loc[0, "decode.hit_rate"]


def test_waiting_layers_are_about_those_of_independent_misses() -> None:
    """The page's figure: LRU on the sample, by brute force."""
    from collections import OrderedDict

    from tracer.trace import Trace

    columns = Trace.open("sample").load(["experts", "phase"])
    experts, decode = columns["experts"], columns["phase"] == 1
    layers, top_k = experts.shape[1:]
    excess = []
    for slots in (8, 32, 48):
        missed = np.zeros((len(experts), layers), np.int64)
        for layer in range(layers):
            cache: OrderedDict[int, None] = OrderedDict()
            for row, chosen in enumerate(experts[:, layer].tolist()):
                missed[row, layer] = sum(expert not in cache for expert in chosen)
                for expert in chosen:
                    cache[expert] = None
                    cache.move_to_end(expert)
                while len(cache) > slots:
                    cache.popitem(last=False)
        asked = missed[decode]
        demand = Demand(layers * top_k, layers)
        formula = demand.waiting_layers(1 - float(asked.mean()) / top_k)
        excess.append(formula / float((asked > 0).sum(axis=1).mean()) - 1)
    assert min(excess) == pytest.approx(0.01, abs=0.005)
    assert max(excess) == pytest.approx(0.16, abs=0.005)
