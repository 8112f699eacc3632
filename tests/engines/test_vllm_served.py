"""vLLM as its users run it: SmolLM2, and a server that is killed."""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from engines.test_vllm import connector, environment, failures, run

pytest.importorskip("vllm")
demo = pytest.importorskip("stratakv.demo.model")

pytestmark = [pytest.mark.engines, pytest.mark.filterwarnings("default"), pytest.mark.timeout(900)]

MODELS = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "stratakv" / "models"
TEXT = """A cache keeps what was computed so that it need not be computed again. What it keeps has to be found, has to
be right, and has to be worth its room. The first question is one of names, the second one of proofs, and the third one
of prices. Whoever answers only one of them has built a store that is fast, or safe, or cheap, and rarely a cache. """


@pytest.fixture(scope="module")
def smollm2() -> Path:
    """Real weights; they are fetched once, as the demo does."""
    try:
        demo.smollm2(MODELS, print)
    except OSError as error:
        pytest.skip(f"SmolLM2 is not to be had: {error}")
    return MODELS / "smollm2-135m-instruct"


def words(folder: Path, count: int) -> list[dict[str, Any]]:
    """Prompts of English text: a long beginning that some share, and a question of their own."""
    from transformers import AutoTokenizer

    encode = AutoTokenizer.from_pretrained(folder).encode
    draw = random.Random(7)
    sentences = TEXT.replace("\n", " ").split(". ")

    def text(n: int) -> str:
        return ". ".join(draw.choice(sentences) for _ in range(n)) + "."

    shared = [text(n) for n in (2, 3, 4, 5)]
    return [
        {"ids": encode(f"{shared[n % 4]} {text(1 + n % 3)} So the answer to question {n} is")} for n in range(count)
    ]


def test_32_requests_to_smollm2_say_the_same_warm_preempted_after_a_restart_and_damaged(
    smollm2: Path, tmp_path: Path
) -> None:
    prompts = words(smollm2, 32)
    assert all(40 < len(prompt["ids"]) < 320 for prompt in prompts)
    engine = {"enable_prefix_caching": False, "max_num_batched_tokens": 512}
    job = {"model": str(smollm2), "engine": engine, "rounds": [{"prompts": prompts, "tokens": 12}]}
    alone = run(job)["rounds"][0]["tokens"]
    assert len({tuple(each) for each in alone}) > 8
    warm = run(job | {"connector": connector(tmp_path, ram="1GiB"), "rounds": job["rounds"] * 2})
    assert [each["tokens"] for each in warm["rounds"]] == [alone] * 2
    few = {"enable_prefix_caching": True, "num_gpu_blocks_override": 40, "max_model_len": 512, "max_num_seqs": 32}
    # The second time some of the records are damaged that RAM has no room for.
    rounds = [job["rounds"][0], job["rounds"][0] | {"damage": [str(tmp_path), 5_000_000]}]
    again = run(job | {"connector": connector(tmp_path, ram="64MiB"), "engine": engine | few, "rounds": rounds})
    assert [each["tokens"] for each in again["rounds"]] == [alone] * 2
    assert again["metrics"]["vllm:num_preemptions"] > 0
    assert again["metrics"]["vllm:stratakv_hit_tokens"] > 0
    assert failures(warm) == 0 < failures(again)


@contextmanager
def server(model: Path, folder: Path) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """vLLM's server, in processes of its own, and its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    variables = environment(HF_HUB_OFFLINE="1", VLLM_CPU_KVCACHE_SPACE="1", VLLM_NO_USAGE_STATS="1")
    transfer = {"kv_role": "kv_both"} | connector(folder)
    command = [
        *(sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model), "--dtype", "float32"),
        *("--host", "127.0.0.1", "--port", str(port), "--enforce-eager", "--max-model-len", "1024"),
        *("--block-size", "32", "--served-model-name", "m", "--enable-prompt-tokens-details"),
        *("--kv-transfer-config", json.dumps(transfer)),
    ]
    with (folder / f"log-{port}").open("wb") as log:
        process = subprocess.Popen(command, env=variables, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            url = f"http://127.0.0.1:{port}"
            until = time.monotonic() + 300
            while True:
                try:
                    urllib.request.urlopen(f"{url}/health", timeout=5).close()
                    break
                except OSError:
                    said = Path(log.name).read_text(errors="replace")[-4000:]
                    assert process.poll() is None, said
                    assert time.monotonic() < until, said
                    time.sleep(0.5)
            yield url, process
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def ask(url: str, prompt: str) -> tuple[str, int]:
    """What the server says, and how many tokens of the prompt it did not compute."""
    body = {"model": "m", "prompt": prompt, "max_tokens": 16, "temperature": 0}
    request = urllib.request.Request(
        f"{url}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=120) as answer:
        said = json.load(answer)
    details = said["usage"].get("prompt_tokens_details") or {}
    return said["choices"][0]["text"], details.get("cached_tokens") or 0


def test_a_server_that_is_killed_goes_on_where_it_was(smollm2: Path, tmp_path: Path) -> None:
    prompt = TEXT * 3 + "So the most important question is"
    with server(smollm2, tmp_path) as (url, process):
        said, cached = ask(url, prompt)
        assert cached == 0
        assert ask(url, prompt)[0] == said
        with urllib.request.urlopen(f"{url}/metrics", timeout=30) as answer:
            metrics = answer.read().decode()
        saved = [line for line in metrics.splitlines() if line.startswith("vllm:stratakv_saved_tokens_total{")]
        assert float(saved[0].split()[-1]) > 200
        # What was put is written behind.
        time.sleep(1.0)
        os.killpg(process.pid, signal.SIGKILL)
    with server(smollm2, tmp_path) as (url, _):
        again, cached = ask(url, prompt)
        assert again == said
        assert cached > 200
        with urllib.request.urlopen(f"{url}/metrics", timeout=30) as answer:
            metrics = answer.read().decode()
        hits = [line for line in metrics.splitlines() if line.startswith("vllm:stratakv_hit_tokens_total{")]
        assert float(hits[0].split()[-1]) == cached
