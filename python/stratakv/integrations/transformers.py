"""Hugging Face transformers: a prompt's cached prefix becomes the start of a `DynamicCache`.

The idea: a `DynamicCache` of n tokens is what the model would hold after it computed them, so a cache restored from
stored keys and values lets `model.generate` compute only what follows. The invariant is that the output is what it
would be without the cache. It holds where a token's keys and values depend on the tokens up to it and on nothing
else, so this module refuses, with an `InputError`, every model and every argument of which that is not true.

    match ─▶ restore ─▶ prefill the rest ─▶ generate ─▶ store
             n ≥ 0      at least one token              prompt and answer, but for the last token: it was never an
                                                        input, so it has no keys and values

`generate` is all of it in one call; `restore` and `store` are its parts. A problem of the cache is never a problem of
the request: it is logged and costs prefill time.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from transformers import DynamicCache, GenerationConfig, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from stratakv import Explanation, Geometry, InputError, ModelCache, StrataKVError

__all__ = ["Restored", "generate", "geometry", "restore", "store"]

_log = logging.getLogger(__name__)

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
    "prefix_allowed_tokens_fn",
    "stopping_criteria",
    "streamer",
    "synced_gpus",
}

# Generation settings with which there is more than one sequence, or a cache that is not ours, and the values without.
_PLAIN_SETTINGS: dict[str, tuple[object, ...]] = {
    "assistant_early_exit": (),
    "cache_implementation": ("dynamic",),
    "constraints": (),
    "dola_layers": (),
    "force_words_ids": (),
    "num_beams": (1,),
    "num_return_sequences": (1,),
    "penalty_alpha": (0,),
    "prompt_lookup_num_tokens": (),
    "use_cache": (True,),
    "use_mtp": (False,),
}


@dataclass(frozen=True, kw_only=True)
class Restored:
    """What of a prompt was found, ready to be continued.

    Attributes:
        past_key_values: Exactly `tokens` tokens, for `model.generate` or `model(...)`, which extend it in place: it
            serves one request.
        tokens: How many leading tokens of the prompt need no prefill; 0 after a miss, at most the prompt less one.
        explanation: Which tier each block came from and why there were not more; None if there was nothing to ask for
            or the cache could not be asked.
        seconds: Time that the match and the load took.
    """

    past_key_values: DynamicCache
    tokens: int
    explanation: Explanation | None
    seconds: float


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


def restore(cache: ModelCache, input_ids: torch.Tensor, *, adapter: str = "", tenant: str = "") -> Restored:
    """Loads the longest cached prefix of a prompt into a `DynamicCache`.

    The last token is never restored: the model has to compute at least one to say what follows it.

    Args:
        cache: The model's cache, registered with `geometry(model)`.
        input_ids: The whole prompt, `[1, tokens]` or `[tokens]`, integers on the CPU.
        adapter: As in `ModelCache.match`.
        tenant: As in `ModelCache.match`.

    Raises:
        InputError: `input_ids` is not one sequence of token ids.
    """
    tokens = _one_sequence(input_ids)
    shape = cache.geometry
    dtype = _torch_dtype(shape)
    started = time.perf_counter()
    kv: list[tuple[torch.Tensor, torch.Tensor]] = []
    loaded, explanation = 0, None
    if len(tokens) > 1:
        try:
            with cache.match(tokens[:-1], adapter=adapter, tenant=tenant) as match:
                if match.tokens:
                    size = (1, shape.kv_heads, match.tokens, shape.head_dim)
                    kv = [(torch.empty(size, dtype=dtype), torch.empty(size, dtype=dtype)) for _ in range(shape.layers)]
                    loaded = match.load(kv, layout="BHND")
                explanation = match.explain()
        except InputError:
            raise
        except StrataKVError as problem:
            loaded = 0
            _log.warning("prefix not restored, the prompt is computed: %s", problem)
    past_key_values = _dynamic_cache(kv, loaded, shape.layers)
    return Restored(
        past_key_values=past_key_values,
        tokens=loaded,
        explanation=explanation,
        seconds=time.perf_counter() - started,
    )


def store(
    cache: ModelCache,
    input_ids: torch.Tensor,
    past_key_values: DynamicCache,
    *,
    adapter: str = "",
    tenant: str = "",
) -> int:
    """Puts the keys and values that a `DynamicCache` holds; returns how many leading tokens are cached now.

    Args:
        cache: The model's cache, registered with `geometry(model)`.
        input_ids: The tokens, `[1, tokens]` or `[tokens]`. Those past the end of `past_key_values` are left out: after
            `generate` that is the last one.
        past_key_values: Their keys and values, as the model left them.
        adapter: As in `ModelCache.put`.
        tenant: As in `ModelCache.put`.

    Raises:
        InputError: The two do not belong together or to this cache's geometry.
        StrataKVError: The cache is closed or cannot take more.
    """
    tokens = _one_sequence(input_ids)
    _require_plain_cache(past_key_values, cache.geometry)
    count = min(len(tokens), past_key_values.get_seq_length())
    if count < cache.geometry.block_tokens:
        return 0
    kv = [(layer.keys[:, :, :count].detach(), layer.values[:, :, :count].detach()) for layer in past_key_values.layers]
    return cache.put(tokens[:count], kv, layout="BHND", adapter=adapter, tenant=tenant)


def generate(
    model: PreTrainedModel,
    cache: ModelCache,
    input_ids: torch.Tensor,
    *,
    adapter: str = "",
    tenant: str = "",
    on_restored: Callable[[Restored], None] | None = None,
    **generate_kwargs: Any,  # noqa: ANN401 (whatever `model.generate` takes)
) -> Any:  # noqa: ANN401 (whatever `model.generate` returns)
    """`model.generate` that computes only what is not cached, and caches what it computed.

    Prompt and answer are put, so the next turn of the conversation reuses both.

    Args:
        model: In evaluation mode, on the CPU, with the geometry that `cache` was registered with.
        cache: The model's cache.
        input_ids: One whole prompt, `[1, tokens]`, without padding.
        adapter: As in `ModelCache.match`.
        tenant: As in `ModelCache.match`.
        on_restored: Called before generation starts with what was found.
        **generate_kwargs: For `model.generate`; greedy search and sampling of one sequence.

    Returns:
        What `model.generate` returns: `[1, tokens]`, or its output object with `return_dict_in_generate`.

    Raises:
        InputError: An argument with which the cache could not be used, or the output could differ.
    """
    _require_servable(model, cache)
    _require_one_prompt(model, input_ids, generate_kwargs)
    restored = restore(cache, input_ids, adapter=adapter, tenant=tenant)
    if on_restored is not None:
        on_restored(restored)
    past_key_values = restored.past_key_values
    output = model.generate(input_ids, past_key_values=past_key_values, **generate_kwargs)
    sequences = output if isinstance(output, torch.Tensor) else output.sequences
    try:
        store(cache, sequences, past_key_values, adapter=adapter, tenant=tenant)
    except StrataKVError as problem:
        _log.warning("keys and values not put, the next turn computes them again: %s", problem)
    return output


def _dynamic_cache(kv: list[tuple[torch.Tensor, torch.Tensor]], tokens: int, layers: int) -> DynamicCache:
    """Makes loaded tensors the content of a cache without copying them, as `DynamicLayer.update` would."""
    past_key_values = DynamicCache()
    past_key_values.layers.extend(DynamicLayer() for _ in range(layers))
    if tokens:
        for layer, (keys, values) in zip(past_key_values.layers, kv, strict=True):
            layer.keys, layer.values = keys[:, :, :tokens], values[:, :, :tokens]
            layer.dtype, layer.device = keys.dtype, keys.device
            layer.is_initialized = True
    return past_key_values


def _torch_dtype(stored: Geometry) -> torch.dtype:
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


def _require_plain_cache(past_key_values: DynamicCache, expected: Geometry) -> None:
    """Refuses caches that do not hold every token's keys and values as they were computed."""
    if type(past_key_values) is not DynamicCache:
        raise InputError(f"past_key_values is {type(past_key_values).__name__}; only a DynamicCache can be stored")
    layers = past_key_values.layers
    if len(layers) != expected.layers:
        raise InputError(f"past_key_values has {len(layers)} layers, the geometry {expected.layers}")
    tokens = past_key_values.get_seq_length()
    if tokens == 0:
        return
    size = (1, expected.kv_heads, tokens, expected.head_dim)
    dtype = _torch_dtype(expected)
    for index, layer in enumerate(layers):
        if type(layer) is not DynamicLayer:
            kind = type(layer).__name__
            raise InputError(f"layer {index} of past_key_values is {kind}; only plain full attention can be stored")
        if not layer.is_initialized:
            raise InputError(f"layer {index} of past_key_values is empty, others are not")
        for tensor in (layer.keys, layer.values):
            if tuple(tensor.shape) != size or tensor.dtype != dtype:
                raise InputError(
                    f"layer {index} of past_key_values holds {list(tensor.shape)} in {tensor.dtype}, "
                    f"the geometry wants {list(size)} in {dtype}"
                )
            if tensor.device.type != "cpu":
                raise InputError(
                    f"layer {index} of past_key_values is on {tensor.device}; only CPU tensors are supported"
                )


