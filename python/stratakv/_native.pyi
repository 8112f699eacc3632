"""The native half of stratakv; use the package `stratakv` instead."""

import os
from collections.abc import Sequence
from typing import Any, final

__all__ = ["Archive", "Lease", "Model", "Store", "TokenSequence", "__version__"]

__version__: str

_CodecTerms = tuple[str, str | None, str | None, float | None, bool, tuple[int, int]]

@final
class Archive:
    """A store directory as it is; `stratakv ssd` shows it."""

    def __new__(cls, path: str | os.PathLike[str]) -> Archive: ...
    @property
    def uuid(self) -> str: ...
    @property
    def in_use(self) -> bool: ...
    @property
    def damaged(self) -> list[os.PathLike[str]]: ...
    def models(self) -> list[dict[str, Any]]: ...
    def verify(self, model: int, segment: int) -> tuple[int, int, list[tuple[int, str]]]: ...

@final
class Store:
    """A store of this process; `stratakv.CacheManager` wraps it."""

    def __new__(
        cls,
        *,
        ram_capacity_bytes: int | str,
        eviction: str,
        ssd: tuple[str | os.PathLike[str] | None, int | str, int | str, str, str] | None,
        secret: str | None,
        threads: int,
        index_bytes: int | str | None,
    ) -> Store: ...
    def register(
        self,
        name: str,
        weights_version: str,
        geometry: tuple[int, int, int, int, str, int],
        weight: int,
        codecs: list[_CodecTerms],
    ) -> Model: ...
    def flush(self) -> None: ...
    def close(self) -> None: ...
    def ram_pages(self) -> tuple[str, int]: ...
    def snapshot(self) -> dict[str, Any]: ...

@final
class Model:
    """A registered model; `stratakv.ModelCache` wraps it."""

    def match_prefix(self, tokens: object, adapter: str, tenant: str) -> Lease: ...
    def sequence(self, adapter: str, tenant: str) -> TokenSequence: ...
    def put(
        self,
        tokens: object,
        kv: object,
        layout: str,
        batch: int,
        pages: object,
        adapter: str,
        tenant: str,
        priority: int,
        ttl_s: float | None,
    ) -> int: ...
    def set_ram_budget(self, budget_bytes: int | None) -> None: ...
    def set_codec(self, tier: str, codec: _CodecTerms) -> None: ...
    def calibrate(self, kv: object, percentile: float, layout: str, batch: int, pages: object) -> list[float]: ...
    def drop_namespace(self, adapter: str, tenant: str) -> int: ...
    def unregister(self) -> None: ...

@final
class TokenSequence:
    """Token ids that grow, and the hashes of their blocks."""

    def extend(self, tokens: object, *, block_hashes: Sequence[bytes] | None = None) -> None: ...
    def __len__(self) -> int: ...

@final
class Lease:
    """A leased match; `stratakv.Match` wraps it."""

    @property
    def tokens(self) -> int: ...
    @property
    def blocks(self) -> int: ...
    @property
    def asked_tokens(self) -> int: ...
    @property
    def places(self) -> list[str]: ...
    @property
    def miss(self) -> str | None: ...
    def load(self, kv: object, layout: str, batch: int, pages: object) -> tuple[int, list[str], str | None]: ...
    def view(self, block: int) -> memoryview | None: ...
    def release(self) -> None: ...
