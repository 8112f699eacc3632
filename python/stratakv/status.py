"""`stratakv status`: whether each tier of a configuration answers, and which modes are degraded.

It asks each tier by itself and opens no store: a directory that a running store has is none of its business.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from stratakv import _native
from stratakv.config import Config
from stratakv.errors import ConfigError, StoreError
from stratakv.manager import degraded
from stratakv.tiers.dragonfly import Dragonfly
from stratakv.tiers.postgres import Postgres
from stratakv.tiers.qdrant import Qdrant


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `stratakv status`."""
    parser.add_argument("--config", type=Path, metavar="FILE", help="a TOML file; the environment is applied to it")
    parser.add_argument("--json", action="store_true", help="for programs")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Asks every tier; 0: all that are configured answer, 1: not all, 2: the configuration makes no sense."""
    try:
        config = Config.load(args.config)
    except ConfigError as error:
        print(f"stratakv status: {error}", file=sys.stderr)
        return 2
    tiers: dict[str, dict[str, Any]] = {"ram": {"state": "ok", "capacity_bytes": config.ram.capacity_bytes}}
    tiers["ssd"], serves = _ssd(config)
    stats = {}
    for name, kind in (("dragonfly", Dragonfly), ("postgres", Postgres), ("qdrant", Qdrant)):
        settings = getattr(config, name)
        if settings.url is None and getattr(settings, "path", None) is None:
            tiers[name] = {"state": "off"}
            continue
        tiers[name], stats[name] = _asked(kind, replace(settings, required=False))
    modes = degraded(stats.get("dragonfly"), stats.get("postgres"), stats.get("qdrant"), ssd_serves=serves)
    if args.json:
        print(json.dumps({"tiers": tiers, "degraded": modes}))
    else:
        for name, tier in tiers.items():
            more = ", ".join(f"{key} {value}" for key, value in tier.items() if key != "state" and value is not None)
            print(f"{name:<10} {tier['state']}" + (f": {more}" if more else ""))
        print("degraded   " + (", ".join(modes) or "no"))
    return 1 if modes else 0


def _ssd(config: Config) -> tuple[dict[str, Any], bool | None]:
    if not config.ssd.enabled:
        return {"state": "off"}, None
    path = Path(str(config.ssd.path))
    if not path.exists():
        return {"state": "ok", "path": str(path), "holds": "nothing yet"}, True
    try:
        archive = _native.Archive(path)
    except StoreError as error:
        return {"state": "fails", "path": str(path), "why": str(error)}, False
    use = "in use" if archive.in_use else "not in use"
    return {"state": "ok", "path": str(path), "holds": f"{len(archive.models())} models, {use}"}, True


def _asked(kind: Callable[[Any], Any], settings: Any) -> tuple[dict[str, Any], Any]:  # noqa: ANN401 - of each tier
    begun = time.perf_counter()
    try:
        tier = kind(settings)
    except (ConfigError, StoreError) as error:
        return {"state": "fails", "why": str(error)}, None
    try:
        stats = tier.stats()
    finally:
        tier.close()
    why = getattr(stats, "refused", None) or getattr(stats, "misfit", None) or stats.guard.last_error
    if why is not None:
        return {"state": "fails", "why": why}, stats
    return {"state": "ok", "answers_in": f"{1000 * (time.perf_counter() - begun):.0f} ms"}, stats
