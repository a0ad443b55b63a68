"""`kvhive-vllm`: vLLM's own server with a recipe, and the options that switch one on elsewhere."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from typing import Annotated, Any

import typer
from kvhive.cli.console import Plugin
from kvhive.plugins import load_plugins

from kvhive_vllm import __version__, engine_args, versions

app = typer.Typer(
    name="kvhive-vllm",
    help="KV cache eviction inside stock vLLM.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
PASSED_ON = {"allow_extra_args": True, "ignore_unknown_options": True}
OURS = ("--scheduler-cls", "--worker-cls")
CONFIG = "--additional-config"

RecipeOption = Annotated[
    str, typer.Option("--recipe", "-r", help="Which tokens survive, such as h2o@1024.")
]


@app.command(context_settings=PASSED_ON)
def serve(
    context: typer.Context,
    model: Annotated[str, typer.Argument(help="A model's name or folder, as vllm serve takes it.")],
    recipe: RecipeOption,
    plugin: Plugin = None,
) -> None:
    """Serve MODEL with vLLM's OpenAI server; all other options are vLLM's own."""
    run_vllm(["serve", model, *arguments(recipe, context.args, plugin or ())])


@app.command()
def options(
    recipe: Annotated[str, typer.Argument(help="Such as h2o@1024.")],
    plugin: Plugin = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="As keyword arguments of vllm.LLM instead.")
    ] = False,
) -> None:
    """Print the three options with which plain `vllm serve` runs RECIPE."""
    if as_json:
        typer.echo(json.dumps(_args(recipe, plugin or ()), indent=2))
    else:
        typer.echo(shlex.join(arguments(recipe, [], plugin or ())))


@app.command()
def version() -> None:
    """Print the versions of this package and of the vLLM that is installed."""
    name, release = versions.installed() or ("vLLM", "missing")
    typer.echo(f"kvhive-vllm {__version__}, {name} {release}, tested with vLLM {versions.TESTED}")


def arguments(recipe: str, others: list[str], plugins: Sequence[str] = ()) -> list[str]:
    """vLLM's command line for a recipe and other options of vLLM's.

    Raises `typer.BadParameter` for a recipe that cannot be run, for a plugin that cannot be loaded,
    and for options that choose another scheduler or worker.
    """
    given, rest = _config(others)
    for option in OURS:
        if any(word.replace("_", "-").partition("=")[0] == option for word in rest):
            raise typer.BadParameter(f"{option} is how a recipe is run; leave it out")
    args = _args(recipe, plugins)
    ours = args["additional_config"]
    if given.keys() & ours.keys():
        raise typer.BadParameter(f"{CONFIG} names a recipe, and so does --recipe; leave one out")
    config = json.dumps(given | ours)
    classes = [args["scheduler_cls"], args["worker_cls"]]
    return [
        *rest,
        *[word for pair in zip(OURS, classes, strict=True) for word in pair],
        CONFIG,
        config,
    ]


def run_vllm(words: list[str]) -> None:
    """Run vLLM's `serve` command. (Its own entry point looks for a distribution called vllm, which
    the build for CPUs is not.)
    """
    from vllm.entrypoints.cli.serve import ServeSubcommand
    from vllm.entrypoints.serve.utils.api_utils import cli_env_setup
    from vllm.logger import configure_logging_from_args
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    cli_env_setup()
    parser = FlexibleArgumentParser(prog="kvhive-vllm")
    command = ServeSubcommand()
    command.subparser_init(parser.add_subparsers(required=True, dest="subparser"))
    parsed = parser.parse_args(words)
    configure_logging_from_args(parsed)
    command.validate(parsed)
    command.cmd(parsed)


def _args(recipe: str, plugins: Sequence[str]) -> dict[str, Any]:
    try:
        load_plugins(plugins)
    except (ValueError, OSError, ImportError) as error:
        raise typer.BadParameter(str(error), param_hint="--plugin") from None
    try:
        return engine_args(recipe, plugins)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--recipe") from None


def _config(words: list[str]) -> tuple[dict[str, Any], list[str]]:
    """The user's own --additional-config, and the other words."""
    config: dict[str, Any] = {}
    rest: list[str] = []
    queue = iter(words)
    for word in queue:
        name, equals, value = word.partition("=")
        if name.replace("_", "-") != CONFIG:
            rest.append(word)
            continue
        text = value if equals else next(queue, "")
        try:
            config = json.loads(text)
        except json.JSONDecodeError:
            config = {}
        if not isinstance(config, dict) or not config:
            raise typer.BadParameter(f"{CONFIG} takes a JSON object, got {text!r}")
    return config, rest


def main() -> None:
    """The command."""
    app()
