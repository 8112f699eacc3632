"""LMCache: a stratakv store behind it, as a storage plug-in, a remote connector or an L2 adapter of its server.

    engine ─▶ LMCache ─▶ memory objects in its CPU buffer ──put──▶ RAM ──▶ SSD, and the tier that nodes share
                                    ▲                              │
                                    └────────────get───────────────┘

A chunk of LMCache is a block here, under LMCache's own key. Bytes go between LMCache's buffer and the store without a
copy in between.

The invariant: a memory object that is returned holds what was put under its key in the same shape and type; anything
else is a miss. A problem of the cache is logged and is a miss, too; only what is wrong with the configuration raises,
and that when LMCache makes the storage.
"""

from stratakv.integrations.engine import require

VERSION = require("lmcache", "0.5.6", "0.5.7")

# Another version of LMCache is refused before it is imported.
from stratakv.integrations.lmcache.connector import StrataConnector, StrataConnectorAdapter  # noqa: E402
from stratakv.integrations.lmcache.plugin import StrataStoragePlugin  # noqa: E402
from stratakv.integrations.lmcache.server import StrataL2Adapter  # noqa: E402

__all__ = ["StrataConnector", "StrataConnectorAdapter", "StrataL2Adapter", "StrataStoragePlugin"]
