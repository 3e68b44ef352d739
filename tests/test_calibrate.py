"""Calibration, rehearsed on a machine with a clock of its own: it must find that machine's values.

What needs a GPU (`replay.calibrate.cuda`) is marked so.
"""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import typer
from typer.testing import CliRunner

torch = pytest.importorskip("torch", reason="needs torch: pip install 'moesim[gpu]'")

from configs.errors import UserError  # noqa: E402
from configs.hardware import MODEL_FIELDS, CurvePoint, Hardware, load_hardware  # noqa: E402
from configs.load import read_yaml  # noqa: E402
from replay.calibrate.compute import experts, segment  # noqa: E402
from replay.calibrate.cpu import ExpertShape, expert_shape, expert_work  # noqa: E402
from replay.calibrate.figure import draw, shown, value_rows  # noqa: E402
from replay.calibrate.link import fit_link, residuals  # noqa: E402
from replay.calibrate.profile import MEASURED, not_measured, render, update  # noqa: E402
from replay.calibrate.program import PARTS, measure, parse_parts  # noqa: E402
from replay.calibrate.rig import (  # noqa: E402
    KIB,
    MIB,
    CalibrationError,
    Facts,
    Pool,
    Sizes,
    fill,
    powers_of_two,
)
from replay.calibrate.stats import Reading, Value, excess, rate, summary  # noqa: E402
from replay.commands.calibrate import prepare, register, run  # noqa: E402

# A small job: megabytes, a few rounds; the fake's rates make all times long enough to overlap.
SMALL = Sizes(
    copies=powers_of_two(4 * KIB, MIB),
    fit_from=16 * KIB,
    rounds=4,
    repeats=6,
    pool_bytes=64 * MIB,
    pin_bytes=MIB,
    queue=8,
    chunk_bytes=MIB,
    train=32,
    hidden=128,
    width=64,
    experts=16,
    top_k=4,
    segment_layers=4,
    expert_layers=2,
    read_rows=1024,
    read_columns=256,
    gemm=256,
    maps=20,
    map_length=48,
    predictor_width=32,
    models=("olmoe-1b-7b", "qwen1.5-moe-a2.7b", "gpt-oss-20b"),
    decisions=200,
)


class FakeStream:
    """`at`: when all that was submitted to it has run."""

    def __init__(self) -> None:
        self.at = 0.0


class FakeEvent:
    def __init__(self) -> None:
        self.at = 0.0


class FakeGraph:
    def __init__(self, work, output) -> None:
        self.work = work
        self.output = output


