"""`stratakv top`, `stats` and `events`: what a running store says at its address (`observe.listen`)."""

from __future__ import annotations

import argparse
import http.client
import json
import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

from stratakv.config import Config
from stratakv.errors import ConfigError, StrataKVError
from stratakv.observe.explain import Explained, Stretch

if TYPE_CHECKING:
    import curses

__all__ = ["add_events", "add_explain", "add_stats", "add_top"]

_PATIENCE_S = 10.0
# How long an event follower rests.
_FOLLOW_S = 0.5


class NoAnswerError(StrataKVError):
    """Nobody answers at the address, or not what was asked for."""


def _add_address(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--url", metavar="URL", help="where it listens, as http://127.0.0.1:9470")
    parser.add_argument("--config", type=Path, metavar="FILE", help="its TOML file, which has observe.listen and token")
    parser.add_argument("--process", metavar="NAME", help="of several that share the address")


def add_top(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `stratakv top`."""
    _add_address(parser)
    parser.add_argument("--every", type=float, default=1.0, metavar="S", help="seconds between two looks (default: 1)")
    parser.add_argument("--once", action="store_true", help="print one look and end")
    parser.set_defaults(run=_guarded("top", _top))


def add_stats(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `stratakv stats`."""
    _add_address(parser)
    parser.add_argument("--json", action="store_true", help="all numbers, for programs")
    parser.set_defaults(run=_guarded("stats", _stats))


def add_events(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `stratakv events`."""
    _add_address(parser)
    parser.add_argument("--follow", action="store_true", help="go on with what comes")
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    parser.set_defaults(run=_guarded("events", _events))


def add_explain(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `stratakv explain`."""
    _add_address(parser)
    parser.add_argument("--tokens", required=True, metavar="FILE", help="token ids, as text or JSON; - reads them here")
    parser.add_argument("--model", metavar="NAME", help="name of the model; not needed where there is one")
    parser.add_argument("--adapter", default="", metavar="NAME")
    parser.add_argument("--tenant", default="", metavar="NAME")
    parser.add_argument("--json", action="store_true", help="for programs")
    parser.set_defaults(run=_guarded("explain", _explain))


def _guarded(name: str, run: Callable[[argparse.Namespace], int]) -> Callable[[argparse.Namespace], int]:
    def guarded(args: argparse.Namespace) -> int:
        try:
            return run(args)
        except (ConfigError, NoAnswerError) as error:
            print(f"stratakv {name}: {error}", file=sys.stderr)
            return 2
        except KeyboardInterrupt:
            return 0
        except BrokenPipeError:
            # Whoever read has enough.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 0

    return guarded


class _Store:
    """A store that runs, by its address."""

    def __init__(self, args: argparse.Namespace) -> None:
        observe = Config.load(args.config).observe
        url = args.url or (f"http://{observe.listen}" if observe.listen else None)
        if url is None:
            raise ConfigError("which store? Give --url, or --config with observe.listen, or STRATAKV_OBSERVE_LISTEN")
        if not url.startswith(("http://", "https://")):
            url = f"http://{url}"
        self.url, self._token, self._process = url.rstrip("/"), observe.token, args.process

    def get(self, path: str, body: object = None) -> Any:  # noqa: ANN401 - JSON
        """Raises NoAnswerError, if it gives none."""
        headers = {"Authorization": f"Bearer {self._token}"} if self._token else {}
        sent = None if body is None else json.dumps(body).encode()
        try:
            with urlopen(Request(f"{self.url}{path}", sent, headers), timeout=_PATIENCE_S) as answer:
                return json.load(answer)
        except HTTPError as error:
            said = error.read().decode(errors="replace").strip()
            hint = "; set observe.token (STRATAKV_OBSERVE_TOKEN)" if error.code == 401 else ""
            raise NoAnswerError(f"{self.url} answers {error.code}: {said}{hint}") from None
        except (URLError, OSError, http.client.HTTPException, ValueError) as error:
            reason = getattr(error, "reason", error)
            raise NoAnswerError(f"{self.url} does not answer: {reason}; is observe.listen set there?") from None

    def status(self) -> dict[str, Any]:
        """Of the process that is asked for, or the first."""
        found: dict[str, Any] = self.get("/status")
        if "processes" not in found:
            return found
        processes: dict[str, dict[str, Any]] = found["processes"]
        name = self._process or next(iter(processes))
        if name not in processes:
            raise NoAnswerError(f"process {name!r} is not there; there are {', '.join(sorted(processes))}")
        return processes[name]


# What people read.


def _bytes(value: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.3g} {unit}"
        value /= 1024
    return f"{value:.3g} TiB"


def _percent(part: float, whole: float) -> str:
    return f"{100 * part / whole:.1f} %" if whole else "-"


def _bar(part: float, whole: float, width: int) -> str:
    full = round(width * min(part / whole, 1.0)) if whole else 0
    return "█" * full + "░" * (width - full)


def _clean(text: str, width: int) -> str:
    """A name of any request, as one that moves no cursor."""
    shown = "".join(each if each.isprintable() else "�" for each in text)
    return shown if len(shown) <= width else shown[: width - 1] + "…"


def _lines(status: Mapping[str, Any], before: Mapping[str, Any] | None, width: int = 100) -> Iterator[str]:
    """A look at a store; rates need the look before."""
    total = status["total"]
    yield _clean(
        f"stratakv {status['version']}   process {status['process']}   up {status['uptime_s']:.0f} s"
        f"   {'degraded: ' + ', '.join(status['degraded']) if status['degraded'] else 'all well'}",
        width,
    )
    seconds = status["uptime_s"] - before["uptime_s"] if before else 0.0
    asked, hit = total["asked_blocks"], total["hit_blocks"]
    line = f"hit ratio {_percent(hit, asked)} since start"
    if before is not None and seconds > 0:
        was = before["total"]
        line += f", {_percent(hit - was['hit_blocks'], asked - was['asked_blocks'])} now"
        for name, what in (("matches", "matches"), ("loaded_tokens", "tokens loaded")):
            line += f"   {(total[name] - was[name]) / seconds:,.0f} {what}/s"
        for name, what in (("loaded_bytes", "load"), ("put_bytes", "put")):
            line += f"   {what} {_bytes((total[name] - was[name]) / seconds)}/s"
    yield line
    yield ""
    for tier in status["tiers"]:
        if tier["state"] == "off":
            continue
        name = f"{tier['name']:<10}"
        if "breaker" not in tier:
            capacity = tier["capacity_bytes"]
            bar = _bar(tier["used_bytes"], capacity, max(min(width - 70, 40), 10))
            yield (
                f"{name}{bar} {_bytes(tier['used_bytes']):>9} of {_bytes(capacity):<9}"
                f" {tier['blocks']:>9,} blocks   hits {_percent(tier['hit_blocks'], tier['asked_blocks'])}"
            )
        else:
            calls = f"{tier['calls']:,} calls, {tier['failed_calls']:,} failed"
            yield f"{name}{tier['state']}   breaker {tier['breaker']}   {calls}"
        if tier["state"] == "fails":
            yield f"          {_clean(str(tier.get('why')), width - 10)}"
    yield ""
    yield f"{'model':<30}{'hit ratio':>10}{'no end':>10}{'asked':>14}{'RAM':>11}{'SSD':>11}"
    for model in status["models"]:
        ceiling = "-" if model["hit_ceiling"] is None else _percent(model["hit_ceiling"], 1)
        yield (
            f"{_clean(model['name'], 29):<30}{_percent(model['hit_blocks'], model['asked_blocks']):>10}{ceiling:>10}"
            f"{model['asked_blocks']:>14,}{_bytes(model['tiers']['ram']['used_bytes']):>11}"
            f"{_bytes(model['tiers']['ssd']['used_bytes']):>11}"
        )
    if total["missed"]:
        yield ""
        missed = sorted(total["missed"].items(), key=lambda each: -each[1])
        yield "not found: " + ", ".join(f"{blocks:,} {reason}" for reason, blocks in missed)
    for line in status["advice"]:
        yield f"advice: {line}"


def _top(args: argparse.Namespace) -> int:
    store = _Store(args)
    if args.once or not sys.stdout.isatty():
        print("\n".join(_lines(store.status(), None)))
        return 0
    if not args.every > 0:
        raise ConfigError(f"--every is {args.every!r}, expected seconds above 0")
    import curses

    # What is wrong at the start is said on the terminal as it was.
    first = store.status()
    curses.wrapper(_watch, store, args.every, first)
    return 0


def _watch(screen: curses.window, store: _Store, every_s: float, status: dict[str, Any]) -> None:
    import curses

    curses.use_default_colors()
    curses.curs_set(0)
    before: dict[str, Any] | None = None
    failed = ""
    while True:
        height, width = screen.getmaxyx()
        screen.erase()
        for row, line in enumerate(_lines(status, before, width)):
            if row >= height - 1:
                break
            screen.addnstr(row, 0, line, width - 1, curses.A_BOLD if row == 0 else curses.A_NORMAL)
        screen.addnstr(height - 1, 0, failed or f"{store.url}   q quits", width - 1, curses.A_DIM)
        screen.refresh()
        until = time.monotonic() + every_s
        while (left := until - time.monotonic()) > 0:
            screen.timeout(max(int(1000 * left), 1))
            key = screen.getch()
            if key in (ord("q"), ord("Q"), 27):
                return
            if key == curses.KEY_RESIZE:
                break
        try:
            now, failed = store.status(), ""
        except NoAnswerError as error:
            failed = str(error)
            continue
        before, status = (status if now["pid"] == status["pid"] else None), now


def _stats(args: argparse.Namespace) -> int:
    status = _Store(args).status()
    if args.json:
        print(json.dumps(status))
    else:
        print("\n".join(_lines(status, None)))
    return 1 if status["degraded"] else 0


def _explain(args: argparse.Namespace) -> int:
    try:
        text = sys.stdin.read() if args.tokens == "-" else Path(args.tokens).read_text(encoding="utf-8")
        tokens = [int(each) for each in re.split(r"[\s,\[\]]+", text) if each]
    except (OSError, ValueError) as error:
        raise ConfigError(f"--tokens {args.tokens}: expected token ids, as 1 2 3 or [1, 2, 3]: {error}") from None
    store = _Store(args)
    model = args.model
    if model is None:
        names = [each["name"] for each in store.status()["models"]]
        if len(names) != 1:
            raise ConfigError(f"which model? Give --model; there are {', '.join(names) or 'none'}")
        model = names[0]
    asked = {"model": model, "tokens": tokens, "adapter": args.adapter, "tenant": args.tenant}
    row = store.get("/explain", asked)
    if args.json:
        print(json.dumps(row))
    else:
        print(Explained(**row | {"stretches": tuple(Stretch(**each) for each in row["stretches"])}))
    return 0 if row["loaded_tokens"] else 1


def _events(args: argparse.Namespace) -> int:
    store = _Store(args)
    since = ""
    while True:
        found = store.get(f"/events?alone{since}")
        if found["all"] and since and not args.json:
            print("what was known before counts no more; this is all there is:")
        for event in found["events"]:
            if args.json:
                print(json.dumps(event))
            else:
                what = "stored in" if event["stored"] else "left"
                print(f"{_clean(event['model'], 40)}  {event['block'][:16]}  {what} {event['tier']}")
        sys.stdout.flush()
        if not args.follow:
            return 0
        since = f"&since={found['next']}"
        time.sleep(_FOLLOW_S)
