"""Read a document to ask about: a text, Markdown or PDF file, or what arrives on stdin."""

from __future__ import annotations

import codecs
import io
import sys
from dataclasses import dataclass
from pathlib import Path

from kvhive.files import expanded

STDIN = "-"
MOST_BYTES = 64 * 2**20
_OPEN_FILES = (Path("/dev/fd"), Path("/proc/self/fd"))  # as the shell's <(command) names them
_UTF16_MARKS = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


@dataclass(frozen=True)
class Document:
    """A document's name, for messages and titles, and its text, which is never blank."""

    name: str
    text: str

    @classmethod
    def read(cls, source: str) -> Document:
        """The document at the path `source`, or on stdin when `source` is "-".

        Raises `OSError` when it cannot be read, `ValueError` when it is empty, binary, larger than
        64 MiB or a PDF without text, `ImportError` when reading a PDF needs a package that is
        missing.
        """
        from_stdin = source in (STDIN, "/dev/stdin")
        name = "stdin" if from_stdin else Path(source).name
        data = _read_stdin() if from_stdin else _read_file(expanded(source))
        if len(data) > MOST_BYTES:
            raise ValueError(
                f"{name} is larger than {MOST_BYTES // 2**20} MiB, far more than a model can read; "
                "give a part of it"
            )
        text = _pdf_text(name, data) if data.startswith(b"%PDF-") else _plain_text(name, data)
        text = text.replace("\r\n", "\n").replace("\r", "\n").strip()
        if not text:
            raise ValueError(f"{name} is empty: there is no text to ask about")
        return cls(name, text)


def _read_stdin() -> bytes:
    if sys.stdin is None:
        raise ValueError("stdin is closed: pipe a text into it, or name a file")
    return sys.stdin.buffer.read(MOST_BYTES + 1)


def _read_file(path: Path) -> bytes:
    if path.is_dir():
        raise IsADirectoryError(f"{str(path)!r} is a folder, not a document")
    if not path.exists():
        raise FileNotFoundError(f"no document at {str(path)!r}: there is no such file")
    if not path.is_file() and path.parent not in _OPEN_FILES:  # it could wait for ever
        raise OSError(f"{str(path)!r} is no ordinary file; to read from it, pipe it into stdin (-)")
    with path.open("rb") as file:
        return file.read(MOST_BYTES + 1)


def _plain_text(name: str, data: bytes) -> str:
    """Text in UTF-8, or in UTF-16 with a byte-order mark."""
    if data.startswith(_UTF16_MARKS):
        encoding = "utf-16"
    elif b"\0" in data:
        raise ValueError(f"{name} is a binary file; give text, Markdown or PDF")
    else:
        encoding = "utf-8-sig"
    try:
        return data.decode(encoding)
    except UnicodeDecodeError as error:
        wanted = encoding.upper().removesuffix("-SIG")
        raise ValueError(
            f"{name} is not text in {wanted} (byte {error.start} cannot be read); convert it first"
        ) from None


def _pdf_text(name: str, data: bytes) -> str:
    """The text of all pages, a blank line between two."""
    try:
        import pypdf
    except ImportError:
        raise ImportError(f"{name}: reading PDF needs pypdf: pip install 'kvhive[pdf]'") from None
    try:
        pages = [page.extract_text() for page in pypdf.PdfReader(io.BytesIO(data)).pages]
    except pypdf.errors.FileNotDecryptedError:
        raise ValueError(f"{name} is protected by a password; give it without one") from None
    except Exception as error:
        # A damaged file ends pypdf in exceptions of many kinds (KeyError, AttributeError, ...).
        raise ValueError(
            f"{name} cannot be read as PDF: {error or type(error).__name__}"
        ) from error
    text = "\n\n".join(page.strip() for page in pages)
    if not text.strip():
        raise ValueError(
            f"{name} is a PDF without text (pictures of pages?); run text recognition on it"
        )
    return text
