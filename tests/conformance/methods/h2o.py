"""H2O: kept tokens and scores after every step."""

from __future__ import annotations

from kvhive.policies.h2o import H2O

from ..cases import Case
from ..outputs import replay_outputs
from ..playing import Player, make_layer, play, same_numbers, same_positions


def replay(case: Case) -> None:
    """Compare with `H2OKVCache_LayerWise`."""
    heavy, recent = case.params["heavy"], case.params["recent"]
    policy, budget = H2O(recent=recent), heavy + recent
    if "hidden" in case.tensors:
        replay_outputs(case, policy, budget)
        return
    player = Player.of(case, make_layer(policy, budget))
    for step in play(case, player):
        same_positions(case, step, player.kept)
        same_numbers(case, step, player.layer.slots["score"][0], "score")
