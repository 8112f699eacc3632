"""What one call from Python costs: beside the bytes it moves, and in one thread against the machine's own copies.

The limits of one thread are two copies in C, compiled here: by non-temporal stores, as into a slab that nobody reads
soon, and by `rep movsb`, as into memory that the caller reads next.
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib
import itertools
import mmap
import platform
import subprocess
import tempfile
import time
from array import array
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from statistics import median

import numpy as np
from rows import Row, finish, row, skipped

import stratakv
from stratakv import Config, Geometry, RamConfig, SsdConfig, StoreConfig

ROUNDS = 2000
SMALL = Geometry(layers=2, kv_heads=2, head_dim=32, dtype="fp16", block_tokens=16)
# 32 tensors, as a model of 16 layers has them; of 64 bytes each, since it is not the bytes that is measured.
LAYERED = Geometry(layers=16, kv_heads=1, head_dim=2, dtype="fp16", block_tokens=16)


def spent(call: Callable[[], object]) -> float:
    """Microseconds of a call, the median; the clock's own share taken out."""
    clock = median(-(time.perf_counter_ns() - time.perf_counter_ns()) for _ in range(ROUNDS))
    # By then memory was touched, and is full: a put evicts.
    for _ in range(ROUNDS):
        call()
    each = []
    for _ in range(ROUNDS):
        started = time.perf_counter_ns()
        call()
        each.append(time.perf_counter_ns() - started - clock)
    return median(each) / 1000


def chain(tokens: np.ndarray) -> Iterator[bytes]:
    """Hashes of the blocks, as the simplest prefix cache has them."""
    last = b""
    for at in range(0, len(tokens), 16):
        last = hashlib.sha256(last + tokens[at : at + 16].tobytes()).digest()
        yield last


def radix() -> tuple[str, Callable[[], object]]:
    """A match in SGLang's radix tree where nothing parts from the prompt: one node, and so its best case."""
    ids = array("q", range(4096))
    tree = importlib.import_module("sglang.srt.mem_cache.radix_cache")
    base, torch = importlib.import_module("sglang.srt.mem_cache.base_prefix_cache"), importlib.import_module("torch")
    cache = tree.RadixCache.create_simulated(page_size=16)
    cache.insert(base.InsertParams(key=tree.RadixKey(token_ids=ids), value=torch.arange(4096)))
    match = lambda: cache.match_prefix(base.MatchPrefixParams(key=tree.RadixKey(token_ids=ids)))  # noqa: E731 - it is timed
    assert match().device_prefix_len == 4096
    return f"SGLang {version('sglang')} radix tree", match


COPIES = """
#include <immintrin.h>
#include <stddef.h>
__attribute__((target("avx2"))) void stream(char *to, const char *from, size_t bytes) {
    for (size_t at = 0; at < bytes; at += 64) {
        __m256i a = _mm256_loadu_si256((const __m256i *)(from + at));
        __m256i b = _mm256_loadu_si256((const __m256i *)(from + at + 32));
        _mm256_stream_si256((__m256i *)(to + at), a);
        _mm256_stream_si256((__m256i *)(to + at + 32), b);
    }
    _mm_sfence();
}
void movsb(char *to, const char *from, size_t bytes) {
    __asm__ volatile("rep movsb" : "+D"(to), "+S"(from), "+c"(bytes) : : "memory");
}
"""
BYTES = 2 << 20
BLOCK = Geometry(layers=16, kv_heads=4, head_dim=64, dtype="fp16", block_tokens=128)
SLOTS = 32


