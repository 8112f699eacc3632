"""What the cache is worth, and how near it comes to what the machine can do.

Sections: `ttft` (a forward pass, cold and from each tier), `copy` (put and load against memcpy), `lmcache` (put and load
against LMCache's CPU backend), `size` (import time and wheel). A limit is measured in the same run, in turns with the
value: machines are noisy, so `ratio` is the median over neighbouring pairs; 1.0 means at the limit. Nothing fails here:
a row is `ok` or not. What is not installed is skipped by name.

    make bench SUITE=main ARGS="--only copy size"
"""

from __future__ import annotations

import argparse
import ctypes
import importlib
import itertools
import json
import mmap
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
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import stratakv
from stratakv import Config, Geometry, RamConfig, SsdConfig

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / "benches" / "out"
MIB = 1 << 20
# Keys and values of Llama 3.2 1B: 32 KiB per token, and the shortest rows that common models have.
GEOMETRY = Geometry(layers=16, kv_heads=8, head_dim=64, dtype="fp16")
# Buffers are taken in turn from this much memory, so that no cache holds what comes next.
ROTATE_BYTES = 512 * MIB

Row = dict[str, Any]
Pairs = list[tuple[float, float]]


def row(name: str, value: float | None = None, unit: str = "", **more: Any) -> Row:  # noqa: ANN401
    """A row; `must` and `goal` read "field sign bound", and a result that is not `right` is never ok."""
    right, must = more.pop("right", None), more.get("must")
    filled = {"name": name, "value": value, "unit": unit, "limit": None, "limit_value": None, "ratio": None}
    filled |= {"must": None, "goal": None, "ok": right, "n": 1} | more
    if must and right is not False:
        field, sign, bound = must.split()
        filled["ok"] = {">=": operator.ge, ">": operator.gt, "<": operator.lt}[sign](filled[field], float(bound))
    return filled


def paired(name: str, unit: str, pairs: Pairs, limit: str, **more: Any) -> Row:  # noqa: ANN401
    """A row of measurements, each beside the limit that was measured next to it."""
    values, limits = zip(*pairs, strict=True)
    ratio = median(value / bound for value, bound in pairs)
    more |= {"limit": limit, "limit_value": median(limits), "ratio": ratio, "n": len(pairs)}
    return row(name, median(values), unit, **more)


def skipped(what: str, *modules: str) -> Row | None:
    """A row that says which of the modules cannot be imported; None if all can."""
    for module in modules:
        try:
            importlib.import_module(module)
        except ImportError:
            return row(f"{what}: skipped, {module} is not installed", n=0)
    return None


