"""Servers that nodes share, against what a socket gives.

Sections: `dragonfly` (records written and read in batches, and which of 256 blocks are there, on a Redis or Valkey that
it starts). The limit is the same bytes through a socket of the same machine, by one call in each direction; both take
turns, and `ratio` is the median over neighbouring pairs. What is not installed is skipped by name.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from statistics import median

from rows import Row, paired, row, run, skipped

from stratakv import DragonflyConfig
from stratakv.tiers.dragonfly import Dragonfly

MIB = 1 << 20
REPEATS = 21
# What is put, and got, in one measurement: one batch.
PASS_BYTES = 16 * MIB
ASKED = 256
MODEL = bytes(16)
SPACE = MODEL + bytes(16)


class Records:
    """A model of so many blocks, whose records are there at once: what is measured is how they travel."""

    fingerprint = MODEL

    def __init__(self, size: int, count: int) -> None:
        self.record_bytes = size
        self.records = {n.to_bytes(16, "big"): os.urandom(size) for n in range(count)}
        self.names = list(self.records)

    def heads(self, names: list[bytes], run_blocks: int) -> list[tuple[bytes, bytes] | None]:
        return [
            ((n - n % run_blocks).to_bytes(16, "big"), bytes(16))
            for n in (int.from_bytes(name, "big") for name in names)
        ]

    def export(self, name: bytes) -> bytes | None:
        return self.records.get(name)


class Wire:
    """A connection to a thread that takes bytes, or gives them; both have their memory beforehand."""

    def __init__(self) -> None:
        self.ours, self.theirs = (memoryview(bytearray(os.urandom(PASS_BYTES))) for _ in range(2))
        with socket.create_server(("127.0.0.1", 0)) as listener:
            self.link = socket.create_connection(listener.getsockname())
            self.peer, _ = listener.accept()
        for end in (self.link, self.peer):
            end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        threading.Thread(target=self.serve, daemon=True).start()

    def serve(self) -> None:
        while verb := self.peer.recv(1):
            if verb == b"g":
                self.peer.sendall(self.theirs)
            else:
                self.peer.sendall(b"+")
                receive(self.peer, self.theirs)
                self.peer.sendall(b"+")

    def get(self) -> None:
        self.link.sendall(b"g")
        receive(self.link, self.ours)

    def put(self) -> None:
        self.link.sendall(b"p")
        self.link.recv(1)
        self.link.sendall(self.ours)
        self.link.recv(1)

    def close(self) -> None:
        self.link.close()


def receive(link: socket.socket, into: memoryview) -> None:
    while into:
        into = into[link.recv_into(into) :]


def spent(call: Callable[..., object], *arguments: object) -> tuple[float, object]:
    started = time.perf_counter()
    got = call(*arguments)
    return time.perf_counter() - started, got


@contextmanager
def server(binary: str) -> Iterator[str]:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        command = [binary, "--port", str(port), "--bind", "127.0.0.1", "--save", "", "--dir", folder]
        with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
            try:
                for _ in range(500):
                    with suppress(OSError), socket.create_connection(("127.0.0.1", port)):
                        break
                    time.sleep(0.01)
                yield f"redis://127.0.0.1:{port}"
            finally:
                process.kill()


def dragonfly() -> list[Row]:
    """GB/s of records, and how long 256 blocks take to be looked for."""
    binary = shutil.which("redis-server") or shutil.which("valkey-server")
    if binary is None:
        return [row("records in Redis: skipped, redis-server is not installed", n=0)]
    if absent := skipped("records in Redis", "redis"):
        return absent
    rows: list[Row] = []
    with ExitStack() as stack:
        url, wire = stack.enter_context(server(binary)), Wire()
        stack.callback(wire.close)
        tier = Dragonfly(DragonflyConfig(url=url, deadline_s=10.0))
        stack.callback(tier.close)
        label = subprocess.run([binary, "--version"], capture_output=True, text=True).stdout.split(" sha")[0]
        for size in (MIB, 4 * MIB):
            model = Records(size, PASS_BYTES // size)
            pairs: dict[str, list[tuple[float, float]]] = {"put": [], "get": []}
            right = True
            for repeat in range(REPEATS + 1):
                assert tier.forget(MODEL)
                (put_limit, _), (put, _) = spent(wire.put), spent(tier.write, model, model.names)
                (get_limit, _), (get, got) = spent(wire.get), spent(tier.fetch, SPACE, model.names, size)
                right &= got == (list(model.records.values()), None)
                del got
                if repeat:  # The first warms up.
                    pairs["put"].append((PASS_BYTES / put / 1e9, PASS_BYTES / put_limit / 1e9))
                    pairs["get"].append((PASS_BYTES / get / 1e9, PASS_BYTES / get_limit / 1e9))
            more = {"must": "ratio >= 0.6", "goal": "ratio >= 0.9", "right": None if right else False}
            for verb, each in pairs.items():
                rows.append(paired(f"{verb}, {size // MIB} MiB, {label}", "GB/s", each, "a socket", **more))
        assert tier.forget(MODEL)
        model = Records(64, ASKED)
        tier.write(model, model.names)
        asked = [spent(tier.leading, SPACE, model.names) for _ in range(1000)]
        taken = [1000 * seconds for seconds, _ in asked]
        right = None if {found for _, found in asked} == {(ASKED, None)} else False
        more = {"must": "value < 1", "goal": "value < 0.4", "right": right, "n": len(taken)}
        rows.append(row(f"which of {ASKED} blocks are there, p50", median(taken), "ms", **more))
    return rows


if __name__ == "__main__":
    run("service", dragonfly)
