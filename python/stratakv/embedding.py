"""Prompts as vectors: prompts that share much are near each other, others are not.

The default knows no words: it counts n-grams of token ids, and hashes each into a signed element of the vector (feature
hashing, Weinberger et al. 2009). A prompt that begins as another, or quotes it, is near it; one that says the same in
other words is not. That is what a prefetch can use: it is blocks of equal tokens that can be loaded.

Vectors are keyed, so that those of different secrets or spaces have nothing in common. That is no encryption: who reads
vectors sees which prompts of one space resemble each other, and may guess at those whose tokens he knows.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from stratakv.errors import ConfigError, InputError

Vectors = NDArray[np.float32]

# Of the static model.
_TEXT_DIMENSION = 256
# In which n-grams of an element and sign are counted.
_CELLS = 8
# Times more that what occurs very often weighs.
_SATURATION = 4.0


class Embedding(Protocol):
    """Makes vectors of prompts; equal ones of equal prompts, in every process."""

    @property
    def embeds(self) -> Literal["tokens", "text"]:
        """What it takes: token ids, or text."""

    def __call__(self, items: Sequence[Any], space: bytes = b"") -> Vectors:
        """The vectors [n, dimension] of n prompts, of length 1 each, or 0 for a prompt without content.

        Args:
            items: token ids [tokens] of each, or its text.
            space: what the vectors are compared within; those of different spaces may have nothing in common.

        Raises:
            InputError: what a callable of the user's gave are no such vectors.
        """


def embedding_of(name: str, dimension: int, salt: bytes) -> Embedding:
    """The embedding that a setting names.

    Args:
        name: ``"tokens"``, ``"text"``, or ``"module:function"``: a callable that takes ``(items)`` and returns an array
            [n, dimension]. It takes token ids, unless its attribute ``embeds`` is ``"text"``.
        dimension: elements of a vector.
        salt: secret that vectors are keyed with, where they can be.

    Raises:
        ConfigError: it cannot be imported, or does not fit the dimension.
    """
    if name == "tokens":
        return _Tokens(dimension, salt)
    return _Text(dimension) if name == "text" else _Named(name, dimension)


def token_embedding(tokens: Sequence[int] | NDArray[Any], dimension: int, salt: bytes) -> Vectors:
    """The vector [dimension] of some tokens, of length 1; zeros if there are none.

    Its n-grams of one to three tokens are hashed, each to an element and a sign (Weinberger et al. 2009); one that
    occurs often weighs a few times as much as one that occurs once, as terms in BM25 (Robertson, Zaragoza 2009). The
    hash is splitmix64's (Steele et al. 2014), keyed. Every machine gets the same bits.

    Args:
        tokens: ids [tokens], 0 or more each.
        dimension: elements of the vector.
        salt: of those that can be compared with it.
    """
    key = _key(salt)
    ones = _mix(np.asarray(tokens, np.uint64) ^ key[0])
    twos = _mix(ones[:-1] * key[1] + ones[1:])
    threes = _mix(twos[:-1] * key[2] + ones[2:])
    # Counted in some cells for each element and sign: sorting n-grams to count each alone takes longer than all else.
    high = np.concatenate((ones, twos, threes)) >> np.uint64(32)
    cells = high * np.uint64(2 * _CELLS * dimension) >> np.uint64(32)
    counts = np.bincount(cells.view(np.int64), minlength=2 * _CELLS * dimension)
    plus, minus = (counts * (_SATURATION + 1) / (counts + _SATURATION)).reshape(2, _CELLS, dimension).sum(1)
    # In whole numbers sums are exact.
    vector = np.rint((plus - minus) * 4096).astype(np.int64)
    unit: Vectors = (vector / (math.sqrt(vector @ vector) or 1.0)).astype(np.float32)
    return unit


def text_embedding(texts: Sequence[str], dimension: int) -> Vectors:
    """The vectors [n, dimension] of texts by a static model of words, WordLlama's of 256 elements, and zeros behind.

    It is not keyed. The model is loaded once, from the installed package; nothing is fetched.

    Raises:
        ConfigError: the library is not installed, or the dimension is below 256.
    """
    if dimension < _TEXT_DIMENSION:
        raise ConfigError(
            f"qdrant.dimension is {dimension}, expected {_TEXT_DIMENSION} or more for the embedding 'text'"
        )
    vectors = np.zeros((len(texts), dimension), np.float32)
    if texts:
        vectors[:, :_TEXT_DIMENSION] = _unit(_model().embed(list(texts)))
    return vectors


class _Tokens:
    """Hashed n-grams of token ids."""

    embeds: Literal["tokens", "text"] = "tokens"

    def __init__(self, dimension: int, salt: bytes) -> None:
        self._dimension, self._salt = dimension, salt

    def __call__(self, items: Sequence[Any], space: bytes = b"") -> Vectors:
        salt = hashlib.blake2b(space, key=hashlib.blake2b(self._salt).digest()).digest()
        vectors = [token_embedding(tokens, self._dimension, salt) for tokens in items]
        return np.array(vectors, np.float32).reshape(len(items), self._dimension)


class _Text:
    """A static model of words."""

    embeds: Literal["tokens", "text"] = "text"

    def __init__(self, dimension: int) -> None:
        self._dimension = dimension
        self(["a text"])

    def __call__(self, items: Sequence[Any], space: bytes = b"") -> Vectors:
        return text_embedding(items, self._dimension)


class _Named:
    """A callable of the user's, whose results are checked."""

    def __init__(self, name: str, dimension: int) -> None:
        module, _, function = name.partition(":")
        try:
            self._function = getattr(importlib.import_module(module), function)
        except (ImportError, AttributeError) as error:
            raise ConfigError(f"qdrant.embedding is {name!r}, and cannot be imported: {error}") from error
        self._name, self._dimension = name, dimension
        self.embeds: Literal["tokens", "text"] = getattr(self._function, "embeds", "tokens")
        if self.embeds not in ("tokens", "text"):
            raise ConfigError(f"{name}.embeds is {self.embeds!r}, expected 'tokens' or 'text'")
        try:
            self(["a text"] if self.embeds == "text" else [[1, 2, 3]])
        except InputError as error:
            raise ConfigError(f"qdrant.embedding: {error}; see qdrant.dimension") from error

    def __call__(self, items: Sequence[Any], space: bytes = b"") -> Vectors:
        try:
            vectors = np.asarray(self._function(items), np.float32)
        except Exception as error:
            raise InputError(f"{self._name} failed: {type(error).__name__}") from error
        expected = (len(items), self._dimension)
        if vectors.shape != expected or not np.isfinite(vectors).all():
            raise InputError(f"{self._name} gave an array {vectors.shape}, expected finite numbers {expected}")
        return _unit(vectors)


