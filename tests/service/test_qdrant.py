"""Which prefixes are near: Qdrant's engine behind its protocol, and the library alone; no fault of it is an error."""

from __future__ import annotations

import contextlib
import gc
import json
import logging
import os
import signal
import ssl
import subprocess
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import qdrant_client
from qdrant_client import models

from qdrant_server import QdrantServer, qdrant
from servers import Proxy
from stores import tokens_of
from stratakv.config import Config, StoreConfig
from stratakv.embedding import token_embedding
from stratakv.errors import ConfigError, StoreError
from stratakv.sections import QdrantConfig
from stratakv.tiers.qdrant import Point, Qdrant

MODEL, OTHER = b"m" * 16, b"n" * 16
SPACE, ELSEWHERE = b"s" * 16, b"t" * 16
TOKENS = 256
SECRET = StoreConfig(secret="shared")


def vector_of(seed: int, *, kept: int = TOKENS) -> np.ndarray:
    """Of a prompt, of which so many tokens are kept and the rest are others."""
    tokens = np.concatenate((tokens_of(seed, TOKENS)[:kept], tokens_of(seed + 10_000, TOKENS - kept)))
    return token_embedding(tokens, 512, b"salt")


def point(seed: int, **changes: object) -> Point:
    chain = tuple(seed.to_bytes(8, "big") + n.to_bytes(8, "big") for n in range(16))
    usual = {"name": chain[-1], "model": MODEL, "space": SPACE, "vector": vector_of(seed), "chain": chain}
    return Point(**usual | {"tokens": TOKENS, "stored_at": float(seed)} | changes)


def until(holds: Callable[[], object], seconds: float = 10.0) -> None:
    """What a server does soon; one of our own has done it."""
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.05)


@contextlib.contextmanager
def tier(**more: object) -> Iterator[Qdrant]:
    # Far from what it takes: a disk may be busy with something else.
    opened = Qdrant(QdrantConfig(**{"deadline_s": 30.0} | more))
    try:
        yield opened
    finally:
        opened.close()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[QdrantServer]:
    with qdrant(tmp_path_factory.mktemp("qdrant")) as running:
        yield running


