"""KV-Compress: every event from the state recorded before it, and all of them in a row."""

from __future__ import annotations

import torch
from torch import Tensor

from kvhive.kernels import Ask, attend
from kvhive.plan import Plan
from kvhive.policies.kv_compress import KVCompress
from kvhive.slots import Slots
from kvhive.step import Step

from ..cases import Case
from ..playing import make_layers, require

TOLERANCE = 2e-6
ROUNDING = 5e-7  # of float32 sums larger than 1, relative
WITHOUT_BUDGET = 0


def replay(case: Case) -> None:
    """Compare with the fork of vLLM."""
    events = Events(case)
    for event in range(len(case.facts["events"])):
        events.check(event)
    run_through(case)


def policy_of(case: Case) -> KVCompress:
    """The recorded parameters."""
    params = case.params
    return KVCompress(
        observed=params["observed_queries"],
        protected_window=params["protected_window_size"],
        buffer=params["metric_collection_buffer"],
        norm=params["norm"].lower(),
        pool=params["maxpool_kernel"] if params["maxpool"] else 1,
        query_block=params["observed_query_block"],
        page=params["block_size"],
        rate=None if budget_of(case) else params["target_compression_rate"],
        decode="none" if params["compress_once"] else "continual",
        interval=params["compression_interval"],
    )


def budget_of(case: Case) -> int:
    """The recorded budget; 0 when a rate takes its place."""
    return max(WITHOUT_BUDGET, int(case.params["max_cache_tokens"]))


class Events:
    """Single events, each played on slots that hold what was recorded after the one before."""

    def __init__(self, case: Case) -> None:
        self.case, self.policy = case, policy_of(case)
        self.seen = self.generated = 0

    def check(self, event: int) -> None:
        """Play an event and compare."""
        kind, _, number = self.case.facts["events"][event].partition("@")
        slots = [self.before(event, layer) for layer in range(self.case.params["layers"])]
        if kind == "compress":
            self.compress(event, slots, decoding=int(number) > 0)
        else:
            self.attend(event, slots, self.case.params["prompt_len"] if kind == "prefill" else 1)
        for layer, held in enumerate(slots):
            self.same_state(event, layer, held)

    def before(self, event: int, layer: int) -> Slots:
        """A layer's slots as recorded after the previous event."""
        policy, tensors = self.policy, self.case.tensors
        heads = self.case.params["kv_heads"]
        slots = Slots(1, heads, policy.columns, policy.counters, torch.device("cpu"))
        if event == 0:
            return slots
        slots.append(Step.plain(0, self.seen), self.seen)
        slots["metric"].copy_(tensors["metrics"][event - 1, layer, :, : self.seen].nan_to_num(0.0))
        keep = torch.zeros(1, heads, self.seen, dtype=torch.bool)
        for head in range(heads):
            keep[0, head, kept(self.case, event - 1, layer, head)] = True
        compact(slots, keep)
        for counter in slots.counters.values():
            counter.fill_(self.generated)
        return slots

    def attend(self, event: int, slots: list[Slots], fresh: int) -> None:
        """A prompt or a generated token: every layer attends and counts its votes."""
        params, tensors, start = self.case.params, self.case.tensors, self.seen
        for layer, held in enumerate(slots):
            step = Step.plain(start, fresh)
            held.append(step, held.length + fresh)
            index = held.position.long().clamp_min(0)[..., None]
            keys = tensors["k"][layer][None].gather(2, index.expand(-1, -1, -1, params["head_dim"]))
            query = tensors["q"][layer][None, :, start : start + fresh]
            scale = params["head_dim"] ** -0.5
            ask = Ask(step, scale, self.policy.needs, held.valid)
            _, seen = attend(query, keys, keys, ask)
            if fresh > 1:
                assert seen.rows is not None
                votes = self.policy.votes(seen.rows.all(), held, torch.tensor([True]))[0].T
                off = float((votes - tensors["prefill_metric"][layer]).abs().max())
                where = f"event {event}, layer {layer}"
                require(off <= TOLERANCE, f"{where}: prefill_metric is off by up to {off:.2e}")
            if fresh > 1 or params["record_decoding_metrics"]:
                self.policy.observe(held, seen)
        self.seen += fresh
        self.generated = 0 if fresh > 1 else self.generated + 1

    def compress(self, event: int, slots: list[Slots], decoding: bool) -> None:
        """Pages asked for, and pages and tokens that each head gives up."""
        tensors, where = self.case.tensors, f"event {event}"
        sizing = self.policy.sizing
        limits = torch.full((len(slots), 1, slots[0].heads), sizing.peak(budget_of(self.case)))
        acts = sizing.decoding or not decoding
        excess = self.policy.excess(slots, limits, limits)
        asked = int(excess) if acts else 0
        recorded = int(tensors["evicted_blocks_requested"][event])
        require(asked == recorded, f"{where}: {asked} pages asked for, recorded {recorded}")
        keeps = self.policy.choose_all(slots, excess, decoding) if asked else None
        for layer, held in enumerate(slots):
            before = held.count[0]
            if keeps is not None:
                compact(held, keeps[layer])
            pages = pages_of(before, self.policy.page) - pages_of(held.count[0], self.policy.page)
            for name, gone in (("kv", before - held.count[0]), ("block", pages)):
                ours = gone.tolist()
                expected = tensors[f"evicted_{name}_count"][event, layer].tolist()
                require(
                    ours == expected,
                    f"{where}, layer {layer}: {name}s given up {ours}, recorded {expected}",
                )

    def same_state(self, event: int, layer: int, slots: Slots) -> None:
        """Kept tokens and metrics of each head; a tie at the cut leaves open which of equals go."""
        tensors = self.case.tensors
        for head in range(slots.heads):
            where = f"event {event}, layer {layer}, KV head {head}"
            valid = slots.valid[0, head]
            ours = slots.position[0, head][valid].long()
            expected = kept(self.case, event, layer, head)
            metric, recorded = (
                slots["metric"][0, head][valid],
                tensors["metrics"][event, layer, head],
            )
            recorded = recorded[expected]
            if tied(self.case, event, layer, head):
                metric, recorded = metric.sort().values, recorded.sort().values
            else:
                require(
                    torch.equal(ours, expected),
                    f"{where}: kept {ours.tolist()}, recorded {expected.tolist()}",
                )
            size = int(tensors["context_lens"][event, layer, head])
            require(len(ours) == size, f"{where}: {len(ours)} tokens, recorded {size}")
            off = (metric - recorded).abs()
            close = off <= TOLERANCE + ROUNDING * recorded.abs()
            require(bool(close.all()), f"{where}: metrics are off by up to {off.max():.2e}")


