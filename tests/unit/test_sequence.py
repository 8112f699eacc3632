"""Sequences: tokens that grow, and blocks that an engine has named."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest

import stratakv
from stores import config, geometry, kv_of, tokens_of

BLOCK = 4


def names(tokens: np.ndarray, salt: bytes = b"") -> list[bytes]:
    """What an engine might call its blocks: a chain of SHA-256, with something beside the tokens."""
    out, last = [], salt
    for at in range(0, len(tokens) // BLOCK * BLOCK, BLOCK):
        last = hashlib.sha256(last + tokens[at : at + BLOCK].tobytes()).digest()
        out.append(last)
    return out


def load(cache: stratakv.ModelCache, asked: object, tokens: np.ndarray) -> tuple[int, str | None]:
    shape = cache.geometry
    out = np.zeros((shape.layers, shape.planes, shape.kv_heads, len(tokens), shape.head_dim), np.float32)
    with cache.match(asked) as hit:
        count = hit.load(out, layout="LKHND")
        assert np.array_equal(out[:, :, :, :count], kv_of(tokens, shape)[:, :, :, :count])
        return count, hit.explain().reason


def test_a_sequence_that_grows_is_the_same_as_its_tokens(cache: stratakv.ModelCache) -> None:
    tokens = tokens_of(1, 31)
    sequence = cache.sequence(tokens[:3])
    for at in range(3, 31, 5):
        sequence.extend(tokens[at : at + 5])
        now = tokens[: at + 5]
        assert len(sequence) == len(now)
        assert cache.put(sequence, kv_of(now, cache.geometry), layout="LKHND") == len(now) // BLOCK * BLOCK
        assert load(cache, now, now) == load(cache, sequence, now) == (len(now) // BLOCK * BLOCK, None)


def test_a_sequence_belongs_to_its_namespace_and_model(caches: stratakv.CacheManager) -> None:
    a, b = caches.register("a", geometry()), caches.register("b", geometry())
    tokens = tokens_of(1, 8)
    sequence = a.sequence(tokens, adapter="lora", tenant="x")
    a.put(sequence, kv_of(tokens, geometry()), layout="LKHND")
    assert a.match(tokens).tokens == 0
    assert a.match(tokens, adapter="lora", tenant="x").tokens == a.match(sequence).tokens == 8
    with pytest.raises(stratakv.InputError, match='another model than "b"'):
        b.match(sequence)
    with pytest.raises(stratakv.InputError, match='another model than "b"'):
        b.put(sequence, kv_of(tokens, geometry()), layout="LKHND")
    for more in ({"adapter": "lora"}, {"tenant": "x"}):
        with pytest.raises(stratakv.InputError, match="those of the sequence"):
            a.match(sequence, **more)


def test_blocks_that_an_engine_named_are_found_by_these_names_alone(tmp_path: Path) -> None:
    tokens = tokens_of(2, 18)
    image, other = names(tokens, b"image"), names(tokens, b"another image")
    settings = config(tmp_path, secret="s")
    with stratakv.open(settings) as caches:
        cache = caches.register("m", geometry())
        cache.put(cache.sequence(tokens, block_hashes=image), kv_of(tokens, geometry()), layout="LKHND")
        assert cache.match(tokens).tokens == 0
    # After a restart as before.
    with stratakv.open(settings) as caches:
        cache = caches.register("m", geometry())
        assert cache.match(cache.sequence(tokens, block_hashes=other)).tokens == 0
        grown = cache.sequence(tokens[:9], block_hashes=image[:2])
        assert load(cache, grown, tokens[:9]) == (8, None)
        grown.extend(tokens[9:], block_hashes=image[2:])
        assert load(cache, grown, tokens) == (16, None)


def test_a_name_that_stands_for_other_tokens_is_a_miss(cache: stratakv.ModelCache) -> None:
    tokens, other = tokens_of(3, 8), tokens_of(4, 8)
    cache.put(cache.sequence(tokens, block_hashes=names(tokens)), kv_of(tokens, cache.geometry), layout="LKHND")
    assert load(cache, cache.sequence(other, block_hashes=names(tokens)), other) == (0, "corrupt")


@pytest.mark.parametrize(
    ("block_hashes", "message"),
    [
        ([b"x" * 32], "1 given, expected 2"),
        ([b"x" * 32] * 3, "3 given, expected 2"),
        ([b"x" * 32, b"x" * 15], "15 bytes, expected 16 to 64"),
        ([b"x" * 65, b"x" * 32], "65 bytes, expected 16 to 64"),
        ([1, 2], "list, expected a sequence of bytes"),
        (7, "int, expected a sequence of bytes"),
    ],
)
def test_names_of_another_form_are_refused_and_lose_nothing(
    cache: stratakv.ModelCache, block_hashes: object, message: str
) -> None:
    tokens = tokens_of(5, 9)
    sequence = cache.sequence()
    with pytest.raises(stratakv.InputError, match=message):
        sequence.extend(tokens, block_hashes=block_hashes)
    assert len(sequence) == 0
    sequence.extend(tokens, block_hashes=names(tokens))
    assert len(sequence) == 9


def test_some_blocks_with_names_and_some_without_are_refused(cache: stratakv.ModelCache) -> None:
    tokens = tokens_of(6, 8)
    named, plain = cache.sequence(tokens[:5], block_hashes=names(tokens[:4])), cache.sequence(tokens[:5])
    # No block is complete yet: nothing to name.
    named.extend(tokens[5:6])
    plain.extend(tokens[5:6], block_hashes=[])
    with pytest.raises(stratakv.InputError, match="begun with them"):
        named.extend(tokens[6:])
    with pytest.raises(stratakv.InputError, match="begun without them"):
        plain.extend(tokens[6:], block_hashes=[b"x" * 16])
    assert (len(named), len(plain)) == (6, 6)
