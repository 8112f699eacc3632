"""What a demo run found: as a table for the terminal, as a verdict, and as one page that needs nothing else.

The verdict is about what was promised, not about speed: every answer equals the uncached one, the process that took
over found what the killed one had stored, and a bf16 run equals the uncached run with the same prefill split.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from itertools import groupby
from typing import Any

__all__ = ["Report", "Turn"]

_SOURCES = ("ram", "ssd", "computed")


@dataclass(frozen=True, kw_only=True)
class Turn:
    """One question and its answer, with and without the cache.

    Attributes:
        user: Who asked, from 1.
        turn: Which of the user's questions, from 1.
        prompt_tokens: Length of the whole prompt.
        reused_tokens: Of these, how many came from the cache.
        blocks: Tier of each reused block, in order.
        explanation: The cache's own sentence on it.
        restore_s: Time of match and load, part of `ttft_cached_s`.
        ttft_cold_s: Time to the first token without the cache.
        ttft_cached_s: The same with it.
        same: Whether the two answers are the same tokens.
        text: The answer.
        after_kill: Whether the process that served it took over from the killed one with this turn.
    """

    user: int
    turn: int
    prompt_tokens: int
    reused_tokens: int
    blocks: tuple[str, ...]
    explanation: str
    restore_s: float
    ttft_cold_s: float
    ttft_cached_s: float
    same: bool
    text: str
    after_kill: bool

    @property
    def ratio(self) -> float:
        """How many times sooner the first token was there."""
        return self.ttft_cold_s / self.ttft_cached_s

    @property
    def label(self) -> str:
        """Short name: user 2, turn 3."""
        return f"u{self.user}·t{self.turn}"

    def source(self) -> str:
        """Where the reused blocks came from, as "80 ram, 20 ssd"."""
        counts = [(self.blocks.count(tier), tier) for tier in _SOURCES if tier in self.blocks]
        return ", ".join(f"{count} {tier}" for count, tier in counts) or "nothing cached"


@dataclass(frozen=True, kw_only=True)
class Report:
    """A whole run.

    Attributes:
        model: Its name.
        block_tokens: Tokens per block.
        facts: What was set, as name and value: sizes, threads, versions.
        turns: In the order in which they were served.
        stats: What the second process counted, per tier.
        bf16: What the bf16 check found.
    """

    model: str
    block_tokens: int
    facts: dict[str, str]
    turns: tuple[Turn, ...]
    stats: dict[str, Any]
    bf16: dict[str, Any]

    def problems(self) -> list[str]:
        """Every promise that was not kept; empty if all were."""
        found = [f"{each.label}: the answer differs from the uncached one" for each in self.turns if not each.same]
        taken_over = [each for each in self.turns if each.after_kill]
        if not any("ssd" in each.blocks for each in taken_over):
            found.append("the process that took over found nothing on the SSD")
        if not self.bf16["same_split_equal"]:
            found.append("bf16: the answer differs from the uncached run with the same prefill split")
        if not self.bf16["reused_tokens"]:
            found.append("bf16: nothing was reused, so nothing was compared")
        return found

    def verdict(self) -> str:
        """One sentence on the answers."""
        problems = self.problems()
        if problems:
            return "FAILED: " + "; ".join(problems)
        return (
            f"All {len(self.turns)} answers are token-identical to the uncached run: cold, from RAM, from SSD, "
            "and after the process was killed."
        )

    def bf16_lines(self) -> list[str]:
        """What bf16 does to the bits, with and without a cache."""
        found = self.bf16
        equal = "equal" if found["same_split_equal"] else "NOT equal"
        one_shot = "equal" if found["one_shot_equal"] else "not equal"
        return [
            f"bf16, {found['reused_tokens']:,} of {found['prompt_tokens']:,} tokens reused: answer {equal} to the "
            "uncached run with the same prefill split, largest logit difference "
            f"{found['same_split_max_logit_difference']:.3g};",
            f"against a one-shot prefill: answer {one_shot}, largest logit difference "
            f"{found['one_shot_max_logit_difference']:.3g} at logits up to {found['largest_logit']:.3g}.",
        ]

    def table(self) -> list[str]:
        """One line per turn."""
        lines = [
            f"{'user':>4} {'turn':>4} {'prompt':>7} {'reused':>7}  {'blocks from':<18} "
            f"{'TTFT cold':>10} {'cached':>9} {'ratio':>7}  answer"
        ]
        for each in self.turns:
            if each.after_kill:
                lines.append(f"{'-- killed with SIGKILL while answering; a new process goes on --':^77}")
            same = "same" if each.same else "DIFFERS"
            lines.append(
                f"{each.user:>4} {each.turn:>4} {each.prompt_tokens:>7,} {each.reused_tokens:>7,}  {each.source():<18} "
                f"{each.ttft_cold_s:>8.3f} s {each.ttft_cached_s:>7.3f} s {each.ratio:>6.1f}x  {same}"
            )
        return lines

    def page(self) -> str:
        """The run as one HTML file: two pictures, the table, the answers."""
        facts = " · ".join(f"{escape(name)} {escape(value)}" for name, value in self.facts.items())
        bf16 = " ".join(self.bf16_lines())
        state = "bad" if self.problems() else "good"
        return _PAGE.format(
            title=f"stratakv demo: {escape(self.model)}",
            style=_STYLE,
            state=state,
            verdict=escape(self.verdict()),
            facts=facts,
            ttft=_ttft_picture(self.turns),
            blocks=_block_picture(self.turns, self.block_tokens),
            rows="\n".join(_row(each) for each in self.turns),
            bf16=escape(bf16),
        )


def _row(turn: Turn) -> str:
    cells = [
        str(turn.user),
        str(turn.turn),
        f"{turn.prompt_tokens:,}",
        f"{turn.reused_tokens:,}",
        turn.source(),
        f"{turn.ttft_cold_s:.3f} s",
        f"{turn.ttft_cached_s:.3f} s",
        f"{turn.restore_s * 1000:.0f} ms",
        f"{turn.ratio:.1f}x",
        "same" if turn.same else "differs",
        turn.text,
    ]
    style = ' class="kill"' if turn.after_kill else ""
    return f"<tr{style}>" + "".join(f"<td>{escape(each)}</td>" for each in cells) + "</tr>"


def _text(x: float, y: float, text: str, *, anchor: str = "middle", style: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" class="{style}">{escape(text)}</text>'


def _rectangle(x: float, y: float, width: float, height: float, style: str, hint: str) -> str:
    return (
        f'<rect x="{x:.1f}" y="{y:.1f}" width="{max(width, 0.5):.1f}" height="{max(height, 0.5):.1f}" class="{style}">'
        f"<title>{escape(hint)}</title></rect>"
    )


def _legend(x: float, y: float, entries: Iterable[tuple[str, str]]) -> list[str]:
    drawn = []
    for style, text in entries:
        drawn += [_rectangle(x, y - 9, 10, 10, style, text), _text(x + 15, y, text, anchor="start")]
        x += 30 + 7 * len(text)
    return drawn


def _svg(width: float, height: float, title: str, parts: Sequence[str]) -> str:
    body = "\n".join(parts)
    return f'<svg viewBox="0 0 {width:.0f} {height:.0f}" role="img" aria-label="{escape(title)}">\n{body}\n</svg>'


def _ticks(largest: float) -> list[float]:
    """Three to six round values from 0 up to the largest."""
    power = 1.0
    while power * 10 <= largest:
        power *= 10
    while power > largest:
        power /= 10
    step = next(each for each in (power / 5, power / 2, power, power * 2) if largest / each <= 5)
    return [step * index for index in range(int(largest / step) + 1)]


def _ttft_picture(turns: Sequence[Turn]) -> str:
    """Two bars per turn, on one linear scale; the kill is a line between two turns."""
    left, top, height = 56.0, 46.0, 220.0
    step = max(46.0, 840.0 / len(turns))
    width = left + step * len(turns) + 10
    largest = max(max(each.ttft_cold_s, each.ttft_cached_s) for each in turns)
    scale = height / largest
    base = top + height
    parts = _legend(
        left,
        18,
        [
            ("cold", "cold: the whole prompt is computed"),
            ("cached", "cached: only what is new; the number is the ratio"),
        ],
    )
    for tick in _ticks(largest):
        y = base - tick * scale
        parts.append(f'<line x1="{left:.1f}" y1="{y:.1f}" x2="{width - 10:.1f}" y2="{y:.1f}" class="grid"/>')
        parts.append(_text(left - 8, y + 4, f"{tick:.3g} s", anchor="end", style="small"))
    bar = step * 0.36
    for index, each in enumerate(turns):
        x = left + step * index + step * 0.1
        for offset, style, seconds in ((0.0, "cold", each.ttft_cold_s), (bar + 2, "cached", each.ttft_cached_s)):
            hint = f"{each.label}: {style} {seconds:.3f} s"
            parts.append(_rectangle(x + offset, base - seconds * scale, bar, seconds * scale, style, hint))
        parts.append(_text(x + bar, base + 31, f"{each.ratio:.1f}x", style="small"))
        parts.append(_text(x + bar, base + 16, each.label, style="small"))
        if each.after_kill:
            line = left + step * index
            parts.append(f'<line x1="{line:.1f}" y1="{top - 14:.1f}" x2="{line:.1f}" y2="{base:.1f}" class="killed"/>')
            parts.append(_text(line + 5, top - 6, "SIGKILL, new process", anchor="start", style="small killtext"))
    return _svg(width, base + 42, "Time to first token per turn, cold and cached", parts)


def _block_picture(turns: Sequence[Turn], block_tokens: int) -> str:
    """One strip per turn, as long as its prompt; runs of blocks from the same place are one piece."""
    left, top, row, gap = 56.0, 32.0, 18.0, 6.0
    width = left + 850
    scale = 840.0 / max(each.prompt_tokens for each in turns)
    parts = _legend(left, 14, [("ram", "from RAM"), ("ssd", "from SSD"), ("computed", "computed")])
    y = top
    for each in turns:
        if each.after_kill:
            parts.append(f'<line x1="0" y1="{y + 3:.1f}" x2="{width - 10:.1f}" y2="{y + 3:.1f}" class="killed"/>')
            parts.append(_text(width - 10, y + 15, "SIGKILL, new process", anchor="end", style="small killtext"))
            y += 20
        parts.append(_text(left - 8, y + row - 5, each.label, anchor="end", style="small"))
        x = left
        runs = [(tier, len(list(run)) * block_tokens) for tier, run in groupby(each.blocks)]
        runs.append(("computed", each.prompt_tokens - each.reused_tokens))
        for source, tokens in runs:
            hint = f"{each.label}: {tokens:,} tokens {'computed' if source == 'computed' else 'from ' + source.upper()}"
            parts.append(_rectangle(x, y, tokens * scale, row, source, hint))
            x += tokens * scale
        y += row + gap
    return _svg(width, y + 4, "Where each block of each prompt came from", parts)


_STYLE = """
:root { color-scheme: light dark; --ink: #1c2430; --soft: #5d6878; --line: #d8dde4; --paper: #ffffff;
  --cold: #a9b3c1; --ram: #1f6fc4; --ssd: #d98a1d; --computed: #c9d0d9; --killed: #b3261e; --good: #1d7a46; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e8ee; --soft: #9aa5b4; --line: #363e49; --paper: #14181e;
  --cold: #66717f; --ram: #5aa0ec; --ssd: #e8a94a; --computed: #434c58; --killed: #f2827a; --good: #63c58d; } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); max-width: 960px;
  margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.4rem; margin-bottom: 0; } h2 { font-size: 1.05rem; margin: 2rem 0 .4rem; }
