"""What is refused: models, caches and arguments with which a cached prefix would not be what the model computes.

Each refusal is an `InputError` that names what was found. What is not known here is refused, too: a kind of layer or an
argument that transformers learns later than this was written.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from transformers import DynamicCache, GenerationConfig, PreTrainedConfig, PreTrainedModel, StaticCache
from transformers.cache_utils import DynamicLayer, StaticLayer

from stratakv import Geometry, InputError, ModelCache
from stratakv.integrations.transformers.padding import Batch

__all__ = [
    "geometry",
    "require_empty_static",
    "require_plain_arguments",
    "require_plain_cache",
    "require_servable",
    "setting",
    "torch_dtype",
]

_DTYPES: dict[Literal["fp32", "fp16", "bf16", "uint8"], torch.dtype] = {
    "fp32": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
}

# With these, keys computed for a long sequence differ from those of the same tokens in a short one.
_LENGTH_DEPENDENT_ROPE = {"dynamic", "longrope"}

# Arguments of `model.generate` that change what is sampled or when it ends, never what a token's keys and values are.
_HARMLESS_ARGUMENTS = {
    "attention_mask",
    "generation_config",
    "logits_processor",
    "past_key_values",
    "prefix_allowed_tokens_fn",
    "stopping_criteria",
    "streamer",
    "synced_gpus",
    "tokenizer",
}

# Generation settings with which a prompt has more than one sequence, is not computed as it is, or has a cache that is
# not ours; and the values without.
_PLAIN_SETTINGS: dict[str, tuple[object, ...]] = {
    "assistant_early_exit": (),
    "cache_implementation": ("dynamic", "static"),
    "constraints": (),
    "dola_layers": (),
    "force_words_ids": (),
    "num_beams": (1,),
    "num_return_sequences": (1,),
    "penalty_alpha": (0,),
    # Chunks start from the first token again, whatever the cache holds.
    "prefill_chunk_size": (),
    "prompt_lookup_num_tokens": (),
    "token_healing": (False,),
    "use_cache": (True,),
    "use_mtp": (False,),
}


def geometry(model: PreTrainedModel, *, block_tokens: int = 16) -> Geometry:
    """Reads from a model's configuration what `CacheManager.register` has to know.

    Args:
        model: A decoder all of whose layers are plain full attention, with weights in fp32, fp16 or bf16.
        block_tokens: Tokens per block.

    Raises:
        InputError: The model's keys and values cannot be reused for every prompt with the same prefix.
    """
    config = model.config.get_text_config(decoder=True)
    _require_plain_attention(config)
    names = {dtype: name for name, dtype in _DTYPES.items()}
    if model.dtype not in names:
        raise InputError(f"{config.model_type} computes in {model.dtype}; keys and values are fp32, fp16 or bf16")
    kv_heads, head_dim = _heads(config)
    return Geometry(
        layers=config.num_hidden_layers,
        kv_heads=kv_heads,
        head_dim=head_dim,
        dtype=names[model.dtype],
        block_tokens=block_tokens,
    )


def torch_dtype(stored: Geometry) -> torch.dtype:
    """The dtype of a geometry that a `DynamicCache` can have."""
    if stored.planes != 2 or stored.dtype not in _DTYPES:
        raise InputError(f"{stored} has no DynamicCache: keys and values in fp32, fp16 or bf16 are wanted")
    return _DTYPES[stored.dtype]


def _heads(config: PreTrainedConfig) -> tuple[int, int]:
    """Key/value heads and head dimension: grouped-query models state both, older ones neither."""
    heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    return kv_heads, head_dim


def _require_plain_attention(config: PreTrainedConfig) -> None:
    """Refuses models in which keys and values are not one per token, head and layer, set by the tokens so far.

    What the model would use as its own cache is asked, not guessed: a layer type that transformers learns later than
    this was written is refused, too.
    """
    name = config.model_type
    if config.is_encoder_decoder:
        raise InputError(f"{name} is an encoder-decoder: its keys and values depend on more than the prefix")
    for layer, kind in enumerate(DynamicCache(config=config).layers):
        if type(kind) is not DynamicLayer:
            stated = getattr(config, "layer_types", None)
            what = f"{stated[layer]} ({type(kind).__name__})" if stated else type(kind).__name__
            raise InputError(f"layer {layer} of {name} is {what}; only plain full attention can be cached")
    if getattr(config, "kv_lora_rank", None):
        raise InputError(f"{name} has latent attention (kv_lora_rank); only plain full attention can be cached")
    if getattr(config, "multi_query", False):
        raise InputError(f"{name} has multi-query attention, and its configuration does not state the number of heads")
    if getattr(config, "use_bidirectional_attention", None):
        raise InputError(f"{name} attends to later tokens, too; only causal attention can be cached")
    rope = getattr(config, "rope_parameters", None) or {}
    for parameters in [rope, *(each for each in rope.values() if isinstance(each, dict))]:
        if parameters.get("rope_type") in _LENGTH_DEPENDENT_ROPE:
            raise InputError(
                f"{name} has {parameters['rope_type']} rotary positions: "
                "the same tokens get other keys in a longer sequence, so a prefix cannot be reused"
            )
    per_layer = getattr(config, "per_layer_config", None)
    if isinstance(per_layer, list | tuple) and len({_heads(each) for each in per_layer}) > 1:
        raise InputError(f"the layers of {name} differ in heads or head dimension; a geometry has one of each")


def require_plain_cache(past_key_values: DynamicCache | StaticCache, expected: Geometry, rows: int) -> int:
    """Refuses caches that do not hold every token's keys and values as they were computed.

    Returns:
        How many columns all of its layers hold: after a forward pass that broke off, some hold more.
    """
    if type(past_key_values) not in (DynamicCache, StaticCache):
        kind = type(past_key_values).__name__
        raise InputError(f"past_key_values is {kind}; only a DynamicCache or a StaticCache can be stored")
    wanted = DynamicLayer if type(past_key_values) is DynamicCache else StaticLayer
    layers = past_key_values.layers
    if len(layers) != expected.layers:
        raise InputError(f"past_key_values has {len(layers)} layers, the geometry {expected.layers}")
    if not int(past_key_values.get_seq_length()):
        return 0
    held = []
    for index, layer in enumerate(layers):
        if type(layer) is not wanted:
            kind = type(layer).__name__
            raise InputError(f"layer {index} of past_key_values is {kind}; only plain full attention can be stored")
        if not layer.is_initialized:
            raise InputError(f"layer {index} of past_key_values is empty, others are not")
        room = _require_plain_layer(layer, expected, rows, index)
        held.append(room if wanted is DynamicLayer else int(layer.get_seq_length()))
    return min(held)


def require_empty_static(past_key_values: StaticCache, expected: Geometry, batch: Batch) -> None:
    """Refuses static caches that a batch cannot be restored into."""
    if type(past_key_values) is not StaticCache:
        kind = type(past_key_values).__name__
        raise InputError(f"past_key_values is {kind}; only a StaticCache can be restored into")
    if len(past_key_values.layers) != expected.layers:
        raise InputError(f"past_key_values has {len(past_key_values.layers)} layers, the geometry {expected.layers}")
    for index, layer in enumerate(past_key_values.layers):
        if type(layer) is not StaticLayer:
            kind = type(layer).__name__
            raise InputError(f"layer {index} of past_key_values is {kind}; only plain full attention can be restored")
        if layer.max_cache_len < batch.columns:
            raise InputError(
                f"past_key_values has room for {layer.max_cache_len} tokens, the prompt has {batch.columns}, "
                "padding included"
            )
        if layer.is_initialized:
            _require_plain_layer(layer, expected, batch.rows, index)
            if int(layer.get_seq_length()):
                raise InputError(f"past_key_values holds {int(layer.get_seq_length())} tokens; call its reset() first")
    if past_key_values.offloading:
        raise InputError("past_key_values is offloaded; only CPU tensors are supported")


def _require_plain_layer(layer: DynamicLayer | StaticLayer, expected: Geometry, rows: int, index: int) -> int:
    """Refuses tensors that are not the geometry's, of so many rows; how many columns they have room for."""
    dtype = torch_dtype(expected)
    for tensor in (layer.keys, layer.values):
        shape = tuple(tensor.shape)
        if len(shape) != 4 or shape != (rows, expected.kv_heads, shape[2], expected.head_dim) or tensor.dtype != dtype:
            raise InputError(
                f"layer {index} of past_key_values holds {list(shape)} in {tensor.dtype}, "
                f"the geometry wants [{rows}, {expected.kv_heads}, tokens, {expected.head_dim}] in {dtype}"
            )
        if tensor.device.type != "cpu":
            raise InputError(f"layer {index} of past_key_values is on {tensor.device}; only CPU tensors are supported")
    return min(int(layer.keys.shape[2]), int(layer.values.shape[2]))


