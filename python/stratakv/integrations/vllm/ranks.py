"""How the scheduler learns what its workers have: each rank keeps its own shard, and all of them have to have a block.

Where worker and scheduler are one process the worker is called. Elsewhere it answers on a socket of the machine, in a
folder that only this user can enter, to whoever has the key that it told the scheduler at start. A rank that does not
answer in time has nothing: that is a miss, not an error.
"""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import tempfile
import threading
import time
from collections.abc import Sequence
from multiprocessing.connection import Client, Connection, Listener
from pathlib import Path
from typing import Any, Protocol

import msgspec
import numpy as np

from stratakv.integrations.vllm.messages import Address, Ids

_log = logging.getLogger(__name__)

# How long a scheduler waits for a rank, and how long it leaves one alone that did not answer.
_DEADLINE_S = 1.0
_REST_S = 5.0


class Question(msgspec.Struct, array_like=True):
    """What of a prompt a rank has; its match is leased under the request's id until the step is over."""

    request: str
    step: int
    adapter: str
    tenant: str
    tokens: bytes


class Found(msgspec.Struct, array_like=True):
    """What it has.

    Attributes:
        tokens: leading tokens, whole blocks.
        in_ram: whether all of them are in RAM.
        tiers: tokens that are elsewhere, by tier.
    """

    tokens: int = 0
    in_ram: bool = True
    tiers: dict[str, int] = {}


class Answerer(Protocol):
    """A worker."""

    def match(self, request: str, step: int, tokens: Ids, adapter: str, tenant: str) -> Found:
        """Leases what it has of a prompt."""

    def reset(self) -> None:
        """Forgets everything."""


# Workers of this process, by the path of their socket.
_here: dict[str, Answerer] = {}


class Answers:
    """The worker's side."""

    def __init__(self, worker: Answerer) -> None:
        """Begins to listen."""
        folder = Path(tempfile.mkdtemp(prefix="stratakv-"))
        self.address = Address(path=str(folder / "rank"), key=secrets.token_bytes(32), pid=os.getpid())
        self._worker = worker
        self._listener = Listener(self.address.path, family="AF_UNIX", authkey=self.address.key)
        self._closed = False
        _here[self.address.path] = worker
        self._thread = threading.Thread(target=self._serve, name="stratakv-answers", daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        while not self._closed:
            try:
                connection = self._listener.accept()
            except Exception as error:
                if not self._closed:
                    _log.warning("a connection was refused: %s", error)
                continue
            threading.Thread(target=self._answer, args=(connection,), name="stratakv-answer", daemon=True).start()

    def _answer(self, connection: Connection[Any, Any]) -> None:
        question, reset, encoder = msgspec.msgpack.Decoder(Question), b"reset", msgspec.msgpack.Encoder()
        with connection, contextlib.suppress(EOFError, OSError):
            while not self._closed:
                message = connection.recv_bytes()
                if message == reset:
                    self._worker.reset()
                    connection.send_bytes(encoder.encode(Found()))
                    continue
                asked = question.decode(message)
                tokens = np.frombuffer(asked.tokens, np.uint32)
                found = self._worker.match(asked.request, asked.step, tokens, asked.adapter, asked.tenant)
                connection.send_bytes(encoder.encode(found))

    def close(self) -> None:
        """Stops listening."""
        self._closed = True
        _here.pop(self.address.path, None)
        self._listener.close()
        path = Path(self.address.path)
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)
            path.parent.rmdir()


class Ranks:
    """The scheduler's side."""

    def __init__(self, addresses: Sequence[Address]) -> None:
        """Of all workers; none of them is asked yet."""
        self._addresses = list(addresses)
        self._open: dict[str, Connection[Any, Any]] = {}
        self._rest_until: dict[str, float] = {}
        self._encoder, self._decoder = msgspec.msgpack.Encoder(), msgspec.msgpack.Decoder(Found)

    def match(self, request: str, step: int, tokens: Ids, adapter: str, tenant: str) -> Found:
        """What all of them have: the shortest, and in RAM if it is there on every rank."""
        if len(self._addresses) == 1 and (worker := self._in_process(self._addresses[0])) is not None:
            return worker.match(request, step, tokens, adapter, tenant)
        found = self._ask(self._encoder.encode(Question(request, step, adapter, tenant, tokens.tobytes())))
        least = min(found, key=lambda each: each.tokens, default=Found())
        return Found(least.tokens, all(each.in_ram for each in found), least.tiers)

    def reset(self) -> bool:
        """Has all of them forget everything; whether all did."""
        if len(self._addresses) == 1 and (worker := self._in_process(self._addresses[0])) is not None:
            worker.reset()
            return True
        self._rest_until.clear()
        return bool(self._ask(b"reset", missing=False))

    def _in_process(self, address: Address) -> Answerer | None:
        return _here.get(address.path) if address.pid == os.getpid() else None

    def _ask(self, message: bytes, *, missing: bool = True) -> list[Found]:
        """Asks all at once. One that does not answer has nothing; without `missing`, all answers or none."""
        asked = [(address, self._send(address, message)) for address in self._addresses]
        until = time.monotonic() + _DEADLINE_S
        found = []
        for address, connection in asked:
            answer = self._receive(address, connection, until) if connection is not None else None
            if answer is None and not missing:
                return []
            found.append(answer or Found())
        return found

    def _send(self, address: Address, message: bytes) -> Connection[Any, Any] | None:
        if time.monotonic() < self._rest_until.get(address.path, 0.0):
            return None
        try:
            if address.path not in self._open:
                self._open[address.path] = Client(address.path, family="AF_UNIX", authkey=address.key)
            connection = self._open[address.path]
            connection.send_bytes(message)
        except Exception as error:
            self._leave(address, error)
            return None
        return connection

    def _receive(self, address: Address, connection: Connection[Any, Any], until: float) -> Found | None:
        try:
            if connection.poll(max(until - time.monotonic(), 0.0)):
                return self._decoder.decode(connection.recv_bytes())
            error: Exception = TimeoutError(f"no answer in {_DEADLINE_S} s")
        except Exception as broken:
            error = broken
        self._leave(address, error)
        return None

    def _leave(self, address: Address, error: Exception) -> None:
        """A rank that does not answer is asked again later, on a new connection: what it says now may be of before."""
        _log.warning("a worker does not tell what it has, prompts are computed: %s", error)
        if (connection := self._open.pop(address.path, None)) is not None:
            connection.close()
        self._rest_until[address.path] = time.monotonic() + _REST_S

    def close(self) -> None:
        """Ends all connections."""
        for connection in self._open.values():
            connection.close()
        self._open.clear()
