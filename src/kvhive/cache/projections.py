"""Keys and values that nobody would read are not computed.

A layer that shares another's tokens drops its own keys and values. Hooks of its key and value
projections then give zeros without a product. They ask at every call: the attention module sees
which cache is in use, and marks the hidden states that it hands to its projections. So nothing is
changed for any other cache, for a model that is compiled or trained, and from one thread to
another; the hooks go with the last cache that wants them.
"""

from __future__ import annotations

import weakref
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from kvhive.cache.sharing import SharedLayer

_NAMES = ("k_proj", "v_proj")
_MARK = "_kvhive_dropped"  # of hidden states whose keys and values are dropped
_TOKENS = "_kvhive_tokens"  # of an input without tokens: how many there were


class Skipping:
    """Holds the hooks of some layers' projections; they are removed when it is gone.

    A copy of a cache holds the same ones, and a cache that was pickled none: it then computes what
    it drops, as every layer does whose projections are not two plain linear modules.
    """

    def __init__(self, handles: Collection[RemovableHandle] = ()) -> None:
        weakref.finalize(self, _remove, handles)

    def __deepcopy__(self, memo: object) -> Skipping:
        return self

    def __reduce__(self) -> tuple[type[Skipping], tuple[()]]:
        return type(self), ()


_HELD: weakref.WeakKeyDictionary[nn.Module, weakref.ref[Skipping]] = weakref.WeakKeyDictionary()


def skipping(model: PreTrainedModel, layers: Collection[int]) -> list[Skipping]:
    """Let the layers of these indices skip their projections wherever a cache shares them, for as
    long as the result is held.
    """
    return [_held(module) for module in _attention(model, layers)]


def _attention(model: PreTrainedModel, layers: Collection[int]) -> Iterator[nn.Module]:
    """The attention modules of these layers that have projections of their own for both."""
    for module in model.modules():
        if getattr(module, "layer_idx", None) in layers:
            parts = dict(module.named_children())
            if all(type(parts.get(name)) is nn.Linear for name in _NAMES):
                yield module


def _held(attention: nn.Module) -> Skipping:
    """The hooks of one layer, which several caches may want."""
    known = _HELD.get(attention)
    found = None if known is None else known()
    if found is None:
        handles = [attention.register_forward_pre_hook(_mark, with_kwargs=True)]
        for name in _NAMES:
            projection = attention.get_submodule(name)
            handles.append(projection.register_forward_pre_hook(_without_tokens))
            handles.append(projection.register_forward_hook(_zeros))
        found = Skipping(handles)
        _HELD[attention] = weakref.ref(found)
    return found


def _remove(handles: Collection[RemovableHandle]) -> None:
    for handle in handles:
        handle.remove()


# ---- hooks --------------------------------------------------------------------------------------


def _mark(attention: nn.Module, given: tuple[Any, ...], named: Mapping[str, Any]) -> None:
    """Before attention: whether the cache in use drops what this layer's projections make."""
    cache = named.get("past_key_values")
    if torch.compiler.is_compiling() or not isinstance(cache, Cache):
        return
    index: Any = attention.layer_idx
    if isinstance(cache.layers[index], SharedLayer):
        hidden = named["hidden_states"] if "hidden_states" in named else given[0]
        setattr(hidden, _MARK, True)


def _without_tokens(projection: nn.Module, given: tuple[Any, ...]) -> tuple[Tensor] | None:
    """Before a projection `[b, q, d]`: what is marked is given without its tokens, `[b, 0, d]`."""
    hidden = given[0]
    if not getattr(hidden, _MARK, False):
        return None
    nothing: Tensor = hidden[:, :0]
    setattr(nothing, _TOKENS, hidden.shape[1])
    return (nothing,)


def _zeros(projection: nn.Module, given: tuple[Any, ...], out: Tensor) -> Tensor | None:
    """After a projection: zeros in the shape that was wanted, `[b, q, e]`, in no memory."""
    tokens = getattr(given[0], _TOKENS, None)
    return None if tokens is None else out.new_zeros(1).expand(len(out), tokens, out.shape[-1])
