"""The page of all methods as Markdown, docs/methods.md: `kvhive recipes --markdown`."""

from __future__ import annotations

import inspect

from kvhive.allocations import ALLOCATIONS
from kvhive.cli.needs import needs_text
from kvhive.named import NAMED
from kvhive.policies import POLICIES, Policy
from kvhive.spec import Spec
from kvhive.stores import STORES

_HEAD = """\
# Methods

<!-- Written by `make docs` from the registries: change the docstrings, not this page. -->

Every method has a card with the exact rule, where paper and released code differ,
and which we follow. `kvhive recipes NAME` tells what its knobs mean, [choosing.md](choosing.md)
which to take.
"""


def methods_page() -> str:
    """The whole page; links are relative to docs/."""
    sections = [
        _HEAD,
        "## Recipes with a name\n",
        _named(),
        "## Policies: which tokens survive\n",
        _policies(),
        "## Allocations: how many, for each layer and KV head\n",
        _allocations(),
        "## Stores: how they are held\n",
        _stores(),
    ]
    return "\n".join(sections)


def _named() -> str:
    rows = [[f"`{name}`", f"`{one.recipe}`", one.promise] for name, one in NAMED.items()]
    return _table(("name", "stands for", "promise"), rows)


def _policies() -> str:
    columns = ("policy", "source", "keeps", "knobs (default)", "needs", "positions", "cost")
    return _table(columns, [_policy(name, POLICIES[name]) for name in sorted(POLICIES)])


def _policy(name: str, policy: type[Policy]) -> list[str]:
    return [
        _card(name),
        _source(policy.source),
        _first_sentence(policy),
        _knobs(policy),
        needs_text(policy().needs),
        policy.positions,
        policy.cost,
    ]


def _allocations() -> str:
    rows = [
        [_card(name), _source(member.source) or "-", _first_sentence(member), _knobs(member)]
        for name, member in sorted(ALLOCATIONS.items())
    ]
    return _table(("allocation", "source", "does", "knobs (default)"), rows)


def _stores() -> str:
    rows = [
        [_card(name), _first_sentence(member), _knobs(member)]
        for name, member in sorted(STORES.items())
    ]
    return _table(("store", "does", "knobs (default)"), rows)


def _card(name: str) -> str:
    return f"[`{name}`](methods/{name}.md)"


def _source(text: str) -> str:
    """The first one, as a link where it is a number of arXiv."""
    first = text.split(",")[0].strip()
    if first.startswith("arXiv:"):
        return f"[{first}](https://arxiv.org/abs/{first.removeprefix('arXiv:')})"
    return first


def _knobs(member: type[Spec]) -> str:
    return ", ".join(f"`{knob.name}`={knob.spell(knob.default)}" for knob in member.knobs()) or "-"


def _first_sentence(member: type[Spec]) -> str:
    return " ".join((inspect.getdoc(member) or "").split()).split(". ")[0].removesuffix(".")


def _table(columns: tuple[str, ...], rows: list[list[str]]) -> str:
    lines = [list(columns), ["---"] * len(columns), *rows]
    cells = ([cell.replace("|", "\\|") for cell in line] for line in lines)
    return "".join(f"| {' | '.join(line)} |\n" for line in cells)
