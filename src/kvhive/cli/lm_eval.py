"""`kvhive lm-eval`: lm-evaluation-harness, with the model "kvhive"."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Annotated

import typer


def register(app: typer.Typer) -> None:
    """Add the command to `app`; every option, `--help` too, is the harness's own."""
    settings = {"ignore_unknown_options": True, "help_option_names": []}
    app.command("lm-eval", context_settings=settings)(lm_eval)


def lm_eval(
    options: Annotated[list[str] | None, typer.Argument(metavar="OPTIONS")] = None,
) -> None:
    """Run lm-evaluation-harness, with a model [bold]kvhive[/bold] that takes a recipe.

    [dim]$[/dim] kvhive lm-eval --model kvhive --model_args pretrained=smollm2,recipe=buzz@0.4
    --tasks hellaswag --limit 20
    """
    missing = [name for name in ("lm_eval", "accelerate") if find_spec(name) is None]
    if missing:
        raise ImportError(f"this needs {' and '.join(missing)}: pip install 'kvhive[lm-eval]'")
    from kvhive.engines.lm_eval import main

    main(options or [])
