"""Several models on one box: what each strategy hits, on request traces, beside the best that was to be had.

`make bench SUITE=multimodel ARGS=DIR`: DIR holds the conversation trace and the agent sessions that benches/policy.py
reads. No public trace has several models, so the mix is made of them, one hour each from the same start: conversations
go to a Llama-3.2-1B or a Llama-3.1-8B by their second block, agents to one Qwen2.5-7B, or in turns to one of 0.5B too.
Budgets and blocks are a 512th of their true sizes, and the keys and values the same bytes over and over; all else is
real: requests go through the manager, by the clock of the trace, and what a match finds is what is counted.

The best static split is found offline: exact miss-ratio curves of a leaf-first LRU for each model, and dynamic
programming over 64 steps, with floors or without. One shared LRU is simulated, leaf-first, without slots or chunks.
"""

from __future__ import annotations

import functools
import itertools
import sys
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Hashable
from pathlib import Path
from typing import Any

import numpy as np
from policy import read
from rows import OUT, Row, paired, row, run

import stratakv
from stratakv import _native
from stratakv.events import PLACES, Stored
from stratakv.router import Router

# The folder is no section.
TRACES = next((Path(name) for name in sys.argv[1:] if Path(name).is_dir()), None)
sys.argv = [name for name in sys.argv if not Path(name).is_dir()]
# One in so many bytes.
SCALE = 512
TOKENS = 512
HOUR_S = 3600.0
BUDGETS_GB = (100, 200, 500, 1000, 2000)
STEPS = 64
GIB = 1 << 30
EVERY_S = 30.0
# KV bytes of a token.
SIZES = {"llama-1b": 32 << 10, "llama-8b": 128 << 10, "qwen-7b": 56 << 10, "qwen-0.5b": 12 << 10}

STRATEGIES = ("fair", "proportional", "priority", "dynamic")
AGENTS = ("qwen-7b", "qwen-0.5b")

# A model's name, and the blocks of a request.
Requests = list[tuple[float, str, list[Hashable]]]


@functools.cache
def mix(agents: int) -> Requests:
    """The requests of one hour, with one or two models of agents."""
    assert TRACES is not None
    requests: Requests = []
    for at, path in read(next(iter(TRACES.glob("mooncake_conversation.jsonl*")))):
        name = "llama-8b" if hash(path[min(1, len(path) - 1)]) % 2 else "llama-1b"
        requests.append((at / 1000, name, path))
    sessions = read(next(iter(TRACES.glob("weka_agentic*.jsonl*"))))
    # Some hours after the first session there are as many as there ever are.
    begin = 4 * HOUR_S
    known: dict[Hashable, int] = {}
    for at, path in sessions:
        if begin <= at < begin + HOUR_S:
            # A session is known by a block that it shares with no other.
            session = known.setdefault(path[min(40, len(path) - 1)], len(known))
            requests.append((at - begin, AGENTS[session % agents], path))
    return sorted((at, name, path) for at, name, path in requests if at < HOUR_S)


def block_bytes(name: str) -> int:
    """Bytes of a block's record, scaled."""
    return SIZES[name] * TOKENS // SCALE


def geometry(name: str) -> stratakv.Geometry:
    """A geometry whose records take `block_bytes`: whole pages, the header and token ids among them."""
    payload = block_bytes(name) - 128 - 4 * TOKENS
    return stratakv.Geometry(
        layers=1, planes=1, kv_heads=1, head_dim=payload // TOKENS, dtype="uint8", block_tokens=TOKENS
    )


class Hits:
    """Blocks asked for and hit, by model."""

    def __init__(self) -> None:
        """Of no requests yet."""
        self.asked: dict[str, int] = {}
        self.hit: dict[str, int] = {}

    def add(self, name: str, asked: int, hit: int) -> None:
        """Counts a request."""
        self.asked[name] = self.asked.get(name, 0) + asked
        self.hit[name] = self.hit.get(name, 0) + hit

    def ratio(self) -> float:
        """Bytes hit over bytes asked for."""
        bytes_of = lambda blocks: sum(count * block_bytes(name) for name, count in blocks.items())  # noqa: E731
        return bytes_of(self.hit) / bytes_of(self.asked)

    def each(self) -> str:
        """The percentage of each model."""
        return " ".join(f"{name} {100 * self.hit[name] / self.asked[name]:.1f}" for name in sorted(self.asked))


