"""BaKlaVa: what heads and layers are worth, and three plans."""

from __future__ import annotations

import torch
from torch import Tensor

from kvhive.allocations._importance import (
    best,
    change,
    combined,
    of_kv_heads,
    proportional,
    search,
    tiers,
)

from ..cases import Case
from ..playing import require


def replay(case: Case) -> None:
    """Compare with the recorded importances, and each plan with the recorded one."""
    params, tensors = case.params, case.tensors
    heads = change(tensors["head_in"], tensors["head_out"])
    kv = of_kv_heads(heads, params["kv_heads"], params["group"]).mean(0)
    layer = change(tensors["x_in"], tensors["x_out"]).mean(0)
    importance = combined(kv, layer if params["use_layer"] else None)
    same_importance(case, "kv_importance", kv)
    same_importance(case, "layer_importance", layer)
    same_importance(case, "combined", importance)

    total = int(params["avg"] * importance.numel())
    bounds = total, params["floor"], params["cap"]
    same_plan(case, "budget_proportional", proportional(importance, *bounds))
    own = params["low_frac"], params["low_scale"]
    same_plan(case, "budget_tiers", tiers(importance, *bounds, *own))

    def loss(part: float, scale: float) -> float:
        """The recording's stand-in for perplexity."""
        tokens = tiers(importance, *bounds, part, scale).double() / params["avg"]
        return float((importance * (-tokens).exp()).sum() + 0.01 * (tokens.max() - 2).abs())

    grid = params["search_fracs"], params["search_scales"]
    choice = best(search(*grid, loss), *grid)
    recorded = tensors["search_choice"].tolist()
    require(
        torch.allclose(torch.tensor(choice), tensors["search_choice"]),
        f"the search chose {choice}, recorded {recorded}",
    )
    same_plan(case, "budget_searched", tiers(importance, *bounds, *choice))


def same_importance(case: Case, name: str, ours: Tensor) -> None:
    """Within 1e-5 relative."""
    recorded = case.tensors[name].double()
    off = ((ours - recorded).abs() / recorded.abs()).max()
    require(float(off) <= 1e-5, f"{name} is off by up to {float(off):.2e}")


def same_plan(case: Case, name: str, ours: Tensor) -> None:
    """Token by token."""
    recorded = case.tensors[name].long()
    require(torch.equal(ours, recorded), f"{name}: {ours.tolist()}, recorded {recorded.tolist()}")
