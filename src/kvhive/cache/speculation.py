"""Speculative decoding: drafted tokens wait here until it is known which of them count.

While recording, tokens are attended to but do not vote, and nothing is evicted. `crop` takes the
rejected ones back; the accepted ones then go through the very steps that decoding them one by one
would have taken, so that a recipe keeps what it keeps without a draft.
"""

from __future__ import annotations

from collections.abc import Sequence

from kvhive.cache.layer import HiveLayer
from kvhive.cache.pending import Pending


def crop(layers: Sequence[HiveLayer], remove: int) -> None:
    """Take the newest `remove` tokens back from all layers of a cache; then let those that stay
    vote and evict.

    Raises `ValueError` for what cannot be taken back.
    """
    first = layers[0]
    if not first.slots.length or (remove == 0 and not first.pending):
        return
    recorded = sum(pending.step.fresh for pending in first.pending)
    _check(layers, remove, recorded)
    steps = list(zip(*(layer.pending for layer in layers), strict=True))
    for layer in layers:
        layer.pending.clear()
    left = recorded - remove
    if left <= 0 or (steps[0][0].drafted and all(layer.is_quiet for layer in layers)):
        truncate(layers, remove)
    else:
        _conclude(layers, steps, recorded, left)


def _conclude(
    layers: Sequence[HiveLayer],
    steps: Sequence[tuple[Pending, ...]],
    recorded: int,
    left: int,
) -> None:
    """Take all `recorded` tokens back but a prompt's; let the first `left` of them come again."""
    prompt = 0 if steps[0][0].drafted else min(steps[0][0].step.fresh, left)
    truncate(layers, recorded - prompt)
    if prompt:
        _settle(layers, [pending.part(0, prompt) for pending in steps[0]])
    left -= prompt
    for step in steps[1 if prompt else 0 :]:
        for place in range(min(step[0].step.fresh, left)):
            for layer, pending in zip(layers, step, strict=True):
                layer.accept(pending.part(place, place + 1))
        left -= step[0].step.fresh


def _check(layers: Sequence[HiveLayer], remove: int, recorded: int) -> None:
    if remove < 0:
        raise ValueError(f"crop: expected minus the number of tokens to remove, got {-remove}")
    appended = min(layer.appended for layer in layers)
    if remove > appended:
        raise ValueError(
            f"crop: asked to take back {remove} tokens, but only {appended} were added since the "
            "last eviction and what was evicted before cannot be brought back"
        )
    if remove > recorded and any(layer.policy.needs.votes for layer in layers):
        raise ValueError(
            "crop: these tokens have voted already; call activate_past_recording() before the "
            "steps that may be taken back"
        )


def truncate(layers: Sequence[HiveLayer], tokens: int) -> None:
    """Forget the newest tokens of every layer."""
    first = layers[0]
    real = None
    if first.progress.rows is not None:
        real = (first.slots.position[:, 0, first.slots.length - tokens :] >= 0).sum(-1)
    first.progress.take_back(tokens, real)
    for layer in layers:
        layer.truncate(tokens)


def _settle(layers: Sequence[HiveLayer], prompt: Sequence[Pending]) -> None:
    """The prompt that came with the first draft, as if it had come alone."""
    progress, step = layers[0].progress, prompt[0].step
    progress.limits.follow(step, progress.lengths(), layers[0].slots.heads)
    for layer, pending in zip(layers, prompt, strict=True):
        layer.settle(pending)
