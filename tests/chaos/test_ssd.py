"""SIGKILL at any instant, and damage to any byte: what was acknowledged is found, and no wrong byte is served."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import stratakv
from stores import assert_right, assert_sums, config, geometry, kv_of, tokens_of

pytestmark = pytest.mark.chaos

ROUNDS = int(os.environ.get("ROUNDS", "12"))
SHAPE = geometry(block_tokens=8, head_dim=32)

# Puts prompts for ever. After each flush it prints the numbers of the prompts that are durable now.
WRITER = """
import pathlib, sys
sys.path.insert(0, sys.argv[2])
import stratakv
from stores import config, kv_of, tokens_of
from test_ssd import SHAPE
caches = stratakv.open(config(pathlib.Path(sys.argv[1]), ram="4MiB", policy=sys.argv[4]))
cache = caches.register("model", SHAPE)
seed = int(sys.argv[3])
print("ready", flush=True)
while True:
    batch = range(seed, seed + 3)
    for seed in batch:
        tokens = tokens_of(seed, 64)
        cache.put(tokens, kv_of(tokens, SHAPE), layout="LKHND")
    caches.flush()
    print(*batch, flush=True)
    seed += 1
"""


def write_until_killed(path: Path, seed: int, delay_s: float, policy: str) -> list[int]:
    """Runs the writer, kills it, and returns what it had acknowledged."""
    tests = Path(__file__).parents[1]
    folders = os.pathsep.join([str(tests), str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    arguments = [sys.executable, "-c", WRITER, str(path), str(tests), str(seed), policy]
    with subprocess.Popen(
        arguments, stdout=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": folders}
    ) as writer:
        assert writer.stdout.readline() == "ready\n"
        time.sleep(delay_s)
        writer.send_signal(signal.SIGKILL)
        journal = writer.stdout.read()
    whole = journal[: journal.rfind("\n") + 1]
    return [int(number) for number in whole.split()]


def assert_books_equal_a_scan(
    caches: stratakv.CacheManager, path: Path, prompts: list[tuple[stratakv.ModelCache, int]]
) -> None:
    """Of a store just opened: what is counted is what can be found, and files take no more than the books say."""
    found = 0
    for cache, seed in prompts:
        with cache.match(tokens_of(seed, 64)) as hit:
            found += hit.tokens // SHAPE.block_tokens
    ssd, status = caches.stats().tiers["ssd"], caches.status()
    assert ssd.blocks == found == status.index_blocks
    files = sum(file.stat().st_blocks * 512 for file in path.iterdir())
    assert ssd.used_bytes <= files <= status.ssd_file_bytes <= status.ssd_capacity_bytes


@pytest.mark.timeout(600)
@pytest.mark.parametrize("policy", ["write_back", "write_through"])
def test_what_was_acknowledged_survives_sigkill_at_any_instant(tmp_path: Path, policy: str) -> None:
    chance = random.Random(1)
    acknowledged: list[int] = []
    ever: set[int] = set()
    for round_number in range(ROUNDS):
        new = write_until_killed(tmp_path, 1000 * round_number, chance.uniform(0.0, 0.25), policy)
        acknowledged = (acknowledged + new)[-60:]
        ever |= set(range(1000 * round_number, max(new, default=1000 * round_number) + 7))
        with stratakv.open(config(tmp_path)) as caches:
            cache = caches.register("model", SHAPE)
            assert_books_equal_a_scan(caches, tmp_path, [(cache, seed) for seed in ever])
            for seed in acknowledged:
                explanation = assert_right(cache, tokens_of(seed, 64))
                assert explanation.loaded_tokens == 64, (round_number, seed, str(explanation))
            # What was put last but not acknowledged may be there or not, and is right if it is.
            for seed in range(max(new, default=0) + 1, max(new, default=0) + 7):
                assert_right(cache, tokens_of(seed, 64))
            stats = caches.stats()
            assert stats.corrupt_blocks == 0
            assert_sums(stats)
    assert acknowledged


def damage(path: Path, chance: random.Random) -> str:
    """Injures one file in one of the ways in which disks fail."""
    file = chance.choice(sorted(path.glob("*.kv")))
    size = file.stat().st_size
    kind = chance.choice(["flip", "zero", "stale", "misplaced", "cut", "swapped", "replaced"])
    if kind == "swapped":
        one, other = sorted(path.glob("*.kv"))
        one.rename(path / "aside")
        other.rename(one)
        (path / "aside").rename(other)
        return kind
    if kind == "replaced":
        shutil.copyfile(next(each for each in path.glob("*.kv") if each != file), file)
        return kind
    with file.open("r+b") as handle:
        for _ in range(chance.choice([1, 8, 64])):
            at = chance.randrange(size)
            sector = at // 512 * 512
            if kind == "flip":
                handle.seek(at)
                byte = handle.read(1)[0]
                handle.seek(at)
                handle.write(bytes([byte ^ 1 << chance.randrange(8)]))
            elif kind == "cut":
                handle.truncate(max(4096, size - chance.randrange(size)))
                break
            else:
                source = {"zero": None, "stale": size - sector - 512, "misplaced": chance.randrange(size) // 512 * 512}[
                    kind
                ]
                content = b"\0" * 512
                if source is not None:
                    handle.seek(max(0, source))
                    content = handle.read(512).ljust(512, b"\0")
                handle.seek(sector)
                handle.write(content)
    return kind


def test_damage_anywhere_costs_misses_and_never_a_wrong_byte(tmp_path: Path) -> None:
    whole = tmp_path / "whole"
    with stratakv.open(config(whole)) as caches:
        for name in ("a", "b"):
            cache = caches.register(name, SHAPE)
            for seed in range(20):
                tokens = tokens_of(seed, 64)
                cache.put(tokens, kv_of(tokens, SHAPE), layout="LKHND")
    chance = random.Random(2)
    lost: dict[str, int] = {}
    for round_number in range(4 * ROUNDS):
        copy = tmp_path / "copy"
        shutil.copytree(whole, copy)
        kind = damage(copy, chance)
        with stratakv.open(config(copy)) as caches:
            both = [caches.register(name, SHAPE) for name in ("a", "b")]
            assert_books_equal_a_scan(caches, copy, [(cache, seed) for cache in both for seed in range(20)])
            for cache in both:
                for seed in range(20):
                    explanation = assert_right(cache, tokens_of(seed, 64))
                    missing = 64 - explanation.loaded_tokens
                    assert (missing == 0) == (explanation.reason is None), (round_number, kind)
                    lost[kind] = lost.get(kind, 0) + missing
                    # Asked again, what is left is right again, and what was bad is not asked twice.
                    again = assert_right(cache, tokens_of(seed, 64))
                    assert again.loaded_tokens == explanation.loaded_tokens
                    if missing:
                        tokens = tokens_of(seed, 64)
                        assert cache.put(tokens, kv_of(tokens, SHAPE), layout="LKHND") == 64
            assert_sums(caches.stats())
        shutil.rmtree(copy)
    assert all(lost.get(kind, 0) > 0 for kind in ("zero", "cut", "swapped", "replaced")), lost
