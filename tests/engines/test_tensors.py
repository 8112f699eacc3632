"""torch tensors of every kind, put and loaded in place."""

from __future__ import annotations

from pathlib import Path

import pytest

import stratakv
from stores import config

torch = pytest.importorskip("torch")

pytestmark = pytest.mark.engines

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16, "uint8": torch.uint8}


def shape(dtype: str) -> stratakv.Geometry:
    return stratakv.Geometry(layers=2, kv_heads=2, head_dim=16, dtype=dtype, block_tokens=4)


@pytest.fixture(params=sorted(DTYPES))
def cache(request: pytest.FixtureRequest, tmp_path: Path) -> stratakv.ModelCache:
    with stratakv.open(config(tmp_path)) as caches:
        yield caches.register("model", shape(request.param))


def layers(cache: stratakv.ModelCache, tokens: int, *, token_major: bool) -> list[tuple[object, object]]:
    dtype = DTYPES[cache.geometry.dtype]
    size = (1, tokens, 2, 16) if token_major else (1, 2, tokens, 16)
    made = [[torch.randint(0, 100, size).to(dtype) for _ in range(2)] for _ in range(2)]
    return [tuple(x.transpose(1, 2) if token_major else x for x in pair) for pair in made]


@pytest.mark.parametrize("token_major", [False, True])
def test_torch_tensors_of_every_dtype_come_back_as_they_were(cache: stratakv.ModelCache, token_major: bool) -> None:
    tokens = torch.randint(0, 1000, (12,))
    kv = layers(cache, 12, token_major=token_major)
    assert cache.put(tokens, kv) == 12
    out = [tuple(torch.zeros_like(x) for x in pair) for pair in kv]
    with cache.match(tokens) as hit:
        assert hit.load(out) == 12
    assert all(torch.equal(a, b) for got, put in zip(out, kv, strict=True) for a, b in zip(got, put, strict=True))


def test_a_tensor_with_a_gradient_is_put_like_any_other(tmp_path: Path) -> None:
    with stratakv.open(config(tmp_path)) as caches:
        cache = caches.register("model", shape("fp32"))
        plain = torch.rand(1, 2, 4, 16)
        assert cache.put([1, 2, 3, 4], [(plain.clone().requires_grad_(), torch.nn.Parameter(plain))] * 2) == 4
        out = [tuple(torch.zeros_like(plain) for _ in range(2)) for _ in range(2)]
        with cache.match([1, 2, 3, 4]) as hit:
            assert hit.load(out) == 4
        assert all(torch.equal(tensor, plain) for pair in out for tensor in pair)


def test_a_tensor_without_memory_on_the_cpu_is_refused(tmp_path: Path) -> None:
    with stratakv.open(config(tmp_path)) as caches:
        cache = caches.register("model", shape("fp32"))
        nowhere = torch.empty(1, 2, 4, 16, device="meta")
        with pytest.raises(stratakv.InputError, match="kv tensor 0"):
            cache.put([1, 2, 3, 4], [(nowhere, nowhere)] * 2)


def test_tokens_may_be_a_torch_tensor_of_any_integer_type(tmp_path: Path) -> None:
    with stratakv.open(config(tmp_path)) as caches:
        cache = caches.register("model", shape("fp32"))
        for dtype in (torch.int32, torch.int64, torch.int16):
            with cache.match(torch.tensor([1, 2, 3, 4], dtype=dtype)) as hit:
                assert hit.tokens == 0
        for wrong in (torch.tensor([1.0]), torch.tensor([[1]]), torch.tensor([-1]), torch.tensor([True])):
            with pytest.raises(stratakv.InputError, match="tokens"):
                cache.match(wrong)
