"""The parts of StrataConnector against vLLM's own objects: layouts, refusals, ranks that do not answer, counters."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

pytest.importorskip("vllm.v1.outputs")  # All of it: parts of it warn when they are imported.
torch = pytest.importorskip("torch")

from vllm.v1.kv_cache_interface import (  # noqa: E402 (after the skips)
    FullAttentionSpec,
    KVCacheConfig,
    KVCacheGroupSpec,
    KVCacheTensor,
    MLAAttentionSpec,
    SlidingWindowSpec,
    compute_layout_strides,
    create_kv_cache_views,
)
from vllm.v1.kv_cache_layout import KVCacheLayout  # noqa: E402

import stratakv  # noqa: E402
from stores import config  # noqa: E402
from stratakv.integrations.vllm import model, ranks  # noqa: E402
from stratakv.integrations.vllm.messages import COUNTERS, Address, Counted, Load  # noqa: E402
from stratakv.integrations.vllm.pages import DeviceMover, HostMover, Pages, TierMover  # noqa: E402
from stratakv.integrations.vllm.worker import Worker  # noqa: E402

pytestmark = [pytest.mark.engines, pytest.mark.filterwarnings("default")]

LAYERS, BLOCKS, BLOCK = 3, 12, 16


def full(dtype: torch.dtype = torch.float16, **changes: Any) -> FullAttentionSpec:
    return FullAttentionSpec(**{"block_size": BLOCK, "num_kv_heads": 2, "head_size": 8, "dtype": dtype} | changes)


def latent() -> MLAAttentionSpec:
    return MLAAttentionSpec(block_size=BLOCK, num_kv_heads=1, head_size=24, dtype=torch.bfloat16)


def window() -> SlidingWindowSpec:
    return SlidingWindowSpec(block_size=BLOCK, num_kv_heads=2, head_size=8, dtype=torch.float16, sliding_window=64)


def names(count: int = LAYERS) -> list[str]:
    return [f"model.layers.{n}.self_attn.attn" for n in range(count)]


def engine_caches(
    spec: FullAttentionSpec, layout: KVCacheLayout, kernel_block: int | None = None
) -> dict[str, torch.Tensor]:
    """Caches as vLLM lays them out, full of bytes that tell where they are."""
    strides = compute_layout_strides(spec, BLOCKS, LAYERS, layout)
    size = LAYERS * BLOCKS * spec.page_size_bytes
    tensor = KVCacheTensor(size=size, layers=names(), offset=0, layer_stride=strides[0], block_stride=strides[1])
    raw = torch.randint(0, 100, (size,), dtype=torch.int8, generator=torch.Generator().manual_seed(len(layout.name)))
    views = create_kv_cache_views(raw, spec, BLOCKS, layout, tensor, kernel_block_size=kernel_block)
    return dict(zip(names(), views, strict=True))


def pages_of(caches: dict[str, torch.Tensor], spec: FullAttentionSpec, *, packed: bool) -> Pages:
    return Pages(dict.fromkeys(caches, spec), caches, BLOCKS, BLOCK, packed=packed)


# vLLM splits blocks for its kernels only where each is one dense page.
KINDS = [(layout, kind) for layout in KVCacheLayout for kind in ("dense", "latent", "bytes")]
KINDS += [(layout, "kernel_blocks") for layout in (KVCacheLayout.LBHNC, KVCacheLayout.LBNHC)]


@pytest.mark.parametrize("mover", [HostMover, DeviceMover, TierMover])
@pytest.mark.parametrize(("layout", "kind"), KINDS)
def test_every_layout_of_the_engine_is_read_from_its_strides(
    tmp_path: Path, layout: KVCacheLayout, kind: str, mover: type
) -> None:
    """What is put from one layout is loaded into another, token by token."""
    spec = latent() if kind == "latent" else full(torch.uint8 if kind == "bytes" else torch.float16)
    smaller = 8 if kind == "kernel_blocks" else None
    source = engine_caches(spec, layout, smaller)
    target = engine_caches(spec, KVCacheLayout.LBNHC, smaller)
    from_pages, to_pages = (pages_of(each, spec, packed=False) for each in (source, target))
    assert from_pages.geometry == to_pages.geometry
    assert from_pages.packing == to_pages.packing
    assert (from_pages.packing == "plain") == (kind != "bytes")
    assert from_pages.geometry.planes == (2 if kind in ("dense", "kernel_blocks") else 1)
    tokens = np.arange(5 * BLOCK)
    source_pages = np.array([7, 2, 11, 0, 5], np.uint32)
    target_pages = np.array([1, 9, 3, 10, 4], np.uint32)
    before = {name: cache.clone() for name, cache in target.items()}
    with stratakv.open(config(tmp_path)) as caches:
        cache = caches.register("model", from_pages.geometry)
        saver, loader = mover(from_pages), mover(to_pages)
        for start, stop in ((0, 3), (3, 5)):
            sequence = cache.sequence(tokens[: stop * BLOCK])
            gathered = saver.gather(source_pages[start:stop])
            if gathered is not None:
                for layer in range(LAYERS):
                    saver.gather_layer(gathered, layer)
            put = saver.put(cache, sequence, source_pages[:stop], start * BLOCK, gathered)
            assert put == stop * BLOCK
        with cache.match(tokens) as match:
            load = Load("request", BLOCK, 4 * BLOCK, target_pages[:4])
            assert loader.load(match, load, None) == 4 * BLOCK
    ratio = from_pages.ratio
    for name in names():
        for n in range(5):
            for part in range(ratio):
                page = target_pages[n] * ratio + part
                loaded = source[name][source_pages[n] * ratio + part]
                got, wanted = target[name][page], loaded if 1 <= n < 4 else before[name][page]
                assert torch.equal(got.contiguous().view(torch.uint8), wanted.contiguous().view(torch.uint8)), (name, n)


def test_the_gpu_tier_writes_to_tensors_of_one_form_on_a_gpu() -> None:
    """Without a GPU: on tensors that only say that they are there."""
    caches = engine_caches(full(), KVCacheLayout.LBHNC)
    pages = pages_of(caches, full(), packed=False)
    assert not TierMover.serves(pages)
    pages.device = torch.device("cuda", 1)
    assert TierMover.serves(pages)
    # The last layer as another lays it out.
    other = pages_of(engine_caches(full(), KVCacheLayout.LBNHC), full(), packed=False)
    pages.layers[-1] = other.layers[-1]
    assert not TierMover.serves(pages)


def test_what_the_cpu_packs_is_moved_as_bytes_and_told_apart() -> None:
    spec = full(torch.float32)
    pages = pages_of(engine_caches(spec, KVCacheLayout.LBHNC), spec, packed=True)
    assert pages.geometry == stratakv.Geometry(
        layers=LAYERS, kv_heads=2, head_dim=64, dtype="uint8", block_tokens=BLOCK, planes=1
    )
    assert torch.backends.cpu.get_cpu_capability() in pages.packing


def test_caches_that_are_not_alike_are_refused() -> None:
    caches = engine_caches(full(), KVCacheLayout.LBHNC)
    odd = dict(caches) | {names()[1]: caches[names()[1]][:, :1]}
    with pytest.raises(stratakv.InputError, match="layers must be alike"):
        pages_of(odd, full(), packed=False)
    with pytest.raises(stratakv.InputError, match="expected pages that divide a block"):
        Pages(dict.fromkeys(caches, full()), caches, BLOCKS - 1, BLOCK, packed=False)
    with pytest.raises(stratakv.InputError, match="of 3 layers"):
        Pages({"other": full()}, caches, BLOCKS, BLOCK, packed=False)
    flat = {name: cache.reshape(BLOCKS, -1) for name, cache in caches.items()}
    with pytest.raises(stratakv.InputError, match=r"expected \[blocks, heads, tokens, content\]"):
        pages_of(flat, full(), packed=False)


def groups(*specs: Any) -> KVCacheConfig:
    every = [KVCacheGroupSpec(layer_names=[f"layers.{n}.attn"], kv_cache_spec=spec) for n, spec in enumerate(specs)]
    return KVCacheConfig(num_blocks=BLOCKS, kv_cache_tensors=[], kv_cache_groups=every)


PIPELINE = SimpleNamespace(pipeline_parallel_size=2)


def engine(**changes: Any) -> Any:
    """What is read of vLLM's configuration before anything is served."""
    plain = {
        "cache_config": SimpleNamespace(block_size=BLOCK),
        "parallel_config": SimpleNamespace(pipeline_parallel_size=1),
        "speculative_config": None,
    }
    return SimpleNamespace(**plain | changes)


