"""Measured times of a model: the file, and what the simulator makes of it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from typer.testing import CliRunner

import cli
from configs.errors import UserError
from configs.geometry import load_geometry
from configs.hardware import load_hardware
from configs.timings import (
    CpuTimes,
    ExpertsTime,
    GroupTime,
    HostTimes,
    LinkTimes,
    ModelTimes,
    Pass,
    PolicyTimes,
    load_timings,
    render,
)
from sim import simulate
from sim.calibrated import CalibratedTiming
from sim.timing import RooflineTiming

HOST = HostTimes(
    step_ns=40_000,
    segment_launch_ns=7_000,
    experts_launch_ns=10_000,
    launch_each_ns=0,
    readback_ns=8_000,
    decision_ns=9_000,
    awaited_ns=1_000,
    copy_issue_ns=5_000,
    landing_ns=3_000,
)


def a_pass(tokens: int, kv_tokens: int = 128, scale: int = 1, **host: int) -> Pass:
    return Pass(
        tokens=tokens,
        kv_tokens=kv_tokens,
        host=HOST.model_copy(update=host),
        segment_ns=tuple(scale * (150_000 + layer) for layer in range(16)),
        head_ns=100_000,
        experts=(
            ExpertsTime(experts=1, ns=20_000),
            ExpertsTime(experts=4, ns=23_000),
            ExpertsTime(experts=8, ns=31_000),
        ),
    )


def model_times(*passes: Pass, **given: Any) -> ModelTimes:
    return ModelTimes(
        **{
            "hardware": "h200-pcie5",
            "geometry": "olmoe-1b-7b",
            "expert_dtype": "bf16",
            "machine": "a machine",
            "source": "a command",
            "passes": passes or (a_pass(1), a_pass(8), a_pass(64, scale=3, decision_ns=65_000)),
            "link": LinkTimes(bytes_per_s=55 * 10**9, startup_ns=5_000, gap_ns=3_000),
            "segment_slowdown": 0.04,
            "experts_beside_ns": 15_000,
            **given,
        }
    )


def timing(times: ModelTimes, **given: Any) -> CalibratedTiming:
    hardware, geometry = load_hardware("h200-pcie5"), load_geometry("olmoe-1b-7b")
    return CalibratedTiming(geometry, hardware, times, **given)


MEASURED = timing(model_times())


def written(tmp_path: Path, times: ModelTimes) -> Path:
    path = tmp_path / "times.yaml"
    path.write_text(render(times))
    return path


def test_a_file_reads_as_it_was_written(tmp_path: Path) -> None:
    times = model_times(policies={"lru": PolicyTimes(decision_ns=1, awaited_ns=2, copy_issue_ns=3)})
    assert load_timings(written(tmp_path, times)) == times


def at_share(share: float | None, ns: int, **given: Any) -> PolicyTimes:
    return PolicyTimes(
        expert_share=share, decision_ns=ns, awaited_ns=ns // 10, copy_issue_ns=8, **given
    )


def test_a_policys_times_by_share_read_as_they_were_written(tmp_path: Path) -> None:
    times = model_times(policies={"lru": (at_share(0.1875, 50_000), at_share(0.625, 30_000))})
    assert load_timings(written(tmp_path, times)) == times


def test_a_slower_host_takes_longer_and_nothing_else_does() -> None:
    times = model_times(policies={"lru": (at_share(0.25, 50_000), at_share(0.5, 30_000))})
    slow = times.on_host(1.5, 75_000)
    assert slow.host_loop_ns == 75_000
    assert [each.decision_ns for each in slow.policies["lru"]] == [75_000, 45_000]
    assert [each.expert_share for each in slow.policies["lru"]] == [0.25, 0.5]
    for before, after in zip(times.passes, slow.passes, strict=True):
        assert after.host.readback_ns == before.host.readback_ns
        assert after.host.segment_launch_ns == round(1.5 * before.host.segment_launch_ns)
        assert after.model_copy(update={"host": before.host}) == before
    assert slow.link == times.link


def test_older_files_have_one_entry_a_policy(tmp_path: Path) -> None:
    times = model_times(policies={"lru": (at_share(None, 50_000),)})
    path = written(tmp_path, times)
    data = yaml.safe_load(path.read_text())
    (data["policies"]["lru"],) = data["policies"]["lru"]
    del data["policies"]["lru"]["expert_share"], data["workspace_bytes"]
    path.write_text(yaml.safe_dump(data))
    assert load_timings(path) == times
    for share in (None, 0.1, 0.9):
        assert timing(times, policy="lru", expert_share=share).host.decision_ns == 50_000


@pytest.mark.parametrize("shares", [(0.5, 0.25), (0.25, 0.25), (0.25, None), (None, None)])
def test_shares_must_go_up(shares: tuple[float | None, ...]) -> None:
    with pytest.raises(ValueError, match="lru: expert_share must go up"):
        model_times(policies={"lru": tuple(at_share(share, 1) for share in shares)})


@pytest.mark.parametrize(
    ("share", "decision_ns", "awaited_ns"),
    [
        (0.1, 50_000, 5_000),  # the nearest
        (0.2, 50_000, 5_000),
        (0.3, 45_000, 4_500),
        (0.4, 40_000, 4_000),
        (0.5, 35_000, 3_500),
        (0.6, 30_000, 3_000),
        (1.0, 30_000, 3_000),
        (None, 40_000, 4_000),  # the middle one
    ],
)
def test_a_policys_times_are_interpolated_by_share(
    share: float | None, decision_ns: int, awaited_ns: int
) -> None:
    known = (at_share(0.2, 50_000), at_share(0.4, 40_000), at_share(0.6, 30_000))
    found = timing(model_times(policies={"slow": known}), policy="slow", expert_share=share)
    assert (found.host.decision_ns, found.host.awaited_ns) == (decision_ns, awaited_ns)
    assert found.host_for(64).decision_ns == 65_000 + decision_ns - 9_000


def test_what_was_not_measured_at_both_shares_is_the_passs() -> None:
    known = (at_share(0.2, 9, step_ns=10_000, segment_launch_ns=2_000), at_share(0.4, 9))
    known = (known[0], known[1].model_copy(update={"step_ns": 20_000}))
    found = timing(model_times(policies={"slow": known}), policy="slow", expert_share=0.3).host
    assert (found.step_ns, found.segment_launch_ns) == (15_000, HOST.segment_launch_ns)


def test_a_simulation_takes_a_policys_times_at_its_own_share(tmp_path: Path) -> None:
    def tpot(expert_budget: str, *entries: PolicyTimes) -> float:
        times = model_times(policies={"lru": entries} if entries else {})
        found = simulate(
            trace="sample",
            timings=str(written(tmp_path, times)),
            geometry="olmoe-1b-7b",
            hardware="h200-pcie5",
            policy="lru",
            expert_budget=expert_budget,
            max_tokens=60,
        )
        return float(found["tpot_ms.mean"][0])

    low, high = at_share(0.25, 900_000), at_share(0.75, 100_000)
    middle = at_share(0.5, 500_000)
    for budget, nearest in (("12.5%", low), ("25%", low), ("50%", middle), ("75%", high)):
        assert tpot(budget, low, high) == tpot(budget, nearest)
    assert tpot("50%", low) > tpot("50%", low, high) > tpot("50%", high)


def test_between_measured_sizes_times_are_interpolated() -> None:
    found = timing(model_times(a_pass(1), a_pass(1, 1128, 2), a_pass(8), a_pass(64, scale=3)))
    assert found.segment_ns(2, 1, 1, 128) == 150_002
    assert found.segment_ns(0, 1, 1, 628) == 225_000
    assert found.segment_ns(0, 1, 1, 5000) == 300_000
    assert found.segment_ns(0, 36, 1, 128) == 300_000  # half way from 8 to 64 tokens
    assert found.experts_ns(3, 1, 1) == 20_000
    assert found.experts_ns(3, 6, 6) == 27_000
    assert found.experts_ns(3, 16, 16) == 62_000  # in proportion beyond the last
    assert found.provenance == "calibrated"


CPU = CpuTimes(
    threads=14,
    start_ns=9_000,
    combine_ns=6_000,
    groups=tuple(
        GroupTime(experts=experts, tokens=tokens, ns=ns)
        for experts, tokens, ns in (
            (1, 1, 300_000),
            (1, 2, 310_000),
            (1, 8, 400_000),
            (2, 1, 500_000),
            (8, 1, 1_700_000),
        )
    ),
    slowdown=0.25,
    link_slowdown=0.1,
)


def test_the_cpu_lane_is_the_profiles_unless_it_was_measured(tmp_path: Path) -> None:
    hardware, geometry = load_hardware("h200-pcie5"), load_geometry("olmoe-1b-7b")
    estimated, plain = RooflineTiming(geometry, hardware), timing(model_times())
    assert plain.cpu_experts_ns(0, 2, 1) == estimated.cpu_experts_ns(0, 2, 1)
    assert plain.cpu_slowdown_ppm == estimated.cpu_slowdown_ppm
    assert (plain.host.cpu_start_ns, plain.combine_ns()) == (0, 20_000)
    times = model_times(cpu=CPU)
    assert load_timings(written(tmp_path, times)) == times
    found = timing(times, policy="slow")
    assert (found.host.cpu_start_ns, found.host_for(64).cpu_start_ns) == (9_000, 9_000)
    assert found.combine_ns() == 6_000
    assert (found.cpu_slowdown_ppm, found.link_slowdown_cpu_ppm) == (250_000, 100_000)


@pytest.mark.parametrize(
    ("experts", "assignments", "ns"),
    [
        (1, 1, 300_000),
        (5, 5, 1_100_000),
        (10, 10, 2_100_000),  # as from two to eight
        (1, 5, 355_000),
        (2, 10, 500_000 + 2 * 55_000),
        (1, 10, 430_000),
    ],
)
def test_a_group_is_its_experts_and_their_further_tokens(
    experts: int, assignments: int, ns: int
) -> None:
    assert CPU.ns(experts, assignments) == ns


@pytest.mark.parametrize(
    ("groups", "said"),
    [
        ([(1, 2)], "groups lack one expert of one token"),
        ([(1, 1), (2, 2)], "groups are of one token or of one expert"),
        ([(2, 1), (1, 1)], "groups must go up"),
    ],
)
def test_groups_that_say_too_little_are_refused(groups: list[tuple[int, int]], said: str) -> None:
    listed = [{"experts": experts, "tokens": tokens, "ns": 1} for experts, tokens in groups]
    with pytest.raises(ValueError, match=said):
        CpuTimes.model_validate({**CPU.model_dump(), "groups": listed})


def test_a_prefill_has_host_costs_of_its_own() -> None:
    found = timing(model_times())
    assert found.host_for(1).decision_ns == 9_000
    assert found.host_for(8).decision_ns == 9_000
    assert found.host_for(36).decision_ns == 37_000
    assert found.host_for(4096).decision_ns == 65_000


def batched() -> ModelTimes:
    """Of one request and of four at a time."""
    return model_times(
        a_pass(1),
        a_pass(8),
        a_pass(4, scale=3, decision_ns=21_000).model_copy(update={"requests": 4}),
        a_pass(64, scale=7, decision_ns=93_000).model_copy(update={"requests": 4}),
    )


def test_a_batch_has_times_of_its_own() -> None:
    found = timing(batched(), batch=4)
    assert found.host_for(4, 4).decision_ns == 21_000
    assert found.host.decision_ns == 21_000
    assert found.segment_ns(2, 4, 4, 128) == 450_006
    assert found.segment_ns(2, 2, 2, 128) == 450_006  # two have ended, their lines run on
    assert found.segment_ns(2, 33, 4, 128) == 1_050_014  # a prefill of four prompts
    assert found.host_for(33, 4).decision_ns == 93_000
    # By assignments: of 3 experts to 8 tokens.
    assert found.experts_ns(0, 3, 8) == 31_000
    assert found.experts_ns(0, 26, 32) == 124_000


def test_a_batch_has_the_lanes_times_too() -> None:
    own = {"slow": (PolicyTimes(decision_ns=59_000, awaited_ns=7, copy_issue_ns=8),)}
    times = batched().model_copy(update={"cpu": CPU, "policies": own})
    for found in (timing(times, batch=4), timing(times, batch=2, policy="slow")):
        assert (found.host_for(4, 4).cpu_start_ns, found.host_for(33, 4).cpu_start_ns) == (
            9_000,
        ) * 2
        assert found.cpu_experts_ns(0, 2, 10) == 610_000
        assert found.combine_ns() == 6_000
    assert timing(times, batch=4).host_for(4, 4).decision_ns == 21_000


def test_between_measured_batches_times_are_interpolated() -> None:
    found = timing(batched(), batch=2)
    assert found.segment_ns(0, 2, 2, 128) == 250_000
    assert found.host_for(2, 2).decision_ns == 13_000


def test_a_batch_beyond_the_measured_ones_is_refused() -> None:
    with pytest.raises(UserError, match="5 requests at a time were not measured"):
        timing(batched(), batch=5)
    assert batched().cover(3)
    assert not model_times().cover(2)


def test_a_policy_with_times_of_its_own_has_them() -> None:
    own = {"slow": PolicyTimes(decision_ns=59_000, awaited_ns=7, copy_issue_ns=8)}
    found = timing(model_times(policies=own), policy="slow")
    assert found.host == found.host_for(1)
    assert (found.host.decision_ns, found.host.awaited_ns) == (59_000, 7)
    assert found.host.copy_issue_ns == 8
    assert found.host_for(64).decision_ns == 65_000 + 50_000
    assert timing(model_times(policies=own), policy="other").host.decision_ns == 9_000


def test_a_policys_steps_are_its_own_in_decode_only() -> None:
    slow = PolicyTimes(
        decision_ns=9_000,
        awaited_ns=7,
        copy_issue_ns=8,
        step_ns=70_000,
        segment_launch_ns=60_000,
        experts_launch_ns=50_000,
        next_wave_ns=40_000,
    )
    plain = timing(model_times())
    found = timing(model_times(policies={"slow": slow}), policy="slow")
    decode, prefill = found.host_for(1), found.host_for(64)
    assert decode.gate_ns(3, first=False) == 40_000 + 3 * 7
    assert decode.gate_ns(3) == decode.decision_ns + 3 * 7
    assert prefill.next_wave_ns == plain.host_for(64).next_wave_ns
    assert (decode.step_ns, decode.segment_launch_ns) == (70_000, 60_000)
    assert decode.experts_launch_ns == 50_000
    assert prefill.experts_launch_ns == plain.host_for(64).experts_launch_ns


def test_a_policys_prefills_are_its_own() -> None:
    """As much more than lru's decisions as where they were measured; all they await is in it."""
    own = PolicyTimes(
        decision_ns=59_000,
        awaited_ns=700,
        copy_issue_ns=8,
        prediction_ns=20_000,
        prefill_tokens=8,
        prefill_decision_ns=25_000,
        prefill_next_wave_ns=6_000,
        prefill_prediction_ns=40_000,
    )
    found = timing(model_times(policies={"slow": own}), policy="slow")
    plain = timing(model_times())
    more_ns = 25_000 - plain.host_for(8).decision_ns
    assert more_ns == 16_000
    for tokens in (8, 64):
        host = found.host_for(tokens)
        assert host.decision_ns == plain.host_for(tokens).decision_ns + more_ns
        assert (host.awaited_ns, host.next_wave_ns, host.prediction_ns) == (0, 6_000, 40_000)
    decode = found.host_for(1)
    assert (decode.decision_ns, decode.awaited_ns, decode.prediction_ns) == (59_000, 700, 20_000)
    assert decode.next_wave_ns is None
    assert found.host_for(64) == replace(
        plain.host_for(64),
        decision_ns=plain.host_for(64).decision_ns + more_ns,
        awaited_ns=0,
        next_wave_ns=6_000,
        prediction_ns=40_000,
        copy_issue_ns=8,
    )
    quick = own.model_copy(update={"prefill_decision_ns": 0, "prefill_next_wave_ns": None})
    found = timing(model_times(policies={"quick": quick}), policy="quick")
    assert found.host_for(8).decision_ns == 0
    assert found.host_for(8).next_wave_ns is None
    assert plain.host_for(8).prediction_ns == 0


