"""The engine's blocks as tensors that our blocks are copied to and from.

vLLM shows each layer's cache as ``[B, H, N, C]``: block, head slot, token, content; what lies where in memory is in the
strides, and they are read, never assumed (NHD, HND, page first). A content of keys and values is two planes. Where the
content's order is the engine's own affair — on the CPU keys lie transposed within a block, quantised caches carry their
scales — a whole block is one run of bytes, moved as it is; what packed it is part of the model's version, for other
machines may pack otherwise.

On the CPU our blocks are copied straight from and to the engine's memory. On a device they pass pinned host memory, on
streams of their own; where there is a GPU tier, what is loaded comes straight from that.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from vllm.model_executor.models.utils import extract_layer_index
from vllm.v1.kv_cache_interface import FullAttentionSpec, MLAAttentionSpec

from stratakv import Geometry, InputError, Match, ModelCache, TokenSequence
from stratakv.config import Dtype
from stratakv.integrations.vllm import VERSION
from stratakv.integrations.vllm.messages import Ids, Load

LAYOUT = "PHND"

_DTYPES: dict[torch.dtype, Dtype] = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}


class Pages:
    """What of the engine's memory belongs to a block, and the shape of ours."""

    def __init__(
        self,
        specs: Mapping[str, FullAttentionSpec],
        caches: Mapping[str, torch.Tensor],
        blocks: int,
        block_tokens: int,
        *,
        packed: bool,
    ) -> None:
        """Reads the tensors.

        Args:
            specs: of each layer that has a cache.
            caches: each layer's tensor, ``[B, H, N, C]``.
            blocks: of the scheduler; B is a multiple of it where kernels have smaller ones.
            block_tokens: tokens of one of them.
            packed: whether the order within a block is the engine's own affair, as it is on the CPU.

        Raises:
            InputError: they are not what all layers of one model have alike.
        """
        names = sorted((name for name in specs if name in caches), key=lambda name: (extract_layer_index(name), name))
        if not names:
            raise InputError(
                f"the engine registered caches of {len(caches)} layers, none of which is in its configuration"
            )
        self.block_tokens, self.names = block_tokens, names
        self.layers = [_content(caches[name], specs[name], name, packed=packed) for name in names]
        first, planes = self.layers[0][0], len(self.layers[0])
        self.device = first.device
        for name, layer in zip(names, self.layers, strict=True):
            found, wanted = (tuple(layer[0].shape), layer[0].dtype), (tuple(first.shape), first.dtype)
            if len(layer) != planes or found != wanted:
                raise InputError(
                    f"the cache of {name} is {found}, that of {names[0]} {wanted}: all layers must be alike"
                )
            if layer[0].stride(-1) != 1:
                raise InputError(f"the cache of {name} has strides {layer[0].stride()}: its content must be contiguous")
        pages, heads, tokens, dim = first.shape
        self.ratio = pages // blocks
        if pages != self.ratio * blocks or tokens * self.ratio != block_tokens:
            raise InputError(
                f"blocks of {block_tokens} tokens lie in {pages} pages of {tokens} tokens for {blocks} blocks:"
                " expected pages that divide a block"
            )
        as_bytes = first.dtype == torch.uint8
        self.geometry = Geometry(
            layers=len(names),
            kv_heads=heads,
            head_dim=dim,
            dtype="uint8" if as_bytes else _DTYPES[first.dtype],
            block_tokens=block_tokens,
            planes=planes,
        )
        self.packing = "plain"
        if as_bytes:
            isa = self.device.type
            if isa == "cpu":
                # With AMX, kernels lay some blocks in another order.
                amx = getattr(torch.cpu, "_is_amx_tile_supported", bool)()
                isa = f"{torch.backends.cpu.get_cpu_capability()} amx {amx}"
            spec = specs[names[0]]
            self.packing = f"vLLM {VERSION} {isa} {spec.dtype} {type(spec).__name__} {spec.kv_quant_mode} {tokens}"

    def table(self, pages: Ids) -> Ids:
        """The pages of some of the engine's blocks."""
        if self.ratio == 1:
            return pages
        table: Ids = (pages[:, None] * self.ratio + np.arange(self.ratio, dtype=np.uint32)).reshape(-1)
        return table


