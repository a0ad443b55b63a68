"""CORM: kept tokens of every head after every step."""

from __future__ import annotations

from kvhive.policies.corm import Corm

from ..cases import Case
from ..playing import Player, make_layer, play, require


def replay(case: Case) -> None:
    """Compare with the masks of the oracle; the method sizes itself, so there is no budget."""
    params = case.params
    policy = Corm(
        history=params["window"],
        recent=params["recent"],
        threshold=params["threshold"],
        cap=params["cap"],
    )
    player = Player.of(case, make_layer(policy, None, slack=None))
    for step in play(case, player):
        recorded = case.tensor("mask", step)
        require(recorded is not None, f"step {step}: nothing is recorded under 'mask'")
        assert recorded is not None
        sizes = case.at(step).get("kept")
        for head, held in enumerate(player.kept.tolist()):
            ours = [position for position in held if position >= 0]
            expected = recorded[head].nonzero().flatten().tolist()
            require(
                ours == expected,
                f"step {step}, KV head {head}: kept {ours}, recorded {expected}",
            )
            require(
                sizes is None or len(ours) == sizes[head],
                f"step {step}, KV head {head}: {len(ours)} tokens, recorded {sizes}",
            )