class FakeRig:
    """A machine of known values. It computes for real on the CPU, but time is its own, in ns.

    Kernels and copies start and end as docs/contract.md has them. A kernel or copy that starts
    beside the other is slower as a whole; copies under way are slower while a kernel or the CPU
    runs.
    """

    device = "cpu"
    dtype = torch.bfloat16

    link_bytes_per_s = 20e9
    d2h_bytes_per_s = 10e9
    pageable_bytes_per_s = 4e9
    startup_ns = 7_000
    gap_ns = 3_000
    issue_ns = 6_000
    event_ns = 1_000
    query_ns = 200
    launch_ns = 9_000
    eager_ns = 5_000
    gpu_bytes_per_s = 2e10
    gpu_flops_per_s = 2e11
    kernel_ns = 20_000
    readback_ns = 12_000
    gpu_slowdown = 0.2
    link_slowdown_gpu = 0.1
    cpu_bytes_per_s = 30e9
    cpu_flops_per_s = 4e11
    cpu_slowdown = 0.25
    link_slowdown_cpu = 0.05
    pin_bytes_per_s = 3e9

    def __init__(self) -> None:
        self.now = 1_000_000.0
        self.compute = FakeStream()
        self.kinds: dict[int, str] = {}
        self.registered: set[int] = set()
        self.kept: list[object] = []
        self.link = FakeStream()
        self.on_link: list[FakeStream | FakeEvent] = [self.link]

    def facts(self) -> Facts:
        return Facts("Fake GPU", 64 * 2**30, "1.2.3", "2.0", "13.0", 4)

    def now_ns(self) -> int:
        self.now += 1
        return round(self.now)

    def stream(self) -> FakeStream:
        return FakeStream()

    def event(self, timing: bool = True) -> FakeEvent:
        return FakeEvent()

    def record(self, event, stream=None) -> None:
        self.now += self.event_ns
        event.at = max(self.now, (stream or self.compute).at)
        if stream is not None and event not in self.on_link:
            self.on_link.append(event)

    def done(self, event) -> bool:
        self.now += self.query_ns
        return event.at <= self.now

    def wait(self, event) -> None:
        self.now = max(self.now, event.at) + 2_000

    def elapsed_ns(self, start, end) -> float:
        return end.at - start.at

    def copy(self, dst, src, stream=None) -> None:
        self.now += self.issue_ns
        lane = stream or self.compute
        if stream is not None and stream not in self.on_link:
            self.on_link.append(stream)
        host = [tensor for tensor in (dst, src) if self._kind(tensor) != "device"]
        assert len(host) == 1, "a copy has one end on the host"
        dst.copy_(src)
        to_gpu = host[0] is src
        pinned = self._kind(host[0]) == "pinned"
        bytes_per_s = self.link_bytes_per_s if to_gpu else self.d2h_bytes_per_s
        wire = dst.nbytes * 1e9 / (bytes_per_s if pinned else self.pageable_bytes_per_s)
        start = max(self.now, lane.at, self.link.at)
        wire += self.startup_ns if start > self.link.at else self.gap_ns
        if stream is None and not to_gpu:
            wire = self.readback_ns
        if self.compute.at > start and stream is not None:
            wire *= 1 + self.link_slowdown_gpu
        lane.at = self.link.at = start + wire
        if not pinned:
            self.now = lane.at

    def run(self, work):
        self.now += self.eager_ns
        return self._compute(work)

    def capture(self, work):
        graph = FakeGraph(work, work.run())
        self.kept.append(graph)
        return graph

    def launch(self, graph) -> None:
        self.now += self.launch_ns
        self._compute(graph.work)

    def _compute(self, work):
        start = max(self.now, self.compute.at)
        time = max(work.nbytes / self.gpu_bytes_per_s, work.flops / self.gpu_flops_per_s) * 1e9
        time = time if work.name in ("read", "copy", "gemv_chain", "gemm") else self.kernel_ns
        if self.link.at > start:
            time *= 1 + self.gpu_slowdown
        self.compute.at = start + time
        self._delay_copies(start, time, self.link_slowdown_gpu)
        return work.run()

    def _delay_copies(self, start: float, duration: float, slowdown: float) -> None:
        """Copies under way advance at 1 / (1 + slowdown) from start on."""
        self.on_link = [each for each in self.on_link if each.at > self.now or each is self.link]
        for each in self.on_link:
            left = max(0.0, each.at - start)
            each.at += slowdown * min(left, duration / (1 + slowdown))

    def on_host(self, work):
        time = max(work.nbytes / self.cpu_bytes_per_s, work.flops / self.cpu_flops_per_s) * 1e9
        if self.link.at > self.now:
            time *= 1 + self.cpu_slowdown
        self._delay_copies(self.now, time, self.link_slowdown_cpu)
        self.now += time
        return work.run()

    def synchronize(self) -> None:
        self.now = max(self.now, self.compute.at, self.link.at)

    def random(self, *shape):
        return torch.randn(*shape, dtype=self.dtype).mul_(0.02)

    def device_bytes(self, nbytes):
        return torch.zeros(nbytes, dtype=torch.uint8)

    def pageable(self, nbytes):
        return self._host(nbytes, "pageable")

    def pinned(self, nbytes):
        self.now += nbytes * 1e9 / self.pin_bytes_per_s
        return self._host(nbytes, "pinned")

    def register(self, buffer) -> None:
        self.now += buffer.nbytes * 1e9 / self.pin_bytes_per_s
        self.kinds[buffer.untyped_storage().data_ptr()] = "pinned"
        self.registered.add(buffer.data_ptr())

    def unregister(self, buffer) -> None:
        self.registered.remove(buffer.data_ptr())

    def _host(self, nbytes, kind):
        buffer = torch.zeros(nbytes, dtype=torch.uint8)
        self.kinds[buffer.untyped_storage().data_ptr()] = kind
        self.kept.append(buffer)  # or its address would come again as device memory
        return buffer

    def _kind(self, tensor) -> str:
        return self.kinds.get(tensor.untyped_storage().data_ptr(), "device")


