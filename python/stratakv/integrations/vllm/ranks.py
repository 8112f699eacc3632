"""How the scheduler learns what its workers have: each rank keeps its own shard, and all of them have to have a block.

Where worker and scheduler are one process the worker is called. Elsewhere it answers on a socket of the machine, in a
folder that only this user can enter, to whoever sends first the key that it told the scheduler at start. A rank that
does not answer in time has nothing: that is a miss, not an error.

    the key, once; then, each with its length before it:  a question ─▶ tokens and tiers
"""

from __future__ import annotations

import contextlib
import hmac
import os
import re
import secrets
import shutil
import socket
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import msgspec
import numpy as np

from stratakv import log
from stratakv.integrations.vllm.messages import Address, Ids

_log = log.of(__name__)

# How long a scheduler waits for a rank; for one that has to forget everything; and how long it leaves one alone that
# did not answer.
_DEADLINE_S, _RESET_DEADLINE_S, _REST_S = 1.0, 60.0, 5.0
_KEY_BYTES, _MOST_BYTES = 32, 64 << 20


class Question(msgspec.Struct, array_like=True):
    """What of a prompt a rank has; its match is leased under the request's id until the step is over."""

    step: int
    request: str = ""
    adapter: str = ""
    tenant: str = ""
    tokens: bytes = b""
    # Rather than that: forget everything, and save nothing that a step before this one computed.
    reset: bool = False


class Found(msgspec.Struct, array_like=True):
    """What it has.

    Attributes:
        tokens: leading tokens, whole blocks.
        tiers: how many of them are in which tier.
    """

    tokens: int = 0
    tiers: dict[str, int] = {}


class Answerer(Protocol):
    """A worker."""

    def match(self, request: str, step: int, tokens: Ids, adapter: str, tenant: str) -> Found:
        """Leases what it has of a prompt."""

    def reset(self, step: int) -> None:
        """Forgets everything."""


# Workers of this process, by the path of their socket.
_here: dict[str, Answerer] = {}


def _send(link: socket.socket, message: bytes) -> None:
    link.sendall(len(message).to_bytes(4, "little") + message)


def _receive(link: socket.socket) -> bytes:
    """One message.

    Raises:
        OSError: the other end is gone, or does not answer in time.
    """
    length = int.from_bytes(_exactly(link, 4), "little")
    if length > _MOST_BYTES:
        raise OSError(f"a message of {length} bytes, expected at most {_MOST_BYTES}")
    return _exactly(link, length)


def _exactly(link: socket.socket, count: int) -> bytes:
    out = bytearray(count)
    view = memoryview(out)
    while view:
        came = link.recv_into(view)
        if not came:
            raise OSError("the other end is gone")
        view = view[came:]
    return bytes(out)


class Answers:
    """The worker's side."""

    def __init__(self, worker: Answerer) -> None:
        """Begins to listen."""
        _remove_stale_folders()
        folder = Path(tempfile.mkdtemp(prefix=f"stratakv-{os.getpid()}-"))
        self.address = Address(path=str(folder / "rank"), key=secrets.token_bytes(_KEY_BYTES), pid=os.getpid())
        self._worker = worker
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.bind(self.address.path)
        self._listener.listen()
        self._closed = False
        _here[self.address.path] = worker
        threading.Thread(target=self._serve, name="stratakv-answers", daemon=True).start()

    def _serve(self) -> None:
        while not self._closed:
            try:
                link, _ = self._listener.accept()
            except OSError:
                # It was closed, or whoever dialled is gone again.
                continue
            threading.Thread(target=self._answer, args=(link,), name="stratakv-answer", daemon=True).start()

    def _answer(self, link: socket.socket) -> None:
        decoder, encoder = msgspec.msgpack.Decoder(Question), msgspec.msgpack.Encoder()
        with link, contextlib.suppress(OSError):
            link.settimeout(_DEADLINE_S)
            if not hmac.compare_digest(_exactly(link, _KEY_BYTES), self.address.key):
                return
            link.settimeout(None)
            while not self._closed:
                asked = decoder.decode(_receive(link))
                if asked.reset:
                    self._worker.reset(asked.step)
                    found = Found()
                else:
                    tokens = np.frombuffer(asked.tokens, np.uint32)
                    found = self._worker.match(asked.request, asked.step, tokens, asked.adapter, asked.tenant)
                _send(link, encoder.encode(found))

    def close(self) -> None:
        """Stops listening."""
        self._closed = True
        _here.pop(self.address.path, None)
        # A close alone does not wake who waits for a connection.
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        shutil.rmtree(Path(self.address.path).parent, ignore_errors=True)