@pytest.mark.parametrize(
    ("found", "vllm_config", "message"),
    [
        (groups(full()), engine(), None),
        (groups(full()), engine(speculative_config=SimpleNamespace(method="ngram")), None),
        (groups(latent()), engine(), None),
        (groups(), engine(), "no attention layers"),
        (
            groups(window()),
            engine(),
            "1 of 1 layers have a cache of kind SlidingWindowSpec.*serve this model without",
        ),
        (groups(full(), full()), engine(), "2 groups of layers, expected one"),
        (groups(full(non_causal=True)), engine(), "attends to later tokens"),
        (groups(dataclasses.replace(latent(), tokens_per_state=4)), engine(), "keeps 4 tokens in one"),
        (groups(full()), engine(cache_config=SimpleNamespace(block_size=32)), r"blocks of \[16\] tokens"),
        (
            groups(full(block_size=8192)),
            engine(cache_config=SimpleNamespace(block_size=8192)),
            "block_size is 8192, expected at most 4096",
        ),
        (
            groups(full()),
            engine(parallel_config=SimpleNamespace(decode_context_parallel_size=2)),
            "decode_context_parallel_size is 2.*set it to 1",
        ),
        (
            groups(full()),
            engine(speculative_config=SimpleNamespace(method="eagle3")),
            "speculative decoding by 'eagle3'.*use one of ngram",
        ),
        (
            groups(full()),
            engine(speculative_config=SimpleNamespace(method="ngram"), parallel_config=PIPELINE),
            "drafts over a pipeline",
        ),
    ],
)
def test_what_cannot_be_cached_is_refused_in_a_sentence(
    found: KVCacheConfig, vllm_config: Any, message: str | None
) -> None:
    if message is None:
        model.check(vllm_config, found)
        return
    with pytest.raises(stratakv.InputError, match=message):
        model.check(vllm_config, found)


