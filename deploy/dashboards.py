"""Writes the Grafana dashboards, panels over metrics that `METRICS` declares: none shows what is not there.

    dashboards.yaml ─▶ names, labels, units and descriptions from `METRICS` ─▶ a grid ─▶ grafana/dashboards/*.json

A name that no metric has, or a label that a metric lacks, ends it. `make dashboards` runs it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from stratakv.observe.metrics import METRICS, Metric

HERE = Path(__file__).parent
FOLDER = HERE / "grafana" / "dashboards"
DATASOURCE = {"type": "prometheus", "uid": "${datasource}"}
# Of dashboards that have these fields, as Grafana 11.6 and 12 write them; newer ones read them.
SCHEMA_VERSION = 41
COLUMNS = 24
KNOWN = {metric.name: metric for metric in METRICS}

# How a panel is drawn: what Grafana calls that, its width and its height.
KINDS = {
    "lines": ("timeseries", 8, 8),
    "areas": ("timeseries", 8, 8),
    "stat": ("stat", 4, 4),
    "states": ("state-timeline", 8, 6),
    "table": ("table", 8, 8),
}
KEYS = {"ask", "text", "width", "most", "unit", "bad_from", *KINDS}
SWITCH = {"0": ("no", "green"), "1": ("yes", "red")}
BREAKER = {"0": ("closed", "green"), "0.5": ("half open", "yellow"), "1": ("open", "red")}

# What is chosen at the top, in the order in which it stands there; each of what those before it leave.
VARIABLES = {
    "instance": "label_values(stratakv_info, instance)",
    "process": 'label_values(stratakv_info{instance=~"$instance"}, process)',
    "model": 'label_values(stratakv_matches_total{instance=~"$instance", process=~"$process"}, model)',
    "tenant": 'label_values(stratakv_tenant_asked_blocks_total{instance=~"$instance", process=~"$process"}, tenant)',
}
# Every series has these: of whoever answers, and of the process, where several share an address.
ANYWHERE = ("instance", "process")


def metric(name: str) -> Metric:
    """A metric, by the name of one of its series.

    Raises:
        KeyError: there is none.
    """
    found = KNOWN.get(name) or KNOWN.get(name.removesuffix("_bucket"))
    if found is None or (found.kind == "histogram") != (found.name != name):
        raise KeyError(f"{name}: no such series in stratakv.observe.metrics")
    return found


def chosen(asked: str, *, whole: bool) -> str:
    """An expression of what is chosen at the top, with windows; `whole`: an increase is that of all that is shown."""
    labels: set[str] = {"le", *ANYWHERE}
    windows = {"rate(": "[$__rate_interval]", "increase(": "[$__range]" if whole else "[$__rate_interval]"}

    def select(found: re.Match[str]) -> str:
        function, name, given = found[1] or "", found[2], found[3] or ""
        has = metric(name).labels
        labels.update(has)
        if unknown := set(re.findall(r"(\w+) *[=!]", given)) - set(has):
            raise KeyError(f"{name} has no label {sorted(unknown)}")
        matchers = [f'{label}=~"${label}"' for label in VARIABLES if label in ANYWHERE or label in has]
        return f"{function}{name}{{{', '.join([*matchers, *filter(None, [given])])}}}{windows.get(function, '')}"

    text = re.sub(r"\b(rate\(|increase\()?(stratakv_\w+)(?:\{([^}]*)\})?", select, asked)
    for by in re.findall(r"\bby \(([^)]*)\)", text):
        if unknown := set(re.split(r", *", by)) - labels:
            raise KeyError(f"{asked}: nothing has a label {sorted(unknown)}")
    return text


def unit_of(asked: str) -> str:
    """What comes of an expression, as Grafana calls it: by the last words of its metrics' names."""
    nouns = [name.removesuffix("_bucket").removesuffix("_total").rpartition("_")[2] for name in names_in(asked)]
    noun = nouns[0] if nouns else ""
    per = re.search(r"\)\s*/ ", asked)
    if per and (noun, nouns[-1]) == ("bytes", "seconds"):
        return "binBps"
    if per or noun == "ratio":
        return "percentunit"
    if "rate(" in asked and "histogram_quantile(" not in asked:
        return {"bytes": "binBps", "seconds": "si:s/s"}.get(noun, f"si:{noun}/s")
    return {"bytes": "bytes", "seconds": "s"}.get(noun, "short")


