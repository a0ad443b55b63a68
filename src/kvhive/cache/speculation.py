"""Speculative decoding: drafted tokens wait here until it is known which of them count.

While recording, tokens are attended to but do not vote, and nothing is evicted. `crop` takes the
rejected ones back; the accepted ones then go through the very steps that decoding them one by one
would have taken, so that a recipe keeps what it keeps without a draft.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from torch import Tensor

from kvhive.step import Step

if TYPE_CHECKING:
    from kvhive.cache.layer import HiveLayer


@dataclass(frozen=True, eq=False)
class Pending:
    """A recorded step of one layer. query: `[b, H, q, d]`, None where nobody votes. keys, values:
    `[b, K, q, d]` and `[b, K, q, e]` of drafts; None for a prompt, which stays where it is.
    """

    step: Step
    scale: float
    query: Tensor | None
    keys: Tensor | None
    values: Tensor | None

    @property
    def drafted(self) -> bool:
        """Whether these tokens are a draft, not a prompt (whose draft comes with it)."""
        return self.keys is not None

    @classmethod
    def of(
        cls, step: Step, scale: float, query: Tensor | None, keys: Tensor, values: Tensor
    ) -> Pending:
        """Of a step just taken."""
        prompt = step.phase == "prefill"
        return cls(step, scale, query, None if prompt else keys, None if prompt else values)

    def part(self, start: int, stop: int) -> Pending:
        """Its tokens start..stop-1 alone."""
        query, keys, values = (
            None if tensor is None else tensor[:, :, start:stop]
            for tensor in (self.query, self.keys, self.values)
        )
        return replace(
            self, step=self.step.part(start, stop), query=query, keys=keys, values=values
        )

    def select_rows(self, rows: Tensor) -> Pending:
        """Re-index the batch: row i becomes what row `rows[i]` was."""
        query, keys, values = (
            None if tensor is None else tensor.index_select(0, rows)
            for tensor in (self.query, self.keys, self.values)
        )
        return replace(
            self, step=self.step.select_rows(rows), query=query, keys=keys, values=values
        )

    @property
    def nbytes(self) -> int:
        """Bytes of what waits."""
        held = (self.query, self.keys, self.values)
        return sum(tensor.untyped_storage().nbytes() for tensor in held if tensor is not None)


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
    left = recorded - remove
    if left <= 0 or (steps[0][0].drafted and all(layer.is_quiet for layer in layers)):
        _truncate(layers, remove)
    else:
        _conclude(layers, steps, recorded, left)
    for layer in layers:
        layer.pending.clear()


def _conclude(
    layers: Sequence[HiveLayer],
    steps: Sequence[tuple[Pending, ...]],
    recorded: int,
    left: int,
) -> None:
    """Take all `recorded` tokens back but a prompt's, and let the first `left` of them come again."""
    prompt = 0 if steps[0][0].drafted else min(steps[0][0].step.fresh, left)
    _truncate(layers, recorded - prompt)
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


def _truncate(layers: Sequence[HiveLayer], tokens: int) -> None:
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