@pytest.fixture(scope="module")
def rehearsal():
    torch.manual_seed(0)
    rig = FakeRig()
    results = list(measure(rig, SMALL, list(PARTS)))
    assert rig.registered == set(), "pinned memory is left behind"
    return results


def readings_of(results) -> dict[str, Reading]:
    readings = [result for result in results if isinstance(result, Reading)]
    assert len({reading.name for reading in readings}) == len(readings)
    return {reading.name: reading for reading in readings}


@pytest.fixture(scope="module")
def readings(rehearsal) -> dict[str, Reading]:
    return readings_of(rehearsal)


@pytest.fixture(scope="module")
def points(rehearsal) -> list[CurvePoint]:
    return [result for result in rehearsal if isinstance(result, CurvePoint)]


# Statistics and the fit


def test_summary_is_the_median_and_half_the_10_90_range():
    assert summary(range(101)) == Value(50.0, 40.0, 101)
    assert summary([7.0]) == Value(7.0, 0.0, 1)
    with pytest.raises(ValueError, match="no samples"):
        summary([])


def test_rates_are_those_of_each_sample():
    assert rate(8_000, [1_000.0, 2_000.0, 4_000.0]).value == 4e9


def test_excess_is_a_fraction_and_never_negative():
    assert excess([10, 10, 12], [12, 12.5, 13]).value == pytest.approx(0.25)
    assert excess([10.0], [9.0]).value == 0.0


def test_the_fit_finds_rate_start_up_and_gap():
    sizes = powers_of_two(64 * KIB, 256 * MIB)
    alone = {n: 8_000 + n * 1e9 / 55e9 for n in sizes}
    queued = {n: 5_300 + n * 1e9 / 55e9 for n in sizes}
    fit = fit_link(alone, queued)
    assert fit.bytes_per_s == pytest.approx(55e9)
    assert fit.startup_ns == pytest.approx(8_000)
    assert fit.gap_ns == pytest.approx(5_300)
    assert max(map(abs, residuals(fit, alone, queued))) < 1e-6


def test_the_fit_bears_noise():
    rng = np.random.default_rng(0)
    sizes = powers_of_two(64 * KIB, 256 * MIB)

    def noisy(constant: float) -> dict[int, float]:
        return {n: (constant + n * 1e9 / 55e9) * rng.normal(1, 0.01) for n in sizes}

    alone, queued = noisy(8_000), noisy(5_300)
    fit = fit_link(alone, queued)
    assert fit.bytes_per_s == pytest.approx(55e9, rel=0.02)
    assert fit.startup_ns == pytest.approx(8_000, rel=0.05)
    assert fit.gap_ns == pytest.approx(5_300, rel=0.05)
    assert 0.002 < max(map(abs, residuals(fit, alone, queued))) < 0.05


def test_a_gap_below_zero_is_none():
    sizes = powers_of_two(64 * KIB, MIB)
    alone = {n: 8_000 + n / 50 for n in sizes}
    queued = {n: n / 50 - 100 for n in sizes}
    fit = fit_link(alone, queued)
    assert fit.gap_ns == 0
    assert fit.startup_ns == pytest.approx(8_000, rel=0.05)
    assert fit.bytes_per_s == pytest.approx(50e9, rel=0.05)


def test_times_that_do_not_grow_are_refused():
    sizes = powers_of_two(64 * KIB, MIB)
    falling = {n: 1e9 / n for n in sizes}
    with pytest.raises(CalibrationError, match="does not grow"):
        fit_link(falling, falling)


# The rehearsal: what is measured is what the machine is


def test_every_field_but_a_models_is_measured(readings):
    wanted = set(load_hardware("h200-pcie5").provenance) - set(MODEL_FIELDS)
    wanted |= {f"predictor_ns.{name}" for name in ("next_gate", "learned", "map_search")}
    assert wanted <= set(readings)


