"""What `compare` found, as a list that shows itself as a table."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvhive.units import MIB

if TYPE_CHECKING:
    from kvhive.comparison.result import Result

# What is measured of every recipe, and in what.
COLUMNS = (
    ("tokens kept", "mean of a head"),
    ("cache", "MiB"),
    ("smaller", "times"),
    ("prefill", "seconds"),
    ("decode", "tokens/s"),
    ("KL divergence", "nats"),
    ("top-1", "agreement"),
)


def measures(result: Result) -> tuple[str, ...]:
    """The figures of one recipe, as `COLUMNS` name them; "-" for what was not measured."""
    report, fidelity = result.report, result.fidelity
    return (
        f"{report.tokens_kept:,.0f}",
        f"{report.nbytes / MIB:.1f}",
        f"{report.ratio:.2f}",
        f"{result.prefill_seconds:.2f}",
        "-" if result.decode_rate is None else f"{result.decode_rate:.1f}",
        f"{fidelity.kl:.3f}" if fidelity else "-",
        f"{fidelity.top1:.0%}" if fidelity else "-",
    )


class Results(list["Result"]):
    """A result for every recipe, the reference first; a table in notebooks and when printed."""

    def __str__(self) -> str:
        titles = ("recipe", *(f"{name} ({unit})" for name, unit in COLUMNS))
        lines = [titles, *((one.recipe, *measures(one)) for one in self)]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        return "\n".join(
            "  ".join(
                [name.ljust(widths[0]), *map(str.rjust, figures, widths[1:])],
            )
            for name, *figures in lines
        )

    def _repr_html_(self) -> str:
        from kvhive.templates import render

        return render(
            "results.html.j2",
            columns=COLUMNS,
            rows=[(one, measures(one)) for one in self],
            answers=self[0].answers if self else (),
        )
