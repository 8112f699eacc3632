"""Prompts as vectors: what shares most is near, what shares nothing is not, and every process gets the same bits."""

from __future__ import annotations

import hashlib
import logging
import subprocess
import sys
import types

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stores import tokens_of
from stratakv.embedding import embedding_of, text_embedding, token_embedding
from stratakv.errors import ConfigError, InputError

SALT = b"salt"
SEEDS = st.integers(0, 2**32)


def vector(tokens: np.ndarray, dimension: int = 512, salt: bytes = SALT) -> np.ndarray:
    return token_embedding(tokens, dimension, salt)


@given(seed=SEEDS, count=st.integers(1, 4096), dimension=st.sampled_from([8, 100, 512, 1536]))
def test_a_vector_has_length_1(seed: int, count: int, dimension: int) -> None:
    made = vector(tokens_of(seed, count), dimension)
    assert (made.shape, made.dtype) == ((dimension,), np.float32)
    # Signs may cancel out in few elements, and then all are 0.
    length = np.linalg.norm(made)
    assert length == pytest.approx(1, abs=1e-5) or (dimension == 8 and length == 0)


def test_no_tokens_are_zeros() -> None:
    assert not vector(np.array([], np.int64)).any()
    assert embedding_of("tokens", 64, SALT)([]).shape == (0, 64)


@given(seed=SEEDS, count=st.integers(64, 4096), share=st.floats(0.9, 1.0))
def test_prompts_that_begin_alike_are_near(seed: int, count: int, share: float) -> None:
    tokens = tokens_of(seed, count)
    kept = int(np.ceil(count * share))
    other = np.concatenate((tokens[:kept], tokens_of(seed + 1, count - kept)))
    assert vector(tokens) @ vector(other) > 0.8
    assert vector(tokens) @ vector(tokens[:kept]) > 0.8


@given(seed=SEEDS, count=st.integers(64, 4096))
def test_a_prompt_that_quotes_another_is_near_wherever_the_quote_stands(seed: int, count: int) -> None:
    tokens = tokens_of(seed, count)
    before = tokens_of(seed + 1, count // 10)
    assert vector(tokens) @ vector(np.concatenate((before, tokens))) > 0.8


@given(seed=SEEDS, count=st.integers(64, 4096), other=st.integers(64, 4096))
def test_prompts_that_share_nothing_are_far(seed: int, count: int, other: int) -> None:
    assert abs(vector(tokens_of(seed, count)) @ vector(tokens_of(seed + 1, other))) < 0.35


def test_order_matters_less_than_content_and_more_than_nothing() -> None:
    tokens = tokens_of(1, 1024)
    shuffled = np.random.default_rng(2).permutation(tokens)
    assert 0.2 < vector(tokens) @ vector(shuffled) < 0.6


def test_what_is_repeated_does_not_drown_the_rest() -> None:
    content, other = tokens_of(1, 500), tokens_of(2, 500)
    padding = np.full(500, 7)
    alike = vector(np.concatenate((padding, content))) @ vector(np.concatenate((padding, other)))
    assert alike < 0.3


@given(seed=SEEDS, count=st.integers(64, 2048))
def test_vectors_of_other_salts_and_spaces_have_nothing_in_common(seed: int, count: int) -> None:
    tokens = tokens_of(seed, count)
    assert abs(vector(tokens) @ vector(tokens, salt=b"pepper")) < 0.35
    embed = embedding_of("tokens", 512, SALT)
    one, other = embed([tokens], b"one")[0], embed([tokens], b"other")[0]
    assert abs(one @ other) < 0.35
    assert np.array_equal(one, embed([tokens.tolist()], b"one")[0])
    assert not np.array_equal(one, embedding_of("tokens", 512, b"pepper")([tokens], b"one")[0])


def test_every_process_gets_the_same_bits() -> None:
    digest = hashlib.blake2b(vector(np.arange(1000) % 300), digest_size=8).hexdigest()
    assert digest == "bb83d389b4dc7fc0"
    program = (
        "import hashlib, numpy; from stratakv.embedding import token_embedding;"
        f"made = token_embedding(list(numpy.arange(1000) % 300), 512, {SALT!r});"
        "print(hashlib.blake2b(made, digest_size=8).hexdigest())"
    )
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == digest


def test_texts_that_say_the_same_are_near() -> None:
    texts = ["How do I reset my password?", "I forgot my password, how can I change it?", "the capital of France"]
    handlers = list(logging.getLogger().handlers)
    made = embedding_of("text", 512, SALT)(texts)
    assert (made.shape, made.dtype) == ((3, 512), np.float32)
    assert made[0] @ made[1] > 0.6
    assert abs(made[0] @ made[2]) < 0.2
    assert logging.getLogger().handlers == handlers, "logging is the application's"
    assert text_embedding([], 256).shape == (0, 256)
    assert not embedding_of("text", 256, SALT)([""]).any()
    with pytest.raises(ConfigError, match=r"qdrant\.dimension is 64, expected 256 or more"):
        embedding_of("text", 64, SALT)


def test_a_model_that_is_not_installed_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    from stratakv import embedding

    embedding._model.cache_clear()
    monkeypatch.setitem(sys.modules, "wordllama", None)
    with pytest.raises(ConfigError, match=r"pip install 'stratakv\[text\]'"):
        embedding_of("text", 512, SALT)


def test_a_callable_of_the_users_is_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    def counts(items: list[list[int]]) -> np.ndarray:
        return np.array([np.bincount(np.asarray(each) % 8, minlength=8) for each in items])

    def lengths(items: list[str]) -> list[list[float]]:
        return [[len(each)] * 8 for each in items]

    def fails(items: list[str]) -> None:
        raise RuntimeError("with a secret")

    lengths.embeds = "text"
    module = types.ModuleType("mine")
    module.counts, module.lengths, module.fails = counts, lengths, fails
    monkeypatch.setitem(sys.modules, "mine", module)
    embed = embedding_of("mine:counts", 8, SALT)
    assert embed.embeds == "tokens"
    assert embed([[1, 1]]).tolist() == [[0, 1, 0, 0, 0, 0, 0, 0]]
    assert embedding_of("mine:lengths", 8, SALT).embeds == "text"
    with pytest.raises(ConfigError, match=r"gave an array \(1, 8\), expected finite numbers \(1, 512\)"):
        embedding_of("mine:counts", 512, SALT)
    with pytest.raises(ConfigError, match="mine:fails failed: RuntimeError; see"):
        embedding_of("mine:fails", 8, SALT)
    for name in ("mine:none", "nowhere:counts"):
        with pytest.raises(ConfigError, match="cannot be imported"):
            embedding_of(name, 8, SALT)
    monkeypatch.setattr(module, "counts", lambda items: np.full((len(items), 8), float(items[0][0])))
    embed = embedding_of("mine:counts", 8, SALT)
    with pytest.raises(InputError, match="expected finite numbers"):
        embed([[float("nan")]])
    lengths.embeds = "images"
    with pytest.raises(ConfigError, match="expected 'tokens' or 'text'"):
        embedding_of("mine:lengths", 8, SALT)
