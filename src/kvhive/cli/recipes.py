"""`kvhive recipes`: every method with its knobs, from the registries alone."""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich import box
from rich.console import Console, Group
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from kvhive.cli.console import Json, Plugin, Quiet, out
from kvhive.cli.needs import needs_text
from kvhive.named import NAMED

_WIDE = 120  # characters: narrower columns of sentences are hard to read
_EXAMPLES = (
    ("buzz@0.4", "40 % of the tokens seen"),
    ("h2o(recent=64)@1024", "1,024 tokens for every KV head, 64 of them the most recent"),
    ("streaming_llm@0.4/uniform+dense", "an allocation and a store named as well"),
)

if TYPE_CHECKING:
    from kvhive.policies import Policy
    from kvhive.registry import Registry
    from kvhive.spec import Spec


def register(app: typer.Typer) -> None:
    """Add the command to `app`."""
    app.command()(recipes)


def recipes(
    name: Annotated[
        str | None, typer.Argument(metavar="[NAME]", help="One method, with its knobs.")
    ] = None,
    markdown: Annotated[bool, typer.Option("--markdown", help="The page docs/methods.md.")] = False,
    plugin: Plugin = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """List all methods, or one with its knobs, defaults and source.

    [dim]$[/dim] kvhive recipes

    [dim]$[/dim] kvhive recipes buzz
    """
    from kvhive.allocations import ALLOCATIONS
    from kvhive.plugins import load_plugins
    from kvhive.policies import POLICIES
    from kvhive.stores import STORES

    load_plugins(plugin or ())
    if markdown:
        from kvhive.cli.methods_table import methods_page

        typer.echo(methods_page(), nl=False)
        return
    if as_json:
        registries: dict[str, Registry[Any]] = {
            "policies": POLICIES,
            "allocations": ALLOCATIONS,
            "stores": STORES,
        }
        print(json.dumps(as_data(registries, name), indent=2, ensure_ascii=False))
        return
    console = out()
    parts: list[tuple[str, Registry[Any]]] = [
        ("allocation", ALLOCATIONS),
        ("store", STORES),
    ]
    if name is None:
        _print_all(console, POLICIES, parts)
        return
    for kind, registry in parts:
        if name in registry:
            console.print(Group(_heading(name, kind), _about(registry[name])))
            console.print(_knob_table(registry[name]))
            return
    if name in NAMED:
        console.print(Group(_heading(name, "recipe"), Text(NAMED[name].promise)))
        console.print(_pairs([(name, NAMED[name].recipe)]))
        return
    policy = POLICIES[name]
    console.print(Group(_heading(name, "policy"), _about(policy), _facts(policy)))
    console.print(_knob_table(policy))


def as_data(registries: Mapping[str, Registry[Any]], name: str | None) -> dict[str, Any]:
    """The methods, or the one of that name, as plain values, for JSON."""
    if name is not None and not any(name in registry for registry in registries.values()):
        return as_data({"policies": registries["policies"]}, registries["policies"][name].name)
    return {
        kind: {
            one: {
                "about": _first_sentence(member),
                "source": getattr(member, "source", None),
                "knobs": {
                    knob.name: {"default": knob.default, "meaning": knob.meaning}
                    for knob in member.knobs()
                },
            }
            for one, member in registry.items()
            if name in (None, one)
        }
        for kind, registry in registries.items()
    }


def _print_all(
    console: Console, policies: Registry[Policy], parts: list[tuple[str, Registry[Any]]]
) -> None:
    console.print(Text("policy @ budget / allocation + store", style="bold yellow"))
    console.print("A recipe says which tokens survive, how many, and how they are held:")
    console.print(_pairs(_EXAMPLES))
    console.print("Some have a name, chosen by measurement:")
    console.print(_pairs([(name, f"{one.promise}: {one.recipe}") for name, one in NAMED.items()]))
    listed = _policy_table if console.width >= _WIDE else _policy_list
    console.print(listed(policies))
    for kind, registry in parts:
        table = _table(f"{kind}s", kind, "does")
        for name, member in registry.items():
            table.add_row(Text(name, style="bold"), Text(_first_sentence(member)))
        console.print(table)
    console.print(Text("kvhive recipes NAME shows one with its knobs", style="dim"))


def _policy_table(policies: Registry[Policy]) -> Table:
    """A line for every policy."""
    table = _table("policies", "policy", "keeps", "needs", "positions", "source")
    table.columns[-1].no_wrap = True
    for name, policy in policies.items():
        table.add_row(
            Text(name, style="bold"),
            Text(_first_sentence(policy)),
            needs_text(policy().needs),
            policy.positions,
            _first_source(policy),
        )
    return table


def _policy_list(policies: Registry[Policy]) -> Group:
    """A paragraph for every policy, where a terminal is too narrow for columns."""
    parts: list[Any] = [Text("policies", style="dim")]
    for name, policy in policies.items():
        needs = f"needs {needs_text(policy().needs)}; {policy.positions} positions"
        about = Text(f"{_first_sentence(policy)}\n").append(needs, style="dim")
        parts.append(Text.assemble((name, "bold"), (f"  {_first_source(policy)}", "dim")))
        parts.append(Padding(about, (0, 0, 1, 2)))
    return Group(*parts)


def _heading(name: str, kind: str) -> Text:
    return Text.assemble((name, "bold yellow"), (f"  {kind}", "dim"))


def _about(member: type[Any]) -> Padding:
    """The whole docstring, paragraphs kept and their lines joined."""
    paragraphs = (inspect.getdoc(member) or "").split("\n\n")
    text = "\n\n".join(" ".join(paragraph.split()) for paragraph in paragraphs)
    return Padding(Text(text.replace("`", "")), (1, 0, 1, 2))


def _facts(policy: type[Policy]) -> Padding:
    default = policy()
    sizing = default.sizing
    rotary = {"original": "as first written", "cache": "counted inside the cache"}
    return _pairs(
        (
            ("source", policy.source),
            ("needs from attention", needs_text(default.needs)),
            ("cost", policy.cost),
            ("positions", rotary[policy.positions]),
            ("budget", "yes" if sizing.budgeted else "sizes itself"),
            ("least budget", f"{sizing.least} tokens" if sizing.budgeted else "-"),
        )
    )


def _pairs(pairs: Iterable[tuple[str, str]]) -> Padding:
    """A quiet word and what it stands for, line by line."""
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim", no_wrap=True)
    table.add_column()
    for label, value in pairs:
        table.add_row(Text(label), Text(value))
    return Padding(table, (0, 0, 1, 2))


def _knob_table(member: type[Spec]) -> Table | Text:
    if not member.knobs():
        return Text("  no knobs", style="dim")
    table = _table("knobs", "knob", "default", "meaning")
    for knob in member.knobs():
        default = Text(knob.spell(knob.default))
        table.add_row(Text(knob.name, style="bold"), default, Text(knob.meaning))
    return table


def _table(title: str, *columns: str) -> Table:
    table = Table(
        title=Text(title, style="dim"),
        title_justify="left",
        box=box.SIMPLE_HEAD,
        show_edge=False,
        pad_edge=False,
        header_style="bold",
    )
    for place, column in enumerate(columns):
        table.add_column(column, no_wrap=place == 0, overflow="fold")
    return table


def _first_sentence(member: type[Any]) -> str:
    """What the docstring says first, whole."""
    text = " ".join((inspect.getdoc(member) or "").partition("\n\n")[0].split())
    return text.partition(". ")[0].removesuffix(".").replace("`", "") + "."


def _first_source(policy: type[Policy]) -> str:
    """The paper's number, without what follows it."""
    return policy.source.partition(",")[0]
