"""Whoever a policy spares least makes room first; nobody is left out."""

from __future__ import annotations

from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

import stratakv
from stratakv.victims import Heat, VictimPolicy, order

heats = st.dictionaries(
    st.text(min_size=1, max_size=4),
    st.builds(
        Heat,
        idle_s=st.floats(0, 1e6),
        blocks=st.floats(0, 1e9),
        held_bytes=st.integers(0, 1 << 40),
        loss=st.floats(0, 1e9),
    ),
    max_size=8,
)


@given(st.sampled_from(get_args(VictimPolicy)), heats, st.integers(0, 100))
def test_every_model_is_named_once(policy: VictimPolicy, models: dict[str, Heat], turn: int) -> None:
    assert sorted(order(policy, models, turn)) == sorted(models)


@given(heats.filter(len), st.integers(1, 5))
def test_in_round_robin_each_is_first_equally_often(models: dict[str, Heat], rounds: int) -> None:
    first = [order("round_robin", models, turn)[0] for turn in range(rounds * len(models))]
    assert all(first.count(name) == rounds for name in models)


def test_each_policy_spares_what_it_is_named_for() -> None:
    models = {
        "a": Heat(idle_s=1, blocks=5, held_bytes=300, loss=0.3),
        "b": Heat(idle_s=9, blocks=9, held_bytes=200, loss=0.1),
        "c": Heat(idle_s=5, blocks=1, held_bytes=100, loss=0.2),
    }
    first = {policy: order(policy, models)[0] for policy in get_args(VictimPolicy)}
    assert first == {"lru": "b", "lfu": "c", "smallest": "c", "round_robin": "a", "utility": "b"}
    assert order("lru", models) == ["b", "c", "a"]


def test_an_unknown_policy_is_named_with_those_that_exist() -> None:
    with pytest.raises(stratakv.InputError, match="'mru', expected one of lru, lfu, smallest, round_robin, utility"):
        order("mru", {})  # type: ignore[arg-type]
