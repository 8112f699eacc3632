"""What the codecs cost a real model: SmolLM2-135M-Instruct, whose prefix comes out of the cache.

Each window of text is a prefix of 768 tokens and the 256 after it. The prefix is prefilled exactly, its keys and values
(fp16, blocks of 64 tokens) go to SSD through a codec and come back into another store, and the 256 tokens are scored
on them. Beside it the same with keys and values as they were. The Kullback-Leibler divergence between both
distributions is the sharp measure; top-1 is how often the most likely token is the same. By layer: the errors of keys
and of values, the least cosine of a token's, and the error of attention's output over the prefix, with the queries
of the scored tokens. The text is Python's own language reference, as the standard library carries it. `ARGS=N` takes N
windows instead of six; `ARGS=extract` writes the extract that the tests use, and `ARGS=picture` draws what was measured
last, docs/codecs.svg.
"""

from __future__ import annotations

import json
import math
import pydoc_data.topics
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from statistics import mean, median
from typing import Any

import numpy as np
from rows import OUT, ROOT, Row, finish, row, skipped

import stratakv
from stratakv import Codec, Config, Geometry, RamConfig, SsdConfig

PREFIX, SCORED, WINDOWS = 768, 256, 6
BLOCK = 64
CODECS = ("none", "int8_sym", "int8_asym", "k8v4", "int4")
# What is not the default, and why: clipping, with fine scales and with coarse ones; and coarse ones.
COARSE = {"keys": "tensor", "values": "tensor"}
OTHERS = {
    "int8_sym, clip 99.99": Codec("int8_sym", clip=99.99),
    "int8_sym by tensor": Codec("int8_sym", **COARSE),
    "int8_sym by tensor, clip 99.99": Codec("int8_sym", clip=99.99, **COARSE),
    "int8_sym by token": Codec("int8_sym", keys="token", values="token"),
}
MUST = {"int8_sym": (0.2, 99.0), "int8_asym": (0.2, 99.0), "k8v4": (2.0, None), "int4": (6.0, 97.0)}


def through(
    codec: str | Codec, geometry: Geometry, tokens: np.ndarray, kv: np.ndarray, folder: Path
) -> tuple[np.ndarray, int]:
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


def attended(queries: np.ndarray, kv: np.ndarray) -> np.ndarray:
    """Attention's output `[L, H, Q, D]` of queries `[L, H, Q, D]` over keys and values `[L, K, KV heads, N, D]`."""
    layers, heads, count, dim = queries.shape
    grouped = queries.reshape(layers, kv.shape[2], -1, dim)
    logits = grouped @ kv[:, 0].swapaxes(-1, -2) / np.sqrt(dim)
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    return (weights / weights.sum(-1, keepdims=True) @ kv[:, 1]).reshape(layers, heads, count, dim)


def by_layer(exact: np.ndarray, back: np.ndarray, queries: np.ndarray) -> dict[str, list[float]]:
    """Errors of each layer, relative in the L2 norm, in per cent; and the least cosine of a token's keys or values."""

    def error(right: np.ndarray, got: np.ndarray) -> list[float]:
        flat = right.reshape(len(right), -1), (got - right).reshape(len(right), -1)
        return list(100 * np.linalg.norm(flat[1], axis=1) / np.linalg.norm(flat[0], axis=1))

    cosine = (exact * back).sum(-1) / (np.linalg.norm(exact, axis=-1) * np.linalg.norm(back, axis=-1) + 1e-30)
    return {
        "keys": error(exact[:, 0], back[:, 0]),
        "values": error(exact[:, 1], back[:, 1]),
        "attention output": error(attended(queries, exact), attended(queries, back)),
        "least cosine": list(cosine.reshape(len(exact), -1).min(1)),
    }


