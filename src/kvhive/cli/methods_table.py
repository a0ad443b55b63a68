"""The table of methods as Markdown, for the README: `kvhive recipes --markdown`."""

from __future__ import annotations

from kvhive.cli.needs import needs_text
from kvhive.policies import POLICIES, Policy


def methods_table() -> str:
    """One row a policy: card, source, what it keeps, knobs, needs, positions, cost."""
    lines = [
        "| policy | source | keeps | knobs (default) | needs | positions | cost |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    lines += [_row(name, POLICIES[name]) for name in sorted(POLICIES)]
    return "\n".join(lines) + "\n"


def _row(name: str, policy: type[Policy]) -> str:
    knobs = ", ".join(f"`{knob.name}`={knob.spell(knob.default)}" for knob in policy.knobs()) or "-"
    source = policy.source.split(",")[0].strip()
    if source.startswith("arXiv:"):
        source = f"[{source}](https://arxiv.org/abs/{source.removeprefix('arXiv:')})"
    keeps = " ".join((policy.__doc__ or "").split()).split(". ")[0].removesuffix(".")
    cells = [
        f"[`{name}`](docs/methods/{name}.md)",
        source,
        keeps,
        knobs,
        needs_text(policy().needs),
        policy.positions,
        policy.cost,
    ]
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
