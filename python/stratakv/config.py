"""Settings: frozen, keyword-only, valid once they exist.

They come from one place, in this order: the defaults, a TOML file, the environment. A key of the file is
``[section] field``; its environment variable is ``STRATAKV_SECTION_FIELD``. Sizes are bytes: an integer, or text such
as ``"8GiB"`` or ``"500 MB"``. An unknown key is an error that names the nearest valid one.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

from stratakv.errors import ConfigError, InputError
from stratakv.sections import DragonflyConfig, GpuConfig, ObserveConfig, PostgresConfig, QdrantConfig
from stratakv.settings import from_text, parse_bytes, read_toml, shown, unknown_name

Dtype = Literal["fp32", "fp16", "bf16", "uint8"]
"""Element types of cached tensors; ``uint8`` carries either FP8 format."""

Policy = Literal["write_back", "write_through", "write_through_second_touch"]
Engine = Literal["auto", "io_uring", "pread"]
Eviction = Literal["lru", "lfu", "s3fifo", "s3fifo_long", "arc", "wtinylfu", "gdsf", "adaptive"]
"""When blocks are written to SSD: when RAM fills, or as soon as they are put."""

Strategy = Literal["fair", "proportional", "priority", "dynamic"]
"""How a tier is divided between models."""
VictimPolicy = Literal["lru", "lfu", "smallest", "round_robin", "utility"]
"""Which model makes room when a tier is full."""
Objective = Literal["bytes", "tokens", "seconds"]
Demand = Literal["bytes", "weights", "token_bytes"]

CodecName = Literal["none", "fp16", "int8_sym", "int8_asym", "k8v4", "int4"]

_ITEM_BYTES = {"fp32": 4, "fp16": 2, "bf16": 2, "uint8": 1}


@dataclass(frozen=True, slots=True, kw_only=True)
class Geometry:
    """Shape of one block of a model.

    Attributes:
        layers: attention layers that have a cache.
        kv_heads: key/value heads of a layer.
        head_dim: elements of one head.
        dtype: element type: ``fp32``, ``fp16``, ``bf16`` or ``uint8``.
        block_tokens: tokens per block, the unit of everything; at most 4096.
        planes: tensors per layer: 2 for K and V, 1 for a latent (MLA) plane.

    Raises:
        InputError: a size is not positive, or the dtype is not supported.
    """

    layers: int
    kv_heads: int
    head_dim: int
    dtype: Dtype
    block_tokens: int = 16
    planes: int = 2

    def __post_init__(self) -> None:
        """Checks every field."""
        limits = {"block_tokens": 4096, "planes": 2}
        for name in ("layers", "kv_heads", "head_dim", "block_tokens", "planes"):
            value, most = getattr(self, name), limits.get(name, 2**31 - 1)
            if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= most:
                raise InputError(f"geometry: {name} is {value!r}, expected an integer from 1 to {most}")
        if self.dtype not in get_args(Dtype):
            raise InputError(f"geometry: dtype is {self.dtype!r}, expected one of {', '.join(get_args(Dtype))}")

    @property
    def token_bytes(self) -> int:
        """Bytes of one token over all layers and planes."""
        return self.layers * self.planes * self.kv_heads * self.head_dim * _ITEM_BYTES[self.dtype]

    @property
    def block_bytes(self) -> int:
        """Payload bytes of one block."""
        return self.token_bytes * self.block_tokens


@dataclass(frozen=True, slots=True)
class Codec:
    """How keys and values are kept in fewer bytes.

    Every codec but ``none`` loses precision; docs/tuning.md has how much, and which to choose.

    Attributes:
        name: ``none``, ``fp16`` (of fp32), ``int8_sym``, ``int8_asym`` (with the least value), ``k8v4`` (keys in 8
            bits, values in 4) or ``int4``.
        keys: what shares a scale: ``tensor``, ``head``, ``token`` or ``channel`` of a block; the latter two in groups,
            as ``token:64`` (channels) or ``channel:32`` (tokens). ``None``: per channel; with 4 bits in groups of 64 at
            most.
        values: the same for values. ``None``: per token; with 4 bits in groups of 64 at most.
        clip: cuts each block's magnitudes to this percentile of them, above 0 to 100; or ``"calibrated"``: to what
            `ModelCache.calibrate` found. ``None``, the default, cuts nothing.
        raw_layers: so many first and last layers stay as they are.

    Raises:
        InputError: a value of another type. Whether it fits a model shows where it is set for one.
    """

    name: CodecName
    keys: str | None = None
    values: str | None = None
    clip: float | Literal["calibrated"] | None = None
    raw_layers: tuple[int, int] = (0, 0)

    def __post_init__(self) -> None:
        """Checks the kind of every field."""
        if self.name not in get_args(CodecName):
            raise InputError(f"codec {self.name!r}: expected one of {', '.join(get_args(CodecName))}")
        for name in ("keys", "values"):
            if not isinstance(getattr(self, name), str | None):
                raise InputError(f"codec: {name} is {getattr(self, name)!r}, expected text, or None")
        number = isinstance(self.clip, (int, float)) and not isinstance(self.clip, bool)
        if self.clip is not None and self.clip != "calibrated" and not (number and 0 < self.clip <= 100):
            raise InputError(f'codec: clip is {self.clip!r}, expected a percentile above 0, up to 100, or "calibrated"')
        raw = tuple(self.raw_layers) if isinstance(self.raw_layers, (list, tuple)) else ()
        if len(raw) != 2 or not all(type(layers) is int and 0 <= layers < 2**32 for layers in raw):
            raise InputError(f"codec: raw_layers is {self.raw_layers!r}, expected two numbers of layers, from 0 up")
        object.__setattr__(self, "raw_layers", raw)

    @classmethod
    def of(cls, value: object) -> Codec:
        """A codec; or one of a name, or of a table of these fields.

        Raises:
            InputError: it is none of these.
        """
        if isinstance(value, cls):
            return value
        if isinstance(value, str):
            return cls(value)  # type: ignore[arg-type]  # it is checked
        if isinstance(value, Mapping) and "name" in value:
            valid = [each.name for each in fields(cls)]
            if unknown := [key for key in value if key not in valid]:
                raise InputError(str(unknown_name("key", str(unknown[0]), valid, "codec")))
            return cls(**value)
        raise InputError(f"codec is {value!r}, expected a name, a table with a name, or a stratakv.Codec")

    def terms(self) -> tuple[str, str | None, str | None, float | None, bool, tuple[int, int]]:
        """What the native half takes."""
        calibrated = self.clip == "calibrated"
        percentile = None if calibrated else self.clip
        return self.name, self.keys, self.values, percentile, calibrated, self.raw_layers  # type: ignore[return-value]


@dataclass(frozen=True, slots=True, kw_only=True)
class RamConfig:
    """The RAM tier.

    Attributes:
        capacity_bytes: size of its arena, headers of blocks included.
        eviction: in which order blocks leave: ``lru``, ``lfu`` (aged), ``s3fifo``, ``s3fifo_long`` (for what comes
            back late), ``arc``, ``wtinylfu``, ``gdsf``, or ``adaptive``: whichever of these does best on a sample of
            the present load.
        codec: how blocks are encoded when they are put, unless a model is registered with another: a `Codec`, its name,
            or a table of its fields.
        prefault: whether the whole arena is backed with memory at once, behind the opening. Else it is as blocks come,
            and the first put to each part of it takes several times as long.
    """

    capacity_bytes: int | str = "2GiB"
    eviction: Eviction = "adaptive"
    codec: Codec | str | Mapping[str, Any] = "none"
    prefault: bool = False

    def __post_init__(self) -> None:
        """Checks every field and turns the size into bytes."""
        object.__setattr__(self, "capacity_bytes", parse_bytes(self.capacity_bytes, "ram.capacity_bytes"))
        if self.eviction not in get_args(Eviction):
            raise ConfigError(f"ram.eviction is {self.eviction!r}, expected one of {', '.join(get_args(Eviction))}")
        if not isinstance(self.prefault, bool):
            raise ConfigError(f"ram.prefault is {self.prefault!r}, expected true or false")
        object.__setattr__(self, "codec", _codec("ram.codec", self.codec))


@dataclass(frozen=True, slots=True, kw_only=True)
class SsdConfig:
    """The SSD tier.

    Attributes:
        enabled: whether there is one.
        path: its directory, used by one process at a time; ``None`` is ``stratakv`` in the user's cache folder.
        capacity_bytes: cap on the bytes of all its files.
        segment_bytes: bytes of one segment, the unit in which space is reserved and reused.
        policy: ``write_back`` writes blocks when RAM fills, ``write_through`` as soon as they are put,
            ``write_through_second_touch`` as soon as they are matched, and never what is not; all behind.
        engine: what reads and writes: ``io_uring``, ``pread`` (a few threads), or ``auto``, the first that the system
            allows. Containers often forbid io_uring.
        codec: how blocks are encoded that go to SSD as they were put, unless a model is registered with another; as
            that of RAM.
    """

    enabled: bool = True
    path: str | os.PathLike[str] | None = None
    capacity_bytes: int | str = "16GiB"
    segment_bytes: int | str = "64MiB"
    policy: Policy = "write_back"
    engine: Engine = "auto"
    codec: Codec | str | Mapping[str, Any] = "none"

    def __post_init__(self) -> None:
        """Checks every field and fills in the path."""
        for name in ("capacity_bytes", "segment_bytes"):
            object.__setattr__(self, name, parse_bytes(getattr(self, name), f"ssd.{name}"))
        if not isinstance(self.enabled, bool):
            raise ConfigError(f"ssd.enabled is {self.enabled!r}, expected true or false")
        if self.policy not in get_args(Policy):
            raise ConfigError(f"ssd.policy is {self.policy!r}, expected one of {', '.join(get_args(Policy))}")
        if self.engine not in get_args(Engine):
            raise ConfigError(f"ssd.engine is {self.engine!r}, expected one of {', '.join(get_args(Engine))}")
        object.__setattr__(self, "codec", _codec("ssd.codec", self.codec))
        object.__setattr__(self, "path", _cache_folder() if self.path is None else Path(self.path).expanduser())


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelsConfig:
    """How the tiers are divided between models.

    A share is what a model gets back when it needs it; what others do not use of theirs is lent to it.

    Attributes:
        strategy: ``fair``, the same for all; ``proportional``, by demand; ``priority``, by the priorities that models
            are registered with; ``dynamic``, where the next byte saves most, by what the requests of each model would
            have hit with more or less of it.
        victims: which model makes room first, of those that hold more than their shares: ``lru``, used longest ago;
            ``lfu``, least often, aged; ``smallest``, least bytes held; ``round_robin``; ``utility``, who loses least by
            each byte.
        objective: what ``dynamic`` saves: ``bytes`` of keys and values, ``tokens``, or ``seconds`` of prefill, as
            `ModelCache.set_prefill_rate` tells; a model without that rate counts as one that computes a token a second.
        demand: what ``proportional`` goes by: ``bytes`` that are asked for, the ``weights_bytes`` that models are
            registered with, or ``token_bytes``, keys and values of a token. Only the first has to do with need.
        floor: the part of a fair share that a model has under any strategy, 0 to 1.
        interval_s: seconds between two divisions; 0: only when models come and go, or `CacheManager.rebalance` is
            called.
        half_life_s: after so many seconds what was asked for counts half.
        idle_s: a model that was asked for nothing for so long has its floor alone, until it is asked again; 0: never.
    """

    strategy: Strategy = "dynamic"
    victims: VictimPolicy = "utility"
    objective: Objective = "bytes"
    demand: Demand = "bytes"
    floor: float = 0.5
    interval_s: float = 15.0
    half_life_s: float = 600.0
    idle_s: float = 300.0

    def __post_init__(self) -> None:
        """Checks every field."""
        kinds = {"strategy": Strategy, "victims": VictimPolicy, "objective": Objective, "demand": Demand}
        for name, kind in kinds.items():
            if getattr(self, name) not in get_args(kind):
                expected = ", ".join(get_args(kind))
                raise ConfigError(f"models.{name} is {getattr(self, name)!r}, expected one of {expected}")
        for name, most in {"floor": 1.0, "interval_s": 1e9, "half_life_s": 1e9, "idle_s": 1e9}.items():
            value = getattr(self, name)
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if not number or not 0 <= value <= most or (name == "half_life_s" and not value):
                above = "above 0" if name == "half_life_s" else "from 0"
                raise ConfigError(f"models.{name} is {value!r}, expected a number {above} to {most:g}")


_TIERS: tuple[Literal["ram", "ssd"], ...] = ("ram", "ssd")
_Kind = TypeVar("_Kind", "Limits", "Quota")


def _of(kind: type[_Kind], value: object, where: str) -> _Kind:
    if isinstance(value, kind):
        return value
    if isinstance(value, Mapping):
        valid = [each.name for each in fields(kind)]
        if unknown := [key for key in value if key not in valid]:
            raise InputError(str(unknown_name("key", str(unknown[0]), valid, where)))
        return kind(**value)
    raise InputError(f"{where} is {value!r}, expected a stratakv.{kind.__name__}, or a table of its fields")


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What holds for one tier, in bytes of blocks, headers and padding included.

    Attributes:
        hard_bytes: never more than this, not for a moment; 0: nothing there. ``None``: no limit.
        soft_bytes: what is above is lent: it goes first when others need room. ``None``: no such limit.
        reserved_bytes: as much is not taken for others.

    Raises:
        InputError: a size that makes no sense, or not ``reserved <= soft <= hard``.
    """

    hard_bytes: int | str | None = None
    soft_bytes: int | str | None = None
    reserved_bytes: int | str = 0

    def __post_init__(self) -> None:
        """Turns sizes into bytes and checks their order."""
        for name in ("hard_bytes", "soft_bytes", "reserved_bytes"):
            value = getattr(self, name)
            if value is None and name != "reserved_bytes":
                continue
            if value != 0 or isinstance(value, bool):
                try:
                    value = parse_bytes(value, name)
                except ConfigError as error:
                    raise InputError(f"quota: {error}") from error
            object.__setattr__(self, name, value)
        reserved, soft, hard = self.reserved_bytes, self.soft_bytes, self.hard_bytes
        rising = [value for value in (reserved, soft, hard) if value is not None]
        if rising != sorted(rising):
            raise InputError(f"quota: reserved {reserved}, soft {soft}, hard {hard} bytes, expected them to rise")

    @classmethod
    def of(cls, value: object) -> Limits:
        """Limits, or those of a table of these fields.

        Raises:
            InputError: it is neither.
        """
        return _of(cls, value, "quota: limits of a tier")


