"""Real file systems that are full or read-only: the SSD tier says so, serving goes on, and writing comes back."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

import stratakv
from stores import assert_right, assert_sums, config, geometry, kv_of, tokens_of
from stratakv.cli import main

pytestmark = pytest.mark.chaos

SHAPE = geometry(block_tokens=8, head_dim=32)


def mounted(*command: object) -> None:
    ran = subprocess.run(["mount", *map(str, command)], capture_output=True, text=True, check=False)
    if ran.returncode:
        pytest.skip(f"mount is not permitted here: {ran.stderr.strip()}")


@pytest.fixture(params=["tmpfs", "ext4"])
def small(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """A file system of 8 MiB; one of them has no O_DIRECT."""
    folder = tmp_path / "mounted"
    folder.mkdir()
    if request.param == "tmpfs":
        mounted("-t", "tmpfs", "-o", "size=8m", "tmpfs", folder)
    else:
        image = tmp_path / "image"
        with image.open("wb") as file:
            file.truncate(8 << 20)
        made = subprocess.run(["mkfs.ext4", "-q", "-m", "0", str(image)], capture_output=True, check=False)
        if made.returncode:
            pytest.skip("mkfs.ext4 does not run here")
        mounted("-o", "loop", image, folder)
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def put(cache: stratakv.ModelCache, seeds: range) -> None:
    for seed in seeds:
        tokens = tokens_of(seed, 64)
        cache.put(tokens, kv_of(tokens, SHAPE), layout="LKHND")


def test_a_full_file_system_stops_writes_and_nothing_else(small: Path) -> None:
    ballast = small / "ballast"
    ballast.write_bytes(b"x" * (4 << 20))
    with stratakv.open(config(small / "store", ram="8MiB", capacity_bytes="32MiB")) as caches:
        cache = caches.register("model", SHAPE)
        put(cache, range(40))
        with pytest.raises(stratakv.StoreError, match="No space left"):
            caches.flush()
        assert "No space left" in str(caches.status().ssd_read_only)
        # What is in RAM, and what had been written, is served.
        assert all(assert_right(cache, tokens_of(seed, 64)).loaded_tokens == 64 for seed in range(40))
        written = caches.stats().tiers["ssd"].blocks
        ballast.unlink()
        caches.flush()
        assert caches.status().ssd_read_only is None
        assert_sums(caches.stats())
        assert caches.stats().tiers["ssd"].blocks > written
    with stratakv.open(config(small / "store", capacity_bytes="32MiB")) as caches:
        cache = caches.register("model", SHAPE)
        assert all(assert_right(cache, tokens_of(seed, 64)).loaded_tokens == 64 for seed in range(40))


def test_a_file_system_that_becomes_read_only_stops_writes_and_its_directory_can_be_looked_at(small: Path) -> None:
    with stratakv.open(config(small / "store", capacity_bytes="6MiB")) as caches:
        cache = caches.register("model", SHAPE)
        put(cache, range(8))
    mounted("-o", "remount,ro", small)
    with pytest.raises(stratakv.StoreError, match=r"set ssd\.path: Read-only file system"):
        stratakv.open(config(small / "store", capacity_bytes="6MiB"))
    assert main(["ssd", "verify", str(small / "store")]) == 0
    mounted("-o", "remount,rw", small)
    with stratakv.open(config(small / "store", capacity_bytes="6MiB")) as caches:
        cache = caches.register("model", SHAPE)
        assert all(assert_right(cache, tokens_of(seed, 64)).loaded_tokens == 64 for seed in range(8))
