"""What a recipe kept, over all texts of a run."""

from __future__ import annotations

from dataclasses import dataclass

from kvhive.cache.hive_cache import HiveCache


@dataclass
class Tally:
    """Sums over the texts that were read, as their caches were when the answer began."""

    texts: int = 0
    seen: int = 0
    kept: float = 0.0
    nbytes: int = 0
    full_nbytes: int = 0

    def add(self, cache: HiveCache) -> None:
        """All rows of a cache; bytes with the padding that it holds."""
        report = cache.report()
        if report.kept.numel():
            self.texts += len(report.seen)
            self.seen += int(report.seen.sum())
            self.kept += float(report.kept.double().mean((0, 2)).sum())
            self.nbytes += report.nbytes
            self.full_nbytes += report.full_nbytes

    def means(self) -> dict[str, int | float]:
        """Of one text; empty when none was read."""
        if not self.seen:
            return {}
        return {
            "texts": self.texts,
            "tokens_read": round(self.seen / self.texts, 2),
            "tokens_kept": round(self.kept / self.texts, 2),
            "kept_share": round(self.kept / self.seen, 4),
            "bytes": self.nbytes // self.texts,
            "full_bytes": self.full_nbytes // self.texts,
        }
