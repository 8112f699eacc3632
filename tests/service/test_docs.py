"""What the documents tell to try is tried."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from servers import free_port

SHARED = Path(__file__).parents[2] / "docs" / "shared.md"


def test_two_nodes_share_a_cluster_of_which_one_dies(tmp_path: Path) -> None:
    if shutil.which("redis-server") is None or shutil.which("redis-cli") is None:
        pytest.skip("redis-server is not installed (apt-get install redis-server)")
    text = SHARED.read_text(encoding="utf-8")
    node, commands = (re.search(rf"^```{kind}\n(.*?)^```", text, re.M | re.S) for kind in ("python", "sh"))
    (tmp_path / "node.py").write_text(node[1])
    script = commands[1]
    for port in ("7001", "7002", "7003"):
        script = script.replace(port, str(free_port()))
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    shell = ["bash", "-euo", "pipefail", "-c", script]
    try:
        ran = subprocess.run(shell, cwd=tmp_path, env=os.environ | {"PATH": path}, capture_output=True, text=True)
    finally:
        for pid in tmp_path.glob("redis-*/pid"):
            subprocess.run(["kill", "-9", pid.read_text().strip()], stderr=subprocess.DEVNULL)
    assert ran.returncode == 0, ran.stderr
    told = {
        name: (int(hit), int(new))
        for name, hit, new in re.findall(r"node (\w): (\d+) tokens.*, (\d+) comp", ran.stdout)
    }
    every = 24 * 1200
    assert told["a"] == (0, every)
    assert told["b"] == (every, 0)
    assert 0.2 * every < told["c"][0] < every
    assert sum(told["c"]) == every
