"""Levels of the log by component: which there are, and how they are written in settings.

A component is a module without the package's name, as ``tiers.dragonfly``, a folder, as ``tiers``, or ``""``, all.
"""

from __future__ import annotations

import difflib
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Literal, get_args

from stratakv.errors import ConfigError

Level = Literal["debug", "info", "warning", "error"]

_PACKAGE = Path(__file__).parent


def levels_of(value: object) -> dict[str, Level]:
    """Levels by component, of a table or of text as ``"info,tiers.dragonfly=debug"``.

    Raises:
        ConfigError: it is neither, or there is no such component or level.
    """
    if isinstance(value, str):
        pairs = (each.rpartition("=") for each in value.split(",") if each.strip())
        value = {component.strip(): level.strip() for component, _, level in pairs}
    if not isinstance(value, Mapping):
        raise ConfigError(f"observe.log_levels is {value!r}, expected a table of levels by component")
    return {component: level_of(component, level) for component, level in value.items()}


def level_of(component: object, level: object) -> Level:
    """The level, if both exist; raises ConfigError, if not."""
    known = components()
    if component not in known:
        near = difflib.get_close_matches(str(component), known, n=1, cutoff=0)
        raise ConfigError(
            f"observe.log_levels has the component {component!r}, expected '' for all, or a module of stratakv;"
            f" did you mean {near[0]!r}?"
        )
    for valid in get_args(Level):
        if level == valid:
            return valid  # type: ignore[no-any-return]  # it is one of them
    hint = "; put a component with a dot between quotes" if isinstance(level, Mapping) else ""
    raise ConfigError(
        f"observe.log_levels has the level {level!r} for {component!r}, expected one of"
        f" {', '.join(get_args(Level))}{hint}"
    )


@functools.cache
def components() -> tuple[str, ...]:
    """What can have a level of its own."""
    found = (path.relative_to(_PACKAGE).with_suffix("").parts for path in sorted(_PACKAGE.rglob("*.py")))
    return tuple(".".join(parts).removesuffix("__init__").removesuffix(".") for parts in found)
