"""LESS: which pairs are read exactly, and what they and the state give, in both forms."""

from __future__ import annotations

import torch
from torch import Tensor

from kvhive.allocations.uniform import Uniform
from kvhive.budget import Budget
from kvhive.cache.layer import HiveLayer
from kvhive.cache.limits import Limits
from kvhive.cache.progress import Progress
from kvhive.calibration import Profile
from kvhive.kernels import low_rank_reference
from kvhive.kernels.low_rank import FeatureMaps
from kvhive.policies import Policy
from kvhive.policies.h2o import H2O
from kvhive.policies.streaming_llm import StreamingLLM
from kvhive.stores.less import Less, LessStore

from ..cases import Case
from ..playing import require

NAMES = {
    "query_in": "kernel_q_mat1",
    "query_out": "kernel_q_mat2",
    "key_in": "kernel_k_mat1",
    "key_out": "kernel_k_mat2",
    "key_mix": "interaction_k",
    "key_gain": "scalingD",
    "mix_gain": "scalingD2",
}


def replay(case: Case) -> None:
    """Compare with the authors' training or decoding module."""
    if "sparse_mask" in case.tensors:
        replay_parallel(case)
    else:
        replay_decoding(case)


def replay_parallel(case: Case) -> None:
    """A token at a time through a layer gives the masks; the pair-wise form gives the outputs."""
    queries, keys, values = (case.tensors[name][None] for name in "qkv")
    n, scale = keys.shape[2], keys.shape[3] ** -0.5
    layer, stepwise = layer_of(case), []
    exact = torch.zeros(1, *keys.shape[1:3], n, dtype=torch.bool)
    for step in range(n):
        for head, held in enumerate(layer.slots.position[0] if step else []):
            exact[0, head, step, held.long()] = True
        exact[0, :, step, step] = True
        stepwise.append(feed(layer, case, step, step + 1))
    folded = torch.ones(n, n, dtype=torch.bool).tril() & ~exact
    same_mask(exact[0], case.tensors["sparse_mask"].bool(), "sparse_mask")
    same_mask(folded[0], case.tensors["lowrank_mask"].bool(), "lowrank_mask")
    maps = maps_of(case)
    ours = low_rank_reference.attend(queries, keys, values, maps, exact, folded, scale)
    close(flat(ours), case.tensors["pred"], "pred", atol=1e-4)
    close(flat(torch.cat(stepwise, 2)), case.tensors["pred"], "pred, token by token", atol=1e-3)
    everything = torch.ones_like(exact).tril()
    whole = low_rank_reference.attend(
        queries, keys, values, maps, everything, torch.zeros_like(exact), scale
    )
    close(flat(whole), case.tensors["target"], "target", atol=1e-4)


def replay_decoding(case: Case) -> None:
    """A prompt and then tokens one by one: what is kept, the state, and the output."""
    prompt, steps = case.params["prompt"], case.params["decode_steps"]
    layer = layer_of(case)
    for step in range(steps + 1):
        start = 0 if step == 0 else prompt + step - 1
        out = feed(layer, case, start, prompt + step)
        close(flat(out)[-1], case.tensors["out"][step], f"step {step}: out")
        store = layer.store
        assert isinstance(store, LessStore)
        assert store.state is not None
        close(store.state.values[0], case.tensors["H"][step], f"step {step}: H")
        close(store.state.total[0], case.tensors["z"][step], f"step {step}: z")
        kept = torch.zeros_like(case.tensors["kept"][step]).bool()
        for head, held in enumerate(layer.slots.position[0]):
            kept[head, held.long()] = True
        if prompt + step < kept.shape[1]:
            kept[:, prompt + step] = True  # what comes next is seen by itself
        same_mask(kept, case.tensors["kept"][step].bool(), f"step {step}: kept")


def layer_of(case: Case) -> HiveLayer:
    """One layer with the recorded kernels, which frees no more than it must."""
    heavy, recent = case.params["heavy"], case.params["recent"]
    policies: dict[str, Policy] = {
        "h2o": H2O(recent=recent),
        "first+recent": StreamingLLM(sink=heavy),
    }
    policy = policies[case.params["policy"]]
    tensors = {name: weight[None] for name, weight in weights_of(case).items()}
    tensors["reach"] = torch.tensor([1000])
    profile = Profile("less", "", "", "", tensors)
    progress = Progress(1, Limits([policy], Budget(tokens=heavy + recent), Uniform(), 0))
    kind, layers = Less(rank=case.params["rank"]), list[HiveLayer]()
    layers.append(HiveLayer(policy, kind, progress, 0, layers, profile=profile))
    return layers[0]


def feed(layer: HiveLayer, case: Case, start: int, stop: int) -> Tensor:
    """What tokens start..stop-1 get, `[1, H, stop - start, D]`."""
    query, key, value = (case.tensors[name][None, :, start:stop] for name in "qkv")
    layer.update(key, value)
    return layer.attend(query, key.shape[3] ** -0.5)


def weights_of(case: Case) -> dict[str, Tensor]:
    """The recorded kernels by our names."""
    found = {ours: case.tensors[theirs] for ours, theirs in NAMES.items()}
    gains = {name: found[name][0, :, 0] for name in ("key_gain", "mix_gain")}
    return found | gains


def maps_of(case: Case) -> FeatureMaps:
    """The recorded kernels."""
    return FeatureMaps(**weights_of(case))


def flat(out: Tensor) -> Tensor:
    """`[1, H, q, D]` as recorded, `[q, H * D]`."""
    return out[0].transpose(0, 1).flatten(1)


def same_mask(ours: Tensor, recorded: Tensor, where: str) -> None:
    """Every pair."""
    require(torch.equal(ours, recorded), f"{where}: {int((ours ^ recorded).sum())} pairs differ")


def close(
    ours: Tensor, recorded: Tensor, where: str, rtol: float = 1e-4, atol: float = 1e-5
) -> None:
    """Within the tolerance that was recorded."""
    worst = float((ours - recorded).abs().max())
    require(
        torch.allclose(ours, recorded, rtol=rtol, atol=atol), f"{where} is off by up to {worst:.2e}"
    )
