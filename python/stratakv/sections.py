"""Settings of what is beside the tiers of this process: servers, and what operators see."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, get_args

from stratakv.errors import ConfigError
from stratakv.levels import levels_of
from stratakv.settings import begins_with, check_seconds, parse_budget

LogFormat = Literal["plain", "json"]


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuConfig:
    """The GPU tier: copies of blocks that are asked for again, in memory of the device that the engine computes on.

    Attributes:
        capacity_bytes: memory of the device that it takes, or half of that, and so on, where there is not so much; 0:
            there is no such tier. It takes tensors on the device, and fills such.
        device: number of the device, as the driver counts.
        driver: library of the driver; ``None``: the system's.
        required: whether it is an error when the store is opened and there is no such device, or no room on it.
    """

    capacity_bytes: int | str = 0
    device: int = 0
    driver: str | os.PathLike[str] | None = None
    required: bool = False

    def __post_init__(self) -> None:
        """Checks every field."""
        object.__setattr__(self, "capacity_bytes", parse_budget(self.capacity_bytes, "gpu.capacity_bytes"))
        if type(self.device) is not int or not 0 <= self.device < 1 << 16:
            raise ConfigError(f"gpu.device is {self.device!r}, expected an integer from 0")
        if not isinstance(self.required, bool):
            raise ConfigError(f"gpu.required is {self.required!r}, expected true or false")


@dataclass(frozen=True, slots=True, kw_only=True)
class DragonflyConfig:
    """The tier that nodes share: DragonflyDB, Valkey or Redis, one node or a cluster.

    Nodes that share have the same ``store.secret``: it names and seals what they write.

    Attributes:
        url: as ``redis://host:6379/0``, ``rediss://...`` with TLS or ``unix:///path``; ``None``: there is no such tier.
        cluster: whether it is a cluster, or Dragonfly in cluster mode.
        username: of an ACL user, if not in the URL.
        password: of that user, if not in the URL.
        ca_file: certificates by which TLS is verified; ``None``: the system's.
        deadline_s: seconds that a call may take; then it is a miss.
        ttl_s: seconds after which a block expires there; ``None``: the server decides what leaves.
        required: whether a server that does not answer when the store is opened is an error.
    """

    url: str | None = field(default=None, repr=False)
    cluster: bool = False
    username: str | None = None
    password: str | None = field(default=None, repr=False)
    ca_file: str | os.PathLike[str] | None = None
    deadline_s: float = 0.25
    ttl_s: float | None = None
    required: bool = False

    def __post_init__(self) -> None:
        """Checks every field."""
        for name in ("url", "username", "password"):
            if not isinstance(getattr(self, name), str | None):
                raise ConfigError(f"dragonfly.{name} is no text")
        scheme = (self.url or "redis:").partition(":")[0]
        if scheme not in ("redis", "rediss", "unix"):
            raise ConfigError(
                f"dragonfly.url begins with {begins_with(scheme)!r}, expected redis://, rediss:// or unix://"
            )
        if self.ca_file is not None and self.url is not None and scheme != "rediss":
            raise ConfigError(f"dragonfly.ca_file is for rediss://, dragonfly.url begins with {scheme!r}")
        for name in ("cluster", "required"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"dragonfly.{name} is {getattr(self, name)!r}, expected true or false")
        check_seconds("dragonfly.deadline_s", self.deadline_s)
        if self.ttl_s is not None:
            check_seconds("dragonfly.ttl_s", self.ttl_s)


@dataclass(frozen=True, slots=True, kw_only=True)
class PostgresConfig:
    """The catalog in PostgreSQL, 15 or newer: what is cached where, for whom, since when.

    Attributes:
        url: as ``postgresql://user@host/database``, with libpq's parameters; ``None``: there is no catalog. To
            another host TLS is verified, unless the URL says otherwise by ``sslmode``.
        password: of that user, if not in the URL, the environment or a password file.
        ca_file: certificates by which TLS is verified; ``None``: the system's.
        node: what this node is called there; ``None``: as its host. A second process of one name gets ``#2`` behind it.
        deadline_s: seconds that a call may take. No request waits for one.
        interval_s: seconds between two looks at what is to be told.
        poll_s: seconds after which a retired version is found at the latest, where its notice was missed.
        keep_days: days that events, prefixes that nobody uses, and nodes that are gone are kept.
        warm_start_bytes: bytes that are brought to RAM when a model is registered, of what was asked for most; half of
            RAM at most, 0: none.
        required: whether a database that does not answer, or cannot be used, is an error when the store is opened.
    """

    url: str | None = field(default=None, repr=False)
    password: str | None = field(default=None, repr=False)
    ca_file: str | os.PathLike[str] | None = None
    node: str | None = None
    deadline_s: float = 5.0
    interval_s: float = 0.2
    poll_s: float = 5.0
    keep_days: int = 30
    warm_start_bytes: int | str = "1GiB"
    required: bool = False

    def __post_init__(self) -> None:
        """Checks every field."""
        for name in ("url", "password", "node"):
            if not isinstance(getattr(self, name), str | None):
                raise ConfigError(f"postgres.{name} is no text")
        scheme = (self.url or "postgresql:").partition(":")[0]
        if scheme not in ("postgresql", "postgres"):
            raise ConfigError(f"postgres.url begins with {begins_with(scheme)!r}, expected postgresql://")
        if not isinstance(self.required, bool):
            raise ConfigError(f"postgres.required is {self.required!r}, expected true or false")
        for name in ("deadline_s", "interval_s", "poll_s"):
            check_seconds(f"postgres.{name}", getattr(self, name))
        _check_days("postgres.keep_days", self.keep_days)
        budget = parse_budget(self.warm_start_bytes, "postgres.warm_start_bytes")
        object.__setattr__(self, "warm_start_bytes", budget)


def _check_days(name: str, value: object) -> None:
    if type(value) is not int or not 1 <= value <= 36_500:
        raise ConfigError(f"{name} is {value!r}, expected days from 1 to 36500")


@dataclass(frozen=True, slots=True, kw_only=True)
class QdrantConfig:
    """Which stored prefixes are near a prompt: points in Qdrant, for prefetch and routing, never for a hit.

    Attributes:
        url: as ``http://host:6333`` or ``https://...``; ``None``, and no ``path``: there is no such tier.
        path: instead of a server a folder, or ``":memory:"``, in which the client library searches by itself: for one
            process and some thousand prefixes.
        api_key: of the server.
        ca_file: certificates by which TLS is verified; ``None``: the system's.
        collection: where the points are.
        dimension: elements of a vector; of a collection that exists, those it has.
        embedding: what makes the vectors: ``"tokens"``, ``"text"``, or a callable ``"module:function"``; see
            `stratakv.embedding`.
        deadline_s: seconds that a call may take. No request waits for one.
        prefetch_bytes: bytes that are brought to RAM of what is near to one prompt; 0: none.
        keep_days: days that points are kept.
        required: whether a server that does not answer, or cannot be used, is an error when the store is opened.
    """

    url: str | None = field(default=None, repr=False)
    path: str | os.PathLike[str] | None = None
    api_key: str | None = field(default=None, repr=False)
    ca_file: str | os.PathLike[str] | None = None
    collection: str = "stratakv"
    dimension: int = 512
    embedding: str = "tokens"
    deadline_s: float = 0.25
    prefetch_bytes: int | str = "256MiB"
    keep_days: int = 30
    required: bool = False

    def __post_init__(self) -> None:
        """Checks every field."""
        for name in ("url", "api_key"):
            if not isinstance(getattr(self, name), str | None):
                raise ConfigError(f"qdrant.{name} is no text")
        scheme, _, rest = (self.url or "http://").partition("://")
        if scheme not in ("http", "https"):
            raise ConfigError(f"qdrant.url begins with {begins_with(scheme)!r}, expected http:// or https://")
        if "@" in rest:
            raise ConfigError("qdrant.url holds a user, expected none: the server takes a key, see qdrant.api_key")
        if self.url is not None and self.path is not None:
            raise ConfigError(f"qdrant.path is {str(self.path)!r} and qdrant.url is set, expected one of them")
        if not isinstance(self.collection, str) or not re.fullmatch(r"[\w-]{1,255}", self.collection, re.ASCII):
            raise ConfigError(f"qdrant.collection is {self.collection!r}, expected letters, digits, _ and -")
        if type(self.dimension) is not int or not 8 <= self.dimension <= 65_535:
            raise ConfigError(f"qdrant.dimension is {self.dimension!r}, expected an integer from 8 to 65535")
        if not isinstance(self.embedding, str) or not re.fullmatch(r"tokens|text|[\w.]+:\w+", self.embedding):
            raise ConfigError(f"qdrant.embedding is {self.embedding!r}, expected 'tokens', 'text' or 'module:function'")
        if not isinstance(self.required, bool):
            raise ConfigError(f"qdrant.required is {self.required!r}, expected true or false")
        check_seconds("qdrant.deadline_s", self.deadline_s)
        _check_days("qdrant.keep_days", self.keep_days)
        object.__setattr__(self, "prefetch_bytes", parse_budget(self.prefetch_bytes, "qdrant.prefetch_bytes"))


@dataclass(frozen=True, slots=True, kw_only=True)
class ObserveConfig:
    """What a store tells those who operate it.

    Attributes:
        listen: ``host:port`` where it answers over HTTP; port 0 takes a free one. ``None``: nowhere.
        token: what who asks there has to show, unless it is only whether the process lives.
        share: a folder that is the same for all processes of a machine that share the address: whoever has it asks the
            others, and all are told apart by their names.
        name: of this process among them; ``None``: the name of the SSD tier's folder, or the process's number.
        otlp: who takes spans and metrics: ``http://host:4318`` (or https), ``grpc://host:4317`` (or grpcs). ``None``:
            nobody.
        trace_ratio: share of the requests that are traced, of those that come without a caller's span.
        otlp_every_s: seconds between two times of sending metrics.
        log_format: ``plain``: nothing is set up, and lines go where the application has them go; ``json``: each is an
            object in a line of its own on stderr, and goes nowhere else.
        log_levels: by component the least level that is written: ``debug``, ``info``, ``warning`` or ``error``. A
            component is a module without the package's name, as ``tiers.dragonfly``, or all in a folder, as ``tiers``;
            ``""`` is all. A table, or text: ``"info,tiers.dragonfly=debug"``.
    """

    listen: str | None = None
    token: str | None = field(default=None, repr=False)
    share: str | os.PathLike[str] | None = None
    name: str | None = None
    otlp: str | None = field(default=None, repr=False)
    trace_ratio: float = 0.01
    otlp_every_s: float = 15.0
    log_format: LogFormat = "plain"
    log_levels: Mapping[str, str] | str = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Checks every field."""
        for name in ("listen", "token", "name", "otlp"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, str) or not value):
                shown = "empty or not text" if name in ("token", "otlp") else repr(value)
                raise ConfigError(f"observe.{name} is {shown}, expected text, or no setting at all")
        if self.listen is not None and not re.fullmatch(r"\S+:\d{1,5}", self.listen):
            raise ConfigError(f"observe.listen is {self.listen!r}, expected host:port, as 127.0.0.1:9470")
        ratio = self.trace_ratio
        if not isinstance(ratio, (int, float)) or isinstance(ratio, bool) or not 0 <= ratio <= 1:
            raise ConfigError(f"observe.trace_ratio is {ratio!r}, expected a number from 0 to 1")
        check_seconds("observe.otlp_every_s", self.otlp_every_s)
        if self.share is not None:
            object.__setattr__(self, "share", Path(self.share))
        if self.log_format not in get_args(LogFormat):
            expected = ", ".join(get_args(LogFormat))
            raise ConfigError(f"observe.log_format is {self.log_format!r}, expected one of {expected}")
        object.__setattr__(self, "log_levels", levels_of(self.log_levels))
