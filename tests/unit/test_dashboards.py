"""Dashboards and alerts as they lie in deploy/: what the generator writes, as Grafana takes it, and in the docs."""

from __future__ import annotations

import itertools
import json
import re
import runpy
from pathlib import Path
from typing import Any

import promql_parser
import pytest
import yaml

from stratakv.observe.metrics import METRICS

DEPLOY = Path(__file__).parents[2] / "deploy"
GENERATOR = runpy.run_path(str(DEPLOY / "dashboards.py"))
FILES: dict[Path, str] = GENERATOR["files"]()
BOARDS = {path.stem: json.loads(content) for path, content in FILES.items()}
RULES = [
    rule
    for group in yaml.safe_load((DEPLOY / "alerts.yml").read_text(encoding="utf-8"))["groups"]
    for rule in group["rules"]
]
ALERTS = [rule for rule in RULES if "alert" in rule]

boards = pytest.mark.parametrize("board", BOARDS.values(), ids=BOARDS.keys())


def targets(board: dict[str, Any]) -> list[dict[str, Any]]:
    return [target for panel in board["panels"] for target in panel.get("targets", [])]


def test_the_files_are_what_the_generator_writes() -> None:
    there = {path: path.read_text(encoding="utf-8") for path in (DEPLOY / "grafana" / "dashboards").iterdir()}
    assert there == FILES, "make dashboards"


@boards
def test_panels_fill_a_grid_and_no_two_overlap(board: dict[str, Any]) -> None:
    taken: set[tuple[int, int]] = set()
    for panel in board["panels"]:
        place = panel["gridPos"]
        cells = set(
            itertools.product(range(place["x"], place["x"] + place["w"]), range(place["y"], place["y"] + place["h"]))
        )
        assert place["x"] + place["w"] <= 24
        assert not cells & taken, panel["title"]
        taken |= cells
    numbers = [panel["id"] for panel in board["panels"]]
    assert len(numbers) == len(set(numbers))


@boards
def test_a_panel_says_what_it_shows_in_which_unit_and_where_it_asks(board: dict[str, Any]) -> None:
    assert board["schemaVersion"] == 41
    assert board["tags"] == ["stratakv"]
    for panel in board["panels"]:
        assert panel["title"]
        if panel["type"] == "row":
            assert panel["panels"] == []
            continue
        assert panel["type"] in ("timeseries", "stat", "state-timeline", "table")
        assert panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
        assert len(panel["description"].split("\n\n")) > 1 or "up{" in panel["targets"][0]["expr"]
        assert panel["fieldConfig"]["defaults"]["unit"]
        references = [target["refId"] for target in panel["targets"]]
        assert references == sorted(set(references))
        assert all(target["legendFormat"] for target in panel["targets"])


@boards
def test_what_is_chosen_at_the_top_is_used_and_nothing_else(board: dict[str, Any]) -> None:
    declared = [variable["name"] for variable in board["templating"]["list"]]
    assert declared[:3] == ["datasource", "instance", "process"]
    used = {name for target in targets(board) for name in re.findall(r"\$(\w+)", target["expr"])}
    assert used - {"__rate_interval", "__range"} == set(declared) - {"datasource"}
    for variable in board["templating"]["list"][1:]:
        assert (variable["allValue"], variable["includeAll"], variable["multi"]) == (".*", True, True)


def test_dashboards_have_names_of_their_own_and_all_metrics_are_on_one() -> None:
    uids = [board["uid"] for board in BOARDS.values()]
    assert uids == [f"stratakv-{name}" for name in BOARDS]
    text = " ".join(target["expr"] for board in BOARDS.values() for target in targets(board))
    assert [metric.name for metric in METRICS if not re.search(rf"\b{metric.name}(_bucket)?\b", text)] == []


def test_a_metric_or_a_label_that_is_not_there_ends_the_generator() -> None:
    chosen = GENERATOR["chosen"]
    asked = "sum by (model) (rate(stratakv_hit_blocks_total))"
    assert chosen(asked, whole=False) == (
        'sum by (model) (rate(stratakv_hit_blocks_total{instance=~"$instance", process=~"$process", model=~"$model"}'
        "[$__rate_interval]))"
    )
    for wrong in (
        "stratakv_hits_total",
        "stratakv_residence_seconds",
        "stratakv_hit_blocks_total_bucket",
        'stratakv_hit_blocks_total{tier="ram"}',
        "sum by (tier) (stratakv_hit_blocks_total)",
    ):
        with pytest.raises(KeyError):
            chosen(wrong, whole=False)
    panel = {"lines": "title", "ask": "stratakv_info", "text": "", "colour": "red"}
    with pytest.raises(KeyError, match="colour"):
        GENERATOR["drawn"](panel, 1, 0, 0)


@pytest.mark.parametrize(
    ("asked", "unit"),
    [
        ("sum(rate(stratakv_loaded_tokens_total))", "si:tokens/s"),
        ("sum(rate(stratakv_ssd_written_bytes_total))", "binBps"),
        ("sum(increase(stratakv_ssd_written_bytes_total))", "bytes"),
        ("sum(rate(stratakv_path_bytes_total))\n  / sum(rate(stratakv_path_seconds_total))", "binBps"),
        ("sum(rate(stratakv_hit_blocks_total)) / sum(rate(stratakv_asked_blocks_total))", "percentunit"),
        ("histogram_quantile(0.5, sum by (le) (rate(stratakv_residence_seconds_bucket)))", "s"),
        ("stratakv_ram_fragmentation_ratio", "percentunit"),
        ("sum(stratakv_blocks)", "short"),
    ],
)
def test_a_unit_is_that_of_the_name(asked: str, unit: str) -> None:
    assert GENERATOR["unit_of"](asked) == unit


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.get("alert") or rule["record"])
def test_a_rule_reads_metrics_that_are_there(rule: dict[str, Any]) -> None:
    names: list[str] = []
    promql_parser.walk(promql_parser.parse(rule["expr"]), lambda node: names.append(getattr(node, "name", "") or ""))
    known = {metric.name for metric in METRICS} | {each["record"] for each in RULES if "record" in each} | {"up"}
    assert set(filter(None, names)) <= known


@pytest.mark.parametrize("alert", ALERTS, ids=lambda alert: alert["alert"])
def test_an_alert_says_what_to_do_and_is_tested(alert: dict[str, Any]) -> None:
    assert alert["labels"]["severity"] in ("critical", "warning", "info")
    assert {"summary", "description", "runbook_url"} == alert["annotations"].keys()
    page, _, anchor = alert["annotations"]["runbook_url"].partition("#")
    headings = re.findall(r"^#+ (.*)$", (DEPLOY.parent / page).read_text(encoding="utf-8"), re.MULTILINE)
    assert anchor in [re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings]
    assert f'{{alertname="{alert["alert"]}"}}' in (DEPLOY / "alerts.test.yml").read_text(encoding="utf-8")