def _content(cache: torch.Tensor, spec: FullAttentionSpec, name: str, *, packed: bool) -> list[torch.Tensor]:
    """One layer's planes."""
    if cache.ndim != 4:
        raise InputError(
            f"the cache of {name} has shape {tuple(cache.shape)}, expected [blocks, heads, tokens, content]"
        )
    plain = cache.dtype in _DTYPES and not packed and spec.state_content_bytes is None
    if plain and isinstance(spec, MLAAttentionSpec) and cache.shape[-1] == spec.head_size:
        return [cache]
    if plain and spec.head_size == spec.head_size_v and cache.shape[-1] == 2 * spec.head_size:
        return [cache[..., : spec.head_size], cache[..., spec.head_size :]]
    return [cache.view(torch.uint8)]


class HostMover:
    """Copies straight from and to the engine's blocks in RAM. Everything is done when a call returns."""

    def __init__(self, pages: Pages) -> None:
        """Keeps the tensors."""
        self._pages = pages
        self._kv = [[_array(plane) for plane in layer] for layer in pages.layers]

    def mark(self) -> None:
        """There is no order beside that of the calls."""

    def load(self, match: Match, load: Load, after: object) -> int:
        """Loads some tokens of a match; returns how many leading ones are valid."""
        del after
        pages = self._pages.table(load.pages)
        return match.load(self._kv, layout=LAYOUT, pages=pages, start=load.start, stop=load.stop)

    def gather(self, pages: Ids) -> None:
        """What is saved is read when it is put."""

    def put(self, cache: ModelCache, sequence: TokenSequence, pages: Ids, start: int, gathered: object) -> int:
        """Stores the blocks of a sequence; returns how many leading tokens are cached now."""
        # The engine has all of them, and what is cached is not read.
        del start, gathered
        return cache.put(sequence, self._kv, layout=LAYOUT, pages=self._pages.table(pages))


