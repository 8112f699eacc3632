"""What deploy/compose.yaml starts: pinned, bounded, watched, and open to this machine alone."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

DEPLOY = Path(__file__).parents[2] / "deploy"
COMPOSE = yaml.safe_load((DEPLOY / "compose.yaml").read_text(encoding="utf-8"))
SERVICES = COMPOSE["services"]


def addresses(service: dict[str, Any]) -> list[str]:
    """Where it listens, on this machine."""
    if service.get("network_mode") != "host":
        return [port.rpartition(":")[0] for port in service["ports"]]
    told = [flag.partition("=")[2] for flag in service.get("command", []) if "listen-address" in flag]
    environment = service.get("environment", {})
    if "GF_SERVER_HTTP_ADDR" in environment:
        told.append(f"{environment['GF_SERVER_HTTP_ADDR']}:{environment['GF_SERVER_HTTP_PORT']}")
    assert told, "what it listens at by itself is everywhere"
    return told


@pytest.mark.parametrize("name", SERVICES)
def test_a_service_is_pinned_bounded_watched_and_private(name: str) -> None:
    service = SERVICES[name]
    assert re.search(r":v?\d+\.\d+(\.\d+)?$", service["image"])
    assert service["mem_limit"]
    assert service["healthcheck"]["test"]
    assert all(address.startswith("127.0.0.1:") for address in addresses(service))
    environment = service.get("environment", {})
    secrets = [value for key, value in environment.items() if re.search("PASS|AUTH|KEY|requirepass", key)]
    assert all(re.fullmatch(r"\$\{STRATAKV_\w+:\?set it\}", secret) for secret in secrets)
    # Spans name models and tenants, and are shown to whoever is on this machine.
    assert secrets or service.get("secrets") or name == "jaeger"


def test_no_two_services_have_a_port() -> None:
    taken = [address for service in SERVICES.values() for address in addresses(service)]
    assert len(taken) == len(set(taken))


def test_whatever_is_mounted_is_there() -> None:
    for service in SERVICES.values():
        for mount in service.get("volumes", []):
            source, target, *how = mount.split(":")
            if source.startswith("."):
                assert (DEPLOY / source).exists(), source
                assert how == ["ro"]
            else:
                assert source in COMPOSE["volumes"]
                assert target.startswith("/")
        assert set(service.get("secrets", [])) <= set(COMPOSE["secrets"])


def test_each_part_is_told_where_the_others_are() -> None:
    prometheus = yaml.safe_load((DEPLOY / "prometheus.yml").read_text(encoding="utf-8"))
    (job,) = prometheus["scrape_configs"]
    assert job["authorization"]["credentials_file"] == f"/run/secrets/{SERVICES['prometheus']['secrets'][0]}"
    mounted = {mount.split(":")[1] for mount in SERVICES["prometheus"]["volumes"]}
    assert {f"/etc/prometheus/{name}" for name in ("prometheus.yml", *prometheus["rule_files"])} <= mounted
    grafana = DEPLOY / "grafana" / "provisioning"
    sources = yaml.safe_load((grafana / "datasources" / "stratakv.yaml").read_text(encoding="utf-8"))["datasources"]
    for source in sources:
        assert source["url"].removeprefix("http://") in addresses(SERVICES[source["type"]])
        if source["type"] == "prometheus":
            assert source["jsonData"]["timeInterval"] == prometheus["global"]["scrape_interval"]
    boards = yaml.safe_load((grafana / "dashboards" / "stratakv.yaml").read_text(encoding="utf-8"))["providers"]
    mounted = {mount.split(":")[1] for mount in SERVICES["grafana"]["volumes"]}
    assert {provider["options"]["path"] for provider in boards} <= mounted


def test_dragonfly_has_memory_for_each_thread_and_room_beside_its_values() -> None:
    flags = dict(flag[2:].split("=") for flag in SERVICES["dragonfly"]["command"] if "=" in flag)
    most, limit = (int(text.rstrip("gb")) << 30 for text in (flags["maxmemory"], SERVICES["dragonfly"]["mem_limit"]))
    assert most // int(flags["proactor_threads"]) >= 256 << 20
    assert most < limit
    assert flags["cache_mode"] == "true"
