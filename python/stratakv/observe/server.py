"""What a store says over HTTP: health, metrics, its status, events, and a page for people.

    /livez    the process answers          /metrics  for Prometheus
    /readyz   the store is open            /status   all numbers, as JSON
    /healthz  and what it runs without     /events   which blocks came and went since, as JSON
    /         a page that shows /status

It listens on the loopback unless it is told otherwise. With a token everything but /livez, /readyz and the empty page
asks for it. Several processes of one machine may share an address: whoever has it asks the others.
"""

from __future__ import annotations

import contextlib
import errno
import hmac
import http.client
import json
import os
import re
import socket
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib import resources
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

from stratakv import log
from stratakv.errors import ClosedError, ConfigError, StrataKVError
from stratakv.observe import Source
from stratakv.observe.exposition import CONTENT_TYPE, merged, text
from stratakv.observe.metrics import Collector
from stratakv.observe.report import STEP_S, History, report

__all__ = ["Server"]

_log = log.of(__name__)

# Seconds that a client may take to say what it wants, and a process of the same group to answer.
_PATIENCE_S, _SIBLING_S = 10.0, 2.0
# How often a process that shares an address looks whether it is free.
_CLAIM_S = 2.0
# Seconds for which the prefixes that are asked for most stay as they were found.
_HOTTEST_S, _HOTTEST = 30.0, 10
# Bytes of a prompt that is to be explained.
_MOST_ASKED = 16 << 20
# Open to anyone: they say nothing.
_OPEN = ("/livez", "/readyz", "/")