@pytest.fixture(params=["server", "folder", "memory"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[dict[str, object]]:
    """Settings of a collection of its own."""
    name = f"test-{uuid.uuid4()}"
    if request.param == "server":
        url = os.environ.get("STRATAKV_TEST_QDRANT_URL") or request.getfixturevalue("server").url
        yield {"url": url, "collection": name}
        qdrant_client.QdrantClient(url=url, check_compatibility=False).delete_collection(name)
    else:
        yield {"path": ":memory:" if request.param == "memory" else tmp_path / "points", "collection": name}


def test_the_nearest_come_first_with_the_names_of_their_blocks(place: dict[str, object]) -> None:
    with tier(**place) as one:
        assert one.store([point(seed) for seed in range(300)])
        until(lambda: one.count() == 300)
        near, reason = one.suggest(MODEL, SPACE, vector_of(7, kept=230))
        assert reason is None
        assert [(each.name, each.chain, each.tokens) for each in near] == [(point(7).name, point(7).chain, TOKENS)]
        assert near[0].score == pytest.approx(vector_of(7) @ vector_of(7, kept=230), abs=1e-3)
        assert one.suggest(MODEL, SPACE, vector_of(5000)) == ([], None), "nothing is near"
        near, _ = one.suggest(MODEL, SPACE, vector_of(7), limit=5, least_score=-1.0)
        assert len(near) == 5
        assert near[0].score == pytest.approx(1.0, abs=1e-3)
        assert [each.score for each in near] == sorted((each.score for each in near), reverse=True)
        stats = one.stats()
        assert (stats.asked, stats.near_points, stats.malformed_points, stats.written_points) == (3, 6, 0, 300)
        assert (stats.guard.state, stats.guard.errors, stats.misfit) == ("closed", 0, None)


def test_what_is_stored_again_is_one_point_and_keeps_its_first_1024_blocks(place: dict[str, object]) -> None:
    chain = tuple(n.to_bytes(16, "big") for n in range(2000))
    with tier(**place) as one:
        assert one.store([point(1)])
        assert one.store([point(1, chain=chain)])
        until(lambda: (found := one.suggest(MODEL, SPACE, vector_of(1))[0]) and found[0].chain == chain[:1024])
        assert one.count() == 1


def test_models_and_spaces_never_see_each_others(place: dict[str, object]) -> None:
    with tier(**place) as one:
        mine = [(MODEL, SPACE), (MODEL, ELSEWHERE), (OTHER, ELSEWHERE)]
        assert one.store(
            [point(1, name=bytes([n]) * 16, model=model, space=space) for n, (model, space) in enumerate(mine)]
        )
        until(lambda: one.count() == 3)
        for n, (model, space) in enumerate(mine):
            near, _ = one.suggest(model, space, vector_of(1), limit=10)
            assert [each.name for each in near] == [bytes([n]) * 16]
        assert one.suggest(OTHER, SPACE, vector_of(1), least_score=-1.0) == ([], None)


def test_points_are_forgotten_by_model_and_by_age(place: dict[str, object]) -> None:
    with tier(**place) as one:
        assert one.store([point(n, model=(MODEL, OTHER)[n % 2]) for n in range(20)])
        until(lambda: one.count() == 20)
        assert one.forget_before(None, 4.0)
        until(lambda: one.count() == 16)
        assert one.forget_before(OTHER, 10.0)
        until(lambda: one.count() == 13)
        assert one.forget(OTHER)
        until(lambda: one.count() == 8)
        assert one.suggest(OTHER, SPACE, vector_of(11)) == ([], None)
        assert len(one.suggest(MODEL, SPACE, vector_of(10))[0]) == 1


def test_a_collection_of_another_dimension_is_said_and_never_written(
    place: dict[str, object], caplog: pytest.LogCaptureFixture
) -> None:
    if place.get("path") == ":memory:":
        pytest.skip("it is gone when the tier is closed")
    with tier(**place, dimension=256) as one:
        assert one.store([point(1, vector=np.ones(256, np.float32))])
        until(lambda: one.count() == 1)
    with tier(**place) as other:
        assert "vectors of dimension 256, compared by Cosine, expected dimension 512" in caplog.text
        assert not other.store([point(2)])
        assert other.suggest(MODEL, SPACE, vector_of(2)) == ([], "misfit")
        assert other.stats().misfit in caplog.text
    with pytest.raises(ConfigError, match=r"set qdrant\.dimension to what it has"), tier(**place, required=True):
        pass
    with tier(**place, dimension=256) as one:
        assert one.count() == 1


def test_vectors_that_do_not_fit_are_not_sent(place: dict[str, object]) -> None:
    nan = vector_of(1)
    nan[5] = np.nan
    with tier(**place) as one:
        assert one.store([point(1, vector=nan), point(2, vector=np.ones(9, np.float32)), point(3)])
        until(lambda: one.count() == 1)
        assert (one.stats().written_points, one.stats().unfit_points) == (1, 2)
        assert one.suggest(MODEL, SPACE, nan) == ([], "error")
        assert one.stats().guard.errors == 0


def test_points_outlive_the_store(place: dict[str, object]) -> None:
    if place.get("path") == ":memory:":
        pytest.skip("they do not")
    with tier(**place) as one:
        assert one.store([point(1)])
        until(lambda: one.count() == 1)
    with tier(**place, required=True) as one:
        assert one.suggest(MODEL, SPACE, vector_of(1))[0][0].chain == point(1).chain


# The library leaves its lock file to the collector.
@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_a_folder_that_another_holds_is_said_or_refused(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with tier(path=tmp_path) as one:
        with tier(path=tmp_path) as two:
            assert "qdrant does not answer" in caplog.text
            assert two.suggest(MODEL, SPACE, vector_of(1)) == ([], "error")
        with pytest.raises(StoreError, match="or do not require it"), tier(path=tmp_path, required=True):
            pass
        assert one.store([point(1)])
    gc.collect()


def right() -> dict[str, object]:
    return {
        "model": MODEL.hex(),
        "space": SPACE.hex(),
        "chain": "AAAAAAAAAAAAAAAAAAAAAA==",
        "tokens": 9,
        "stored_at": 1.0,
    }


MALFORMED = [
    *({}, {"chain": None}, {"chain": 7}, {"chain": ""}, {"chain": "AAAA"}, {"chain": "é" * 24}, {"chain": "!" * 24}),
    *({"chain": ["AAAAAAAAAAAAAAAAAAAAAA=="]}, {"chain": "AAAA" * 16 * 1025}),
    *({"tokens": "9"}, {"tokens": -1}, {"tokens": 2**40}, {"tokens": True}, {"tokens": 9.5}, {"tokens": None}),
]


def test_points_that_somebody_else_wrote_are_left_out(place: dict[str, object]) -> None:
    with tier(**place) as one:
        client = one._client()
        payloads = [right(), *(right() | each for each in MALFORMED if each), {}]
        ids = [str(uuid.UUID(int=n + 1)) for n in range(len(payloads))]
        one._calls.submit(
            client.upsert,
            place["collection"],
            models.Batch(ids=ids, vectors=[vector_of(1).tolist()] * len(ids), payloads=payloads),
        ).result()
        near, reason = one.suggest(MODEL, SPACE, vector_of(1), limit=100)
        assert ([each.name for each in near], reason) == ([uuid.UUID(int=1).bytes], None)
        # A point without model and space is not asked for.
        assert (one.stats().near_points, one.stats().malformed_points) == (len(payloads) - 1, len(payloads) - 2)


class Liar:
    """A server that says what it is told to: as a text, or pieces of one, slowly."""

    def __init__(self) -> None:
        info = {"params": {"vectors": {"size": 512, "distance": "Cosine"}}, "hnsw_config": {}, "optimizer_config": {}}
        info["hnsw_config"] = {"m": 16, "ef_construct": 100, "full_scan_threshold": 1}
        info["optimizer_config"] = {"default_segment_number": 0, "flush_interval_sec": 5}
        indexes = {name: {"data_type": "keyword", "points": 0} for name in ("model", "space")}
        described = {"status": "green", "optimizer_status": "ok", "segments_count": 1, "config": info}
        self.said = {"exists": json.dumps({"result": {"exists": True}})}
        self.said["stratakv"] = json.dumps({"result": described | {"payload_schema": indexes}})
        self.slow = False
        liar = self

        class Handler(BaseHTTPRequestHandler):
            def answer(self) -> None:
                self.rfile.read(int(self.headers.get("Content-Length", 0)))
                text = liar.said.get(self.path.partition("?")[0].rpartition("/")[2], "{}").encode()
                self.send_response(200)
                self.send_header("Content-Length", str(len(text)))
                self.end_headers()
                with contextlib.suppress(OSError):
                    for byte in text if liar.slow else ():
                        self.wfile.write(bytes([byte]))
                        time.sleep(0.02)
                    self.wfile.write(b"" if liar.slow else text)

            def log_message(self, *_: object) -> None:
                pass

            do_GET = do_POST = do_PUT = answer

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_address[1]}"
        threading.Thread(target=self.http.serve_forever, daemon=True).start()

    def points(self, *points: object) -> None:
        self.said["query"] = json.dumps({"result": {"points": points}})


@pytest.fixture
def liar() -> Iterator[Liar]:
    lying = Liar()
    yield lying
    lying.http.shutdown()
    lying.http.server_close()


def test_a_server_that_lies_is_not_believed(liar: Liar) -> None:
    usual = {"id": str(uuid.UUID(int=1)), "version": 0, "score": 0.9, "payload": right()}
    foreign = [right() | {"space": ELSEWHERE.hex()}, right() | {"model": OTHER.hex()}, right() | {"space": None}]
    lies = [
        *(usual | {"payload": payload} for payload in foreign),
        *(usual | {"score": score} for score in (0.4, float("nan"))),
        *(usual | {"id": 7}, usual | {"id": "x"}, usual | {"payload": None}),
    ]
    with tier(url=liar.url, required=True) as one:
        liar.points(usual)
        assert len(one.suggest(MODEL, SPACE, vector_of(1))[0]) == 1
        for lie in lies:
            liar.points(lie)
            assert one.suggest(MODEL, SPACE, vector_of(1))[0] == [], lie
        liar.points(*[usual] * 1000)
        assert len(one.suggest(MODEL, SPACE, vector_of(1))[0]) == 3
    for text in ("", "[", "[1]", "null", '{"result": 7}', "[" * 100_000, '{"result": {"points": {}}}', "\xff"):
        with tier(url=liar.url) as one:
            liar.said["query"] = text
            assert one.suggest(MODEL, SPACE, vector_of(1)) == ([], "error"), text


def test_a_server_that_trickles_is_a_miss_by_the_deadline(liar: Liar) -> None:
    liar.points(*[{"id": 1, "version": 0, "score": 0.9, "payload": right()}] * 10)
    with tier(url=liar.url, required=True, deadline_s=0.2) as one:
        liar.slow = True
        for _ in range(3):
            started = time.monotonic()
            assert one.suggest(MODEL, SPACE, vector_of(1)) == ([], "timeout")
            assert time.monotonic() - started < 0.2 + 0.3
        liar.slow = False
        liar.points({"id": str(uuid.UUID(int=1)), "version": 0, "score": 0.9, "payload": right()})
        until(lambda: len(one.suggest(MODEL, SPACE, vector_of(1))[0]) == 1)


@pytest.mark.parametrize("mode", ["blackhole", "reset", "refuse", "truncate", "latency", "throttle"])
def test_a_network_that_fails_is_a_miss_within_the_deadline_and_recovers(server: QdrantServer, mode: str) -> None:
    proxy = Proxy(server.url)
    try:
        with tier(url=proxy.url, collection=f"proxy-{mode}", required=True, deadline_s=0.3) as one:
            assert one.store([point(1)])
            assert len(one.suggest(MODEL, SPACE, vector_of(1))[0]) == 1
            proxy.most_bytes, proxy.latency_s, proxy.bytes_per_s = 100, 0.4, 1e3
            proxy.mode = mode
            proxy.cut()
            took, reasons = [], set()
            for _ in range(6):
                started = time.monotonic()
                near, reason = one.suggest(MODEL, SPACE, vector_of(1))
                took.append(time.monotonic() - started)
                assert near == []
                reasons.add(reason)
                assert not one.store([point(2)])
            assert reasons <= {"error", "timeout", "open"}
            assert "open" in reasons
            assert max(took) < 0.3 + 0.3, took
            assert one.stats().guard.state in ("open", "half_open")
            assert one.count() is None
            assert not one.forget(OTHER)
            proxy.mode = "pass"
            until(lambda: one.store([point(2)]))
            assert len(one.suggest(MODEL, SPACE, vector_of(1))[0]) == 1
            assert one.stats().guard.state == "closed"
    finally:
        proxy.close()


def test_a_server_that_stops_dies_and_comes_back_costs_hints_alone(tmp_path: Path) -> None:
    with qdrant(tmp_path) as server, tier(url=server.url, deadline_s=0.3, required=True) as one:
        assert one.store([point(n) for n in range(100)])
        os.kill(server.process.pid, signal.SIGSTOP)
        for reason in ("timeout", "timeout", "timeout", "open"):
            started = time.monotonic()
            assert one.suggest(MODEL, SPACE, vector_of(1)) == ([], reason)
            assert time.monotonic() - started < 0.3 + 0.3
        os.kill(server.process.pid, signal.SIGCONT)
        until(lambda: one.suggest(MODEL, SPACE, vector_of(1))[1] is None)
        server.kill()
        for n in range(5):
            assert one.suggest(MODEL, SPACE, vector_of(1))[1] in ("error", "open")
            assert not one.store([point(n)])
        server.start()
        until(lambda: one.suggest(MODEL, SPACE, vector_of(1))[1] is None)
        assert one.count() == 100, "it keeps what it took"
        assert len(one.suggest(MODEL, SPACE, vector_of(99))[0]) == 1


def test_a_collection_that_is_lost_is_made_again(server: QdrantServer) -> None:
    with tier(url=server.url, collection="lost", required=True) as one:
        assert one.store([point(1)])
        qdrant_client.QdrantClient(url=server.url, check_compatibility=False).delete_collection("lost")
        assert not one.store([point(2)])
        assert one.store([point(2)])
        assert one.count() == 1


def test_a_key_is_needed_and_never_shown(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    with qdrant(tmp_path, api_key="hush-hush") as server:
        for key in (None, "wrong-word"):
            with tier(url=server.url, api_key=key) as one:
                assert not one.store([point(1)])
                assert one.stats().guard.last_error == "PermissionError"
                shown = caplog.text + repr(Config(store=SECRET, qdrant=one.config)) + repr(one.stats())
                assert "wrong-word" not in shown
        with pytest.raises(StoreError) as refused, tier(url=server.url, api_key="wrong-word", required=True):
            pass
        assert "wrong-word" not in str(refused.value) + repr(refused.value)
        caplog.clear()
        with tier(url=server.url, api_key="hush-hush", required=True) as one:
            assert "is sent to a http:// address" in caplog.text
            assert one.store([point(1)])
            assert one.count() == 1
        assert "hush" not in caplog.text + repr(one.config) + repr(one.stats())


def test_tls_is_verified(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    subprocess.run(
        [
            *(
                "openssl",
                "req",
                "-x509",
                "-newkey",
                "ec",
                "-pkeyopt",
                "ec_paramgen_curve:P-256",
                "-nodes",
                "-days",
                "1",
            ),
            *("-subj", "/CN=test", "-addext", "subjectAltName=IP:127.0.0.1", "-keyout", key, "-out", certificate),
        ],
        check=True,
        capture_output=True,
    )
    liar = Liar()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    liar.http.handle_error = lambda *_: None
    liar.http.socket = context.wrap_socket(liar.http.socket, server_side=True)
    try:
        url = liar.url.replace("http:", "https:")
        liar.said["count"] = json.dumps({"result": {"count": 7}})
        with tier(url=url, ca_file=certificate, api_key="hush-hush", required=True) as one:
            assert one.count() == 7
            assert "http://" not in caplog.text
        with tier(url=url) as one:
            assert one.count() is None
            assert one.stats().guard.last_error == "ConnectError"
        for wrong in (tmp_path / "none.pem", key):
            with (
                pytest.raises(ConfigError, match=r"qdrant\.ca_file is .*, and cannot be used"),
                tier(url=url, ca_file=wrong),
            ):
                pass
    finally:
        liar.http.shutdown()
        liar.http.server_close()


def test_a_server_that_is_not_there_is_said_once_or_refused_if_it_is_required(caplog: pytest.LogCaptureFixture) -> None:
    with tier(url="http://127.0.0.1:1", deadline_s=0.2) as one:
        assert "qdrant does not answer (ConnectError)" in caplog.text
        assert one.suggest(MODEL, SPACE, vector_of(1)) == ([], "error")
        assert not one.store([point(1)])
    with pytest.raises(StoreError, match="start the server, or do not require it"):
        Qdrant(QdrantConfig(url="http://127.0.0.1:1", required=True))


def test_a_tier_that_is_closed_gives_nothing(place: dict[str, object]) -> None:
    with tier(**place) as one:
        pass
    assert one.suggest(MODEL, SPACE, vector_of(1)) == ([], "error")
    assert not one.store([point(1)])


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"url": "grpc://host"}, "begins with 'grpc', expected http:// or https://"),
        ({"url": "host:6333"}, "qdrant.url begins with 'host:6333'"),
        ({"url": "http://user:word@host"}, "qdrant.url holds a user"),
        ({"url": 7}, "qdrant.url is no text"),
        ({"api_key": 7}, "qdrant.api_key is no text"),
        ({"url": "http://host", "path": "here"}, "expected one of them"),
        ({"dimension": 7}, "qdrant.dimension is 7, expected an integer from 8"),
        ({"dimension": 512.0}, "qdrant.dimension is 512.0"),
        ({"collection": "a/b"}, "qdrant.collection is 'a/b'"),
        ({"embedding": "words"}, "qdrant.embedding is 'words', expected 'tokens', 'text' or"),
        ({"deadline_s": 0}, "qdrant.deadline_s is 0"),
        ({"required": 1}, "qdrant.required is 1"),
        ({"prefetch_bytes": "many"}, "qdrant.prefetch_bytes is 'many'"),
        ({"prefetch_bytes": False}, "qdrant.prefetch_bytes is False"),
    ],
)
def test_settings_that_make_no_sense_are_refused(wrong: dict[str, object], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        QdrantConfig(**wrong)


def test_settings_come_from_the_environment() -> None:
    values = {
        "URL": "http://host:6333",
        "DIMENSION": "256",
        "DEADLINE_S": "0.5",
        "REQUIRED": "true",
        "PREFETCH_BYTES": "0",
    }
    environ = {f"STRATAKV_QDRANT_{key}": value for key, value in values.items()}
    config = Config.load(environ=environ | {"STRATAKV_STORE_SECRET": "shared"}).qdrant
    assert config == QdrantConfig(
        url="http://host:6333", dimension=256, deadline_s=0.5, required=True, prefetch_bytes=0
    )
    with pytest.raises(ConfigError, match=r"qdrant\.url is set and store\.secret is not"):
        Config.load(environ=environ)