def request(**changes: Any) -> Any:
    plain = {
        "prompt_token_ids": [1, 2],
        "prompt_embeds": None,
        "resumable": False,
        "lora_request": None,
        "mm_features": [],
        "cache_salt": None,
    }
    return SimpleNamespace(**plain | changes)


def namespaces(*, media_gb: float = 4.0, prefix_caching: bool = True) -> model.Namespaces:
    return model.Namespaces(
        SimpleNamespace(
            model_config=SimpleNamespace(multimodal_config=SimpleNamespace(mm_processor_cache_gb=media_gb)),
            cache_config=SimpleNamespace(enable_prefix_caching=prefix_caching),
        )
    )


def test_adapter_media_and_salt_are_the_namespace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))

    def lora(path: str, name: str = "a", number: int = 1) -> Any:
        return SimpleNamespace(lora_name=name, lora_int_id=number, lora_path=path)

    def image(identifier: str, offset: int) -> Any:
        return SimpleNamespace(identifier=identifier, mm_position=SimpleNamespace(offset=offset, length=3))

    spaces = namespaces()
    assert spaces.of(request()) == ("", "")
    assert spaces.of(request(cache_salt="x")) == ("", "x")
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "adapter_model.safetensors").write_bytes(folder.encode())
    found = [
        spaces.of(request(**each))
        for each in (
            {},
            {"lora_request": lora(str(tmp_path / "one"))},
            {"lora_request": lora(str(tmp_path / "two"))},
            {"lora_request": lora(str(tmp_path / "one"), name="b")},
            {"mm_features": [image("a", 1)]},
            {"mm_features": [image("b", 1)]},
            {"mm_features": [image("a", 2)]},
            {"mm_features": [image("a", 1), image("b", 9)]},
            {"mm_features": [image("a", 1)], "lora_request": lora(str(tmp_path / "one"))},
        )
    ]
    assert None not in found
    assert len(set(found)) == len(found)
    assert spaces.of(request(lora_request=lora("~/one"))) == found[1]
    # What cannot be told is not cached: no tokens, an adapter whose files are elsewhere, media that are but numbered.
    for other in (
        {"prompt_token_ids": None},
        {"prompt_embeds": torch.zeros(1)},
        {"resumable": True},
        {"lora_request": lora("org/adapter")},
        {"lora_request": lora("")},
        {"lora_request": SimpleNamespace()},
    ):
        assert spaces.of(request(**other)) is None
    numbered = namespaces(media_gb=0, prefix_caching=False)
    assert numbered.of(request(mm_features=[image("a", 1)])) is None
    assert numbered.of(request()) == ("", "")
    # An adapter whose files change while it is served is not told by them any more; in another process it is another.
    (tmp_path / "one" / "adapter_model.safetensors").write_bytes(b"new weights")
    assert spaces.of(request(lora_request=lora(str(tmp_path / "one")))) is None
    assert namespaces().of(request(lora_request=lora(str(tmp_path / "one")))) not in (None, found[1])


