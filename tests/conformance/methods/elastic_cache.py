"""Elastic Cache: scores, tokens kept, merged keys and values, for every layer of a recording."""

from __future__ import annotations

import torch
from torch import Tensor

from kvhive.plan import Plan
from kvhive.policies.elastic import Elastic

from ..cases import Case
from ..playing import make_layer, require

TOLERANCE = 1e-6


def replay(case: Case) -> None:
    """Compare with the corrected reference, or with what its literal form leaves true."""
    for layer in range(case.params["layers"]):
        same_scores(case, layer)
        if case.params["literal"]:
            replay_literal(case, layer)
        elif drops_at(case) == case.facts["fixed_point"]:
            follow(case, layer)
        else:
            replay_misplaced(case, layer)


class Stream:
    """One recorded layer, fed to a `HiveLayer` whose attention then is exactly the recorded one.

    Prompt key j is the j-th unit vector with the recorded key behind it, a prompt query the
    logarithms of the probabilities recorded for it with zeros behind: their product is what it
    should be.
    """

    def __init__(self, case: Case, layer: int, drop_ratio: float) -> None:
        params = case.params
        policy = Elastic(start=params["start"], distance=params["distance"], drop_ratio=drop_ratio)
        self.layer = make_layer(policy, None)
        self.case, self.index, self.prompt_length = case, layer, params["prompt"]

    def recorded(self, name: str) -> Tensor:
        """The layer's part of a tensor."""
        return self.case.tensors[name][self.index]

    def prompt(self) -> None:
        """Bring the prompt."""
        keys, attention = self.recorded("k"), self.recorded("attn")
        units = torch.eye(self.prompt_length).expand(len(keys), -1, -1)
        logits = attention.clamp_min(1e-30).log()  # 0 where causality hides the key anyway
        queries = torch.cat([logits, torch.zeros(*logits.shape[:2], keys.shape[-1])], -1)
        self._feed(torch.cat([units, keys], -1), self.recorded("v"), queries)

    def generate(self, step: int) -> None:
        """Bring a generated token."""
        keys, values = (self.recorded(name)[:, step : step + 1] for name in ("k_new", "v_new"))
        marked = torch.cat([torch.zeros(len(keys), 1, self.prompt_length), keys], -1)
        self._feed(marked, values, torch.zeros(self.case.params["heads"], 1, marked.shape[-1]))

    def _feed(self, keys: Tensor, values: Tensor, queries: Tensor) -> None:
        self.layer.update(keys[None], values[None])
        self.layer.attend(queries[None], 1.0)

    @property
    def keys(self) -> Tensor:
        """`[kv_heads, n, D]` as held, without the unit vectors."""
        return self.layer.store.view()[0][0, ..., self.prompt_length :]

    def same_kept(self, step: int) -> None:
        """All heads hold the slots recorded after so many generated tokens."""
        length = int(self.case.tensors["lengths"][step])
        expected = self.case.tensors["kept"][step, self.index, :length].tolist()
        for head, held in enumerate(self.layer.slots.position[0].tolist()):
            where = f"step {step}, layer {self.index}, KV head {head}"
            require(held == expected, f"{where}: kept {held}, recorded {expected}")

    def same_content(self, when: str, step: int) -> None:
        """Keys and values are those recorded `when`."""
        for name, ours in (("k", self.keys), ("v", self.layer.store.view()[1][0])):
            off = float((ours - self.recorded(f"{name}_{when}")).abs().max())
            where = f"step {step}, layer {self.index}"
            require(off <= TOLERANCE, f"{where}: {name}_{when} is off by up to {off:.2e}")


def stream_of(case: Case, layer: int) -> Stream:
    """A layer with the recorded parameters."""
    return Stream(case, layer, case.params["drop_ratio"])


def kept_of_prompt(case: Case) -> int:
    """Slots that the method leaves of the prompt."""
    length = case.params["prompt"]
    return length - max(0, int(length - length * (1 - case.params["drop_ratio"])))