def test_a_policys_prefills_have_launches_and_steps_of_their_own() -> None:
    """Longer by as much as where they were measured, at every size."""
    plain = timing(model_times())
    at_own = plain.host_for(8)
    own = PolicyTimes(
        decision_ns=1,
        awaited_ns=2,
        copy_issue_ns=3,
        prefill_tokens=8,
        prefill_decision_ns=at_own.decision_ns,
        prefill_step_ns=at_own.step_ns + 500,
        prefill_segment_launch_ns=at_own.segment_launch_ns + 600,
        prefill_experts_launch_ns=max(at_own.experts_launch_ns - 700, 0),
        prefill_copy_issue_ns=4,
    )
    found = timing(model_times(policies={"slow": own}), policy="slow")
    for tokens in (8, 64):
        before, after = plain.host_for(tokens), found.host_for(tokens)
        assert after.step_ns == before.step_ns + 500
        assert after.segment_launch_ns == before.segment_launch_ns + 600
        assert after.experts_launch_ns == before.experts_launch_ns - 700
        assert after.decision_ns == before.decision_ns
        assert after.copy_issue_ns == 4
    assert found.host_for(1).copy_issue_ns == 3


def test_what_a_prefill_took_is_of_so_many_tokens() -> None:
    given = {"decision_ns": 1, "awaited_ns": 2, "copy_issue_ns": 3, "prefill_tokens": 8}
    with pytest.raises(ValidationError, match="prefill_tokens and prefill_decision_ns go together"):
        PolicyTimes(**given)
    slower = PolicyTimes(**given, prefill_decision_ns=10).slowed(3)
    assert (slower.prefill_tokens, slower.prefill_decision_ns) == (8, 30)


