"""A real Prometheus reads a store that serves and suffers; every expression of dashboards and rules finds something."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import re
import shutil
import subprocess
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import promql_parser
import pytest
import yaml

import stratakv
from servers import free_port, redis
from stores import config, geometry, kv_of, loaded, tokens_of
from stratakv.observe.metrics import METRICS

DEPLOY = Path(__file__).parents[2] / "deploy"
TOKEN = "sesame"
SHAPE = geometry(block_tokens=8, head_dim=32)
PROMPT = 128
# The store is served until it was read so often, and once more after that.
READS = 8

# What is chosen on a dashboard, if nothing is; and windows that hold the whole run.
CHOSEN = {"instance": ".*", "process": ".*", "model": ".*", "tenant": ".*", "__rate_interval": "5m", "__range": "5m"}

# What this run does not bring about: the servers it needs are away, or the disk would have to fail.
STILL = {
    "stratakv_catalog_rows_total",
    "stratakv_index_refused_blocks_total",
    "stratakv_io_errors_total",
    "stratakv_lifted_bytes_total",
    "stratakv_lifted_hit_bytes_total",
    "stratakv_ssd_read_only",
}


def tool(name: str) -> str:
    return shutil.which(name) or pytest.skip(f"{name} is not installed (apt-get install prometheus)")


class Prometheus:
    """One of its own, in a folder that is thrown away."""

    def __init__(self, folder: Path, configuration: Path) -> None:
        self.url = f"http://127.0.0.1:{free_port()}"
        told = {"config.file": configuration, "storage.tsdb.path": folder / "data", "log.level": "warn"}
        told["web.listen-address"] = self.url.removeprefix("http://")
        command = [tool("prometheus"), *(f"--{name}={value}" for name, value in told.items())]
        self.log = folder / "log"
        # When it is asked about, if not now: the end of the run. And its rules then.
        self.at: float | None = None
        self.groups: list[dict[str, Any]] = []
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log)
        end = time.monotonic() + 20
        while True:
            with contextlib.suppress(OSError):
                self.get("/-/ready")
                return
            assert self.process.poll() is None, self.log.read_text()
            assert time.monotonic() < end, self.log.read_text()
            time.sleep(0.02)

    def get(self, path: str, **query: str) -> str:
        with urllib.request.urlopen(f"{self.url}{path}?{urllib.parse.urlencode(query)}", timeout=20) as answer:
            return answer.read().decode()

    def api(self, path: str, **query: str) -> Any:
        """What the API answers; an expression that it does not take fails with what it says."""
        try:
            answer = json.loads(self.get(f"/api/v1/{path}", **query))
        except urllib.error.HTTPError as error:
            raise AssertionError(f"{query}: {error.read().decode()}") from None
        assert answer["status"] == "success"
        assert not answer.get("warnings")
        return answer["data"]

    def ask(self, expression: str) -> dict[tuple[tuple[str, str], ...], float]:
        """Values by their labels; of a number one without labels."""
        found = self.api("query", query=expression, **({} if self.at is None else {"time": f"{self.at:.3f}"}))
        if found["resultType"] == "scalar":
            return {(): float(found["result"][1])}
        return {tuple(sorted(row["metric"].items())): float(row["value"][1]) for row in found["result"]}

    def reads(self) -> float:
        return sum(self.ask('count_over_time(up{job="stratakv"}[5m])').values())

    def close(self) -> None:
        self.process.kill()
        self.process.wait()


def adapted(folder: Path, address: str) -> Path:
    """deploy/prometheus.yml as it is, but for where the store is, and how often it is read."""
    settings = yaml.safe_load((DEPLOY / "prometheus.yml").read_text(encoding="utf-8"))
    settings["global"] = {"scrape_interval": "1s", "scrape_timeout": "1s", "evaluation_interval": "1s"}
    settings["rule_files"] = [str(DEPLOY / name) for name in settings["rule_files"]]
    (job,) = settings["scrape_configs"]
    job["static_configs"] = [{"targets": [urllib.parse.urlsplit(address).netloc]}]
    job["authorization"]["credentials_file"] = str(folder / "token")
    (folder / "token").write_text(TOKEN)
    made = folder / "prometheus.yml"
    made.write_text(yaml.safe_dump(settings))
    return made


def put(cache: stratakv.ModelCache, seed: int, tenant: str = "") -> None:
    tokens = tokens_of(seed, PROMPT)
    cache.put(tokens, kv_of(tokens, cache.geometry), layout="LKHND", tenant=tenant)


def serve(caches: stratakv.CacheManager, round_: int) -> None:
    """Hits of each tier, misses of all kinds, of three models and as many tenants; more comes than RAM and SSD hold."""
    for name in ("plain", "coded"):
        cache = caches[name]
        for n in range(6):
            # The latest, those of a while ago, and some that nobody has yet.
            for seed in (round_ * 6 + n, max(round_ - 3, 0) * 6 + n, n):
                loaded(cache, tokens_of(seed, PROMPT), tenant=f"tenant{n % 2}")
            put(cache, round_ * 6 + n, tenant=f"tenant{n % 2}")
            # So often that a sample of what is asked for soon tells what any cache could find.
            for _ in range(40):
                cache.match(tokens_of(round_ * 6 + n, PROMPT), tenant=f"tenant{n % 2}").release()
        put(cache, 100_000 + round_, tenant="bounded")
        loaded(cache, tokens_of(200_000 + round_, PROMPT))
    # Values that fit no scale.
    tokens = tokens_of(300_000 + round_, PROMPT)
    caches["coded"].put(tokens, np.nan * kv_of(tokens, SHAPE), layout="LKHND")
    loaded(caches["shared"], tokens_of(round_ % 40, PROMPT))
    put(caches["plain"], 400_000 + round_, tenant="short")
    caches["plain"].drop(tenant="short")
    # An engine that computes at once, and one that does not.
    caches["coded"].set_prefill_rate(1e12 if round_ % 2 else 1000)


def hurt(folder: Path) -> None:
    """Every second byte range of the records that are there changes."""
    for path in folder.rglob("*"):
        if not path.is_file() or path.stat().st_size < 1 << 20:
            continue
        with path.open("r+b") as file:
            for at in range(1 << 16, path.stat().st_size, 8192):
                file.seek(at)
                file.write(b"damage")


def store(folder: Path, url: str) -> stratakv.Config:
    """All tiers, of which two servers are away; an address that processes share, with a token."""
    away = free_port()
    # Of a path that is short enough for a socket.
    share = folder / "s"
    return dataclasses.replace(
        config(folder / "store", ram="6MiB", capacity_bytes="12MiB", segment_bytes="1MiB", secret="x"),
        dragonfly=stratakv.DragonflyConfig(url=url),
        postgres=stratakv.PostgresConfig(url=f"postgresql://x@127.0.0.1:{away}/x", deadline_s=0.3),
        qdrant=stratakv.QdrantConfig(url=f"http://127.0.0.1:{away}", deadline_s=0.3),
        observe=stratakv.ObserveConfig(listen="127.0.0.1:0", token=TOKEN, share=share, name="one"),
    )


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Prometheus, stratakv.CacheManager]]:
    """Prometheus and the store that it has read while that served."""
    tool("prometheus")
    folder = tmp_path_factory.mktemp("p")
    with redis(folder) as hot, contextlib.ExitStack() as stack:
        # What another node has computed.
        other = dataclasses.replace(
            config(None, ram="16MiB", secret="x"), dragonfly=stratakv.DragonflyConfig(url=hot.url)
        )
        with stratakv.open(other) as caches:
            cache = caches.register("shared", SHAPE)
            for seed in range(40):
                put(cache, seed)
            caches.flush()
        caches = stack.enter_context(stratakv.open(store(folder, hot.url)))
        caches.register("plain", SHAPE)
        caches.register("coded", SHAPE, ram_codec="fp16", cold_codec="int8_sym")
        caches.register("shared", SHAPE)
        for name in caches:
            caches[name].set_prefill_rate(1000)
        caches.set_quota({"ram": {"hard_bytes": "64KiB"}}, tenant="bounded")
        prometheus = Prometheus(folder, adapted(folder, str(caches.address)))
        stack.callback(prometheus.close)
        round_, hurt_, end = 0, False, time.monotonic() + 180
        while prometheus.reads() < READS:
            assert time.monotonic() < end, prometheus.log.read_text()
            serve(caches, round_)
            round_ += 1
            if not hurt_ and prometheus.reads() >= 3:
                hurt(folder / "store")
                hurt_ = True
        read = prometheus.reads()
        while prometheus.reads() == read:
            assert time.monotonic() < end
            time.sleep(0.05)
        prometheus.at, prometheus.groups = time.time(), prometheus.api("rules")["groups"]
        yield prometheus, caches


@pytest.fixture
def prometheus(run: tuple[Prometheus, stratakv.CacheManager]) -> Prometheus:
    return run[0]


def filled_in(text: str) -> str:
    """As Grafana does before it asks."""
    return re.sub(r"\$(\w+)", lambda found: CHOSEN[found[1]], text)


BOARDS = {path.stem: json.loads(path.read_text()) for path in sorted((DEPLOY / "grafana" / "dashboards").iterdir())}
PANELS = [
    pytest.param(panel, id=f"{name}: {panel['title']}")
    for name, board in BOARDS.items()
    for panel in board["panels"]
    if panel["type"] != "row"
]
RULES = [
    rule
    for group in yaml.safe_load((DEPLOY / "alerts.yml").read_text(encoding="utf-8"))["groups"]
    for rule in group["rules"]
]


@pytest.mark.parametrize("panel", PANELS)
def test_every_panel_finds_something(prometheus: Prometheus, panel: dict[str, Any]) -> None:
    for target in panel["targets"]:
        expression = filled_in(target["expr"])
        promql_parser.parse(expression)
        found = prometheus.ask(expression)
        assert [value for value in found.values() if math.isfinite(value)], expression
        # Each line can be told from the others; in a table by its labels.
        labels = re.findall(r"\{\{(\w+)\}\}", target["legendFormat"])
        assert panel["type"] == "table" or len({tuple(map(dict(at).get, labels)) for at in found}) == len(found)


@pytest.mark.parametrize("name", BOARDS)
def test_what_can_be_chosen_is_there(prometheus: Prometheus, name: str) -> None:
    for variable in BOARDS[name]["templating"]["list"]:
        if variable["type"] == "query":
            found = re.fullmatch(r"label_values\((.*), (\w+)\)", variable["query"]["query"])
            assert found is not None
            values = prometheus.api(f"label/{found[2]}/values", **{"match[]": filled_in(found[1])})
            assert values, variable["name"]


def compared(expression: Any) -> Iterator[Any]:
    """Of a condition, what is compared with a number: without that it finds something of a store that is well, too."""
    if isinstance(expression, promql_parser.ParenExpr):
        yield from compared(expression.expr)
    elif isinstance(expression, promql_parser.BinaryExpr) and str(expression.op) in ("and", "or", "unless"):
        yield from compared(expression.lhs)
        yield from compared(expression.rhs)
    elif isinstance(expression, promql_parser.BinaryExpr) and str(expression.op) in ("==", "!=", ">", "<", ">=", "<="):
        assert isinstance(expression.rhs, promql_parser.NumberLiteral)
        yield expression.lhs
    else:
        yield expression


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.get("alert") or rule["record"])
def test_every_rule_finds_something(prometheus: Prometheus, rule: dict[str, Any]) -> None:
    expression = promql_parser.parse(rule["expr"])
    if "record" in rule:
        assert any(map(math.isfinite, prometheus.ask(rule["expr"]).values()))
        assert any(map(math.isfinite, prometheus.ask(rule["record"]).values()))
        return
    parts = list(compared(expression))
    assert parts != [expression], "an alert without a condition"
    for part in parts:
        assert any(map(math.isfinite, prometheus.ask(part.prettify()).values())), part.prettify()


def test_prometheus_has_no_trouble_with_the_rules_and_calls_for_the_damage(prometheus: Prometheus) -> None:
    rules = [rule for group in prometheus.groups for rule in group["rules"]]
    assert len(rules) == len(RULES)
    assert {(rule["health"], rule.get("lastError", "")) for rule in rules} == {("ok", "")}
    firing = {rule["name"] for rule in rules if rule.get("state") == "firing"}
    pending = {rule["name"] for rule in rules if rule.get("state") == "pending"}
    assert firing == {"StratakvCorruptBlocks"}
    assert {"StratakvDegraded", "StratakvBreakerOpen"} <= pending
    assert "StratakvDown" not in pending
    assert "err=" not in prometheus.log.read_text()


def test_in_every_scrape_it_adds_up(prometheus: Prometheus) -> None:
    for asked, hit, miss in (
        ("stratakv_asked_blocks_total", "stratakv_hit_blocks_total", "stratakv_miss_blocks_total"),
        ("stratakv_tier_asked_blocks_total", "stratakv_tier_hit_blocks_total", "stratakv_tier_miss_blocks_total"),
        ("stratakv_tier_in_bytes_total", "stratakv_tier_out_bytes_total", "stratakv_used_bytes"),
    ):
        rest = f"sum({asked}) - sum({hit}) - sum({miss})"
        assert list(prometheus.ask(f"max_over_time(abs({rest})[5m:1s])").values()) == [0]
    tenants = "sum(stratakv_tenant_asked_blocks_total) - sum(stratakv_asked_blocks_total)"
    assert list(prometheus.ask(f"max_over_time(abs({tenants})[5m:1s])").values()) == [0]


def test_everything_moves_but_what_needs_a_disk_or_servers_that_fail(prometheus: Prometheus) -> None:
    for metric in METRICS:
        name = metric.name + ("_count" if metric.kind == "histogram" else "")
        most = max(prometheus.ask(f"max_over_time({name}[5m])").values(), default=None)
        assert most is not None, name
        assert (most > 0) == (metric.name not in STILL), name


def test_the_text_is_as_prometheus_wants_it(run: tuple[Prometheus, stratakv.CacheManager]) -> None:
    _, caches = run
    for path in ("/metrics", "/metrics?alone"):
        request = urllib.request.Request(f"{caches.address}{path}", headers={"Authorization": f"Bearer {TOKEN}"})
        with urllib.request.urlopen(request) as answer:
            text = answer.read()
        checked = subprocess.run([tool("promtool"), "check", "metrics"], input=text, capture_output=True)
        assert (checked.returncode, checked.stdout + checked.stderr) == (0, b"")


@pytest.mark.parametrize(
    "check",
    [
        ["check", "rules", "--lint=all", "--lint-fatal", "alerts.yml"],
        ["check", "config", "--syntax-only", "prometheus.yml"],
        ["test", "rules", "alerts.test.yml"],
    ],
    ids=lambda check: " ".join(check[:2]),
)
def test_promtool_has_nothing_to_say_of_the_files(check: list[str]) -> None:
    done = subprocess.run([tool("promtool"), *check], cwd=DEPLOY, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_configuration_holds_with_all_that_it_names(tmp_path: Path) -> None:
    made = adapted(tmp_path, "http://127.0.0.1:9470")
    done = subprocess.run([tool("promtool"), "check", "config", str(made)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