def _unit(vectors: NDArray[Any]) -> Vectors:
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    unit: Vectors = (vectors / np.where(lengths > 0, lengths, 1)).astype(np.float32)
    return unit


@functools.lru_cache(maxsize=1024)
def _key(salt: bytes) -> NDArray[np.uint64]:
    digest = hashlib.blake2b(salt, digest_size=24, person=b"stratakv-ngrams").digest()
    # Odd factors lose no bits.
    return np.frombuffer(digest, "<u8").astype(np.uint64) | np.uint64(1)


def _mix(words: NDArray[np.uint64]) -> NDArray[np.uint64]:
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        words = (words ^ (words >> np.uint64(shift))) * np.uint64(factor)
    return words ^ (words >> np.uint64(31))


@functools.lru_cache(maxsize=1)
def _model() -> Any:  # noqa: ANN401 - WordLlama's
    root, nothing = logging.getLogger(), logging.NullHandler()
    # It sets up logging for the whole process, unless that has been done.
    root.addHandler(nothing)
    try:
        import wordllama
    except ImportError as error:
        raise ConfigError("qdrant.embedding is 'text', which needs a library: pip install 'stratakv[text]'") from error
    finally:
        root.removeHandler(nothing)
    # It looks for its tokenizer beside itself, where it is, only if that is said to be its cache.
    return wordllama.WordLlama.load(cache_dir=Path(wordllama.__file__).parent, disable_download=True)
