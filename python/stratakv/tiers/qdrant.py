"""Which stored prefixes are near a prompt: one point in Qdrant for each, for prefetch and routing.

    put ─ ─(behind)─ ─▶ embedded ─▶ store: points in batches
    prompt ─▶ embedded ─▶ suggest: the nearest points of its model and space ─▶ the chains of their blocks

Keys and values of near tokens are other keys and values: nothing here is ever served as a hit. A point carries the
names of its blocks, which are of no use without the store's secret, and no tokens. What comes from here is hostile
until it has been checked. No call takes longer than its deadline, and none raises.
"""

from __future__ import annotations

import base64
import functools
import math
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from stratakv import log
from stratakv.errors import ConfigError, StoreError
from stratakv.guard import Deadline, Guard, GuardStats
from stratakv.sections import QdrantConfig

if TYPE_CHECKING:
    import ssl

_log = log.of(__name__)

# Points that are sent at once: few enough to be far from a deadline.
_BATCH_POINTS = 64
# Blocks of a point's chain.
_CHAIN_BLOCKS = 1024
_NAME_BYTES = 16
# Decimals of an element: a score changes by about 0.0001, and a request is less than half as long.
_DECIMALS = 4
# Candidates that a search keeps: half as many as by default take half the time; what that misses, the bench tells.
_CANDIDATES = 48
# Calls under way at once.
_CALLS = 8
# Seconds that a server that is required has to make its collection.
_OPEN_S = 5.0
# Seconds after which a thread gives up on a connection that is silent, at least; callers are gone by then.
_SILENCE_S = 2.0

_T = TypeVar("_T")

_COUNTS = ("asked", "near_points", "malformed_points", "written_points", "unfit_points")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Point:
    """A stored prefix.

    Attributes:
        name: of its last block, 16 bytes, which names all of it.
        model: fingerprint of its model, 16 bytes.
        space: what it may be shared within, 16 bytes: the model's namespace of adapter and tenant.
        vector: of its tokens [dimension], of length 1.
        chain: names of its blocks, from the first; the first 1,024 are kept.
        tokens: how many it has.
        stored_at: when it was stored, in seconds since the epoch.
    """

    name: bytes
    model: bytes
    space: bytes
    vector: NDArray[np.float32]
    chain: tuple[bytes, ...]
    tokens: int
    stored_at: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Near:
    """A stored prefix that is near a prompt.

    Attributes:
        name: as `Point.name`.
        chain: names of its first blocks, which may be cached, or not any more.
        tokens: how many it has.
        score: cosine of the angle to the prompt.
    """

    name: bytes
    chain: tuple[bytes, ...]
    tokens: int
    score: float


@dataclass(frozen=True, slots=True, kw_only=True)
class QdrantStats:
    """What was asked of the tier.

    Attributes:
        asked: prompts for which it was asked what is near.
        near_points: points that it gave.
        malformed_points: points that it gave, and that were not what was asked for.
        written_points: points that it took.
        unfit_points: points that were not sent, since their vectors do not fit.
        misfit: why its collection cannot be used; ``None``: it can, as far as is known.
        guard: of its calls.
    """

    asked: int
    near_points: int
    malformed_points: int
    written_points: int
    unfit_points: int
    misfit: str | None
    guard: GuardStats