@dataclass(frozen=True, slots=True, kw_only=True)
class Quota:
    """What a model, or a tenant over all models, may have.

    Attributes:
        ram: of RAM: `Limits`, or a table of their fields.
        ssd: of the SSD: of a model its whole file counts, in segments; of a tenant its records.
        tokens_per_s: new tokens that are stored a second; those of one second, or one block, may come at once.
        loads: loads at a time; one that finds as many under way loads nothing, with the reason ``quota``.

    Raises:
        InputError: a value of another type, or out of range.
    """

    ram: Limits | Mapping[str, Any] = Limits()
    ssd: Limits | Mapping[str, Any] = Limits()
    tokens_per_s: float | None = None
    loads: int | None = None

    def __post_init__(self) -> None:
        """Checks every field."""
        for name in ("ram", "ssd"):
            object.__setattr__(self, name, Limits.of(getattr(self, name)))
        rate, loads = self.tokens_per_s, self.loads
        number = isinstance(rate, (int, float)) and not isinstance(rate, bool)
        if rate is not None and not (number and 0 < rate < 1e15):
            raise InputError(f"quota: tokens_per_s is {rate!r}, expected a number above 0, or None")
        if loads is not None and (type(loads) is not int or not 0 <= loads < 2**32):
            raise InputError(f"quota: loads is {loads!r}, expected an integer from 0, or None")

    @classmethod
    def of(cls, value: object) -> Quota:
        """A quota, or one of a table of these fields.

        Raises:
            InputError: it is neither.
        """
        return _of(cls, value, "quota")

    def limits(self, tier: Literal["ram", "ssd"]) -> Limits:
        """What holds for one tier."""
        return Limits.of(getattr(self, tier))

    def without_reserves(self) -> Quota:
        """The same, with nothing reserved."""
        ram, ssd = (replace(self.limits(tier), reserved_bytes=0) for tier in _TIERS)
        return replace(self, ram=ram, ssd=ssd)

    def terms(self) -> tuple[list[tuple[int | None, int | None, int]], float | None, int | None]:
        """What the native half takes."""
        both = (self.limits("ram"), self.limits("ssd"))
        tiers = [(limits.hard_bytes, limits.soft_bytes, limits.reserved_bytes) for limits in both]
        return tiers, self.tokens_per_s, self.loads  # type: ignore[return-value]  # sizes are numbers


