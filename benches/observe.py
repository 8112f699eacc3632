"""What it costs to be observed: `make bench SUITE=observe`.

Sections: `requests` (match and load with everything on, traces sampled at 1 %, an OTLP receiver that takes them and a
scrape every second, against a store that shows nothing; and what a match asks where nothing is on), `scrape` (a scrape
of 64 models), `page` (the browser's own figure of its first paint). Stores take turns, so `ratio` is the median over
neighbouring pairs.
"""

from __future__ import annotations

import http.client
import sys
import tempfile
import threading
import time
import timeit
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import median
from urllib.parse import urlsplit

import numpy as np
from rows import ROOT, Row, paired, row, run

import stratakv

sys.path.insert(0, str(ROOT / "tests"))

from browser import Browser
from otlp import over_http
from stores import geometry, kv_of, loaded, tokens_of

TURNS, MATCHES = 41, 400
GEOMETRY = stratakv.Geometry(layers=16, kv_heads=8, head_dim=64, dtype="fp16")


def opened(stack: ExitStack, **observe: object) -> stratakv.CacheManager:
    folder = stack.enter_context(tempfile.TemporaryDirectory())
    config = stratakv.Config(
        ram=stratakv.RamConfig(capacity_bytes="512MiB"),
        ssd=stratakv.SsdConfig(path=folder, capacity_bytes="1GiB"),
        observe=stratakv.ObserveConfig(**observe),  # type: ignore[arg-type]  # its fields
    )
    return stack.enter_context(stratakv.open(config))


@contextmanager
def scraping(address: str) -> Iterator[None]:
    """A scrape every second, as Prometheus would at most."""
    over = threading.Event()

    def scrape() -> None:
        while not over.wait(1.0):
            get(address, "/metrics")

    thread = threading.Thread(target=scrape)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def get(address: str, path: str) -> bytes:
    link = http.client.HTTPConnection(urlsplit(address).netloc, timeout=30)
    try:
        link.request("GET", path)
        return link.getresponse().read()
    finally:
        link.close()


def match_p50_us(cache: stratakv.ModelCache, tokens: np.ndarray) -> float:
    times = []
    for _ in range(MATCHES):
        begun = time.perf_counter()
        hit = cache.match(tokens)
        times.append(time.perf_counter() - begun)
        hit.release()
    return 1e6 * median(times)


def load_us(cache: stratakv.ModelCache, tokens: np.ndarray, out: np.ndarray) -> float:
    times = []
    for _ in range(12):
        with cache.match(tokens) as hit:
            begun = time.perf_counter()
            hit.load(out, layout="LKHND")
            times.append(time.perf_counter() - begun)
    return 1e6 * median(times)


def requests() -> list[Row]:
    """Match and load, observed and not."""
    tokens = tokens_of(1, 2048)
    shape = (GEOMETRY.layers, 2, GEOMETRY.kv_heads, len(tokens), GEOMETRY.head_dim)
    kv, out = np.ones(shape, np.float16), np.zeros(shape, np.float16)
    found: dict[str, list[tuple[float, float]]] = {"match": [], "load": [], "same match": [], "same load": []}
    with ExitStack() as stack:
        receiver = stack.enter_context(over_http())
        on = opened(stack, listen="127.0.0.1:0", otlp=receiver.endpoint, trace_ratio=0.01)
        stores = [opened(stack), opened(stack), on]
        caches = [store.register("model", GEOMETRY) for store in stores]
        for cache in caches:
            cache.put(tokens, kv, layout="LKHND")
        stack.enter_context(scraping(str(on.address)))
        for turn in range(TURNS):
            # Whoever comes first is another each time.
            order = [(turn + n) % 3 for n in range(3)]
            for name, measure in (("match", match_p50_us), ("load", lambda c, t: load_us(c, t, out))):
                took = {n: measure(caches[n], tokens) for n in order}
                found[name].append((took[2], took[0]))
                found[f"same {name}"].append((took[1], took[0]))
    traces = timeit.Timer("cache.turn is not None and 1", globals={"cache": caches[0]})
    branch_us = 1e6 * min(traces.repeat(5, 200_000)) / 200_000
    match_us = median(plain for _, plain in found["match"])
    return [
        paired("match, everything on", "us", found["match"], "nothing on", must="ratio <= 1.03"),
        paired("load of 64 MiB, everything on", "us", found["load"], "nothing on", must="ratio <= 1.01"),
        paired("match, another store with nothing on", "us", found["same match"], "nothing on"),
        paired("load, another store with nothing on", "us", found["same load"], "nothing on"),
        row(
            "what a match asks where nothing is on",
            branch_us,
            "us",
            limit="a match",
            limit_value=match_us,
            ratio=branch_us / match_us,
            must="ratio <= 0.005",
        ),
    ]


def scrape() -> list[Row]:
    """64 models, each with hits and misses."""
    with ExitStack() as stack:
        caches = opened(stack, listen="127.0.0.1:0")
        for n in range(64):
            cache = caches.register(f"model-{n}", geometry())
            tokens = tokens_of(n, 64)
            cache.put(tokens, kv_of(tokens, cache.geometry), layout="LKHND")
            loaded(cache, tokens)
        times, size = [], 0
        for _ in range(51):
            begun = time.perf_counter()
            size = len(get(str(caches.address), "/metrics"))
            times.append(1e3 * (time.perf_counter() - begun))
    return [
        row("scrape of 64 models", median(times), "ms", must="value <= 20", n=len(times)),
        row("bytes of it", size, "B"),
    ]


def page() -> list[Row]:
    """From the opening of the page to its first paint, in a browser that has not seen it."""
    times = []
    with ExitStack() as stack:
        caches = opened(stack, listen="127.0.0.1:0")
        caches.register("model", geometry())
        for _ in range(5):
            # Its processes may write for a moment after it is closed.
            folder = stack.enter_context(tempfile.TemporaryDirectory(ignore_cleanup_errors=True))
            browser = Browser(Path(folder))
            stack.callback(browser.close)
            browser.open(str(caches.address))
            paint = "performance.getEntriesByName('first-contentful-paint')[0]?.startTime"
            browser.wait(f"{paint} > 0")
            times.append(float(browser.run(paint)))
    return [row("first paint of the page", median(times), "ms", must="value < 1000", n=len(times))]


if __name__ == "__main__":
    run("observe", requests, scrape, page)