@pytest.mark.parametrize(
    ("name", "is_", "within"),
    [
        ("link_bytes_per_s", FakeRig.link_bytes_per_s, 0.01),
        # A landing is seen at the next poll, and the event is recorded while the copy runs.
        ("link_startup_ns", FakeRig.startup_ns - FakeRig.event_ns, 0.03),
        ("link_gap_ns", FakeRig.gap_ns, 0.03),
        ("pinned_d2h_bytes_per_s", FakeRig.d2h_bytes_per_s, 0.15),
        ("pageable_h2d_bytes_per_s", FakeRig.pageable_bytes_per_s, 0.1),
        ("gpu_memory_bytes", 64 * 2**30, 0),
        ("gpu_bytes_per_s", FakeRig.gpu_bytes_per_s, 0.001),
        ("gpu_copy_bytes_per_s", FakeRig.gpu_bytes_per_s, 0.001),
        ("gpu_gemv_chain_bytes_per_s", FakeRig.gpu_bytes_per_s, 0.001),
        ("gpu_flops_per_s", FakeRig.gpu_flops_per_s, 0.001),
        ("segment_launch_ns", FakeRig.launch_ns, 0.01),
        ("experts_launch_ns", FakeRig.launch_ns + FakeRig.issue_ns, 0.01),
        ("eager_launch_ns", FakeRig.eager_ns, 0.01),
        ("copy_issue_ns", FakeRig.issue_ns + FakeRig.event_ns, 0.01),
        ("copy_call_ns", FakeRig.issue_ns, 0.01),
        ("readback_ns", FakeRig.readback_ns, 0.05),
        ("segment_slowdown", FakeRig.gpu_slowdown, 0.001),
        ("experts_slowdown", FakeRig.gpu_slowdown, 0.001),
        ("link_slowdown_gpu", FakeRig.link_slowdown_gpu, 0.1),
        ("cpu_bytes_per_s", FakeRig.cpu_bytes_per_s, 0.001),
        ("cpu_flops_per_s", FakeRig.cpu_flops_per_s, 0.001),
        ("cpu_slowdown", FakeRig.cpu_slowdown, 0.01),
        ("link_slowdown_cpu", FakeRig.link_slowdown_cpu, 0.1),
        ("pin_touched_bytes_per_s", FakeRig.pin_bytes_per_s, 0.01),
        ("pin_allocator_bytes_per_s", FakeRig.pin_bytes_per_s, 0.01),
    ],
)
def test_the_rehearsal_finds_the_machines_values(readings, name, is_, within):
    assert readings[name].value.value == pytest.approx(is_, rel=within)


def test_the_learned_predictor_runs_where_it_is_faster(readings):
    both = [readings[f"learned_{side}_ns"].value.value for side in ("cpu", "gpu")]
    assert readings["predictor_ns.learned"].value.value == min(both)
    assert both[0] != both[1]


def test_the_curve_holds_every_kind_and_size(points):
    kinds = CurvePoint.model_fields["kind"].annotation.__args__
    assert [(p.kind, p.bytes) for p in points if p.kind == "pinned_h2d"] == [
        ("pinned_h2d", n) for n in SMALL.copies
    ]
    assert {(p.kind, p.bytes) for p in points} == {(k, n) for k in kinds for n in SMALL.copies}


def test_copies_beside_a_busy_gpu_are_slower_by_as_much(points):
    time = {(p.kind, p.bytes): p.ns for p in points}
    for nbytes in SMALL.copies:
        alone, busy = time["pinned_h2d", nbytes], time["pinned_h2d_gpu_busy", nbytes]
        hidden = FakeRig.issue_ns + FakeRig.query_ns
        assert busy - hidden == pytest.approx(
            (alone - hidden) * (1 + FakeRig.link_slowdown_gpu), abs=500
        )


# Work and memory


def test_decode_like_work_says_what_it_reads():
    work = segment(FakeRig(), SMALL, 3)
    assert work.run().shape == (1, SMALL.top_k)
    assert work.nbytes == 3 * 2 * (4 * 128 * 128 + 16 * 128)
    work = experts(FakeRig(), SMALL, 2)
    assert work.run().shape == (1, 128, 1)
    assert work.nbytes == 2 * 2 * 4 * 3 * 128 * 64


def test_an_expert_on_the_cpu_is_the_models():
    assert expert_shape("olmoe-1b-7b").nbytes == 12_582_912
    assert expert_shape("gpt-oss-20b").nbytes == pytest.approx(49.8e6, rel=0.01)