def _remove_stale_folders() -> None:
    """Removes what workers left that were killed."""
    for folder in Path(tempfile.gettempdir()).glob("stratakv-*-*"):
        told = re.fullmatch(r"stratakv-(\d+)-\w+", folder.name)
        with contextlib.suppress(OSError):
            if told and folder.stat().st_uid == os.getuid() and not Path(f"/proc/{told[1]}").exists():
                shutil.rmtree(folder, ignore_errors=True)


class Ranks:
    """The scheduler's side."""

    def __init__(self, addresses: Sequence[Address]) -> None:
        """Of all workers; none of them is asked yet."""
        self._addresses = list(addresses)
        self._open: dict[str, socket.socket] = {}
        self._rest_until: dict[str, float] = {}
        self._encoder, self._decoder = msgspec.msgpack.Encoder(), msgspec.msgpack.Decoder(Found)
        # Whether some rank may still have what all were to forget.
        self._stale = False

    def match(self, request: str, step: int, tokens: Ids, adapter: str, tenant: str) -> Found:
        """What all of them have: the least."""
        if self._stale:
            return Found()
        if (worker := self._in_process()) is not None:
            return worker.match(request, step, tokens, adapter, tenant)
        found = self._ask(Question(step, request, adapter, tenant, tokens.tobytes()), _DEADLINE_S)
        return min((each or Found() for each in found), key=lambda each: each.tokens, default=Found())

    def reset(self, step: int) -> bool:
        """Has all of them forget everything; whether all did. Until they all have, nothing is found."""
        if (worker := self._in_process()) is not None:
            worker.reset(step)
            return True
        self._rest_until.clear()
        self._stale = None in self._ask(Question(step, reset=True), _RESET_DEADLINE_S)
        return not self._stale

    def _in_process(self) -> Answerer | None:
        """The worker, if it is the only one and of this process."""
        address = self._addresses[0] if len(self._addresses) == 1 else None
        return _here.get(address.path) if address is not None and address.pid == os.getpid() else None

    def _ask(self, question: Question, deadline_s: float) -> list[Found | None]:
        """Asks all at once. ``None``: that one did not answer."""
        until = time.monotonic() + deadline_s
        message = self._encoder.encode(question)
        asked = [(address, self._begin(address, message, until)) for address in self._addresses]
        return [self._end(address, link, until) if link is not None else None for address, link in asked]

    def _begin(self, address: Address, message: bytes, until: float) -> socket.socket | None:
        if time.monotonic() < self._rest_until.get(address.path, 0.0):
            return None
        try:
            link = self._open.get(address.path)
            if link is None:
                link = self._open[address.path] = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
                link.settimeout(max(until - time.monotonic(), 0.001))
                link.connect(address.path)
                link.sendall(address.key)
            link.settimeout(max(until - time.monotonic(), 0.001))
            _send(link, message)
        except OSError as error:
            self._leave(address, error)
            return None
        return link

    def _end(self, address: Address, link: socket.socket, until: float) -> Found | None:
        try:
            link.settimeout(max(until - time.monotonic(), 0.001))
            return self._decoder.decode(_receive(link))
        except (OSError, msgspec.MsgspecError) as error:
            self._leave(address, error)
            return None

    def _leave(self, address: Address, error: Exception) -> None:
        """A rank that does not answer is asked again later, on a new connection: what it says now may be of before."""
        _log.warning(
            "rank_silent", "a worker does not tell what it has, prompts are computed: %s", error, rank=address.path
        )
        if (link := self._open.pop(address.path, None)) is not None:
            link.close()
        self._rest_until[address.path] = time.monotonic() + _REST_S

    def close(self) -> None:
        """Ends all connections."""
        for link in self._open.values():
            link.close()
        self._open.clear()
