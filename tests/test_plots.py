from __future__ import annotations

import struct
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import matplotlib
import pandas as pd
import pytest

from configs.errors import UserError
from sim.plots import draw_breakdown, draw_hits, draw_pareto
from tests.test_ranking import failed, point, rows, sweep_frame

ALL = [draw_pareto, draw_hits, draw_breakdown]


def words(svg: Path) -> str:
    """What an SVG says: matplotlib draws glyphs and leaves the text in comments."""
    return svg.read_text(encoding="utf-8")


def png_size(path: Path) -> tuple[int, int]:
    content = path.read_bytes()
    assert content[:8] == b"\x89PNG\r\n\x1a\n"
    assert content[-8:-4] == b"IEND"
    width, height = struct.unpack(">II", content[16:24])
    return width, height


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The three figures of the small sweep, into a directory that was not there."""
    out = tmp_path_factory.mktemp("drawn") / "new"
    return [path for draw in ALL for path in draw(sweep_frame(), out)]


def test_figures_are_valid(drawn: list[Path]) -> None:
    assert [path.name for path in drawn] == [
        "pareto.png",
        "pareto.svg",
        "hits.png",
        "hits.svg",
        "breakdown.png",
        "breakdown.svg",
    ]
    assert set(drawn[0].parent.iterdir()) == set(drawn)
    for png, svg in zip(drawn[::2], drawn[1::2], strict=True):
        width, height = png_size(png)
        assert width > 1000
        assert height > 500
        assert ElementTree.parse(svg).getroot().tag.endswith("svg")


def test_figures_are_the_same_whatever_the_order_of_points(
    drawn: list[Path], tmp_path: Path
) -> None:
    shuffled = sweep_frame().sample(frac=1, random_state=1)
    before = dict(matplotlib.rcParams)
    again = [path for draw in ALL for path in draw(shuffled, tmp_path)]
    assert [path.read_bytes() for path in again] == [path.read_bytes() for path in drawn]
    assert dict(matplotlib.rcParams) == before


def test_a_figure_says_what_it_is_of(drawn: list[Path]) -> None:
    for svg in drawn[1::2]:
        assert "model-a (bf16 experts) on gpu-a, 24 GB/s" in words(svg)
        assert "routing of model-a-twin; time is estimated, not validated" in words(svg)


def test_calibrated_time_is_not_called_estimated(tmp_path: Path) -> None:
    svg = words(draw_hits(pd.DataFrame(rows(timing="calibrated")), tmp_path)[1])
    assert "routing of model-a-twin" in svg
    assert "estimated" not in svg


def test_pareto_names_policies_bounds_front_and_pick(drawn: list[Path]) -> None:
    svg = words(drawn[1])
    for text in (
        "GPU memory, whole model (GiB)",
        "TPOT (ms a token, mean)",
        "next-gate",
        "on-demand (no cache)",
        "all experts resident",
        "bound: belady",
        "bound: oracle-prefetch",
        "others: accuracy-q",
        "Pareto front",
        "pick: resident",
        "pick: fastest that fits",
    ):
        assert text in svg


def test_hits_and_breakdown_have_their_units(drawn: list[Path]) -> None:
    assert "hit rate (% of accesses)" in words(drawn[3])
    assert "budget (% of the experts)" in words(drawn[3])
    assert "time of a decode step (ms)" in words(drawn[5])
    assert "stall on late prefetches" in words(drawn[5])
    assert "stall on CPU experts" not in words(drawn[5])
    assert "resident (9.0 GiB)" in words(drawn[5])


def test_tick_labels_are_not_rounded(tmp_path: Path) -> None:
    rates = {"lru": (0.2, 0.4), "belady": (0.38, 0.475)}
    frame = pd.DataFrame(
        [
            point(policy, share, 10.0, **{"decode.hit_rate": rate})
            for policy, pair in rates.items()
            for share, rate in zip((0.25, 0.5), pair, strict=True)
        ]
    )
    assert "<!-- 2.5 -->" in words(draw_hits(frame, tmp_path)[1])


def test_the_gpu_limit_is_drawn_where_it_is_near(tmp_path: Path) -> None:
    near = pd.DataFrame(rows(**{"memory.gpu_memory_bytes": 6 * 2**30}))
    assert "GPU: 6.0 GiB" in words(draw_pareto(near, tmp_path / "near")[1])
    assert "GPU: " not in words(draw_pareto(sweep_frame(), tmp_path / "far")[1])


def test_resident_far_beyond_the_gpu_is_a_note(tmp_path: Path) -> None:
    small = {"memory.gpu_memory_bytes": 6 * 2**30}
    frame = pd.DataFrame([row for row in rows(**small) if row["policy"] != "belady"])
    frame = frame[(frame["policy"] == "resident") | (frame["expert_budget_bytes"] <= 4 * 2**30)]
    svg = words(draw_pareto(frame, tmp_path / "note")[1])
    assert "all resident: 9.0 GiB," in svg
    assert "5.00 ms, does not fit" in svg
    assert "all experts resident" not in svg
    svg = words(draw_breakdown(frame, tmp_path / "note")[1])
    assert "resident (9.0 GiB, does not fit)" in svg


def test_more_policies_than_colours(tmp_path: Path) -> None:
    crowd = [
        point("lru", share, (10 + i) / share, label=f"lru gamma={i}")
        for i in range(12)
        for share in (0.25, 0.5, 0.75)
    ]
    svg = words(draw_pareto(sweep_frame(*crowd), tmp_path)[1])
    assert "11 others" in svg
    svg = words(draw_breakdown(sweep_frame(*crowd), tmp_path)[1])
    assert "(18 of 21 policies)" in svg
    assert "on-demand" in svg


def test_links_are_panels_and_hardware_figures(tmp_path: Path) -> None:
    slow = {"link_bytes_per_s": 12_000_000_000}
    one = pd.DataFrame([*rows(), *rows(**slow)])
    paths = draw_pareto(one, tmp_path / "one")
    assert [path.name for path in paths] == ["pareto.png", "pareto.svg"]
    assert "link 12 GB/s" in words(paths[1])
    near = pd.DataFrame([*rows(link_bytes_per_s=12_010_000_000), *rows(**slow)])
    paths = draw_pareto(near, tmp_path / "near")
    assert [path.name for path in paths] == ["pareto.png", "pareto.svg"]
    assert "12.01 GB/s" in words(paths[1])
    both = pd.DataFrame([*rows(), *rows(**slow), *rows(hardware="gpu-b")])
    names = [path.name for path in draw_pareto(both, tmp_path / "both")]
    assert names == [
        "pareto-gpu-a.png",
        "pareto-gpu-a.svg",
        "pareto-gpu-b.png",
        "pareto-gpu-b.svg",
    ]
    each = pd.DataFrame([*rows(), *rows(hardware="gpu-b", **slow)])
    paths = draw_pareto(each, tmp_path / "each")
    assert [path.name for path in paths] == ["pareto.png", "pareto.svg"]
    assert "gpu-b, 12 GB/s" in words(paths[1])


@pytest.mark.parametrize("draw", ALL)
@pytest.mark.parametrize(
    "frame",
    [
        pd.DataFrame([point("resident", 1.0, 5.0)]),
        pd.DataFrame([point("lru", 0.5, 10.0)]),
        pd.DataFrame([point("belady", 0.5, 10.0), point("skip", 0.5, 9.0)]),
    ],
    ids=["resident", "one policy", "no choice"],
)
def test_the_smallest_sweeps_are_drawn(draw: Any, frame: pd.DataFrame, tmp_path: Path) -> None:
    assert png_size(draw(frame, tmp_path)[0]) > (0, 0)


def test_a_figure_is_not_written_over(drawn: list[Path]) -> None:
    before = [path.read_bytes() for path in drawn]
    assert draw_hits(sweep_frame(), drawn[0].parent) == drawn[2:4]
    other = pd.DataFrame(rows(geometry="model-b"))
    with pytest.raises(UserError, match=r"hits\.png: another figure is there"):
        draw_hits(other, drawn[0].parent)
    assert [path.read_bytes() for path in drawn] == before


@pytest.mark.parametrize("draw", ALL)
@pytest.mark.parametrize("frame", [pd.DataFrame(), pd.DataFrame([failed("lru", "too small")])])
def test_nothing_to_draw(draw: Any, frame: pd.DataFrame, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no point of this sweep succeeded: "):
        draw(frame, tmp_path / "out")
    assert not (tmp_path / "out").exists()