def require_servable(model: PreTrainedModel, cache: ModelCache) -> None:
    """Refuses a model that is not the one the cache was registered for, as far as can be seen."""
    wanted = geometry(model, block_tokens=cache.geometry.block_tokens)
    if wanted != cache.geometry:
        raise InputError(f"{cache.name!r} was registered with {cache.geometry}, this model has {wanted}")
    if model.device.type != "cpu":
        raise InputError(f"the model is on {model.device}; only CPU tensors are supported")
    if model.training:
        raise InputError("the model is in training mode, its keys and values are random; call model.eval() first")


def setting(name: str, model: PreTrainedModel, kwargs: dict[str, Any]) -> Any:  # noqa: ANN401 (any setting's value)
    """What `model.generate` would take a generation setting for; None if it is not set.

    An argument counts before a `generation_config` that is given, and that before the model's own.
    """
    stated: GenerationConfig | None = kwargs.get("generation_config")
    sources = (kwargs, vars(stated) if stated is not None else {}, vars(model.generation_config))
    return next((each[name] for each in sources if each.get(name) is not None), None)


def require_plain_arguments(model: PreTrainedModel, kwargs: dict[str, Any]) -> None:
    """Refuses what makes more than one sequence of a prompt, or keys that depend on more than `input_ids`."""
    if kwargs.get("past_key_values") is not None and kwargs.get("cache_implementation") is not None:
        raise InputError("past_key_values and cache_implementation are both given; one of them says which cache it is")
    for name, plain in _PLAIN_SETTINGS.items():
        value = setting(name, model, kwargs)
        if value is not None and value not in plain:
            raise InputError(f"{name}={value!r} is not supported: one sequence, greedy or sampled, with its cache")
    known = vars(model.generation_config)
    unknown = sorted(
        name
        for name, value in kwargs.items()
        if value is not None and name not in _HARMLESS_ARGUMENTS and name not in known and name not in _PLAIN_SETTINGS
    )
    if unknown:
        raise InputError(f"not supported: {', '.join(unknown)}; keys and values could depend on more than input_ids")