def test_an_expert_on_the_cpu_computes_the_expert():
    torch.manual_seed(1)
    shape = ExpertShape("tiny", 16, 8)
    buffer = torch.zeros(MIB, dtype=torch.uint8)
    fill(buffer)
    torch.manual_seed(2)
    x = torch.randn(1, 16).to(torch.bfloat16).double()
    torch.manual_seed(2)
    weights = buffer[: shape.nbytes].view(torch.bfloat16).double()
    up, down = weights[: 2 * 8 * 16].view(16, 16), weights[2 * 8 * 16 :].view(16, 8)
    gated, plain = (x @ up.T).chunk(2, dim=1)
    wanted = (torch.nn.functional.silu(gated) * plain) @ down.T
    work = expert_work(shape, Pool(buffer))
    torch.testing.assert_close(work.run().double(), wanted, rtol=0.05, atol=1e-5)


def test_a_pool_goes_around_and_refuses_what_it_cannot_hold():
    pool = Pool(torch.arange(16 * KIB, dtype=torch.int64).to(torch.uint8))
    starts = [pool.piece(6 * KIB).storage_offset() for _ in range(4)]
    assert starts == [0, 8 * KIB, 0, 8 * KIB]
    with pytest.raises(ValueError, match="more than the pool"):
        pool.piece(16 * KIB + 1)


def test_filled_memory_is_small_numbers_everywhere():
    buffer = torch.zeros(MIB + 3, dtype=torch.uint8)
    fill(buffer)
    numbers = buffer[:MIB].view(torch.bfloat16).float()
    assert bool(torch.isfinite(numbers).all())
    assert 0.015 < float(numbers.std()) < 0.025


# The profile


def machine_reading(name: str, value: float, unit="ns") -> Reading:
    return Reading(name, Value(value, value / 10, 5), unit, "by a test")


def all_measured(readings, points, name="h200-pcie5", date=None) -> Hardware:
    base = load_hardware("h200-pcie5")
    return update(base, name, "Fake GPU", list(readings.values()), points, date)


def test_a_whole_calibration_is_calibrated_and_keeps_a_models_values(readings, points):
    base, made = load_hardware("h200-pcie5"), all_measured(readings, points)
    assert made.calibrated
    assert set(not_measured(made)) == set(MODEL_FIELDS)
    for field in MODEL_FIELDS:
        assert getattr(made, field) == getattr(base, field)
        assert made.provenance[field].source.startswith("provisional; ")
        assert made.provenance[field].source.count("provisional") == 1
    source = made.provenance["link_bytes_per_s"].source
    assert source.startswith(f"{MEASURED}, Fake GPU; ")
    assert "half the 10-90 percentile range of 4 repeats" in source
    assert made.link_curve == tuple(points)
    others = {other.name for other in made.also_measured}
    assert {"pin_touched_bytes_per_s", "pageable_h2d_bytes_per_s", "learned_cpu_ns"} <= others


def test_a_date_is_noted_only_when_given(readings, points):
    assert "2026-01-02" not in render(all_measured(readings, points))
    assert "Fake GPU, 2026-01-02; " in render(all_measured(readings, points, date="2026-01-02"))


def test_a_profile_survives_being_written(readings, points, tmp_path):
    made = all_measured(readings, points)
    path = tmp_path / "h200-pcie5.yaml"
    path.write_text(render(made), encoding="utf-8")
    assert load_hardware(path) == made
    assert render(load_hardware(path)) == render(made)


def test_one_missing_value_and_it_is_not_calibrated(readings, points):
    some = {name: reading for name, reading in readings.items() if name != "cpu_slowdown"}
    # Under another name: what the base profile's own machine gave does not count.
    made = all_measured(some, points, name="another-machine")
    assert not made.calibrated
    assert "cpu_slowdown" in not_measured(made)
    assert made.provenance["cpu_slowdown"].source.startswith("provisional; ")


def test_parts_add_up(readings, points):
    names = [n for n in readings if n.startswith(("link", "pinned", "pageable", "small"))]
    base = load_hardware("h200-pcie5")
    first = update(base, "mine", "Fake GPU", [readings[n] for n in names], points)
    assert not first.calibrated
    rest = [reading for name, reading in readings.items() if name not in names]
    second = update(first, "mine", "Fake GPU", rest, [])
    assert second.calibrated
    assert second.link_curve == first.link_curve
    assert second.link_bytes_per_s == first.link_bytes_per_s
    assert {o.name for o in first.also_measured} < {o.name for o in second.also_measured}


