"""torch's modes around a step: what is kept must be plain tensors, whichever are in force."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, TypeVar

import torch
from torch import Tensor

Method = TypeVar("Method", bound=Callable[..., Any])


def plain(method: Method) -> Method:
    """Run a layer's method without gradients, outside inference mode and autocast.

    Tensors made in inference mode could not be written to in a later step without it, and autocast
    would round float32 logits to 16 bits.
    """

    @functools.wraps(method)
    def run(self: Any, *arguments: Any, **named: Any) -> Any:
        inference, kind = torch.is_inference_mode_enabled(), self.device.type
        autocast = torch.is_autocast_enabled(kind)
        if not (inference or autocast or torch.is_grad_enabled()):
            return method(self, *arguments, **named)
        with ExitStack() as modes:
            if inference:
                modes.enter_context(torch.inference_mode(False))
            if autocast:
                modes.enter_context(torch.autocast(kind, enabled=False))
            modes.enter_context(torch.no_grad())
            return method(self, *arguments, **named)

    return run  # type: ignore[return-value]


class _NoGradient(torch.autograd.Function):
    """Passes an output through, and refuses to differentiate it."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, *inputs: Tensor) -> Tensor:
        """The output as it is."""
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        """Never."""
        raise ValueError(
            "no gradient flows through a HiveCache: it forgets tokens and keeps no graph; train "
            "without a cache (use_cache=False), or with transformers' own"
        )


def without_gradient(output: Tensor, *inputs: Tensor) -> Tensor:
    """The output, which raises `ValueError` as soon as a gradient by `inputs` is asked for."""
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in inputs):
        refused: Tensor = _NoGradient.apply(output, *inputs)  # type: ignore[no-untyped-call]
        return refused
    return output
