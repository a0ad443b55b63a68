"""The hive map: layers x heads x position, and which tokens survived."""

from __future__ import annotations

import base64

import torch
from torch import Tensor

from kvhive.comparison.survivors import Survivors
from kvhive.html.png import data_uri

_MOST_COLUMNS, _PROFILE_COLUMNS = 1600, 400
_HEIGHT = 340  # pixels, about: rows are a whole number of pixels high
_GAP = 1  # pixels between two layers
_ALT = "tokens held, layer by layer and head by head"


def hive_map(survivors: Survivors, colour: str) -> str:
    """A figure's content: a line for every KV head, a column for every token (or a few of them).

    It is coloured where the token is still held. Above it, the share of all heads that hold it.
    """
    row_height = max(1, min(12, _HEIGHT // len(survivors.rows)))
    tops, height = _tops(survivors.rows, row_height)
    density = _pool(survivors.kept.float(), _MOST_COLUMNS)
    picture = torch.zeros(height, density.shape[1])
    for line, top in zip(density, tops, strict=True):
        picture[top : top + row_height] = line
    seen = survivors.kept.shape[1]
    data = _hover_data(survivors, tops)
    return (
        f'<div class="hive" style="--c:{colour}">'
        f'<div class="gutter"><span class="top">all heads</span></div>{_profile(survivors)}'
        f'<div class="gutter" style="height:{height}px">{_layer_labels(survivors.rows, tops)}</div>'
        f'<div class="map" style="height:{height}px" data-map="{data}" data-seen="{seen}">'
        f'<img src="{data_uri(picture, colour)}" alt="{_ALT}"><i class="cross"></i></div>'
        f'<div class="gutter"><span class="low">layer</span></div>'
        f'<div class="axis">{_ticks(seen)}</div></div>'
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


def _profile(survivors: Survivors) -> str:
    """The share of heads that hold each token, as an area."""
    share = _pool((survivors.heads.float() / len(survivors.rows))[None], _PROFILE_COLUMNS)[0]
    points = " ".join(
        f"{place},{100 - 100 * value:.1f} {place + 1},{100 - 100 * value:.1f}"
        for place, value in enumerate(share.tolist())
    )
    width = len(share)
    return (
        f'<svg class="profile" viewBox="0 0 {width} 100" preserveAspectRatio="none" '
        f'aria-hidden="true"><polygon points="0,100 {points} {width},100"/></svg>'
    )


def _layer_labels(rows: tuple[tuple[int, int], ...], tops: list[int]) -> str:
    first: dict[int, int] = {}
    for (layer, _), top in zip(rows, tops, strict=True):
        first.setdefault(layer, top)
    step = next(step for step in (1, 2, 5, 10, 20, 50, 100) if len(first) <= 8 * step)
    return "".join(
        f'<span style="top:{top}px">{layer}</span>' for layer, top in list(first.items())[::step]
    )


def _ticks(seen: int) -> str:
    sizes = (size * 10**power for power in range(8) for size in (1, 2, 5))
    step = next(size for size in sizes if seen <= 8 * size)
    # A label at the very end would stick out of the picture.
    labels = "".join(
        f'<span style="left:{100 * place / seen:.2f}%">{place:,}</span>'
        for place in range(0, seen, step)
        if place <= seen * 0.97
    )
    return f"{labels}<em>position in the prompt (tokens)</em>"


def _hover_data(survivors: Survivors, tops: list[int]) -> str:
    """`layer,head,top;...|bits in base64`, a row's first token in the lowest bit of a byte."""
    rows = ";".join(
        f"{layer},{head},{top}" for (layer, head), top in zip(survivors.rows, tops, strict=True)
    )
    kept = survivors.kept.to(torch.uint8)
    padded = torch.nn.functional.pad(kept, (0, -kept.shape[1] % 8))
    weights = torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8)
    packed = (padded.view(len(padded), -1, 8) * weights).sum(-1)
    return f"{rows}|{base64.b64encode(bytes(packed.flatten().tolist())).decode('ascii')}"
