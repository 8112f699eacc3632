"""Models of folders: registered as they are found there, and followed as their files change.

Nothing of weights that changed is served again; a model that cannot be read at the moment stays as it is.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from typing import Any

from stratakv.cache import Registered
from stratakv.errors import ClosedError, StrataKVError
from stratakv.registry import Discovery, RefusedModel


class Folders:
    """Which models came from a folder."""

    def __init__(
        self,
        manager: Any,  # noqa: ANN401 - the manager stands above this module
        entries: Callable[[], Mapping[str, Registered]],
    ) -> None:
        """Registers with a manager, of which `entries` are the models."""
        self._manager, self._entries = manager, entries
        # One at a time; by model: from which folder, and what its files looked like.
        self._lock = threading.Lock()
        self._loaded: dict[str, tuple[str, object]] = {}

    def follow(self, root: str, discover: Callable[[], Discovery]) -> Discovery:
        """Registers what is found, and unregisters what is not there any more; as `CacheManager.load_models`."""
        with self._lock:
            return self._follow(root, discover())

    def _follow(self, root: str, found: Discovery) -> Discovery:
        manager, refused = self._manager, list(found.refused)
        for model in found.models:
            try:
                known = self._loaded.get(model.name)
                seen = (root, (model.geometry, model.stamp()))
                if known == seen and model.name in manager:
                    continue
                version = model.weights_version()
                entry = self._entries().get(model.name)
                same = entry is not None and (entry.geometry, entry.weights_version) == (model.geometry, version)
                if known and known[0] == root and not same:
                    del self._loaded[model.name]
                    if model.name in manager:
                        manager.unregister(model.name)
                manager.register(model.name, model.geometry, weights_version=version, weights_bytes=model.weights_bytes)
                self._loaded[model.name] = seen
            except ClosedError:
                raise
            except (StrataKVError, OSError) as error:
                refused.append(RefusedModel(name=model.name, path=model.path, reason=str(error)))
        there = {model.name for model in found.models} | {model.name for model in found.refused}
        for name in [name for name, (source, _) in self._loaded.items() if source == root and name not in there]:
            del self._loaded[name]
            if name in manager:
                manager.unregister(name)
        registered = tuple(model for model in found.models if model.name in self._loaded)
        return Discovery(models=registered, refused=tuple(refused))