def test_later_waves_have_decisions_of_their_own_between_measured_sizes() -> None:
    assert timing(model_times()).host_for(8).next_wave_ns is None
    one, eight, many = a_pass(1), a_pass(8), a_pass(64, decision_ns=65_000)
    waves = many.host.model_copy(update={"next_wave_ns": 5_000})
    found = timing(model_times(one, eight, many.model_copy(update={"host": waves})))
    # At 8 tokens as the first wave's, 9 us; half way to 64 the mean of both.
    assert found.host_for(36).next_wave_ns == 7_000
    assert found.host_for(36).gate_ns(0, first=False) == 7_000
    assert found.host_for(64).gate_ns(1, first=False) == 5_000 + found.host_for(64).awaited_ns


def test_a_launch_beside_copies_takes_a_constant_longer() -> None:
    found = timing(model_times())
    for experts in (1, 4, 8):
        nominal = found.experts_ns(0, experts, experts)
        assert nominal * found.experts_ppm(experts, experts) / 1e6 == pytest.approx(
            15_000, rel=1e-4
        )


def test_how_much_longer_may_depend_on_the_launchs_size() -> None:
    one, *others = a_pass(1), a_pass(8)
    sizes = [each.experts for each in one.experts]
    assert len(sizes) > 2
    beside = {sizes[0]: 2_000, sizes[-1]: 30_000}
    experts = tuple(
        each.model_copy(update={"beside_ns": beside.get(each.experts)}) for each in one.experts
    )
    measured = one.model_copy(update={"experts": experts})
    assert one.beside_ns(1) is None
    assert measured.beside_ns(sizes[0]) == 2_000
    assert measured.beside_ns(sizes[-1]) == measured.beside_ns(10 * sizes[-1]) == 30_000
    found = timing(model_times(measured, *others))
    for size in (sizes[0], sizes[-1]):
        longer_ns = found.experts_ns(0, size, size) * found.experts_ppm(size, size) / 1e6
        assert longer_ns == pytest.approx(beside[size], rel=1e-3)
    assert 2_000 < measured.beside_ns(sizes[1]) < 30_000


