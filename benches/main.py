"""What the cache is worth, and how near it comes to what the machine can do.

Sections: `ttft` (a forward pass, cold and from each tier), `copy` (put and load against memcpy), `lmcache` (put and
load against LMCache's CPU backend), `size` (import time and wheel). Limits are measured in the same run, in turns with
the values: machines are noisy, so `ratio` is the median over neighbouring pairs, and 1.0 means at the limit. Nothing
fails here: a row is `ok` or not. What is not installed is skipped by name. `ARGS="copy size"` runs these two alone.
"""

from __future__ import annotations

import ctypes
import importlib
import itertools
import os
import random
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from importlib.metadata import version
from statistics import median
from typing import Any

import numpy as np
from rows import OUT, ROOT, Row, paired, row, run, skipped

import stratakv
from stratakv import Config, Geometry, ModelCache, RamConfig, SsdConfig

MIB = 1 << 20
REPEATS = 9
# Keys and values of Llama 3.2 1B: 32 KiB per token, and the shortest rows that common models have.
GEOMETRY = Geometry(layers=16, kv_heads=8, head_dim=64, dtype="fp16")
ROTATE_BYTES = 512 * MIB  # Buffers are taken in turn: no processor cache holds what comes next.
BATCH_BYTES = 64 * MIB  # What is timed at once.

Batch = Callable[[range], float]  # Works through the buffers of these numbers; seconds.
Tensor = DynamicCache = Any  # Of libraries that may be missing.