class DeviceMover:
    """Copies through pinned host memory, on a stream of its own: a layer at a time, in order with the engine's stream.

    Loads wait for what the engine's stream had when they were marked, and are done when they return. What is saved is
    selected into memory of its own before the engine's stream goes on, and copied to the host beside it.
    """

    def __init__(self, pages: Pages) -> None:
        """Makes the stream."""
        self._pages = pages
        self._on_device = pages.device.type != "cpu"
        self._side = torch.Stream(pages.device) if self._on_device else None

    def mark(self) -> Any:  # noqa: ANN401 - an event of torch
        """Where the engine's stream is now."""
        return torch.accelerator.current_stream(self._pages.device).record_event() if self._on_device else None

    def _host(self, count: int) -> list[list[torch.Tensor]]:
        """Host memory for so many pages of all layers."""
        return [
            [torch.empty((count, *plane.shape[1:]), dtype=plane.dtype, pin_memory=self._on_device) for plane in layer]
            for layer in self._pages.layers
        ]

    def _index(self, table: Ids) -> torch.Tensor:
        return torch.as_tensor(table.astype(np.int64), device=self._pages.device)

    def load(self, match: Match, load: Load, after: Any) -> int:  # noqa: ANN401 - an event of torch
        """Loads some tokens of a match; returns how many leading ones are valid."""
        size = self._pages.block_tokens
        table = self._pages.table(load.pages[load.start // size : load.stop // size])
        host = self._host(len(table))
        kv = [[_array(plane) for plane in layer] for layer in host]
        order = _order(len(table), load.start // size * self._pages.ratio)
        valid = match.load(kv, layout=LAYOUT, pages=order, start=load.start, stop=load.stop)
        came = max(valid - load.start, 0) // size * self._pages.ratio
        try:
            with self._side or nullcontext():
                if self._side is not None:
                    self._side.wait_event(after)
                index = self._index(table[:came])
                for layer, source in zip(self._pages.layers, host, strict=True):
                    for plane, rows in zip(layer, source, strict=True):
                        plane.index_copy_(0, index, rows[:came].to(plane.device, non_blocking=True))
        finally:
            # Whatever came of it: nothing is on its way to the engine's blocks when they are its own again.
            if self._side is not None:
                self._side.synchronize()
        return valid

    def gather(self, pages: Ids) -> Gathered:
        """Begins to bring some of the engine's blocks to host memory."""
        table = self._pages.table(pages)
        return Gathered(index=self._index(table), host=self._host(len(table)))

    def gather_layer(self, gathered: Gathered, number: int) -> None:
        """Brings one layer, once: as the engine's stream has it now."""
        if number in gathered.layers:
            return
        gathered.layers.add(number)
        after = self.mark()
        with self._side or nullcontext():
            if self._side is not None:
                self._side.wait_event(after)
            selected = [plane.index_select(0, gathered.index) for plane in self._pages.layers[number]]
            if self._side is not None:
                free = self._side.record_event()
            for rows, plane in zip(gathered.host[number], selected, strict=True):
                rows.copy_(plane, non_blocking=True)
            if self._side is not None:
                gathered.done = self._side.record_event()
        if self._side is not None:
            # The engine may write to its blocks again once they are selected.
            torch.accelerator.current_stream(self._pages.device).wait_event(free)

    def put(self, cache: ModelCache, sequence: TokenSequence, pages: Ids, start: int, gathered: Gathered) -> int:
        """Stores what was brought; returns how many leading tokens of the sequence are cached now."""
        if gathered.done is not None:
            gathered.done.synchronize()
        kv = [[_array(plane) for plane in layer] for layer in gathered.host]
        before = start // self._pages.block_tokens * self._pages.ratio
        order = _order(len(pages) * self._pages.ratio - before, before)
        return cache.put(sequence, kv, layout=LAYOUT, pages=order, start=start)


class TierMover(DeviceMover):
    """As `DeviceMover`, but the store itself writes what is loaded to the engine's blocks: from its GPU tier or RAM."""

    def __init__(self, pages: Pages) -> None:
        """Keeps the tensors."""
        super().__init__(pages)
        self._stream = torch.cuda.Stream(pages.device) if self._on_device else None

    @staticmethod
    def serves(pages: Pages) -> bool:
        """Whether the tier reaches these tensors: on a GPU, of one form."""
        return pages.device.type == "cuda" and len({plane.stride() for layer in pages.layers for plane in layer}) == 1

    def load(self, match: Match, load: Load, after: Any) -> int:  # noqa: ANN401 - an event of torch
        """Loads some tokens of a match; returns how many leading ones are valid."""
        stream = None
        if self._stream is not None:
            self._stream.wait_event(after)
            stream = self._stream.cuda_stream
        kv, table = self._pages.layers, self._pages.table(load.pages)
        return match.load(kv, layout=LAYOUT, pages=table, start=load.start, stop=load.stop, stream=stream)


@dataclass
class Gathered:
    """Pages of the engine on their way to host memory.

    Attributes:
        index: which.
        host: where to, ``[layer][plane]``, each ``[pages, H, N, D]``.
        layers: those that are under way.
        done: the event after the last of them.
    """

    index: torch.Tensor
    host: list[list[torch.Tensor]]
    layers: set[int] = field(default_factory=set)
    done: Any = None


def _order(count: int, before: int) -> Ids:
    """Pages in their order, after some that are neither read nor written and so may stand for any."""
    return np.concatenate([np.zeros(before, np.uint32), np.arange(count, dtype=np.uint32)])


def _array(plane: torch.Tensor) -> object:
    """The same memory in the form that the store reads quickest; NumPy has no bfloat16."""
    return plane if plane.dtype == torch.bfloat16 else plane.numpy()
