"""A multi-tier KV cache for LLM serving.

with stratakv.open() as caches:
    model = caches.register("llama-3.2-1b", geometry)
    with model.match(tokens) as hit:
        n = hit.load(kv)
    model.put(tokens, kv)
"""

from stratakv._native import TokenSequence, __version__
from stratakv.cache import ModelCache
from stratakv.config import (
    Codec,
    Config,
    Geometry,
    Limits,
    ModelsConfig,
    Quota,
    QuotasConfig,
    RamConfig,
    SsdConfig,
    StoreConfig,
)
from stratakv.errors import (
    ClosedError,
    ConfigError,
    InputError,
    ModelExistsError,
    ModelNotFoundError,
    StoreError,
    StoreFormatError,
    StoreLockedError,
    StrataKVError,
)
from stratakv.manager import CacheManager, open
from stratakv.match import Match
from stratakv.quotas import Admission, Usage
from stratakv.registry import Discovery, FoundModel, RefusedModel, discover, weights_version
from stratakv.sections import DragonflyConfig, GpuConfig, ObserveConfig, PostgresConfig, QdrantConfig
from stratakv.stats import Explanation, GpuStats, Snapshot, Stats, TierStats
from stratakv.status import Status

__all__ = [
    "Admission",
    "CacheManager",
    "ClosedError",
    "Codec",
    "Config",
    "ConfigError",
    "Discovery",
    "DragonflyConfig",
    "Explanation",
    "FoundModel",
    "Geometry",
    "GpuConfig",
    "GpuStats",
    "InputError",
    "Limits",
    "Match",
    "ModelCache",
    "ModelExistsError",
    "ModelNotFoundError",
    "ModelsConfig",
    "ObserveConfig",
    "PostgresConfig",
    "QdrantConfig",
    "Quota",
    "QuotasConfig",
    "RamConfig",
    "RefusedModel",
    "Snapshot",
    "SsdConfig",
    "Stats",
    "Status",
    "StoreConfig",
    "StoreError",
    "StoreFormatError",
    "StoreLockedError",
    "StrataKVError",
    "TierStats",
    "TokenSequence",
    "Usage",
    "__version__",
    "discover",
    "open",
    "weights_version",
]