def buffers(tokens: int) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Sources and targets, `[layers, planes, heads, tokens, dim]` each, all pages touched."""
    shape = (GEOMETRY.layers, GEOMETRY.planes, GEOMETRY.kv_heads, tokens, GEOMETRY.head_dim)
    noise = np.random.default_rng(0).integers(0, 1 << 16, shape, np.uint16).view(np.float16)
    count = ROTATE_BYTES // noise.nbytes
    return [np.roll(noise, i, axis=3) for i in range(count)], [np.full_like(noise, 1) for _ in range(count)]


class Copier:
    """A store without SSD whose arena is full and touched: every put evicts, and copies into warm pages."""

    def __init__(self, stack: ExitStack, sources: list[np.ndarray]) -> None:
        config = Config(ram=RamConfig(capacity_bytes=ROTATE_BYTES * 5 // 4), ssd=SsdConfig(enabled=False))
        caches = stack.enter_context(stratakv.open(config))
        self.cache = caches.register("bench", GEOMETRY)
        self.threads = caches.status().threads
        self.match_us: list[float] = []
        self.right = True
        self._random = np.random.default_rng(1)
        self._tokens = sources[0].shape[3]
        self._stored: deque[np.ndarray] = deque(maxlen=len(sources))
        for _, source in itertools.product(range(2), sources):
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

    def load(self, kv: object, layout: str = "LKHND") -> float:
        """Seconds to load what was put longest ago."""
        self._stored.rotate(-1)
        started = time.perf_counter()
        with self.cache.match(self._stored[-1]) as hit:
            matched = time.perf_counter()
            loaded = hit.load(kv, layout=layout)
            elapsed = time.perf_counter() - matched
        self.match_us.append((matched - started) * 1e6)
        self.right &= loaded == self._tokens
        return elapsed

    def exact(self, source: np.ndarray, target: np.ndarray) -> bool:
        """Whether every call did its work, and a load gives back what was put."""
        target.fill(0)
        self.put(source)
        self._stored.rotate(1)
        self.load(target)
        return self.right and bool((source.view(np.uint16) == target.view(np.uint16)).all())


def copy(repeats: int) -> list[Row]:
    """Put and load of 16 MiB, one call from Python each, against memcpy of the same memory."""
    rows = [absent] if (absent := skipped("put and load of torch tensors", "torch")) else []
    wraps = (
        {"NumPy": np.asarray} if absent else {"NumPy": np.asarray, "torch": importlib.import_module("torch").from_numpy}
    )
    memmove = ctypes.CDLL(None).memmove  # A function of a CDLL runs with the interpreter released.
    memmove.argtypes, memmove.restype = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t), None
    pools = sources, targets = buffers(16 * MIB // GEOMETRY.token_bytes)
    calls, piece_bytes = 4, 4 * MIB  # Below some MiB, memmove fetches the lines that it is about to overwrite.
    pieces = sources[0].nbytes // piece_bytes
    with ExitStack() as stack:
        copier = Copier(stack, sources)
        pool = stack.enter_context(ThreadPoolExecutor(copier.threads))

        def memcpy_s(first: int) -> float:
            """Seconds for all threads, the caller too; whoever is free takes the next piece."""
            turn = itertools.count()

            def drain() -> None:
                while (n := next(turn)) < calls * pieces:
                    at, offset = (first + n // pieces) % len(sources), n % pieces * piece_bytes
                    memmove(targets[at].ctypes.data + offset, sources[at].ctypes.data + offset, piece_bytes)

            started = time.perf_counter()
            others = [pool.submit(drain) for _ in range(copier.threads - 1)]
            drain()
            for other in others:
                other.result()
            return time.perf_counter() - started

        forms: dict[str, tuple[str, Callable[[np.ndarray], object]]] = {"one array": ("LKHND", lambda array: array)}
        for library, wrap in wraps.items():
            # As transformers has it: per layer keys and values, [1, heads, tokens, dim]; here all in one buffer.
            layers = lambda array, wrap=wrap: [tuple(wrap(plane[None]) for plane in layer) for layer in array]  # noqa: E731
            forms[f"{library} per layer"] = ("BHND", layers)
        verbs = (("put", copier.put), ("load", copier.load))
        work = [
            (f"{verb} 16 MiB, {form}", call, [prepare(array) for array in arrays], layout)
            for form, (layout, prepare) in forms.items()
            for (verb, call), arrays in zip(verbs, pools, strict=True)
        ]
        rates: dict[str, Pairs] = {name: [] for name, *_ in work}
        moved = calls * sources[0].nbytes / 1e9
        for turn in range(repeats * 8):
            random.shuffle(work)
            for name, call, kv, layout in work:
                limit = memcpy_s(turn * calls + len(kv) // 2)
                seconds = sum(call(kv[(turn * calls + i) % len(kv)], layout) for i in range(calls))
                rates[name].append((moved / seconds, moved / limit))
        bounds = {"must": "ratio >= 0.7", "goal": "ratio >= 0.95", "right": copier.exact(sources[0], targets[0])}
        limit_name = f"memcpy, {copier.threads} threads"
        rows += [
            paired(name, "GB/s", pairs, limit_name, **bounds) for name, pairs in sorted(rates.items(), reverse=True)
        ]
    tokens = 16 * MIB // GEOMETRY.token_bytes
    return [*rows, row(f"match of {tokens} tokens", median(copier.match_us), "us", n=len(copier.match_us))]


class LmCache:
    """LMCache's storage manager with its CPU backend alone, full and touched as the store beside it."""

    def __init__(self, stack: ExitStack, sources: list[Any]) -> None:
        part = lambda name: importlib.import_module(f"lmcache.{name}")  # noqa: E731
        tokens, dtype = sources[0].shape[2], sources[0].dtype
        size = ROTATE_BYTES * 5 / 4 / 2**30
        config = part("v1.config").LMCacheEngineConfig.from_defaults(chunk_size=tokens, max_local_cpu_size=size)
        ranks = {"world_size": 1, "local_world_size": 1, "worker_id": 0, "local_worker_id": 0, "role": "worker"}
        heads = (GEOMETRY.kv_heads, GEOMETRY.head_dim)
        shape = {"kv_dtype": dtype, "kv_shape": (GEOMETRY.layers, 2, tokens, *heads), "chunk_size": tokens}
        metadata = part("v1.metadata").LMCacheMetadata(model_name="bench", **ranks, **shape)
        manager = part("v1.storage_backend.storage_manager").StorageManager
        self._store = manager(config, metadata, part("v1.event_manager").EventManager())
        stack.callback(self._store.close)
        self._format = part("v1.memory_management").MemoryFormat.KV_2LTD
        self._keys = (part("utils").CacheEngineKey("bench", 1, 0, n, dtype) for n in itertools.count())
        self._stored: deque[Any] = deque(maxlen=len(sources))
        self.right = True
        for _, source in itertools.product(range(2), sources):
            self.put(source)

    def put(self, kv: Any) -> float:  # noqa: ANN401 - a tensor
        """Seconds to allocate, copy and insert."""
        self._stored.append(next(self._keys))
        started = time.perf_counter()
        held = self._store.allocate(kv.shape, kv.dtype, fmt=self._format)
        held.tensor.view(kv.shape).copy_(kv)
        self._store.batched_put([self._stored[-1]], [held])
        return time.perf_counter() - started

    def load(self, kv: Any) -> float:  # noqa: ANN401 - a tensor
        """Seconds to find what was put longest ago, and to copy it out."""
        self._stored.rotate(-1)
        started = time.perf_counter()
        held = self._store.get(self._stored[-1], location="LocalCPUBackend")
        kv.copy_(held.tensor.view(kv.shape))
        held.ref_count_down()
        return time.perf_counter() - started