def names_in(asked: str) -> list[str]:
    """Of series, each once."""
    return list(dict.fromkeys(re.findall(r"\bstratakv_\w+", asked)))


def legend_of(asked: str, title: str) -> str:
    """The labels by which it is told apart."""
    by = re.search(r"\bby \(([^)]*)\)", asked)
    labels = re.split(r", *", by[1]) if by else []
    return " ".join(f"{{{{{label}}}}}" for label in labels) or title


LEGEND = {"calcs": ["lastNotNull", "max"], "displayMode": "table", "placement": "bottom", "showLegend": True}
OPTIONS: dict[str, dict[str, Any]] = {
    "timeseries": {"legend": LEGEND, "tooltip": {"mode": "multi", "sort": "desc"}},
    "stat": {
        "colorMode": "value",
        "graphMode": "none",
        "justifyMode": "auto",
        "orientation": "auto",
        "reduceOptions": {"calcs": ["lastNotNull"], "fields": "", "values": False},
        "textMode": "value",
    },
    "state-timeline": {
        "alignValue": "left",
        "legend": {"displayMode": "list", "placement": "bottom", "showLegend": False},
        "mergeValues": True,
        "rowHeight": 0.8,
        "showValue": "auto",
        "tooltip": {"mode": "single", "sort": "none"},
    },
    "table": {"cellHeight": "sm", "footer": {"show": False}, "showHeader": True},
}


def drawn(panel: Mapping[str, Any], number: int, x: int, y: int) -> dict[str, Any]:
    """A panel at its place."""
    (way,) = panel.keys() & KINDS.keys()
    if unknown := panel.keys() - KEYS:
        raise KeyError(f"panel {panel[way]!r}: {sorted(unknown)}, expected {sorted(KEYS)}")
    title, (kind, _, height) = panel[way], KINDS[way]
    asks = panel["ask"] if isinstance(panel["ask"], dict) else {legend_of(panel["ask"], title): panel["ask"]}
    at_once = kind in ("stat", "table")
    targets = [
        {
            "refId": chr(ord("A") + n),
            "datasource": DATASOURCE,
            "editorMode": "code",
            "expr": chosen(asked, whole=at_once),
            "format": "table" if kind == "table" else "time_series",
            "instant": at_once,
            "range": not at_once,
            "legendFormat": legend,
        }
        for n, (legend, asked) in enumerate(asks.items())
    ]
    used = dict.fromkeys(metric(name) for asked in asks.values() for name in names_in(asked))
    out = {
        "id": number,
        "type": kind,
        "title": title,
        "description": "\n\n".join([panel["text"], *(f"`{each.name}`: {each.help}" for each in used)]),
        "datasource": DATASOURCE,
        "gridPos": {"h": height, "w": width_of(panel), "x": x, "y": y},
        "targets": targets,
        "fieldConfig": {"defaults": defaults(panel, way, list(asks.values())), "overrides": []},
        "options": OPTIONS[kind],
    }
    if kind == "table":
        out["transformations"], out["fieldConfig"]["overrides"] = columns(asks)
    return out


def width_of(panel: Mapping[str, Any]) -> int:
    """Columns."""
    (way,) = panel.keys() & KINDS.keys()
    return int(panel.get("width", KINDS[way][1]))


def defaults(panel: Mapping[str, Any], way: str, asks: list[str]) -> dict[str, Any]:
    """Unit, ends of the axis, colours and words."""
    out: dict[str, Any] = {"unit": panel.get("unit", unit_of(asks[0]))}
    steps: list[dict[str, Any]] = [
        {"color": "green" if "bad_from" in panel or way == "states" else "blue", "value": None}
    ]
    if "bad_from" in panel:
        steps.append({"color": "red", "value": panel["bad_from"]})
    out["thresholds"] = {"mode": "absolute", "steps": steps}
    if way != "table":
        out["min"] = 0
    if "most" in panel:
        out["max"] = panel["most"]
    if way == "states":
        words = BREAKER if "stratakv_breaker_state" in asks[0] else SWITCH
        options = {value: {"text": text, "color": color} for value, (text, color) in words.items()}
        out["mappings"] = [{"type": "value", "options": options}]
    if way in ("lines", "areas"):
        out["custom"] = {
            "drawStyle": "line",
            "fillOpacity": 50 if way == "areas" else 8,
            "lineWidth": 1,
            "showPoints": "never",
            "stacking": {"group": "A", "mode": "normal" if way == "areas" else "none"},
        }
    return out


