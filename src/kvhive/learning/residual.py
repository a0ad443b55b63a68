"""Attention modules of a model: how much each changes the hidden state, seen by hooks while it
reads, and the projection of its output.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from kvhive.allocations._importance import change
from kvhive.model.facts import facts_for


@contextmanager
def layers_watched(model: PreTrainedModel) -> Iterator[dict[int, Tensor]]:
    """Meanwhile notes for every full-attention layer that is run, by its index, float64 `[]`: 1 -
    the mean cosine of the hidden state of the first row before attention and with it added.

    Raises `ValueError` for a model whose attention modules are not found.
    """
    noted: dict[int, Tensor] = {}
    entering: dict[int, Tensor] = {}
    hooks = []
    for index, block, attention in _blocks(model):

        def enter(_: nn.Module, given: Any, named: Any, index: int = index) -> None:
            entering[index] = named["hidden_states"] if "hidden_states" in named else given[0]

        def leave(_: nn.Module, given: Any, out: Any, index: int = index) -> None:
            before = entering.pop(index)[0].double()
            added = out[0] if isinstance(out, tuple) else out
            noted[index] = change(before, before + added[0].double()).cpu()

        hooks.append(block.register_forward_pre_hook(enter, with_kwargs=True))
        hooks.append(attention.register_forward_hook(leave))
    try:
        yield noted
    finally:
        for hook in hooks:
            hook.remove()


def output_projections(model: PreTrainedModel) -> dict[int, Tensor]:
    """For every full-attention layer, by its index, the weight that maps the outputs of its heads,
    one after another, to the hidden state: `[hidden state, H * e]`, without a graph.

    It is taken to be the last linear layer of the attention module. Raises `ValueError` for a model
    whose attention modules are not found, or hold none.
    """
    found = {}
    for index, _, attention in _blocks(model):
        linear = [part for part in attention.modules() if isinstance(part, nn.Linear)]
        if not linear:
            raise ValueError(
                f"{type(model).__name__}: attention of layer {index} has no linear layer, so its "
                "output projection is not known"
            )
        found[index] = linear[-1].weight.detach()
    return found


def _blocks(model: PreTrainedModel) -> list[tuple[int, nn.Module, nn.Module]]:
    """(index, the block, its attention) of every full-attention layer, by transformers' names."""
    facts = facts_for(model)
    found = {
        module.layer_idx: (model.get_submodule(name.rpartition(".")[0]), module)
        for name, module in model.named_modules()
        if "attention" in type(module).__name__.lower() and hasattr(module, "layer_idx")
    }
    if missing := set(facts.full_layers) - set(found):
        raise ValueError(
            f"{facts.family} has no attention module that says it is of layer {min(missing)}, so "
            "what its layers change cannot be seen"
        )
    return [(index, *found[index]) for index in facts.full_layers]
