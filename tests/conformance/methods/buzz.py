"""BUZZ: kept tokens, sample sizes and scores after every step; what its artifacts leave true."""

from __future__ import annotations

import pytest
import torch

from kvhive.policies.buzz import Buzz

from ..cases import Case
from ..outputs import replay_outputs
from ..playing import Player, make_layer, play, require, same_numbers, same_positions


def replay(case: Case) -> None:
    """Compare with the reference's three cache classes, or with the recorded oracle."""
    if case.params["window"] == 0:
        with pytest.raises(ValueError, match="window must be at least 1"):
            policy_of(case)
    elif "hidden" in case.tensors:
        replay_outputs(case, policy_of(case), budget_of(case))
    elif not case.is_artifact:
        follow(case, policy_of(case))
    elif case.facts["variant"] == "fast" and case.facts["patch"] == "none":
        replay_wrong_fold(case)
    elif case.params["stride"] < 3:  # grows for ever, there as here
        follow(case, policy_of(case, drain=False))
    else:
        replay_late_thinning(case)


def policy_of(case: Case, drain: bool = True) -> Buzz:
    """The recorded variant and parameters."""
    params = case.params
    policy = Buzz(
        preset="paper",
        variant=case.facts["variant"],
        sink=params["sink"],
        window=params["window"],
        threshold=params["threshold"],
        stride=params["stride"],
        prefill="streamed" if params.get("streamed") else "step",
        drain=params.get("drain", drain),
        allow_unbounded=params["stride"] < 3,
    )
    require(policy.old_stride == params.get("old_stride", policy.old_stride), "old stride differs")
    return policy


def budget_of(case: Case) -> int:
    """sink + window + threshold."""
    return int(sum(case.params[name] for name in ("sink", "window", "threshold")))


def player_of(case: Case, policy: Buzz) -> Player:
    """Plays the case's logits, if it has any, through a layer with this policy."""
    return Player.of(case, make_layer(policy, budget_of(case)))


def follow(case: Case, policy: Buzz) -> None:
    """Everything recorded is reproduced, step by step."""
    player = player_of(case, policy)
    for step in play(case, player):
        same_sample_size(case, step, player)
        same_positions(case, step, player.kept)
        if "score" in player.layer.policy.columns:
            judged = case.params["sink"] + sample_size(player)
            same_numbers(case, step, player.layer.slots["score"][0, :, judged:], "score")


def replay_late_thinning(case: Case) -> None:
    """A prompt whose sample exceeds the threshold: the reference thins it again at later tokens.

    Without the drain we do exactly as it does. With the drain the cache is within its budget after
    every step. What takes us d passes at once takes the reference d further steps: its sample then
    begins with ours.
    """
    follow(case, policy_of(case, drain=False))
    player = player_of(case, policy_of(case))
    sink, threshold = case.params["sink"], case.params["threshold"]
    sizes = [case.at(step)["sample_size"] for step in range(len(case.lengths))]
    first = next((step for step, size in enumerate(sizes) if size > threshold), len(sizes))
    for step, fresh in enumerate(case.lengths):
        player.advance(fresh)
        within = player.kept.shape[1] <= budget_of(case)
        require(within, f"step {step}: over budget in spite of the drain")
        if step < first:
            same_positions(case, step, player.kept)
        elif step == first:
            later = first + passes(sizes[first], threshold, (case.params["stride"] + 1) // 2)
            recorded = case.tensor("kept", later)
            stop = sink + sample_size(player)
            require(
                recorded is None or torch.equal(player.kept[:, sink:stop], recorded[:, sink:stop]),
                f"step {step}: the drained sample is not how the recorded one begins at {later}",
            )


def passes(sample: int, threshold: int, old_stride: int) -> int:
    """How often a sample must be thinned until it fits."""
    count = 0
    while sample > threshold:
        sample, count = -(-sample // old_stride), count + 1
    return count


def replay_wrong_fold(case: Case) -> None:
    """The reference gives query head c * kv_heads + g to KV head g, although its keys go to others.

    So its choices must not be reproduced. They do not touch sizes, sinks, window and the tokens not
    yet judged: these are compared at every step. And up to the first eviction our choices are the
    recorded ones if the query heads are handed to us in its wrong order, so the fold alone differs.
    """
    sink = case.params["sink"]
    player = player_of(case, policy_of(case))
    for step in play(case, player):
        same_sample_size(case, step, player)
        recorded = case.tensor("kept", step)
        assert recorded is not None
        judged = sink + sample_size(player)
        require(
            torch.equal(player.kept[:, :sink], recorded[:, :sink])
            and torch.equal(player.kept[:, judged:], recorded[:, judged:]),
            f"step {step}: sinks, fresh tokens or window differ from the recorded ones",
        )
    swapped = player_of(case, policy_of(case))
    heads = torch.arange(case.facts["q_heads"]).view(-1, case.facts["kv_heads"]).T.flatten()
    swapped.logits = swapped.logits[heads]
    for step in play(case, swapped):
        same_positions(case, step, swapped.kept)
        if case.at(step)["evicted"]:
            break


def sample_size(player: Player) -> int:
    """Entries of the old sample, the same number in every head."""
    return int(player.layer.slots.counters["sample"][0].unique().item())


def same_sample_size(case: Case, step: int, player: Player) -> None:
    """The sample is as large as recorded."""
    ours = sample_size(player)
    recorded = case.at(step).get("sample_size", ours)
    require(ours == recorded, f"step {step}: {ours} tokens in the sample, recorded {recorded}")