class Server:
    """Answers in threads of its own, until it is closed."""

    def __init__(
        self, source: Source, *, listen: str, token: str | None = None, name: str = "", share: Path | None = None
    ) -> None:
        """Begins to answer.

        Args:
            source: what is shown.
            listen: ``host:port``; port 0 takes a free one.
            token: what clients have to show, if there is one.
            name: of this process, among those that share the address.
            share: a folder that is the same for all processes that share the address; ``None``: it is this one's alone.

        Raises:
            ConfigError: the address makes no sense, or cannot be had.
        """
        self._source, self._token, self._begun = source, token, time.monotonic()
        self.name = name or str(os.getpid())
        self._collector = Collector(source.view)
        self._history = History()
        self._hottest: tuple[float, Sequence[Mapping[str, Any]]] = (-_HOTTEST_S, ())
        self._hosts: frozenset[str] | None = None
        self._share = share
        self._path: Path | None = None
        self._over = threading.Event()
        self._servers: list[ThreadingHTTPServer] = []
        self._host, self._port = _address(listen)
        self.address: str | None = None
        if share is not None:
            self._open_socket(share)
        try:
            self._claim()
        except OSError as error:
            if share is None or error.errno != errno.EADDRINUSE:
                self.close()
                raise ConfigError(f"observe.listen is {listen!r}, which cannot be had: {error.strerror}") from error
        threading.Thread(target=self._keep, name="stratakv-observe", daemon=True).start()

    # Where it listens.

    def _open_socket(self, folder: Path) -> None:
        """Answers the process that has the address."""
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        path = folder / f"{os.getpid()}-{id(self):x}.sock"
        if len(str(path)) > 100:
            raise ConfigError(f"observe.share is {str(folder)!r}, expected a shorter path: it holds sockets")
        self._path = path
        self._serve(_UnixServer(str(path), _handler(self)))  # type: ignore[arg-type]  # an address of its family

    def _claim(self) -> None:
        server = _Http((self._host, self._port), _handler(self))
        host, self._port = str(server.server_address[0]), int(server.server_address[1])
        if self._host in ("127.0.0.1", "::1", "localhost"):
            # A page elsewhere that has its own name point here is not answered.
            self._hosts = frozenset({self._host, "localhost", "127.0.0.1", "[::1]"})
        self.address = f"http://{host}:{self._port}"
        self._serve(server)

    def _serve(self, server: ThreadingHTTPServer) -> None:
        server.daemon_threads = True
        self._servers.append(server)
        threading.Thread(target=server.serve_forever, name="stratakv-http", daemon=True).start()

    def _keep(self) -> None:
        """Notes totals, and claims the address when whoever had it is gone."""
        noted = -STEP_S
        while not self._over.is_set():
            if self.address is None:
                with contextlib.suppress(OSError):
                    self._claim()
            if time.monotonic() - noted >= STEP_S:
                noted = time.monotonic()
                try:
                    self._history.note(self._source.view().snapshot.total)
                except ClosedError:
                    return
            self._over.wait(min(_CLAIM_S, STEP_S) / 2)

    def close(self) -> None:
        """Answers nobody any more."""
        self._over.set()
        for server in self._servers:
            server.shutdown()
            server.server_close()
        if self._share is not None and self._path is not None:
            self._path.unlink(missing_ok=True)
        self._servers = []

    # What it says.

    def answer(self, path: str, query: Mapping[str, list[str]]) -> tuple[int, str, bytes]:
        """Status, content type and body of a request that may be answered."""
        if path == "/livez":
            return 200, "text/plain; charset=utf-8", b"ok\n"
        if path == "/":
            page = resources.files("stratakv.observe").joinpath("page.html").read_bytes()
            return 200, "text/html; charset=utf-8", page
        try:
            return self._from_store(path, query)
        except ClosedError:
            return 503, "text/plain; charset=utf-8", b"the store is closed\n"

    def _from_store(self, path: str, query: Mapping[str, list[str]]) -> tuple[int, str, bytes]:
        alone = "alone" in query or self._share is None
        if path == "/readyz":
            self._source.view()
            return 200, "text/plain; charset=utf-8", b"ok\n"
        if path == "/healthz":
            modes = self._source.view().status.degraded
            return _json({"status": "degraded" if modes else "ok", "degraded": modes})
        if path == "/metrics":
            said = text(self._collector.families())
            if not alone:
                said = merged({self.name: said, **self._siblings("/metrics")})
            return 200, CONTENT_TYPE, said.encode()
        if path == "/status":
            own_status = self._report()
            if alone:
                return _json(own_status)
            others = {name: json.loads(body) for name, body in self._siblings("/status").items()}
            return _json({"processes": {self.name: own_status, **others}})
        if path == "/events":
            since = query.get("since", [None])[0]
            if since is not None and not since.isdecimal():
                return 400, "text/plain; charset=utf-8", b"since: expected a number from an answer before\n"
            everything, rows, following = self._source.events(None if since is None else int(since))
            events = [
                {"model": m, "block": block.hex(), "parent": parent.hex() if parent else None, "tier": tier,
                 "stored": stored}
                for m, block, parent, tier, stored in rows
            ]  # fmt: skip
            return _json({"all": everything, "next": following, "events": events})
        return 404, "text/plain; charset=utf-8", b"there is /livez /readyz /healthz /metrics /status /events and /\n"

    def explain(self, asked: bytes) -> tuple[int, str, bytes]:
        """Explains a prompt: ``{"model": ..., "tokens": [...], "adapter": "", "tenant": ""}``."""
        try:
            given = json.loads(asked)
            adapter, tenant = str(given.get("adapter") or ""), str(given.get("tenant") or "")
            return _json(self._source.explain(str(given["model"]), given["tokens"], adapter, tenant).row())
        except (ValueError, KeyError, AttributeError, TypeError, StrataKVError) as error:
            if isinstance(error, ClosedError):
                return 503, "text/plain; charset=utf-8", b"the store is closed\n"
            known = isinstance(error, StrataKVError)
            said = str(error) if known else 'expected {"model": name, "tokens": [ids], "adapter": "", "tenant": ""}'
            return 400, "text/plain; charset=utf-8", said.encode() + b"\n"

    def _report(self) -> dict[str, Any]:
        now = time.monotonic()
        if now - self._hottest[0] >= _HOTTEST_S:
            self._hottest = (now, self._source.hottest(_HOTTEST))
        return report(
            self._source.view(), uptime_s=now - self._begun, history=self._history, hottest=self._hottest[1]
        ) | {"process": self.name}

    def _siblings(self, path: str) -> dict[str, str]:
        """What the other processes say, by their names; one that does not answer says nothing."""
        assert self._share is not None
        out = {}
        for each in sorted(self._share.glob("*.sock")):
            if each == self._path:
                continue
            try:
                name, body = _ask(each, f"{path}?alone", self._token)
            except ConnectionRefusedError:
                # It was killed.
                each.unlink(missing_ok=True)
                continue
            except (OSError, http.client.HTTPException):
                continue
            while name in out or name == self.name:
                name += "'"
            out[name] = body
        return out

    def is_allowed(self, path: str, authorization: str | None) -> bool:
        """Whether whoever asks may know."""
        if self._token is None or path in _OPEN:
            return True
        given = (authorization or "").removeprefix("Bearer ").encode()
        return hmac.compare_digest(given, self._token.encode())

    def is_own_host(self, host: str | None) -> bool:
        """Whether the name that a client called it by is its own."""
        return self._hosts is None or host is None or re.sub(r":\d+$", "", host) in self._hosts


