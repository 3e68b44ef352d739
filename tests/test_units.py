"""Sizes, rates and budgets: what is read, what is refused, what is written back."""

import doctest
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from configs import units
from configs.errors import UserError
from configs.units import (
    BYTE_UNITS,
    ExpertBudget,
    format_bytes,
    parse_bytes,
    parse_expert_budget,
    parse_rate,
)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("4000MiB", 4000 * 2**20),
        ("8GiB", 8 * 2**30),
        (" 8 gib ", 8 * 2**30),
        ("12.5GB", 12_500_000_000),
        ("0.1GB", 100_000_000),
        (".5KiB", 512),
        ("1kB", 1000),
        ("1.9B", 1),
        (4096, 4096),
    ],
)
def test_sizes(text, expected):
    assert parse_bytes(text) == expected


@pytest.mark.parametrize(
    "text",
    ["0GiB", "-1GiB", "nanGiB", "infGB", "0.4B", "8 parsecs", "8Gb", "GiB", "", "1e3MiB", "٣GiB"],
)
def test_bad_sizes_are_named_and_examples_given(text):
    with pytest.raises(UserError, match=r"4000MiB, 8GiB or 12\.5GB$") as error:
        parse_bytes(text)
    assert repr(text) in str(error.value)


@pytest.mark.parametrize("number", [0, -5, True, 1.5])
def test_bad_numbers_of_bytes(number):
    with pytest.raises(UserError, match=f"size {number} "):
        parse_bytes(number)


def test_a_bare_number_asks_for_its_unit():
    with pytest.raises(UserError, match=r"size '4000' has no unit; give one, such as 4000MiB"):
        parse_bytes("4000")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("25GB/s", 25 * 10**9),
        ("12.5 GiB/s", 12_800 * 2**20),
        ("900MB/s", 900 * 10**6),
        ("25", 25 * 10**9),
        (25, 25 * 10**9),
        (0.1, 10**8),
        (1e-3, 10**6),
    ],
)
def test_rates(text, expected):
    assert parse_rate(text) == expected


def test_a_bare_rate_takes_the_unit_documented_for_it():
    assert parse_rate("900", default_unit="MB/s") == 900 * 10**6


@pytest.mark.parametrize(
    "text",
    ["0", "-3", "0GB/s", "25GB", "25Gbit/s", "16GT/s", "fast", "inf", 0, -1.0, math.nan, None],
)
def test_bad_rates(text):
    with pytest.raises(UserError, match=r"rate .*25GB/s") as error:
        parse_rate(text)
    assert str(text) in str(error.value)


@pytest.mark.parametrize(
    ("text", "kind", "value"),
    [
        ("4000MiB", "bytes", 4000 * 2**20),
        ("12.5GB", "bytes", 12_500_000_000),
        ("25%", "fraction", 0.25),
        ("33.3 %", "fraction", 0.333),
        ("100%", "fraction", 1.0),
        ("8/layer", "per_layer", 8),
        ("8 / layer", "per_layer", 8),
    ],
)
def test_expert_budgets(text, kind, value):
    assert parse_expert_budget(text) == ExpertBudget(kind, value)


@pytest.mark.parametrize(
    ("text", "canonical"),
    [
        ("4000MiB", "4000MiB"),
        ("4096MiB", "4GiB"),
        ("12.5GB", "12500MB"),
        ("1000GB", "1TB"),
        ("1.5B", "1B"),
        ("25.0%", "25%"),
        ("33.3%", "33.3%"),
        ("0.001%", "0.001%"),
        ("100%", "100%"),
        ("08/layer", "8/layer"),
    ],
)
def test_canonical_text(text, canonical):
    assert str(parse_expert_budget(text)) == canonical


@pytest.mark.parametrize(
    "text",
    ["0MiB", "-25%", "0%", "100.1%", "nan%", "inf/layer", "8.5/layer", "0/layer", "25", "8/expert"],
)
def test_bad_budgets(text):
    with pytest.raises(UserError, match="expert budget") as error:
        parse_expert_budget(text)
    assert repr(text) in str(error.value)


@pytest.mark.parametrize(
    ("kind", "value"),
    [("bytes", 0), ("bytes", 1.5), ("fraction", 1.5), ("fraction", math.nan), ("slots", 3)],
)
def test_a_budget_cannot_be_built_wrong(kind, value):
    with pytest.raises(UserError, match="expert budget"):
        ExpertBudget(kind, value)


budgets = st.one_of(
    st.builds(ExpertBudget, st.just("bytes"), st.integers(1, 2**60)),
    st.builds(ExpertBudget, st.just("fraction"), st.floats(0, 1, exclude_min=True)),
    st.builds(ExpertBudget, st.just("per_layer"), st.integers(1, 10**6)),
)


@given(budgets)
def test_a_budget_survives_its_own_text(budget):
    assert parse_expert_budget(str(budget)) == budget
    assert str(parse_expert_budget(str(budget))) == str(budget)


@given(st.integers(1, 10**12), st.sampled_from(sorted(BYTE_UNITS)))
def test_whole_numbers_of_a_unit_are_exact(count, unit):
    assert parse_bytes(f"{count}{unit}") == count * BYTE_UNITS[unit]
    assert parse_rate(f"{count}{unit}/s") == count * BYTE_UNITS[unit]


@given(st.integers(0, 2**60))
def test_shown_bytes_are_near_the_true_ones(n):
    number, unit = format_bytes(n).split()
    assert abs(float(number) - n / BYTE_UNITS[unit]) <= 0.005 + 1e-9 * float(number)
    assert unit == "TiB" or float(number) < 1024


@pytest.mark.parametrize(
    ("n", "shown"),
    [(0, "0 B"), (1023, "1023 B"), (4_194_304_000, "3.91 GiB"), (2**30 - 1, "1.00 GiB")],
)
def test_bytes_for_people(n, shown):
    assert format_bytes(n) == shown


def test_the_examples_in_the_docstrings_hold():
    result = doctest.testmod(units)
    assert result.attempted == 4
    assert result.failed == 0