def test_a_batchs_launches_are_looked_up_by_what_is_assigned() -> None:
    """Their times are of so many assignments; so is how much longer they take beside copies."""
    known = tuple(
        ExpertsTime(experts=n, ns=20_000 + 3_000 * n, beside_ns={1: 15_000, 32: 57_000}.get(n))
        for n in (1, 8, 32)
    )
    batch = a_pass(4).model_copy(update={"requests": 4, "experts": known})
    prefill = a_pass(64).model_copy(update={"requests": 4})
    found = timing(model_times(batch, prefill), batch=4)
    for experts, assigned in ((14, 32), (12, 28), (8, 20), (1, 1), (1, 3)):
        longer_ns = found.experts_ns(0, experts, assigned) * found.experts_ppm(experts, assigned)
        expected = 15_000 + (assigned - 1) * 42_000 / 31
        assert longer_ns / 1e6 == pytest.approx(expected, rel=1e-4)


def test_what_a_run_had_none_of_is_as_where_it_was_nearest() -> None:
    some = {"prediction_ns": 20_000, "prefill_next_wave_ns": 90_000}
    entries = (
        at_share(0.1875, 50_000),
        at_share(0.375, 40_000, prediction_ns=60_000, prefill_next_wave_ns=10_000),
        at_share(0.625, 30_000, **some),
        at_share(0.875, 20_000),
    )
    times = model_times(policies={"lru": entries})

    def at(share: float | None) -> tuple[int | None, int | None]:
        found = times.policy_at("lru", share)
        assert found is not None
        return found.prediction_ns, found.prefill_next_wave_ns

    assert at(0.63) == at(0.875) == at(0.99) == (20_000, 90_000)
    assert at(0.5) == (40_000, 50_000)
    assert at(0.1) == at(0.1875) == at(0.3) == (60_000, 10_000)
    assert at(None) == (20_000, 90_000)
    assert times.policy_at("lru", 0.75).prefill_prediction_ns is None  # nowhere


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 100), st.integers(1, 2000))
def test_longer_work_never_takes_less(experts: int, tokens: int) -> None:
    found = MEASURED
    assert found.experts_ns(0, experts, experts) <= found.experts_ns(0, experts + 1, experts + 1)
    if tokens > 1:
        assert found.segment_ns(0, tokens, 1, 128) <= found.segment_ns(0, tokens + 1, 1, 128)


