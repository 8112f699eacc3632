"""SGLang's host pools in the memory of the host, filled with bytes by chance, and what their pages hold.

What a page holds is told from the layout's name alone, so that it does not depend on what is tested.
"""

from __future__ import annotations

from typing import Any

import torch
from sglang.srt.mem_cache.device_pool_info import (
    KVBufferLayout,
    KVBuffers,
    MambaStateBufferInfo,
    MHABufferInfo,
    MLABufferInfo,
)
from sglang.srt.mem_cache.pool_host.mamba import MambaPoolHost
from sglang.srt.mem_cache.pool_host.mha import MHATokenToKVPoolHost
from sglang.srt.mem_cache.pool_host.mla import MLATokenToKVPoolHost

PAGE = 4
LAYERS = 3


def pointers(tensors: tuple[Any, ...]) -> Any:
    return torch.tensor([each.data_ptr() for each in tensors], dtype=torch.uint64)


def mha(
    layout: str = "layer_first",
    dtype: Any = torch.bfloat16,
    *,
    heads: int = 2,
    dim: int = 16,
    value_dim: int | None = None,
    layers: int = LAYERS,
    page: int = PAGE,
    pages: int = 32,
    kind: Any = MHATokenToKVPoolHost,
) -> Any:
    """A host pool of keys and values, filled with bytes by chance."""
    keys, values = (
        tuple(torch.zeros(page, heads, width, dtype=dtype) for _ in range(layers)) for width in (dim, value_dim or dim)
    )
    info = MHABufferInfo(
        buffers=KVBuffers(
            k=keys, v=values, k_data_ptrs=pointers(keys), v_data_ptrs=pointers(values), layout=KVBufferLayout.NHD
        ),
        page_size=page,
        head_num=heads,
        head_dim=dim,
        v_head_dim=value_dim or dim,
        dtype=dtype,
        device=torch.device("cpu"),
    )
    pool = kind(
        info,
        0.0,
        0,
        page,
        layout,
        pin_memory=False,
        device_capacity_tokens=page,
        start_layer=0,
        end_layer=layers,
        host_token_capacity=pages * page,
    )
    fill(pool)
    return pool


def mla(layout: str = "layer_first", dtype: Any = torch.bfloat16, *, pages: int = 32) -> Any:
    """A host pool of latent planes, filled with bytes by chance."""
    rows = tuple(torch.zeros(PAGE, 1, 24, dtype=dtype) for _ in range(LAYERS))
    info = MLABufferInfo(
        buffers=rows,
        data_ptrs=pointers(rows),
        layer_indices=tuple(range(LAYERS)),
        device_layer_num=LAYERS,
        page_size=PAGE,
        kv_lora_rank=16,
        qk_rope_head_dim=8,
        kv_cache_dim=24,
        dtype=dtype,
        device=torch.device("cpu"),
    )
    pool = MLATokenToKVPoolHost(
        info,
        0.0,
        0,
        PAGE,
        layout,
        pin_memory=False,
        device_capacity_tokens=PAGE,
        start_layer=0,
        end_layer=LAYERS,
        target_layer_num=LAYERS,
        host_token_capacity=pages * PAGE,
    )
    fill(pool)
    return pool


def mamba() -> Any:
    """A host pool of states: one stretch of memory for each slot of the recurrence, one of each convolution."""
    info = MambaStateBufferInfo(temporal=torch.zeros(2, 4, 3, 8), conv=(torch.zeros(2, 4, 5, dtype=torch.bfloat16),))
    pool = MambaPoolHost(info, 4.0, 0, device_capacity=4, pin_memory=False, layout="page_first")
    for buffer in (pool.temporal_buffer, *pool.conv_buffer):
        buffer.copy_(torch.randn(buffer.shape))
    return pool


def memory(pool: Any) -> list[Any]:
    """All of a pool as bytes."""
    buffers = pool.kv_buffer if isinstance(pool.kv_buffer, tuple) else (pool.kv_buffer,)
    return [buffer.view(torch.uint8) for buffer in buffers]


def same(ours: Any, theirs: Any) -> bool:
    """Whether two tensors hold the same bytes; numbers would not do, as a NaN differs from itself."""
    return bool(torch.equal(ours.contiguous().view(torch.uint8), theirs.contiguous().view(torch.uint8)))


def fill(pool: Any) -> None:
    for each in memory(pool):
        each.copy_(torch.randint(0, 256, each.shape, dtype=torch.uint8))


def page_of(pool: Any, page: int) -> Any:
    """What a page holds, ``[plane, layer, token, head, dim]``, as bytes; told from the layout's name alone."""
    buffer = pool.kv_buffer.view(torch.uint8)
    first, end = page * PAGE, (page + 1) * PAGE
    if isinstance(pool, MLATokenToKVPoolHost):
        buffer = buffer[None]
    if pool.layout == "layer_first":
        return buffer[:, :, first:end]
    if pool.layout == "page_first":
        return buffer[:, first:end].transpose(1, 2)
    if pool.layout == "page_first_direct":
        return buffer[:, page]
    if pool.layout == "page_head":
        return buffer[:, page].permute(0, 3, 2, 1, 4)
    assert pool.layout == "page_unified"
    return buffer[page, 0].transpose(0, 1)


def slots(*pages: int, page: int = PAGE) -> Any:
    return torch.cat([torch.arange(each * page, (each + 1) * page) for each in pages])
