"""What of a match lies in the tier that nodes share: found when it is made, brought to RAM when it is loaded."""

from __future__ import annotations

import time

from stratakv import _native, log
from stratakv.errors import ClosedError, StrataKVError
from stratakv.tiers.dragonfly import Dragonfly

_log = log.of(__name__)

# A block that is on SSD is read from there where that takes so many times less.
_QUICKER = 1.5


class Remote:
    """What of a match lies in the tier that nodes share, behind what is here."""

    __slots__ = ("asked", "before", "fetched", "model", "names", "reason", "released", "space", "tier", "took_s")

    def __init__(
        self, tier: Dragonfly, model: _native.Model, asked: tuple[object, str, str], lease: _native.Lease
    ) -> None:
        """Asks the tier which of the blocks that are not here it has."""
        self.tier, self.model, self.asked = tier, model, asked
        names, here = lease.names, lease.blocks
        self.space = model.fingerprint + lease.space
        count, self.reason = tier.leading(self.space, names, here)
        lease.found_elsewhere(count, self.reason)
        self.before, self.names = names[:here], names[here : here + count]
        # Which blocks of the match came from there.
        self.fetched: set[int] = set()
        self.released = False
        # Seconds that the last fetch took.
        self.took_s = 0.0

    def fetch(self, lease: _native.Lease) -> _native.Lease:
        """Brings to RAM what of them is worth it, and what it has quicker than the SSD; the match as it is then."""
        size, begun = self.model.record_bytes, time.perf_counter()
        try:
            self._overtake(lease, size)
            first, rate = lease.blocks, self.model.prefill_rate()
            saved_s = None if rate is None else lease.block_tokens * len(self.names) / rate
            if self.names and not self.tier.cost.is_worth(size * len(self.names), saved_s):
                self._none(lease, "not_worth_it")
                self.tier.passed_over()
            if not self.names:
                return lease
            names = [*self.before, *self.names]
            records, reason = self.tier.fetch(self.space, names, size, first)
            asked, self.names = len(self.names), []
            _, came, wrong = self.model.admit(self.asked, "", "", first, records)
            longer = lease.extended(self.model, self.asked, first + asked, wrong or reason)
        except ClosedError:
            # The store went away under the match.
            self._none(lease, "closed")
            return lease
        except StrataKVError as error:
            _log.warning("match_cut_short", "a match ends before what is in dragonfly: %s", error)
            self._none(lease, "error")
            return lease
        finally:
            self.took_s = time.perf_counter() - begun
        # What another request put meanwhile is here all the same.
        here = longer.blocks - first
        self.tier.booked(asked, here, sum(map(len, records[:came])))
        self.reason = wrong or reason or self.reason
        self.fetched |= set(range(first, first + here))
        lease.release()
        return longer

    def _none(self, lease: _native.Lease, reason: str) -> None:
        """None of what is there can be had."""
        self.names, self.reason = [], reason
        lease.found_elsewhere(0, reason)

    def _overtake(self, lease: _native.Lease, size: int) -> None:
        """Brings blocks that are on SSD alone from there, where that takes much less than reading them."""
        on_ssd = [n for n, place in enumerate(lease.places) if place == "ssd"]
        terms, read_s = self.tier.cost.terms(), self.model.read_s()
        if not on_ssd or terms is None or read_s is None:
            return
        first, count = on_ssd[0], on_ssd[-1] + 1 - on_ssd[0]
        quick = _QUICKER * (terms[0] + terms[1] * size * count) < read_s * size * len(on_ssd)
        if not quick or self.tier.leading(self.space, self.before, first)[0] < count:
            return
        records, _ = self.tier.fetch(self.space, self.before, size, first)
        self.model.admit(self.asked, "", "", first, records)
        came = {n for n, place in enumerate(lease.places) if place == "ram"}.intersection(on_ssd)
        self.tier.booked(len(on_ssd), len(came), sum(len(records[n - first]) for n in came if n - first < len(records)))
        self.fetched |= came
