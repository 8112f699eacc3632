"""The cache manager: opens the tiers, and divides them between models.

Lock order: loading from folders, the manager's table of models, then the native store.
"""

from __future__ import annotations

import math
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal

from stratakv import _native, log
from stratakv.balance import Balance
from stratakv.cache import ModelCache, Registered
from stratakv.catalog import Catalog, Source
from stratakv.config import Codec, Config, Dtype, Geometry, Quota
from stratakv.errors import (
    ClosedError,
    ConfigError,
    InputError,
    ModelExistsError,
    ModelNotFoundError,
)
from stratakv.folders import Folders
from stratakv.keeper import Keeper
from stratakv.kept import Kept
from stratakv.levels import Level
from stratakv.match import Behind
from stratakv.near import SemanticIndex
from stratakv.observe import Observed
from stratakv.observe import Source as Observable
from stratakv.observe.explain import Explained, explain
from stratakv.observe.logs import Logs
from stratakv.quotas import Admission, Usage, admit
from stratakv.registry import Discovery, discover
from stratakv.stats import Snapshot, Stats
from stratakv.status import Status, View
from stratakv.tiers.dragonfly import Dragonfly, Feeder
from stratakv.tiers.postgres import Postgres
from stratakv.tiers.qdrant import Qdrant
from stratakv.tracing import Traces, Work

if TYPE_CHECKING:
    from stratakv.events import Row

_log = log.of(__name__)

# For so long it is taken to be as it was what backs RAM.
_PAGES_S = 5.0


