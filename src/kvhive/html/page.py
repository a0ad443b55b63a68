"""The frame all pages share: style, header, footer, and a safe way to write them."""

from __future__ import annotations

import os
import tempfile
from html import escape
from importlib.resources import files
from pathlib import Path
from string import Template

# The full cache is grey, recipes follow in this order. Readable on light and dark ground.
GREY = "#8b919b"
COLOURS = ("#d98200", "#3b7dd8", "#14988a", "#cf4778", "#8a63d2", "#5b9a2e", "#b5532a", "#6b7fa3")

_FRAME = Template("""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>$title</title>
<style>
$style</style>
</head>
<body>
<header>
<p class="brand">$logo kvhive <span>$kind</span></p>
<h1>$heading</h1>
<p class="facts">$facts</p>
</header>
<main>
$body
</main>
<footer>$footer</footer>
$script
</body>
</html>
""")
_LOGO = (
    '<svg viewBox="0 0 20 20" aria-hidden="true"><path d="M10 1l7.8 4.5v9L10 19l-7.8-4.5v-9z" '
    'fill="none" stroke="currentColor" stroke-width="1.6"/>'
    '<path d="M10 6l3.5 2v4L10 14l-3.5-2V8z" fill="currentColor"/></svg>'
)


def page(kind: str, heading: str, facts: list[str], body: str, footer: str, script: str) -> str:
    """A whole page. heading, facts: plain text; body, footer: HTML; script: a file's name here."""
    return _FRAME.substitute(
        title=escape(f"{heading} - kvhive {kind}"),
        style=_resource("style.css"),
        logo=_LOGO,
        kind=escape(kind),
        heading=escape(heading),
        facts=" &middot; ".join(f"<span>{escape(fact)}</span>" for fact in facts),
        body=body,
        footer=footer,
        script=f"<script>\n{_resource(script)}</script>",
    )


def check_writable(path: Path) -> None:
    """Raises `OSError` if no page can be written to `path`; what is there stays untouched."""
    if path.is_dir():
        raise IsADirectoryError(f"cannot write {str(path)!r}: it is a folder; name a file in it")
    if not path.parent.is_dir():
        raise FileNotFoundError(
            f"cannot write {str(path)!r}: there is no folder {str(path.parent)!r}"
        )
    if path.exists() and not os.access(path, os.W_OK):
        raise PermissionError(f"cannot write {str(path)!r}: the file is write-protected")
    try:
        tempfile.TemporaryFile(dir=path.parent).close()
    except OSError as error:
        reason = (error.strerror or "the folder is write-protected").lower()
        raise PermissionError(f"cannot write {str(path)!r}: {reason}") from None


def write_page(path: Path, text: str) -> None:
    """Write `text` to `path`, which holds the old page or the whole new one at every moment."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        Path(name).chmod(0o644)
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def _resource(name: str) -> str:
    return files("kvhive.html").joinpath(name).read_text(encoding="utf-8")
