"""The largest budget whose cache fits a size."""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import replace

from kvhive.budget import Budget
from kvhive.cache.footprint import Footprint, Workload, footprint
from kvhive.calibration import Profile
from kvhive.model.outline import Outline
from kvhive.recipe import Recipe
from kvhive.units import bytes_text, parse_bytes


def fitted(
    recipe: Recipe | str,
    size: int | str,
    outline: Outline,
    work: Workload,
    profile: Profile | None = None,
) -> Recipe:
    """The recipe with the largest budget, a count of tokens, whose cache stays within `size`.

    recipe: without a budget. size: bytes, or "24MiB". "Stays within" is `Footprint.between_steps`.
    `full`, and whatever else takes no budget but has no size of its own, comes back as it is if it
    fits. Raises `ValueError` for a recipe that names a budget or sizes itself, for a size that
    nothing fits (with the least that would do), and where tokens must be known and are not.
    """
    limit = parse_bytes(size)
    free = Recipe.without_budget(recipe)
    sizing = free.policy.sizing

    def needed(tokens: int) -> Footprint:
        return footprint(replace(free, budget=Budget(tokens=tokens)), outline, work, profile)

    if not sizing.budgeted:
        if sizing.alone is not None:
            raise ValueError(f"{free} sizes itself, so no budget can make it fit {size}")
        _check(free, footprint(free, outline, work, profile).between_steps, limit, work)
        return free
    if not sizing.decoding:
        raise ValueError(
            f"{free.policy.name} does not evict while decoding with these knobs, so no budget "
            "holds it within a size; leave decode='none' out, or give a budget"
        )
    least = max(_least(free, outline), 1) + (free.slack or 0)
    smallest = needed(least)
    if smallest.between_steps > limit:
        raise ValueError(_too_few(free, least, smallest, limit, outline, work))
    most = work.tokens or 2 * least
    while work.tokens is None and needed(most).between_steps <= limit:
        most *= 2
    tried = range(least, max(least, most) + 1)
    place = bisect_right(tried, limit, key=lambda tokens: needed(tokens).between_steps)
    return replace(free, budget=Budget(tokens=tried[place - 1]))


def _least(recipe: Recipe, outline: Outline) -> int:
    """The least budget that every layer can work with."""
    count = len(outline.full_layers)
    layers = (recipe.policy.for_layer(place, count, None) for place in range(count))
    return max(recipe.policy.sizing.least, *(layer.sizing.least for layer in layers))


def _check(recipe: Recipe, needed: int, limit: int, work: Workload) -> None:
    if needed > limit:
        raise ValueError(
            f"{recipe} does not fit {bytes_text(limit)}: for {work.tokens:,} tokens it needs "
            f"{bytes_text(needed)}"
        )


def _too_few(
    recipe: Recipe, least: int, needed: Footprint, limit: int, outline: Outline, work: Workload
) -> str:
    layers, shape = len(outline.full_layers), outline.shapes[outline.full_layers[0]]
    rows = f" x {work.batch} rows" * (work.batch > 1)
    stock = (
        f", of which {bytes_text(needed.stock)} in layers that are not compressed"
        if needed.stock
        else ""
    )
    return (
        f"{bytes_text(limit)} are too few: {recipe.policy.name} needs at least {least} "
        f"token{'s' * (least != 1)} x {layers} layers x {shape.kv_heads} KV heads{rows}, with the "
        f"room that steps take {bytes_text(needed.between_steps)}{stock}"
    )
