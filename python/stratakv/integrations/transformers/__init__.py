"""Hugging Face transformers: a prompt's cached prefix becomes the start of what the model generates on.

The idea: a `DynamicCache` or `StaticCache` of n tokens is what the model would hold after it computed them, so a cache
restored from stored keys and values lets `model.generate` compute only what follows. The invariant is that the output
is what it would be without the cache. It holds where a token's keys and values depend on the tokens up to it and on
nothing else, so this package refuses, with an `InputError`, every model and every argument of which that is not true.

    match ─▶ restore ─▶ catch up ─▶ prefill the rest ─▶ generate ─▶ store
             n ≥ 0      rows that    at least one        prompt and answer, but for the last token: it was never an
             per row    lag behind   token               input, so it has no keys and values

`generate` is all of it in one call, `restore` and `store` are its parts; `stream` hands the text over as it is made,
`Chat` keeps a conversation. A problem of the cache is never a problem of the request: it is logged and costs prefill
time.

The adapter was tested with transformers 5.19 and 5.23 on torch 2.13, and checks the installed versions when it is
imported.
"""

from stratakv.integrations.engine import require

require("torch", "2.6", "3")
require("transformers", "5.19", "6")

# What these modules import is known to be there, and of a known version, only now.
from stratakv.integrations.transformers.chat import Chat  # noqa: E402
from stratakv.integrations.transformers.content import Restored, restore, store  # noqa: E402
from stratakv.integrations.transformers.generation import generate  # noqa: E402
from stratakv.integrations.transformers.refusals import geometry  # noqa: E402
from stratakv.integrations.transformers.streaming import stream  # noqa: E402

__all__ = ["Chat", "Restored", "generate", "geometry", "restore", "store", "stream"]
