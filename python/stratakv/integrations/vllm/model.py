"""Which models can be cached, and what their keys and values depend on beside the tokens.

Whatever could make the same tokens give other keys and values is part of the version that a model is registered with,
so that a change of it is a miss. What cannot be told is refused at start.
"""

from __future__ import annotations

import hashlib
import json
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, MLAAttentionSpec, UniformTypeKVCacheSpecs

from stratakv import InputError, log, weights_version

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.request import Request

_log = log.of(__name__)

# Names, sizes and times of an adapter's files.
_Stamp = tuple[tuple[str, int, int], ...]

# Drafts of these come from the tokens alone: no layers of a draft model, whose keys and values know the next token.
_PLAIN_DRAFTS = {"ngram", "ngram_gpu", "suffix"}
# What each of vLLM's own block sizes must stay within.
_MOST_BLOCK_TOKENS = 4096


def layer_specs(config: KVCacheConfig) -> dict[str, FullAttentionSpec]:
    """The layers that have a cache, in the engine's order, and what each keeps.

    Raises:
        InputError: some of them keep something else than the keys and values of every token.
    """
    groups = config.kv_cache_groups
    specs: dict[str, FullAttentionSpec] = {}
    for group in groups:
        for name in group.layer_names:
            spec = group.kv_cache_spec
            specs[name] = spec.kv_cache_specs[name] if isinstance(spec, UniformTypeKVCacheSpecs) else spec
    if not specs:
        raise InputError("the model has no attention layers, so there are no keys and values to cache")
    kinds = {type(spec) for spec in specs.values()}
    other = sorted(kind.__name__ for kind in kinds - {FullAttentionSpec, MLAAttentionSpec})
    if other:
        count = sum(type(spec).__name__ in other for spec in specs.values())
        raise InputError(
            f"{count} of {len(specs)} layers have a cache of kind {', '.join(other)}: they keep a window or a state,"
            " not the keys and values of every token; serve this model without StrataConnector"
        )
    if len(groups) > 1:
        raise InputError(
            f"the model's cache has {len(groups)} groups of layers, expected one: StrataConnector caches models whose"
            " layers are all alike; serve this model without it"
        )
    for name, spec in specs.items():
        if spec.non_causal:
            raise InputError(f"layer {name} attends to later tokens, too; only causal attention can be cached")
        if spec.tokens_per_state != 1:
            raise InputError(f"layer {name} keeps {spec.tokens_per_state} tokens in one; one for each can be cached")
    return specs


def check(vllm_config: VllmConfig, kv_cache_config: KVCacheConfig) -> None:
    """Refuses what cannot be cached, before anything is served.

    Raises:
        InputError: with one sentence that says what, and what to do.
    """
    specs = layer_specs(kv_cache_config)
    block = vllm_config.cache_config.block_size
    sizes = {spec.block_size for spec in specs.values()}
    if sizes != {block}:
        raise InputError(f"layers have blocks of {sorted(sizes)} tokens, the scheduler of {block}: expected one size")
    if block > _MOST_BLOCK_TOKENS:
        raise InputError(
            f"block_size is {block}, expected at most {_MOST_BLOCK_TOKENS}: give vLLM a smaller --block-size"
        )
    parallel = vllm_config.parallel_config
    for name in ("decode_context_parallel_size", "prefill_context_parallel_size"):
        if (size := getattr(parallel, name, 1)) > 1:
            raise InputError(f"{name} is {size}: tokens divided between ranks cannot be cached; set it to 1")
    drafts = vllm_config.speculative_config
    if drafts is not None and drafts.method not in _PLAIN_DRAFTS:
        raise InputError(
            f"speculative decoding by {drafts.method!r} has layers whose keys and values depend on the token after a"
            f" block; use one of {', '.join(sorted(_PLAIN_DRAFTS))}, or none, with StrataConnector"
        )
    if drafts is not None and parallel.pipeline_parallel_size > 1:
        raise InputError("drafts over a pipeline of ranks are saved by the last alone; use no drafts, or one stage")


def name_and_version(vllm_config: VllmConfig, given: str | None) -> tuple[str, str]:
    """What the model is called, and a digest of all that its keys and values depend on.

    Args:
        vllm_config: of the engine.
        given: the version of the weights, if the user names it; else the weights are read.

    Raises:
        InputError: the weights cannot be found.
    """
    model, cache, parallel = vllm_config.model_config, vllm_config.cache_config, vllm_config.parallel_config
    config = model.hf_config.to_dict()
    rope = config.get("rope_parameters") or config.get("rope_scaling")
    terms = {
        "weights": given if given is not None else _weights(vllm_config),
        "config": {name: value for name, value in config.items() if not name.startswith("_")},
        # Some rotary positions are chosen by it.
        "max_model_len": model.max_model_len if rope and _is_scaled(rope) else None,
        "dtype": str(model.dtype),
        "cache_dtype": cache.cache_dtype,
        "quantization": model.quantization,
        "runner": str(model.runner_type),
        "ranks": [parallel.tensor_parallel_size, parallel.pipeline_parallel_size],
        "media": _media_terms(model),
    }
    text = json.dumps(terms, sort_keys=True, default=str)
    # Where it lies does not matter.
    name = Path(str(model.model)).name if Path(str(model.model)).exists() else str(model.model)
    return name, blake2b(text.encode(), digest_size=16).hexdigest()


