"""Models and directories: registering, sharing a store, opening and closing it."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

import stratakv
from stores import assert_right, config, geometry, kv_of, loaded, tokens_of


def put(cache: stratakv.ModelCache, seed: int, count: int = 16) -> int:
    tokens = tokens_of(seed, count)
    return cache.put(tokens, kv_of(tokens, cache.geometry), layout="LKHND")


def test_the_same_registration_gives_the_same_cache_and_another_is_refused(caches: stratakv.CacheManager) -> None:
    cache = caches.register("model", geometry())
    assert caches.register("model", geometry()) is cache
    assert caches["model"] is cache
    for other in ({"geometry": geometry(layers=4)}, {"weights_version": "2"}, {"priority": 6}):
        with pytest.raises(stratakv.ModelExistsError, match="registered already"):
            caches.register(**{"name": "model", "geometry": geometry()} | other)


@pytest.mark.parametrize(
    "wrong",
    [{"priority": 0}, {"priority": 11}, {"priority": "5"}, {"geometry": (1, 2)}, {"name": ""}, {"name": "x" * 600}],
)
def test_a_registration_that_makes_no_sense_is_refused(caches: stratakv.CacheManager, wrong: dict[str, object]) -> None:
    with pytest.raises(stratakv.InputError):
        caches.register(**{"name": "model", "geometry": geometry()} | wrong)
    assert list(caches) == []


def test_an_unknown_model_is_named_with_those_that_exist(caches: stratakv.CacheManager) -> None:
    caches.register("model", geometry())
    for ask in (caches.__getitem__, caches.unregister, caches.model_stats):
        with pytest.raises(stratakv.ModelNotFoundError, match="'nodel' is not registered"):
            ask("nodel")


def test_unregistering_frees_ram_and_disk_and_forgets_the_blocks(tmp_path: Path) -> None:
    with stratakv.open(config(tmp_path, policy="write_through")) as caches:
        put(caches.register("model", geometry()), 1)
        caches.flush()
        assert len(list(tmp_path.glob("*.kv"))) == 1
        caches.unregister("model")
        assert list(tmp_path.glob("*.kv")) == []
        assert {t.used_bytes for t in caches.stats().tiers.values()} == {0}
        assert caches.stats().put_blocks == 4
        assert loaded(caches.register("model", geometry()), tokens_of(1, 16))[1].loaded_tokens == 0


def test_a_closed_store_is_found_whole_when_it_is_opened_again(tmp_path: Path) -> None:
    for policy in ("write_back", "write_through"):
        path = tmp_path / policy
        with stratakv.open(config(path, policy=policy)) as caches:
            cache = caches.register("model", geometry(), weights_version="1")
            for seed in range(20):
                put(cache, seed)
        with stratakv.open(config(path)) as caches:
            other = caches.register("other", geometry())
            cache = caches.register("model", geometry(), weights_version="1")
            for seed in range(20):
                explanation = assert_right(cache, tokens_of(seed, 16))
                assert explanation.blocks == ("ssd",) * 4
            assert loaded(other, tokens_of(0, 16))[1].reason == "never_stored"
        with stratakv.open(config(path)) as caches:
            newer = caches.register("model", geometry(), weights_version="2")
            assert loaded(newer, tokens_of(0, 16))[1].loaded_tokens == 0


def test_the_disk_never_holds_more_than_the_cap(tmp_path: Path) -> None:
    cap = 4 << 20
    with stratakv.open(config(tmp_path, capacity_bytes=cap, ram="2MiB", policy="write_through")) as caches:
        cache = caches.register("model", geometry())
        for seed in range(150):
            put(cache, seed, 64)
            caches.flush()
            on_disk = sum(f.stat().st_blocks * 512 for f in tmp_path.iterdir())
            assert on_disk <= caches.status().ssd_file_bytes <= cap
        assert caches.stats().tiers["ssd"].evicted_blocks > 0
        assert assert_right(cache, tokens_of(149, 64)).loaded_tokens == 64
    with stratakv.open(config(tmp_path, capacity_bytes=cap // 2)) as caches:
        assert sum(f.stat().st_blocks * 512 for f in tmp_path.iterdir()) <= cap // 2
        cache = caches.register("model", geometry())
        for seed in range(150):
            assert_right(cache, tokens_of(seed, 64))
        assert cache.stats().hit_blocks > 0


def test_a_model_that_comes_later_gets_its_share_of_ram(tmp_path: Path) -> None:
    with stratakv.open(config(None, ram="16MiB")) as caches:
        first = caches.register("first", geometry())
        for seed in range(400):
            put(first, seed, 64)
        second = caches.register("second", geometry(layers=7, dtype="fp16"))
        for seed in range(100):
            put(second, seed, 64)
        for cache, last in ((first, 399), (second, 99)):
            assert cache.stats().tiers["ram"].used_bytes > 0
            assert assert_right(cache, tokens_of(last, 64)).loaded_tokens == 64


def test_a_block_larger_than_a_tier_is_refused_with_the_sizes(tmp_path: Path) -> None:
    big = geometry(layers=64, head_dim=128, kv_heads=32, block_tokens=64)
    with (
        stratakv.open(config(None)) as caches,
        pytest.raises(stratakv.ConfigError, match=r"ram\.capacity_bytes is 4194304"),
    ):
        caches.register("big", big)
    with (
        stratakv.open(config(tmp_path, ram="512MiB", capacity_bytes="8MiB")) as caches,
        pytest.raises(stratakv.ConfigError, match=r"ssd\.capacity_bytes is 8388608, too small"),
    ):
        caches.register("big", big)


def test_a_locked_directory_is_refused_until_it_is_closed(tmp_path: Path) -> None:
    first = stratakv.open(config(tmp_path))
    with pytest.raises(stratakv.StoreLockedError, match="in use by another process"):
        stratakv.open(config(tmp_path))
    first.close()
    stratakv.open(config(tmp_path)).close()


def test_a_directory_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(stratakv.StoreError, match="cannot use directory"):
        stratakv.open(config(tmp_path / "file"))
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o555)
        user = os.geteuid()
        os.seteuid(user or 65534)  # root may write anywhere
        try:
            with pytest.raises(stratakv.StoreError, match=r"make it writable.*Permission denied"):
                stratakv.open(config(Path(name)))
        finally:
            os.seteuid(user)


def test_another_secret_or_format_version_is_refused_and_nothing_is_lost(tmp_path: Path) -> None:
    with stratakv.open(config(tmp_path, secret="one")) as caches:
        put(caches.register("model", geometry()), 1)
    with pytest.raises(stratakv.StoreFormatError, match="another secret"):
        stratakv.open(config(tmp_path, secret="two"))
    (tmp_path / "saved").write_bytes((tmp_path / "store").read_bytes())
    (tmp_path / "store").write_bytes(b"\0" * 8192)
    with pytest.raises(stratakv.StoreFormatError, match="not a superblock"):
        stratakv.open(config(tmp_path, secret="one"))
    (tmp_path / "store").write_bytes((tmp_path / "saved").read_bytes())
    with stratakv.open(config(tmp_path, secret="one")) as caches:
        assert assert_right(caches.register("model", geometry()), tokens_of(1, 16)).loaded_tokens == 16


def test_a_directory_keeps_its_own_secret_readable_by_its_owner_alone(tmp_path: Path) -> None:
    stratakv.open(config(tmp_path)).close()
    assert stat.S_IMODE((tmp_path / "secret").stat().st_mode) == 0o600
    assert len((tmp_path / "secret").read_bytes()) == 32


def test_a_closed_store_says_so(tmp_path: Path) -> None:
    caches = stratakv.open(config(tmp_path))
    cache = caches.register("model", geometry())
    caches.close()
    caches.close()
    for call in (
        lambda: cache.match([1]),
        lambda: put(cache, 1),
        lambda: caches.register("b", geometry()),
        caches.flush,
    ):
        with pytest.raises(stratakv.ClosedError, match="closed"):
            call()


def test_a_fork_does_not_touch_the_parents_store(tmp_path: Path) -> None:
    script = """
