"""Match, load and put: what is found, what is copied, and what is refused."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import get_args

import numpy as np
import pytest

import stratakv
from stores import NUMPY, assert_right, config, geometry, kv_of, loaded, tokens_of
from stratakv.config import Eviction


def test_a_prompt_is_found_again_up_to_its_last_whole_block(cache: stratakv.ModelCache) -> None:
    tokens = tokens_of(1, 14)
    assert cache.put(tokens, kv_of(tokens, cache.geometry), layout="LKHND") == 12
    explanation = assert_right(cache, tokens)
    assert (explanation.matched_tokens, explanation.loaded_tokens, explanation.blocks) == (12, 12, ("ram",) * 3)
    assert explanation.reason is None


def test_a_match_ends_where_the_prompts_part(cache: stratakv.ModelCache) -> None:
    tokens = tokens_of(1, 16)
    cache.put(tokens, kv_of(tokens, cache.geometry), layout="LKHND")
    other = tokens.copy()
    other[9] += 1
    explanation = assert_right(cache, other)
    assert explanation.loaded_tokens == 8
    assert explanation.reason == "never_stored"


def test_nothing_is_shared_across_models_versions_adapters_and_tenants(caches: stratakv.CacheManager) -> None:
    tokens = tokens_of(1, 8)
    a = caches.register("a", geometry())
    b = caches.register("b", geometry())
    a.put(tokens, kv_of(tokens, geometry()), layout="LKHND", adapter="lora", tenant="x")
    for cache, salt in [
        (b, {"adapter": "lora", "tenant": "x"}),
        (a, {}),
        (a, {"adapter": "lora"}),
        (a, {"adapter": "x", "tenant": "lora"}),
    ]:
        with cache.match(tokens, **salt) as hit:
            assert hit.tokens == 0
    with a.match(tokens, adapter="lora", tenant="x") as hit:
        assert hit.tokens == 8


@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16", "uint8"])
@pytest.mark.parametrize("layout", ["LKHND", "LKNHD", "KLHND", "BHND", "BNHD", "KPNHD", "KPHND", "PHND"])
def test_every_layout_and_dtype_gives_back_the_bytes_that_were_put(
    caches: stratakv.CacheManager, layout: str, dtype: str
) -> None:
    shape = geometry(dtype=dtype)
    cache = caches.register("model", shape)
    tokens = tokens_of(3, 12)
    plain = kv_of(tokens, shape)
    pages = np.array([4, 0, 2]) if "P" in layout else None

    def arrange(source: np.ndarray) -> tuple[object, object]:
        """The same numbers in another layout, as views of larger memory with odd strides."""
        layer, plane, head, _, dim = (source.shape[i] for i in range(5))
        sizes = {"L": layer, "K": plane, "B": 2, "P": 5, "H": head, "N": 4 if pages is not None else 12, "D": dim}
        outer = "".join(axis for axis in "LK" if axis not in layout)
        full = np.zeros([sizes[a] + (a in "NH") for a in outer + layout], source.dtype)
        view = full[tuple(slice(0, sizes[a]) for a in outer + layout)]
        order = "LK" + "B" * ("B" in layout) + "P" * ("P" in layout) + "HND"
        named = view.transpose([(outer + layout).index(a) for a in order])
        if "B" in layout:
            named = named[:, :, 1]
        if pages is None:
            named[...] = source
        else:
            for n, page in enumerate(pages):
                named[:, :, page] = source[:, :, :, 4 * n : 4 * n + 4]
        nested: object = view
        if outer == "LK":
            nested = [tuple(layer) for layer in view]
        elif outer == "L":
            nested = list(view)
        return nested, named

    where = {"layout": layout, "pages": pages, "batch": int("B" in layout)}
    assert cache.put(tokens, arrange(plain)[0], **where) == 12
    target, named = arrange(np.zeros_like(plain))
    with cache.match(tokens) as hit:
        assert hit.load(target, **where) == 12
    got = named if pages is None else np.concatenate([named[:, :, page] for page in pages], axis=3)
    assert np.array_equal(got, plain)


def test_a_latent_plane_needs_no_list_of_planes(caches: stratakv.CacheManager) -> None:
    shape = geometry(planes=1, kv_heads=1, head_dim=24)
    cache = caches.register("mla", shape)
    tokens = tokens_of(5, 8)
    layers = [layer[0] for layer in kv_of(tokens, shape)]
    assert cache.put(tokens, layers, layout="HND") == 8
    out = [np.zeros_like(layer) for layer in layers]
    with cache.match(tokens) as hit:
        assert hit.load(out, layout="HND") == 8
    assert all(map(np.array_equal, out, layers))


@pytest.mark.parametrize(
    "make",
    [
        list,
        tuple,
        np.asarray,
        lambda t: np.asarray(t, np.uint32),
        lambda t: np.repeat(t, 2)[::2],
        lambda t: memoryview(np.asarray(t, np.int32)),
    ],
)
def test_tokens_may_be_any_1d_sequence_of_integers(cache: stratakv.ModelCache, make: object) -> None:
    tokens = tokens_of(1, 8)
    cache.put(tokens, kv_of(tokens, cache.geometry), layout="LKHND")
    with cache.match(make(tokens.tolist())) as hit:
        assert hit.tokens == 8


@pytest.mark.parametrize(
    "tokens",
    [
        [1, -2, 3],
        [1.5],
        "text",
        np.ones((2, 2), int),
        np.ones(3),
        np.array([-1]),
        np.array([2**32]),
        [2**32],
        [None],
        7,
        [True, "a"],
    ],
)
def test_tokens_that_are_no_1d_non_negative_integers_are_refused(cache: stratakv.ModelCache, tokens: object) -> None:
    with pytest.raises(stratakv.InputError, match="tokens"):
        cache.match(tokens)
    with pytest.raises(stratakv.InputError, match="tokens"):
        cache.put(tokens, np.zeros((3, 2, 2, 16, 8), np.float32), layout="LKHND")


@pytest.mark.parametrize(
    ("kv", "layout", "message"),
    [
        (np.zeros((3, 2, 2, 8, 8), np.float16), "LKHND", "dtype float16, expected fp32"),
        (np.zeros((3, 2, 2, 8, 8), ">f4"), "LKHND", "not supported"),
        (np.zeros((3, 2, 4, 8, 8), np.float32), "LKHND", "4 heads, expected 2"),
        (np.zeros((3, 2, 2, 8, 4), np.float32), "LKHND", "4 dim, expected 8"),
        (np.zeros((2, 2, 2, 8, 8), np.float32), "LKHND", "2 layers, expected 3"),
        (np.zeros((3, 1, 2, 8, 8), np.float32), "LKHND", "1 planes, expected 2"),
        (np.zeros((3, 2, 2, 7, 8), np.float32), "LKHND", "covers 7 tokens, expected at least 8"),
        (np.zeros((3, 2, 2, 8), np.float32), "LKHND", "expected 5 axes"),
        (np.zeros((3, 2, 2, 8, 16), np.float32)[..., ::2], "LKHND", "last axis is not contiguous"),
        ([np.zeros((2, 8, 8), np.float32)], "HND", "1 layers, expected 3"),
        ([[np.zeros((2, 8, 8), np.float32)]] * 3, "HND", "1 planes in a layer, expected 2"),
        ([[1, 2]] * 3, "HND", "int is no tensor"),
        (np.zeros((3, 2, 2, 8, 8), np.float32), "LKHDN", "layout"),
        (np.zeros((3, 2, 2, 8, 8), np.float32), "LKHXD", "layout"),
        (np.zeros((3, 2, 2, 8, 8), np.float32), "LPHND", "layout"),
        (np.zeros((3, 2, 5, 2, 8, 8), np.float32), "LKPHND", "expected a page table"),
    ],
)
def test_tensors_that_do_not_fit_are_refused_and_nothing_is_lost(
    cache: stratakv.ModelCache, kv: object, layout: str, message: str
) -> None:
    tokens = tokens_of(1, 8)
    cache.put(tokens, kv_of(tokens, cache.geometry), layout="LKHND")
    with pytest.raises(stratakv.InputError, match=message):
        cache.put(tokens, kv, layout=layout)
    with cache.match(tokens) as hit, pytest.raises(stratakv.InputError, match=message):
        hit.load(kv, layout=layout)
    assert assert_right(cache, tokens).loaded_tokens == 8


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ({"pages": [0, 5]}, "page 5, expected below 5"),
        ({"pages": [0]}, "4 tokens covered|covers 4 tokens"),
        ({"pages": [0, -1]}, "pages"),
        ({"pages": [0, 1], "batch": 2}, "batch is 2, expected below 2"),
    ],
)
def test_a_page_table_or_row_outside_the_tensor_is_refused(
    cache: stratakv.ModelCache, where: dict[str, object], message: str
) -> None:
    kv = np.zeros((3, 2, 2, 5, 2, 4, 8), np.float32)
    with pytest.raises(stratakv.InputError, match=message):
        cache.put(tokens_of(1, 8), kv, layout="LKBPHND", **where)


def test_read_only_memory_is_put_but_never_loaded_into(cache: stratakv.ModelCache) -> None:
    tokens = tokens_of(1, 8)
    kv = kv_of(tokens, cache.geometry)
    kv.flags.writeable = False
    assert cache.put(tokens, kv, layout="LKHND") == 8
    with cache.match(tokens) as hit, pytest.raises(stratakv.InputError, match="read-only"):
        hit.load(kv, layout="LKHND")


class Exporter:
    """A DLPack producer that is no NumPy array."""

    def __init__(self, array: np.ndarray, device: int = 1, legacy: bool = False) -> None:
        self.array, self.device, self.legacy = array, device, legacy

    def __dlpack_device__(self) -> tuple[int, int]:
        return (self.device, 0)

    def __dlpack__(self, **arguments: object) -> object:
        if self.legacy:
            if arguments:
                raise TypeError("unexpected keyword")
            return self.array.__dlpack__()
        return self.array.__dlpack__(**arguments)


@pytest.mark.parametrize("legacy", [False, True])
def test_any_dlpack_producer_is_put_and_loaded_into_in_place(cache: stratakv.ModelCache, legacy: bool) -> None:
    tokens = tokens_of(1, 8)
    plain = kv_of(tokens, cache.geometry)
    assert cache.put(tokens, Exporter(plain, legacy=legacy), layout="LKHND") == 8
    out = np.zeros_like(plain)
    with cache.match(tokens) as hit:
        assert hit.load(Exporter(out, legacy=legacy), layout="LKHND") == 8
    assert np.array_equal(out, plain)


def test_a_tensor_on_another_device_is_refused(cache: stratakv.ModelCache) -> None:
    with pytest.raises(stratakv.InputError, match=r"device type 10, expected 1 \(CPU\) or 2 \(CUDA\)"):
        cache.put([1] * 4, Exporter(np.zeros((3, 2, 2, 4, 8), np.float32), device=10), layout="LKHND")


def test_a_released_match_loads_nothing_and_says_so(cache: stratakv.ModelCache) -> None:
    tokens = tokens_of(1, 8)
    cache.put(tokens, kv_of(tokens, cache.geometry), layout="LKHND")
    hit = cache.match(tokens)
    hit.release()
    hit.release()
    with pytest.raises(stratakv.ClosedError, match="released"):
        hit.load(np.zeros((3, 2, 2, 8, 8), np.float32), layout="LKHND")


def test_a_leased_match_is_not_evicted(tmp_path: Path) -> None:
    with stratakv.open(config(None, ram="2MiB")) as caches:
        cache = caches.register("model", geometry())
        held = tokens_of(0, 64)
        cache.put(held, kv_of(held, cache.geometry), layout="LKHND")
        with cache.match(held) as hit:
            for seed in range(1, 60):
                tokens = tokens_of(seed, 64)
                cache.put(tokens, kv_of(tokens, cache.geometry), layout="LKHND")
            assert caches.stats().tiers["ram"].evicted_blocks > 0
            out = np.zeros((3, 2, 2, 64, 8), np.float32)
            assert hit.load(out, layout="LKHND") == 64
        assert np.array_equal(out, kv_of(held, cache.geometry))


def test_an_evicted_block_is_a_miss_with_that_reason(tmp_path: Path) -> None:
    with stratakv.open(config(None, ram="2MiB")) as caches:
        cache = caches.register("model", geometry())
        for seed in range(60):
            tokens = tokens_of(seed, 64)
            cache.put(tokens, kv_of(tokens, cache.geometry), layout="LKHND")
        _, explanation = loaded(cache, tokens_of(0, 64))
        assert explanation.loaded_tokens < 64
        assert explanation.reason == "evicted"
        assert "evicted" in str(explanation)


def test_blocks_come_back_from_ssd_and_move_up_at_the_second_read(
    caches: stratakv.CacheManager, cache: stratakv.ModelCache
) -> None:
    prompts = [tokens_of(seed, 64) for seed in range(100)]
    for tokens in prompts:
        cache.put(tokens, kv_of(tokens, cache.geometry), layout="LKHND")
        caches.flush()
    first = assert_right(cache, prompts[0])
    assert first.blocks == ("ssd",) * 16
    assert assert_right(cache, prompts[0]).blocks == ("ssd",) * 16
    assert assert_right(cache, prompts[0]).blocks == ("ram",) * 16
    assert caches.stats().promoted_blocks == 16


def test_asked_equals_hit_plus_miss_in_total_and_per_tier(caches: stratakv.CacheManager) -> None:
    rng = np.random.default_rng(7)
    models = [caches.register("a", geometry()), caches.register("b", geometry(layers=2, dtype="fp16"))]
    for _ in range(300):
        cache = models[rng.integers(2)]
        tokens = tokens_of(int(rng.integers(60)), int(rng.integers(0, 80)))
        if rng.integers(2):
            cache.put(tokens, kv_of(tokens, cache.geometry), layout="LKHND")
        assert_right(cache, tokens)
        total = caches.stats()
        assert total.asked_blocks == total.hit_blocks + total.miss_blocks
        for tier in total.tiers.values():
            assert tier.asked_blocks == tier.hit_blocks + tier.miss_blocks
        assert total.tiers["ssd"].asked_blocks == total.tiers["ram"].miss_blocks
        for name in ("asked_blocks", "hit_blocks", "put_blocks", "loaded_bytes"):
            assert sum(getattr(m.stats(), name) for m in models) == getattr(total, name)
    assert total.tiers["ssd"].hit_blocks > 0
    assert 0 < total.hit_ratio < 1


def test_a_match_that_outlives_everything_is_harmless(tmp_path: Path) -> None:
    caches = stratakv.open(config(tmp_path / "store"))
    cache = caches.register("model", geometry())
    tokens = tokens_of(1, 16)
    cache.put(tokens, kv_of(tokens, cache.geometry), layout="LKHND")
    hit, late = cache.match(tokens), cache.match(tokens)
    caches.unregister("model")
    out = np.zeros((3, 2, 2, 16, 8), np.float32)
    assert hit.load(out, layout="LKHND") == 0
    assert hit.explain().reason == "closed"
    caches.close()
    del caches, cache
    gc.collect()
    assert late.load(out, layout="LKHND") == 0
    late.release()


def test_every_payload_dtype_has_a_numpy_twin() -> None:
    assert {name: np.dtype(kind).itemsize for name, kind in NUMPY.items()} == {
        "fp32": 4,
        "fp16": 2,
        "bf16": 2,
        "uint8": 1,
    }


@pytest.mark.parametrize("eviction", get_args(Eviction))
def test_every_eviction_policy_serves_right_bytes_under_pressure_and_says_what_runs(eviction: str) -> None:
    settings = stratakv.Config(
        ram=stratakv.RamConfig(capacity_bytes="2MiB", eviction=eviction), ssd=stratakv.SsdConfig(enabled=False)
    )
    with stratakv.open(settings) as caches:
        cache = caches.register("model", geometry())
        random = np.random.default_rng(0)
        for seed in random.zipf(1.3, 300) % 60:
            tokens = np.concatenate([tokens_of(1000 + seed % 3, 32), tokens_of(seed, 64)])
            assert_right(cache, tokens)
            cache.put(tokens, kv_of(tokens, geometry()), layout="LKHND")
            assert assert_right(cache, tokens).loaded_tokens == 96
        stats = cache.stats()
        assert stats.hit_blocks + stats.miss_blocks == stats.asked_blocks
        assert stats.tiers["ram"].evicted_blocks > 0
        assert caches.status().ram_eviction["model"] in (
            get_args(Eviction)[:6] if eviction == "adaptive" else [eviction]
        )


@pytest.mark.parametrize("dtype", NUMPY)
def test_a_block_by_reference_shows_its_bytes_and_stays_whatever_becomes_of_the_rest(dtype: str) -> None:
    shape = geometry(dtype=dtype)
    caches = stratakv.open(config(None, ram="2MiB"))
    cache = caches.register("model", shape)
    tokens = tokens_of(1, 40)
    right = kv_of(tokens, shape)
    cache.put(tokens, right, layout="LKHND")
    with cache.match(tokens) as hit:
        views = [hit.view(block) for block in range(10)]
        with pytest.raises(stratakv.InputError, match="block is 10, expected an integer from 0, below 10"):
            hit.view(10)
    assert hit.view(0) is None
    for seed in range(2, 40):
        cache.put(tokens_of(seed, 400), kv_of(tokens_of(seed, 400), shape), layout="LKHND")
    caches.unregister("model")
    caches.close()
    for block, view in enumerate(views):
        got = np.asarray(view)
        assert got.shape == (shape.layers, shape.planes, shape.kv_heads, shape.block_tokens, shape.head_dim)
        assert got.tobytes() == right[:, :, :, 4 * block : 4 * block + 4].tobytes()
        assert view.readonly
        assert not got.flags.writeable


def test_a_block_that_is_not_in_ram_has_no_view(tmp_path: Path) -> None:
    with stratakv.open(config(tmp_path)) as caches:
        cache = caches.register("model", geometry())
        tokens = tokens_of(1, 16)
        cache.put(tokens, kv_of(tokens, geometry()), layout="LKHND")
    with stratakv.open(config(tmp_path)) as caches:
        hit = caches.register("model", geometry()).match(tokens)
        assert hit.tokens == 16
        assert hit.view(0) is None
        assert_right(caches["model"], tokens)


@pytest.mark.parametrize("where", ["ram", "ssd"])
def test_a_part_of_a_match_is_loaded_and_other_rows_are_left_alone(tmp_path: Path, where: str) -> None:
    tokens = tokens_of(11, 40)
    kv = kv_of(tokens, geometry())
    with stratakv.open(config(tmp_path)) as caches:
        caches.register("model", geometry()).put(tokens, kv, layout="LKHND")
        if where == "ram":
            cache = caches["model"]
            check_parts(cache, tokens, kv)
            return
    with stratakv.open(config(tmp_path)) as caches:
        check_parts(caches.register("model", geometry()), tokens, kv)


def check_parts(cache: stratakv.ModelCache, tokens: np.ndarray, kv: np.ndarray) -> None:
    for start, stop in ((0, 40), (0, 8), (8, 40), (12, 28), (36, 40), (20, 20), (0, 0), (8, None)):
        end = 40 if stop is None else stop
        out = np.full_like(kv, -1)
        with cache.match(tokens) as hit:
            assert hit.load(out, layout="LKHND", start=start, stop=stop) == end
            assert len(hit.explain().blocks) == (end - start) // 4
        assert np.array_equal(out[:, :, :, start:end], kv[:, :, :, start:end])
        assert (out[:, :, :, :start] == -1).all()
        assert (out[:, :, :, end:] == -1).all()


def test_pages_of_a_part_may_stand_twice_before_it(cache: stratakv.ModelCache) -> None:
    tokens = tokens_of(12, 16)
    kv = kv_of(tokens, cache.geometry)
    cache.put(tokens, kv, layout="LKHND")
    shape = cache.geometry
    pages = np.zeros((shape.layers, shape.planes, 4, shape.kv_heads, 4, shape.head_dim), np.float32)
    with cache.match(tokens) as hit:
        # What lies before is shared with others, or not there at all.
        assert hit.load(pages, layout="LKPHND", pages=[0, 0, 2, 3], start=8) == 16
        with pytest.raises(stratakv.InputError, match="page 0 is named twice"):
            hit.load(pages, layout="LKPHND", pages=[0, 0, 2, 3])
    assert np.array_equal(pages[:, :, 2], kv[:, :, :, 8:12])
    assert not pages[:, :, :2].any()


@pytest.mark.parametrize(
    ("bounds", "message"),
    [
        ({"start": 2}, "start is 2, expected a multiple of 4 from 0 to 16"),
        ({"stop": 20}, "stop is 20, expected a multiple of 4 from 0 to 16"),
        ({"start": -4}, "start is -4"),
        ({"stop": True}, "stop is True"),
        ({"start": 8, "stop": 4}, "start is 8, expected at most 4"),
    ],
)
def test_bounds_that_are_no_part_of_the_match_are_refused(
    cache: stratakv.ModelCache, bounds: dict[str, int], message: str
) -> None:
    tokens = tokens_of(13, 16)
    kv = kv_of(tokens, cache.geometry)
    cache.put(tokens, kv, layout="LKHND")
    with cache.match(tokens) as hit, pytest.raises(stratakv.InputError, match=message):
        hit.load(np.zeros_like(kv), layout="LKHND", **bounds)


def test_a_put_of_a_sequence_s_end_stores_it_behind_what_is_cached_and_else_nothing(
    cache: stratakv.ModelCache,
) -> None:
    tokens = tokens_of(14, 24)
    kv = kv_of(tokens, cache.geometry)
    end = kv.copy()
    end[:, :, :, :8] = -1
    # The beginning is not cached, and what stands in its place is not it.
    assert cache.put(tokens, end, layout="LKHND", start=8) == 0
    assert cache.match(tokens).tokens == 0
    assert cache.put(tokens[:8], kv, layout="LKHND") == 8
    assert cache.put(tokens, end, layout="LKHND", start=8) == 24
    assert assert_right(cache, tokens).loaded_tokens == 24
    with pytest.raises(stratakv.InputError, match="start is -4, expected an integer from 0"):
        cache.put(tokens, kv, layout="LKHND", start=-4)
