"""What a tier costs is learned, and what is not worth it is not done, but for a probe now and then."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stratakv.tiers.cost import Cost


@given(
    st.floats(1e-5, 1e-1),
    st.floats(1e6, 1e11),
    st.lists(st.integers(1 << 12, 1 << 26), min_size=2, max_size=40),
)
def test_latency_and_bandwidth_are_found_from_transfers_of_different_sizes(
    latency_s: float, bandwidth: float, sizes: list[int]
) -> None:
    cost = Cost()
    for size in sizes:
        cost.note(size, latency_s + size / bandwidth)
    expected = latency_s + max(sizes) / bandwidth
    assert cost.seconds(max(sizes)) == pytest.approx(expected, rel=0.5)
    if min(sizes[-2:]) * 3 < max(sizes[-2:]) and len(sizes) == 2:
        assert cost.seconds(10 * max(sizes)) == pytest.approx(latency_s + 10 * max(sizes) / bandwidth, rel=1e-3)


def test_nothing_is_known_before_the_first_transfer_and_then_all_is_worth_it() -> None:
    cost = Cost()
    assert (cost.terms(), cost.seconds(1 << 20)) == (None, None)
    assert cost.is_worth(1 << 20, 0.0)
    cost.note(1 << 20, 1.0)
    assert cost.is_worth(1 << 20, None)


def test_what_takes_longer_than_it_saves_is_left_but_for_one_of_sixteen() -> None:
    cost = Cost()
    cost.note(1 << 20, 1.0)
    assert cost.is_worth(1 << 20, 1.1)
    assert [cost.is_worth(1 << 20, 0.5) for _ in range(32)].count(True) == 2


def test_a_tier_that_recovers_is_known_to_have_after_some_transfers() -> None:
    cost, chance = Cost(), random.Random(1)
    for _ in range(50):
        size = chance.randrange(1 << 16, 1 << 24)
        cost.note(size, 0.5 + size / 1e7)
    slow = cost.seconds(1 << 22) or 0.0
    for _ in range(50):
        size = chance.randrange(1 << 16, 1 << 24)
        cost.note(size, 0.001 + size / 2e9)
    quick = cost.seconds(1 << 22) or 0.0
    assert slow > 0.8
    assert quick < 0.02
