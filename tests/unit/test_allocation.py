"""Every division keeps floors and limits and gives all there is; `dynamic` is the best of all divisions in steps."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import stratakv
from stratakv.allocation import STEPS, Claim, divide, worth

ALL = ("fair", "proportional", "priority", "dynamic")


def rising(values: list[float]) -> tuple[float, ...]:
    return tuple(np.concatenate([[0.0], np.cumsum(values)]))


curves = st.lists(st.sampled_from([0.0, 0.0, 0.0, 1.0, 5.0, 100.0]), min_size=STEPS, max_size=STEPS).map(rising)


@st.composite
def divisions(draw: st.DrawFn) -> tuple[int, dict[str, Claim]]:
    count = draw(st.integers(1, 5))
    capacity = draw(st.integers(1, 1 << 40))
    claims = {}
    for n in range(count):
        floor = draw(st.integers(0, capacity // count))
        limit = draw(st.none() | st.integers(floor, capacity))
        demand, priority = draw(st.floats(0, 1e12)), draw(st.integers(1, 10))
        claims[f"m{n}"] = Claim(
            floor_bytes=floor, limit_bytes=limit, priority=priority, demand=demand, curve=draw(curves)
        )
    return capacity, claims


@settings(deadline=None, max_examples=200)
@given(divisions(), st.sampled_from(ALL), st.booleans())
def test_floors_and_limits_hold_and_all_is_given(
    division: tuple[int, dict[str, Claim]], strategy: stratakv.allocation.Strategy, again: bool
) -> None:
    capacity, claims = division
    held = {name: capacity // (2 + n) for n, name in enumerate(claims)} if again else None
    shares = divide(strategy, capacity, claims, held)
    limits = {name: capacity if claim.limit_bytes is None else claim.limit_bytes for name, claim in claims.items()}
    assert all(claims[name].floor_bytes <= shares[name] <= limits[name] for name in claims)
    assert sum(shares.values()) == min(capacity, sum(limits.values()))


@settings(deadline=None, max_examples=200)
@given(divisions(), st.sampled_from(ALL), st.integers(1, 1 << 30))
def test_shares_are_whole_steps_and_within_limits(
    division: tuple[int, dict[str, Claim]], strategy: stratakv.allocation.Strategy, step: int
) -> None:
    capacity, claims = division
    shares = divide(strategy, capacity, claims, step_bytes=step)
    limits = {name: capacity if claim.limit_bytes is None else claim.limit_bytes for name, claim in claims.items()}
    assert all(share % step == 0 and share <= limits[name] for name, share in shares.items())
    assert sum(shares.values()) == min(capacity // step, sum(limit // step for limit in limits.values())) * step
    # A floor that is no whole number of steps is missed by less than one, where all of them together have no room.
    assert all(shares[name] > min(claims[name].floor_bytes, limits[name] // step * step) - step for name in claims)


@settings(deadline=None, max_examples=200)
@given(divisions(), st.sampled_from(("proportional", "priority")), st.integers(0, 4))
def test_who_claims_more_gets_no_less(
    division: tuple[int, dict[str, Claim]], strategy: stratakv.allocation.Strategy, which: int
) -> None:
    capacity, claims = division
    name = list(claims)[which % len(claims)]
    claim = claims[name]
    more = {"demand": claim.demand * 2 + 1, "priority": min(10, claim.priority + 1)}
    raised = claims | {name: Claim(floor_bytes=claim.floor_bytes, limit_bytes=claim.limit_bytes, **more)}
    # Whole bytes are rounded by themselves.
    assert divide(strategy, capacity, raised)[name] >= divide(strategy, capacity, claims)[name] - len(claims)


def test_weights_are_kept_where_nothing_stands_against_it() -> None:
    claims = {"a": Claim(priority=1, demand=3e9), "b": Claim(priority=4), "c": Claim(priority=5, demand=1e9)}
    assert divide("priority", 1000, claims) == {"a": 100, "b": 400, "c": 500}
    assert divide("proportional", 1000, claims) == {"a": 750, "b": 0, "c": 250}
    assert divide("fair", 999, claims) == {"a": 333, "b": 333, "c": 333}
    assert divide("fair", 1000, {}) == {}
    limited = claims | {"a": Claim(demand=3e9, limit_bytes=100), "c": Claim(demand=1e9, limit_bytes=200)}
    assert divide("proportional", 1000, limited) == {"a": 100, "b": 700, "c": 200}


@settings(deadline=None, max_examples=50)
@given(st.lists(curves, min_size=3, max_size=3))
def test_dynamic_is_the_best_of_all_divisions_in_steps(all_curves: list[tuple[float, ...]]) -> None:
    claims = {f"m{n}": Claim(curve=curve) for n, curve in enumerate(all_curves)}
    shares = divide("dynamic", STEPS, claims)
    pairs = itertools.product(range(STEPS + 1), repeat=2)
    best = max(
        all_curves[0][one] + all_curves[1][two] + all_curves[2][STEPS - one - two]
        for one, two in pairs
        if one + two <= STEPS
    )
    assert worth(STEPS, claims, shares) == pytest.approx(best)


def test_dynamic_crosses_a_cliff_and_leaves_a_model_its_floor() -> None:
    """A loop that hits nothing below 40 steps, beside one that gains a little from each."""
    cliff = tuple(0.0 if step < 40 else 100.0 for step in range(STEPS + 1))
    slope = tuple(float(step) for step in range(STEPS + 1))
    claims = {"loop": Claim(curve=cliff), "chat": Claim(curve=slope)}
    assert divide("dynamic", 6400, claims) == {"loop": 4000, "chat": 2400}
    held_back = {"loop": Claim(curve=cliff), "chat": Claim(curve=slope, floor_bytes=2450)}
    assert divide("dynamic", 6400, held_back)["chat"] >= 2450
    idle = {"a": Claim(curve=(0.0,) * (STEPS + 1)), "b": Claim(curve=(0.0,) * (STEPS + 1))}
    assert divide("dynamic", 6400, idle) == {"a": 3200, "b": 3200}


def test_dynamic_goes_half_the_way_and_not_at_all_for_a_hundredth() -> None:
    steep = tuple(float(step) for step in range(STEPS + 1))
    claims = {"a": Claim(curve=steep), "b": Claim(curve=tuple(step / 10 for step in steep))}
    assert divide("dynamic", 6400, claims) == {"a": 6400, "b": 0}
    assert divide("dynamic", 6400, claims, {"a": 3200, "b": 3200}) == {"a": 4800, "b": 1600}
    almost = {"a": Claim(curve=steep), "b": Claim(curve=tuple(step * 0.995 for step in steep))}
    assert divide("dynamic", 6400, almost, {"a": 3200, "b": 3200}) == {"a": 3200, "b": 3200}
    assert divide("dynamic", 6400, claims, {"gone": 6400}) == {"a": 6400, "b": 0}


@pytest.mark.parametrize(
    ("strategy", "claims", "says"),
    [
        ("greedy", {}, "expected one of fair, proportional, priority, dynamic"),
        ("fair", {"a": Claim(floor_bytes=60), "b": Claim(floor_bytes=50)}, "above the capacity of 100"),
        ("fair", {"a": Claim(floor_bytes=60, limit_bytes=50)}, "above its limit, 50"),
        ("dynamic", {"a": Claim(curve=(0.0, 1.0))}, "a curve of 2 values, expected 65"),
    ],
)
def test_what_cannot_be_divided_is_refused(strategy: str, claims: dict[str, Claim], says: str) -> None:
    with pytest.raises(stratakv.InputError, match=says):
        divide(strategy, 100, claims)  # type: ignore[arg-type]
