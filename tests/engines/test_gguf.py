"""Models in GGUF files are found by their metadata, as the library `gguf` writes it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import stratakv

gguf = pytest.importorskip("gguf")


def write(path: Path, arch: str = "llama", **more: object) -> None:
    writer = gguf.GGUFWriter(path, arch)
    numbers = {"block_count": 16, "embedding_length": 2048, "attention.head_count": 32} | more
    for name, value in numbers.items():
        if isinstance(value, list):
            writer.add_array(f"{arch}.{name}", value)
        elif isinstance(value, int):
            writer.add_uint32(f"{arch}.{name}", value)
    writer.add_tensor("token_embd.weight", np.zeros((4, 8), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_the_metadata_tells_the_geometry(tmp_path: Path) -> None:
    write(tmp_path / "grouped.gguf", **{"attention.head_count_kv": 8, "attention.key_length": 64})
    write(tmp_path / "plain.gguf", "gpt2")
    write(tmp_path / "alike.gguf", **{"attention.head_count_kv": [4] * 16})
    latent = {"attention.kv_lora_rank": 512, "rope.dimension_count": 64}
    write(tmp_path / "deeper.gguf", "deepseek2", **latent)
    models = {model.name: model for model in stratakv.discover(tmp_path).models}
    shapes = {name: (m.geometry.planes, m.geometry.kv_heads, m.geometry.head_dim) for name, m in models.items()}
    assert shapes == {"grouped": (2, 8, 64), "plain": (2, 32, 64), "alike": (2, 4, 64), "deeper": (1, 1, 576)}
    assert {model.geometry.dtype for model in models.values()} == {"fp16"}
    assert models["plain"].weights_version() != models["grouped"].weights_version()


def test_what_cannot_be_cached_says_why(tmp_path: Path) -> None:
    write(tmp_path / "window.gguf", "gemma2", **{"attention.sliding_window": 4096})
    write(tmp_path / "state.gguf", "jamba", **{"ssm.state_size": 16})
    write(tmp_path / "differ.gguf", **{"attention.head_count_kv": [4] * 8 + [2] * 8})
    write(tmp_path / "lengths.gguf", **{"attention.key_length": 64, "attention.value_length": 128})
    (tmp_path / "damaged.gguf").write_bytes(b"GGUF" + bytes(20))
    reasons = {refused.name: refused.reason for refused in stratakv.discover(tmp_path).refused}
    assert reasons.keys() == {"window", "state", "differ", "lengths", "damaged"}
    assert "sliding window of 4096" in reasons["window"]
    assert "keep a state" in reasons["state"]
    assert "differ in attention.head_count_kv" in reasons["differ"]
    assert "keys and values of lengths.gguf differ" in reasons["lengths"]
    assert "damaged.gguf is no GGUF file" in reasons["damaged"]