def serve(
    requests: Requests,
    budget: int,
    watch: Callable[[float, stratakv.CacheManager, Hits], None] | None = None,
    **models: Any,  # noqa: ANN401 - the fields of `ModelsConfig`
) -> Hits:
    """Sends the requests through a manager; `watch` looks on after each division."""
    now = [0.0]
    config = stratakv.Config(
        ram=stratakv.RamConfig(capacity_bytes=budget),
        ssd=stratakv.SsdConfig(enabled=False),
        models=stratakv.ModelsConfig(interval_s=0, **models),
        store=stratakv.StoreConfig(secret="bench", threads=1),
    )
    hits, words, tick = Hits(), {}, 0.0
    with stratakv.CacheManager(config, clock=lambda: now[0]) as caches:
        used = {name for _, name, _ in requests}
        register = {name: caches.register(name, geometry(name)) for name in sorted(used)}
        payload = {name: np.zeros(cache.geometry.head_dim, np.uint8) for name, cache in register.items()}
        for at, name, path in requests:
            now[0] = at
            while at >= tick:
                caches.rebalance()
                tick += EVERY_S
                if watch:
                    watch(at, caches, hits)
            # An id names its whole prefix: it stands for the tokens of its block.
            numbers = np.array([words.setdefault(block, len(words)) for block in path], np.uint32)
            tokens = np.repeat(numbers, TOKENS)
            cache, shape = register[name], (1, 1, 1, len(tokens), payload[name].size)
            with cache.match(tokens) as found:
                hits.add(name, len(path), found.tokens // TOKENS)
            same = np.lib.stride_tricks.as_strided(payload[name], shape, (0, 0, 0, 0, 1), writeable=False)
            cache.put(tokens, same, layout="LKHND")
    return hits


def shared_lru(requests: Requests, budget: int) -> Hits:
    """One LRU of all models, leaf-first, exact in bytes."""
    held: OrderedDict[tuple[str, Hashable], int] = OrderedDict()
    used, hits = 0, Hits()
    for _, name, path in requests:
        size = block_bytes(name)
        found = next((n for n, block in enumerate(path) if (name, block) not in held), len(path))
        hits.add(name, len(path), found)
        for block in reversed(path):
            used += 0 if (name, block) in held else size
            held[name, block] = size
            held.move_to_end((name, block))
        while used > budget:
            used -= held.popitem(last=False)[1]
    return hits


def distances(requests: Requests) -> dict[str, np.ndarray]:
    """Of each model, how often it would hit with so many blocks: leaf-first LRU, by stack distance."""
    found = {}
    for name in sorted({name for _, name, _ in requests}):
        asked = [block for _, whose, path in requests if whose == name for block in reversed(path)]
        last: dict[Hashable, int] = {}
        tree = np.zeros(len(asked) + 1, np.int64).tolist()
        counts = np.zeros(len(asked) + 2, np.int64)
        for now, block in enumerate(asked):
            before = last.get(block)
            if before is not None:
                newer, at = len(last), before + 1
                while at > 0:
                    newer -= tree[at]
                    at &= at - 1
                counts[newer + 1] += 1
                at = before + 1
                while at < len(tree):
                    tree[at] -= 1
                    at += at & -at
            last[block] = now
            at = now + 1
            while at < len(tree):
                tree[at] += 1
                at += at & -at
        found[name] = np.cumsum(counts)
    return found


@functools.cache
def curves(agents: int) -> dict[str, np.ndarray]:
    """The curves of the mix."""
    return distances(mix(agents))


def best_static(agents: int, budget: int, floor: float = 0.0) -> float:
    """The hit ratio of the best split into 64 steps, of LRUs, each with this part of a fair share at least."""
    requests = mix(agents)
    best = np.full(STEPS + 1, -np.inf)
    best[0] = 0.0
    least = int(floor * STEPS / len(curves(agents)))
    for name, hits in curves(agents).items():
        blocks = np.arange(STEPS + 1) * budget // STEPS // block_bytes(name)
        value = (hits[np.minimum(blocks, len(hits) - 1)] * block_bytes(name)).astype(float)
        value[:least] = -np.inf
        best = np.array([max(best[used - own] + value[own] for own in range(used + 1)) for used in range(STEPS + 1)])
    asked = sum(len(path) * block_bytes(name) for _, name, path in requests)
    return float(best.max() / asked)


def strategies() -> list[Row]:
    """What each strategy hits."""
    rows = []
    for agents in (1, 2):
        for budget_gb in BUDGETS_GB:
            requests, budget = mix(agents), budget_gb * 10**9 // SCALE
            label = f"{2 + agents} models, {budget_gb} GB"
            shared = shared_lru(requests, budget)
            found = {name: serve(requests, budget, strategy=name) for name in STRATEGIES}
            free = serve(requests, budget, strategy="dynamic", floor=0)
            for name, hits in [("shared LRU", shared), *found.items(), ("dynamic without floors", free)]:
                rows.append(row(f"{label}: {name}: {hits.each()}", 100 * hits.ratio(), "% of bytes", n=len(requests)))
            for name, hits, floor in (("dynamic without floors", free, 0.0), ("dynamic", found["dynamic"], 0.5)):
                best = best_static(agents, budget, floor)
                limit = {"limit": f"best static split, floors {floor:g}", "limit_value": 100 * best}
                bounds = {"must": "ratio >= 0.85", "goal": "ratio >= 0.95"}
                value = hits.ratio()
                rows.append(row(f"{label}: {name}", 100 * value, "% of bytes", ratio=value / best, **limit, **bounds))
            for name, other in (("fair", found["fair"]), ("shared LRU", shared)):
                more = 100 * (found["dynamic"].ratio() - other.ratio())
                rows.append(row(f"{label}: dynamic - {name}", more, "points", must="value >= -1", goal="value >= 0"))
    return rows


def moving() -> list[Row]:
    """Match and load of one block of 2 MiB: at rest, and while 1 GiB of RAM goes from one model to another and back."""
    shape = stratakv.Geometry(layers=16, kv_heads=8, head_dim=64, dtype="fp16", block_tokens=64)
    models = stratakv.ModelsConfig(strategy="priority", interval_s=0, floor=0, idle_s=0)
    config = stratakv.Config(
        ram=stratakv.RamConfig(capacity_bytes="3GiB"), ssd=stratakv.SsdConfig(enabled=False), models=models
    )
    source = np.zeros((16, 2, 8, 64 * 16, 64), np.float16)
    target, hot = np.zeros_like(source), np.arange(64)
    random, pairs, moved = np.random.default_rng(5), [], 0
    with stratakv.open(config) as caches:
        # Two thirds against one third by priority, and the other way round by size.
        one = caches.register("one", shape, priority=10, weights_bytes=1)
        two = caches.register("two", shape, priority=5, weights_bytes=2)
        rules = ({"strategy": "proportional", "demand": "weights"}, {"strategy": "priority"})

        def fill(cache: stratakv.ModelCache, blocks: int) -> None:
            for _ in range(blocks // 16):
                cache.put(random.integers(0, 1 << 31, 64 * 16), source, layout="LKHND")

        def p99(until: Callable[[], bool]) -> float:
            taken = []
            while not until() or len(taken) < 300:
                started = time.perf_counter()
                with one.match(hot) as hit:
                    assert hit.load(target, layout="LKHND") == 64
                taken.append(time.perf_counter() - started)
                time.sleep(0.0005)
            return float(np.quantile(taken, 0.99)) * 1e6

        one.put(hot, source, layout="LKHND")
        leased = one.match(hot)
        fill(one, 1536)
        for turn in range(12):
            gains = (two, one)[turn % 2]
            caches.set_models(**rules[turn % 2])
            before = caches.status().ram_held[gains.name]
            writer = threading.Thread(target=fill, args=(gains, 1024))
            writer.start()
            busy = p99(lambda writer=writer: not writer.is_alive())
            writer.join()
            moved += caches.status().ram_held[gains.name] - before
            turns = itertools.count()
            pairs.append((busy, p99(lambda turns=turns: next(turns) > 600)))
        leased.release()
    more = {"must": "ratio <= 2", "goal": "ratio <= 1.2", "right": None if moved > 10 * GIB else False}
    return [paired("match + load 2 MiB, p99, while 1 GiB changes hands", "us", pairs, "at rest", **more)]


def routing() -> list[Row]:
    """One decision over 64 replicas, of 4,096 tokens: all have the prompt, each has another part of it, none has it."""
    dice = np.random.default_rng(7)
    hasher = _native.PrefixIndex(b"secret", "", "", (1, 2, 1, 1, "uint8", 16))
    rows = []
    for label, lengths in (
        ("all have it", [256] * 64),
        ("each has another part", list(range(4, 260, 4))),
        ("none has it", [0] * 64),
    ):
        router = Router()
        prompts = [dice.integers(0, 50_000, 4096).astype(np.uint32) for _ in range(200)]
        for n, blocks in enumerate(lengths):
            router.add_replica(f"replica-{n}")
            for number, prompt in enumerate(prompts if blocks else []):
                names = tuple(range(number << 16, (number << 16) + blocks))
                tokens = tuple(prompt[: 16 * blocks].tolist())
                place = PLACES[n % 3]
                stored = Stored(names=names, parent=None, tokens=tokens, block_tokens=16, place=place)
                router.apply(f"replica-{n}", [stored])
        pairs = []
        for prompt in prompts:
            started = time.perf_counter()
            decision = router.route(prompt)
            middle = time.perf_counter()
            hasher.hashes(prompt, "", "")
            pairs.append(((middle - started) * 1e6, (time.perf_counter() - middle) * 1e6))
            assert decision.replica is not None
        more = {"must": "value < 200", "goal": "value <= 50"}
        rows.append(paired(f"route 4,096 tokens over 64 replicas, {label}", "us", pairs, "hashing its blocks", **more))
    return rows


COLOURS = {"llama-1b": "#4477aa", "llama-8b": "#66ccee", "qwen-7b": "#ee6677", "qwen-0.5b": "#ccbb44"}
# Of the picture: where each panel begins, and its size.
WIDTH, HEIGHT, LEFT, TOPS = 640, 150, 60, (40, 250)


def changing() -> Requests:
    """A mix that changes: agents come after 20 minutes, the larger of the conversations' models goes after 40."""
    keep = {"qwen-7b": (1200.0, HOUR_S), "llama-8b": (0.0, 2400.0), "llama-1b": (0.0, HOUR_S)}
    return [each for each in mix(1) if keep[each[1]][0] <= each[0] < keep[each[1]][1]]


def picture() -> list[Row]:
    """Draws shares and hit ratios of three models while the mix changes, to benches/out/multimodel.svg."""
    requests, budget = changing(), 500 * 10**9 // SCALE
    names = sorted({name for _, name, _ in requests})
    shares: list[tuple[float, dict[str, float]]] = []
    ratios: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
    last = dict.fromkeys(names, (0, 0))

    def watch(at: float, caches: stratakv.CacheManager, hits: Hits) -> None:
        shares.append((at, {name: share / budget for name, share in caches.status().ram_shares.items()}))
        if len(shares) % 4:
            return
        for name in names:
            asked, hit = hits.asked.get(name, 0), hits.hit.get(name, 0)
            if asked > last[name][0]:
                ratios[name].append((at, (hit - last[name][1]) / (asked - last[name][0])))
            last[name] = (asked, hit)

    found = serve(requests, budget, watch, strategy="dynamic", idle_s=300)
    (OUT / "multimodel.svg").write_text(draw(names, shares, ratios), encoding="utf-8")
    print("bench: drew", OUT / "multimodel.svg", file=sys.stderr)
    return [row(f"a changing mix, 500 GB: dynamic: {found.each()}", 100 * found.ratio(), "% of bytes", n=len(requests))]


def draw(
    names: list[str], shares: list[tuple[float, dict[str, float]]], ratios: dict[str, list[tuple[float, float]]]
) -> str:
    """Two panels, one above the other: stacked shares, and hit ratios."""
    x = lambda at: LEFT + at / HOUR_S * WIDTH  # noqa: E731
    y = lambda top, part: top + HEIGHT * (1 - part)  # noqa: E731
    parts, below = [], [0.0] * len(shares)
    for name in names:
        above = [part + share[name] for part, (_, share) in zip(below, shares, strict=True)]
        edge = [(x(at), y(TOPS[0], part)) for (at, _), part in zip(shares, above, strict=True)]
        edge += [(x(at), y(TOPS[0], part)) for (at, _), part in reversed(list(zip(shares, below, strict=True)))]
        points = " ".join(f"{a:.1f},{b:.1f}" for a, b in edge)
        parts.append(f'<polygon points="{points}" fill="{COLOURS[name]}"/>')
        line = " ".join(f"{x(at):.1f},{y(TOPS[1], part):.1f}" for at, part in ratios[name])
        parts.append(f'<polyline points="{line}" fill="none" stroke="{COLOURS[name]}" stroke-width="2"/>')
        below = above
    for title, top in zip(("share of RAM", "hit ratio, of 2 minutes each"), TOPS, strict=True):
        parts.append(f'<text x="{LEFT}" y="{top - 10}">{title}</text>')
        parts.append(f'<rect x="{LEFT}" y="{top}" width="{WIDTH}" height="{HEIGHT}" fill="none" stroke="#888"/>')
        parts += [f'<text x="{LEFT - 8}" y="{y(top, n) + 4}" text-anchor="end">{n:.0%}</text>' for n in (0.0, 0.5, 1.0)]
        minutes = range(0, 61, 10)
        parts += [
            f'<text x="{x(60 * n):.0f}" y="{top + HEIGHT + 18}" text-anchor="middle">{n} min</text>' for n in minutes
        ]
    for n, name in enumerate(names):
        parts.append(f'<rect x="{LEFT + 120 * n}" y="440" width="12" height="12" fill="{COLOURS[name]}"/>')
        parts.append(f'<text x="{LEFT + 120 * n + 18}" y="451">{name}</text>')
    size = f'width="{LEFT + WIDTH + 30}" height="470" font-family="sans-serif" font-size="12"'
    body = "\n".join(parts)
    ground = '<rect width="100%" height="100%" fill="#fff"/>'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size}>\n{ground}\n{body}\n</svg>\n'


def main() -> None:
    """Runs all sections, if a folder of traces is named."""
    if TRACES is None:
        print("bench: routing alone, since no folder of traces is named: ARGS=DIR", file=sys.stderr)
        run("multimodel", routing)
    else:
        run("multimodel", strategies, moving, routing, picture)


if __name__ == "__main__":
    main()
