"""Runs vLLM in a process of its own: a job as JSON on standard input, what came of it as JSON on the last line.

An engine is one for each process, and a restart is another process.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.update(
    HF_HUB_OFFLINE="1",
    OMP_NUM_THREADS="1",
    VLLM_CPU_KVCACHE_SPACE="1",
    VLLM_CPU_OMP_THREADS_BIND="nobind",
    VLLM_LOGGING_LEVEL="INFO",
    VLLM_NO_USAGE_STATS="1",
)


@contextlib.contextmanager
def dropping(cache: Any, every_s: float) -> Iterator[None]:
    """Forgets all that is cached, again and again, between matches and loads as well."""
    over = threading.Event()

    def drop() -> None:
        while not over.wait(every_s):
            cache.drop()

    thread = threading.Thread(target=drop)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def damage(folder: Path, every: int) -> int:
    """Turns one bit in every so many bytes of the store's segments.

    On the disk at once, and while nobody writes there: what is in the system's memory only is in the way of direct I/O.
    """
    turned = 0
    for file in folder.rglob("*.kv"):
        with file.open("r+b") as handle:
            for at in range(every // 2, file.stat().st_size, every):
                handle.seek(at)
                byte = handle.read(1)
                handle.seek(at)
                handle.write(bytes([byte[0] ^ 0x10]))
                turned += 1
            handle.flush()
            os.fsync(handle.fileno())
    return turned


def main(job: dict[str, Any]) -> dict[str, Any]:
    if job.get("processes"):
        # Ranks that share cores would wait for each other's threads.
        os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "1", "OMP_NUM_THREADS": "1"}
    else:
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    from vllm import LLM, SamplingParams
    from vllm.config import KVEventsConfig, KVTransferConfig
    from vllm.distributed.kv_transfer import get_kv_transfer_group
    from vllm.lora.request import LoRARequest

    transfer = None
    if job.get("connector"):
        transfer = KVTransferConfig(**{"kv_role": "kv_both"} | job["connector"])
    events = KVEventsConfig(**job["events"]) if "events" in job else None
    settings = {
        "dtype": "float32",
        "enforce_eager": True,
        "max_model_len": 1024,
        "block_size": 32,
        "disable_log_stats": False,
        "skip_tokenizer_init": True,
        "seed": 0,
    }
    llm = LLM(
        model=job["model"], kv_transfer_config=transfer, kv_events_config=events, **settings | job.get("engine", {})
    )
    out: dict[str, Any] = {"rounds": []}
    for each in job["rounds"]:
        prompts, loras = [], []
        for prompt in each["prompts"]:
            prompts.append(
                {"prompt_token_ids": prompt["ids"]} | ({"cache_salt": prompt["salt"]} if "salt" in prompt else {})
            )
            lora = prompt.get("lora")
            loras.append(LoRARequest(lora["name"], lora["id"], lora["path"]) if lora else None)
        if each.get("drop"):
            get_kv_transfer_group()._worker._cache.drop()
        if "damage" in each:
            get_kv_transfer_group()._worker._caches.flush()
            damage(Path(each["damage"][0]), each["damage"][1])
        greedy = SamplingParams(max_tokens=each.get("tokens", 16), temperature=0.0, ignore_eos=True, detokenize=False)
        with contextlib.ExitStack() as stack:
            if "drop_every_s" in each:
                stack.enter_context(dropping(get_kv_transfer_group()._worker._cache, each["drop_every_s"]))
            started = time.perf_counter()
            done = llm.generate(prompts, greedy, use_tqdm=False, lora_request=loras if any(loras) else None)
            seconds = time.perf_counter() - started
        out["rounds"].append(
            {
                "tokens": [list(one.outputs[0].token_ids) for one in done],
                "cached": [one.num_cached_tokens for one in done],
                "first_s": [one.metrics.first_token_latency for one in done],
                "seconds": seconds,
            }
        )
        if each.get("reset"):
            llm.reset_prefix_cache(reset_connector=True)
        time.sleep(each.get("wait_s", 0))
    out["metrics"] = {metric.name: metric.value for metric in llm.get_metrics() if hasattr(metric, "value")}
    llm.llm_engine.engine_core.shutdown()
    return out


if __name__ == "__main__":
    print(json.dumps(main(json.load(sys.stdin))), flush=True)