def worker(folder: Path, **options: Any) -> Worker:
    spec = full()
    caches = engine_caches(spec, KVCacheLayout.LBHNC)
    options = {"ram": {"capacity_bytes": "4MiB"}, "ssd": {"path": str(folder), "capacity_bytes": "64MiB"}} | options
    return Worker("model", "1", "0-of-1", dict.fromkeys(caches, spec), caches, BLOCKS, BLOCK, options)


def test_a_directory_in_use_and_options_that_make_no_sense_are_sentences_at_start(tmp_path: Path) -> None:
    first = worker(tmp_path)
    try:
        with pytest.raises(stratakv.StoreLockedError):
            worker(tmp_path)
    finally:
        first.close()
    with pytest.raises(stratakv.ConfigError, match="unknown section 'rams'"):
        worker(tmp_path, rams={})
    with pytest.raises(stratakv.InputError, match="uint8"):
        worker(tmp_path, ram={"capacity_bytes": "4MiB", "codec": "int8_asym"})
    # Another geometry in the same directory is another model, and finds nothing.
    with stratakv.open(config(tmp_path / "rank-0-of-1")) as caches:
        other = caches.register("model", stratakv.Geometry(layers=1, kv_heads=1, head_dim=8, dtype="fp16"))
        assert other.match(range(64)).tokens == 0


SERVE = """
import sys, time, json, signal
from stratakv.integrations.vllm.ranks import Answers, Found
class Rank:
    def match(self, request, step, tokens, adapter, tenant):
        if request == "slow": time.sleep(3)
        if request == "broken": raise RuntimeError("broken")
        return Found(int(sys.argv[1]) if len(tokens) else 0, {sys.argv[2]: int(sys.argv[1])})
    def reset(self, step): print("reset", step, flush=True)
answers = Answers(Rank())
a = answers.address
print(json.dumps([a.path, a.key.hex(), a.pid]), flush=True)
signal.pause()
"""


