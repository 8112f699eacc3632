"""What the adapters of serving engines share: their settings, the versions they were tested with, and keys for names.

An engine hands an adapter one table of options. Its sections are those of `stratakv.Config`; ``config`` names a TOML
file that is read first; what else an adapter takes, it takes out itself before.

Engines that ask by a key of their own and never show the tokens store through `KeyedBlocks`.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from hashlib import blake2b
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from stratakv import CacheManager, Config, ConfigError, Match, ModelCache, StrataKVError, TokenSequence, log
from stratakv import open as open_store

__all__ = [
    "EngineVersionError",
    "KeyedBlocks",
    "close",
    "guarded",
    "leading",
    "open_caches",
    "require",
    "settings",
    "text_option",
]

_log = log.of(__name__)

_T = TypeVar("_T")

_DEFAULTS = {"ram": {"prefault": True}, "ssd": {"policy": "write_through"}}


class EngineVersionError(StrataKVError):
    """An engine is missing, or of a version that its adapter was not tested with."""


def require(engine: str, low: str, below: str, distributions: Sequence[str] = ()) -> str:
    """The version of an installed engine, if it is one that its adapter was tested with.

    Args:
        engine: its name.
        low: the first version that was, as ``0.32``.
        below: the first that was not.
        distributions: names of the packages that bring it, the first found counts; just `engine` if there are none.

    Raises:
        EngineVersionError: it is not installed, or of another version.
    """
    for name in distributions or (engine,):
        try:
            found = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
        if _numbers(low) <= _numbers(found) < _numbers(below):
            return found
        raise EngineVersionError(
            f"{name} {found} is installed, this adapter was tested with {low} and later, below {below}:"
            f" pip install '{name}>={low},<{below}'"
        )
    raise EngineVersionError(f"{engine} is not installed: pip install '{engine}>={low},<{below}'")


def _numbers(version: str) -> tuple[int, ...]:
    """The numbers that a version starts with."""
    out: list[int] = []
    for part in version.split("+")[0].split("."):
        digits = part[: len(part) - len(part.lstrip("0123456789"))]
        if not digits:
            break
        out.append(int(digits))
    return tuple(out)


def settings(options: Mapping[str, Any], *folders: str) -> Config:
    """The configuration that an engine's options describe.

    Unless the options say otherwise, blocks go to the SSD as they are put, since an engine's process is often ended
    before it could write what it has; and RAM is backed with memory at start, so that no request waits for that.

    Args:
        options: ``config`` (a TOML file) and sections of `stratakv.Config`; the environment is read last.
        *folders: below ``ssd.path``: processes of one engine have a directory each.

    Raises:
        ConfigError: an option makes no sense.
    """
    tables = {name: value for name, value in options.items() if name != "config"}
    config = Config.load(options.get("config"), tables=tables, defaults=_DEFAULTS)
    if config.ssd.enabled and folders:
        config = replace(config, ssd=replace(config.ssd, path=Path(str(config.ssd.path)).joinpath(*folders)))
    return config


def open_caches(options: Mapping[str, Any], *folders: str) -> CacheManager:
    """Opens the store that an engine's options describe; both as for `settings`.

    Raises:
        ConfigError: an option makes no sense.
        StrataKVError: as `stratakv.open`.
    """
    return open_store(settings(options, *folders))


def text_option(options: dict[str, Any], name: str) -> str:
    """An option of an adapter's own, taken out of its table; empty if it is not there.

    Raises:
        ConfigError: it is no text.
    """
    value = options.pop(name, "")
    if not isinstance(value, str):
        raise ConfigError(f"{name} is {value!r}, expected text")
    return value


def guarded(otherwise: _T, work: Callable[[], _T]) -> _T:
    """What a call returns; a problem of the cache is logged, and is a miss."""
    try:
        return work()
    except (StrataKVError, ValueError) as problem:
        _log.warning("store_unusable", "a miss: the store could not be used: %s", problem)
    except Exception:
        _log.exception("store_failed", "a miss: the store failed")
    return otherwise


def close(caches: CacheManager) -> None:
    """Closes a store, and says what it did."""
    try:
        stats = caches.stats()
        _log.info(
            "store_counted",
            "asked for %d blocks, %d were there; %d were stored, %d found no room",
            *(stats.asked_blocks, stats.hit_blocks, stats.put_blocks, stats.put_refused_blocks),
            asked_blocks=stats.asked_blocks,
            hit_blocks=stats.hit_blocks,
            put_blocks=stats.put_blocks,
            refused_blocks=stats.put_refused_blocks,
        )
        caches.close()
    except StrataKVError as problem:
        _log.warning("store_not_all_written", "not all was written before the end: %s", problem)


def leading(keys: Sequence[bytes], has: Callable[[bytes], bool]) -> int:
    """How many leading ones of some keys are cached.

    Keys of one prompt are asked for last to first, so that its head is what was used last and outlives its tail: under
    keys a block has no block before it that would keep it. Where nearly all that is cached is leading, as it then is,
    few are asked for that are not.

    Args:
        keys: in the order of the prompt.
        has: whether one is cached; asking counts as a use.
    """
    if not keys or not has(keys[0]):
        return 0
    low, end = 1, len(keys)
    while low < end:
        middle = (low + end) // 2
        if has(keys[middle]):
            low = middle + 1
        else:
            end = middle
    # What stands at `end` is not cached, or there is nothing; what stands before it may still have holes.
    for number in reversed(range(end)):
        if not has(keys[number]):
            end = number
    return end


class KeyedBlocks:
    """Blocks under keys that an engine made, each found by its key alone.

    A key stands in for the tokens: its digest names the block, and so many more bytes of it as the block's tokens take
    are stored as their ids and compared on load. Keys must tell everything that the content depends on.
    """

    def __init__(self, cache: ModelCache, layout: str) -> None:
        """Stores in a cache.

        Args:
            cache: of the engine's blocks: its geometry is that of one key's content.
            layout: axes of the tensors, as for `ModelCache.put`.
        """
        self.cache = cache
        self.layout = layout

    def _sequence(self, key: bytes) -> TokenSequence:
        """One block of tokens that stand for a key."""
        count = self.cache.geometry.block_tokens
        ids = np.zeros(count, np.uint32)
        taken = min(count, 16)
        ids[:taken] = np.frombuffer(blake2b(key, digest_size=4 * taken, person=b"tokens").digest(), np.uint32)
        return self.cache.sequence(ids, block_hashes=[blake2b(key, digest_size=32, person=b"name").digest()])

    def name(self, key: bytes) -> bytes:
        """What `CacheManager.events` calls a block, 16 bytes."""
        return self.cache.names(self._sequence(key), "", "")[0]

    def lease(self, key: bytes) -> Match | None:
        """A block's match, leased until it is released; ``None`` if it is not cached. Counts as a use."""
        match = self.cache.match(self._sequence(key))
        if match.tokens > 0:
            return match
        match.release()
        return None

    def has(self, key: bytes) -> bool:
        """Whether a block is cached; that counts as a use."""
        match = self.lease(key)
        if match is not None:
            match.release()
        return match is not None

    def leading(self, keys: Sequence[bytes]) -> int:
        """How many leading ones of some keys are cached; see `leading`."""
        return leading(keys, self.has)

    def load(self, key: bytes, kv: object, pages: object = None) -> bool:
        """Copies a block into tensors; false is a miss, after which what they hold is undefined."""
        match = self.lease(key)
        if match is None:
            return False
        with match:
            return match.load(kv, layout=self.layout, pages=pages) > 0

    def put(self, key: bytes, kv: object, pages: object = None) -> bool:
        """Stores a block; false if there was no room."""
        return self.cache.put(self._sequence(key), kv, layout=self.layout, pages=pages) > 0
