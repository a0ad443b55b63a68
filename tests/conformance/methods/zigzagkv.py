"""ZigZagKV: attention -> what each layer needs -> budgets -> which tokens each layer keeps."""

from __future__ import annotations

import torch
from torch import Tensor

from kvhive.allocations.zigzag import ZigZag, past_budgets, raw_budgets
from kvhive.calibration import Profile
from kvhive.learning.zigzag import mba, window_attention
from kvhive.policies.snapkv import SnapKV

from ..cases import Case
from ..playing import feed, make_layers, require, same_heads


def replay(case: Case) -> None:
    """Compare with the oracle: a table of budgets, or a prompt through all layers."""
    if "config" in case.tensors:
        replay_table(case)
    else:
        replay_layers(case)


def replay_table(case: Case) -> None:
    """Whole budgets of given needs."""
    rows = (case.tensors[name] for name in ("lmba", "config", "budget"))
    for row, (lmba, config, recorded) in enumerate(zip(*rows, strict=True)):
        real = lmba >= 0
        mean, bound, most = config.double().tolist()
        ours = past_budgets(lmba[real], round(mean, 4), round(bound, 4), int(most), least=0)
        require(
            ours.tolist() == recorded[real].tolist(),
            f"row {row}: budgets {ours.tolist()}, recorded {recorded[real].tolist()}",
        )


def replay_layers(case: Case) -> None:
    """Queries and keys of a prompt, from the attention to what is kept."""
    params, tensors = case.params, case.tensors
    window, count, past = params["window"], params["layers"], params["n"] - params["window"]
    scale = tensors["k"].shape[-1] ** -0.5
    attention = torch.stack(
        [
            window_attention(query, key, window, scale)
            for query, key in zip(tensors["q"], tensors["k"], strict=True)
        ]
    )
    close(attention, tensors["window_attention"], "window_attention")
    needs = mba(attention, params["tau"]).double()
    close(needs.mean(-1), tensors["lmba"], "lmba")
    mean, bound = params["budget"] - window, params["bound_ratio"]
    close(raw_budgets(needs.mean(-1), mean, bound), tensors["raw_budget"], "raw_budget")

    told = {"tau": torch.tensor([params["tau"]], dtype=torch.float64)}
    profile = Profile("zigzag", "", "", "", told | {"share": needs[None] / past})
    policy = SnapKV(window=window, kernel=params["kernel"], pooling=params["pool"])
    layers = make_layers(
        policy,
        params["budget"],
        count,
        allocation=ZigZag(tau=params["tau"], bound=bound),
        profile=profile,
    )
    for index, layer in enumerate(layers):
        position = feed(layer, tensors["k"][index][None], tensors["q"][index][None])[0]
        kept, recorded = position.shape[-1] - window, int(tensors["past_budget"][index])
        require(kept == recorded, f"layer {index}: {kept} past tokens kept, recorded {recorded}")
        same_heads(position, tensors["kept_sorted"][index], f"layer {index}")


def close(ours: Tensor, recorded: Tensor, name: str) -> None:
    """Within 1e-5, relative."""
    require(
        torch.allclose(ours.double(), recorded.double(), rtol=1e-5, atol=1e-7),
        f"{name}: {ours.tolist()}, recorded {recorded.tolist()}",
    )