@pytest.fixture
def rank() -> Iterator[Any]:
    started: list[subprocess.Popen[str]] = []

    def start(tokens: int, tier: str) -> tuple[subprocess.Popen[str], Address]:
        process = subprocess.Popen(
            [sys.executable, "-c", SERVE, str(tokens), tier],
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        )
        started.append(process)
        assert process.stdout is not None
        path, key, pid = json.loads(process.stdout.readline())
        return process, Address(path=path, key=bytes.fromhex(key), pid=pid)

    yield start
    for process in started:
        process.kill()
        process.communicate()


def test_ranks_give_one_answer_the_least_and_one_that_is_silent_or_gone_has_nothing(rank: Any) -> None:
    (one, at_one), (two, at_two) = rank(64, "ram"), rank(32, "ssd")
    tokens = np.arange(64, dtype=np.uint32)
    asker = ranks.Ranks([at_one, at_two])
    found = asker.match("a", 1, tokens, "", "")
    assert (found.tokens, found.tiers) == (32, {"ssd": 32})
    alone = ranks.Ranks([at_one])
    assert (alone.match("a", 1, tokens, "", "").tokens, alone.match("a", 1, tokens[:0], "", "").tokens) == (64, 0)
    assert asker.reset(7)
    assert one.stdout is not None
    assert one.stdout.readline() == "reset 7\n"
    started = time.monotonic()
    assert asker.match("slow", 1, tokens, "", "").tokens == 0
    assert time.monotonic() - started < 2.5
    # It is left alone for a while, and its late answer is never taken for another's.
    assert asker.match("a", 1, tokens, "", "").tokens == 0
    asker._rest_until.clear()
    time.sleep(2.5)
    assert asker.match("a", 1, tokens, "", "").tokens == 32
    two.send_signal(signal.SIGKILL)
    two.wait()
    assert asker.match("a", 1, tokens, "", "").tokens == 0
    # Whoever did not forget may not be asked again.
    assert not asker.reset(8)
    asker._rest_until.clear()
    assert asker.match("a", 1, tokens, "", "").tokens == 0
    assert ranks.Ranks([]).match("a", 1, tokens, "", "").tokens == 0
    stranger = ranks.Ranks([dataclasses.replace(at_one, key=bytes(32))])
    assert stranger.match("a", 1, tokens, "", "").tokens == 0
    assert alone.match("b", 1, tokens, "", "").tokens == 64
    assert oct(Path(at_one.path).parent.stat().st_mode)[-3:] == "700"


def test_a_worker_that_never_answers_costs_its_deadline(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as silent:
        silent.bind(str(tmp_path / "rank"))
        silent.listen()
        asker = ranks.Ranks([Address(path=str(tmp_path / "rank"), key=bytes(32), pid=0)])
        started = time.monotonic()
        assert asker.match("a", 1, np.zeros(4_000_000, np.uint32), "", "").tokens == 0
        assert time.monotonic() - started < 5
        asker.close()


def test_folders_of_workers_that_were_killed_are_removed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    for name in (f"stratakv-{gone.pid}-abc", f"stratakv-{os.getpid()}-abc", "stratakv-other"):
        (tmp_path / name).mkdir()
    answers = ranks.Answers(SimpleNamespace())
    assert not (tmp_path / f"stratakv-{gone.pid}-abc").exists()
    answers.close()
    assert sorted(each.name for each in tmp_path.iterdir()) == [f"stratakv-{os.getpid()}-abc", "stratakv-other"]


def test_counters_add_up_over_ranks_and_steps() -> None:
    a, b = Counted(), Counted()
    a.add(asked_tokens=10, hit_tokens=5, loaded_bytes=2e9, load_seconds=1.0)
    b.add(asked_tokens=10, failed_tokens=3)
    taken = a.taken()
    assert taken is not None
    assert a.taken() is None
    both = taken.aggregate(b)
    assert both.data["asked_tokens"] == 20
    assert both.reduce()["hit ratio"] == 0.25
    assert both.reduce()["load GB/s"] == 2.0
    assert set(both.data) <= set(COUNTERS)
    assert not both.is_empty()
    both.reset()
    assert both.is_empty()
