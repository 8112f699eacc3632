"""Finds models in folders: the shape of their blocks, a version of their weights, or why they cannot be cached.

What is read is what a model's own files say: `config.json` of Hugging Face, checked against the header of its
safetensors files, or the metadata of a GGUF file. Nothing is loaded, and no folder keeps the others from being found.

Two models of one shape share nothing unless they are the same: `FoundModel.weights_version` is a digest of all weights.
Files in a Hugging Face cache are named by theirs, which is taken; others are read once.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stratakv import gguf
from stratakv.config import Dtype, Geometry
from stratakv.errors import InputError

# Folders within folders that are looked through.
_DEPTH = 5
# A header that is longer is damaged.
_MOST_HEADER_BYTES = 128 << 20
_MOST_CONFIG_BYTES = 16 << 20
_DTYPES: dict[str, Dtype] = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}
_STORED: dict[str, Dtype] = {"F32": "fp32", "F16": "fp16", "BF16": "bf16"}
# Rotary positions that give the same tokens other keys in a longer sequence.
_LENGTH_DEPENDENT_ROPE = ("dynamic", "longrope")
# Fields of layers that keep a state in place of keys and values, by what they are.
_STATES = ("ssm_cfg", "mamba_d_state", "mamba_expand", "state_size", "conv_kernel", "linear_num_key_heads", "lru_width")


@dataclass(frozen=True, slots=True, kw_only=True)
class FoundModel:
    """A model that can be cached.

    Attributes:
        name: name of its folder or file, below the folder that was looked through; in a Hugging Face cache
            ``org/name``.
        path: where it is: a folder, or a GGUF file.
        geometry: shape of its blocks.
        weights_bytes: size of its weights.
    """

    name: str
    path: Path
    geometry: Geometry
    weights_bytes: int

    def weights_version(self) -> str:
        """A digest of all weights, 32 hexadecimal digits. Files are read whole where nothing else tells.

        Raises:
            InputError: a file cannot be read.
        """
        return _digest(_weights(self.path))

    def stamp(self) -> tuple[tuple[str, int, int], ...]:
        """What changes when its files do: names, sizes and times. Cheap, and no proof of what is in them."""
        files = [self.path / "config.json", *_weights(self.path)] if self.path.is_dir() else [self.path]
        return tuple((file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files)


@dataclass(frozen=True, slots=True, kw_only=True)
class RefusedModel:
    """A model that cannot be cached, and why.

    Attributes:
        name: as of `FoundModel`.
        path: where it is.
        reason: one sentence.
    """

    name: str
    path: Path
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Discovery:
    """What is in a folder.

    Attributes:
        models: those that can be cached, by name.
        refused: those that cannot.
    """

    models: tuple[FoundModel, ...]
    refused: tuple[RefusedModel, ...]


def weights_version(path: str | os.PathLike[str]) -> str:
    """A digest of all weights in a folder or GGUF file, 32 hexadecimal digits: for `CacheManager.register`.

    Files are read whole where nothing else tells: some seconds for a large model that is no Hugging Face cache.

    Raises:
        InputError: there are none, or a file cannot be read.
    """
    files = _weights(Path(path))
    if not files:
        raise InputError(f"{path}: no weights there, expected *.safetensors, pytorch_model*.bin or a GGUF file")
    return _digest(files)


def _digest(files: list[Path]) -> str:
    digest = hashlib.sha256()
    for file in files:
        digest.update(f"{file.name}:{_content(file)}\n".encode())
    return digest.hexdigest()[:32]


def discover(folder: str | os.PathLike[str], *, block_tokens: int = 16, dtype: Dtype | None = None) -> Discovery:
    """Looks through a folder and those within it for models.

    Args:
        folder: where to look: a folder of models, a Hugging Face cache, or one model.
        block_tokens: tokens of a block, of all models.
        dtype: element type of their keys and values where the engine keeps them in another than that of the weights.

    Raises:
        InputError: there is no such folder.
    """
    root = Path(folder)
    if not root.is_dir():
        raise InputError(f"{root}: there is no such folder; expected one that holds models")
    models: list[FoundModel] = []
    refused: list[RefusedModel] = []
    for path in _candidates(root, _DEPTH):
        name = _name(root, path)
        try:
            geometry = _geometry(path, block_tokens, dtype)
            weights_bytes = sum(file.stat().st_size for file in _weights(path))
            models.append(FoundModel(name=name, path=path, geometry=geometry, weights_bytes=weights_bytes))
        except (InputError, OSError) as error:
            refused.append(RefusedModel(name=name, path=path, reason=str(error)))
    return Discovery(
        models=tuple(sorted(models, key=lambda model: model.name)),
        refused=tuple(sorted(refused, key=lambda model: model.name)),
    )


def _candidates(folder: Path, depth: int) -> Iterator[Path]:
    """Folders with weights or a configuration, and GGUF files."""
    try:
        entries = sorted(folder.iterdir())
    except OSError:
        return
    if (folder / "refs").is_dir() and (folder / "snapshots").is_dir():
        # A Hugging Face cache: of several revisions the one that is in use.
        main = folder / "refs" / "main"
        wanted = main.read_text(encoding="utf-8").strip() if main.is_file() else ""
        found = sorted((folder / "snapshots").iterdir())
        chosen = [each for each in found if each.name == wanted] or found[-1:]
        for each in chosen:
            yield from _candidates(each, 0)
        return
    if any(entry.name == "config.json" or entry.suffix == ".safetensors" for entry in entries):
        yield folder
        return
    yield from (entry for entry in entries if entry.suffix == ".gguf" and entry.is_file())
    if depth:
        for entry in entries:
            if entry.is_dir() and not entry.name.startswith("."):
                yield from _candidates(entry, depth - 1)


def _name(root: Path, path: Path) -> str:
    if path.parent.name == "snapshots" and path.parent.parent.name.startswith("models--"):
        return path.parent.parent.name.removeprefix("models--").replace("--", "/")
    relative = path.relative_to(root) if path != root else Path(path.name)
    return str(relative.with_suffix("") if path.suffix == ".gguf" else relative)


def _weights(path: Path) -> list[Path]:
    """The files that hold the weights, and what says how they go together."""
    if path.is_file():
        return [path]
    found = [*path.glob("*.safetensors"), *path.glob("*.safetensors.index.json")] or list(
        path.glob("pytorch_model*.bin")
    )
    return sorted(found)


def _content(file: Path) -> str:
    target = file.resolve()
    # In a Hugging Face cache large files are named by the SHA-256 of what they hold.
    if target.parent.name == "blobs" and len(target.name) == 64:
        return target.name
    try:
        with target.open("rb") as handle:
            return hashlib.file_digest(handle, "sha256").hexdigest()
    except OSError as error:
        raise InputError(f"{file}: cannot be read: {error.strerror}") from error


def _geometry(path: Path, block_tokens: int, dtype: Dtype | None) -> Geometry:
    if path.is_file():
        return gguf.geometry(path, block_tokens=block_tokens, dtype=dtype)
    config = _read_config(path / "config.json")
    shapes = _read_headers(path)
    geometry = of_config(config, block_tokens=block_tokens, dtype=dtype or _dtype(config, shapes))
    _check(geometry, shapes)
    return geometry


def _read_config(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > _MOST_CONFIG_BYTES:
            raise InputError(f"config.json has {path.stat().st_size} bytes, expected at most {_MOST_CONFIG_BYTES}")
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError("there is no config.json beside the weights") from None
    except (ValueError, OSError) as error:
        raise InputError(f"config.json cannot be read: {error}") from None
    if not isinstance(config, dict):
        raise InputError(f"config.json is a {type(config).__name__}, expected an object")
    return config


def of_config(config: Mapping[str, Any], *, block_tokens: int = 16, dtype: Dtype | None = None) -> Geometry:
    """The geometry of a model by its `config.json`.

    Args:
        config: what is in the file; of a model of several parts, that of the text decoder is taken.
        block_tokens: tokens of a block.
        dtype: element type of keys and values; ``None``: that of the weights, as the file says.

    Raises:
        InputError: the model's keys and values cannot be reused for every prompt with the same prefix, or the file does
            not say how many there are.
    """
    outer = config
    for part in ("text_config", "llm_config", "language_config"):
        if isinstance(config.get(part), Mapping):
            config = {**{key: outer[key] for key in ("torch_dtype", "dtype") if key in outer}, **config[part]}
            break
    _require_causal(outer, config)
    layers = _number(config, "num_hidden_layers", "n_layer", "n_layers", "num_layers")
    _require_full_attention(config, layers)
    dtype = dtype or _dtype(config, {})
    if config.get("kv_lora_rank"):
        # One latent vector for all heads, and the part of the key that has positions.
        head_dim = _number(config, "kv_lora_rank") + _number(config, "qk_rope_head_dim")
        return Geometry(layers=layers, planes=1, kv_heads=1, head_dim=head_dim, dtype=dtype, block_tokens=block_tokens)
    heads = _number(config, "num_attention_heads", "n_head", "n_heads")
    kv_heads = _kv_heads(config, heads)
    if isinstance(config.get("head_dim"), int):
        head_dim = _number(config, "head_dim")
    else:
        width = _number(config, "hidden_size", "n_embd", "d_model")
        if width % heads:
            raise InputError(f"hidden_size is {width}, no multiple of {heads} heads, and there is no head_dim")
        head_dim = width // heads
    return Geometry(layers=layers, kv_heads=kv_heads, head_dim=head_dim, dtype=dtype, block_tokens=block_tokens)


def _number(config: Mapping[str, Any], *names: str) -> int:
    for name in names:
        value = config.get(name)
        if isinstance(value, int) and not isinstance(value, bool) and value > 0:
            return value
        if value is not None:
            raise InputError(f"{name} is {value!r}, expected a positive integer")
    raise InputError(f"config.json has no {names[0]}")


def _kv_heads(config: Mapping[str, Any], heads: int) -> int:
    if config.get("multi_query") and not config.get("new_decoder_architecture"):
        groups = config.get("multi_query_group_num")
        return groups if isinstance(groups, int) and groups > 0 else 1
    attention = config.get("attn_config")
    if isinstance(attention, Mapping) and isinstance(attention.get("kv_n_heads"), int):
        return _number(attention, "kv_n_heads")
    for name in ("num_key_value_heads", "num_kv_heads"):
        if config.get(name) is not None:
            return _number(config, name)
    return heads


def _dtype(config: Mapping[str, Any], shapes: Mapping[str, tuple[str, tuple[int, ...]]]) -> Dtype:
    text = config.get("text_config")
    inner = text if isinstance(text, Mapping) else {}
    stated = next((each for each in (inner.get("dtype"), inner.get("torch_dtype")) if each), None)
    stated = stated or config.get("dtype") or config.get("torch_dtype")
    if isinstance(stated, str):
        known = _DTYPES.get(stated.removeprefix("torch."))
        if known is None:
            raise InputError(f"torch_dtype is {stated!r}, expected one of {', '.join(_DTYPES)}; give dtype")
        return known
    stored = {_STORED[kind] for kind, shape in shapes.values() if kind in _STORED and len(shape) == 2}
    if len(stored) == 1:
        return stored.pop()
    raise InputError("neither config.json nor the weights tell the dtype of keys and values; give dtype")


def _require_causal(outer: Mapping[str, Any], config: Mapping[str, Any]) -> None:
    kind = config.get("model_type") or outer.get("model_type") or "the model"
    if outer.get("is_encoder_decoder") or config.get("is_encoder_decoder"):
        raise InputError(f"{kind} is an encoder-decoder: its keys and values depend on more than the prefix")
    named = outer.get("architectures") or []
    generates = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")
    if named and not any(str(each).endswith(generates) for each in named):
        raise InputError(f"{kind} is a {named[0]}: it generates no text, so it has no prefix to cache")
    if config.get("use_bidirectional_attention"):
        raise InputError(f"{kind} attends to later tokens, too; only causal attention can be cached")
    for field in ("rope_scaling", "rope_parameters"):
        rope = config.get(field)
        scaling = [rope, *rope.values()] if isinstance(rope, Mapping) else []
        for each in scaling:
            how = each.get("rope_type") or each.get("type") if isinstance(each, Mapping) else None
            if how in _LENGTH_DEPENDENT_ROPE:
                raise InputError(
                    f"{kind} has {how} rotary positions: the same tokens get other keys in a longer sequence, so a "
                    f"prefix cannot be reused"
                )


def _require_full_attention(config: Mapping[str, Any], layers: int) -> None:
    """Every layer has to keep the keys and values of every token."""
    kind = config.get("model_type", "the model")
    types = config.get("layer_types") or config.get("layers_block_type") or config.get("hybrid_override_pattern")
    if isinstance(types, list):
        other = sorted({str(each) for each in types} - {"full_attention", "attention"})
        if other:
            count = sum(str(each) in other for each in types)
            raise InputError(
                f"{count} of {layers} layers of {kind} are {', '.join(other)}: they keep a window or a state, not the "
                f"keys and values of every token"
            )
        return
    state = next((name for name in _STATES if config.get(name)), None)
    if types or state or config.get("attn_layer_indices") or config.get("full_attention_interval"):
        raise InputError(
            f"{kind} has layers that keep a state ({state or 'hybrid'}), not keys and values of every token"
        )
    window = config.get("sliding_window")
    if isinstance(window, int) and config.get("use_sliding_window", True) is not False:
        longest = config.get("max_position_embeddings")
        if not isinstance(longest, int) or window < longest:
            raise InputError(f"{kind} has a sliding window of {window} tokens: what is before it is not kept")


def _read_headers(path: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Element type and shape of each tensor of the safetensors files."""
    found: dict[str, tuple[str, tuple[int, ...]]] = {}
    for file in path.glob("*.safetensors"):
        try:
            with file.open("rb") as handle:
                start = handle.read(8)
                length = struct.unpack("<Q", start)[0] if len(start) == 8 else _MOST_HEADER_BYTES + 1
                if length > min(_MOST_HEADER_BYTES, file.stat().st_size):
                    raise InputError(f"{file.name} is no safetensors file: its header would have {length} bytes")
                header = json.loads(handle.read(length))
            tensors = {name: tensor for name, tensor in header.items() if name != "__metadata__"}
            found |= {name: (tensor["dtype"], tuple(tensor["shape"])) for name, tensor in tensors.items()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(f"{file.name} is no safetensors file: {error!r}") from None
    return found


def _check(geometry: Geometry, shapes: Mapping[str, tuple[str, tuple[int, ...]]]) -> None:
    """The projections of the weights have as many rows as keys and values, where they are stored plainly."""
    for name, (kind, shape) in shapes.items():
        if name.endswith("self_attn.k_proj.weight") and kind in _STORED and geometry.planes == 2 and len(shape) == 2:
            expected = geometry.kv_heads * geometry.head_dim
            if shape[0] != expected:
                raise InputError(f"{name} has {shape[0]} rows, but config.json tells of {expected}: heads x head_dim")
