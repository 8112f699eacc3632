"""A match: what of some tokens is cached, leased until it is released, and how it is loaded.

A cache problem never raises: the load ends earlier, and `Match.explain` says why.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any

from stratakv import _native
from stratakv.errors import ClosedError, InputError
from stratakv.stats import Explanation
from stratakv.tiers.remote import Remote
from stratakv.tracing import Traces

# Matches that may wait to be prefetched.
_WAITING = 64


class Behind:
    """One thread that does what may wait. What finds too much before it is not done, and ends with 0."""

    def __init__(self) -> None:
        """Starts no thread before there is something to do."""
        self._pid = os.getpid()
        self._room = threading.BoundedSemaphore(_WAITING)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="stratakv-behind")

    def __call__(self, work: Callable[[], int]) -> Future[int]:
        """Has it done."""
        if self._pid != os.getpid():
            raise ClosedError("the store was opened before a fork; open one in this process")
        if not self._room.acquire(blocking=False):
            done: Future[int] = Future()
            done.set_result(0)
            return done
        try:
            done = self._thread.submit(work)
        except RuntimeError:
            self._room.release()
            raise ClosedError("the store is closed; open it again") from None
        done.add_done_callback(lambda _: self._room.release())
        return done

    def close(self) -> None:
        """Waits for what is being done; what waits is cancelled."""
        self._thread.shutdown(cancel_futures=True)


class Match:
    """The longest cached prefix of some tokens, leased until exit or `release`.

    What of it lies in the tier that nodes share is not leased: a load gets it, or says why not.
    """

    __slots__ = ("_behind", "_lease", "_loaded", "_remote", "_tell", "_took_s", "_trace")

    def __init__(
        self, lease: _native.Lease, behind: Behind, tell: Callable[[], None], remote: Remote | None = None
    ) -> None:
        """Wraps a native lease; `behind` does what may wait, `tell` is called where the SSD is slow."""
        self._lease = lease
        self._behind = behind
        self._tell = tell
        self._remote = remote
        self._loaded: tuple[int, list[str], str | None] | None = None
        # Who traces it, and as what.
        self._trace: tuple[Traces, Any] | None = None

    def traced(self, traces: Traces, request: Any) -> None:  # noqa: ANN401 - a span's context
        """Has its loads traced, as parts of a request."""
        self._trace = (traces, request)

    @property
    def names(self) -> list[bytes]:
        """Names of all whole blocks that were asked for, 16 bytes each, as `CacheManager.events` has them."""
        return self._lease.names

    @property
    def phases(self) -> dict[str, tuple[float, float]]:
        """Of the last load, by tier: seconds after which it was asked, and those it took."""
        if self._loaded is None:
            return {}
        remote = self._remote.took_s if self._remote is not None else 0.0
        ram, ssd = self._took_s
        # What goes to a device is copied when all of it is read.
        found = {
            "dragonfly": (0.0, remote),
            "ram": (remote, ram),
            "ssd": (remote + ram, ssd),
            "gpu": (remote, ram + ssd),
        }
        return {tier: found[tier] for tier in dict.fromkeys(self._loaded[1])}

    @property
    def tokens(self) -> int:
        """Matched tokens: whole blocks."""
        lease, remote = self._lease, self._remote
        if remote is None or not remote.names:
            return lease.tokens
        return lease.tokens + len(remote.names) * lease.block_tokens

    def load(
        self,
        kv: object,
        *,
        layout: str = "BHND",
        batch: int = 0,
        pages: object = None,
        start: int = 0,
        stop: int | None = None,
        stream: int | None = None,
    ) -> int:
        """Copies the matched blocks into tensors: token i of the match to token i of the tensors.

        Args:
            kv: NumPy arrays, torch tensors or DLPack producers, as `ModelCache.put` takes them; writable.
            layout: axes of the tensors, see `ModelCache.put`.
            batch: row to use where the layout has B.
            pages: page table where the layout has P.
            start: first token to load, where those before it are in ``kv`` already: a multiple of the block's tokens.
                Their rows are neither read nor written.
            stop: the token after the last one to load, likewise; ``None``: all of the match.
            stream: of tensors on a device, the CUDA stream in which they are used: what was put into it is done before,
                and when this returns all is there. ``None``: as the tensors say, else the default stream.

        Returns:
            Leading tokens that are valid in ``kv`` now, those before ``start`` among them. Fewer than asked for if a
            block failed on the way: then `explain` has the reason, and what lies behind the valid ones is undefined.

        Raises:
            InputError: the tensors do not fit the model, or have no room for the match; or start and stop are no bounds
                of its blocks.
            ClosedError: the match was released.
        """
        size, most = self._lease.block_tokens, self.tokens
        stop = most if stop is None else stop
        for name, value in (("start", start), ("stop", stop)):
            if type(value) is not int or not 0 <= value <= most or value % size:
                raise InputError(f"{name} is {value!r}, expected a multiple of {size} from 0 to {most}")
        if start > stop:
            raise InputError(f"start is {start}, expected at most {stop}, where the load stops")
        if self._trace is not None:
            traces, request = self._trace
            return traces.load(self, request, lambda: self._load(kv, (layout, batch, pages), start, stop, stream))
        return self._load(kv, (layout, batch, pages), start, stop, stream)

    def _load(self, kv: object, place: tuple[str, int, object], start: int, stop: int, stream: int | None) -> int:
        size, remote, cut = self._lease.block_tokens, self._remote, None
        if remote is not None and not remote.released and (remote.names or "ssd" in self._lease.places):
            self._lease = remote.fetch(self._lease)
            cut = (remote.reason or "evicted") if self._lease.tokens < stop else None
        here = self._lease.tokens // size
        tokens, places, reason, self._took_s = self._lease.load(
            kv, *place, min(start // size, here), min(stop // size, here), stream
        )
        if remote is not None:
            places = ["dragonfly" if n in remote.fetched else place for n, place in enumerate(places, start // size)]
        self._loaded = (tokens, places, reason or cut)
        if reason == "not_worth_it":
            self._tell()
        return tokens

    def prefetch(self) -> Future[int]:
        """Has blocks that are on SSD alone read into RAM, behind this call, so that a later load finds them there.

        It takes no room from blocks that only RAM has, and at most half of RAM. A release does not stop it.

        Returns:
            What ends with the leading tokens of the match that are in RAM then; 0 at once where more than
            64 matches wait for it already.

        Raises:
            ClosedError: the store was closed.
        """
        lease, trace = self._lease, self._trace

        def work() -> int:
            return lease.prefetch() * lease.block_tokens

        return self._behind(work if trace is None else lambda: trace[0].behind("prefetch", trace[1], work))

    def view(self, block: int) -> memoryview | None:
        """One block where it lies in RAM, without a copy.

        The block stays there as long as the view lives, whatever becomes of the match, the model and the store.

        Args:
            block: its number in the match, from 0.

        Returns:
            Its keys and values, read-only, ``[layer, plane, head, token, dim]``; of bfloat16 the bits, as 16-bit
            integers. ``None`` if it is not in RAM, is encoded there, or the match was released: `load` reads all.

        Raises:
            InputError: the match has no such block.
        """
        return self._lease.view(self._checked(block))

    def device_view(self, block: int) -> _native.DeviceBlock | None:
        """One block where it lies in the GPU tier, without a copy: for ``torch.from_dlpack``, CuPy or Numba.

        Its place is nobody else's as long as the view, and every tensor made of it, lives. By DLPack it is there in the
        stream that asks for it, which must live as long as the tensor does. By the interface of CUDA arrays it is there
        at once, and read in the default stream, or in others that are done before the view goes. It is read-only:
        what a library writes there though, others read. A consumer that knows DLPack before 1.0 alone cannot be told
        so, and has the block for itself: the tier forgets it.

        Args:
            block: its number in the match, from 0.

        Returns:
            Its keys and values, ``[layer, plane, head, token, dim]``; they raise `BufferError` where they cannot be
            handed out. ``None`` if it is not in the GPU tier, to which a load to a device brings what is asked for
            again; or the match was released.

        Raises:
            InputError: the match has no such block.
        """
        return self._lease.device_view(self._checked(block))

    def _checked(self, block: int) -> int:
        blocks = self._lease.blocks
        if not isinstance(block, int) or not 0 <= block < blocks:
            raise InputError(f"block is {block!r}, expected an integer from 0, below {blocks}, the blocks of the match")
        return block

    def explain(self) -> Explanation:
        """What was found, what was loaded, and why not more."""
        lease, remote = self._lease, self._remote
        loaded, places, reason = self._loaded or (None, lease.places, None)
        waiting = remote.names if remote is not None else []
        missing = remote.reason if remote is not None else None
        if lease.blocks + len(waiting) < len(lease.names):
            # Where a tier could not be asked, that is what is known.
            missing = missing or lease.miss
        return Explanation(
            asked_tokens=lease.asked_tokens,
            matched_tokens=self.tokens,
            loaded_tokens=loaded,
            blocks=(*places, *["dragonfly"] * len(waiting)),
            reason=reason or missing,
        )

    def release(self) -> None:
        """Gives the blocks free; again does nothing."""
        if self._remote is not None:
            self._remote.names, self._remote.released = [], True
        self._lease.release()

    def __enter__(self) -> Match:
        """The match itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Releases the match."""
        self.release()
