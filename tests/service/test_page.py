"""The page in a real browser, and `stratakv top` in a real terminal."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import stratakv
from browser import Browser
from stores import config, geometry, kv_of, loaded, tokens_of

HOSTILE = "\x1b[31m<img src=x onerror=\"document.title='broken'\">"
# Where screenshots are kept to be looked at; a folder of the test, if nothing is said.
SHOTS = os.environ.get("STRATAKV_SCREENSHOTS")


def serve(cache: stratakv.ModelCache, prompts: int) -> None:
    for seed in range(prompts):
        tokens = tokens_of(seed, 256)
        if loaded(cache, tokens)[1].matched_tokens < 256:
            cache.put(tokens, kv_of(tokens, cache.geometry), layout="LKHND")


@pytest.fixture
def caches(tmp_path: Path) -> Iterator[stratakv.CacheManager]:
    observe = stratakv.ObserveConfig(listen="127.0.0.1:0", token="sesame", name="demo")
    with stratakv.open(dataclasses.replace(config(tmp_path / "store"), observe=observe)) as opened:
        for name in ("llama-3.1-8b", "qwen3-8b", HOSTILE):
            cache = opened.register(name, geometry())
            cache.set_prefill_rate(50_000)
            serve(cache, 40)
        yield opened


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[Browser]:
    opened = Browser(tmp_path / "browser")
    yield opened
    opened.close()


def test_the_page_shows_the_store_to_who_has_the_token(
    caches: stratakv.CacheManager, browser: Browser, tmp_path: Path
) -> None:
    shots = Path(SHOTS) if SHOTS else tmp_path
    browser.open(str(caches.address))
    browser.wait("!document.getElementById('ask').hidden")
    assert "Models" not in browser.run("document.body.innerText")
    browser.run("document.getElementById('token').value = 'wrong'; document.querySelector('form button').click()")
    browser.wait("document.getElementById('about').textContent === 'a wrong token'")
    browser.run("document.getElementById('token').value = 'sesame'; document.querySelector('form button').click()")
    browser.wait("!document.querySelector('main').hidden")
    text = browser.run("document.body.innerText")
    for expected in ("RAM", "SSD", "llama-3.1-8b", "qwen3-8b", "never_stored", "tokens not computed", "hit ratio"):
        assert expected in text, expected
    # Whatever a model is called, it is text.
    assert HOSTILE.replace("\x1b", "") in text.replace("\x1b", "")
    assert browser.run("document.title") == "stratakv"
    assert browser.run("document.querySelectorAll('img').length") == 0
    # It follows what happens.
    matches = "document.querySelectorAll('.big')[2].textContent"
    before = browser.run(matches)
    serve(caches["qwen3-8b"], 40)
    browser.wait(f"{matches} !== {json.dumps(before)}")
    # Both charts have something to show once two totals were noted.
    browser.wait("document.querySelector('#tokens path').getAttribute('d').length > 12")
    assert len(browser.screenshot(shots / "page.png")) > 20_000
    browser.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": "dark"}])
    assert len(browser.screenshot(shots / "page-dark.png")) > 20_000
    assert not [error for error in browser.errors if "401" not in error]
    # Without the store it says so.
    caches.close()
    browser.wait("document.getElementById('about').textContent.startsWith('no answer')")


def test_a_token_in_the_address_is_taken_and_not_left_there(caches: stratakv.CacheManager, browser: Browser) -> None:
    browser.open(f"{caches.address}/#token=sesame")
    browser.wait("!document.querySelector('main').hidden")
    assert browser.run("location.hash") == ""


class Terminal:
    """A terminal of tmux."""

    def __init__(self, folder: Path, command: list[str], **variables: str) -> None:
        if shutil.which("tmux") is None:
            pytest.skip("tmux is not installed (apt-get install tmux)")
        self._tmux = ["tmux", "-S", str(folder / "tmux")]
        told = [f"{name}={value}" for name, value in variables.items()]
        self._do("-f", "/dev/null", "new-session", "-d", "-x", "110", "-y", "30", "env", *told, *command)

    def _do(self, *arguments: str) -> str:
        return subprocess.run([*self._tmux, *arguments], check=True, capture_output=True, text=True).stdout

    def keys(self, *keys: str) -> None:
        self._do("send-keys", *keys)

    def screen(self) -> str:
        return self._do("capture-pane", "-p")

    def wait(self, text: str) -> str:
        until = time.monotonic() + 20
        while text not in (shown := self.screen()):
            assert time.monotonic() < until, shown
            time.sleep(0.1)
        return shown

    def runs(self) -> bool:
        return subprocess.run([*self._tmux, "has-session"], check=False, capture_output=True).returncode == 0

    def close(self) -> None:
        subprocess.run([*self._tmux, "kill-server"], check=False, capture_output=True)


def test_top_in_a_terminal(caches: stratakv.CacheManager, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "stratakv.cli", "top", "--url", str(caches.address), "--every", "0.2"]
    path = os.pathsep.join(sys.path)
    terminal = Terminal(tmp_path, command, PYTHONPATH=path, STRATAKV_OBSERVE_TOKEN="sesame", LC_ALL="C.UTF-8")
    try:
        shown = terminal.wait("llama-3.1-8b")
        assert "hit ratio" in shown
        assert "ram" in shown
        # A name moves no cursor and colours nothing.
        assert "�[31m<img" in shown
        serve(caches["qwen3-8b"], 40)
        shown = terminal.wait("tokens loaded/s")
        if SHOTS:
            (Path(SHOTS) / "top.txt").write_text(shown)
        terminal.keys("q")
        until = time.monotonic() + 10
        while terminal.runs():
            assert time.monotonic() < until
            time.sleep(0.1)
    finally:
        terminal.close()
