"""TOVA: kept tokens after every step, and after a prompt as kvpress compresses it."""

from __future__ import annotations

from kvhive.policies.tova import Tova

from ..cases import Case
from ..playing import Player, make_layer, play, require, same_heads, same_positions


def replay(case: Case) -> None:
    """Compare with `TOVACache`, or with `TOVAPress`, which never drops the newest token."""
    if "compression_ratio" in case.params:
        replay_press(case)
        return
    player = Player.of(case, make_layer(Tova(), case.params["budget"]))
    for step in play(case, player):
        same_positions(case, step, player.kept)
        newest = bool((player.kept == player.layer.get_seq_length() - 1).any(-1).all())
        recorded = case.at(step).get("newest_kept", newest)
        require(newest == recorded, f"step {step}: newest token kept: {newest}, not {recorded}")


def replay_press(case: Case) -> None:
    """One compression of every row of a batch."""
    facts, kept = case.facts, case.params["kept"]
    rule = int(facts["n"] * (1 - case.params["compression_ratio"]))
    require(kept == rule, f"step 0: {kept} tokens recorded, but the ratio asks for {rule}")
    for row in range(facts["batch"]):
        layer = make_layer(Tova(protect_last=True), kept)
        logits = case.tensors[f"logits.{row}"]
        player = Player(layer, facts["kv_heads"], facts["n"], logits)
        player.advance(facts["n"])
        same_heads(player.kept, case.tensors["kept"][row], f"step 0, row {row}")