class CacheManager:
    """All models' caches over the tiers of one store; `stratakv.open` makes one."""

    def __init__(
        self, config: Config, *, gpu_memory: object = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """Opens the tiers.

        Args:
            config: settings.
            gpu_memory: as `stratakv.open` takes it.
            clock: seconds, by which the load of models is aged.

        Raises:
            InputError, StoreError: as there.
        """
        self.config = config
        self._logs = Logs(config.observe)
        ssd, gpu = config.ssd, config.gpu
        tier = (ssd.path, ssd.capacity_bytes, ssd.segment_bytes, ssd.policy, ssd.engine) if ssd.enabled else None
        self._store = _native.Store(
            ram_capacity_bytes=config.ram.capacity_bytes,
            eviction=config.ram.eviction,
            ssd=tier,
            secret=config.store.secret,
            threads=config.store.threads,
            index_bytes=config.store.index_bytes,
            gpu=(gpu.capacity_bytes, gpu.device, gpu.driver) if gpu.capacity_bytes or gpu_memory is not None else None,
            gpu_memory=gpu_memory,
        )
        if config.ram.prefault:
            threading.Thread(target=self._store.prefault, name="stratakv-prefault", daemon=True).start()
        self._behind = Behind()
        # The tier that nodes share, if there is one.
        self.dragonfly: Dragonfly | None = None
        self._feeder: Feeder | None = None
        # What is near, if there is a vector index.
        self.semantic: SemanticIndex | None = None
        self._postgres: Postgres | None = None
        self._keeper: Keeper | None = None
        # Threads of what is opened below ask at once.
        self._pid = os.getpid()
        self._closed = False
        self._lock = threading.Lock()
        self._models: dict[str, Registered] = {}
        self._folders = Folders(self, self._entries)
        self._clock = clock
        self._balance = Balance(config.models, self._store, config.ssd.segment_bytes)  # type: ignore[arg-type]
        try:
            self._logs.open()
            refused = self._store.snapshot(0)["ssd_engine_refused"]
            if refused is not None:
                _log.warning(
                    "io_uring_refused",
                    "io_uring is refused here (%s): the SSD tier reads and writes with a few threads",
                    refused,
                )
            self._check_gpu()
            self._kept = Kept(self._store, config)
            self._kept.check_kept()
            for tenant, quota in self.quotas("tenants").items():
                self._store.set_tenant_quota(tenant, quota.terms())
            if config.dragonfly.url is not None:
                self.dragonfly = Dragonfly(config.dragonfly)
                self._feeder = Feeder(self.dragonfly, self._store.events, self._exports)
            if config.qdrant.url is not None or config.qdrant.path is not None:
                self.semantic = SemanticIndex(
                    Qdrant(config.qdrant), config.qdrant, config.store.secret, self._lifted, self._missed
                )
            if config.postgres.url is not None:
                self._postgres = Postgres(config.postgres)
                self._keeper = Keeper(self._postgres, self._store, self._entries, self._retire, self._warm)
        except BaseException:
            if self.dragonfly is not None and self._feeder is not None:
                self._feeder.close()
                self.dragonfly.close()
            if self.semantic is not None:
                self.semantic.close()
            self._store.close()
            self._logs.close()
            raise
        # When it was asked last what backs RAM, and the answer.
        self._ram_pages: tuple[float, tuple[str, int]] = (-math.inf, ("unknown", 0))
        # What shows it; and who traces its requests.
        self._observed: Observed | None = None
        self.traces: Traces | None = None
        database = (self._postgres, self._keeper) if self._postgres is not None and self._keeper is not None else None
        self.catalog = Catalog(
            Source(
                store=self._store,
                entries=self._entries,
                entry=self._entry_of,
                near=self._near,
                leading=self._leading,
                postgres=database,
            )
        )
        self._wake = threading.Event()
        self._balancer: threading.Thread | None = None
        if config.observe.listen is not None or config.observe.otlp is not None:
            self._observe()

    def _check_gpu(self) -> None:
        absent = self._store.no_gpu
        if absent is not None and self.config.gpu.required:
            raise ConfigError(f"gpu.required is true, and there is no GPU tier: {absent}")
        if absent is not None:
            _log.warning("gpu_absent", "there is no GPU tier: %s; blocks are in RAM", absent)

    def _observe(self) -> None:
        source = Observable(
            view=self.view,
            events=self.events,
            hottest=lambda most: [prefix.row() for prefix in self.catalog.find(limit=most, fleet=False)],
            work=lambda: [Work(*each) for each in self._store.behind()],
            explain=self.explain,
        )
        try:
            self._observed = Observed(self.config, _native.__version__, source)
        except BaseException:
            self.close()
            raise
        self.traces = self._observed.traces

    def explain(self, model: str, tokens: object, adapter: str = "", tenant: str = "") -> Explained:
        """Why a prompt hits or misses, block by block; that counts as no use.

        Args:
            model: name of the model.
            tokens: as of `ModelCache.match`.
            adapter: as there.
            tenant: as there.

        Raises:
            ModelNotFoundError: no such model.
            InputError: the tokens are no token ids.
            ClosedError: the store is closed.
        """
        return explain(self._entry_of(model), self.dragonfly, tokens, adapter, tenant)

    @property
    def address(self) -> str | None:
        """Where it answers over HTTP, as ``http://127.0.0.1:9470``; ``None``: nowhere, or another process does."""
        return self._observed.address if self._observed is not None else None

    def register(
        self,
        name: str,
        geometry: Geometry,
        *,
        weights_version: str = "",
        priority: int = 5,
        weights_bytes: int = 0,
        ram_codec: Codec | str | Mapping[str, Any] | None = None,
        cold_codec: Codec | str | Mapping[str, Any] | None = None,
    ) -> ModelCache:
        """Registers a model, and finds again what the SSD holds of it. The same again returns the same cache.

        Args:
            name: name of the model.
            geometry: shape of its blocks.
            weights_version: names its weights; nothing is shared between versions.
            priority: 1 to 10, what the strategy ``priority`` divides the tiers by.
            weights_bytes: size of its weights, for ``proportional`` by that.
            ram_codec: as `ModelCache.set_ram_codec`; ``None``: that of the configuration.
            cold_codec: as `ModelCache.set_cold_codec`; ``None``: that of the configuration.

        Raises:
            InputError: a geometry, name or priority that makes no sense, or a codec that does not fit. A codec that
                waits for a calibration leaves the model registered, so that it can be calibrated.
            ModelExistsError: the name is registered with another geometry, version, priority or size.
            ConfigError: a tier is smaller than one block.
            StoreFormatError: the model's file is of another format version.
        """
        if not isinstance(geometry, Geometry):
            raise InputError(f"geometry is {geometry!r}, expected a stratakv.Geometry")
        if "\0" in f"{name}{weights_version}":
            raise InputError(f"model {name!r}, version {weights_version!r}: expected text without NUL")
        if not isinstance(priority, int) or isinstance(priority, bool) or not 1 <= priority <= 10:
            raise InputError(f"priority is {priority!r}, expected an integer from 1 to 10")
        if not isinstance(weights_bytes, int) or isinstance(weights_bytes, bool) or weights_bytes < 0:
            raise InputError(f"weights_bytes is {weights_bytes!r}, expected an integer from 0")
        terms = (weights_version, priority, weights_bytes)
        codecs = [Codec.of(codec) if codec is not None else None for codec in (ram_codec, cold_codec)]
        with self._table():
            if name in self._models:
                known = self._models[name]
                if (known.geometry, (known.weights_version, known.priority, known.weights_bytes)) == (geometry, terms):
                    known.cache.set_codecs(*codecs)
                    return known.cache
                was = f"{known.geometry}, weights_version={known.weights_version!r}, priority={known.priority}"
                raise ModelExistsError(f"model {name!r} is registered already as {was}; unregister it first")
            g = geometry
            shape = (g.layers, g.planes, g.kv_heads, g.head_dim, g.dtype, g.block_tokens)
            ram, cold = codecs[0] or Codec.of(self.config.ram.codec), codecs[1] or Codec.of(self.config.ssd.codec)
            quota = self.quotas("models").get(name, Quota())
            model = self._store.register(name, weights_version, shape, [ram.terms(), cold.terms()], quota.terms())
            cache = ModelCache(self, self._behind, name, geometry, model)
            self._models[name] = Registered(
                cache=cache,
                model=model,
                weights_version=weights_version,
                priority=priority,
                weights_bytes=weights_bytes,
                quota=quota,
            )
            self._rebalance()
            if len(self._models) == 2 and self._balancer is None:
                self._balancer = threading.Thread(target=self._keep_balance, name="stratakv-balance", daemon=True)
                self._balancer.start()
            cache.set_codecs(ram, cold)
            if model.fingerprint in self._kept.retired and self._postgres is not None:
                cache.retired = True
                model.retire(True)
            return cache

    def unregister(self, name: str) -> None:
        """Frees everything of a model, on every tier. Its matches stay safe and load nothing more.

        Raises:
            ModelNotFoundError: no such model.
            StoreError: its file cannot be removed, and is in the way of a model that is registered as this one was.
        """
        with self._table():
            model = self._entry(name).model
            # Whatever becomes of its file, its blocks are forgotten.
            del self._models[name]
            try:
                model.unregister()
            finally:
                self._rebalance()

    def load_models(
        self, folder: str | os.PathLike[str], *, block_tokens: int = 16, dtype: Dtype | None = None
    ) -> Discovery:
        """Registers the models of a folder; called again, follows what has changed there since.

        A model whose weights changed is registered anew, and nothing of the old ones is served again; one whose files
        are gone is unregistered. One that cannot be read at the moment stays as it is.

        Args:
            folder: as of `discover`.
            block_tokens: tokens of a block, of all models.
            dtype: as of `discover`.

        Returns:
            What is registered now of the folder, by the names of `CacheManager.register`, and what is not, and why.

        Raises:
            InputError: there is no such folder.
            ClosedError: the store is closed.
        """
        return self._folders.follow(str(folder), lambda: discover(folder, block_tokens=block_tokens, dtype=dtype))

    @contextmanager
    def _table(self) -> Iterator[None]:
        """The table of models, held. A thread that a fork left behind may have it for ever."""
        if self._pid != os.getpid():
            raise ClosedError("the store was opened before a fork; open one in this process")
        with self._lock:
            yield

    def rebalance(self) -> None:
        """Divides the tiers anew by what models were asked for up to now; behind the calls that is done all the time.

        Raises:
            ClosedError: the store is closed.
        """
        with self._table():
            self._rebalance()

    def set_models(self, **changes: Any) -> None:  # noqa: ANN401 - the fields of `ModelsConfig`
        """Changes how the tiers are divided, from now on, while models serve. It is not kept over a restart.

        Args:
            changes: fields of `ModelsConfig`, as ``strategy="fair"``.

        Raises:
            ConfigError: a value that makes no sense.
            ClosedError: the store is closed.
        """
        with self._table():
            try:
                self._balance.config = replace(self._balance.config, **changes)
            except TypeError as error:
                raise ConfigError(f"models: {error}") from None
            self._rebalance()
        self._wake.set()

    def set_quota(
        self,
        quota: Quota | Mapping[str, Any] | None,
        *,
        model: str | None = None,
        tenant: str | None = None,
    ) -> None:
        """Sets what a model, or a tenant over all models, may have, from now on, while it serves.

        What it has beyond leaves behind this call, once it is on SSD where there is one; until then nothing is added.
        With an SSD tier the change is kept: the next process that opens the directory begins with it, whatever its
        configuration says.

        Args:
            quota: a `Quota`, or a table of its fields; ``None`` takes it away.
            model: name of the model; of one that is not registered, if it has a quota already.
            tenant: name of the tenant.

        Raises:
            InputError: not just one of model and tenant, a quota that makes no sense, a hard limit below one block (of
                SSD below one segment), or more reserved than there is.
            ModelNotFoundError: no such model.
            StoreError: it holds, but cannot be kept.
            ClosedError: the store is closed.
        """
        if (model is None) == (tenant is None):
            raise InputError(f"model is {model!r} and tenant is {tenant!r}, expected just one of them")
        new = Quota() if quota is None else Quota.of(quota)
        with self._table():
            if model is not None:
                if model not in self._models and model not in self.quotas("models"):
                    self._entry(model)
                self._kept.check({"models": {model: new}}, self._models)
                if model in self._models:
                    self._models[model].model.set_quota(new.terms())
                    self._models[model] = replace(self._models[model], quota=new)
            elif tenant is not None:
                if not isinstance(tenant, str):
                    raise InputError(f"tenant is {tenant!r}, expected text")
                self._kept.check({"tenants": {tenant: new}}, self._models)
                self._store.set_tenant_quota(tenant, new.terms())
            kind, name = ("tenants", tenant) if model is None else ("models", model)
            self._kept.set[kind][str(name)] = None if quota is None else new
            try:
                self._kept.keep()
            finally:
                self._rebalance()

    def quotas(self, kind: Literal["models", "tenants"]) -> dict[str, Quota]:
        """The quotas that hold, by name; those of models that are not registered as well."""
        return self._kept.quotas(kind)

    def events(self, since: int | None) -> tuple[bool, list[Row], int]:
        """Which blocks the tiers got and lost since an earlier look; `stratakv.events.Publisher` publishes them.

        Args:
            since: where to go on, as the call before this one told; ``None``, or too long ago: with all that is there.

        Returns:
            Whether what follows is all that is there, and what was known before counts no more; the events, ``(model,
            block, block before it, tier, whether it was stored)``; and where to go on. Blocks are named by 16 bytes,
            which a `stratakv.router.Router` that has the store's secret finds again from tokens.

        Raises:
            ClosedError: the store is closed.
        """
        return self._store.events(since)

    def admission(self, model: str, tokens: int, tenant: str = "") -> Admission:
        """As `ModelCache.admission`."""
        with self._table():
            entry = self._entry(model)
            snapshot = self._store.snapshot(0, tenant)
            quotas = self.quotas("tenants")
        block_bytes = entry.model.record_bytes
        accounts = {f"model {model!r}": (entry.quota, Usage.of(snapshot["model_usage"][model]))}
        if tenant in quotas:
            used = snapshot["tenant_usage"].get(tenant)
            accounts[f"tenant {tenant!r}"] = (quotas[tenant], Usage.of(used) if used else Usage())
        return admit(tokens, entry.geometry.block_tokens, block_bytes, accounts)

    def _exports(self) -> dict[str, _native.Model]:
        return {name: entry.model for name, entry in self._entries().items()}

    def _entries(self) -> dict[str, Registered]:
        with self._table():
            return dict(self._models)

    def _entry_of(self, name: str) -> Registered:
        with self._table():
            return self._entry(name)

    def _retire(self, fingerprints: set[bytes]) -> None:
        """Follows which versions are retired, and remembers it: the database may be away at the next opening."""
        if fingerprints != self._kept.retired:
            self._kept.retired = set(fingerprints)
            with self._table():
                self._kept.keep()
        for name, entry in self._entries().items():
            retired = entry.model.fingerprint in fingerprints
            if retired == entry.cache.retired:
                continue
            entry.cache.retired = retired
            told = name, entry.weights_version, entry.model.retire(retired)
            if not retired:
                _log.warning("version_restored", "model %r: version %r is restored", *told[:2], key=name, model=name)
                continue
            _log.warning(
                "version_retired", "model %r: version %r is retired, %d blocks forgotten", *told, key=name, model=name
            )
            if self.dragonfly is not None:
                self.dragonfly.forget(entry.model.fingerprint)
            if self.semantic is not None:
                self.semantic.tier.forget(entry.model.fingerprint)

    def _warm(self, name: str, prefixes: list[tuple[str | None, str | None, list[bytes]]]) -> int:
        """Brings prefixes of a model to RAM; how many bytes came."""
        cache = self._entry_of(name).cache
        most = min(int(self.config.postgres.warm_start_bytes), int(self.config.ram.capacity_bytes) // 2)
        came = 0
        for adapter, tenant, names in prefixes:
            if came >= most or self._closed:
                break
            came += cache.lift(names, adapter, tenant, "warm", most - came)
        _log.info("warmed_up", "model %r: warmed up with %d bytes", name, came, key=name, model=name, bytes=came)
        return came

    def _near(self, model: str, adapter: str, tenant: str, asked: object, limit: int) -> list[tuple[bytes, float]]:
        if self.semantic is None:
            raise InputError("there is no vector index: set qdrant.url or qdrant.path")
        found, _ = self.semantic.near(self._entry_of(model).cache, asked, adapter, tenant, limit)
        return [(near.name, near.score) for near in found]

    def _lifted(self) -> tuple[int, int]:
        return self._store.lifted("near")

    def _missed(self) -> list[tuple[ModelCache, str, str, bytes]]:
        caches = {name: entry.cache for name, entry in self._entries().items()}
        missed = self._store.missed()
        return [(caches[model], adapter, tenant, ids) for model, adapter, tenant, ids in missed if model in caches]

    def _leading(self, space: bytes, names: list[bytes]) -> int | None:
        if self.dragonfly is None:
            return None
        found, reason = self.dragonfly.leading(space, names)
        return found if reason is None or found else None

    def _rebalance(self) -> None:
        def work() -> int:
            self._balance.rebalance(self._models, self._clock())
            return len(self._models)

        if self.traces is None:
            work()
        else:
            self.traces.behind("rebalance", None, work)

    def _keep_balance(self) -> None:
        while not self._closed:
            if self._wake.wait(self._balance.config.interval_s or None):
                # Closed, or the interval is another.
                self._wake.clear()
                continue
            try:
                self.rebalance()
            except ClosedError:
                return
            except Exception:
                # The division stays as it is; serving goes on.
                _log.exception("division_failed", "the tiers could not be divided anew")

    def __getitem__(self, name: str) -> ModelCache:
        """The cache of a registered model.

        Raises:
            ModelNotFoundError: no such model.
        """
        with self._table():
            return self._entry(name).cache

    def __iter__(self) -> Iterator[str]:
        """Names of the registered models."""
        with self._table():
            return iter(list(self._models))

    def __contains__(self, name: object) -> bool:
        """Whether a model of that name is registered."""
        return name in self._models

    def __len__(self) -> int:
        """How many models are registered."""
        return len(self._models)

    def _entry(self, name: str) -> Registered:
        if name not in self._models:
            known = ", ".join(sorted(self._models)) or "none"
            raise ModelNotFoundError(f"model {name!r} is not registered; registered: {known}")
        return self._models[name]

    def stats(self) -> Stats:
        """Counters of all models together, the unregistered ones included."""
        return Stats.of(self._store.snapshot(0)["total"])

    def snapshot(self) -> Snapshot:
        """Counters of all, of each model and of each tenant, at one instant."""
        return Snapshot.of(self._store.snapshot())

    def model_stats(self, name: str) -> Stats:
        """Counters of one model.

        Raises:
            ModelNotFoundError: no such model.
        """
        models = self._store.snapshot(0)["models"]
        if name not in models:
            raise ModelNotFoundError(f"model {name!r} is not registered")
        return Stats.of(models[name])

    def tenant_stats(self, name: str) -> Stats:
        """Counters of one tenant, over all models; ``""``: of no tenant.

        Raises:
            InputError: it has not been seen since the store was opened.
        """
        tenants = self._store.snapshot(0, name)["tenants"]
        if name not in tenants:
            raise InputError(f"tenant {name!r} has not been seen since the store was opened")
        return Stats.of(tenants[name])

    def status(self) -> Status:
        """How the tiers run."""
        self._ram_pages = (-math.inf, self._ram_pages[1])
        return self.view(None).status

    def view(self, tenants: int | None = 100) -> View:
        """Counters and status of one instant, as metrics and the page show them.

        Args:
            tenants: how many are told apart, those that were seen first; ``None``: all.

        Raises:
            ClosedError: the store is closed.
        """
        with self._table():
            if self._closed:
                raise ClosedError("the store is closed; open it again")
            snapshot = self._store.snapshot(tenants)
            # Asking the kernel takes longer than all the rest.
            if self._clock() - self._ram_pages[0] >= _PAGES_S:
                self._ram_pages = (self._clock(), self._store.ram_pages())
            pages, huge = self._ram_pages[1]
            shares = {f"{tier}_shares": dict(shares) for tier, shares in self._balance.shares.items()}
        shared, catalog, near = self.dragonfly, self._postgres, self.semantic
        behind = {"dragonfly": self._feeder, "postgres": self._keeper}
        return View.of(
            snapshot,
            **shares,
            dragonfly=None if shared is None else shared.stats(),
            postgres=None if catalog is None else catalog.stats(),
            qdrant=None if near is None else near.tier.stats(),
            semantic_prefetch=None if near is None else near.stats(),
            waiting={name: queue.stats().waiting for name, queue in behind.items() if queue is not None},
            gpu_absent=self._store.no_gpu,
            ram_pages=pages,
            ram_huge_bytes=huge,
        )

    def set_log_level(self, component: str, level: Level | None) -> None:
        """Sets from which level on a part of the package writes to the log, from now on; in the whole process.

        Args:
            component: as in `ObserveConfig.log_levels`: ``"tiers.dragonfly"``; ``""``: all.
            level: ``debug``, ``info``, ``warning`` or ``error``; ``None``: as what it is a part of.

        Raises:
            ConfigError: there is no such component, or no such level.
            ClosedError: the store is closed.
        """
        self._logs.set_level(component, level)

    def flush(self) -> None:
        """Waits until every block put so far was written to SSD, and is durable.

        Where the SSD's cap is below the size of RAM, the coldest of them have made room again.

        Raises:
            StoreError: the SSD takes no writes, or not all of them.
        """
        self._store.flush()
        if self._feeder is not None:
            self._feeder.flush()
        if self._keeper is not None:
            self._keeper.flush()
        if self.semantic is not None:
            self.semantic.flush()

    def close(self) -> None:
        """Writes what is not on SSD yet, and gives the directory free; again does nothing.

        Raises:
            StoreError: not everything could be written; the store is closed all the same.
        """
        self._closed = True
        if self._pid != os.getpid():
            # Threads that a fork left behind may have any lock for ever; all of it is the parent's.
            return
        if self._observed is not None:
            self._observed.close()
            self._observed = None
        self._wake.set()
        if self._balancer is not None:
            self._balancer.join()
            self._balancer = None
        self._behind.close()
        if self._keeper is not None:
            self._keeper.close()
            self._keeper = None
        if self.semantic is not None:
            self.semantic.close()
            self.semantic = None
        if self.dragonfly is not None and self._feeder is not None:
            self._feeder.close()
            self.dragonfly.close()
            self._feeder = None
        try:
            self._store.close()
        finally:
            self._logs.close()

    def __enter__(self) -> CacheManager:
        """The manager itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Closes the store."""
        self.close()


def open(config: Config | str | os.PathLike[str] | None = None, *, gpu_memory: object = None) -> CacheManager:
    """Opens a store.

    Args:
        config: settings, or the path of a TOML file; the environment is applied to a file and to ``None``.
        gpu_memory: a contiguous torch or CuPy tensor on ``gpu.device``, of any type and shape, that is the GPU tier's
            memory in place of ``gpu.capacity_bytes``. It is the store's until that is closed, and kept as long.

    Raises:
        ConfigError: a setting makes no sense.
        InputError: the tensor cannot be the GPU tier's memory.
        StoreError: the SSD directory is locked, not writable, or of another format or secret.
    """
    return CacheManager(config if isinstance(config, Config) else Config.load(config), gpu_memory=gpu_memory)
