"""Hit ratios inside vLLM's CPU offloading manager: its own policies, and those of `stratakv.integrations.vllm.policy`.

`python benches/vllm_policy.py TRACE`, where vLLM is installed: a trace of Mooncake's form, as for benches/policy.py,
whose figures are those of the same policies outside vLLM. With SCAN=N every N-th request is followed by one of 64
chunks that nobody asks for again.
"""

from __future__ import annotations

import os
import sys
import time
from itertools import count, takewhile
from pathlib import Path

import numpy as np
from policy import CAPACITIES, read
from vllm.v1.kv_offload.base import LookupResult, OffloadKey, ReqContext, make_offload_key
from vllm.v1.kv_offload.cpu.manager import CPUOffloadingManager

from stratakv.integrations.vllm import policy

SCAN_CHUNKS = 64


def run(requests: list[list[OffloadKey]], name: str, chunks: int) -> tuple[float, float]:
    """Hit ratio, and microseconds for each chunk that was asked for, all of the manager's work included."""
    module = None if name in ("lru", "arc") else policy.__name__
    cache = CPUOffloadingManager(num_chunks=chunks, cache_policy=name, cache_policy_module_path=module)
    hits = asked = 0
    started = time.perf_counter()
    for number, path in enumerate(requests):
        request = ReqContext(req_id=str(number))
        for at, key in enumerate(path):
            request.set_offload_key_position(key, at + 1)
        cache.on_new_request(request)
        found = list(takewhile(lambda key: cache.lookup(key, request) is LookupResult.HIT, path))  # noqa: B023
        cache.prepare_load(found, request)
        # As the scheduler does in prefill: a few chunks a step.
        for at in range(len(found), len(path), 16):
            output = cache.prepare_store(path[at : at + 16], request)
            if output is not None:
                cache.complete_store(output.keys_to_store, request)
        cache.complete_load(found, request)
        cache.on_request_finished(request)
        hits += len(found)
        asked += len(path)
    return hits / asked, (time.perf_counter() - started) / asked * 1e6


def main() -> None:
    """Prints a row for each policy."""
    scan = int(os.environ.get("SCAN", "0"))
    once = count(1 << 40)
    requests: list[list[OffloadKey]] = []
    for number, (_, path) in enumerate(read(Path(sys.argv[1]))):
        requests.append([make_offload_key(np.uint64(block).tobytes() * 4, 0) for block in path])
        if scan and number % scan == 0:
            requests.append([make_offload_key(np.uint64(next(once)).tobytes() * 4, 0) for _ in range(SCAN_CHUNKS)])
    print("policy", *CAPACITIES, "us a chunk", sep="\t")
    for name in ("lru", "arc", *policy.__all__):
        found = [run(requests, name, chunks) for chunks in CAPACITIES]
        print(name, *(f"{100 * ratio:.1f}" for ratio, _ in found), f"{np.mean([us for _, us in found]):.1f}", sep="\t")


if __name__ == "__main__":
    main()
