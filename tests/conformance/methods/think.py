"""ThinK: which channels stay, what is stored, and what decoding then attends to."""

from __future__ import annotations

import torch
from torch import Tensor

from kvhive.cache.layer import HiveLayer
from kvhive.kernels import Ask, Needs
from kvhive.policies import Policy
from kvhive.policies.full import Full
from kvhive.policies.snapkv import SnapKV
from kvhive.step import Step
from kvhive.stores import Store
from kvhive.stores._thin import Thin
from kvhive.stores.think import Think, ThinkStore

from ..cases import Case
from ..playing import make_layer, require

CLOSE = 1e-5


def replay(case: Case) -> None:
    """Compare with the authors' attention, whose masks are by query head, or with kvpress."""
    if "k_zeroed" in case.tensors:
        replay_grouped(case)
    else:
        replay_by_head(case)


def replay_by_head(case: Case) -> None:
    """The prompt, evicted from where it is longer than the capacity, and the decoded tokens."""
    params, tensors = case.params, case.tensors
    group = params["heads"] // params["kv_heads"]
    queries, keys, values = (
        tensors["q"],
        *(tensors[name].repeat_interleave(group, 0) for name in "kv"),
    )
    layer, prompt = layer_of(case), params["prompt"]
    out = [feed(layer, queries, keys, values, slice(0, prompt))[:, -1]]
    order = same_state(case, layer)
    for step in range(1, params["decode_steps"] + 1):
        end = prompt + step
        store = layer.store
        out.append(feed(layer, queries, keys, values, slice(end - 1, end))[:, 0])
        rows = attention(store, queries[None, :, end - 1 : end])
        rows = torch.cat([rows.gather(1, order), rows[:, order.shape[1] :]], 1)
        close(rows, tensors[f"attn_s{step}"], f"attention of decode step {step}")
    close(torch.stack([one.flatten() for one in out]), tensors["out"], "output")


def replay_grouped(case: Case) -> None:
    """One compression of a prompt, with a mask for the query heads that share a KV head."""
    queries, keys = case.tensors["q"], case.tensors["k"]
    layer = layer_of(case)
    feed(layer, queries, keys, keys, slice(0, keys.shape[1]))
    same_mask(case, layer)
    thinned = layer.store.view()[0][0]
    close(thinned, case.tensors["k_zeroed"], "thinned keys")
    each = thinned.repeat_interleave(queries.shape[0] // keys.shape[0], 0)
    logits = (each @ queries[:, -1, :, None])[..., 0] * keys.shape[2] ** -0.5
    close(logits, case.tensors["logits"], "logits of the last query")


def layer_of(case: Case) -> HiveLayer:
    """With the recorded parameters; eviction as the repository does it, of whole prompts alone."""
    params = case.params
    policy: Policy = Full()
    budget = None
    if params["prompt"] >= params.get("token_capacity", 10**9):
        policy = SnapKV(window=params["snap_window"], kernel=5, decode="none")
        budget = params["token_capacity"]
    kind = Think(
        keep=1 - params["channel_prune_ratio"],
        recent=params["recent_size"],
        window=params["query_window"],
    )
    return make_layer(policy, budget, store=kind)


def feed(layer: HiveLayer, queries: Tensor, keys: Tensor, values: Tensor, step: slice) -> Tensor:
    """The tokens of a step; its output `[heads, q, d]`."""
    layer.update(keys[None, :, step], values[None, :, step])
    return layer.attend(queries[None, :, step], keys.shape[2] ** -0.5)[0]


def attention(store: Store, query: Tensor) -> Tensor:
    """float32 `[heads, n]`: what a query that was attended to gave the tokens held."""
    ask = Ask(Step.plain(store.length - 1, 1), query.shape[3] ** -0.5, Needs(last_rows=1))
    rows = store.report(query, ask).rows
    assert rows is not None
    return rows.all()[0, :, 0]


def same_mask(case: Case, layer: HiveLayer) -> None:
    """Every head keeps the channels recorded."""
    thin = part_of(layer)
    mask = torch.zeros_like(case.tensors["channel_keep"])
    mask.scatter_(1, thin.channels.long(), 1)
    require(torch.equal(mask, case.tensors["channel_keep"]), "channels kept are not those recorded")


def same_state(case: Case, layer: HiveLayer) -> Tensor:
    """Masks, thin and whole keys and values after the prompt are those recorded, to the bit.

    The repository leaves what an eviction keeps in the order of its scores. Returns int64
    `[heads, thin]`, the place here of every thin key there.
    """
    same_mask(case, layer)
    thin, tensors = part_of(layer), case.tensors
    order = []
    for head, recorded in enumerate(tensors["k_pruned"]):
        held = thin.held.row(head, 0, thin.longest)
        places = (recorded[:, None] == held).all(-1).long().argmax(1)
        same = len(held) == len(recorded) == len(places.unique())
        same = same and torch.equal(held[places], recorded)
        require(same, f"thin keys of head {head} are not those recorded")
        order.append(places)
    index = torch.stack(order)
    keys, values = (each[0] for each in layer.store.view())
    require(torch.equal(keys[:, index.shape[1] :], tensors["k_full_after_prompt"]), "recent keys")
    older = torch.take_along_dim(values, index[..., None], 1)
    moved = torch.cat([older, values[:, index.shape[1] :]], 1)
    require(torch.equal(moved, tensors["v_after_prompt"]), "values are not those recorded")
    return index


def part_of(layer: HiveLayer) -> Thin:
    """The thin keys of a layer."""
    assert isinstance(layer.store, ThinkStore)
    (thin,) = layer.store._keys.parts
    assert isinstance(thin, Thin)
    return thin


def close(ours: Tensor, recorded: Tensor, name: str) -> None:
    """Numbers are those recorded, within 1e-5."""
    worst = float((ours - recorded).abs().max())
    require(worst <= CLOSE, f"{name} is off by up to {worst:.2e}")
