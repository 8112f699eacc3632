"""What the metadata of a GGUF file says of its keys and values; read by the library `gguf`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from stratakv.config import Dtype, Geometry
from stratakv.errors import InputError


def geometry(path: Path, *, block_tokens: int, dtype: Dtype | None) -> Geometry:
    """The geometry of the model in a file. Engines keep its keys and values in fp16, unless they are told otherwise.

    Raises:
        InputError: it is no GGUF file, its keys and values cannot be cached, or `gguf` is not installed.
    """
    try:
        import gguf
    except ImportError:
        raise InputError("a GGUF file; to read it, install stratakv[gguf]") from None
    try:
        fields = gguf.GGUFReader(path).fields
    except Exception as error:
        raise InputError(f"{path.name} is no GGUF file: {error}") from None

    def read(name: str) -> Any:  # noqa: ANN401 - numbers, text, or lists of them
        return fields[name].contents() if name in fields else None

    kind = read("general.architecture")

    def number(name: str, otherwise: int | None = None) -> int:
        value = read(f"{kind}.{name}")
        if isinstance(value, list) and len(set(value)) == 1:
            value = value[0]
        if isinstance(value, list):
            raise InputError(f"layers of {path.name} differ in {name}; a geometry has one of each")
        value = otherwise if value is None else value
        if not isinstance(value, int) or value <= 0:
            raise InputError(f"{path.name}: {kind}.{name} is {value!r}, expected a positive integer")
        return value

    if any(name.startswith(f"{kind}.ssm.") for name in fields):
        raise InputError(f"{kind} has layers that keep a state, not keys and values of every token")
    if read(f"{kind}.attention.sliding_window"):
        window = read(f"{kind}.attention.sliding_window")
        raise InputError(f"{kind} has a sliding window of {window} tokens: what is before it is not kept")
    layers = number("block_count")
    if read(f"{kind}.attention.kv_lora_rank"):
        head_dim = number("attention.kv_lora_rank") + number("rope.dimension_count")
        return Geometry(
            layers=layers, planes=1, kv_heads=1, head_dim=head_dim, dtype=dtype or "fp16", block_tokens=block_tokens
        )
    heads = number("attention.head_count")
    head_dim = number("attention.key_length", number("embedding_length") // heads)
    if number("attention.value_length", head_dim) != head_dim:
        raise InputError(f"keys and values of {path.name} differ in length; a geometry has one")
    return Geometry(
        layers=layers,
        kv_heads=number("attention.head_count_kv", heads),
        head_dim=head_dim,
        dtype=dtype or "fp16",
        block_tokens=block_tokens,
    )
