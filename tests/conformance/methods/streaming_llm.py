"""StreamingLLM: kept tokens after every step, and after making room for a turn."""

from __future__ import annotations

from kvhive.policies.streaming_llm import StreamingLLM

from ..cases import Case
from ..outputs import replay_outputs
from ..playing import Player, make_layer, play, same_positions, same_sizes


def replay(case: Case) -> None:
    """Compare with `StartRecentKVCache`."""
    sink, recent = case.params["sink"], case.params["recent"]
    policy, budget = StreamingLLM(sink=sink), sink + recent
    if "hidden" in case.tensors:
        replay_outputs(case, policy, budget)
        return
    player = Player.of(case, make_layer(policy, budget))
    if any(case.at(step).get("space_request") is not None for step in range(len(case.lengths))):
        replay_turns(case, player)
        return
    for step in play(case, player):
        same_positions(case, step, player.kept)


def replay_turns(case: Case, player: Player) -> None:
    """Room is made before a turn; inside it the reference does not evict, so neither may we."""
    player.layer.progress.frozen = 1
    for step, fresh in enumerate(case.lengths):
        request = case.at(step).get("space_request")
        if request is not None:
            player.layer.make_room(request)
            same_positions(case, step, player.kept, "space")
        before = player.kept.shape[1] + fresh
        player.advance(fresh)
        same_sizes(case, step, before, player.kept.shape[1])
        same_positions(case, step, player.kept)
