"""What the codecs cost a real model: SmolLM2-135M-Instruct, whose prefix comes out of the cache.

Each window of text is a prefix of 768 tokens and the 256 after it. The prefix is prefilled exactly, its keys and values
(fp16, blocks of 64 tokens) go to SSD through a codec and come back into another store, and the 256 tokens are scored
on them. Beside it the same with keys and values as they were. The Kullback-Leibler divergence between both
distributions is the sharp measure; top-1 is how often the most likely token is the same. The text is Python's own
language reference, as the standard library carries it. `ARGS=N` takes N windows instead of six.
"""

from __future__ import annotations

import pydoc_data.topics
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
from rows import Row, finish, row, skipped

import stratakv
from stratakv import Config, Geometry, RamConfig, SsdConfig

PREFIX, SCORED, WINDOWS = 768, 256, 6
BLOCK = 64
CODECS = ("none", "int8_sym", "int8_asym", "k8v4", "int4")
MUST = {"int8_sym": (0.2, 99.0), "int8_asym": (0.2, 99.0), "k8v4": (2.0, None), "int4": (6.0, 97.0)}


def through(codec: str, geometry: Geometry, tokens: np.ndarray, kv: np.ndarray, folder: Path) -> tuple[np.ndarray, int]:
    """What comes back from SSD, and how many bytes lay there."""
    ssd = SsdConfig(path=folder, capacity_bytes="1GiB", segment_bytes="64MiB")
    config = Config(ram=RamConfig(capacity_bytes="256MiB"), ssd=ssd)
    with stratakv.open(config) as store:
        cache = store.register("smollm2", geometry)
        cache.set_cold_codec(codec)
        assert cache.put(tokens, kv, layout="LKHND") == len(tokens)
        store.flush()
        used = cache.stats().tiers["ssd"].used_bytes
        assert cache.stats().not_encodable_blocks == 0
    with stratakv.open(config) as store, store.register("smollm2", geometry).match(tokens) as hit:
        out = np.zeros_like(kv)
        assert hit.load(out, layout="LKHND") == len(tokens)
        return out, used


def measure(say: Callable[[str], None], windows: int) -> list[Row]:
    """A row for each codec and measure."""
    import torch  # Only here: it may be missing.
    from transformers import DynamicCache

    from stratakv.demo import model_home
    from stratakv.demo.model import smollm2

    chat = smollm2(model_home(), say)
    model = chat.load(torch.float32)
    text = "\n\n".join(pydoc_data.topics.topics[name] for name in sorted(pydoc_data.topics.topics))
    ids = chat.encode(text)[: windows * (PREFIX + SCORED)]
    shape = model.config
    geometry = Geometry(
        layers=shape.num_hidden_layers,
        kv_heads=shape.num_key_value_heads,
        head_dim=shape.hidden_size // shape.num_attention_heads,
        dtype="fp16",
        block_tokens=BLOCK,
    )

    def scores(kv: np.ndarray, window: torch.Tensor) -> torch.Tensor:
        past = DynamicCache()
        for layer, planes in enumerate(torch.from_numpy(kv).float()):
            past.update(planes[0][None].clone(), planes[1][None].clone(), layer)
        return torch.log_softmax(model(window[:, PREFIX:], past_key_values=past).logits[0].double(), -1)

    found: dict[str, list[dict[str, Any]]] = {codec: [] for codec in CODECS}
    for start in range(0, len(ids), PREFIX + SCORED):
        window = torch.tensor([ids[start : start + PREFIX + SCORED]])
        with torch.inference_mode():
            past = DynamicCache()
            model(window[:, :PREFIX], past_key_values=past)
            exact = np.stack([np.stack([layer.keys[0].numpy(), layer.values[0].numpy()]) for layer in past.layers])
            right = scores(exact, window)
            for codec in CODECS:
                with tempfile.TemporaryDirectory() as folder:
                    kv = exact.astype(np.float16)
                    back, used = through(codec, geometry, np.array(ids[start : start + PREFIX]), kv, Path(folder))
                got = scores(back, window)
                error = back.astype(np.float64) - exact
                norms = np.sqrt((error**2).sum((0, 2, 3, 4)) / (exact.astype(np.float64) ** 2).sum((0, 2, 3, 4)))
                found[codec].append(
                    {
                        "kl": float((right.exp() * (right - got)).sum(-1).mean()) * 1000,
                        "top": float((right.argmax(-1) == got.argmax(-1)).double().mean()) * 100,
                        "k": float(norms[0]) * 100,
                        "v": float(norms[1]) * 100,
                        "bits": used * 8 / kv.size,
                    }
                )
        say(f"window {start // (PREFIX + SCORED) + 1} of {windows}")
    rows = []
    for codec, each in found.items():
        value = {name: mean(one[name] for one in each) for name in each[0]}
        kl, top = MUST.get(codec, (None, None))
        n = len(each) * SCORED
        rows += [
            row(f"{codec}: KL", value["kl"], "mnat", n=n, must=None if kl is None else f"value <= {kl}"),
            row(f"{codec}: top-1", value["top"], "%", n=n, must=None if top is None else f"value >= {top}"),
            row(f"{codec}: keys, relative error", value["k"], "%", n=len(each)),
            row(f"{codec}: values, relative error", value["v"], "%", n=len(each)),
            row(f"{codec}: bits on SSD", value["bits"], "", n=len(each), limit="fp16", limit_value=16.0,
                ratio=16 / value["bits"]),
        ]  # fmt: skip
    return rows


def main() -> None:
    """Scores every codec, prints the table and writes `benches/out/accuracy.json`."""
    absent = skipped("accuracy", "torch", "transformers", "gguf", "accelerate")
    windows = int(sys.argv[1]) if len(sys.argv) > 1 else WINDOWS
    finish("accuracy", absent or measure(lambda text: print(text, file=sys.stderr, flush=True), windows))


if __name__ == "__main__":
    main()