def buffers(size: int) -> tuple[np.ndarray, np.ndarray]:
    """Sources and targets of so many bytes, each `[layers, planes, heads, tokens, dim]`, all pages touched."""
    shape = (GEOMETRY.layers, GEOMETRY.planes, GEOMETRY.kv_heads, size // GEOMETRY.token_bytes, GEOMETRY.head_dim)
    both = np.empty((2, ROTATE_BYTES // size, *shape), np.uint16)
    both[:] = np.random.default_rng(0).integers(0, 1 << 16, shape, np.uint16)
    return both[0].view(np.float16), both[1].view(np.float16)


class Copier:
    """A store without SSD whose arena is full and touched: every put evicts, and copies into warm pages."""

    def __init__(self, stack: ExitStack, sources: Sequence[Tensor]) -> None:
        config = Config(ram=RamConfig(capacity_bytes=ROTATE_BYTES * 5 // 4), ssd=SsdConfig(enabled=False))
        caches = stack.enter_context(stratakv.open(config))
        self.cache, self.threads, self.right = caches.register("bench", GEOMETRY), caches.status().threads, True
        self._random, self._turn, self._tokens = np.random.default_rng(1), itertools.count(), sources[0].shape[3]
        self._stored: deque[np.ndarray] = deque(maxlen=len(sources) // 2)
        for source in [*sources, *sources]:
            self.put(source)
        self.load(target := np.zeros_like(sources[0]))
        self.right &= target.tobytes() == np.asarray(sources[0]).tobytes()  # All sources are alike.
        self.right &= caches.stats().tiers["ram"].evicted_blocks > 0

    def put(self, kv: object, layout: str = "LKHND") -> float:
        """Seconds to put under tokens that are not cached."""
        tokens = self._random.integers(0, 1 << 31, self._tokens)
        started = time.perf_counter()
        cached = self.cache.put(tokens, kv, layout=layout)
        elapsed = time.perf_counter() - started
        self._stored.append(tokens)
        self.right &= cached == self._tokens
        return elapsed

    def load(self, kv: object, layout: str = "LKHND") -> float:
        """Seconds to load what was put some time ago."""
        with self.cache.match(self._stored[next(self._turn) % len(self._stored)]) as hit:
            started = time.perf_counter()
            loaded = hit.load(kv, layout=layout)
            elapsed = time.perf_counter() - started
        self.right &= loaded == self._tokens
        return elapsed


def compare(size: int, rounds: int, work: dict[str, tuple[Batch, Batch]], copier: Copier, **more: str) -> list[Row]:
    """Rows of GB/s: in turns, ours and its limit work through a batch."""
    pairs, calls = {name: [] for name in work}, BATCH_BYTES // size
    for turn in range(rounds):
        for name in random.sample(list(work), len(work)):
            batch = range(turn * calls, (turn + 1) * calls)
            # The second time counts: in the first, threads of whoever was before may still spin.
            limit_s, ours_s = ((side(batch), side(batch))[1] for side in reversed(work[name]))
            pairs[name].append((BATCH_BYTES / ours_s / 1e9, BATCH_BYTES / limit_s / 1e9))
    return [paired(name, "GB/s", each, right=copier.right, **more) for name, each in pairs.items()]


def batches(call: Callable[..., float], pool: Sequence[object], *rest: object) -> Batch:
    """One call for each buffer of a batch."""
    return lambda batch: sum(call(pool[n % len(pool)], *rest) for n in batch)


def copy() -> list[Row]:
    """Put and load of 16 MiB against memcpy, which writes past the processor's caches only in large calls: last row."""
    rows = skipped("put and load of torch tensors", "torch")
    library, wrap = ("NumPy", np.asarray) if rows else ("torch", importlib.import_module("torch").from_numpy)
    memmove = ctypes.CDLL(None).memmove  # A function of a CDLL runs with the interpreter released.
    memmove.argtypes, memmove.restype = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t), None
    arrays = sources, targets = buffers(16 * MIB)
    # Per layer keys and values, [1, heads, tokens, dim], as transformers has them; here in the same memory.
    heads_last = [[each.reshape(*each.shape[:2], *each.shape[3:1:-1], -1) for each in pool] for pool in arrays]
    layers = [[[tuple(wrap(k[None]) for k in layer) for layer in array] for array in pool] for pool in arrays]
    with ExitStack() as stack:
        copier = Copier(stack, sources)
        threads = stack.enter_context(ThreadPoolExecutor(copier.threads))

        def memcpy(batch: range, size: int = 16 * MIB, piece: int = 4 * MIB) -> float:
            def drain(turn: Iterator[int]) -> None:  # Whoever is free takes the next piece.
                while (n := next(turn)) < len(batch) * size // piece:
                    offset = ((batch[0] + len(sources) // 2) * size + n * piece) % ROTATE_BYTES
                    memmove(targets.ctypes.data + offset, sources.ctypes.data + offset, piece)

            started = time.perf_counter()
            list(threads.map(drain, [itertools.count()] * copier.threads))
            return time.perf_counter() - started

        forms = (
            ("one array", "LKHND", arrays),
            ("one array, token-major", "LKNHD", heads_last),
            (f"{library} per layer", "BHND", layers),
        )
        work = {
            f"{verb} 16 MiB, {form}": (batches(call, pool, layout), memcpy)
            for form, layout, pools in forms
            for verb, call, pool in zip(("put", "load"), (copier.put, copier.load), pools, strict=True)
        }
        more = {"limit": f"memcpy, {copier.threads} threads", "must": "ratio >= 0.7", "goal": "ratio >= 0.95"}
        rows += compare(16 * MIB, REPEATS * 8, work, copier, **more)
        streamed_s = median(memcpy(range(1), ROTATE_BYTES, ROTATE_BYTES // copier.threads) for _ in range(REPEATS * 4))
    name = f"{more['limit']}, {ROTATE_BYTES // MIB} MiB"
    return [*rows, row(name, ROTATE_BYTES / streamed_s / 1e9, "GB/s", n=REPEATS * 4)]


def lmcache_store(stack: ExitStack, sources: list[Tensor]) -> dict[str, Callable[[Tensor], float]]:
    """LMCache's storage manager with its CPU backend alone, full and touched as the store beside it: put and load."""
    part = lambda name: importlib.import_module(f"lmcache.{name}")  # noqa: E731
    tokens, dtype, size = sources[0].shape[2], sources[0].dtype, ROTATE_BYTES * 5 / 4 / 2**30
    config = part("v1.config").LMCacheEngineConfig.from_defaults(chunk_size=tokens, max_local_cpu_size=size)
    ranks = {"worker_id": 0, "local_worker_id": 0, "world_size": 1, "local_world_size": 1, "role": "worker"}
    kv = {"kv_dtype": dtype, "kv_shape": (GEOMETRY.layers, 2, tokens, GEOMETRY.kv_heads, GEOMETRY.head_dim)}
    metadata = part("v1.metadata").LMCacheMetadata(model_name="bench", chunk_size=tokens, **ranks, **kv)
    manager, events = part("v1.storage_backend.storage_manager").StorageManager, part("v1.event_manager").EventManager()
    store = manager(config, metadata, events)
    stack.callback(store.close)
    form = part("v1.memory_management").MemoryFormat.KV_2LTD
    keys = (part("utils").CacheEngineKey("bench", 1, 0, n, dtype) for n in itertools.count())
    turn, stored = itertools.count(), deque[object](maxlen=len(sources) // 2)

    def put(kv: Tensor) -> float:
        stored.append(next(keys))
        started = time.perf_counter()
        held = store.allocate(kv.shape, dtype, fmt=form)
        held.tensor.view(kv.shape).copy_(kv)
        store.batched_put([stored[-1]], [held])
        return time.perf_counter() - started

    def load(kv: Tensor) -> float:
        key = stored[next(turn) % len(stored)]
        started = time.perf_counter()
        held = store.get(key, location="LocalCPUBackend")
        kv.copy_(held.tensor.view(kv.shape))
        held.ref_count_down()
        return time.perf_counter() - started

    for source in sources * 2:
        put(source)
    return {"put": put, "load": load}


def lmcache() -> list[Row]:
    """Put and load of one tensor: LMCache's best case, in which it copies it whole, at its better number of threads."""
    os.environ.update(LMCACHE_DISABLE_BANNER="1", LMCACHE_TRACK_USAGE="false", LMCACHE_LOG_LEVEL="ERROR")
    if absent := skipped("put and load against LMCache's CPU backend", "torch", "lmcache"):
        return absent
    torch, rows = importlib.import_module("torch"), []
    better = lambda side, *counts: lambda batch: min(side(batch) for n in counts if not torch.set_num_threads(n))  # noqa: E731
    for size in (2 * MIB, 16 * MIB):
        with ExitStack() as stack:
            pools = [[torch.from_numpy(array) for array in pool] for pool in buffers(size)]
            flat = [[tensor.view(2, GEOMETRY.layers, tensor.shape[3], -1) for tensor in pool] for pool in pools]
            ours, theirs = Copier(stack, pools[0]), lmcache_store(stack, flat[0])
            work = {}
            for verb, pool, flat_pool in zip(theirs, pools, flat, strict=True):
                peer = better(batches(theirs[verb], flat_pool), 1, ours.threads)
                work[f"{verb} {size // MIB} MiB, one tensor"] = (batches(getattr(ours, verb), pool), peer)
            peer = f"LMCache {version('lmcache')}"
            for name, must, goal in (("put", "ratio >= 1.5", "ratio >= 2.5"), ("load", "ratio >= 1.2", "ratio >= 1.7")):
                part = {each: pair for each, pair in work.items() if each.startswith(name)}
                rows += compare(size, REPEATS * 4, part, ours, limit=peer, must=must, goal=goal)
    return rows


def ttft() -> list[Row]:
    """Time to the first token of 2,048 cached and 64 new tokens, on a Llama of 31 million random weights in fp32."""
    if absent := skipped("TTFT", "torch", "transformers", "safetensors.torch"):
        return absent
    torch, hf, st = (importlib.import_module(name) for name in ("torch", "transformers", "safetensors.torch"))
    engine = importlib.import_module("stratakv.integrations.transformers")
    shape = {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 8, "vocab_size": 4096}
    shape |= {"num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 128, "max_position_embeddings": 8192}
    torch.manual_seed(0)
    model = hf.LlamaForCausalLM._from_config(hf.LlamaConfig(**shape, tie_word_embeddings=True)).eval()
    prefix, past = 2048, hf.DynamicCache()
    first = torch.randint(4096, (1, prefix))
    with torch.inference_mode():
        model(first, past_key_values=past)
    past_kv = [(layer.keys, layer.values) for layer in past.layers]
    blob = st.save({f"{i}.{n}": plane for i, pair in enumerate(past_kv) for n, plane in enumerate(pair)})
    ms, right = {name: [] for name in ("cold", "in place", "ram", "ssd", "safetensors")}, True

    def from_safetensors() -> DynamicCache:
        tensors = st.load(blob)
        return hf.DynamicCache([(tensors[f"{i}.0"], tensors[f"{i}.1"]) for i in range(len(past_kv))])

    def restored(cache: ModelCache, ids: Tensor, tier: str) -> DynamicCache:
        nonlocal right
        found = engine.restore(cache, ids)
        right &= found.explanation.blocks == (tier,) * (prefix // cache.geometry.block_tokens)
        return found.past_key_values

    @torch.inference_mode()
    def first_token(ids: Tensor, restore: Callable[[], DynamicCache | None]) -> tuple[float, Tensor]:
        started = time.perf_counter()
        past = restore()
        rest = ids[:, past.get_seq_length() if past else 0 :]
        logits = model(rest, past_key_values=past, use_cache=True, logits_to_keep=1).logits
        int(logits[0, -1].argmax())
        return (time.perf_counter() - started) * 1e3, logits

    @contextmanager
    def opened(**ssd: object) -> Iterator[tuple[ModelCache, str]]:
        with stratakv.open(Config(ram=RamConfig(capacity_bytes="256MiB"), ssd=SsdConfig(**ssd))) as caches:
            yield caches.register("llama", engine.geometry(model)), caches.status().ssd_io

    with tempfile.TemporaryDirectory(dir=OUT) as folder, opened(enabled=False) as (in_ram, _):
        with opened(path=folder, capacity_bytes="1GiB") as (on_ssd, ssd_io):
            right &= [engine.store(cache, first, past) for cache in (in_ram, on_ssd)] == [prefix] * 2
        for repeat in range(REPEATS + 1):
            ids = torch.cat([first, torch.randint(4096, (1, 64))], dim=1)
            in_place = hf.DynamicCache([(keys.clone(), values.clone()) for keys, values in past_kv])
            with opened(path=folder, capacity_bytes="1GiB") as (on_ssd, _):  # A store just opened has nothing in RAM.
                ways = {"cold": lambda: None, "in place": lambda kv=in_place: kv, "safetensors": from_safetensors}
                ways["ram"] = lambda ids=ids: restored(in_ram, ids, "ram")
                ways["ssd"] = lambda ids=ids, cache=on_ssd: restored(cache, ids, "ssd")
                taken = {name: first_token(ids, ways[name]) for name in random.sample(list(ways), len(ways))}
            for name, (elapsed, logits) in taken.items():
                ms[name] += [elapsed] if repeat else []  # The first warms up.
                right &= name == "cold" or torch.equal(logits, taken["in place"][1])
    faster = {name: [cold / each for cold, each in zip(ms["cold"], ms[name], strict=True)] for name in ms}
    pairs = {name: list(zip(faster[name], faster["in place"], strict=True)) for name in ms}
    goal = f"value >= {median(faster['safetensors']):.1f}"
    return [
        *(row(f"TTFT, {name}", median(ms[name]), "ms", n=REPEATS) for name in ("cold", "ram", "ssd")),
        paired("TTFT, cold / ram", "x", pairs["ram"], "KV in place", must="value >= 12", goal=goal, right=right),
        paired(f"TTFT, cold / ssd, {ssd_io} reads", "x", pairs["ssd"], "KV in place", must="value >= 8", right=right),
        paired("TTFT, cold / safetensors bytes in RAM", "x", pairs["safetensors"], "KV in place"),
    ]


def size() -> list[Row]:
    """Import time in fresh processes, and the wheel."""

    def import_ms(module: str) -> float:
        code = f"import time; t = time.perf_counter(); import {module}; print(time.perf_counter() - t)"
        return float(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True).stdout) * 1e3

    pairs = [(import_ms("stratakv"), import_ms("numpy")) for _ in range(REPEATS * 2 + 1)][1:]  # The first warms up.
    turned = median(numpy / ours for ours, numpy in pairs)  # Less is better: 1.0 is at the limit here, too.
    imported = paired("import stratakv", "ms", pairs, "import numpy", must="value < 150", ratio=turned)
    for wheel in ROOT.glob("dist/stratakv-*.whl"):  # `make wheel` leaves one.
        return [imported, row("wheel", wheel.stat().st_size / 1e6, "MB", must="value < 10")]
    return [imported, row("wheel: skipped, there is none in dist/ (make wheel)", n=0)]


if __name__ == "__main__":
    run("main", ttft, copy, lmcache, size)
