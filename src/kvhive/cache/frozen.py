"""The handle of `HiveCache.freeze`."""

from __future__ import annotations

from types import TracebackType
from typing import Generic, TypeVar

from kvhive.cache.progress import Progress

C = TypeVar("C")


class Frozen(Generic[C]):
    """Ends a freezing at the end of a `with` block, which gets the cache."""

    def __init__(self, cache: C, progress: Progress) -> None:
        self._cache, self._progress = cache, progress

    def __enter__(self) -> C:
        return self._cache

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._progress.frozen = max(0, self._progress.frozen - 1)
