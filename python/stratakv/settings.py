"""How settings are read: sizes, times, tables of a file, and text from the environment.

What makes no sense is an error that names the setting, its value, and what was expected.
"""

from __future__ import annotations

import difflib
import re
from pathlib import Path
from typing import Any

from stratakv.errors import ConfigError

_UNITS = {"": 1, "B": 1} | {
    prefix + suffix: base**power
    for power, prefix in enumerate("KMGT", start=1)
    for suffix, base in (("B", 1000), ("iB", 1024), ("", 1024))
}
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*")
_NUMBERS = {"floor", "interval_s", "half_life_s", "idle_s", "deadline_s", "ttl_s", "poll_s"}
_NUMBERS |= {"trace_ratio", "otlp_every_s"}
_INTEGERS = ("threads", "keep_days", "dimension")
_FLAGS = ("enabled", "cluster", "required")


def parse_bytes(value: int | str, name: str) -> int:
    """Reads a size in bytes.

    Args:
        value: bytes, or text such as ``"8GB"`` (powers of 1000), ``"8GiB"`` or ``"8G"`` (powers of 1024).
        name: the setting, for the error.

    Raises:
        ConfigError: the text is no size, or the size is not positive.
    """
    parsed: float | None = None
    if isinstance(value, int) and not isinstance(value, bool):
        parsed = value
    elif isinstance(value, str) and (found := _SIZE.fullmatch(value)):
        units = {unit.lower(): factor for unit, factor in _UNITS.items()}
        factor = units.get(found[2].lower())
        parsed = None if factor is None else float(found[1]) * factor
    if parsed is None or not 1 <= parsed <= 2**60:
        raise ConfigError(f'{name} is {value!r}, expected a positive size in bytes, as 8589934592, "8GiB" or "8GB"')
    return int(parsed)


def parse_budget(value: int | str, name: str) -> int:
    """Reads a size in bytes, or 0 for nothing.

    Args:
        value: as of `parse_bytes`, or 0.
        name: the setting, for the error.

    Raises:
        ConfigError: it is neither.
    """
    return 0 if value in (0, "0") and not isinstance(value, bool) else parse_bytes(value, name)


def check_seconds(name: str, value: object) -> None:
    """Raises ConfigError, if the setting of that name is no time."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not (number and 0.001 <= value <= 1e9):  # type: ignore[operator]  # it is a number
        raise ConfigError(f"{name} is {value!r}, expected seconds from 0.001")


def shown(value: object) -> str:
    """What stands where a table should, without what a table holds: there may be a secret in it."""
    return repr(value) if value is None or isinstance(value, int | float) else f"a {type(value).__name__}"


def begins_with(scheme: str) -> str:
    """What stands where the scheme of a URL should, without a user and password."""
    return scheme if "@" not in scheme else f"***@{scheme.rpartition('@')[2]}"


def read_toml(path: Path) -> dict[str, Any]:
    """The tables of a file; raises ConfigError, if there are none."""
    # Most stores have no file.
    import tomllib

    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: is not TOML: {error}") from error


def from_text(section: str, key: str, text: str) -> object:
    """The value of an environment variable; raises ConfigError, if it is none of that key."""
    if section in ("ssd", "dragonfly", "postgres", "qdrant") and key in _FLAGS:
        if text.lower() not in ("true", "false", "1", "0"):
            raise ConfigError(f"STRATAKV_{section.upper()}_{key.upper()} is {text!r}, expected true or false")
        return text.lower() in ("true", "1")
    if key in _INTEGERS:
        if not text.isdecimal():
            raise ConfigError(f"STRATAKV_{section.upper()}_{key.upper()} is {text!r}, expected an integer")
        return int(text)
    if section in ("models", "dragonfly", "postgres", "qdrant", "observe") and key in _NUMBERS:
        try:
            return float(text)
        except ValueError:
            raise ConfigError(f"STRATAKV_{section.upper()}_{key.upper()} is {text!r}, expected a number") from None
    return text


def unknown_name(kind: str, name: str, valid: list[str], where: str) -> ConfigError:
    """The error of a name that is none, with the nearest that is."""
    near = difflib.get_close_matches(name, valid, n=1, cutoff=0)
    return ConfigError(f"{where}: unknown {kind} {name!r}; did you mean {near[0]!r}?")
