"""What a store keeps in its directory beside its blocks: quotas set while it ran, and versions that are retired."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from typing import Any, Literal

from stratakv import _native, log
from stratakv.config import Config, Quota
from stratakv.errors import InputError, StoreFormatError
from stratakv.quotas import Tier, check

_log = log.of(__name__)


class Kept:
    """Who uses it has the lock of the manager's table."""

    def __init__(self, store: _native.Store, config: Config) -> None:
        """Reads what was kept."""
        self._store, self._config = store, config
        # As they were set while the store ran, now or before; None: the one of the configuration was taken away.
        self.set: dict[str, dict[str, Quota | None]] = {"models": {}, "tenants": {}}
        self.retired: set[bytes] = set()
        try:
            kept = json.loads(store.kept_quotas() or b"{}")
            quotas = {
                kind: {name: None if quota is None else Quota.of(quota) for name, quota in kept.get(kind, {}).items()}
                for kind in self.set
            }
            self.set, self.retired = quotas, set(map(bytes.fromhex, kept.get("retired", ())))
        except (StoreFormatError, InputError, ValueError, AttributeError) as error:
            _log.warning("quotas_unknown", "quotas that were set before are not known: %s", error)

    def keep(self) -> None:
        """Writes it to the directory."""
        table: dict[str, Any] = {
            kind: {name: None if quota is None else asdict(quota) for name, quota in quotas.items()}
            for kind, quotas in self.set.items()
        }
        if self.retired:
            table["retired"] = sorted(fingerprint.hex() for fingerprint in self.retired)
        self._store.keep_quotas(json.dumps(table).encode())

    def quotas(self, kind: Literal["models", "tenants"]) -> dict[str, Quota]:
        """The quotas that hold, by name."""
        known = {**getattr(self._config.quotas, kind), **self.set[kind]}
        return {name: quota for name, quota in known.items() if quota is not None}

    def check_kept(self) -> None:
        """Whether what is reserved can be kept; what was set in larger tiers than these is not in the way."""
        try:
            self.check({}, ())
        except InputError as error:
            kept = [quota for quotas in self.set.values() for quota in quotas.values() if quota is not None]
            if not kept:
                raise
            _log.warning("reserves_not_kept", "what was reserved before is not, until it is set again: %s", error)
            for quotas in self.set.values():
                for name, quota in quotas.items():
                    quotas[name] = None if quota is None else quota.without_reserves()
            self.check({}, ())

    def check(self, changes: Mapping[str, Mapping[str, Quota]], models: Iterable[str]) -> None:
        """Whether what is reserved can be kept, with these changes, beside models that are registered.

        Raises:
            InputError: it cannot.
        """
        ram, step, ssd, head = self._store.divisible()
        kinds: tuple[Literal["models", "tenants"], ...] = ("models", "tenants")
        for kind in kinds:
            quotas = {**self.quotas(kind), **changes.get(kind, {})}
            room: dict[Tier, tuple[int, int]] = {"ram": (ram, step if kind == "models" else 1)}
            # Without an SSD tier nothing is reserved there.
            if ssd and kind == "models":
                count = len({*quotas, *models})
                room["ssd"] = (max(ssd - head * count, 0), int(self._config.ssd.segment_bytes))
            elif ssd:
                room["ssd"] = (ssd, 1)
            check(((f"{kind[:-1]} {name!r}", quota) for name, quota in quotas.items()), room)
