"""Quotas: pure functions of them, live changes that survive a restart, and admission with a reason."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import stratakv
from stores import assert_right, config, geometry, kv_of, tokens_of
from stratakv.quotas import admit, bounds, check

SHAPE = geometry(block_tokens=8, head_dim=32)
MIB = 1 << 20


def put(cache: stratakv.ModelCache, seed: int, tokens: int = 64, tenant: str = "") -> int:
    ids = tokens_of(seed, tokens)
    return cache.put(ids, kv_of(ids, SHAPE), layout="LKHND", tenant=tenant)


sizes = st.integers(0, 1 << 40)


@st.composite
def limits(draw: st.DrawFn) -> stratakv.Limits:
    reserved, soft, hard = sorted(draw(st.tuples(sizes, sizes, sizes)))
    return stratakv.Limits(
        reserved_bytes=reserved,
        soft_bytes=draw(st.sampled_from([None, soft])),
        hard_bytes=draw(st.sampled_from([None, hard])),
    )


@given(limits(), sizes, st.none() | sizes, st.integers(1, 1 << 30))
def test_a_share_is_never_below_its_reserve_nor_above_its_limits(
    limit: stratakv.Limits, floor: int, most: int | None, step: int
) -> None:
    new_floor, new_most = bounds(limit, floor, None if most is None else max(most, floor), step)
    reserved = -(-limit.reserved_bytes // step) * step
    assert new_floor >= reserved
    assert new_most is None or new_floor <= new_most
    for cap in (limit.soft_bytes, limit.hard_bytes):
        assert cap is None or new_most <= max(cap, reserved)
    # More may be had where nothing forbids it.
    if limit == stratakv.Limits():
        assert (new_floor, new_most) == (floor, None if most is None else max(most, floor))


@given(st.lists(sizes, max_size=6), sizes, st.integers(1, 1 << 30))
def test_what_is_reserved_fits_or_is_refused(reserved: list[int], capacity: int, step: int) -> None:
    quotas = [(f"model {n}", stratakv.Quota(ram={"reserved_bytes": bytes_})) for n, bytes_ in enumerate(reserved)]
    fits = sum(-(-bytes_ // step) * step for bytes_ in reserved) <= capacity
    if fits:
        check(quotas, {"ram": (capacity, step)})
    else:
        with pytest.raises(stratakv.InputError, match="quotas reserve"):
            check(quotas, {"ram": (capacity, step)})


accounts = st.dictionaries(
    st.text(min_size=1, max_size=3),
    st.tuples(
        st.builds(
            stratakv.Quota,
            ram=st.builds(stratakv.Limits, hard_bytes=st.none() | sizes),
            tokens_per_s=st.none() | st.floats(0.1, 1e6),
            loads=st.none() | st.integers(0, 8),
        ),
        st.builds(stratakv.Usage, tokens_left=st.none() | st.integers(0, 1 << 20), loads=st.integers(0, 8)),
    ),
    max_size=3,
)


@given(st.integers(0, 1 << 20), st.integers(1, 256), st.integers(1, 1 << 20), accounts)
def test_admission_is_what_the_tightest_quota_lets_through(
    tokens: int, block_tokens: int, block_bytes: int, held: dict[str, tuple[stratakv.Quota, stratakv.Usage]]
) -> None:
    found = admit(tokens, block_tokens, block_bytes, held)
    assert found.tokens % block_tokens == 0
    assert found.tokens <= tokens
    for quota, usage in held.values():
        hard = quota.limits("ram").hard_bytes
        assert hard is None or found.tokens // block_tokens * block_bytes <= hard
        rate = quota.tokens_per_s
        assert rate is None or usage.tokens_left is None or found.tokens <= usage.tokens_left
        assert quota.loads is None or usage.loads < quota.loads or not found.may_load
    limited = found.tokens < tokens // block_tokens * block_tokens or not found.may_load
    assert limited == (found.reason is not None)
    # Another quota never lets more through.
    for name in held:
        fewer = {other: account for other, account in held.items() if other != name}
        assert admit(tokens, block_tokens, block_bytes, fewer).tokens >= found.tokens


def test_a_quota_is_met_while_running_and_ends_when_it_is_lifted() -> None:
    with stratakv.open(config(None, ram="16MiB")) as caches:
        cache = caches.register("model", SHAPE)
        caches.set_quota({"ram": {"hard_bytes": "2MiB"}}, model="model")
        for seed in range(40):
            put(cache, seed, 256)
            assert caches.status().model_usage["model"].ram_bytes <= 2 * MIB
        assert cache.stats().tiers["ram"].used_bytes > MIB
        caches.set_quota(None, model="model")
        for seed in range(100):
            put(cache, seed, 256)
        assert cache.stats().tiers["ram"].used_bytes > 8 * MIB


def test_a_tenant_at_its_limit_costs_nobody_else_anything() -> None:
    with stratakv.open(config(None, ram="16MiB")) as caches:
        cache = caches.register("model", SHAPE)
        caches.set_quota(stratakv.Quota(ram=stratakv.Limits(hard_bytes="1MiB")), tenant="greedy")
        for seed in range(20):
            assert put(cache, seed, tenant="modest") == 64
        for seed in range(200):
            put(cache, seed, 256, tenant="greedy")
        for seed in range(20):
            assert cache.match(tokens_of(seed, 64), tenant="modest").tokens == 64
        status, snapshot = caches.status(), caches.snapshot()
        assert MIB // 2 < status.tenant_usage["greedy"].ram_bytes <= MIB
        assert snapshot.tenants["modest"].hit_blocks == 160
        assert caches.tenant_stats("modest") == snapshot.tenants["modest"]


def test_a_prompt_is_told_what_quotas_let_it_do_and_a_miss_says_so() -> None:
    with stratakv.open(config(None)) as caches:
        cache = caches.register("model", SHAPE)
        assert cache.admission(1000, tenant="t") == stratakv.Admission(tokens=1000, may_load=True, reason=None)
        caches.set_quota({"tokens_per_s": 1e-6}, tenant="t")
        assert put(cache, 1, 64, tenant="t") == 8
        told = cache.admission(64, tenant="t")
        assert told.tokens == 0
        assert "tenant 't': 1e-06 tokens a second, 0 left now" in str(told.reason)
        with cache.match(tokens_of(1, 64), tenant="t") as hit:
            assert (hit.tokens, hit.explain().reason) == (8, "quota")
        assert cache.admission(64).reason is None
        caches.set_quota({"ram": {"hard_bytes": 20_000}, "loads": 0}, model="model")
        told = cache.admission(64)
        assert (told.tokens, told.may_load) == (8, False)
        assert "model 'model': hard limit of 20000 bytes of ram, 1 blocks" in str(told.reason)
        assert cache.stats().put_over_quota_blocks == 7


def test_live_changes_survive_a_restart_and_win_over_the_configuration(tmp_path: Path) -> None:
    quotas = stratakv.QuotasConfig(models={"model": {"loads": 7}}, tenants={"x": {"loads": 8}, "y": {"loads": 9}})
    first = replace(config(tmp_path), quotas=quotas)
    with stratakv.open(first) as caches:
        caches.register("model", SHAPE)
        assert caches.quotas("models")["model"].loads == 7
        caches.set_quota({"ram": {"hard_bytes": "1MiB"}}, tenant="x")
        caches.set_quota(None, tenant="y")
        caches.set_quota({"ssd": {"reserved_bytes": "2MiB"}}, model="model")
    with stratakv.open(first) as caches:
        assert set(caches.quotas("tenants")) == {"x"}
        assert caches.quotas("models") == {"model": stratakv.Quota(ssd=stratakv.Limits(reserved_bytes=2 * MIB))}
        cache = caches.register("model", SHAPE)
        assert caches.status().ssd_shares["model"] >= 2 * MIB
        for seed in range(40):
            put(cache, seed, 256, tenant="x")
            assert caches.status().tenant_usage["x"].ram_bytes <= MIB


def test_damaged_quotas_are_told_and_cost_nothing_else(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with stratakv.open(config(tmp_path)) as caches:
        cache = caches.register("model", SHAPE)
        put(cache, 1)
        caches.set_quota({"loads": 3}, tenant="x")
    (tmp_path / "quotas").write_bytes(b"something else")
    with caplog.at_level(logging.WARNING), stratakv.open(config(tmp_path)) as caches:
        assert "quotas that were set before are not known" in caplog.text
        assert caches.quotas("tenants") == {}
        assert assert_right(caches.register("model", SHAPE), tokens_of(1, 64)).loaded_tokens == 64
        caches.set_quota({"loads": 4}, tenant="x")
    with stratakv.open(config(tmp_path)) as caches:
        assert caches.quotas("tenants")["x"].loads == 4


def test_shares_keep_what_is_reserved_for_a_model_and_no_more_than_its_soft_limit() -> None:
    with stratakv.open(config(None, ram="64MiB")) as caches:
        for name in ("a", "b", "c"):
            caches.register(name, SHAPE)
        caches.set_models(strategy="priority", floor=0.0)
        caches.set_quota({"ram": {"reserved_bytes": "40MiB"}}, model="a")
        caches.set_quota({"ram": {"soft_bytes": "4MiB"}}, model="b")
        shares = caches.status().ram_shares
        assert (shares["a"], shares["b"], shares["c"]) == (40 * MIB, 4 * MIB, 20 * MIB)
        # It may use what is idle all the same.
        for seed in range(300):
            put(caches["b"], seed, 256)
        assert caches.status().model_usage["b"].ram_bytes > 40 * MIB


@pytest.mark.parametrize(
    ("quota", "who", "says"),
    [
        ({"ram": {"hard_bytes": 100}}, {"model": "model"}, "100 bytes of ram, expected 0 or at least"),
        ({"ssd": {"hard_bytes": 100_000}}, {"model": "model"}, "one segment"),
        ({"ram": {"hard_bytes": "1GiB", "soft_bytes": "2GiB"}}, {"tenant": "t"}, "expected them to rise"),
        ({"ram": {"reserved_bytes": "1TiB"}}, {"tenant": "t"}, "quotas reserve"),
        ({"ssd": {"reserved_bytes": "1TiB"}}, {"model": "model"}, "quotas reserve"),
        ({"ram": {"herd_bytes": 1}}, {"tenant": "t"}, "did you mean 'hard_bytes'"),
        ({"ram": 7}, {"tenant": "t"}, "expected a stratakv.Limits"),
        ({"ram": {"hard_bytes": "much"}}, {"tenant": "t"}, "hard_bytes is 'much'"),
        ({"ram": {"hard_bytes": False}}, {"tenant": "t"}, "hard_bytes is False"),
        ({"tokens_per_s": 0}, {"tenant": "t"}, "tokens_per_s is 0"),
        ({"loads": -1}, {"tenant": "t"}, "loads is -1"),
        ({"loads": 1}, {}, "just one of them"),
        ({"loads": 1}, {"model": "model", "tenant": "t"}, "just one of them"),
        (7, {"tenant": "t"}, "expected a stratakv.Quota"),
    ],
)
def test_a_quota_that_makes_no_sense_is_refused_and_changes_nothing(
    tmp_path: Path, quota: object, who: dict[str, str], says: str
) -> None:
    with stratakv.open(config(tmp_path)) as caches:
        caches.register("model", SHAPE)
        with pytest.raises(stratakv.InputError, match=says):
            caches.set_quota(quota, **who)
        assert caches.quotas("models") == caches.quotas("tenants") == {}
        with pytest.raises(stratakv.ModelNotFoundError):
            caches.set_quota({"loads": 1}, model="other")


def test_a_configured_quota_that_does_not_fit_refuses_the_model_and_costs_it_nothing(tmp_path: Path) -> None:
    with stratakv.open(config(tmp_path)) as caches:
        put(caches.register("model", SHAPE), 1)
    for limits in ({"ssd": {"hard_bytes": 100_000}}, {"ram": {"hard_bytes": 100}}):
        wrong = stratakv.QuotasConfig(models={"model": limits})
        with stratakv.open(replace(config(tmp_path), quotas=wrong)) as caches:
            with pytest.raises(stratakv.InputError, match="expected 0 or at least"):
                caches.register("model", SHAPE)
            assert list(caches) == []
    with stratakv.open(config(tmp_path)) as caches:
        assert assert_right(caches.register("model", SHAPE), tokens_of(1, 64)).loaded_tokens == 64


def test_what_was_reserved_in_a_larger_tier_keeps_no_smaller_one_from_opening(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with stratakv.open(config(tmp_path, ram="32MiB")) as caches:
        caches.register("model", SHAPE)
        caches.set_quota({"ram": {"reserved_bytes": "20MiB", "hard_bytes": "30MiB"}}, model="model")
    with stratakv.open(config(tmp_path, ram="4MiB")) as caches:
        assert "what was reserved before is not" in caplog.text
        assert caches.quotas("models")["model"].limits("ram") == stratakv.Limits(hard_bytes=30 * MIB)
        caches.register("model", SHAPE)
        caches.unregister("model")
        # Of a model that is gone it can be taken away, too.
        caches.set_quota(None, model="model")
        assert caches.quotas("models") == {}
        with pytest.raises(stratakv.ModelNotFoundError):
            caches.set_quota(None, model="model")


def test_a_rate_below_one_block_a_second_lets_a_block_through_now_and_then() -> None:
    with stratakv.open(config(None)) as caches:
        cache = caches.register("model", SHAPE)
        caches.set_quota({"tokens_per_s": 0.001}, tenant="t")
        assert cache.admission(64, tenant="t").tokens == 8
        assert put(cache, 1, 64, tenant="t") == 8
        assert cache.admission(64, tenant="t").tokens == 0


def test_quotas_come_from_the_configuration_file(tmp_path: Path) -> None:
    file = tmp_path / "stratakv.toml"
    file.write_text('[quotas.models.m.ram]\nhard_bytes = "1GiB"\n[quotas.tenants."a b"]\nloads = 3\n')
    quotas = stratakv.Config.load(file, {}).quotas
    assert quotas.models["m"].limits("ram").hard_bytes == 1 << 30
    assert quotas.tenants["a b"].loads == 3
    file.write_text("[quotas.tenants.a]\nload = 3\n")
    with pytest.raises(stratakv.ConfigError, match="did you mean 'loads'"):
        stratakv.Config.load(file, {})
