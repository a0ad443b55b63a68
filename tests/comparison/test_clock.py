"""Times are read when the device has done its work, before and after what is measured."""

from __future__ import annotations

import time

import pytest
import torch

from kvhive.comparison import run as running
from kvhive.comparison.clock import seconds_when_done
from kvhive.comparison.compare import compare
from tests.cli.tiny import model, text, tokenizer


@pytest.fixture
def events(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What happened in which order: a device waited for, a clock read."""
    happened: list[str] = []

    def synchronize(device: torch.device) -> None:
        happened.append(f"wait for {device}")

    def perf_counter() -> float:
        happened.append("read the clock")
        return float(len(happened))

    monkeypatch.setattr(torch.accelerator, "synchronize", synchronize)
    monkeypatch.setattr(time, "perf_counter", perf_counter)
    return happened


@pytest.mark.parametrize("name", ["cuda:1", "mps", "xpu:0"])
def test_a_device_is_waited_for_first(events: list[str], name: str) -> None:
    assert seconds_when_done(torch.device(name)) == 2
    assert events == [f"wait for {name}", "read the clock"]


def test_on_a_cpu_there_is_nothing_to_wait_for(events: list[str]) -> None:
    seconds_when_done(torch.device("cpu"))
    assert events == ["read the clock"]


def test_both_ends_of_a_prefill_wait(events: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison of a model on a device: on either side of reading, wait, then look."""
    read = running.read

    def noted_read(*given: object) -> torch.Tensor:
        events.append("begin to read")
        logits = read(*given)
        events.append("end")
        return logits

    fake = torch.device("cuda:0")
    monkeypatch.setattr(running, "read", noted_read)
    monkeypatch.setattr(running, "seconds_when_done", lambda device: seconds_when_done(fake))
    results = compare(model(), tokenizer(), text(30), ["Who?"], [], max_new_tokens=2)
    first = events.index("read the clock")
    assert events[first - 1 : first + 5] == [
        "wait for cuda:0",
        "read the clock",
        "begin to read",
        "end",
        "wait for cuda:0",
        "read the clock",
    ]
    assert results[0].prefill_seconds == 4  # events between the two readings
    reads = [place for place, event in enumerate(events) if event == "read the clock"]
    assert all(events[place - 1] == "wait for cuda:0" for place in reads)