def one_thread() -> list[Row]:
    """Put and load of one block of 2 MiB, each call beside the limit."""
    if platform.machine() != "x86_64" or "avx2" not in Path("/proc/cpuinfo").read_text():
        return [row("put, load of 2 MiB, one thread: skipped, no AVX2", n=0)]
    with tempfile.TemporaryDirectory() as folder:
        source, library = Path(folder, "copies.c"), Path(folder, "copies.so")
        source.write_text(COPIES)
        subprocess.run(["cc", "-O2", "-shared", "-fPIC", "-o", library, source], check=True)
        copies = ctypes.CDLL(str(library))
    slab = mmap.mmap(-1, (SLOTS + 1) * BYTES)
    slab.madvise(mmap.MADV_HUGEPAGE)
    slots = np.frombuffer(slab, np.uint8)
    first = -slots.ctypes.data % BYTES
    slots = slots[first : first + SLOTS * BYTES]
    slots[:] = 1
    kv = np.ones((16, 2, 4, 128, 64), np.float16)
    assert kv.nbytes == BYTES
    turn = itertools.count()
    # As many blocks as fit, so that each put takes the slot of the coldest.
    config = Config(
        ram=RamConfig(capacity_bytes=SLOTS * (BYTES + 8192), eviction="lru"),
        ssd=SsdConfig(enabled=False),
        store=StoreConfig(threads=1),
    )
    rows = []
    with stratakv.open(config) as caches:
        cache = caches.register("block", BLOCK)
        tokens = np.arange(128, dtype=np.uint32)
        ours, theirs = kv.ctypes.data, slots.ctypes.data

        def copy(function: Callable[..., None], into: bool) -> None:
            slot = theirs + next(turn) % SLOTS * BYTES
            to, start = (slot, ours) if into else (ours, slot)
            function(ctypes.c_void_p(to), ctypes.c_void_p(start), ctypes.c_size_t(BYTES))

        def measure(name: str, call: Callable[[], object], limit: str, bound: Callable[[], object]) -> None:
            pairs = [(one(call), one(bound)) for _ in range(20 * SLOTS)]
            mine, least = (BYTES / median(each) for each in zip(*pairs, strict=True))
            ratio = median(b / a for a, b in pairs)
            bounds = {"must": "ratio >= 0.8", "goal": "ratio >= 0.95"}
            more = {"limit": limit, "limit_value": least, "ratio": ratio}
            rows.append(row(name, mine, "GB/s", n=len(pairs), **bounds, **more))

        def one(call: Callable[[], object]) -> int:
            started = time.perf_counter_ns()
            call()
            return time.perf_counter_ns() - started

        for _ in range(4 * SLOTS):
            cache.put(tokens + next(turn) * 1000, kv, layout="LKHND")
        put = lambda: cache.put(tokens + next(turn) * 1000, kv, layout="LKHND")  # noqa: E731 - it is timed
        measure("put of 2 MiB, one thread", put, "non-temporal stores", lambda: copy(copies.stream, True))
        last = next(turn)
        for n in range(SLOTS // 2):
            cache.put(tokens + (last + n) * 1000, kv, layout="LKHND")
        hits = itertools.cycle([cache.match(tokens + (last + n) * 1000) for n in range(SLOTS // 2)])
        load = lambda: next(hits).load(kv, layout="LKHND")  # noqa: E731 - as above
        assert load() == 128
        measure("load of 2 MiB, one thread", load, "rep movsb", lambda: copy(copies.movsb, False))
    return rows


def main() -> None:
    """Measures every call on a store without SSD."""
    config = Config(ram=RamConfig(capacity_bytes="64MiB"), ssd=SsdConfig(enabled=False))
    rows: list[Row] = []

    def add(
        name: str,
        call: Callable[[], object],
        must: float | None = None,
        goal: float | None = None,
        peer: tuple[str, float] | None = None,
    ) -> None:
        bounds: Row = {
            "must": None if must is None else f"value < {must}",
            "goal": None if goal is None else f"value <= {goal}",
        }
        value = spent(call)
        if peer:
            bounds |= {"limit": peer[0], "limit_value": peer[1], "ratio": value / peer[1]}
        rows.append(row(name, value, "us", n=ROUNDS, **bounds))

    with stratakv.open(config) as caches:
        cache, layered = caches.register("small", SMALL), caches.register("layered", LAYERED)
        tokens = np.arange(4096, dtype=np.uint32)
        cache.put(tokens, np.ones((2, 2, 2, 4096, 32), np.float16), layout="LKHND")
        table = set(chain(tokens))
        peer = "set of chained SHA-256", spent(lambda: sum(block in table for block in chain(tokens)))
        add("match of 4,096 tokens, uint32", lambda: cache.match(tokens), 10, 5, peer)
        without = skipped("match of 4,096 tokens, SGLang", "torch", "sglang.srt.mem_cache.radix_cache")
        rows.extend(without)
        if not without:
            name, theirs = radix()
            add("match of 4,096 tokens, uint32, again", lambda: cache.match(tokens), 10, 5, (name, spent(theirs)))
        wide = tokens.astype(np.int64)
        add("match of 4,096 tokens, int64", lambda: cache.match(wide), 10, 5)
        ids = list(range(4096))
        add("match of 4,096 tokens, list", lambda: cache.match(ids))

        few = tokens[:16]
        one = np.ones((2, 2, 2, 16, 32), np.float16)
        turn = itertools.count(1)
        add("put of one new block, one array", lambda: cache.put(few + next(turn) * 5000, one, layout="LKHND"), 15, 8)
        pairs = [(np.ones((1, 1, 16, 2), np.float16), np.ones((1, 1, 16, 2), np.float16)) for _ in range(16)]
        add("put of one new block, 32 arrays", lambda: layered.put(few + next(turn) * 5000, pairs), 15, 8)
        cache.put(few, one, layout="LKHND")
        with cache.match(few) as hit:
            add("load of one block, one array", lambda: hit.load(one, layout="LKHND"), 15, 8)
        layered.put(few, pairs)
        with layered.match(few) as hit:
            add("load of one block, 32 arrays", lambda: hit.load(pairs), 15, 8)

        cache.put(few, one, layout="LKHND")

        def by_reference() -> None:
            with cache.match(few) as hit:
                hit.view(0)

        add("match and view of one block", by_reference, 3, 1)
    finish("ram", rows + one_thread())


if __name__ == "__main__":
    main()