def drops_at(case: Case) -> int | None:
    """The fixed slot by definition; None where the reference cannot follow it.

    It fails below the first `start` tokens (a negative index counts from the end), beyond the
    last slot, and where the prompt loses fewer than two tokens (it then takes slot 0, the sink).
    """
    start, distance, kept = case.params["start"], case.params["distance"], kept_of_prompt(case)
    fixed = distance if distance > 0 else kept + distance
    follows = start <= fixed < kept and case.params["prompt"] - kept > 1
    return fixed if follows else None


def same_scores(case: Case, layer: int) -> None:
    """The ranking is by the recorded importance: attention summed over queries, mean of heads."""
    stream = Stream(case, layer, drop_ratio=0.0)
    stream.prompt()
    ours = stream.layer.slots["score"][0].sum(0) / case.params["heads"]
    off = float((ours - stream.recorded("score")).abs().max())
    require(off <= 1e-5, f"step 0, layer {layer}: score is off by up to {off:.2e}")


def follow(case: Case, layer: int) -> None:
    """Everything recorded is reproduced."""
    stream = stream_of(case, layer)
    stream.prompt()
    stream.same_kept(0)
    stream.same_content("after_prompt", 0)
    generate(case, stream)


def generate(case: Case, stream: Stream) -> None:
    """Every generated token, and what is held at the end."""
    steps = case.params["decode_steps"]
    for step in range(steps):
        stream.generate(step)
        stream.same_kept(step + 1)
    stream.same_content("final", steps)


def replay_misplaced(case: Case, layer: int) -> None:
    """The fixed slot is where the reference errs: sizes, first tokens and newest token are ours."""
    stream = stream_of(case, layer)
    stream.prompt()
    for step in range(case.params["decode_steps"]):
        stream.generate(step)
        seen = case.params["prompt"] + step + 1
        held = stream.layer.slots.position[0]
        start = range(case.params["start"])
        surplus = int(held.shape[1] - seen * (1 - case.params["drop_ratio"]))
        where = f"step {step + 1}, layer {layer}"
        require(surplus < 1 or held.shape[1] <= len(start) + 2, f"{where}: {held.shape[1]} slots")
        for head in held.tolist():
            require(
                head[: len(start)] == [*start] and head[-1] == seen - 1, f"{where}: ends differ"
            )


def replay_literal(case: Case, layer: int) -> None:
    """The literal form takes positions in a sorted list for ranks, and keeps one token too few.

    So its anchors must not be reproduced: ours are the best of that many, and one more. What it
    does while generating is right, and reproduced from what it held after the prompt.
    """
    params, kept = case.params, kept_of_prompt(case)
    stream = stream_of(case, layer)
    stream.prompt()
    ours, theirs = stream.layer.slots.position[0, 0].tolist(), stream.recorded("kept_prompt")
    where = f"step 0, layer {layer}"
    require(len(ours) == kept == len(theirs) + 1, f"{where}: {len(ours)} slots, not {kept}")
    score, start = stream.recorded("score"), params["start"]
    best = score[start : params["prompt"] - 1].sort().values[-(kept - start - 1) :]
    anchors = score[ours[start:-1]].sort().values
    require(torch.allclose(anchors, best, atol=1e-5), f"{where}: ours are not the best anchors")
    if drops_at(case) is None:
        return
    literal = stream_of(case, layer)
    literal.layer.progress.frozen = 1
    literal.prompt()
    literal.layer.progress.frozen = 0
    adopt(literal, theirs.long())
    literal.layer.slots.counters["fixed"].fill_(case.facts["fixed_point"])
    require(drops_at(case) == case.facts["fixed_point"], f"{where}: the fixed slot differs")
    literal.same_content("after_prompt", 0)
    generate(case, literal)


def adopt(stream: Stream, positions: Tensor) -> None:
    """Make the layer hold what was recorded after the prompt."""
    layer = stream.layer
    keep = torch.zeros_like(layer.slots.valid)
    keep[..., positions] = True
    layer.follow(Plan.keeping(keep))
    stream.keys.copy_(stream.recorded("k_after_prompt"))
    layer.store.view()[1][0].copy_(stream.recorded("v_after_prompt"))
