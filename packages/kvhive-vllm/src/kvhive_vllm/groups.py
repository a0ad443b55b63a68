"""Groups of layers that are evicted from at once: the layers are the batch of one `Slots`.

Layers belong together where their policies are equal; a group is small enough for the keys and
values of one request to be moved in a bounded amount of scratch memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from kvhive.lengths import policies_of
from kvhive.policies import Policy
from kvhive.recipe import Recipe
from kvhive.rope import Rotation

from kvhive_vllm.pages import Pages

SCRATCH = 1 << 28  # bytes of keys and values that are moved at a time


@dataclass(frozen=True, eq=False)
class Group:
    """Consecutive layers `first .. first + len(pages) - 1` with the same policy.

    turns: how their keys are turned where positions are counted in the cache, else None. written:
    how the model turned them, None where nobody knows. scale: multiplies a query's product with a
    key.
    """

    policy: Policy
    first: int
    pages: Sequence[Pages]
    scale: float
    turns: Rotation | None
    written: Rotation | None

    @property
    def layers(self) -> range:
        """Places of its layers."""
        return range(self.first, self.first + len(self.pages))


def groups_of(
    recipe: Recipe,
    pages: Sequence[Pages],
    scales: Sequence[float],
    rotations: Sequence[Rotation | None],
    turned: bool,
    bytes_a_token: int,
    tokens: int,
) -> list[Group]:
    """The layers, in order, dealt out to groups.

    turned: whether positions are counted in the cache. bytes_a_token: of keys and values of a
    layer. tokens: the most that a request may hold.
    """
    policies = policies_of(recipe, len(pages))
    most = max(1, SCRATCH // (2 * bytes_a_token * tokens))
    alike = list(zip(policies, scales, map(id, rotations), strict=True))
    groups: list[Group] = []
    start = 0
    for stop in range(1, len(pages) + 1):
        if stop < len(pages) and stop - start < most and alike[stop] == alike[start]:
            continue
        rotation = rotations[start]
        groups.append(
            Group(
                policies[start],
                start,
                pages[start:stop],
                scales[start],
                rotation if turned else None,
                rotation,
            )
        )
        start = stop
    return groups
