"""A report in a browser: it opens, it filters, it fits narrow windows, and it fetches nothing."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sim.report import write_report
from tests.browser import chromium, chromium_path
from tests.reported import HOSTILE, VALIDATION, edited, hostile, swept

WIDE, NARROW = {"width": 1280, "height": 900}, {"width": 400, "height": 800}
FIXED = ["Pareto front of choices", "recommended"]
DRAWN = "name => document.querySelector(`#${name} .main-svg`) !== null"
SEEN = """name => document.getElementById(name).data
  .filter(trace => trace.visible === undefined || trace.visible === true)
  .map(trace => trace.name)"""


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    chromium_path()
    with chromium(tmp_path_factory.mktemp("profile"), viewport=WIDE) as context:
        yield context


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of two systems, with names that a browser must not take for tags."""
    folder = tmp_path_factory.mktemp("report")
    results = edited(swept(folder / "swept"), folder / "edited", hostile)
    return write_report(results, folder / "report.html", validations=[VALIDATION])[0]


class Opened:
    """A page with what it said and asked for."""

    def __init__(self, browser: Any, path: Path, size: dict[str, int]) -> None:
        self.page = browser.new_page()
        self.page.set_default_timeout(10_000)
        self.page.set_viewport_size(size)
        self.said: list[str] = []
        self.asked: list[str] = []
        self.page.on("console", lambda message: self.said.append(message.text))
        self.page.on("pageerror", lambda error: self.said.append(str(error)))
        self.page.on("dialog", lambda dialog: self.said.append(dialog.message))
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.page.goto(path.as_uri())

    def scroll_to(self, figure: str) -> None:
        """Figures are drawn when they are first seen."""
        self.page.locator(f"#{figure}").scroll_into_view_if_needed()
        self.page.wait_for_function(DRAWN, arg=figure)

    def show_system(self, number: int) -> None:
        """By the bar above; then scroll to its front."""
        self.page.locator(f"#system-{number}").check(force=True)
        self.scroll_to(f"pareto-{number}")

    def seen(self, figure: str) -> list[str]:
        """Names of the traces of a figure that are shown."""
        return [str(name) for name in self.page.evaluate(SEEN, figure)]

    def marks(self, figure: str) -> int:
        """Marks that are drawn."""
        return int(self.page.locator(f"#{figure} .scatterlayer .point").count())

    def choose(self, figure: str, entry: str) -> None:
        """An entry of the figure's menu, by mouse."""
        self.scroll_to(figure)
        self.page.locator(f"#{figure} .updatemenu-header").click()
        self.page.locator(f"#{figure} .updatemenu-dropdown-button", has_text=entry).first.click()


@pytest.fixture(scope="module")
def opened(browser: Any, report: Path) -> Opened:
    """One page for all tests, since it takes seconds to open: each begins by choosing."""
    return Opened(browser, report, WIDE)


def check_page(shown: Opened, report: Path, size: dict[str, int], shot: Path) -> None:
    """No errors, no requests, nothing wider than the window; a picture is taken."""
    page = shown.page
    for details in page.query_selector_all("details"):
        details.evaluate("element => { element.open = true }")
    names = page.evaluate("[...document.querySelectorAll('.figure')].map(each => each.id)")
    assert len(names) == 2 * 3 + 3
    assert page.locator(".main-svg").count() == 0  # the page is there before its figures
    for name in names:
        if name.endswith("-2"):
            shown.show_system(2)
        elif name.endswith("-1"):
            shown.show_system(1)
        shown.scroll_to(name)
        box = page.locator(f"#{name} .main-svg").first.bounding_box()
        assert box["x"] >= 0
        assert box["x"] + box["width"] <= size["width"]
        assert box["width"] > 0.85 * min(size["width"], 1080)
    width = page.evaluate("[document.documentElement.scrollWidth, document.body.scrollWidth]")
    assert max(width) <= size["width"]
    page.screenshot(path=shot, full_page=True)
    assert shown.said == []
    assert shown.asked == [report.as_uri()]
    assert page.evaluate("window.pwned") is None
    print(f"{size['width']} px: {len(names)} figures, {shot.stat().st_size} bytes of picture")


def test_it_opens_quietly_and_nothing_sticks_out(
    opened: Opened, report: Path, tmp_path: Path
) -> None:
    check_page(opened, report, WIDE, tmp_path / "wide.png")


def test_the_menu_and_the_legend_filter_policies(opened: Opened) -> None:
    opened.show_system(1)
    opened.choose("pareto-1", "all policies")
    everything, marks = opened.seen("pareto-1"), opened.marks("pareto-1")
    assert everything[:2] == FIXED
    assert len(everything) == 10
    opened.choose("pareto-1", "choices only")
    choices = opened.seen("pareto-1")
    assert set(choices) < set(everything)
    assert not [name for name in choices if ": " in name]
    assert opened.marks("pareto-1") < marks
    opened.choose("pareto-1", "only lru")
    assert opened.seen("pareto-1") == [*FIXED, "lru"]
    opened.choose("pareto-1", "all policies")
    assert (opened.seen("pareto-1"), opened.marks("pareto-1")) == (everything, marks)
    legend = opened.page.locator("#pareto-1 .legend .traces", has_text="lru")
    legend.first.locator(".legendtoggle").click()
    opened.page.wait_for_function(
        "document.getElementById('pareto-1').data.some(each => each.visible === 'legendonly')"
    )
    left = set(everything) - set(opened.seen("pareto-1"))
    assert len(left) == 1
    assert opened.said == []


