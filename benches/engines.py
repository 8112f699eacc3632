"""What an engine's users see: time to first token in vLLM's CPU build, with stratakv and with what vLLM brings.

Each engine is a process that stays; they take turns, prompt by prompt, so that a noisy machine is noisy for all. The
model is SmolLM2-135M in fp32, prompts are 1,040 random tokens: 1,024 of them cached, or none. Sections: `hit` (stratakv
in RAM against vLLM's ExampleConnector, which writes plain files without checksums, against the engine's own prefix
cache, which copies nothing and is the limit, and against computing it), `miss` (nothing reused: stratakv against no
connector) and `lmcache` (LMCache's connector, where it runs).
connector) and `lmcache` (LMCache's connector, where it runs).
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

from rows import Row, paired, row, run

MODELS = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "stratakv" / "models"
TOKENS, CACHED, BLOCK = 1040, 1024, 32
HITS, MISSES = 21, 15


class Engine:
    """One engine in a process of its own."""

    def __init__(self, model: Path, connector: dict[str, Any] | None, *, prefix_cache: bool = False) -> None:
        job = {"model": str(model), "connector": connector, "prefix_cache": prefix_cache}
        self._process = subprocess.Popen(
            [sys.executable, __file__, "--serve", json.dumps(job)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )

    def ready(self) -> bool:
        assert self._process.stdout is not None
        return any(line.strip() == "ready" for line in self._process.stdout)

    def ask(self, ids: list[int]) -> tuple[float, int, int]:
        """Seconds to the first token, tokens that were cached, and the token."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(ids) + "\n")
        self._process.stdin.flush()
        for line in self._process.stdout:
            if line.startswith("answer "):
                first_s, cached, token = json.loads(line.removeprefix("answer "))
                return first_s, cached, token
        raise RuntimeError("the engine ended")

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(60)
        except subprocess.TimeoutExpired:
            self._process.kill()


def serve(job: dict[str, Any]) -> None:
    """Answers prompts from standard input until it ends."""
    os.environ.update(
        HF_HUB_OFFLINE="1",
        LMCACHE_CHUNK_SIZE="256",
        LMCACHE_LOCAL_CPU="True",
        LMCACHE_MAX_LOCAL_CPU_SIZE="1",
        OMP_NUM_THREADS="2",
        PYTHONHASHSEED="0",
        VLLM_CPU_KVCACHE_SPACE="1",
        VLLM_CPU_OMP_THREADS_BIND="nobind",
        VLLM_ENABLE_V1_MULTIPROCESSING="0",
        VLLM_NO_USAGE_STATS="1",
    )
    from vllm import LLM, SamplingParams
    from vllm.config import KVTransferConfig

    connector = job["connector"] and KVTransferConfig(kv_role="kv_both", **job["connector"])
    llm = LLM(
        model=job["model"],
        dtype="float32",
        enforce_eager=True,
        max_model_len=2048,
        max_num_batched_tokens=2048,
        block_size=BLOCK,
        enable_prefix_caching=job["prefix_cache"],
        disable_log_stats=False,
        kv_transfer_config=connector,
    )
    one = SamplingParams(max_tokens=1, temperature=0.0, detokenize=False)
    print("ready", flush=True)
    for line in sys.stdin:
        done = llm.generate([{"prompt_token_ids": json.loads(line)}], one, use_tqdm=False)[0]
        answer = [done.metrics.first_token_latency, done.num_cached_tokens, done.outputs[0].token_ids[0]]
        print("answer " + json.dumps(answer), flush=True)
    llm.llm_engine.engine_core.shutdown()


def model() -> Path:
    """SmolLM2, converted once."""
    from stratakv.demo.model import smollm2

    smollm2(MODELS, lambda text: print(text, file=sys.stderr))
    return MODELS / "smollm2-135m-instruct"


def stratakv_in(folder: Path) -> dict[str, Any]:
    options = {"ram": {"capacity_bytes": "2GiB"}, "ssd": {"path": str(folder / "stratakv"), "capacity_bytes": "4GiB"}}
    return {
        "kv_connector": "StrataConnector",
        "kv_connector_module_path": "stratakv.integrations.vllm",
        "kv_connector_extra_config": options,
    }