def columns(asks: Mapping[str, str]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """How a table's queries become one, and the units of its columns."""
    hidden = {"Time": True, **{f"Time {n + 1}": True for n in range(len(asks))}}
    if len(asks) == 1:
        # Labels are all it says.
        return [{"id": "organize", "options": {"excludeByName": {**hidden, "Value": True}}}], []
    shown = {f"Value #{chr(ord('A') + n)}": legend for n, legend in enumerate(asks)}
    overrides = [
        {"matcher": {"id": "byName", "options": legend}, "properties": [{"id": "unit", "value": unit_of(asked)}]}
        for legend, asked in asks.items()
    ]
    return [
        {"id": "joinByField", "options": {"byField": "model", "mode": "outer"}},
        {"id": "organize", "options": {"excludeByName": hidden, "renameByName": shown}},
    ], overrides


def variables(panels: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """What is chosen at the top, of what the panels use."""
    yield {"name": "datasource", "label": "Data source", "type": "datasource", "query": "prometheus", "hide": 0}
    text = " ".join(target["expr"] for panel in panels for target in panel.get("targets", ()))
    for name, query in VARIABLES.items():
        if f"${name}" in text:
            yield {
                "name": name,
                "label": name.capitalize(),
                "type": "query",
                "datasource": DATASOURCE,
                # As Grafana writes it: of kind 1 are values of a label.
                "query": {"qryType": 1, "query": query, "refId": "PrometheusVariableQueryEditor-VariableQuery"},
                "definition": query,
                "refresh": 2,
                "sort": 1,
                "multi": True,
                "includeAll": True,
                # Series without the label as well.
                "allValue": ".*",
                "current": {"selected": True, "text": ["All"], "value": ["$__all"]},
                "hide": 0,
            }


def dashboard(name: str, board: Mapping[str, Any]) -> dict[str, Any]:
    """One as Grafana reads it."""
    panels: list[dict[str, Any]] = []
    y = 0
    for title, row in board["rows"].items():
        place = {"h": 1, "w": COLUMNS, "x": 0, "y": y}
        head = {
            "id": len(panels) + 1,
            "type": "row",
            "title": title,
            "collapsed": False,
            "gridPos": place,
            "panels": [],
        }
        panels.append(head)
        x, y, tallest = 0, y + 1, 0
        for panel in row:
            if x + width_of(panel) > COLUMNS:
                x, y, tallest = 0, y + tallest, 0
            panels.append(drawn(panel, len(panels) + 1, x, y))
            x, tallest = x + width_of(panel), max(tallest, panels[-1]["gridPos"]["h"])
        y += tallest
    link = {"type": "dashboards", "title": "stratakv", "tags": ["stratakv"], "asDropdown": False}
    return {
        "uid": f"stratakv-{name}",
        "title": board["title"],
        "description": board["text"],
        "tags": ["stratakv"],
        "schemaVersion": SCHEMA_VERSION,
        "editable": True,
        "graphTooltip": 1,
        "timezone": "browser",
        "time": {"from": "now-1h", "to": "now"},
        "refresh": "30s",
        "annotations": {"list": []},
        "links": [link | {"includeVars": True, "keepTime": True}],
        "templating": {"list": list(variables(panels))},
        "panels": panels,
    }


def files() -> dict[Path, str]:
    """All of them, by where they belong."""
    boards = yaml.safe_load((HERE / "dashboards.yaml").read_text(encoding="utf-8"))
    return {
        FOLDER / f"{name}.json": json.dumps(dashboard(name, board), indent=1, ensure_ascii=False) + "\n"
        for name, board in boards.items()
    }


if __name__ == "__main__":
    for path, content in files().items():
        path.write_text(content, encoding="utf-8")