def _json(value: object) -> tuple[int, str, bytes]:
    return 200, "application/json", json.dumps(value, default=str).encode() + b"\n"


def _address(listen: str) -> tuple[str, int]:
    host, _, port = listen.rpartition(":")
    if not host or not port.isdecimal() or int(port) > 65535:
        raise ConfigError(f"observe.listen is {listen!r}, expected host:port, as 127.0.0.1:9470")
    return host.strip("[]"), int(port)


class _Http(ThreadingHTTPServer):
    def handle_error(self, request: object, client_address: object) -> None:
        """A client that is gone, or sends noise, tells nobody anything; what is wrong here does."""
        if not isinstance(sys.exc_info()[1], OSError):
            _log.exception("http_failed", "a question over HTTP got no answer")


class _UnixServer(_Http):
    address_family = socket.AF_UNIX

    def server_bind(self) -> None:
        self.socket.bind(self.server_address)
        os.chmod(str(self.server_address), 0o600)
        self.server_name, self.server_port = "local", 0

    def get_request(self) -> tuple[socket.socket, Any]:
        link, _ = self.socket.accept()
        return link, ("local", 0)


def _handler(server: Server) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        server_version = "stratakv"
        sys_version = ""
        timeout = _PATIENCE_S

        def do_GET(self) -> None:
            asked = urlsplit(self.path)
            if not server.is_own_host(self.headers.get("Host")):
                self._say(403, "text/plain; charset=utf-8", b"called by a name that is not this server's\n")
            elif not server.is_allowed(asked.path, self.headers.get("Authorization")):
                self._say(401, "text/plain; charset=utf-8", b"Authorization: Bearer TOKEN is missing, or wrong\n")
            else:
                query = parse_qs(asked.query, keep_blank_values=True)
                self._say(*server.answer(asked.path, query))

        do_HEAD = do_GET

        def do_POST(self) -> None:
            path = urlsplit(self.path).path
            length = self.headers.get("Content-Length", "")
            if not server.is_own_host(self.headers.get("Host")):
                self._say(403, "text/plain; charset=utf-8", b"called by a name that is not this server's\n")
            elif not server.is_allowed(path, self.headers.get("Authorization")):
                self._say(401, "text/plain; charset=utf-8", b"Authorization: Bearer TOKEN is missing, or wrong\n")
            elif path != "/explain":
                self._say(405, "text/plain; charset=utf-8", b"only /explain takes anything\n")
            elif not length.isdecimal() or int(length) > _MOST_ASKED:
                self.close_connection = True
                self._say(413, "text/plain; charset=utf-8", b"expected at most 16 MiB, and their length before them\n")
            else:
                self._say(*server.explain(self.rfile.read(int(length))))

        def _say(self, status: int, kind: str, body: bytes) -> None:
            self.send_response(status)
            headers = {
                "Content-Type": kind,
                "Content-Length": str(len(body)),
                "Cache-Control": "no-store",
                "X-Content-Type-Options": "nosniff",
                "X-Stratakv-Process": re.sub(r"[^\x20-\x7e]", "?", server.name),
                "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline';"
                " connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
            }
            if status == 401:
                headers["WWW-Authenticate"] = 'Bearer realm="stratakv"'
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            """Nothing: a line for each scrape tells nobody anything."""

    return Handler


def _ask(path: Path, target: str, token: str | None) -> tuple[str, str]:
    """The name and the answer of another process."""
    link = http.client.HTTPConnection("localhost", timeout=_SIBLING_S)
    link.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        link.sock.settimeout(_SIBLING_S)
        link.sock.connect(str(path))
        link.request("GET", target, headers={"Authorization": f"Bearer {token}"} if token else {})
        answer = link.getresponse()
        body = answer.read().decode()
        if answer.status != 200:
            raise OSError(f"{path.name} answers {answer.status}")
        return answer.headers.get("X-Stratakv-Process", path.stem), body
    finally:
        link.close()
