"""What a cache needs to know of whoever traces it: `stratakv.observe.traces` does."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, Protocol

__all__ = ["Traces", "Work"]


class Work(NamedTuple):
    """Something that the native half did behind requests.

    Attributes:
        kind: ``demote`` or ``promote``.
        model: name of the model.
        begun_ns: when it began, in nanoseconds since 1970.
        ended_ns: when it ended.
        blocks: that were moved.
        size: bytes of their records.
        names: of the first of them, 16 bytes each.
    """

    kind: str
    model: str
    begun_ns: int
    ended_ns: int
    blocks: int
    size: int
    names: list[bytes]


class Traces(Protocol):
    """Makes spans of what is called; `stratakv.observe.traces` does."""

    def turn(self) -> Iterator[Any]:
        """Has the caller's context for each request that is passed over, and ends with them: the next is traced."""

    def wants(self, cache: Any, context: Any, traceparent: str | None) -> bool:  # noqa: ANN401 - a cache, a context
        """Whether a request that begins now is traced; the context is what its turn had, ``True`` at the end."""

    def match(self, cache: Any, traceparent: str | None, **asked: Any) -> Any:  # noqa: ANN401 - as of `match`
        """Makes a match by `ModelCache.match`."""

    def load(self, match: Any, request: Any, work: Callable[[], int]) -> int:  # noqa: ANN401 - a span's context
        """Makes a load."""

    def put(
        self,
        cache: Any,  # noqa: ANN401 - a cache
        traceparent: str | None,
        work: Callable[[], int],
        names: Callable[[], list[bytes]],
    ) -> int:
        """Makes a put."""

    def behind(self, name: str, request: Any, work: Callable[[], int]) -> int:  # noqa: ANN401 - a span's context
        """Does what is behind a request."""
