"""Routing: to where a request costs least, by what replicas have and have to do, and always with the reason."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import stratakv
from publishers import Engine, batch
from publishers import stored as published
from stratakv.events import PLACES, Cleared, Removed, Stored
from stratakv.router import LOAD_COSTS, Router


def stored(tokens: list[int], place: str = "gpu", block: int = 4, **more: object) -> Stored:
    """All blocks of a prompt, called by what they hold."""
    names = tuple(hash(tuple(tokens[: n * block])) for n in range(1, len(tokens) // block + 1))
    whole = tuple(tokens[: len(names) * block])
    return Stored(names=names, parent=None, tokens=whole, block_tokens=block, place=place, **more)


def router(*names: str, **options: object) -> Router:
    made = Router(**options)
    for name in names:
        made.add_replica(name, block_tokens=4)
    return made


PROMPT = list(range(100, 140))


def test_a_request_goes_to_the_longest_prefix_unless_too_much_waits_there() -> None:
    chooser = router("a", "b", "c")
    chooser.apply("a", [stored(PROMPT[:20])])
    chooser.apply("b", [stored(PROMPT[:32])])
    first = chooser.route(PROMPT)
    assert (first.replica, dict(first.candidates[0].hit_tokens)) == ("b", {"gpu": 32})
    chooser.report("b", load_tokens=50)
    second = chooser.route(PROMPT)
    assert second.replica == "a"
    assert "b: 40 of 40 tokens cached (32 in gpu, 8 in soon), 50 waiting" in str(second)


def test_a_cheap_tier_counts_for_more_than_a_slow_one() -> None:
    chooser = router("a", "b")
    chooser.apply("a", [stored(PROMPT, "ssd")])
    chooser.apply("b", [stored(PROMPT[:38], "ram")])
    # 40 tokens at a tenth each, or 36 at a fiftieth and 4 to compute.
    assert chooser.route(PROMPT).replica == "a"
    assert Router(load_costs={"ssd": 0.5}).policy == "cache_aware"
    slow = router("a", "b", load_costs={"ssd": 0.5})
    slow.apply("a", [stored(PROMPT, "ssd")])
    slow.apply("b", [stored(PROMPT[:38], "ram")])
    assert slow.route(PROMPT).replica == "b"


def test_requests_that_begin_alike_follow_one_another() -> None:
    now = 0.0
    chooser = router("a", "b", clock=lambda: now)
    first = chooser.route(PROMPT).replica
    other = "b" if first == "a" else "a"
    chooser.report(str(first), load_tokens=10)
    assert chooser.route(PROMPT).replica == first, "it will be there soon"
    now = 60.0
    assert chooser.route(PROMPT).replica == other, "it did not come"


def test_adapters_and_tenants_share_nothing() -> None:
    chooser = router("a", "b")
    chooser.apply("b", [stored(PROMPT, adapter="x", tenant="t")])
    assert chooser.route(PROMPT, adapter="x", tenant="t").replica == "b"
    for adapter, tenant in (("", ""), ("x", ""), ("", "t"), ("t", "x")):
        assert not chooser.route([*PROMPT], adapter=adapter, tenant=tenant).candidates[1].hit_tokens.get("gpu")


def test_who_is_ill_or_refuses_the_tenant_is_passed_over_and_said_so() -> None:
    chooser = router("a", "b")
    chooser.apply("a", [stored(PROMPT)])
    chooser.report("a", refuses={"t": "tenant 't': 5 tokens a second, 0 left now"})
    assert chooser.route(PROMPT).replica == "a"
    chooser.apply("a", [stored(PROMPT, tenant="t")])
    decision = chooser.route(PROMPT, tenant="t")
    assert decision.replica == "b"
    assert decision.candidates[1].excluded == "tenant 't': 5 tokens a second, 0 left now"
    assert "1 of 2 are excluded" in decision.reason
    chooser.report("b", unhealthy="no answer for 5 s")
    decision = chooser.route(PROMPT, tenant="t")
    assert (decision.replica, decision.reason) == (None, "every replica is excluded")
    assert chooser.route(PROMPT).replica == "a"
    assert chooser.route(PROMPT, model="other").reason == "no replica serves model 'other'"


def test_the_least_loaded_is_chosen_by_what_waits_there_alone() -> None:
    chooser = router("a", "b", policy="least_loaded")
    chooser.apply("a", [stored(PROMPT)])
    chooser.report("a", load_tokens=1)
    assert chooser.route(PROMPT).replica == "b"


def test_a_session_stays_with_its_variant_and_few_move_when_weights_change() -> None:
    chooser = Router()
    for name, variant in (("a1", "a"), ("a2", "a"), ("b1", "b")):
        chooser.add_replica(name, variant=variant)

    def variants(weights: dict[str, float]) -> dict[int, str]:
        chooser.set_weights(weights)
        return {n: str(chooser.route(PROMPT, session=str(n)).replica)[0] for n in range(2000)}

    nine, again, eight = variants({"a": 9, "b": 1}), variants({"a": 90, "b": 10}), variants({"a": 8, "b": 2})
    assert nine == again
    assert 0.86 < sum(each == "a" for each in nine.values()) / 2000 < 0.94
    moved = [n for n in nine if nine[n] != eight[n]]
    assert 0.05 < len(moved) / 2000 < 0.15
    assert all(nine[n] == "a" for n in moved), "only those move that have to"
    # Without a name a session is known by how it begins.
    assert len({str(chooser.route(PROMPT).replica)[0] for _ in range(20)}) == 1
    # Where a variant takes nothing, another does.
    chooser.report("b1", unhealthy="it is down")
    assert set(variants({"a": 0, "b": 1}).values()) == {"a"}


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: Router("best"), "policy is 'best', expected one of cache_aware, least_loaded"),
        (lambda: Router(load_costs={"tape": 1}), "'tape' is 1"),
        (lambda: Router(load_costs={"gpu": -1}), "'gpu' is -1"),
        (lambda: router("a", "a"), "replica 'a' is there already"),
        (lambda: Router().add_replica("a", block_tokens=0), "expected numbers above 0"),
        (lambda: Router().set_weights({"a": 0.0, "b": 0}), "sum to 0"),
        (lambda: Router().set_weights({"a": -1}), "weight of variant 'a' is -1"),
        (lambda: Router().set_weights({"a": float("nan")}), "weight of variant 'a' is nan"),
        (lambda: Router().report("a"), "replica 'a' is not there; known: none"),
        (lambda: router("a").report("a", load_tokens=-1), "load_tokens is -1"),
        (lambda: router("b").apply("a", []), "replica 'a' is not there; known: b"),
        (lambda: router("b").remove_replica("a"), "replica 'a' is not there"),
        (lambda: router("a").route([-1]), "non-negative integers"),
    ],
)
def test_bad_input_is_named(call: object, says: str) -> None:
    with pytest.raises(stratakv.InputError, match=says):
        call()


def test_a_replica_that_left_leaves_nothing_behind() -> None:
    chooser = router("a", "b")
    chooser.apply("a", [stored(PROMPT)])
    chooser.route(PROMPT)
    chooser.remove_replica("a")
    chooser.add_replica("c", block_tokens=4)
    decision = chooser.route(PROMPT)
    assert {each.replica: dict(each.hit_tokens) for each in decision.candidates} == {"b": {}, "c": {}}


class Simple:
    """What replicas have, without an index."""

    def __init__(self) -> None:
        self.blocks: dict[tuple[str, tuple[int, ...]], set[str]] = {}

    def hits(self, name: str, tokens: list[int]) -> dict[str, int]:
        found: dict[str, int] = {}
        for end in range(4, len(tokens) + 1, 4):
            places = self.blocks.get((name, tuple(tokens[:end])), set())
            if not places:
                break
            best = min(places, key=PLACES.index)
            found[best] = found.get(best, 0) + 4
        return found


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32))
def test_an_index_knows_what_a_list_of_all_blocks_knows(seed: int) -> None:
    dice = random.Random(seed)
    names = [f"r{n}" for n in range(dice.randrange(1, 12))]
    chooser, simple = router(*names, clock=lambda: 0.0), Simple()
    prompts = [[dice.randrange(3) for _ in range(24)] for _ in range(6)]
    for _ in range(60):
        name, tokens, place = dice.choice(names), dice.choice(prompts)[: 4 * dice.randrange(1, 7)], dice.choice(PLACES)
        what = dice.random()
        ends = [tuple(tokens[:end]) for end in range(4, len(tokens) + 1, 4)]
        if what < 0.6:
            chooser.apply(name, [stored(tokens, place)])
            for end in ends:
                simple.blocks.setdefault((name, end), set()).add(place)
        elif what < 0.95:
            gone = ends[dice.randrange(len(ends)) :]
            chooser.apply(name, [Removed(names=tuple(hash(end) for end in gone), place=place)])
            for end in gone:
                simple.blocks.get((name, end), set()).discard(place)
        else:
            chooser.apply(name, [Cleared()])
            simple.blocks = {key: places for key, places in simple.blocks.items() if key[0] != name}
    for tokens in prompts:
        fresh = chooser.route(tokens, model="")
        for each in fresh.candidates:
            known = {place: count for place, count in each.hit_tokens.items() if place != "soon"}
            expected = simple.hits(each.replica, tokens)
            if "soon" not in each.hit_tokens:
                assert known == expected
                saved = sum(count * (1 - LOAD_COSTS[place]) for place, count in expected.items())
                assert each.cost_tokens == pytest.approx(24 - saved)
        costs = [each.cost_tokens for each in fresh.candidates]
        assert costs == sorted(costs)


def test_the_command_explains_a_decision_by_what_replicas_publish(tmp_path: Path) -> None:
    engines = [Engine(), Engine()]
    try:
        engines[1].send(batch(published([1, 2], None, [5, 6, 7, 8])))
        rows = []
        for n, engine in enumerate(engines):
            events, replay = engine.endpoints()
            rows.append(f'[[replica]]\nname = "r{n}"\nevents = "{events}"\nreplay = "{replay}"\nblock_tokens = 2\n')
        (tmp_path / "replicas.toml").write_text("".join(rows))
        (tmp_path / "tokens.json").write_text(json.dumps([5, 6, 7, 8, 9]))
        command = [sys.executable, "-m", "stratakv.cli", "route", str(tmp_path / "replicas.toml"), "--listen", "1"]
        command += ["--tokens", str(tmp_path / "tokens.json")]
        done = subprocess.run([*command, "--explain"], capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        assert done.stdout.startswith("r1: it costs least there")
        assert "r1: 4 of 5 tokens cached (4 in gpu), 0 waiting; cost 1 tokens" in done.stdout
        assert "r0: 0 of 5 tokens cached, 0 waiting; cost 5 tokens" in done.stdout
        done = subprocess.run([*command, "--json"], capture_output=True, text=True, timeout=60)
        decision = json.loads(done.stdout)
        assert (decision["replica"], decision["tokens"]) == ("r1", 5)
        hits = {row["replica"]: row["hit_tokens"] for row in decision["candidates"]}
        assert hits == {"r1": {"gpu": 4}, "r0": {}}
        done = subprocess.run([*command, "--model", "x"], capture_output=True, text=True, timeout=60)
        assert (done.returncode, done.stdout) == (1, "no replica serves model 'x'\n")
        (tmp_path / "replicas.toml").write_text('policy = "best"')
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        assert (done.returncode, "policy is 'best'" in done.stderr) == (2, True)
    finally:
        for engine in engines:
            engine.close()