def loaded(say: Callable[[str], None]) -> tuple[Any, Any, dict[int, Any]]:
    """The chat, its model, and the queries of its last call, by layer."""
    import torch  # Only here: it may be missing.
    from transformers import AttentionInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

    from stratakv.demo import model_home
    from stratakv.demo.model import smollm2

    queries: dict[int, Any] = {}

    def attention(module: Any, query: Any, *args: Any, **more: Any) -> Any:  # noqa: ANN401 (a layer, and tensors)
        queries[module.layer_idx] = query[0]
        return sdpa_attention_forward(module, query, *args, **more)

    AttentionInterface.register("noted", attention)
    ALL_MASK_ATTENTION_FUNCTIONS.register("noted", ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
    chat = smollm2(model_home(), say)
    model = chat.load(torch.float32)
    model.set_attn_implementation("noted")
    return chat, model, queries


def extract(say: Callable[[str], None]) -> None:
    """Writes keys and values of some layers for 128 tokens, and the queries of the 32 after them."""
    import torch
    from transformers import DynamicCache

    chat, model, queries = loaded(say)
    ids = torch.tensor([chat.encode(pydoc_data.topics.topics["assignment"])[:160]])
    past = DynamicCache()
    with torch.inference_mode():
        model(ids, past_key_values=past)
    layers = [0, len(past.layers) // 2, len(past.layers) - 1]
    kv = np.stack([np.stack([past.layers[at].keys[0].numpy(), past.layers[at].values[0].numpy()]) for at in layers])
    asked = np.stack([queries[at][:, 128:].numpy() for at in layers])
    target = ROOT / "tests" / "fixtures" / "smollm2.npz"
    target.parent.mkdir(exist_ok=True)
    np.savez_compressed(target, kv=kv[:, :, :, :128].astype(np.float16), queries=asked.astype(np.float16))
    say(f"{target.relative_to(ROOT)}: {target.stat().st_size} bytes")


def picture() -> None:
    """Draws bits against divergence, from the rows that the last run wrote."""
    rows = {each["name"]: each["value"] for each in json.loads((OUT / "accuracy.json").read_text())}
    left, top, width, height = 60, 20, 500, 250

    def at(bits: float, mnat: float) -> tuple[float, float]:
        return left + (bits - 4) / 14 * width, top + (1 - (math.log10(mnat) + 5) / 6) * height

    ink = 'fill="none" stroke="#888"'
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width + 80} {height + 70}" font-family="sans-serif" '
        'font-size="12" fill="#888">',
        f'<rect x="{left}" y="{top}" width="{width}" height="{height}" {ink}/>',
        f'<text x="{left + width / 2}" y="{top + height + 40}" text-anchor="middle">bits a value, all included</text>',
        f'<text x="14" y="{top + height / 2}" text-anchor="middle" transform="rotate(-90 14 {top + height / 2})">'
        "KL divergence, mnat</text>",
    ]
    for bits in range(4, 18, 2):
        x, y = at(bits, 1e-5)
        lines.append(f'<text x="{x:.1f}" y="{y + 18:.1f}" text-anchor="middle">{bits}</text>')
    for power in range(-5, 2):
        x, y = at(4, 10.0**power)
        lines.append(f'<path d="M{x:.1f} {y:.1f}h{width}" {ink} opacity="0.3"/>')
        lines.append(f'<text x="{x - 6:.1f}" y="{y + 4:.1f}" text-anchor="end">{10.0**power:g}</text>')
    for codec in CODECS:
        x, y = at(rows[f"{codec}: bits on SSD"], rows[f"{codec}: KL"])
        lines.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="#2a7"/>')
        lines.append(f'<text x="{x + 8:.1f}" y="{y - 6:.1f}">{codec}</text>')
    target = ROOT / "docs" / "codecs.svg"
    target.write_text("\n".join([*lines, "</svg>", ""]), encoding="utf-8")


def measure(say: Callable[[str], None], windows: int) -> list[Row]:
    """A row for each codec and measure."""
    import torch
    from transformers import DynamicCache

    chat, model, queries = loaded(say)
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

    found: dict[str, list[dict[str, Any]]] = {name: [] for name in (*CODECS, *OTHERS)}
    for start in range(0, len(ids), PREFIX + SCORED):
        window = torch.tensor([ids[start : start + PREFIX + SCORED]])
        with torch.inference_mode():
            past = DynamicCache()
            model(window[:, :PREFIX], past_key_values=past)
            exact = np.stack([np.stack([layer.keys[0].numpy(), layer.values[0].numpy()]) for layer in past.layers])
            right = scores(exact, window)
            asked = np.stack([queries[layer].numpy() for layer in range(len(queries))])
            for codec in found:
                with tempfile.TemporaryDirectory() as folder:
                    kv = exact.astype(np.float16)
                    terms, asked_for = OTHERS.get(codec, codec), np.array(ids[start : start + PREFIX])
                    back, used = through(terms, geometry, asked_for, kv, Path(folder))
                got = scores(back, window)
                found[codec].append(
                    {
                        "kl": float((right.exp() * (right - got)).sum(-1).mean()) * 1000,
                        "top": float((right.argmax(-1) == got.argmax(-1)).double().mean()) * 100,
                        "bits": used * 8 / kv.size,
                        "layers": by_layer(exact, back.astype(np.float32), asked),
                    }
                )
        say(f"window {start // (PREFIX + SCORED) + 1} of {windows}")
    rows = []
    for codec, each in found.items():
        value = {name: mean(one[name] for one in each) for name in ("kl", "top", "bits")}
        layers = {name: np.mean([one["layers"][name] for one in each], 0) for name in each[0]["layers"]}
        kl, top = MUST.get(codec, (None, None))
        n = len(each) * SCORED
        rows += [
            row(f"{codec}: KL", value["kl"], "mnat", n=n, must=None if kl is None else f"value <= {kl}"),
            row(f"{codec}: top-1", value["top"], "%", n=n, must=None if top is None else f"value >= {top}"),
            *(
                row(f"{codec}: {name}, relative error, {which} layer", float(of(layers[name])), "%", n=len(each))
                for name in ("keys", "values", "attention output")
                for which, of in (("median", median), ("worst", max))
            ),
            row(f"{codec}: least cosine of a token's row", float(min(layers["least cosine"])), "", n=len(each)),
            row(f"{codec}: bits on SSD", value["bits"], "", n=len(each), limit="fp16", limit_value=16.0,
                ratio=16 / value["bits"]),
        ]  # fmt: skip
    return rows


def main() -> None:
    """Scores every codec, prints the table and writes `benches/out/accuracy.json`."""
    absent = skipped("accuracy", "torch", "transformers", "gguf", "accelerate")
    if sys.argv[1:] == ["extract"]:
        extract(lambda text: print(text, file=sys.stderr, flush=True))
        return
    if sys.argv[1:] == ["picture"]:
        picture()
        return
    windows = int(sys.argv[1]) if len(sys.argv) > 1 else WINDOWS
    finish("accuracy", absent or measure(lambda text: print(text, file=sys.stderr, flush=True), windows))


if __name__ == "__main__":
    main()
