"""Which GPU there is to use, or why there is none."""

from __future__ import annotations

import os
from dataclasses import dataclass

from stratakv import _native

__all__ = ["Device", "status"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """What a GPU tier would be on.

    Attributes:
        backend: ``cuda``, or ``host`` where there is no GPU to use: blocks are in RAM then.
        reason: why there is none.
        device: name of the device.
        pci: its place on the bus.
        arch: its compute capability, as 90.
        image: which of the kernels' images it runs.
        driver: version of the driver, as 12090.
        total_bytes: its memory.
        free_bytes: what of that nobody has.
    """

    backend: str
    reason: str | None
    device: str | None = None
    pci: str | None = None
    arch: int | None = None
    image: str | None = None
    driver: int | None = None
    total_bytes: int | None = None
    free_bytes: int | None = None


def status(device: int = 0, driver: str | os.PathLike[str] | None = None) -> Device:
    """Opens a device of the driver, looks, and closes it.

    Args:
        device: its number, as the driver counts.
        driver: library of the driver; ``None``: the system's.
    """
    return Device(**_native.gpu_status(device, driver))
