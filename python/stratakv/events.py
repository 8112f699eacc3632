"""KV events: which blocks a cache got and lost, as vLLM and SGLang publish them, and as this package does.

    publisher   PUB     topic | sequence, 8 bytes big-endian | [time, [event, ...], rank] in msgpack
                ROUTER  a sequence ─▶ what followed it, then an end mark
    subscriber  a gap in the sequence ─▶ asks for what followed ─▶ not to be had: all that was known is forgotten

An event is a map with its type and fields, or, from older engines, an array of them. Needs the extra ``events``.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Literal, Protocol

from stratakv import log
from stratakv.errors import ClosedError, InputError, StrataKVError

_log = log.of(__name__)

# An engine's name of a block.
Name = int | bytes
Place = Literal["gpu", "ram", "ssd", "remote"]
PLACES: tuple[Place, ...] = ("gpu", "ram", "ssd", "remote")

_MEDIA: dict[str | None, Place] = {
    None: "gpu",
    "GPU": "gpu",
    "CPU": "ram",
    "CPU_PINNED": "ram",
    "STORAGE": "ssd",
    "DISK": "ssd",
    "EXTERNAL": "remote",
}
_TIER_MEDIA = {"gpu": "GPU", "ram": "CPU", "ssd": "STORAGE"}
_STORED = (
    *("block_hashes", "parent_block_hash", "token_ids", "block_size", "lora_id", "medium", "lora_name"),
    *("extra_keys", "group_idx", "kv_cache_spec_kind", "kv_cache_spec_sliding_window"),
)
_REMOVED = ("block_hashes", "medium", "group_idx")
# Seconds without an event after which a publisher is asked whether there were some.
_ASK_S = 1.0
_END = (-1).to_bytes(8, "big", signed=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class Stored:
    """A place got blocks that follow one another.

    Attributes:
        names: what the engine calls them.
        parent: the block before the first; ``None``: it begins a sequence.
        tokens: their token ids; none where the names say all.
        block_tokens: tokens of a block; 0 where the names say all.
        place: where they are.
        adapter: name of the LoRA adapter.
        tenant: the salt of a sequence that begins here.
    """

    names: tuple[Name, ...]
    parent: Name | None
    tokens: tuple[int, ...]
    block_tokens: int
    place: Place
    adapter: str = ""
    tenant: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Removed:
    """A place lost blocks."""

    names: tuple[Name, ...]
    place: Place


@dataclass(frozen=True, slots=True)
class Cleared:
    """All places lost all blocks."""


Event = Stored | Removed | Cleared


# Of a tier: the model, the block, the block before it, the tier, and whether it was stored.
Row = tuple[str, bytes, bytes | None, str, bool]


class Source(Protocol):
    """Who can tell what came and went; a `CacheManager` does."""

    def events(self, since: int | None) -> tuple[bool, list[Row], int]:
        """As `CacheManager.events`."""


def _libraries() -> tuple[Any, Any]:
    try:
        import msgspec
        import zmq
    except ImportError as error:
        raise StrataKVError("KV events need two libraries: pip install 'stratakv[events]'") from error
    return zmq, msgspec


def decode(payload: bytes) -> list[Event]:
    """Reads a batch.

    What has no place in an index of prefixes of tokens is left out: blocks with images or embeddings in them, and those
    of layers that do not see the whole prefix.

    Raises:
        InputError: it is no batch of events.
    """
    _, msgspec = _libraries()
    try:
        batch = msgspec.msgpack.decode(payload)
        return [event for raw in batch[1] for event in _event(raw)]
    except (msgspec.DecodeError, TypeError, ValueError, LookupError, AttributeError) as error:
        raise InputError(f"not a batch of KV events: {error}") from error


def _event(raw: Any) -> Iterator[Event]:  # noqa: ANN401 - whatever came
    if isinstance(raw, dict):
        kind, fields = raw["type"], raw
    else:
        kind = raw[0]
        fields = dict(zip(_STORED if kind == "BlockStored" else _REMOVED, raw[1:], strict=False))
    if kind == "AllBlocksCleared":
        yield Cleared()
        return
    if kind not in ("BlockStored", "BlockRemoved"):
        # A newer engine tells more than is needed here.
        return
    spec = fields.get("kv_cache_spec_kind") or ""
    if fields.get("group_idx") not in (None, 0) or "sliding" in spec or "mamba" in spec:
        return
    names = tuple(_name(name) for name in fields["block_hashes"])
    place = _MEDIA.get(fields.get("medium"), "remote")
    if kind == "BlockRemoved":
        yield Removed(names=names, place=place)
        return
    size, parent = fields["block_size"], fields.get("parent_block_hash")
    tokens = tuple(fields["token_ids"])
    if tokens and len(tokens) != size * len(names):
        raise ValueError(f"{len(tokens)} tokens, expected {size} for each of {len(names)} blocks")
    adapter = fields.get("lora_name") or ""
    whole, tenant = _plain(fields.get("extra_keys"), adapter, len(names))
    if whole:
        yield Stored(
            names=names[:whole],
            parent=None if parent is None else _name(parent),
            tokens=tokens[: size * whole],
            block_tokens=size,
            place=place,
            adapter=adapter,
            tenant=fields.get("cache_salt") or tenant,
        )


def _name(name: object) -> Name:
    if isinstance(name, bytes) or (isinstance(name, int) and not isinstance(name, bool)):
        return name
    raise ValueError(f"a block called {name!r}, expected an integer or bytes")


def _plain(extra: Sequence[Sequence[Any] | None] | None, adapter: str, blocks: int) -> tuple[int, str]:
    """How many leading blocks are named by tokens, adapter and salt alone; and that salt."""
    salt = ""
    for n, keys in enumerate(extra or ()):
        others = [key for key in keys or () if key != adapter or not adapter]
        if n == 0 and len(others) == 1 and isinstance(others[0], str):
            salt = others[0]
        elif others:
            return n, salt
    return blocks, salt


class Subscriber:
    """Receives what one publisher sends, in order and without gaps."""

    def __init__(self, endpoint: str, replay: str | None = None, *, topic: str = "", timeout_s: float = 2.0) -> None:
        """Connects; nothing is received before `poll`.

        Args:
            endpoint: of the publisher, as ``tcp://127.0.0.1:5557``.
            replay: where it is asked for what was missed; ``None``: it cannot be asked.
            topic: only what is published under topics that begin so, or under none.
            timeout_s: seconds that an answer may take.
        """
        zmq, _ = _libraries()
        self._zmq = zmq
        self._context = zmq.Context.instance()
        self._events = self._context.socket(zmq.SUB)
        # Numbers run over all topics: all are received, so that none is missing.
        self._events.setsockopt(zmq.SUBSCRIBE, b"")
        self._topic = topic.encode()
        self._events.setsockopt(zmq.RCVHWM, 100_000)
        self._events.connect(endpoint)
        self._replay = replay
        self._timeout_ms = int(1000 * timeout_s)
        # The sequence that comes next; None: nothing has come yet.
        self._next: int | None = None
        # The last one that was published while this listened.
        self._last: int | None = None
        self._asked_at = -_ASK_S
        # How often something was missing.
        self.gaps = 0

    def poll(self, timeout_s: float = 0.0) -> list[Event]:
        """What came: at once if there is something, else within so many seconds. An empty list: nothing did."""
        events: list[Event] = []
        wait_ms = int(1000 * timeout_s)
        while self._events.poll(0 if events else wait_ms):
            topic, sequence, payload = self._events.recv_multipart()
            events += self._take(topic, int.from_bytes(sequence, "big"), payload)
        if not events and self._replay is not None and time.monotonic() >= self._asked_at + _ASK_S:
            # What was there before this began to listen, or was lost when nothing followed it.
            self._asked_at = time.monotonic()
            events += self._fill(self._next or 0)
        return events

    def _take(self, topic: bytes, sequence: int, payload: bytes) -> list[Event]:
        events: list[Event] = []
        # With whom to ask, what was before the first is asked for, too.
        begin = 0 if self._replay is not None else sequence
        if self._last is not None and sequence <= self._last:
            # A publisher's numbers rise: it began anew.
            self._next, events = begin, [Cleared()]
        elif self._next is None:
            self._next = begin
        self._last = sequence
        if sequence > self._next:
            self.gaps += 1
            events += self._fill(self._next)
            if sequence > self._next:
                events.append(Cleared())
        if sequence < self._next:
            # It came with what was asked for.
            return events
        self._next = sequence + 1
        return events + self._decode(topic, payload)

    def _decode(self, topic: bytes, payload: bytes) -> list[Event]:
        if topic and not topic.startswith(self._topic):
            return []
        try:
            return decode(payload)
        except InputError as error:
            _log.warning("events_left_out", "a batch of KV events was left out: %s", error)
            return [Cleared()]

    def _fill(self, first: int) -> list[Event]:
        """Asks for what followed from a sequence on."""
        if self._replay is None:
            return []
        zmq = self._zmq
        events: list[Event] = []
        with self._context.socket(zmq.DEALER) as socket:
            socket.setsockopt(zmq.LINGER, 0)
            socket.setsockopt(zmq.RCVHWM, 0)
            socket.connect(self._replay)
            socket.send_multipart([b"", first.to_bytes(8, "big")])
            while socket.poll(self._timeout_ms):
                *_, topic, sequence, payload = socket.recv_multipart()
                if sequence == _END:
                    break
                number = int.from_bytes(sequence, "big")
                expected = first if self._next is None else self._next
                if number < expected:
                    continue
                if number > expected:
                    events.append(Cleared())
                self._next = number + 1
                events += self._decode(topic, payload)
        return events

    def close(self) -> None:
        """Disconnects."""
        self._events.close(linger=0)

    def __enter__(self) -> Subscriber:
        """The subscriber itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Disconnects."""
        self.close()


class Publisher:
    """Publishes what the tiers of a store get and lose, in a thread of its own."""

    def __init__(
        self,
        source: Source,
        endpoint: str,
        replay: str | None = None,
        *,
        interval_s: float = 0.05,
        kept: int = 10_000,
    ) -> None:
        """Binds, and begins with all that is there.

        Args:
            source: a `CacheManager`.
            endpoint: where to publish, as ``tcp://127.0.0.1:5557``. A model's events have its name for a topic.
            replay: where to be asked for what was missed. Who asks for more than is kept gets all that is there.
            interval_s: seconds between two looks at what happened.
            kept: batches that are kept for those who missed them.
        """
        zmq, msgspec = _libraries()
        self._source, self._interval_ms = source, int(1000 * interval_s)
        self._encoder = msgspec.msgpack.Encoder()
        context = zmq.Context.instance()
        self._events = context.socket(zmq.PUB)
        self._events.setsockopt(zmq.SNDHWM, 100_000)
        self._events.bind(endpoint)
        self._replay = context.socket(zmq.ROUTER)
        # Else it drops what somebody who asks does not take at once.
        self._replay.setsockopt(zmq.SNDHWM, 0)
        if replay is not None:
            self._replay.bind(replay)
        # From here on the sockets are the thread's alone. With the ports that were found if none were given.
        self.endpoint = str(self._events.getsockopt_string(zmq.LAST_ENDPOINT))
        self.replay_endpoint = str(self._replay.getsockopt_string(zmq.LAST_ENDPOINT))
        self._kept: deque[tuple[int, bytes, bytes]] = deque(maxlen=kept)
        self._sequence = itertools.count()
        self._since: int | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="stratakv-events", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            while not self._stop.is_set():
                if self._replay.poll(self._interval_ms):
                    self._answer()
                self._publish()
        except ClosedError:
            _log.info("events_ended", "KV events end: the store was closed")
        except Exception:
            _log.exception("events_failed", "KV events are published no more")
        finally:
            self._events.close(linger=0)
            self._replay.close(linger=0)

    def _publish(self) -> None:
        anew, rows, self._since = self._source.events(self._since)
        if anew:
            self._send(b"", [{"type": "AllBlocksCleared"}])
            # In longer batches.
            rows.sort(key=lambda row: row[0])
        for topic, batch in _batches(rows):
            self._send(topic, batch)

    def _send(self, topic: bytes, events: list[dict[str, Any]]) -> None:
        payload = self._encoder.encode([0.0, events, None])
        number = next(self._sequence)
        self._kept.append((number, topic, payload))
        self._events.send_multipart([topic, number.to_bytes(8, "big"), payload])

    def _answer(self) -> None:
        who, *_, asked = self._replay.recv_multipart()
        first = int.from_bytes(asked, "big")
        if self._kept and first < self._kept[0][0]:
            # More than is kept: all that is there, for everyone.
            self._since = None
            self._publish()
            anew = (number for number, _, payload in self._kept if b"AllBlocksCleared" in payload)
            # Where that is more than is kept, who asked sees the gap.
            first = max(anew, default=self._kept[0][0])
        for number, topic, payload in self._kept:
            if number >= first:
                self._replay.send_multipart([who, b"", topic, number.to_bytes(8, "big"), payload])
        self._replay.send_multipart([who, b"", b"", _END, b""])

    def close(self) -> None:
        """Publishes no more."""
        self._stop.set()
        self._thread.join()

    def __enter__(self) -> Publisher:
        """The publisher itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Publishes no more."""
        self.close()


def _batches(
    rows: Iterable[tuple[str, bytes, bytes | None, str, bool]],
) -> Iterator[tuple[bytes, list[dict[str, Any]]]]:
    """Events as engines send them, neighbours of one kind as one; at most 4,096 rows in a batch."""
    for model, of_model in itertools.groupby(rows, lambda row: row[0]):
        while some := list(itertools.islice(of_model, 4096)):
            events: list[dict[str, Any]] = []
            before: bytes | None = None
            for _, name, parent, tier, stored in some:
                medium = _TIER_MEDIA[tier]
                last = events[-1] if events else {}
                if stored:
                    follows = last.get("type") == "BlockStored" and parent is not None and parent == before
                    if follows and last["medium"] == medium:
                        last["block_hashes"].append(name)
                    else:
                        events.append(
                            {
                                "type": "BlockStored",
                                "block_hashes": [name],
                                "parent_block_hash": parent,
                                "token_ids": [],
                                "block_size": 0,
                                "lora_id": None,
                                "medium": medium,
                                "lora_name": None,
                            }
                        )
                    before = name
                elif last.get("type") == "BlockRemoved" and last["medium"] == medium:
                    last["block_hashes"].append(name)
                else:
                    events.append({"type": "BlockRemoved", "block_hashes": [name], "medium": medium})
            yield model.encode(), events
