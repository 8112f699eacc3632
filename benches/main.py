"""What the cache is worth, and how near it comes to what the machine can do.

Sections: `ttft` (a forward pass, cold and from each tier), `copy` (put and load against memcpy), `lmcache` (put and
load against LMCache's CPU backend), `size` (import time and wheel). Limits are measured in the same run, in turns with
the values: machines are noisy, so `ratio` is the median over neighbouring pairs, and 1.0 means at the limit. Nothing
fails here: a row is `ok` or not. What is not installed is skipped by name.

    make bench SUITE=main ARGS="--only copy size"
"""

from __future__ import annotations

import argparse
import ctypes
import importlib
import itertools
import json
import operator
import os
import platform
import random
import subprocess
import sys
import tempfile
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import numpy as np

import stratakv
from stratakv import Config, Geometry, ModelCache, RamConfig, SsdConfig

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import DynamicCache

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / "benches" / "out"
MIB = 1 << 20
# Keys and values of Llama 3.2 1B: 32 KiB per token, and the shortest rows that common models have.
GEOMETRY = Geometry(layers=16, kv_heads=8, head_dim=64, dtype="fp16")
# Buffers are taken in turn from this much memory, so that no processor cache holds what comes next.
ROTATE_BYTES = 512 * MIB

Row = dict[str, Any]
Pairs = list[tuple[float, float]]


def row(name: str, value: float | None = None, unit: str = "", **more: object) -> Row:
    """A row. `must` and `goal` read "field sign bound"; a result that is not `right` is never ok."""
    blank = dict.fromkeys(("limit", "limit_value", "ratio", "must", "goal"))
    right = more.pop("right", None)
    filled: Row = {"name": name, "value": value, "unit": unit, **blank, "ok": right, "n": 1, **more}
    if filled["must"] and right is not False:
        field, sign, bound = filled["must"].split()
        filled["ok"] = {">=": operator.ge, ">": operator.gt, "<": operator.lt}[sign](filled[field], float(bound))
    return filled


def paired(name: str, unit: str, pairs: Pairs, limit: str, **more: object) -> Row:
    """A row of measurements, each with the limit that was measured beside it."""
    values, limits = map(median, zip(*pairs, strict=True))
    ratio = median(value / bound for value, bound in pairs)
    return row(name, values, unit, **({"limit": limit, "limit_value": limits, "ratio": ratio, "n": len(pairs)} | more))


def skipped(what: str, *modules: str) -> list[Row]:
    """A row that says what of the modules cannot be imported; none if all can."""
    for module in modules:
        try:
            importlib.import_module(module)
        except ImportError:
            return [row(f"{what}: skipped, {module} is not installed", n=0)]
    return []