import os, sys, pathlib
sys.path.insert(0, sys.argv[2])
import stratakv
from stores import config, geometry, assert_right, tokens_of, kv_of
caches = stratakv.open(config(pathlib.Path(sys.argv[1])))
cache = caches.register("model", geometry())
tokens = tokens_of(1, 16)
cache.put(tokens, kv_of(tokens, geometry()), layout="LKHND")
child = os.fork()
if child == 0:
    try:
        cache.match(tokens)
    except stratakv.ClosedError as error:
        os._exit(7 if "fork" in str(error) else 1)
    os._exit(2)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
assert assert_right(cache, tokens).loaded_tokens == 16
caches.close()
"""
    tests = str(Path(__file__).parents[1])
    subprocess.run([sys.executable, "-c", script, str(tmp_path), tests], check=True, timeout=60)


def test_a_full_disk_costs_misses_and_never_an_error_in_a_request(tmp_path: Path) -> None:
    """A file system of 1 MiB takes no segment: puts and matches go on in RAM, and flush says why."""
    if (
        os.geteuid() != 0
        or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(tmp_path)], check=False).returncode
    ):
        pytest.skip("needs the right to mount a small file system")
    try:
        caches = stratakv.open(config(tmp_path, policy="write_through"))
        cache = caches.register("model", geometry())
        for seed in range(30):
            put(cache, seed, 64)
        assert assert_right(cache, tokens_of(29, 64)).loaded_tokens == 64
        with pytest.raises(stratakv.StoreError, match=r"not on SSD.*No space left"):
            caches.flush()
        assert "No space left" in caches.status().ssd_read_only
        assert caches.stats().io_errors > 0
        with pytest.raises(stratakv.StoreError):
            caches.close()
    finally:
        subprocess.run(["umount", "--lazy", str(tmp_path)], check=True)


def test_swapped_files_of_two_models_serve_no_wrong_byte(tmp_path: Path) -> None:
    with stratakv.open(config(tmp_path)) as caches:
        for name in ("a", "b"):
            put(caches.register(name, geometry()), 1)
    one, two = sorted(tmp_path.glob("*.kv"))
    shutil.move(one, tmp_path / "aside")
    shutil.move(two, one)
    shutil.move(tmp_path / "aside", two)
    with stratakv.open(config(tmp_path)) as caches:
        for name in ("a", "b"):
            assert loaded(caches.register(name, geometry()), tokens_of(1, 16))[1].loaded_tokens == 0


def test_the_index_has_a_budget_refuses_when_it_is_full_and_counts() -> None:
    settings = stratakv.Config(
        ram=stratakv.RamConfig(capacity_bytes="16MiB"),
        ssd=stratakv.SsdConfig(enabled=False),
        store=stratakv.StoreConfig(index_bytes="1KiB"),
    )
    with stratakv.open(settings) as caches:
        cache = caches.register("model", geometry())
        tokens = tokens_of(0, 1024)
        cached = cache.put(tokens, kv_of(tokens, geometry()), layout="LKHND")
        status = caches.status()
        assert 0 < cached < 1024
        assert status.index_refused_blocks > 0
        assert status.index_blocks == cached // geometry().block_tokens
        assert status.index_bytes <= 96 * 13


def test_the_status_says_what_pages_the_kernel_gave(caches: stratakv.CacheManager) -> None:
    assert caches.status().ram_pages in ("untouched", "unknown")
    cache = caches.register("m", geometry())
    cache.put(tokens_of(1, 64), kv_of(tokens_of(1, 64), geometry()), layout="LKHND")
    status = caches.status()
    assert status.ram_pages in ("huge", "mixed", "ordinary", "unknown")
    assert 0 <= status.ram_huge_bytes <= status.ram_capacity_bytes
    assert (status.ram_pages == "huge") <= (status.ram_huge_bytes > 0)