class Qdrant:
    """Keeps and finds points. Any thread may use it."""

    def __init__(self, config: QdrantConfig, *, clock: Callable[[], float] = time.monotonic) -> None:
        """Opens the collection, or makes it; where that fails, it is tried again by the calls that follow.

        Args:
            config: where, and for how long.
            clock: seconds, for the breaker.

        Raises:
            ConfigError: the library is not installed, the certificates cannot be read, or the collection is required
                and has another dimension.
            StoreError: the server is required, and does not answer.
        """
        self.config = config
        _library()
        self._verify = _authorities(config)
        self._connected: Any = None
        # Whether the collection was there at the last call, as it has to be; and why it can never be used.
        self._ready = False
        self._misfit: str | None = None
        self._guard = Guard("qdrant", deadline_s=config.deadline_s, clock=clock)
        # The library takes one thread at a time in a folder.
        self._calls = ThreadPoolExecutor(_CALLS if config.path is None else 1, thread_name_prefix="stratakv-qdrant")
        self._lock = threading.Lock()
        self._counts = dict.fromkeys(_COUNTS, 0)
        if config.api_key is not None and (config.url or "").startswith("http:"):
            _log.warning(
                "qdrant_unencrypted",
                "qdrant.api_key is sent to a http:// address, where others can read it: use https://",
            )
        _, reason = self._ask(lambda client: True, _OPEN_S if config.required else None)
        if reason is not None:
            kind = self._guard.stats().last_error
            if config.required:
                self.close()
                if self._misfit is not None:
                    raise ConfigError(self._misfit)
                raise StoreError(f"qdrant does not answer ({kind}); start the server, or do not require it")
            if self._misfit is None:
                _log.warning(
                    "qdrant_absent",
                    "qdrant does not answer (%s): the store runs without it until it does",
                    kind,
                    error=kind,
                )

    def store(self, points: Sequence[Point]) -> bool:
        """Sends some points; one that is there already is replaced.

        Returns:
            Whether the server took them all. Where it did not, they can be sent again.
        """
        fit = [point for point in points if self._fits(point.vector)]
        self._count(unfit_points=len(points) - len(fit))
        for n in range(0, len(fit), _BATCH_POINTS):
            some = fit[n : n + _BATCH_POINTS]
            if self._ask(functools.partial(self._upsert, some))[1] is not None:
                return False
            self._count(written_points=len(some))
        return True

    def suggest(
        self, model: bytes, space: bytes, vector: NDArray[np.float32], *, limit: int = 3, least_score: float = 0.5
    ) -> tuple[list[Near], str | None]:
        """The stored prefixes of a model and space that are nearest, and why that is not known, if so.

        Args:
            model: as `Point.model`.
            space: as `Point.space`; nothing of another comes back.
            vector: of the prompt [dimension], of length 1.
            limit: so many at most.
            least_score: so near at least.

        Returns:
            Them, nearest first; and ``error``, ``timeout`` or ``open``, as the guard has it, or ``misfit``: the
            collection cannot be used.
        """
        self._count(asked=1)
        if not self._fits(vector):
            return [], "error"
        wide = None
        # In a folder all points are compared.
        if self.config.path is None:
            wide = _library().models.SearchParams(hnsw_ef=max(_CANDIDATES, limit))
        found, reason = self._ask(
            lambda client: client.query_points(
                self.config.collection,
                query=_numbers(vector),
                query_filter=_filter(model=model, space=space),
                search_params=wide,
                limit=limit,
                score_threshold=least_score,
                with_payload=["model", "space", "chain", "tokens"],
            ).points[:limit]
        )
        points = found or []
        near = [each for point in points if (each := _near(point, model, space, least_score)) is not None]
        self._count(near_points=len(points), malformed_points=len(points) - len(near))
        return near, reason

    def forget(self, model: bytes) -> bool:
        """Has all points of a model removed; whether the server took that. What comes meanwhile may stay."""
        return self._delete(model=model)

    def forget_before(self, model: bytes | None, stored_at: float) -> bool:
        """The same of those stored before a time, in seconds since the epoch, of a model or of all."""
        return self._delete(model=model, before=stored_at)

    def count(self) -> int | None:
        """How many points there are; ``None``: there was no answer."""
        counted, _ = self._ask(lambda client: client.count(self.config.collection, exact=True).count)
        return counted

    def stats(self) -> QdrantStats:
        """What was asked of it."""
        with self._lock:
            return QdrantStats(**self._counts, misfit=self._misfit, guard=self._guard.stats())

    def close(self) -> None:
        """Disconnects; calls that are under way fail."""
        self._calls.shutdown(wait=self.config.path is not None, cancel_futures=True)
        if self._connected is not None:
            self._connected.close()

    def _upsert(self, points: list[Point], client: Any) -> None:  # noqa: ANN401 - of the library
        batch = _library().models.Batch(
            ids=[str(uuid.UUID(bytes=point.name)) for point in points],
            vectors=[_numbers(point.vector) for point in points],
            payloads=[_payload(point) for point in points],
        )
        # It answers when the points are in its log; nobody reads what he just wrote.
        client.upsert(self.config.collection, batch, wait=False)

    def _delete(self, **which: Any) -> bool:  # noqa: ANN401 - see `_filter`
        selector = _library().models.FilterSelector(filter=_filter(**which))
        return self._ask(lambda client: client.delete(self.config.collection, selector, wait=False))[1] is None

    def _ask(self, call: Callable[[Any], _T], seconds: float | None = None) -> tuple[_T | None, str | None]:
        """Makes a call in a thread of its own: the library's timeouts are whole seconds, for each piece of a reply."""

        def within(deadline: Deadline) -> _T:
            future = self._calls.submit(self._made, call)
            try:
                return future.result(deadline.left_s() if seconds is None else seconds)
            except TimeoutError:
                if not future.cancel():
                    self._disconnect()
                raise

        if self._misfit is not None:
            return None, "misfit"
        result, reason = self._guard.call(within)
        return result, reason if self._misfit is None else "misfit"

    def _made(self, call: Callable[[Any], _T]) -> _T:
        try:
            client = self._client()
            if not self._ready:
                self._prepare(client)
            return call(client)
        except Exception as error:
            # The server may have lost all it had.
            self._ready = False
            if getattr(error, "status_code", None) in (401, 403):
                raise PermissionError from error
            # What is behind says more.
            source = getattr(error, "source", None)
            if isinstance(source, Exception):
                raise source from error
            raise

    def _prepare(self, client: Any) -> None:  # noqa: ANN401 - of the library
        """Makes the collection, and the indexes of what is filtered by, where they are not there."""
        models, name, dimension = _library().models, self.config.collection, self.config.dimension
        cosine = models.Distance.COSINE
        if not client.collection_exists(name):
            client.create_collection(name, models.VectorParams(size=dimension, distance=cosine))
        described = client.get_collection(name)
        vectors = described.config.params.vectors
        # Vectors with names have neither.
        size, distance = getattr(vectors, "size", None), getattr(vectors, "distance", None)
        if (size, distance) != (dimension, cosine):
            self._misfit = (
                f"collection {name!r} of qdrant holds vectors of dimension {size}, compared by "
                f"{getattr(distance, 'value', None)}, expected dimension {dimension}, compared by Cosine: set "
                "qdrant.dimension to what it has, name another in qdrant.collection, or delete it"
            )
            _log.warning("qdrant_misfit", "%s; the store runs without it", self._misfit)
            raise ConfigError(self._misfit)
        if self.config.path is None:
            for field in {"model", "space"} - set(described.payload_schema):
                client.create_payload_index(name, field, models.PayloadSchemaType.KEYWORD, wait=False)
        self._ready = True

    def _client(self) -> Any:  # noqa: ANN401 - of the library
        with self._lock:
            if self._connected is None:
                self._connected = _connect(self.config, self._verify)
            return self._connected

    def _disconnect(self) -> None:
        """Ends what is under way: nobody waits for it any more. In a folder it goes on, and others wait for it."""
        if self.config.path is None:
            with self._lock:
                client, self._connected = self._connected, None
            if client is not None:
                client.close()

    def _fits(self, vector: NDArray[np.float32]) -> bool:
        return vector.shape == (self.config.dimension,) and bool(np.isfinite(vector).all())

    def _count(self, **more: int) -> None:
        with self._lock:
            for name, number in more.items():
                self._counts[name] += number


