"""`StrataConnector`: what vLLM's scheduler and workers call, passed on to the side that does it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorHandshakeMetadata,
    KVConnectorMetadata,
    KVConnectorRole,
)
from vllm.v1.metrics.cache_hit_source import CacheHitSource

from stratakv import log
from stratakv.integrations.vllm import model
from stratakv.integrations.vllm.messages import Address, Counted, Metrics, Saved, Step
from stratakv.integrations.vllm.scheduler import Scheduler
from stratakv.integrations.vllm.worker import Worker

if TYPE_CHECKING:
    import torch
    from vllm.config import KVTransferConfig, VllmConfig
    from vllm.distributed.kv_events import KVCacheEvent
    from vllm.distributed.kv_transfer.kv_connector.v1.metrics import (
        KVConnectorPromMetrics,
        KVConnectorStats,
        PromMetric,
        PromMetricT,
    )
    from vllm.forward_context import ForwardContext
    from vllm.v1.attention.backend import AttentionMetadata
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.kv_cache_interface import KVCacheConfig
    from vllm.v1.outputs import KVConnectorOutput
    from vllm.v1.request import Request

# Below vLLM's own, which alone it shows from INFO on.
_log = log.of(__name__, below="vllm")

# Of kv_connector_extra_config, beside the sections of stratakv's configuration.
_OWN = ("weights_version", "save_decoded", "layer_by_layer")


class StrataConnector(KVConnectorBase_V1):
    """Keeps the keys and values of prompt prefixes in stratakv, and loads them again.

    ``kv_connector_extra_config`` takes the sections of `stratakv.Config`, ``config`` (a TOML file), and

    - ``weights_version``: a name of the weights, where reading them at start would take too long;
    - ``save_decoded``: whether what was generated is saved, too (default: true);
    - ``layer_by_layer``: on a device, whether each layer is saved as soon as it is computed, not all after the forward
      pass (default: false; needs piecewise CUDA graphs, and sees to it).
    """

    def __init__(self, vllm_config: VllmConfig, role: KVConnectorRole, kv_cache_config: KVCacheConfig) -> None:
        """One side of it.

        Raises:
            InputError: the model, or how it is served, cannot be cached.
            ConfigError: an option makes no sense.
        """
        super().__init__(vllm_config=vllm_config, role=role, kv_cache_config=kv_cache_config)
        model.check(vllm_config, kv_cache_config)
        options = dict(self._kv_transfer_config.kv_connector_extra_config)
        own = {name: options.pop(name) for name in _OWN if name in options}
        self._layer_by_layer = bool(own.get("layer_by_layer", False))
        self._weights_version: str | None = own.get("weights_version")
        self._options = options
        self._worker: Worker | None = None
        self._scheduler: Scheduler | None = None
        self._numbers: Mapping[str, int] = {}
        if role == KVConnectorRole.SCHEDULER:
            # A block that does not load is computed. vLLM's own default ends the request with an error.
            self._kv_transfer_config.kv_load_failure_policy = "recompute"
            events = vllm_config.kv_events_config
            self._scheduler = Scheduler(
                vllm_config.cache_config.block_size,
                model.Namespaces(vllm_config),
                loads=self._kv_transfer_config.is_kv_consumer,
                saves=self._kv_transfer_config.is_kv_producer,
                decoded=bool(own.get("save_decoded", True)),
                events=events is not None and events.enable_kv_cache_events,
            )

    # What both sides may be asked.

    @property
    def requires_kv_delivery(self) -> bool:
        """What is not saved is a later miss, and no more."""
        return False

    @classmethod
    def supports_sleep_mode(cls, kv_transfer_config: KVTransferConfig) -> bool:
        """The engine's blocks are read where they were registered, so they must not move."""
        del kv_transfer_config
        return False

    @classmethod
    def requires_piecewise_for_cudagraph(cls, extra_config: dict[str, Any]) -> bool:
        """Only where layers are saved one by one."""
        return bool(extra_config.get("layer_by_layer", False))

    def shutdown(self) -> None:
        """Ends this side."""
        if self._scheduler is not None:
            self._scheduler.close()
        worker, self._worker = self._worker, None
        if worker is not None:
            worker.close()

    def get_kv_connector_stats(self) -> KVConnectorStats | None:
        """Sums of this side since the last call."""
        if self._scheduler is not None:
            return self._scheduler.counted.taken()
        return self._worker.counted() if self._worker is not None else None

    @classmethod
    def build_kv_connector_stats(cls, data: dict[str, Any] | None = None) -> KVConnectorStats | None:
        """Sums from what was sent."""
        # A copy: it is added to, and others read what was sent.
        return Counted(dict(data or {}))

    @classmethod
    def build_prom_metrics(
        cls,
        vllm_config: VllmConfig,
        metric_types: dict[type[PromMetric], type[PromMetricT]],
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> KVConnectorPromMetrics | None:
        """Counters for Prometheus."""
        return Metrics(vllm_config, metric_types, labelnames, per_engine_labelvalues)

    # Worker.

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        """Opens this rank's store, of the shape that the tensors have.

        Raises:
            InputError: they are not what can be cached.
            StrataKVError: the store cannot be opened.
        """
        config = self._vllm_config
        parallel = config.parallel_config
        name, version = model.name_and_version(config, self._weights_version)
        rank = f"{parallel.rank}-of-{parallel.world_size}"
        if parallel.data_parallel_size > 1:
            rank = f"dp{parallel.data_parallel_index}-{rank}"
        self._worker = Worker(
            name,
            version,
            rank,
            model.layer_specs(self._kv_cache_config),
            kv_caches,
            self._kv_cache_config.num_blocks,
            config.cache_config.block_size,
            self._options,
        )
        self._numbers = {name: number for number, name in enumerate(self._worker.layers)}
        _log.info("cache_kept", "stratakv keeps %s", self._worker.summary)

    def get_handshake_metadata(self) -> KVConnectorHandshakeMetadata | None:
        """Where the scheduler asks this worker."""
        return self._worker.address if self._worker is not None else None

    @property
    def _step(self) -> Step | None:
        return self._connector_metadata if isinstance(self._connector_metadata, Step) else None

    def start_load_kv(self, forward_context: ForwardContext, **kwargs: Any) -> None:  # noqa: ANN401 - the engine's
        """Begins to load what this step has made room for."""
        del forward_context, kwargs
        if self._worker is not None and (step := self._step) is not None:
            self._worker.begin(step)

    def wait_for_layer_load(self, layer_name: str) -> None:
        """No forward pass waits: a request is computed when all of its loads are there."""

    def save_kv_layer(
        self,
        layer_name: str,
        kv_layer: torch.Tensor,
        attn_metadata: AttentionMetadata,
        **kwargs: Any,  # noqa: ANN401 - the engine's
    ) -> None:
        """Begins to save a layer, where that is done one by one."""
        del kv_layer, attn_metadata, kwargs
        if self._layer_by_layer and self._worker is not None and (step := self._step) and layer_name in self._numbers:
            self._worker.gather_layer(step, self._numbers[layer_name])

    def wait_for_save(self) -> None:
        """Saves what this step computed, as far as its tokens are known."""
        if self._worker is not None and (step := self._step) is not None:
            self._worker.finish(step)

    def get_finished(self, finished_req_ids: set[str]) -> tuple[set[str] | None, set[str] | None]:
        """Requests whose loads are over. Saves hold no blocks."""
        del finished_req_ids
        if self._worker is None:
            return None, None
        step = self._step
        return None, self._worker.received(idle=step is not None and step.idle)

    def get_block_ids_with_load_errors(self) -> set[int]:
        """The engine's blocks that were to be loaded and were not: it computes them."""
        return self._worker.invalid() if self._worker is not None else set()

    def build_connector_worker_meta(self) -> Saved | None:
        """What was stored and what is gone, where that is announced."""
        return self._worker.saved() if self._worker is not None else None

    # Scheduler.

    @property
    def _side(self) -> Scheduler:
        assert self._scheduler is not None, "the engine asked a worker's side what only the scheduler's side knows"
        return self._scheduler

    def set_xfer_handshake_metadata_pp_aware(
        self, metadata: dict[tuple[int, int], KVConnectorHandshakeMetadata]
    ) -> None:
        """Tells the scheduler its workers."""
        self._side.connect([each for _, each in sorted(metadata.items()) if isinstance(each, Address)])

    def on_new_request(self, request: Request) -> None:
        """Notes a request."""
        self._side.add(request)

    def get_num_new_matched_tokens(self, request: Request, num_computed_tokens: int) -> tuple[int | None, bool]:
        """Tokens that can be loaded beyond those computed; the engine does not wait for them."""
        tokens = self._side.matched(request, num_computed_tokens)
        return tokens, tokens > 0

    def update_state_after_alloc(self, request: Request, blocks: KVCacheBlocks, num_external_tokens: int) -> None:
        """Notes what is to be loaded."""
        self._side.allocated(request, blocks, num_external_tokens)

    def get_external_cache_hit_sources(self, request: Request, num_external_tokens: int) -> dict[CacheHitSource, int]:
        """Where the tokens of the last match come from, its end first: what the engine had is at its start."""
        tiers = self._side.sources(request)
        kinds = {"ram": CacheHitSource.HOST, "ssd": CacheHitSource.DISK, "dragonfly": CacheHitSource.P2P}
        out: dict[CacheHitSource, int] = {}
        left = num_external_tokens
        for tier in ("dragonfly", "ssd", "ram"):
            if taken := min(left, tiers.get(tier, 0)):
                out[kinds[tier]] = taken
                left -= taken
        return out

    def build_connector_meta(self, scheduler_output: SchedulerOutput) -> KVConnectorMetadata:
        """What the workers do in this step."""
        return self._side.step(scheduler_output)

    def update_connector_output(self, connector_output: KVConnectorOutput) -> None:
        """What came of a step."""
        self._side.after(connector_output)

    def take_events(self) -> Iterable[KVCacheEvent]:
        """Blocks that were stored and blocks that are gone, with the medium CPU."""
        return self._side.events()

    def reset_cache(self) -> bool | None:
        """Forgets everything, as after new weights."""
        return self._side.reset()