p.facts { color: var(--soft); margin-top: .2rem; }
p.verdict { border-left: 4px solid; padding-left: .8rem; font-weight: 600; }
p.good { border-color: var(--good); } p.bad { border-color: var(--killed); }
svg { width: 100%; height: auto; } svg text { fill: var(--ink); font-size: 12px; } svg text.small { font-size: 11px; }
svg text.killtext { fill: var(--killed); }
.grid { stroke: var(--line); } .killed { stroke: var(--killed); stroke-width: 1.5; stroke-dasharray: 5 3; }
.cold { fill: var(--cold); } .cached, .ram { fill: var(--ram); } .ssd { fill: var(--ssd); }
.computed { fill: var(--computed); }
div.wide { overflow-x: auto; } table { border-collapse: collapse; font-size: 13px; }
th, td { text-align: right; padding: .25rem .5rem; border-bottom: 1px solid var(--line); white-space: nowrap;
  vertical-align: top; }
th:last-child, td:last-child { text-align: left; white-space: normal; min-width: 18rem; }
tr.kill td { border-top: 2px dashed var(--killed); }
"""

_PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{style}</style>
<h1>{title}</h1>
<p class="facts">{facts}</p>
<p class="verdict {state}">{verdict}</p>
<h2>Time to first token, in the order served</h2>
{ttft}
<h2>Where each block came from</h2>
{blocks}
<h2>Turns</h2>
<div class="wide"><table>
<tr><th>user</th><th>turn</th><th>prompt</th><th>reused</th><th>blocks from</th><th>TTFT cold</th><th>TTFT cached</th>
<th>of that restore</th><th>ratio</th><th>tokens</th><th>answer</th></tr>
{rows}
</table></div>
<h2>bf16</h2>
<p>{bf16}</p>
</html>
"""
