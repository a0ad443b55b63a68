"""Quality against memory as an inline SVG; its text takes the page's own colours and font."""

from __future__ import annotations

import io
import re
from typing import TYPE_CHECKING

from kvhive.cache.report import MIB
from kvhive.comparison.compare import Result

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_INK, _FAINT = "#010203", "#040506"  # stand for the page's colours, put in at the end
_LABEL_GAP = 0.085  # least distance of two labels, as a share of the panel's height


def check_plots() -> None:
    """Raises `ImportError` with the command to run when matplotlib is missing."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise ImportError("the plot needs matplotlib: pip install 'kvhive[plots]'") from None


def plot(results: list[Result], colours: list[str]) -> str:
    """KL divergence and top-1 agreement over the cache's MiB; empty without a reference."""
    pairs = zip(results, colours, strict=True)
    measured = [(result, colour) for result, colour in pairs if result.fidelity is not None]
    if not measured:
        return ""
    check_plots()
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    kl = [result.fidelity.kl for result, _ in measured if result.fidelity]
    top1 = [100 * result.fidelity.top1 for result, _ in measured if result.fidelity]
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "kvhive", "font.size": 10}):
        figure = Figure(figsize=(10.4, 3.5), layout="constrained")
        left, right = figure.subplots(1, 2)
        _panel(left, measured, kl, "KL divergence from the full cache (nats), lower is better")
        _panel(right, measured, top1, "top-1 agreement with the full cache (%), higher is better")
        file = io.StringIO()
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    return _inline(file.getvalue())


def _panel(axes: Axes, measured: list[tuple[Result, str]], values: list[float], title: str) -> None:
    memory = [result.report.nbytes / MIB for result, _ in measured]
    for (result, colour), across, up in zip(measured, memory, values, strict=True):
        face = "none" if result.reference else colour
        axes.scatter([across], [up], s=52, c=face, edgecolors=colour, linewidths=1.8, zorder=3)
    low, high = min(values), max(values)
    room = (high - low) * 0.12 or 0.5
    axes.set_ylim(low - room, high + room)
    axes.set_xlim(0, max(memory) * 1.3)
    axes.set_title(title, loc="left", fontsize=10, color=_INK, pad=10)
    axes.set_xlabel("cache memory (MiB)", color=_INK)
    axes.tick_params(colors=_INK, length=0)
    axes.grid(color=_FAINT, linewidth=0.8)
    for side, spine in axes.spines.items():
        spine.set_visible(side == "bottom")
        spine.set_color(_FAINT)
    _label(axes, [result.recipe for result, _ in measured], memory, values)


def _label(axes: Axes, names: list[str], memory: list[float], values: list[float]) -> None:
    """Names to the right of their points, pushed apart where they would overlap."""
    low, high = axes.get_ylim()
    least, edge = (high - low) * _LABEL_GAP, axes.get_xlim()[1]
    placed: list[tuple[float, float]] = []
    for place in sorted(range(len(names)), key=lambda place: values[place]):
        across, up = memory[place], values[place]
        near = [other for where, other in placed if abs(where - across) < edge * 0.3]
        up = max([up, *(other + least for other in near)])
        placed.append((across, up))
        axes.annotate(
            names[place],
            (across, values[place]),
            (across + edge * 0.022, up),
            va="center",
            fontsize=9,
            color=_INK,
        )


def _inline(svg: str) -> str:
    """The `<svg>` element alone, without name spaces and metadata, in the page's colours."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r' xmlns(:\w+)?="[^"]*"', "", svg).replace("xlink:href", "href")
    svg = re.sub(r'width="[\d.]+pt" height="[\d.]+pt"', 'class="plot" role="img"', svg, count=1)
    svg = re.sub(r"font: ([\d.]+)px [^;\"]*", r"font-size: \1px", svg)
    return svg.replace(_INK, "var(--ink)").replace(_FAINT, "var(--line)")