def test_another_machines_measurements_are_provisional_here(readings, points):
    other = all_measured(readings, points)
    mine = update(other, "mine", "Another GPU", [machine_reading("link_gap_ns", 4_000)], [])
    assert not mine.calibrated
    assert not_measured(mine) == [n for n in not_measured_all(mine) if n != "link_gap_ns"]
    source = mine.provenance["link_bytes_per_s"].source
    assert source.startswith(f"provisional; from h200-pcie5; {MEASURED}, Fake GPU")
    assert mine.link_curve == ()
    assert mine.also_measured == ()


def not_measured_all(hardware: Hardware) -> list[str]:
    nested = [f"predictor_ns.{name}" for name in hardware.predictor_ns.provenance]
    return [*hardware.provenance, *nested]


def test_a_value_out_of_bounds_is_refused():
    base = load_hardware("h200-pcie5")
    wrong = machine_reading("link_bytes_per_s", 55.0, "bytes/s")
    with pytest.raises(UserError, match=r"calibration of mine: field 'link_bytes_per_s'"):
        update(base, "mine", "Fake GPU", [wrong], [])


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"ns": 10}, "is the time in ns"),
        ({"kind": "pinned"}, "kind"),
        ({"bytes": 0}, "bytes"),
        ({"spread_ns": -1}, "spread_ns"),
        ({"colour": 1}, "colour"),
    ],
)
def test_a_curve_with_a_slip_is_refused(change, says):
    point = {"kind": "pinned_h2d", "bytes": MIB, "ns": 27_000, "spread_ns": 10, **change}
    data = load_hardware("t4-pcie3").model_dump() | {"link_curve": [point]}
    with pytest.raises(ValueError, match=says):
        Hardware.model_validate(data)


def test_a_point_given_twice_is_refused():
    point = {"kind": "pinned_h2d", "bytes": MIB, "ns": 27_000, "spread_ns": 10}
    data = load_hardware("t4-pcie3").model_dump() | {"link_curve": [point, point]}
    with pytest.raises(ValueError, match="pinned_h2d of 1048576 bytes is given twice"):
        Hardware.model_validate(data)


def test_another_link_has_no_curve(readings, points):
    slower = all_measured(readings, points).with_link(10_000_000_000)
    assert slower.link_curve == ()
    assert not slower.calibrated


# The figure's values


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [
        (55_120_000_000, "bytes/s", "55.1 GB/s"),
        (4.2e12, "bytes/s", "4.20 TB/s"),
        (789e12, "flop/s", "789 TFLOP/s"),
        (812, "ns", "812 ns"),
        (9_320, "ns", "9.32 us"),
        (0.0421, "fraction", "4.2 %"),
        (2**34, "bytes", "16.00 GiB"),
    ],
)
def test_values_for_people(value, unit, text):
    assert shown(value, unit) == text


def test_the_figures_table_has_every_value(readings, points):
    made = all_measured(readings, points)
    rows = {name: measured for name, _, _, measured in value_rows(made)}
    assert set(rows) == set(not_measured_all(made))
    assert {name for name, measured in rows.items() if not measured} == set(MODEL_FIELDS)


# The command


def job(tmp_path: Path, **changes):
    options = {
        "out": tmp_path / "mine.yaml",
        "base": "h200-pcie5",
        "only": None,
        "date": None,
        "log": None,
        "figure": None,
        "replace": False,
        **changes,
    }
    return prepare(**options)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("calibrate")
    hardware = run(job(path, log=path / "log.jsonl"), FakeRig(), SMALL)
    return path, hardware


def test_a_run_writes_profile_figure_and_log(finished):
    path, hardware = finished
    assert sorted(p.name for p in path.iterdir()) == [
        "log.jsonl",
        "mine.png",
        "mine.svg",
        "mine.yaml",
    ]
    assert read_yaml(Hardware, path / "mine.yaml") == hardware
    assert hardware.name == "mine"
    assert hardware.calibrated
    assert (path / "mine.png").read_bytes()[:4] == b"\x89PNG"
    lines = [json.loads(line) for line in (path / "log.jsonl").read_text().splitlines()]
    assert lines[0]["machine"]["gpu"] == "Fake GPU"
    logged = {line["name"]: line for line in lines[1:] if "name" in line}
    assert hardware.link_gap_ns == round(logged["link_gap_ns"]["value"])
    assert set(logged["link_gap_ns"]) == {"name", "value", "spread", "repeats", "unit", "how"}
    assert sum("kind" in line for line in lines) == len(hardware.link_curve)