@dataclass(frozen=True, slots=True, kw_only=True)
class QuotasConfig:
    """Quotas from the start; `CacheManager.set_quota` changes them while the store runs, and that is kept.

    Attributes:
        models: by name of the model, registered or not: a `Quota`, or a table of its fields.
        tenants: by name of the tenant.
    """

    models: Mapping[str, Quota | Mapping[str, Any]] = field(default_factory=dict)
    tenants: Mapping[str, Quota | Mapping[str, Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Checks every quota."""
        for kind in ("models", "tenants"):
            table = getattr(self, kind)
            if not isinstance(table, Mapping):
                raise ConfigError(f"quotas.{kind} is {table!r}, expected a table of quotas by name")
            try:
                object.__setattr__(self, kind, {name: Quota.of(quota) for name, quota in table.items()})
            except InputError as error:
                raise ConfigError(f"quotas.{kind}: {error}") from error


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreConfig:
    """What all tiers share.

    Attributes:
        secret: what block hashes are keyed with. ``None``: the SSD directory keeps a random one of its own.
        threads: threads that copy and read, the caller's included; 0 is one per core.
        index_bytes: memory that the index may take; it is used as blocks come, about 77 bytes for each. ``None``:
            enough for blocks of 16 KiB in all tiers. A full index takes no new blocks, and counts them.
    """

    secret: str | None = field(default=None, repr=False)
    threads: int = 0
    index_bytes: int | str | None = None

    def __post_init__(self) -> None:
        """Checks every field."""
        if self.secret is not None and (not isinstance(self.secret, str) or not self.secret):
            raise ConfigError("store.secret is empty or not text, expected a passphrase, or no setting at all")
        if not isinstance(self.threads, int) or isinstance(self.threads, bool) or not 0 <= self.threads <= 1024:
            raise ConfigError(f"store.threads is {self.threads!r}, expected an integer from 0 to 1024")
        if self.index_bytes is not None:
            object.__setattr__(self, "index_bytes", parse_bytes(self.index_bytes, "store.index_bytes"))


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """All settings of a store.

    Attributes:
        ram: the RAM tier.
        ssd: the SSD tier.
        models: how the tiers are divided between models.
        quotas: what models and tenants may have.
        gpu: the GPU tier.
        dragonfly: the tier that nodes share.
        postgres: the catalog.
        qdrant: which prefixes are near.
        store: what all tiers share.
        observe: what it tells.
    """

    ram: RamConfig = field(default_factory=RamConfig)
    ssd: SsdConfig = field(default_factory=SsdConfig)
    models: ModelsConfig = field(default_factory=ModelsConfig)
    quotas: QuotasConfig = field(default_factory=QuotasConfig)
    gpu: GpuConfig = field(default_factory=GpuConfig)
    dragonfly: DragonflyConfig = field(default_factory=DragonflyConfig)
    postgres: PostgresConfig = field(default_factory=PostgresConfig)
    qdrant: QdrantConfig = field(default_factory=QdrantConfig)
    store: StoreConfig = field(default_factory=StoreConfig)
    observe: ObserveConfig = field(default_factory=ObserveConfig)

    def __post_init__(self) -> None:
        """Checks the kind of every section."""
        for name, kind in _SECTIONS.items():
            if not isinstance(getattr(self, name), kind):
                raise ConfigError(f"{name} is {shown(getattr(self, name))}, expected a {kind.__name__}")
        for name in ("dragonfly", "postgres", "qdrant"):
            if getattr(self, name).url is not None and self.store.secret is None:
                raise ConfigError(f"{name}.url is set and store.secret is not: nodes that share need the same secret")

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str] | None = None,
        environ: Mapping[str, str] = os.environ,
        *,
        tables: Mapping[str, Any] | None = None,
        defaults: Mapping[str, Any] | None = None,
    ) -> Config:
        """Reads defaults, a TOML file and tables, if they are given, then the environment; the later one wins.

        Args:
            path: the file.
            tables: what a file would hold, as a mapping of sections.
            defaults: the same, in place of our own.
            environ: where the ``STRATAKV_`` variables are read from.

        Raises:
            ConfigError: the file cannot be read, or a key or value makes no sense.
        """
        values: dict[str, dict[str, Any]] = {name: {} for name in _SECTIONS}
        files = [] if path is None else [(str(path), read_toml(Path(path)))]
        for where, sections in [("defaults", defaults or {}), *files, ("configuration", tables or {})]:
            for section, table in sections.items():
                if section not in _SECTIONS:
                    raise unknown_name("section", section, list(_SECTIONS), where)
                if not isinstance(table, dict):
                    raise ConfigError(f"{where}: {section} is {shown(table)}, expected a table [{section}]")
                values[section].update(table)
        for name, text in environ.items():
            for section in _SECTIONS:
                prefix = f"STRATAKV_{section.upper()}_"
                if name.startswith(prefix):
                    key = name.removeprefix(prefix).lower()
                    values[section][key] = from_text(section, key, text)
        for section, table in values.items():
            valid = [f.name for f in fields(_SECTIONS[section])]
            for key in table:
                if key not in valid:
                    raise unknown_name(
                        "key", f"{section}.{key}", [f"{section}.{name}" for name in valid], "configuration"
                    )
        return cls(**{section: _SECTIONS[section](**table) for section, table in values.items()})


_SECTIONS: dict[str, type[Any]] = {
    "ram": RamConfig,
    "ssd": SsdConfig,
    "models": ModelsConfig,
    "quotas": QuotasConfig,
    "gpu": GpuConfig,
    "dragonfly": DragonflyConfig,
    "postgres": PostgresConfig,
    "qdrant": QdrantConfig,
    "store": StoreConfig,
    "observe": ObserveConfig,
}


def _codec(name: str, value: object) -> Codec:
    try:
        return Codec.of(value)
    except InputError as error:
        raise ConfigError(f"{name}: {error}") from error


def _cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "stratakv" / "store"