def test_a_simulation_uses_the_file_and_says_so(tmp_path: Path) -> None:
    path = written(tmp_path, model_times())
    given = {
        "geometry": "olmoe-1b-7b",
        "hardware": "h200-pcie5",
        "policy": "lru",
        "expert_budget": "25%",
        "max_tokens": 60,
    }
    plain = simulate(trace="sample", **given)
    found = simulate(trace="sample", timings=str(path), **given)
    assert (plain["timing"][0], found["timing"][0]) == ("estimated", "calibrated")
    assert found["decode.hits"][0] == plain["decode.hits"][0]
    assert found["tpot_ms.mean"][0] != plain["tpot_ms.mean"][0]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"geometry": "mixtral-8x7b"}, "is of mixtral-8x7b bf16 on h200-pcie5, this run of olmoe"),
        ({"hardware": "rtx4090-pcie4"}, "on rtx4090-pcie4, this run"),
    ],
)
def test_another_models_file_is_refused(tmp_path: Path, given: dict[str, str], said: str) -> None:
    path = written(tmp_path, model_times(**given))
    with pytest.raises(UserError, match=said):
        simulate(
            trace="sample",
            timings=str(path),
            geometry="olmoe-1b-7b",
            hardware="h200-pcie5",
            policy="lru",
            expert_budget="25%",
            max_tokens=60,
        )


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("kv_tokens: 128", "kv_tokens: 0"),
        ("experts: 4", "experts: 9"),
        ("tokens: 8", "tokens: 70"),
        ("hardware: h200-pcie5", "hardwear: h200-pcie5"),
        ("step_ns: 40000", "step_ns: -1"),
    ],
)
def test_a_damaged_file_is_one_line(tmp_path: Path, change: str, said: str) -> None:
    path = written(tmp_path, model_times())
    text = path.read_text()
    assert change in text
    path.write_text(text.replace(change, said, 1))
    with pytest.raises(UserError, match=r"times\.yaml"):
        load_timings(path)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("--geometry olmoe-1b-7b --prefill-tokens 8,x", "--prefill-tokens 8,x"),
        ("--geometry olmoe-1b-7b --only link", "--only names parts"),
        ("--geometry olmoe-1b-7b --model here", "one of them"),
        ("--geometry olmoe-1b-7b --kv-tokens 64", "--kv-tokens 64"),
        (
            "--geometry olmoe-1b-7b --kv-tokens 119 --prefill-tokens 8",
            "--kv-tokens 119: calibration itself decodes 120 tokens",
        ),
    ],
)
def test_bad_options_of_a_models_calibration(tmp_path: Path, options: str, said: str) -> None:
    command = ["calibrate", "--out", str(tmp_path / "a.yaml"), *options.split()]
    told = CliRunner().invoke(cli.app, command)
    assert isinstance(told.exception, UserError)
    assert said in str(told.exception)
    assert not list(tmp_path.iterdir())
