"""What the parts of this package share: memory objects as blocks, what is leased or removed, and what is said once."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence

import torch
from lmcache.v1.memory_management import MemoryObj

from stratakv import Geometry, Match, log

__all__ = ["Form", "Held", "Said", "dtype_name", "layout_of", "leading_objects"]

_log = log.of(__name__)

_DTYPES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}

# Keys whose blocks may be leased at once.
_LEASES = 4096
# Keys that were removed and are not found any more until they are put again.
_REMOVED = 65_536
# Reasons that are told apart.
_SAID = 32


class Form:
    """Memory objects of one shape and type, and which block one is."""

    def __init__(
        self, shapes: Sequence[torch.Size], dtypes: Sequence[torch.dtype], *, heads: tuple[int, int] | None = None
    ) -> None:
        """`heads`: kv heads and their elements, where the last axis consists of them.

        Raises:
            InputError: there is no such geometry.
        """
        self.shapes, self.dtypes = list(shapes), list(dtypes)
        self.bytes = sum(shape.numel() * dtype.itemsize for shape, dtype in zip(self.shapes, self.dtypes, strict=True))
        self.name = "; ".join(
            f"{dtype_name(dtype)} {list(shape)}" for shape, dtype in zip(self.shapes, self.dtypes, strict=True)
        )
        shape, dtype = self.shapes[0], self.dtypes[0]
        self._axes: list[int] | None = None
        if len(self.shapes) == 1 and len(shape) == 4 and shape[0] in (1, 2) and dtype in _DTYPES and shape[2] <= 4096:
            planes, layers, tokens, width = shape
            kv_heads, head_dim = heads if heads is not None and heads[0] * heads[1] == width else (1, width)
            self._axes = [planes, layers, tokens, kv_heads, head_dim]
            self.layout = "KLNHD"
            self.geometry = Geometry(
                layers=layers,
                kv_heads=kv_heads,
                head_dim=head_dim,
                dtype=_DTYPES[dtype],  # type: ignore[arg-type]  # they are its names
                block_tokens=tokens,
                planes=planes,
            )
        else:
            # Bytes, whatever they are. Where that divides, as many tokens as a key has words.
            words = 16 if self.bytes % 16 == 0 else 1
            self.layout = "HND"
            self.geometry = Geometry(
                layers=1, kv_heads=1, head_dim=self.bytes // words, dtype="uint8", block_tokens=words, planes=1
            )

    def tensors(self, obj: MemoryObj) -> object | None:
        """The memory of an object, as `layout` says; ``None`` if it is of another shape, type or place."""
        shapes, dtypes = layout_of(obj)
        raw = obj.raw_tensor
        if shapes != self.shapes or dtypes != self.dtypes or raw is None or raw.device.type != "cpu":
            return None
        if obj.get_size() != self.bytes or raw.numel() * raw.element_size() < self.bytes:
            return None
        flat = raw.view(torch.uint8)[: self.bytes]
        if self._axes is None:
            return [[flat.view(1, self.geometry.block_tokens, self.geometry.head_dim)]]
        tensor: object = flat.view(self.dtypes[0]).view(self._axes)
        return tensor


def dtype_name(dtype: torch.dtype) -> str:
    """As ``bfloat16``."""
    return str(dtype).removeprefix("torch.")


def layout_of(obj: MemoryObj) -> tuple[list[torch.Size], list[torch.dtype | None]]:
    """Shapes and types of what an object holds; some have just one."""
    meta = obj.metadata
    return (
        [meta.shape] if meta.shapes is None else list(meta.shapes),
        [meta.dtype] if meta.dtypes is None else list(meta.dtypes),
    )


class Held:
    """What of keys is leased, and which were removed."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._leases: OrderedDict[bytes, list[Match]] = OrderedDict()
        self._removed: OrderedDict[bytes, None] = OrderedDict()

    def lease(self, key: bytes, match: Match) -> None:
        """Keeps a lease until it is released; the oldest give way to it."""
        with self._lock:
            self._leases.setdefault(key, []).append(match)
            self._leases.move_to_end(key)
            old = [self._leases.popitem(last=False)[1] for _ in range(max(0, len(self._leases) - _LEASES))]
        for each in old:
            for one in each:
                one.release()

    def release(self, key: bytes, *, all_of_it: bool = False) -> bool:
        """Gives one lease of a key free; whether there was one."""
        with self._lock:
            held = self._leases.get(key)
            if not held:
                return False
            going = held[:] if all_of_it else [held[-1]]
            del held[len(held) - len(going) :]
            if not held:
                del self._leases[key]
        for each in going:
            each.release()
        return True

    def release_all(self) -> None:
        """Gives all free."""
        with self._lock:
            going = [match for held in self._leases.values() for match in held]
            self._leases.clear()
        for each in going:
            each.release()

    def remove(self, key: bytes) -> None:
        """From now on it is not found."""
        self.release(key, all_of_it=True)
        with self._lock:
            self._removed[key] = None
            if len(self._removed) > _REMOVED:
                self._removed.popitem(last=False)

    def restore(self, key: bytes) -> None:
        """It was put again."""
        if self._removed:
            with self._lock:
                self._removed.pop(key, None)

    def is_removed(self, key: bytes) -> bool:
        """Whether it is not to be found."""
        return key in self._removed

    def __len__(self) -> int:
        return len(self._leases)


class Said:
    """Says something once, and counts how often it was the case."""

    def __init__(self) -> None:
        self._counts: dict[str, int] = {}

    def __call__(self, reason: str) -> None:
        """Counts it, and logs it the first time."""
        if len(self._counts) < _SAID or reason in self._counts:
            self._counts[reason] = self._counts.get(reason, 0) + 1
            if self._counts[reason] == 1:
                _log.warning("objects_not_stored", "%s; this is said once", reason, key=reason)

    @property
    def counts(self) -> dict[str, int]:
        """How often each was the case."""
        return dict(self._counts)


def leading_objects(found: Sequence[MemoryObj | None]) -> list[MemoryObj]:
    """Objects up to the first that is missing; the rest is given back."""
    end = next((number for number, obj in enumerate(found) if obj is None), len(found))
    for obj in found[end:]:
        if obj is not None:
            obj.ref_count_down()
    return [obj for obj in found[:end] if obj is not None]