def test_a_key_chooses_the_system(opened: Opened) -> None:
    page = opened.page
    first, second = page.locator("#pareto-1"), page.locator("#pareto-2")
    opened.show_system(1)
    assert (first.is_visible(), second.is_visible()) == (True, False)
    page.locator("#system-1").focus()
    page.keyboard.press("ArrowRight")
    assert page.locator("#system-2").is_checked()
    assert (first.is_visible(), second.is_visible()) == (False, True)
    links = "[...document.querySelectorAll('a[href]')].map(each => each.getAttribute('href'))"
    assert all(link.startswith("#") for link in page.evaluate(links))
    assert page.locator("#pareto-1 .modebar-btn").count() == 4
    shown = [panel.is_visible() for panel in page.locator(".panel-1, .panel-2").all()]
    assert shown == [False, True] * 4
    for name in ("fronts", "pareto-2"):
        opened.scroll_to(name)
    width = page.locator("#fronts .main-svg").first.bounding_box()["width"]
    assert second.locator(".main-svg").first.bounding_box()["width"] == width


def test_many_systems_are_a_list(browser: Any, tmp_path: Path) -> None:
    links = tuple(f"{rate}GB/s" for rate in range(10, 16))
    fields = {"hardware": ("laptop-pcie4x8",), "policies": ("lru",), "links": links}
    path = write_report(swept(tmp_path / "swept", **fields))[0]
    shown = Opened(browser, path, NARROW)
    page = shown.page
    assert [panel.is_visible() for panel in page.locator("#pareto .panel").all()].index(True) == 2
    page.locator("#system").select_option("laptop-pcie4x8, 15 GB/s")
    shown.scroll_to("pareto-6")
    assert [panel.is_visible() for panel in page.locator("#pareto .panel").all()].index(True) == 5
    assert page.evaluate("document.documentElement.scrollWidth") <= NARROW["width"]
    assert shown.said == []
    page.close()


def test_every_table_is_reached_by_keys(opened: Opened) -> None:
    page = opened.page
    page.evaluate("document.querySelectorAll('details').forEach(each => { each.open = false })")
    page.evaluate("document.activeElement.blur()")
    page.mouse.click(2, 2)
    names = []
    for _ in range(200):
        page.keyboard.press("Tab")
        name = page.evaluate(
            "document.activeElement.tagName + ' ' + (document.activeElement.textContent || '')"
            ".trim().slice(0, 40)"
        )
        if name.startswith("BODY"):
            break
        names.append(name)
        if name.startswith("SUMMARY"):
            page.keyboard.press("Enter")
    assert names[0].startswith("A Skip to the recommendation")
    words = " ".join(names)
    for heading in ("The pick on each system", "Fastest choice by budget", "All points by budget"):
        assert heading in words
    for heading in ("Parts of a decode step", "Popularity by MoE layer", "Error without sign"):
        assert heading in words


def test_a_mark_tells_what_it_is(opened: Opened) -> None:
    page = opened.page
    opened.show_system(1)
    opened.choose("pareto-1", "only slru path=")
    box = page.locator("#pareto-1 .scatterlayer .trace").last.locator(".point").last.bounding_box()
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    text = page.locator("#pareto-1 .hoverlayer").text_content()
    assert f"slru path={HOSTILE}" in text
    for part in ("budget ", "TPOT ", "TTFT ", "hits ", "GPU memory ", " GiB"):
        assert part in text


def test_the_budget_of_the_bars_is_chosen(opened: Opened) -> None:
    opened.show_system(1)
    opened.scroll_to("breakdown-1")
    before = opened.page.evaluate("document.getElementById('breakdown-1').layout.yaxis")
    opened.choose("breakdown-1", "budget 50 %")
    after = opened.page.evaluate("document.getElementById('breakdown-1').layout.yaxis")
    assert before["categoryarray"] != after["categoryarray"]


def test_a_narrow_window_and_one_that_becomes_wide(
    browser: Any, report: Path, tmp_path: Path
) -> None:
    """The legend must not come to lie on the marks."""
    shown = Opened(browser, report, NARROW)
    check_page(shown, report, NARROW, tmp_path / "narrow.png")
    shown.show_system(1)
    shown.page.set_viewport_size(WIDE)
    shown.page.wait_for_function(
        "document.querySelector('#pareto-1 .main-svg').getBoundingClientRect().width > 900"
    )
    legend = shown.page.locator("#pareto-1 .legend .bg").bounding_box()
    axis = shown.page.locator("#pareto-1 .xtitle").bounding_box()
    assert legend["y"] >= axis["y"] + axis["height"] - 1
    shown.page.close()
