"""The hive map: layers x heads x position, and which tokens survived."""

from __future__ import annotations

import base64
from dataclasses import dataclass

import torch
from torch import Tensor

from kvhive.comparison.survivors import Survivors
from kvhive.html.png import data_uri

_MOST_COLUMNS, _PROFILE_COLUMNS = 1600, 400
_HEIGHT = 340  # pixels, about: rows are a whole number of pixels high
_GAP = 1  # pixels between two layers


@dataclass(frozen=True)
class HiveMap:
    """What `hive.html.j2` draws, in pixels.

    picture: a data URI of a line for every KV head and a column for every token, or for a few of
    them. height: the picture's. profile: the share of all heads that hold a token, as a polygon of
    `profile_width` by 100. layers: (top, number). ticks: (place in percent, text). data: rows and
    bits for the script.
    """

    picture: str
    height: int
    profile: str
    profile_width: int
    layers: list[tuple[int, int]]
    ticks: list[tuple[float, str]]
    seen: int
    data: str
    summary: str

    @classmethod
    def of(cls, survivors: Survivors, colour: str) -> HiveMap:
        """Coloured where a token is still held. colour: "#rrggbb"."""
        row_height = max(1, min(12, _HEIGHT // len(survivors.rows)))
        tops, height = _tops(survivors.rows, row_height)
        density = _pool(survivors.kept.float(), _MOST_COLUMNS)
        picture = torch.zeros(height, density.shape[1])
        for line, top in zip(density, tops, strict=True):
            picture[top : top + row_height] = line
        share = (survivors.heads.float() / len(survivors.rows))[None]
        profile = _pool(share, _PROFILE_COLUMNS)[0].tolist()
        seen = survivors.kept.shape[1]
        return cls(
            picture=data_uri(picture, colour),
            height=height,
            profile=_polygon(profile),
            profile_width=len(profile),
            layers=_layers(survivors.rows, tops),
            ticks=_ticks(seen),
            seen=seen,
            data=_data(survivors, tops),
            summary=summary(survivors),
        )


def summary(survivors: Survivors) -> str:
    """How the heads differ in what they hold, in one sentence."""
    heads, count = survivors.heads, len(survivors.rows)
    everywhere = float((heads == count).double().mean())
    somewhere = float((heads > 0).double().mean())
    return (
        f"{somewhere:.0%} of the tokens are still held by some head, "
        f"{everywhere:.0%} by all {count} heads"
    )


def _tops(rows: tuple[tuple[int, int], ...], row_height: int) -> tuple[list[int], int]:
    """The first pixel line of every row, and the height of all."""
    tops, top = [], 0
    for place, (layer, _) in enumerate(rows):
        if place and layer != rows[place - 1][0]:
            top += _GAP
        tops.append(top)
        top += row_height
    return tops, top


def _pool(share: Tensor, columns: int) -> Tensor:
    """Mean over neighbouring tokens, float `[rows, seen]` -> `[rows, at most columns]`."""
    if share.shape[1] <= columns:
        return share
    return torch.nn.functional.adaptive_avg_pool1d(share[None], columns)[0]


def _polygon(shares: list[float]) -> str:
    """An area of steps, one unit wide each, 100 high for a share of 1."""
    steps = (f"{x},{100 - 100 * y:.1f} {x + 1},{100 - 100 * y:.1f}" for x, y in enumerate(shares))
    return f"0,100 {' '.join(steps)} {len(shares)},100"


def _layers(rows: tuple[tuple[int, int], ...], tops: list[int]) -> list[tuple[int, int]]:
    """(top, layer) of at most eight layers."""
    first: dict[int, int] = {}
    for (layer, _), top in zip(rows, tops, strict=True):
        first.setdefault(layer, top)
    step = next(step for step in (1, 2, 5, 10, 20, 50, 100) if len(first) <= 8 * step)
    return [(top, layer) for layer, top in first.items()][::step]


def _ticks(seen: int) -> list[tuple[float, str]]:
    """Percent and number of at most five round positions."""
    sizes = (size * 10**power for power in range(8) for size in (1, 2, 5))
    step = next(size for size in sizes if seen <= 5 * size)
    # A label at the very end would stick out of the picture.
    return [
        (round(100 * place / seen, 2), f"{place:,}")
        for place in range(0, seen, step)
        if place <= seen * 0.92
    ]


def _data(survivors: Survivors, tops: list[int]) -> str:
    """`layer,head,top;...|bits in base64`, a row's first token in the lowest bit of a byte."""
    rows = ";".join(
        f"{layer},{head},{top}" for (layer, head), top in zip(survivors.rows, tops, strict=True)
    )
    kept = survivors.kept.to(torch.uint8)
    padded = torch.nn.functional.pad(kept, (0, -kept.shape[1] % 8))
    weights = torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8)
    packed = (padded.view(len(padded), -1, 8) * weights).sum(-1)
    return f"{rows}|{base64.b64encode(bytes(packed.flatten().tolist())).decode('ascii')}"
