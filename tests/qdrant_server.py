"""A server of Qdrant's REST protocol around Qdrant's own engine, as far as it is asked here.

Collections lie in a folder, a shard each, and outlive a kill. ``POST /collections/<name>/optimize`` builds the index,
which the real server does by itself.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import socketserver
import subprocess
import sys
import threading
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from servers import free_port, wait_for_port


class QdrantServer:
    """The server as a process of its own, on a free port."""

    def __init__(self, folder: Path, api_key: str | None = None) -> None:
        self.folder, self.api_key, self.port = folder, api_key, free_port()
        self.start()

    def start(self) -> None:
        command = [sys.executable, __file__, str(self.port), str(self.folder), self.api_key or ""]
        self.process = subprocess.Popen(command)
        wait_for_port(self.port)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"


@contextlib.contextmanager
def qdrant(folder: Path, api_key: str | None = None) -> Iterator[QdrantServer]:
    server = QdrantServer(folder, api_key)
    try:
        yield server
    finally:
        server.kill()


class Refused(Exception):
    """An answer that is none: status and message."""


class Collection:
    """A shard of the engine, and how it was made."""

    def __init__(self, folder: Path, made: dict[str, Any] | None) -> None:
        import qdrant_edge as engine

        self.engine, self.lock = engine, threading.Lock()
        settings = folder / "made.json"
        if made is None:
            self.vectors = json.loads(settings.read_text())
            self.shard = engine.EdgeShard.load(str(folder / "shard"))
            return
        self.vectors = made["vectors"]
        (folder / "shard").mkdir(parents=True)
        distance = getattr(engine.Distance, self.vectors["distance"])
        vectors = engine.EdgeVectorParams(size=self.vectors["size"], distance=distance)
        self.shard = engine.EdgeShard.create(str(folder / "shard"), engine.EdgeConfig(vectors=vectors))
        self.shard.flush()
        settings.write_text(json.dumps(self.vectors))

    def update(self, name: str, argument: Any, *more: Any) -> dict[str, Any]:
        with self.lock:
            self.shard.update(getattr(self.engine.UpdateOperation, name)(argument, *more))
        return {"operation_id": 0, "status": "completed"}

    def filter(self, body: dict[str, Any]) -> Any:
        e, asked = self.engine, body.get("filter") or {}
        if asked.keys() - {"must"}:
            raise Refused(400, f"unsupported filter {sorted(asked)}")
        conditions = []
        for each in asked.get("must", ()):
            match = each.get("match") and e.MatchValue(each["match"]["value"])
            within = each.get("range") and e.RangeFloat(**each["range"])
            conditions.append(e.FieldCondition(key=each["key"], match=match, range=within))
        return e.Filter(must=conditions) if conditions else None

    def answer(self, method: str, path: str, body: dict[str, Any]) -> Any:
        e = self.engine
        match method, path:
            case "GET", "":
                return self.described()
            case "PUT", "/index":
                kind = getattr(e.PayloadSchemaType, body["field_schema"].capitalize())
                return self.update("create_field_index", body["field_name"], kind)
            case "PUT", "/points":
                points = body.get("points") or [
                    {"id": point, "vector": vector, "payload": payload}
                    for point, vector, payload in zip(
                        *(body["batch"][f] for f in ("ids", "vectors", "payloads")), strict=True
                    )
                ]
                if any(len(point["vector"]) != self.vectors["size"] for point in points):
                    raise Refused(400, "Wrong input: Vector dimension error")
                made = [e.Point(id=uuid.UUID(p["id"]), vector=p["vector"], payload=p["payload"]) for p in points]
                return self.update("upsert_points", made)
            case "POST", "/points/query":
                ef = (body.get("params") or {}).get("hnsw_ef")
                request = e.QueryRequest(
                    params=e.SearchParams(hnsw_ef=ef),
                    limit=body["limit"],
                    query=e.Query.Nearest(body["query"]["nearest"]),
                    filter=self.filter(body),
                    score_threshold=body.get("score_threshold"),
                    with_payload=body["with_payload"],
                )
                return {"points": [self.scored(point) for point in self.shard.query(request)]}
            case "POST", "/points/count":
                return {"count": self.shard.count(e.CountRequest(exact=True, filter=self.filter(body)))}
            case "POST", "/points/delete" if "points" in body:
                return self.update("delete_points", [uuid.UUID(point) for point in body["points"]])
            case "POST", "/points/delete":
                return self.update("delete_points_by_filter", self.filter(body))
            case "POST", "/optimize":
                with self.lock:
                    return self.shard.optimize()
        raise Refused(404, f"unsupported {method} {path}")

    def scored(self, point: Any) -> dict[str, Any]:
        return {"id": str(point.id), "version": point.version, "score": point.score, "payload": point.payload}

    def described(self) -> dict[str, Any]:
        info = self.shard.info()
        return {
            "status": "green",
            "optimizer_status": "ok",
            "segments_count": info.segments_count,
            "points_count": info.points_count,
            "indexed_vectors_count": info.indexed_vectors_count,
            "payload_schema": {name: {"data_type": "keyword", "points": 0} for name in info.payload_schema},
            "config": {
                "params": {"vectors": self.vectors},
                "hnsw_config": {"m": 16, "ef_construct": 100, "full_scan_threshold": 10000},
                "optimizer_config": {"default_segment_number": 0, "flush_interval_sec": 5},
            },
        }


class Collections:
    """All of them, by name."""

    def __init__(self, folder: Path, api_key: str) -> None:
        self.folder, self.api_key, self.lock = folder, api_key, threading.Lock()
        self.by_name = {each.parent.name: Collection(each.parent, None) for each in folder.glob("*/made.json")}

    def answer(self, method: str, path: str, body: dict[str, Any], api_key: str | None) -> Any:
        if self.api_key and api_key != self.api_key:
            raise Refused(401, "Must provide an API key or an Authorization bearer token")
        found = re.fullmatch(r"/collections/([\w-]+)(/.*)?", path)
        if found is None:
            raise Refused(404, f"unsupported {method} {path}")
        name, rest = found[1], found[2] or ""
        if rest == "/exists":
            return {"exists": name in self.by_name}
        with self.lock:
            if (method, rest) == ("PUT", ""):
                if name in self.by_name:
                    raise Refused(409, f"Wrong input: Collection `{name}` already exists!")
                self.by_name[name] = Collection(self.folder / name, body)
                return True
            if (method, rest) == ("DELETE", ""):
                gone = self.by_name.pop(name, None)
                if gone is not None:
                    gone.shard.close()
                    os.replace(self.folder / name, self.folder / f".gone-{uuid.uuid4()}")
                return gone is not None
        if name not in self.by_name:
            raise Refused(404, f"Not found: Collection `{name}` doesn't exist!")
        return self.by_name[name].answer(method, rest, body)


def serve(port: int, folder: str, api_key: str) -> None:
    collections = Collections(Path(folder), api_key)

    # The library's own handler of HTTP takes as long as the engine.
    class Handler(socketserver.StreamRequestHandler):
        disable_nagle_algorithm = True

        def handle(self) -> None:
            with contextlib.suppress(OSError):
                while line := self.rfile.readline():
                    self.respond(*line.decode().split()[:2])

        def respond(self, method: str, target: str) -> None:
            headers = {}
            while header := self.rfile.readline().decode().strip():
                name, _, value = header.partition(":")
                headers[name.lower()] = value.strip()
            text = self.rfile.read(int(headers.get("content-length", 0)))
            try:
                body = json.loads(text) if text else {}
                said = {"result": collections.answer(method, target.partition("?")[0], body, headers.get("api-key"))}
                status = 200
            except Refused as refused:
                status, said = refused.args[0], {"status": {"error": refused.args[1]}}
            except Exception as error:
                status, said = 500, {"status": {"error": f"Service internal error: {error!r}"}}
            text = json.dumps({"time": 0.0, "status": "ok"} | said).encode()
            head = f"HTTP/1.1 {status} -\r\nContent-Type: application/json\r\nContent-Length: {len(text)}\r\n\r\n"
            self.wfile.write(head.encode() + text)

    class Server(socketserver.ThreadingTCPServer):
        daemon_threads = True
        allow_reuse_address = True
        request_queue_size = 64

    Server(("127.0.0.1", port), Handler).serve_forever()


if __name__ == "__main__":
    serve(int(sys.argv[1]), sys.argv[2], sys.argv[3])