def buffers(size: int) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Sources and targets of so many bytes, `[layers, planes, heads, tokens, dim]`, side by side, all pages touched."""
    shape = (GEOMETRY.layers, GEOMETRY.planes, GEOMETRY.kv_heads, size // GEOMETRY.token_bytes, GEOMETRY.head_dim)
    both = np.empty((2, ROTATE_BYTES // size, *shape), np.float16)
    both.view(np.uint16)[:] = np.random.default_rng(0).integers(0, 1 << 16, shape, np.uint16)
    for n, source in enumerate(both[0].view(np.uint16)):
        source += np.uint16(n)
    return list(both[0]), list(both[1])


class Copier:
    """A store without SSD whose arena is full and touched: every put evicts, and copies into warm pages."""

    def __init__(self, stack: ExitStack, sources: list[np.ndarray]) -> None:
        config = Config(ram=RamConfig(capacity_bytes=ROTATE_BYTES * 5 // 4), ssd=SsdConfig(enabled=False))
        caches = stack.enter_context(stratakv.open(config))
        self.cache, self.threads, self.right = caches.register("bench", GEOMETRY), caches.status().threads, True
        self._random, self._turn, self._tokens = np.random.default_rng(1), itertools.count(), sources[0].shape[3]
        self._stored: deque[np.ndarray] = deque(maxlen=len(sources) // 2)
        for source in sources * 2:
            self.put(source)
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

    def load(self, kv: object, layout: str = "LKHND", at: int | None = None) -> float:
        """Seconds to load what was put some time ago."""
        with self.cache.match(self._stored[next(self._turn) % len(self._stored) if at is None else at]) as hit:
            started = time.perf_counter()
            loaded = hit.load(kv, layout=layout)
            elapsed = time.perf_counter() - started
        self.right &= loaded == self._tokens
        return elapsed

    def exact(self, source: np.ndarray, target: np.ndarray) -> bool:
        """Whether every call did its work, and a load gives back what was put."""
        target.fill(0)
        self.put(source)
        self.load(target, at=-1)
        return self.right and source.tobytes() == target.tobytes()


def copy(repeats: int) -> list[Row]:
    """Put and load of 16 MiB, one call from Python each, against memcpy of the same memory.

    The ratio can pass 1: a copy that writes past the processor's caches is faster than memcpy, which does so only for
    very large sizes. What that reaches is a row of its own.
    """
    rows = skipped("put and load of torch tensors", "torch")
    library, wrap = ("NumPy", np.asarray) if rows else ("torch", importlib.import_module("torch").from_numpy)
    memmove = ctypes.CDLL(None).memmove  # A function of a CDLL runs with the interpreter released.
    memmove.argtypes, memmove.restype = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t), None
    (sources, targets), calls = buffers(16 * MIB), 4
    size, count = sources[0].nbytes, len(sources)
    moved = calls * size / 1e9
    # Per layer keys and values, [1, heads, tokens, dim], as transformers has them; here all in one buffer.
    layers = {id(each): [tuple(wrap(k[None]) for k in layer) for layer in each] for each in sources + targets}
    with ExitStack() as stack:
        copier = Copier(stack, sources)
        pool = stack.enter_context(ThreadPoolExecutor(copier.threads))

        def memcpy_gbs(first: int, total: int, piece: int) -> float:
            """Over as many threads, the caller's included; whoever is free takes the next piece."""
            turn, to, source = itertools.count(), targets[0].ctypes.data, sources[0].ctypes.data

            def drain() -> None:
                while (n := next(turn)) < total // piece:
                    offset = (first + n * piece) % ROTATE_BYTES
                    memmove(to + offset, source + offset, piece)

            started = time.perf_counter()
            others = [pool.submit(drain) for _ in range(copier.threads - 1)]
            drain()
            for other in others:
                other.result()
            return total / (time.perf_counter() - started) / 1e9

        work = {
            f"{verb} 16 MiB, {form}": (call, arrays, layout)
            for verb, call, arrays in (("put", copier.put, sources), ("load", copier.load, targets))
            for form, layout in (("one array", "LKHND"), (f"{library} per layer", "BHND"))
        }
        rates: dict[str, Pairs] = {name: [] for name in work}
        streams = []
        for turn in range(repeats * 8):
            streams.append(memcpy_gbs(0, ROTATE_BYTES, ROTATE_BYTES // copier.threads))
            for name in random.sample(list(work), len(work)):
                call, arrays, layout = work[name]
                taken = [arrays[(turn * calls + i) % count] for i in range(calls)]
                kv = [layers[id(array)] if layout == "BHND" else array for array in taken]
                limit = memcpy_gbs((turn * calls + count // 2) * size, calls * size, 4 * MIB)
                rates[name].append((moved / sum(call(each, layout) for each in kv), limit))
        bounds = {"must": "ratio >= 0.7", "goal": "ratio >= 0.95", "right": copier.exact(sources[0], targets[0])}
    threads = f"memcpy, {copier.threads} threads"
    rows += [paired(name, "GB/s", pairs, threads, **bounds) for name, pairs in rates.items()]
    return [*rows, row(f"{threads}, {ROTATE_BYTES // MIB} MiB", median(streams), "GB/s", n=len(streams))]


class LmCache:
    """LMCache's storage manager with its CPU backend alone, full and touched as the store beside it."""

    def __init__(self, stack: ExitStack, sources: list[Tensor]) -> None:
        part = lambda name: importlib.import_module(f"lmcache.{name}")  # noqa: E731
        tokens, dtype, size = sources[0].shape[2], sources[0].dtype, ROTATE_BYTES * 5 / 4 / 2**30
        config = part("v1.config").LMCacheEngineConfig.from_defaults(chunk_size=tokens, max_local_cpu_size=size)
        names = {"model_name": "bench", "role": "worker", "world_size": 1, "local_world_size": 1}
        shape = (GEOMETRY.layers, GEOMETRY.planes, tokens, GEOMETRY.kv_heads, GEOMETRY.head_dim)
        names |= {"worker_id": 0, "local_worker_id": 0, "kv_dtype": dtype, "kv_shape": shape, "chunk_size": tokens}
        metadata, events = part("v1.metadata").LMCacheMetadata(**names), part("v1.event_manager").EventManager()
        self._store = part("v1.storage_backend.storage_manager").StorageManager(config, metadata, events)
        stack.callback(self._store.close)
        self._format = part("v1.memory_management").MemoryFormat.KV_2LTD
        self._keys = (part("utils").CacheEngineKey("bench", 1, 0, n, dtype) for n in itertools.count())
        self._stored: deque[Any] = deque(maxlen=len(sources) // 2)
        self._turn = itertools.count()
        for source in sources * 2:
            self.put(source)

    def put(self, kv: Tensor) -> float:
        """Seconds to allocate, copy and insert."""
        self._stored.append(next(self._keys))
        started = time.perf_counter()
        held = self._store.allocate(kv.shape, kv.dtype, fmt=self._format)
        held.tensor.view(kv.shape).copy_(kv)
        self._store.batched_put([self._stored[-1]], [held])
        return time.perf_counter() - started

    def load(self, kv: Tensor) -> float:
        """Seconds to find what was put some time ago, and to copy it out."""
        key = self._stored[next(self._turn) % len(self._stored)]
        started = time.perf_counter()
        held = self._store.get(key, location="LocalCPUBackend")
        kv.copy_(held.tensor.view(kv.shape))
        held.ref_count_down()
        return time.perf_counter() - started


def lmcache(repeats: int) -> list[Row]:
    """Put and load of one contiguous tensor: LMCache's best case, in which it copies it whole and hashes nothing."""
    os.environ.update(LMCACHE_DISABLE_BANNER="1", LMCACHE_TRACK_USAGE="false", LMCACHE_LOG_LEVEL="ERROR")
    if absent := skipped("put and load against LMCache's CPU backend", "torch", "lmcache"):
        return absent
    torch, rows = importlib.import_module("torch"), []
    for size in (2 * MIB, 16 * MIB):
        with ExitStack() as stack:
            sources, targets = buffers(size)
            tensors = {"put": [*map(torch.from_numpy, sources)], "load": [*map(torch.from_numpy, targets)]}
            shape, calls = (2, GEOMETRY.layers, sources[0].shape[3], -1), 32 * MIB // size
            flat = {verb: [tensor.view(shape) for tensor in each] for verb, each in tensors.items()}
            ours, theirs = Copier(stack, sources), LmCache(stack, flat["put"])
            torch.set_num_threads(ours.threads)
            rates: dict[str, Pairs] = {verb: [] for verb in tensors}
            for turn, verb in itertools.product(range(repeats * 4), rates):
                gbs = []
                for store, pool in ((theirs, flat[verb]), (ours, tensors[verb])):
                    # The first half is not counted: threads of the other side still spin after their work.
                    taken = [pool[(turn * calls + i) % len(pool)] for i in range(2 * calls)]
                    gbs.append(calls * size / sum([getattr(store, verb)(each) for each in taken][calls:]) / 1e9)
                rates[verb].append((gbs[1], gbs[0]))
            bounds = {"must": "ratio > 1", "right": ours.exact(sources[0], targets[0])}
            limit = f"LMCache {version('lmcache')} LocalCPU, {ours.threads} threads"
            for verb, pairs in rates.items():
                rows.append(paired(f"{verb} {size // MIB} MiB, one tensor", "GB/s", pairs, limit, **bounds))
    return rows


def ttft(repeats: int) -> list[Row]:
    """Time to the first token of 2,048 cached and 64 new tokens, on a Llama of 31 million random weights in fp32."""
    if absent := skipped("TTFT", "torch", "transformers", "safetensors.torch"):
        return absent
    os.environ["HF_HUB_OFFLINE"] = "1"
    torch, hf, st = (importlib.import_module(name) for name in ("torch", "transformers", "safetensors.torch"))
    engine = importlib.import_module("stratakv.integrations.transformers")
    prefix, tail, layers = 2048, 64, 8
    shape = {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": layers, "vocab_size": 4096}
    shape |= {"num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 128, "max_position_embeddings": 8192}
    torch.manual_seed(0)
    model = hf.LlamaForCausalLM._from_config(hf.LlamaConfig(**shape, tie_word_embeddings=True)).eval()
    first, past = torch.randint(4096, (1, prefix)), hf.DynamicCache()
    with torch.inference_mode():
        model(first, past_key_values=past)
    past_kv = [(layer.keys, layer.values) for layer in past.layers]
    blob = st.save({f"{i}.{n}": plane for i, pair in enumerate(past_kv) for n, plane in enumerate(pair)})
    ms: dict[str, list[float]] = {name: [] for name in ("cold", "in place", "ram", "ssd", "safetensors")}
    wrong: list[str] = []

    def from_safetensors() -> DynamicCache:
        tensors = st.load(blob)
        return hf.DynamicCache([(tensors[f"{i}.0"], tensors[f"{i}.1"]) for i in range(layers)])

    def restored(cache: ModelCache, ids: Tensor, tier: str) -> DynamicCache:
        found = engine.restore(cache, ids)
        wrong.extend(f"{block}, not {tier}" for block in found.explanation.blocks if block != tier)
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
    def opened(ssd: SsdConfig) -> Iterator[ModelCache]:
        with stratakv.open(Config(ram=RamConfig(capacity_bytes="256MiB"), ssd=ssd)) as caches:
            yield caches.register("llama", engine.geometry(model))

    OUT.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(dir=OUT))
        disk = SsdConfig(path=folder, capacity_bytes="1GiB")
        in_ram = stack.enter_context(opened(SsdConfig(enabled=False)))
        with opened(disk) as on_ssd:
            stored = [engine.store(cache, first, past) for cache in (in_ram, on_ssd)]
        for repeat in range(repeats + 1):
            ids = torch.cat([first, torch.randint(4096, (1, tail))], dim=1)
            in_place = hf.DynamicCache([(keys.clone(), values.clone()) for keys, values in past_kv])
            with opened(disk) as on_ssd:  # A store just opened has nothing in RAM.
                ways: dict[str, Callable[[], DynamicCache | None]] = {
                    "cold": lambda: None,
                    "in place": lambda kv=in_place: kv,
                    "ram": lambda ids=ids: restored(in_ram, ids, "ram"),
                    "ssd": lambda ids=ids, cache=on_ssd: restored(cache, ids, "ssd"),
                    "safetensors": from_safetensors,
                }
                taken = {name: first_token(ids, ways[name]) for name in random.sample(list(ways), len(ways))}
            for name, (elapsed, logits) in taken.items():
                ms[name] += [elapsed] if repeat else []  # The first warms up.
                if name != "cold" and not torch.equal(logits, taken["in place"][1]):
                    wrong.append(f"{name}: other logits than with the keys and values in place")
    if wrong:
        print("\n".join(sorted(set(wrong))), file=sys.stderr)
    faster = {name: [cold / t for cold, t in zip(ms["cold"], ms[name], strict=True)] for name in ms}
    pairs = {name: list(zip(faster[name], faster["in place"], strict=True)) for name in ms}
    right = {"right": not wrong and stored == [prefix, prefix]}
    goal = f"value >= {median(faster['safetensors']):.1f}"
    return [
        *(row(f"TTFT, {name}", median(ms[name]), "ms", n=repeats) for name in ("cold", "ram", "ssd")),
        paired("TTFT, cold / ram", "x", pairs["ram"], "KV in place", must="value >= 12", goal=goal, **right),
        paired("TTFT, cold / ssd", "x", pairs["ssd"], "KV in place", must="value >= 8", **right),
        paired("TTFT, cold / safetensors bytes in RAM", "x", pairs["safetensors"], "KV in place"),
    ]


def size(repeats: int) -> list[Row]:
    """Import time in fresh processes, and the wheel."""
    pairs: Pairs = []
    for _ in range(repeats * 2 + 1):
        taken = []
        for module in ("stratakv", "numpy"):
            code = f"import time; t = time.perf_counter(); import {module}; print(time.perf_counter() - t)"
            done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
            taken.append(float(done.stdout) * 1e3)
        pairs.append((taken[0], taken[1]))
    # The first pair warms up. A time's ratio is turned over, so that 1.0 is at the limit here too.
    ratio = {"ratio": median(numpy / ours for ours, numpy in pairs[1:])}
    rows = [paired("import stratakv", "ms", pairs[1:], "import numpy", must="value < 150", **ratio)]
    wheels = sorted(ROOT.glob("dist/stratakv-*.whl"), key=lambda wheel: wheel.stat().st_mtime)
    if not wheels:
        return [*rows, row("wheel: skipped, there is none in dist/ (make wheel)", n=0)]
    return [*rows, row("wheel", wheels[-1].stat().st_size / 1e6, "MB", must="value < 10")]


def facts() -> Row:
    """The commit, marked if the tree differs from it, and the machine."""
    git = subprocess.run(["git", "-C", str(ROOT), "describe", "--always", "--dirty"], capture_output=True, text=True)
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    processor = next((line.split(": ", 1)[1] for line in lines if line.startswith("model name")), platform.machine())
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    machine = f"{os.cpu_count()} cores {processor}, {memory:.0f} GiB, {platform.system()} {platform.release()}"
    return {"commit": git.stdout.strip() or "unknown", "machine": machine}


def show(rows: list[Row]) -> None:
    """Prints the table."""
    number = lambda value: "" if value is None else f"{value:.4g}"  # noqa: E731
    table = [("name", "value", "unit", "limit", "", "ratio", "must", "goal", "ok", "n")]
    for each in rows:
        limit = (each["limit"] or "", number(each["limit_value"]), number(each["ratio"]))
        bounds = (each["must"] or "", each["goal"] or "", {True: "yes", False: "NO", None: ""}[each["ok"]])
        table.append((each["name"], number(each["value"]), each["unit"], *limit, *bounds, str(each["n"] or "")))
    width = [max(map(len, column)) for column in zip(*table, strict=True)]
    for line in table:
        print("  ".join(cell.ljust(size) for cell, size in zip(line, width, strict=True)).rstrip())


def main() -> None:
    """Runs the sections, prints the table and writes `benches/out/main.json`."""
    sections = {"ttft": ttft, "copy": copy, "lmcache": lmcache, "size": size}
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", nargs="+", choices=sections, default=list(sections), help="sections to run")
    parser.add_argument("--repeats", type=int, default=7, help="repetitions, at least 3")
    args = parser.parse_args()
    rows, run = [], facts()
    for name in args.only:
        print(f"bench: {name}", file=sys.stderr, flush=True)
        try:
            rows += sections[name](max(args.repeats, 3))
        except Exception as error:  # A section that breaks must not hide the others.
            traceback.print_exc()
            rows.append(row(f"{name}: failed, {type(error).__name__}", right=False, n=0))
    show(rows)
    print(f"\n{run['machine']}; commit {run['commit']}")
    OUT.mkdir(parents=True, exist_ok=True)
    (OUT / "main.json").write_text(json.dumps([each | run for each in rows], indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