def _library() -> Any:  # noqa: ANN401 - a module
    try:
        import qdrant_client
    except ImportError as error:
        raise ConfigError("qdrant.url needs a library: pip install 'stratakv[qdrant]'") from error
    return qdrant_client


def _authorities(config: QdrantConfig) -> ssl.SSLContext:
    import ssl

    try:
        return ssl.create_default_context(cafile=config.ca_file)
    except OSError as error:
        raise ConfigError(f"qdrant.ca_file is {str(config.ca_file)!r}, and cannot be used: {error.strerror}") from error


def _connect(config: QdrantConfig, verify: ssl.SSLContext) -> Any:  # noqa: ANN401 - of the library
    import httpx

    client = _library().QdrantClient
    if config.path is not None:
        if str(config.path) == ":memory:":
            return client(":memory:")
        return client(path=str(config.path), force_disable_check_same_thread=True)
    return client(
        url=config.url,
        # By its own argument the library warns once more, by other means.
        headers={} if config.api_key is None else {"api-key": config.api_key},
        timeout=math.ceil(max(config.deadline_s, _SILENCE_S)),
        # To this host it would connect anew for each call.
        limits=httpx.Limits(max_connections=_CALLS, max_keepalive_connections=_CALLS),
        verify=verify,
        check_compatibility=False,
    )


def _filter(*, model: bytes | None = None, space: bytes | None = None, before: float | None = None) -> Any:  # noqa: ANN401
    """What a point has to be: of the library."""
    models = _library().models
    must = [
        models.FieldCondition(key=key, match=models.MatchValue(value=value.hex()))
        for key, value in (("model", model), ("space", space))
        if value is not None
    ]
    if before is not None:
        must.append(models.FieldCondition(key="stored_at", range=models.Range(lt=before)))
    return models.Filter(must=must)


def _numbers(vector: NDArray[np.float32]) -> list[float]:
    numbers: list[float] = vector.astype(np.float64).round(_DECIMALS).tolist()
    return numbers


def _payload(point: Point) -> dict[str, Any]:
    return {
        "model": point.model.hex(),
        "space": point.space.hex(),
        "chain": base64.b64encode(b"".join(point.chain[:_CHAIN_BLOCKS])).decode(),
        "tokens": point.tokens,
        "stored_at": point.stored_at,
    }


def _near(point: Any, model: bytes, space: bytes, least_score: float) -> Near | None:  # noqa: ANN401 - of the library
    """What a point says, if it is one that was asked for."""
    payload = point.payload or {}
    chain, tokens = payload.get("chain"), payload.get("tokens")
    if (payload.get("model"), payload.get("space")) != (model.hex(), space.hex()):
        return None
    if (
        not isinstance(chain, str)
        or type(tokens) is not int
        or not 0 < tokens < 2**31
        or not point.score >= least_score
    ):
        return None
    try:
        name, names = uuid.UUID(str(point.id)).bytes, base64.b64decode(chain, validate=True)
    except ValueError:
        return None
    blocks, rest = divmod(len(names), _NAME_BYTES)
    if rest or not 0 < blocks <= _CHAIN_BLOCKS:
        return None
    parts = tuple(names[n : n + _NAME_BYTES] for n in range(0, len(names), _NAME_BYTES))
    return Near(name=name, chain=parts, tokens=tokens, score=float(point.score))