def _media_terms(model: Any) -> list[str]:  # noqa: ANN401 - vLLM's ModelConfig
    """What the keys and values of an image depend on beside the image."""
    settings = getattr(model, "multimodal_config", None)
    if settings is None:
        return []
    files = [Path(str(model.model)) / name for name in ("preprocessor_config.json", "processor_config.json")]
    return [str(settings.mm_processor_kwargs), *(file.read_text() for file in files if file.is_file())]


def _is_scaled(rope: dict[str, Any]) -> bool:
    kinds = [rope, *(value for value in rope.values() if isinstance(value, dict))]
    return any((each.get("rope_type") or each.get("type") or "default") != "default" for each in kinds)


def _weights(vllm_config: VllmConfig) -> str:
    """A digest of the weights that the engine loads."""
    model, load = vllm_config.model_config, vllm_config.load_config
    if load.load_format == "dummy":
        # vLLM draws them from a seed of its own.
        return f"dummy {torch.__version__}"
    folder = Path(str(getattr(model, "model_weights", None) or model.model))
    if not folder.exists():
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import LocalEntryNotFoundError

        try:
            folder = Path(
                snapshot_download(
                    str(model.model), revision=model.revision, cache_dir=load.download_dir, local_files_only=True
                )
            )
        except (LocalEntryNotFoundError, ValueError) as error:
            raise InputError(
                f"the weights of {model.model} are nowhere on this machine, so their version is not known ({error});"
                ' give one as "weights_version" in kv_connector_extra_config'
            ) from None
    return weights_version(folder)


class Namespaces:
    """Adapter and tenant of requests."""

    def __init__(self, vllm_config: VllmConfig) -> None:
        """Of an engine."""
        media = getattr(vllm_config.model_config, "multimodal_config", None)
        # Where vLLM has no use for their hashes it numbers them, and begins anew in each process.
        self._media = bool(media and media.mm_processor_cache_gb) or vllm_config.cache_config.enable_prefix_caching
        # What the files of an adapter were when it was first asked for; the engine serves it as it was then.
        self._adapters: dict[tuple[str, int, str], tuple[_Stamp, str]] = {}

    def of(self, request: Request) -> tuple[str, str] | None:
        """Of one request; ``None``: its tokens do not tell its keys and values, so it is not cached."""
        try:
            return self._of(request)
        except Exception:
            _log.exception(
                "request_not_cached",
                "a request is not cached: what it is cannot be told",
                request_id=getattr(request, "request_id", None),
            )
            return None

    def _of(self, request: Request) -> tuple[str, str] | None:
        if request.prompt_token_ids is None or request.prompt_embeds is not None or request.resumable:
            return None
        told: dict[str, object] = {}
        if (lora := request.lora_request) is not None:
            version = self._adapter(lora.lora_name, lora.lora_int_id, lora.lora_path)
            if version is None:
                return None
            told["lora"] = [lora.lora_name, version]
        if request.mm_features:
            if not self._media:
                return None
            # Their tokens are placeholders: what they stand for is told here, and where.
            told["media"] = [[f.identifier, f.mm_position.offset, f.mm_position.length] for f in request.mm_features]
        adapter = blake2b(json.dumps(told).encode(), digest_size=16).hexdigest() if told else ""
        return adapter, request.cache_salt or ""

    def _adapter(self, name: str, number: int, path: str) -> str | None:
        """A digest of an adapter's files; ``None`` where they are not on this machine, or others than they were."""
        folder = Path(path).expanduser()
        files = sorted(each for each in folder.glob("adapter_*") if each.is_file()) if path else []
        if not files:
            return None
        stamp = tuple((each.name, each.stat().st_size, each.stat().st_mtime_ns) for each in files)
        known = self._adapters.get((name, number, path))
        if known is None:
            digest = blake2b(digest_size=16)
            for each in files:
                with each.open("rb") as file:
                    digest.update(f"{each.name} {hashlib.file_digest(file, 'sha256').hexdigest()} ".encode())
            known = self._adapters[name, number, path] = (stamp, digest.hexdigest())
        return known[1] if known[0] == stamp else None
