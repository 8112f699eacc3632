"""What getting blocks from a tier costs: latency and bandwidth, learned from each transfer as it ends.

Seconds are taken to be latency + bytes / bandwidth. Both are fitted by least squares over what was measured; what is
older counts less with each new one, so that a tier that becomes slow is known to be after a few transfers.
"""

from __future__ import annotations

import threading

# What is counted of earlier transfers at each new one.
_KEPT = 0.9
# Of so many loads that are not worth it, one is made: a tier that has recovered is seen.
_TRIED = 16


class Cost:
    """Of one tier. Any thread may use it."""

    def __init__(self) -> None:
        """Nothing is known yet."""
        self._lock = threading.Lock()
        # Sums over transfers, each with its weight: 1, bytes, bytes squared, seconds, seconds times bytes.
        self._sums = [0.0] * 5
        self._passed_over = 0

    def note(self, size: int, seconds: float) -> None:
        """A transfer of so many bytes took so many seconds."""
        with self._lock:
            more = (1.0, size, size * size, seconds, seconds * size)
            self._sums = [old * _KEPT + new for old, new in zip(self._sums, more, strict=True)]

    def terms(self) -> tuple[float, float] | None:
        """Seconds of latency, and seconds for each byte; ``None``: nothing is known yet."""
        with self._lock:
            weight, size, square, seconds, product = self._sums
        if not size:
            return None
        spread = weight * square - size * size
        # Transfers of about one size tell of no latency.
        if spread > 0.01 * weight * square:
            byte_s = (weight * product - size * seconds) / spread
            latency_s = (seconds - byte_s * size) / weight
            if byte_s > 0 and latency_s >= 0:
                return latency_s, byte_s
        return 0.0, seconds / size

    def seconds(self, size: int) -> float | None:
        """What a transfer of so many bytes will take; ``None``: nothing is known yet."""
        terms = self.terms()
        return None if terms is None else terms[0] + size * terms[1]

    def is_worth(self, size: int, saved_s: float | None) -> bool:
        """Whether getting so many bytes takes less than it saves, if that is known; and one of 16 times anyway."""
        seconds = self.seconds(size)
        if saved_s is None or seconds is None or seconds <= saved_s:
            return True
        with self._lock:
            self._passed_over += 1
            return self._passed_over % _TRIED == 0
