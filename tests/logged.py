"""Every line that the package can log, read from its sources, and the table of them in docs/logs.md.

`python tests/logged.py` writes that table anew.
"""

from __future__ import annotations

import ast
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "python" / "stratakv"
PAGE = ROOT / "docs" / "logs.md"
BEGIN, END = "<!-- events: python tests/logged.py -->\n", "<!-- end of events -->\n"
LEVELS = {"debug": "debug", "info": "info", "warning": "warning", "error": "error", "exception": "error"}


@dataclass(frozen=True, slots=True)
class Call:
    """A call of a module's log: literals as they stand there; None where there is none, or no telling how many."""

    where: str
    component: str
    method: str
    event: object
    sentence: object
    fields: tuple[str, ...]
    arguments: int | None


def calls() -> list[Call]:
    found = []
    for path in sorted(PACKAGE.rglob("*.py")):
        component = ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__")
        for node in ast.walk(ast.parse(path.read_text())):
            if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
                continue
            if not (isinstance(node.func.value, ast.Name) and node.func.value.id == "_log"):
                continue
            literals = [each.value if isinstance(each, ast.Constant) else None for each in node.args[:2]]
            starred = any(isinstance(each, ast.Starred) for each in node.args)
            event, sentence = (*literals, None, None)[:2]
            found.append(
                Call(
                    where=f"{path.relative_to(ROOT)}:{node.lineno}",
                    component=component,
                    method=node.func.attr,
                    event=event,
                    sentence=sentence,
                    fields=tuple(str(each.arg) for each in node.keywords if each.arg != "key"),
                    arguments=None if starred else len(node.args) - 2,
                )
            )
    return found


def table() -> str:
    """Rows of events, in the order of their names."""
    rows: dict[str, list[Call]] = {}
    for call in calls():
        rows.setdefault(str(call.event), []).append(call)
    lines = ["| event | level | component | sentence | fields |", "|---|---|---|---|---|"]
    for event, here in sorted(rows.items()):
        components = ", ".join(f"`{each}`" for each in sorted({call.component for call in here}))
        fields = ", ".join(f"`{each}`" for each in sorted({each for call in here for each in call.fields}))
        lines.append(f"| `{event}` | {LEVELS[here[0].method]} | {components} | {here[0].sentence} | {fields} |")
    return "\n".join(lines) + "\n"


def parts(page: str) -> tuple[str, str, str]:
    """What stands before the table in a page, the table, and what stands behind it."""
    before, _, rest = page.partition(BEGIN)
    now, _, behind = rest.partition(END)
    return before + BEGIN, now, END + behind


if __name__ == "__main__":
    before, _, behind = parts(PAGE.read_text())
    PAGE.write_text(f"{before}{table()}{behind}")