def test_the_same_measurements_give_the_same_bytes(finished, tmp_path):
    path, hardware = finished
    assert render(hardware) == (path / "mine.yaml").read_text(encoding="utf-8")
    for drawn in draw(hardware, tmp_path, "mine"):
        assert drawn.read_bytes() == (path / drawn.name).read_bytes()


def test_values_go_out_as_they_come(tmp_path, capsys):
    class Breaks(FakeRig):
        def random(self, *shape):
            if SMALL.read_rows in shape:
                raise RuntimeError("CUDA error")
            return super().random(*shape)

    with pytest.raises(RuntimeError, match="CUDA error"):
        run(job(tmp_path, only="link,memory"), Breaks(), SMALL)
    out, err = capsys.readouterr()
    names = [json.loads(line).get("name") for line in out.splitlines()]
    assert "link_bytes_per_s" in names
    assert "gpu_memory_bytes" in names
    assert "memory: " in err
    assert not (tmp_path / "mine.yaml").exists()


def test_only_some_parts(tmp_path, capsys):
    hardware = run(job(tmp_path, only="predictors"), FakeRig(), SMALL)
    assert set(not_measured_all(hardware)) - set(not_measured(hardware)) == {
        "predictor_ns.next_gate",
        "predictor_ns.learned",
        "predictor_ns.map_search",
    }
    assert [p.name for p in tmp_path.iterdir()] == ["mine.yaml"]  # no curve, no figure
    assert "not measured, kept from h200-pcie5: gpu_memory_bytes, " in capsys.readouterr().err


@pytest.mark.parametrize("name", ["mine.yaml", "mine.png", "mine.svg", "log.jsonl"])
def test_nothing_is_overwritten_unless_told(tmp_path, name):
    (tmp_path / name).write_text("precious")
    with pytest.raises(UserError, match=f"{name} exists already: .*--replace"):
        job(tmp_path, log=tmp_path / "log.jsonl")
    assert job(tmp_path, log=tmp_path / "log.jsonl", replace=True).name == "mine"


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"out": Path("mine.json")}, r"--out mine.json: name a \.yaml file"),
        ({"base": "h20"}, "did you mean 'h200-pcie5'"),
        ({"only": "link,gpus"}, "--only 'gpus' is no part; known: link, memory, "),
    ],
)
def test_wrong_options(tmp_path, changes, says):
    with pytest.raises(UserError, match=says):
        job(tmp_path, **changes)


def test_parts_keep_their_order():
    assert parse_parts("cpu, link") == ["link", "cpu"]
    assert parse_parts(None) == list(PARTS)


def app() -> typer.Typer:
    made = typer.Typer(rich_markup_mode=None)

    @made.callback()
    def nothing() -> None: ...

    register(made)
    return made


def test_help_has_an_example():
    done = CliRunner().invoke(app(), ["calibrate", "--help"])
    assert done.exit_code == 0
    assert "Example: moesim calibrate --out" in done.stdout


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_one_line_says_so(tmp_path):
    done = CliRunner().invoke(app(), ["calibrate", "--out", str(tmp_path / "mine.yaml")])
    assert isinstance(done.exception, UserError)
    assert str(done.exception).startswith("no CUDA GPU here: run moesim calibrate on a machine")
    assert "\n" not in str(done.exception)
    assert list(tmp_path.iterdir()) == []


def test_a_gpu_that_was_never_busy_is_noticed(tmp_path):
    class Idle(FakeRig):
        kernel_ns = 1

        def done(self, event):
            super().done(event)
            return True

    with pytest.raises(CalibrationError, match="not busy"):
        list(measure(Idle(), replace(SMALL, rounds=2), ["link"]))


@pytest.mark.gpu
def test_calibration_on_a_gpu(tmp_path):
    from replay.calibrate.cuda import CudaRig

    sizes = replace(
        Sizes(), rounds=3, repeats=10, pool_bytes=256 * MIB, copies=powers_of_two(4 * KIB, 16 * MIB)
    )
    hardware = run(job(tmp_path), CudaRig(), sizes)
    assert hardware.calibrated
    assert math.isclose(hardware.gpu_memory_bytes, torch.cuda.mem_get_info()[1])
