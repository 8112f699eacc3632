"""What nobody may read in a log: secrets are blanked out before a line exists.

Two ways they come there: a field that is named like one, and text that holds one, as a URL with a password. What an
error's text says is not ours, so all text goes through here.
"""

from __future__ import annotations

import functools
import math
import numbers
import re
from collections.abc import Mapping

BLANK = "***"

# What the name of a secret holds, and what it ends with: `api_key`, but not `key_bytes`; `token`, but not `tokens`.
_HOLDS = ("password", "passwd", "passphrase", "secret", "credential")
_ENDS = ("token", "key", "authorization", "cookie")
# How deep tables and lists within a field are looked into.
_DEPTH = 4


def is_secret(name: str) -> bool:
    """Whether a field of that name is taken to be one."""
    name = name.lower()
    return name.endswith(_ENDS) or any(word in name for word in _HOLDS)


@functools.cache
def _patterns() -> tuple[re.Pattern[str], re.Pattern[str]]:
    # Compiled when a line is written, not when the package is imported.
    userinfo = re.compile(r"\b([a-z][a-z0-9+.-]*://)[^/\s]*@", re.IGNORECASE)
    named = re.compile(
        r"""\b((?:\w*(?:password|passwd|passphrase|secret)|(?:\w+[-_])?token|(?:\w+[-_])?api[-_]?key|authorization)
        ["']?\s*)
        (?: (=\s*)  (?: "[^"]*" | '[^']*' | [^\s&,;)\]}]+ )
          | (:\s*)  (?: "[^"]*" | '[^']*' | (?:bearer|basic)\s+\S+ ) )""",
        re.IGNORECASE | re.VERBOSE,
    )
    return userinfo, named


def text(value: str) -> str:
    """Text without users and passwords of URLs, and without what is given as ``password=...`` or like it."""
    userinfo, named = _patterns()
    if "@" in value:
        value = userinfo.sub(rf"\1{BLANK}@", value)
    if "=" in value or ":" in value:
        value = named.sub(lambda found: f"{found[1]}{found[2] or found[3]}{BLANK}", value)
    return value


def field(name: str, value: object, depth: int = 0) -> object:
    """The value of a field as it may be written: of the types of JSON, and without secrets."""
    if value is None or isinstance(value, bool):
        return value
    if is_secret(name):
        return BLANK
    if isinstance(value, str):
        return text(value)
    if isinstance(value, numbers.Integral):
        return int(value)
    if isinstance(value, numbers.Real):
        # JSON has no other numbers.
        return float(value) if math.isfinite(value) else str(value)
    if isinstance(value, bytes):
        return value.hex()
    if isinstance(value, Mapping) and depth < _DEPTH:
        return {text(str(key)): field(str(key), each, depth + 1) for key, each in value.items()}
    if isinstance(value, list | tuple | set | frozenset) and depth < _DEPTH:
        return [field("", each, depth + 1) for each in value]
    return text(_shown(value))


def argument(value: object) -> object:
    """An argument of a sentence: the same, or its text without the secrets that are in it."""
    if value is None or isinstance(value, int | float):
        return value
    shown = _shown(value)
    clean = text(shown)
    return value if clean == shown else clean


def _shown(value: object) -> str:
    try:
        return str(value)
    except Exception:
        # A line less telling is better than a request that fails for one.
        return f"<{type(value).__name__}>"