def example_in(folder: Path) -> dict[str, Any]:
    (folder / "example").mkdir()
    extra = {"shared_storage_path": str(folder / "example")}
    return {"kv_connector": "ExampleConnector", "kv_connector_extra_config": extra}


@contextmanager
def engines(**kinds: tuple[dict[str, Any] | None, bool]) -> Iterator[dict[str, Engine]]:
    """Started one after the other: each takes both cores to start."""
    found: dict[str, Engine] = {}
    try:
        for name, (connector, prefix_cache) in kinds.items():
            found[name] = Engine(model(), connector, prefix_cache=prefix_cache)
            if not found[name].ready():
                raise RuntimeError(f"{name} did not start")
        yield found
    finally:
        for engine in found.values():
            engine.close()


def prompt(seed: int) -> list[int]:
    draw = random.Random(seed)
    return [draw.randrange(10, 40_000) for _ in range(TOKENS)]


def hit() -> list[Row]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        kinds = {
            "stratakv": (stratakv_in(folder), False),
            "example": (example_in(folder), False),
            "own": (None, True),
            "cold": (None, False),
        }
        with engines(**kinds) as found:
            seconds: dict[str, list[float]] = {kind: [] for kind in found}
            right = True
            for seed in range(HITS + 2):
                ids = prompt(seed)
                for kind, engine in found.items():
                    if kind != "cold":
                        engine.ask(ids)
                # Whoever comes first in a turn comes last in the next.
                order = list(found) if seed % 2 else list(found)[::-1]
                tokens = {}
                for kind in order:
                    if kind == "cold" and seed % 4:
                        continue
                    first_s, cached, tokens[kind] = found[kind].ask(ids)
                    right &= cached == (0 if kind == "cold" else CACHED)
                    if seed >= 2:
                        seconds[kind].append(1000 * first_s)
                right &= len(set(tokens.values())) == 1
    ours, what = seconds["stratakv"], f"TTFT, {CACHED:,} cached + {TOKENS - CACHED} new tokens"
    pairs = {kind: list(zip(ours, seconds[kind], strict=False)) for kind in ("example", "own")}
    cold = median(seconds["cold"])
    return [
        paired(what, "ms", pairs["example"], "ExampleConnector", must="ratio <= 1", right=right),
        paired(what, "ms", pairs["own"], "own prefix cache", right=right),
        row(f"{what}: computed instead", cold, "ms", ratio=cold / median(ours), n=len(seconds["cold"]), right=right),
    ]


def miss() -> list[Row]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        kinds = {
            "stratakv": (stratakv_in(folder), False),
            "example": (example_in(folder), False),
            "none": (None, False),
        }
        with engines(**kinds) as found:
            seconds: dict[str, list[float]] = {kind: [] for kind in found}
            right = True
            for seed in range(MISSES + 1):
                order = list(found) if seed % 2 else list(found)[::-1]
                for kind in order:
                    first_s, cached, _ = found[kind].ask(prompt(1000 + seed))
                    right &= cached == 0
                    if seed:
                        seconds[kind].append(1000 * first_s)
    what = f"TTFT, {TOKENS:,} new tokens, nothing reused"
    none = seconds["none"]
    return [
        paired(
            what,
            "ms",
            list(zip(seconds["stratakv"], none, strict=True)),
            "no connector",
            must="ratio <= 1.02",
            right=right,
        ),
        paired(f"{what}: ExampleConnector", "ms", list(zip(seconds["example"], none, strict=True)), "no connector"),
    ]


def lmcache() -> list[Row]:
    what = "LMCacheConnectorV1"
    with engines(lmcache=({"kv_connector": "LMCacheConnectorV1"}, False)) as found:
        engine = found["lmcache"]
        engine.ask(prompt(1))
        first_s, cached, _ = engine.ask(prompt(1))
    if not cached:
        return [row(f"{what}: finds nothing of what it saw before, on the CPU build", n=0)]
    return [row(f"{what}: TTFT, {cached:,} cached tokens", 1000 * first_s, "ms")]


if __name__ == "__main__":
    if sys.argv[1:2] == ["--serve"]:
        serve(json.loads(sys.argv[2]))
    else:
        run("engines", hit, miss, lmcache)
