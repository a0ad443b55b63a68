"""What a profile says, as a table of numbers that can be shaded."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, eq=False)
class Picture:
    """A number for every compressed layer and each of some columns.

    meaning: of the numbers, in one sentence. columns: their titles. values: float `[layers,
    columns]`, finite. form: how a number is written, as `format` takes it.
    """

    meaning: str
    columns: tuple[str, ...]
    values: Tensor
    form: str = ".2f"

    def texts(self) -> list[list[str]]:
        """The numbers, written out."""
        return [[format(value, self.form) for value in row] for row in self.values.tolist()]

    def shades(self) -> list[list[float]]:
        """From 0 for the least number to 1 for the largest, by the root of the distance, so that
        one number far above the others does not hide how they differ; 1 where all are alike.
        """
        values = self.values.double()
        low, high = values.min(), values.max()
        if low == high:
            return [[1.0] * len(self.columns) for _ in values]
        shades: list[list[float]] = ((values - low) / (high - low)).sqrt().tolist()
        return shades
