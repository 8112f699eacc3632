"""transformers: the page about it is what happens. Its Python runs, block by block, on a small model."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from llamas import llama, tokenizer, words  # noqa: E402 (after the skips)

pytestmark = [
    pytest.mark.engines,
    # torch and transformers warn about themselves; nothing of it is about the cache.
    pytest.mark.filterwarnings("default"),
]

PAGE = Path(__file__).parents[2] / "docs" / "transformers.md"


def test_the_page_runs_as_it_stands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    llama().save_pretrained(tmp_path / "model")
    tokenizer().save_pretrained(tmp_path / "model")
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert len(blocks) == 8
    names: dict[str, Any] = {"where": str(tmp_path / "model"), "text": words(80), "more": words(30, 2)}
    for block in blocks:
        exec(compile(block, str(PAGE), "exec"), names)
    assert names["found"][0].tokens == 64
    assert names["found"][1].rows == (64, 80)
    assert names["chat"].restored.tokens > 80
    assert names["later"].restored.tokens > names["chat"].restored.tokens
    assert names["restored"].tokens == 64
    assert "64 " in capsys.readouterr().out
    assert list((tmp_path / "cache").rglob("*"))


@pytest.mark.parametrize("version", ["4.57.3", "5.18.1", "6.0.0"])
def test_another_version_is_refused_on_import_with_what_to_install(tmp_path: Path, version: str) -> None:
    installed = tmp_path / f"transformers-{version}.dist-info"
    installed.mkdir()
    (installed / "METADATA").write_text(f"Metadata-Version: 2.1\nName: transformers\nVersion: {version}\n")
    code = f"import sys; sys.path[:0] = {[str(tmp_path), *sys.path]}; import stratakv.integrations.transformers"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert ran.returncode == 1
    assert f"EngineVersionError: transformers {version} is installed" in ran.stderr
    assert "pip install 'transformers>=5.19,<6'" in ran.stderr


def test_the_page_and_the_package_state_the_versions_that_are_checked() -> None:
    source = (Path(__file__).parents[2] / "python/stratakv/integrations/transformers/__init__.py").read_text()
    low, below = re.findall(r'require\("transformers", "([\d.]+)", "([\d.]+)"\)', source)[0]
    assert f"{low} to\nbelow {below} is refused" in PAGE.read_text()
    assert f'"transformers>={low},<{below}"' in (Path(__file__).parents[2] / "pyproject.toml").read_text()
