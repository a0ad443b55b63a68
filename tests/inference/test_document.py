"""Documents as people have them."""

from __future__ import annotations

import io
from pathlib import Path

import pytest

from kvhive.inference.document import Document


def pdf(*pages: str) -> bytes:
    """A small PDF with one line of text on every page."""
    kids = " ".join(f"{4 + 2 * i} 0 R" for i in range(len(pages)))
    objects = [
        "<< /Type /Catalog /Pages 2 0 R >>",
        f"<< /Type /Pages /Kids [{kids}] /Count {len(pages)} >>",
        "<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica >>",
    ]
    for i, words in enumerate(pages):
        drawn = f"BT /F1 12 Tf 72 720 Td ({words}) Tj ET" if words else ""
        objects.append(
            "<< /Type /Page /Parent 2 0 R /MediaBox [0 0 612 792] /Resources << /Font << /F1 3 0 R "
            f">> >> /Contents {5 + 2 * i} 0 R >>"
        )
        objects.append(f"<< /Length {len(drawn)} >>\nstream\n{drawn}\nendstream")
    body, places = "%PDF-1.4\n", []
    for number, content in enumerate(objects, start=1):
        places.append(len(body))
        body += f"{number} 0 obj\n{content}\nendobj\n"
    table = "".join(f"{place:010} 00000 n \n" for place in places)
    size = len(objects) + 1
    body += f"xref\n0 {size}\n0000000000 65535 f \n{table}trailer\n<< /Size {size} /Root 1 0 R >>\n"
    start = body.index("xref\n")
    return (body + f"startxref\n{start}\n%%EOF\n").encode("ascii")


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"plain", "plain"),
        ("café\r\nthé\rfin\n".encode(), "café\nthé\nfin"),
        ("\ufeffmarked".encode(), "marked"),
        ("in sixteen bits".encode("utf-16"), "in sixteen bits"),
        (pdf("First page", "Second page"), "First page\n\nSecond page"),
    ],
)
def test_text_arrives_whatever_holds_it(tmp_path, content, expected):
    path = tmp_path / "file"
    path.write_bytes(content)
    document = Document.read(str(path))
    assert document.text == expected
    assert document.name == "file"


def test_a_dash_is_stdin(monkeypatch):
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(pdf("From a pipe"))))
    assert Document.read("-") == Document("stdin", "From a pipe")


def test_a_path_may_start_at_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "a.txt").write_text("home")
    assert Document.read("~/a.txt").text == "home"


def test_a_pdf_of_pictures_has_no_text(tmp_path: Path):
    path = tmp_path / "scan.pdf"
    path.write_bytes(pdf("", ""))
    with pytest.raises(ValueError, match=r"scan.pdf is a PDF without text"):
        Document.read(str(path))
