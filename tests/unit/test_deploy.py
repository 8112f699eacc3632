"""What deploy/compose.yaml starts: pinned, bounded, watched, and open to this machine alone."""

import re
from pathlib import Path

import pytest
import yaml

SERVICES = yaml.safe_load((Path(__file__).parents[2] / "deploy/compose.yaml").read_text(encoding="utf-8"))["services"]


@pytest.mark.parametrize("name", ["dragonfly", "postgres", "qdrant"])
def test_a_service_is_pinned_bounded_watched_and_private(name: str) -> None:
    service = SERVICES[name]
    assert re.search(r":v?\d+\.\d+(\.\d+)?$", service["image"])
    assert service["mem_limit"]
    assert service["healthcheck"]["test"]
    assert all(port.startswith("127.0.0.1:") for port in service["ports"])
    secrets = [value for key, value in service["environment"].items() if re.search("PASS|AUTH|KEY|requirepass", key)]
    assert secrets
    assert all(re.fullmatch(r"\$\{STRATAKV_\w+:\?set it\}", secret) for secret in secrets)


def test_dragonfly_has_memory_for_each_thread_and_room_beside_its_values() -> None:
    flags = dict(flag[2:].split("=") for flag in SERVICES["dragonfly"]["command"] if "=" in flag)
    most, limit = (int(text.rstrip("gb")) << 30 for text in (flags["maxmemory"], SERVICES["dragonfly"]["mem_limit"]))
    assert most // int(flags["proactor_threads"]) >= 256 << 20
    assert most < limit
    assert flags["cache_mode"] == "true"
