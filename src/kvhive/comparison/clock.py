"""Times of work that a device may still be doing when the call that queued it has returned."""

from __future__ import annotations

import time

import torch


def seconds_when_done(device: torch.device) -> float:
    """A clock's reading in seconds, once all work queued on `device` is done.

    On the CPU a call returns when its work is done: there is nothing to wait for.
    """
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return time.perf_counter()
