"""The text that Prometheus reads, version 0.0.4 of its format.

Written here and not by its client library, which takes three times as long for each sample: with many models a scrape
would hold the interpreter for too long.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from stratakv.observe.metrics import Family
from stratakv.stats import Histogram

__all__ = ["CONTENT_TYPE", "merged", "text"]

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

_ESCAPED = str.maketrans({"\\": "\\\\", "\n": "\\n", '"': '\\"'})


def _label(name: str, value: str) -> str:
    return f'{name}="{value.translate(_ESCAPED)}"'


def text(families: Iterable[Family]) -> str:
    """All samples."""
    known: dict[tuple[str, str], str] = {}
    out: list[str] = []
    for family in families:
        metric = family.metric
        if not family.samples:
            continue
        out.append(f"# HELP {metric.name} {metric.help}\n# TYPE {metric.name} {metric.kind}\n")
        for values, value in family.samples.items():
            labels = []
            for pair in zip(metric.labels, values, strict=True):
                if pair not in known:
                    known[pair] = _label(*pair)
                labels.append(known[pair])
            if not isinstance(value, Histogram):
                braces = "{" + ",".join(labels) + "}" if labels else ""
                out.append(f"{metric.name}{braces} {value!r}\n")
                continue
            seen = 0
            for bound, count in zip((*value.bounds, "+Inf"), value.counts, strict=True):
                seen += count
                out.append(f"{metric.name}_bucket{{{','.join([*labels, _label('le', str(bound))])}}} {seen}\n")
            braces = "{" + ",".join(labels) + "}" if labels else ""
            out.append(f"{metric.name}_sum{braces} {value.sum!r}\n{metric.name}_count{braces} {seen}\n")
    return "".join(out)


def merged(texts: Mapping[str, str]) -> str:
    """What several processes say, each told apart by the label ``process``; all texts are of `text`."""
    heads: dict[str, str] = {}
    samples: dict[str, list[str]] = {}
    for process, said in texts.items():
        told = _label("process", process)
        for part in re.split(r"^(?=# HELP )", said, flags=re.MULTILINE):
            if not part:
                continue
            head, kind, *lines = part.splitlines(keepends=True)
            name = head.split(" ", 3)[2]
            heads.setdefault(name, head + kind)
            mine = samples.setdefault(name, [])
            for line in lines:
                # Neither the name nor the value of a sample holds a brace or a blank; a label's value may.
                at = re.match(r"[a-z0-9_]+", line)
                end = at.end() if at else 0
                rest = line[end + 1 :]
                mine.append(f"{line[:end]}{{{told},{rest}" if line[end] == "{" else f"{line[:end]}{{{told}}} {rest}")
    return "".join(heads[name] + "".join(lines) for name, lines in samples.items())
