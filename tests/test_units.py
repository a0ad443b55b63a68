"""Sizes and counts: what is read, what is refused, and how a size is told."""

from __future__ import annotations

import pytest

from kvhive.units import bytes_text, parse_bytes, parse_tokens


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("24MiB", 24 * 2**20),
        ("40GiB", 40 * 2**30),
        ("1.5 GB", 1_500_000_000),
        ("24 MB", 24_000_000),
        ("512KiB", 512 * 2**10),
        (" 0.5 kib ", 512),
        ("2TiB", 2 * 2**40),
        ("7b", 7),
        ("1048576", 2**20),
        (2**20, 2**20),
        ("0.1MB", 100_000),
        (".5GiB", 2**29),
    ],
)
def test_a_size_is_read(text: int | str, number: int) -> None:
    assert parse_bytes(text) == number


@pytest.mark.parametrize(
    "text", ["", "MiB", "24 MiBs", "24 Mib it", "-1MiB", "1e3", "nan", "1.5", "24 XB", "5 ib"]
)
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"cannot read .*; expected a size such as 24MiB"):
        parse_bytes(text)


def test_a_bare_letter_may_mean_two_things() -> None:
    with pytest.raises(ValueError, match=r"'40G' may mean two things; write 40GiB .* or 40GB"):
        parse_bytes("40G")


@pytest.mark.parametrize("value", [0, -5, "0MiB", "0.2b"])
def test_less_than_a_byte_is_refused(value: int | str) -> None:
    with pytest.raises(ValueError, match="at least 1 byte"):
        parse_bytes(value)


@pytest.mark.parametrize("value", [True, 1.5, None])
def test_other_types_are_refused(value: object) -> None:
    with pytest.raises(Exception, match=r"size: expected|beartype|type hint"):
        parse_bytes(value)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (1, "1 byte"),
        (1023, "1,023 bytes"),
        (1024, "1.0 KiB"),
        (24 * 2**20, "24.0 MiB"),
        (1024 * 2**20 - 1, "1.0 GiB"),
        (5000 * 2**40, "5,000.0 TiB"),
    ],
)
def test_a_size_is_told(number: int, text: str) -> None:
    assert bytes_text(number) == text


@pytest.mark.parametrize(
    ("text", "tokens"), [("4096", 4096), ("32k", 32_768), ("4,096", 4096), ("1.5K", 1536)]
)
def test_tokens_are_read(text: str, tokens: int) -> None:
    assert parse_tokens(text) == tokens


@pytest.mark.parametrize("text", ["", "k", "32kb", "0", "0.3", "-4", "4e3"])
def test_what_is_no_number_of_tokens_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="tokens: "):
        parse_tokens(text)
