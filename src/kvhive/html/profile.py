"""The page of `kvhive profile`: what was learnt about a model, layer by layer."""

from __future__ import annotations

from collections.abc import Sequence

from kvhive.calibration import Profile
from kvhive.html.heat import HeatCell
from kvhive.learning import Picture
from kvhive.templates import render


def profile_page(
    profile: Profile, pictures: Sequence[Picture], name: str, use: str, command: str
) -> str:
    """A self-contained page. name: of the file. use: a recipe that reads it. command: what made the
    page. All plain text.
    """
    return render(
        "profile.html.j2",
        kind="profile",
        heading=name,
        facts=[profile.method, f"learnt on {profile.date}"],
        command=command,
        profile=profile,
        use=use,
        pictures=[(picture, _rows(picture)) for picture in pictures],
    )


def _rows(picture: Picture) -> list[tuple[int, list[HeatCell]]]:
    """The number of every layer, and its cells."""
    rows = zip(picture.texts(), picture.shades(), strict=True)
    return [
        (layer, [HeatCell.of(*cell) for cell in zip(*row, strict=True)])
        for layer, row in enumerate(rows)
    ]
