"""All HTML that kvhive writes: Python hands plain values over, and here they are escaped."""

from __future__ import annotations

import base64
import hashlib
from functools import cache

from jinja2 import Environment, PackageLoader, StrictUndefined

from kvhive.wrapping import pieces

# Recipes take these colours in order; class c0 is grey and the full cache's, c1 the first of these.
# Each stands out by 3 : 1 on white and on the dark ground.
GREY = "#7f8691"
COLOURS = ("#c47600", "#3b7dd8", "#14857a", "#cf4778", "#8a63d2", "#528b29", "#b5532a", "#63769b")
SHADES = 20  # classes a0 .. a20: how strong a ground is


def render(template: str, **values: object) -> str:
    """The named template with these values.

    A value that a template asks for and nobody gave is an error. No value can bring markup along.
    """
    return _environment().get_template(template).render(**values)


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("kvhive", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals.update(palette=(GREY, *COLOURS), shades=SHADES)
    environment.filters.update(sha256=_sha256, breakable=pieces)
    environment.policies["json.dumps_kwargs"] = {"ensure_ascii": False}
    return environment


def _sha256(text: str) -> str:
    """What a Content-Security-Policy calls an inline script or style of this very text."""
    digest = hashlib.sha256(text.encode("utf-8")).digest()
    return f"'sha256-{base64.b64encode(digest).decode('ascii')}'"