def lmcache(repeats: int) -> list[Row]:
    """Put and load of one contiguous tensor: LMCache's best case, in which it copies it whole and hashes nothing."""
    os.environ.update(LMCACHE_DISABLE_BANNER="1", LMCACHE_TRACK_USAGE="false", LMCACHE_LOG_LEVEL="ERROR")
    if absent := skipped("put and load against LMCache's CPU backend", "torch", "lmcache"):
        return [absent]
    torch = importlib.import_module("torch")
    rows = []
    for size in (2 * MIB, 16 * MIB):
        with ExitStack() as stack:
            arrays = sources, targets = buffers(size // GEOMETRY.token_bytes)
            shape = (2, GEOMETRY.layers, sources[0].shape[3], -1)
            tensors = [[torch.from_numpy(array) for array in pool] for pool in arrays]
            flat = [[tensor.view(shape) for tensor in pool] for pool in tensors]
            ours, theirs = Copier(stack, sources), LmCache(stack, flat[0])
            torch.set_num_threads(ours.threads)
            rates: dict[str, Pairs] = {"put": [], "load": []}
            calls = 32 * MIB // size
            for turn, (pool, verb) in itertools.product(range(repeats * 4), enumerate(rates)):
                taken = [(turn * calls + i) % len(sources) for i in range(calls)]
                time.sleep(0.01)  # Threads of the other side spin for a while after their work.
                limit = sum(getattr(theirs, verb)(flat[pool][i]) for i in taken)
                time.sleep(0.01)
                seconds = sum(getattr(ours, verb)(tensors[pool][i]) for i in taken)
                rates[verb].append((size * calls / seconds / 1e9, size * calls / limit / 1e9))
            right = ours.exact(sources[0], targets[0])
            name = f"LMCache {importlib.import_module('importlib.metadata').version('lmcache')} LocalCPU"
            rows += [
                paired(f"{verb} {size // MIB} MiB, one tensor", "GB/s", pairs, name, must="ratio > 1", right=right)
                for verb, pairs in rates.items()
            ]
    return rows


def direct_read_s(folder: Path, total: int, threads: int) -> float:
    """Seconds to read that many bytes of a store's files past the page cache, 1 MiB at a time by each thread."""
    path = max((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_blocks)
    file = os.open(path, os.O_RDONLY | getattr(os, "O_DIRECT", 0))
    read = lambda buffer, at: os.preadv(file, [buffer], at * MIB)  # noqa: E731
    areas = [mmap.mmap(-1, MIB) for _ in range(total // MIB)]
    for area in areas:
        area.write(bytes(MIB))
    with ThreadPoolExecutor(threads) as pool:
        started = time.perf_counter()
        done = sum(pool.map(read, areas, range(len(areas))))
        elapsed = time.perf_counter() - started
    os.close(file)
    return elapsed * total / max(done, 1)


def ttft(repeats: int) -> list[Row]:
    """Time to the first token of 2,048 cached and 64 new tokens, on a Llama of 31 million random weights in fp32."""
    if absent := skipped("TTFT", "torch", "transformers", "safetensors.torch"):
        return [absent]
    os.environ["HF_HUB_OFFLINE"] = "1"
    torch, hf, st = (importlib.import_module(name) for name in ("torch", "transformers", "safetensors.torch"))
    engine = importlib.import_module("stratakv.integrations.transformers")
    prefix, tail, layers = 2048, 64, 8
    sizes = {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": layers, "vocab_size": 4096}
    heads = {"num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 128, "max_position_embeddings": 8192}
    torch.manual_seed(0)
    model = hf.LlamaForCausalLM._from_config(hf.LlamaConfig(**sizes, **heads, tie_word_embeddings=True)).eval()
    first = torch.randint(4096, (1, prefix))
    past = hf.DynamicCache()
    model(first, past_key_values=past)
    past_kv = [(layer.keys.detach(), layer.values.detach()) for layer in past.layers]
    blob = st.save({f"{i}.{n}": plane for i, pair in enumerate(past_kv) for n, plane in enumerate(pair)})

    def from_safetensors() -> Any:  # noqa: ANN401 - a DynamicCache
        tensors = st.load(blob)
        return hf.DynamicCache([(tensors[f"{i}.0"], tensors[f"{i}.1"]) for i in range(layers)])

    def first_token(ids: Any, restore: Callable[[], Any]) -> tuple[float, Any]:  # noqa: ANN401 - tensors
        """Milliseconds, and the logits."""
        started = time.perf_counter()
        past = restore()
        rest = ids[:, past.get_seq_length() if past else 0 :]
        logits = model(rest, past_key_values=past, use_cache=True, logits_to_keep=1).logits
        int(logits[0, -1].argmax())
        return (time.perf_counter() - started) * 1e3, logits

    right, ms = True, {name: [] for name in ("cold", "in place", "ram", "safetensors", "ssd", "device")}
    OUT.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=OUT)))
        tiers = {"ram": SsdConfig(enabled=False), "ssd": SsdConfig(path=folder, capacity_bytes="1GiB")}

        @contextmanager
        def opened(tier: str) -> Any:  # noqa: ANN401 - an iterator of a cache
            with stratakv.open(Config(ram=RamConfig(capacity_bytes="256MiB"), ssd=tiers[tier])) as caches:
                yield caches.register("llama", engine.geometry(model)), caches

        with opened("ssd") as (cache, caches):
            right &= engine.store(cache, first, past) == prefix
            caches.flush()
            ssd_io, threads = caches.status().ssd_io, caches.status().threads
        in_ram = stack.enter_context(opened("ram"))[0]
        right &= engine.store(in_ram, first, past) == prefix
        for repeat in range(repeats + 1):
            ids = torch.cat([first, torch.randint(4096, (1, tail))], dim=1)
            found: list[Any] = []

            def restore(cache: stratakv.ModelCache, ids: Any = ids, found: list[Any] = found) -> Any:  # noqa: ANN401
                found.append(engine.restore(cache, ids))
                return found[-1].past_key_values

            in_place = hf.DynamicCache([(keys.clone(), values.clone()) for keys, values in past_kv])
            with torch.inference_mode(), opened("ssd") as (on_ssd, _):  # A store just opened has nothing in RAM.
                ways = {"cold": lambda: None, "in place": lambda kv=in_place: kv, "ram": lambda: restore(in_ram)}
                ways |= {"safetensors": from_safetensors, "ssd": lambda cache=on_ssd: restore(cache)}
                taken = {name: first_token(ids, way) for name, way in ways.items()}
            device = direct_read_s(folder, prefix * in_ram.geometry.token_bytes, threads) * 1e3
            right &= [set(each.explanation.blocks) for each in found] == [{"ram"}, {"ssd"}]
            right &= all(torch.equal(taken[name][1], taken["in place"][1]) for name in ("ram", "ssd", "safetensors"))
            if repeat:  # The first warms up.
                ms["device"].append(device)
                for name, (elapsed, _) in taken.items():
                    ms[name].append(elapsed)

    def speedup(name: str, below: str, added: str = "") -> Pairs:
        extra = ms[added] if added else [0.0] * repeats
        times = zip(ms["cold"], ms[name], ms[below], extra, strict=True)
        return [(cold / cached, cold / (bound + more)) for cold, cached, bound, more in times]

    peer = speedup("safetensors", "in place")
    goal = f"value >= {median(value for value, _ in peer):.1f}"
    limit, read = "KV in place", f"KV in place + {ssd_io} read"
    ram, ssd = speedup("ram", "in place"), speedup("ssd", "in place", "device")
    labels = {"cold": "TTFT cold", "ram": "TTFT from RAM", "ssd": "TTFT from SSD"}
    return [
        *(row(label, median(ms[name]), "ms", n=repeats) for name, label in labels.items()),
        paired("TTFT cold / from RAM", "x", ram, limit, must="value >= 12", goal=goal, right=right),
        paired("TTFT cold / from SSD", "x", ssd, read, must="value >= 8", right=right),
        paired("TTFT cold / from safetensors bytes in RAM", "x", peer, limit),
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
    # The first pair warms up. The ratio of times is turned over: 1.0 is at the limit here too.
    imported = paired("import stratakv", "ms", pairs[1:], "import numpy", must="value < 150")
    rows = [imported | {"ratio": 1 / imported["ratio"]}]
    wheels = [wheel for folder in ("dist", "target/wheels") for wheel in ROOT.glob(f"{folder}/stratakv-*.whl")]
    if not wheels:
        return [*rows, row("wheel: skipped, there is none in dist; make wheel", n=0)]
    newest = max(wheels, key=lambda wheel: wheel.stat().st_mtime)
    return [*rows, row("wheel", newest.stat().st_size / 1e6, "MB", must="value < 10")]


def run_facts() -> Row:
    """The commit, marked if the tree differs from it, and the machine."""
    commit, processor = "unknown", platform.machine()
    with suppress(OSError, subprocess.CalledProcessError):
        command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
        commit = subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    with suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        processor = next((line.split(": ", 1)[1] for line in lines if line.startswith("model name")), processor)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    machine = f"{os.cpu_count()} cores {processor}, {memory:.0f} GiB, {platform.system()} {platform.release()}"
    return {"commit": commit, "machine": machine}


def show(rows: list[Row]) -> None:
    """Prints the table."""
    number = lambda value: "" if value is None else f"{value:.4g}"  # noqa: E731
    table = [("name", "value", "unit", "limit", "", "ratio", "must", "goal", "ok", "n")]
    for each in rows:
        bounds = (each["must"] or "", each["goal"] or "", {True: "yes", False: "NO", None: ""}[each["ok"]])
        limit = (each["limit"] or "", number(each["limit_value"]), number(each["ratio"]))
        table.append((each["name"], number(each["value"]), each["unit"], *limit, *bounds, str(each["n"] or "")))
    width = [max(map(len, column)) for column in zip(*table, strict=True)]
    for line in table:
        print("  ".join(cell.ljust(size) for cell, size in zip(line, width, strict=True)).rstrip())


def main() -> None:
    """Runs the sections, prints the table and writes `benches/out/main.json`."""
    sections = {"ttft": ttft, "copy": copy, "lmcache": lmcache, "size": size}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=sections, default=list(sections), help="sections to run")
    parser.add_argument("--repeats", type=int, default=7, help="repetitions, at least 3; 7 if not given")
    args = parser.parse_args()
    rows, facts = [], run_facts()
    for name in args.only:
        print(f"bench: {name}", file=sys.stderr, flush=True)
        try:
            rows += sections[name](max(args.repeats, 3))
        except Exception as error:  # A section that breaks must not hide the others.
            traceback.print_exc()
            rows.append(row(f"{name}: failed, {type(error).__name__}", right=False, n=0))
    show(rows)
    print(f"\n{facts['machine']}; commit {facts['commit']}")
    OUT.mkdir(parents=True, exist_ok=True)
    (OUT / "main.json").write_text(json.dumps([each | facts for each in rows], indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