def run_through(case: Case) -> None:
    """Whole layers, one after the other, from prompt to end or to the first tie."""
    params, tensors, events = case.params, case.tensors, case.facts["events"]
    layers = make_layers(policy_of(case), budget_of(case) or None, params["layers"])
    start, last = 0, len(events) - 1
    if not params["record_decoding_metrics"]:
        last = 1
    for event, name in enumerate(events[: last + 1]):
        if name.startswith("compress"):
            continue
        stop = start + (params["prompt_len"] if name == "prefill" else 1)
        for index, layer in enumerate(layers):
            query, keys = (tensors[x][index][None, :, start:stop] for x in "qk")
            layer.update(keys, keys)
            layer.attend(query, params["head_dim"] ** -0.5)
        start = stop
        after = event + (event < last and events[event + 1].startswith("compress"))
        for index, layer in enumerate(layers):
            for head in range(params["kv_heads"]):
                if tied(case, after, index, head):
                    return
                ours = layer.slots.position[0, head][layer.slots.valid[0, head]].long()
                expected = kept(case, after, index, head)
                require(
                    torch.equal(ours, expected),
                    f"event {after}, layer {index}, KV head {head}, in a row: "
                    f"kept {ours.tolist()}, recorded {expected.tolist()}",
                )


def compact(slots: Slots, keep: Tensor) -> None:
    """Drop all but `keep`."""
    plan = Plan.keeping(keep)
    slots.compact(plan, plan.longest)


def kept(case: Case, event: int, layer: int, head: int) -> Tensor:
    """int64: positions a head holds after an event, ascending."""
    recorded = case.tensors["kept_sorted"][event, layer, head]
    return recorded[recorded >= 0].long()


def tied(case: Case, event: int, layer: int, head: int) -> bool:
    """Whether equal metrics at the cut leave it open which token the reference evicted."""
    return float(case.tensors["boundary_gap"][event, layer, head]) == 0.0


def pages_of(tokens: Tensor, page: int) -> Tensor:
    """Pages that so many tokens take."""
    return -(-tokens // page)