def _require_servable(model: PreTrainedModel, cache: ModelCache) -> None:
    """Refuses a model that is not the one the cache was registered for, as far as can be seen."""
    wanted = geometry(model, block_tokens=cache.geometry.block_tokens)
    if wanted != cache.geometry:
        raise InputError(f"{cache.name!r} was registered with {cache.geometry}, this model has {wanted}")
    if model.device.type != "cpu":
        raise InputError(f"the model is on {model.device}; only CPU tensors are supported")
    if model.training:
        raise InputError("the model is in training mode, its keys and values are random; call model.eval() first")


def _require_one_prompt(model: PreTrainedModel, input_ids: torch.Tensor, kwargs: dict[str, Any]) -> None:
    """Refuses what makes more than one sequence, or keys and values that depend on more than `input_ids`."""
    if not isinstance(input_ids, torch.Tensor) or input_ids.ndim != 2:
        raise InputError("input_ids is not a tensor of [1, tokens]")
    _one_sequence(input_ids)
    if input_ids.shape[1] == 0:
        raise InputError("input_ids is empty")
    if "past_key_values" in kwargs:
        raise InputError("past_key_values is what the cache provides; call restore and model.generate to use your own")
    stated: GenerationConfig | None = kwargs.get("generation_config")
    known = vars(model.generation_config)
    for name, plain in _PLAIN_SETTINGS.items():
        sources = (kwargs, vars(stated) if stated is not None else {}, known)
        value = next((each[name] for each in sources if each.get(name) is not None), None)
        if value is not None and value not in plain:
            raise InputError(f"{name}={value!r} is not supported: one sequence, greedy or sampled, with its cache")
    unknown = sorted(
        name
        for name, value in kwargs.items()
        if value is not None and name not in _HARMLESS_ARGUMENTS and name not in known and name not in _PLAIN_SETTINGS
    )
    if unknown:
        raise InputError(f"not supported: {', '.join(unknown)}; keys and values could depend on more than input_ids")
    mask = kwargs.get("attention_mask")
    if mask is not None and (tuple(mask.shape) != tuple(input_ids.shape) or not bool((mask == 1).all())):
        raise InputError("attention_mask hides tokens: a padded prompt cannot be cached; pass the prompt alone")


def _one_sequence(input_ids: torch.Tensor) -> torch.Tensor:
    """The tokens as one dimension."""
    if input_ids.ndim == 2:
        if input_ids.shape[0] != 1:
            raise InputError(f"input_ids is a batch of {input_ids.shape[0]} sequences; one at a time is supported")
        input_ids = input_ids[0]
    if input_ids.ndim != 1:
        raise InputError(f"input_ids has {input_ids.ndim} dimensions; [1, tokens] or [tokens] is supported")
    if input_ids.is_floating_point() or input_ids.is_complex() or input_ids.dtype == torch.bool:
        raise InputError(f"input_ids is {input_ids.dtype}; token ids are integers")
    if input_ids.device.type != "cpu":
        raise InputError(f"input_ids is on {input_ids.device}; only CPU tensors are supported")
    return input_ids.detach()
