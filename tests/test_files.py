"""Outputs: nothing is lost, half-written or put where no file belongs."""

from __future__ import annotations

import errno
import io
import os
import stat
import sys
from pathlib import Path

import pytest

from kvhive.files import Output, check_distinct, expanded, write_whole

MARK = "made by kvhive"


def test_a_new_file_has_the_mode_of_new_files(tmp_path):
    Output.prepare(tmp_path / "a.html", MARK).write("text")
    (tmp_path / "b").touch()
    assert (tmp_path / "a.html").read_text() == "text"
    assert (tmp_path / "a.html").stat().st_mode == (tmp_path / "b").stat().st_mode
    assert {path.name for path in tmp_path.iterdir()} == {"a.html", "b"}


def test_a_file_of_our_own_is_replaced_and_keeps_its_mode(tmp_path):
    path = tmp_path / "a.html"
    path.write_text(f"<!-- {MARK} --> old")
    path.chmod(0o600)
    Output.prepare(path, MARK).write("new")
    assert path.read_text() == "new"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_a_file_of_somebody_else_needs_force(tmp_path):
    path = tmp_path / "thesis.html"
    path.write_text("three years of work")
    with pytest.raises(FileExistsError, match=r"did not make; choose another name, or .*--force"):
        Output.prepare(path, MARK)
    Output.prepare(path, MARK, force=True).write("gone")
    assert path.read_text() == "gone"


def test_an_empty_file_can_be_filled(tmp_path):
    (tmp_path / "a").touch()
    Output.prepare(tmp_path / "a", MARK).write("text")
    assert (tmp_path / "a").read_text() == "text"


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize("way", ["same", "link", "hard link", "dots"])
def test_what_is_read_is_never_written(tmp_path, force, way):
    source = tmp_path / "source.md"
    source.write_text(MARK)
    target = tmp_path / "target.md"
    if way == "same":
        target = source
    elif way == "link":
        target.symlink_to(source)
    elif way == "hard link":
        os.link(source, target)
    else:
        target = tmp_path / ".." / tmp_path.name / "source.md"
    with pytest.raises(ValueError, match="the command reads it"):
        Output.prepare(target, MARK, inputs=[source], force=force)
    assert source.read_text() == MARK


def test_two_outputs_need_two_files(tmp_path):
    (tmp_path / "link").symlink_to("page")
    outputs = [Output.prepare(tmp_path / name, MARK) for name in ("page", "link")]
    with pytest.raises(ValueError, match="twice"):
        check_distinct(outputs)
    check_distinct(outputs[:1])


def test_a_link_is_followed(tmp_path):
    (tmp_path / "real").mkdir()
    link = tmp_path / "link.html"
    link.symlink_to("real/page.html")
    Output.prepare(link, MARK).write("text")
    assert link.is_symlink()
    assert (tmp_path / "real" / "page.html").read_text() == "text"


def test_a_circle_of_links_is_refused(tmp_path):
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    with pytest.raises(OSError, match="cannot write"):
        Output.prepare(tmp_path / "a", MARK)


@pytest.mark.parametrize("force", [False, True])
def test_only_ordinary_files_are_written(tmp_path, force):
    os.mkfifo(tmp_path / "pipe")
    for place in (tmp_path / "pipe", Path("/dev/null"), Path("/dev/stderr"), Path("/dev/fd/2")):
        with pytest.raises(OSError, match="no ordinary file"):
            Output.prepare(place, MARK, force=force)
    assert stat.S_ISCHR(Path("/dev/null").stat().st_mode)
    with pytest.raises(IsADirectoryError, match="is a folder"):
        Output.prepare(tmp_path, MARK, force=force)
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        Output.prepare(tmp_path / "no" / "page", MARK, force=force)
    with pytest.raises(OSError, match=r"cannot write .*too long"):
        Output.prepare(tmp_path / ("x" * 300), MARK, force=force)
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="cannot write"):
        Output.prepare(tmp_path / "file" / "page", MARK, force=force)


@pytest.mark.parametrize("force", [False, True])
def test_a_write_protected_file_stays_for_root_too(tmp_path, force):
    path = tmp_path / "old"
    path.write_text(MARK)
    path.chmod(0o444)
    with pytest.raises(PermissionError, match="write-protected"):
        Output.prepare(path, MARK, force=force)
    assert path.read_text() == MARK


@pytest.mark.parametrize("name", ["-", "/dev/stdout"])
def test_stdout_is_written_through(name, monkeypatch):
    before = Path("/dev/stdout").is_symlink()
    held = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", held)
    Output.prepare(name, MARK).write("caf\u00e9")
    assert held.buffer.getvalue() == "caf\u00e9".encode()
    assert Path("/dev/stdout").is_symlink() == before


def test_a_full_disk_is_named_and_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "page.html"
    path.write_text(MARK)

    def fail(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match=r"page\.html.*the disk is full"):
        write_whole(path, b"new")
    assert path.read_text() == MARK
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_without_write_access_is_refused_before_the_work(tmp_path, monkeypatch):
    def fail(*words: object) -> int:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr("kvhive.files._opened", fail)
    with pytest.raises(PermissionError, match="permission denied"):
        Output.prepare(tmp_path / "page", MARK)


def test_bytes_that_are_no_text_are_written_as_escapes(tmp_path):
    Output.prepare(tmp_path / "a", MARK).write("bad \udcff byte")
    assert (tmp_path / "a").read_text() == "bad \\udcff byte"


def test_homes_of_users_who_do_not_exist(tmp_path):
    assert expanded("~/x") == Path.home() / "x"
    with pytest.raises(ValueError, match=r"'~nobody-at-all/x'.*no home folder for ~nobody-at-all"):
        expanded("~nobody-at-all/x")


def test_an_interrupted_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "page.html"
    path.write_text("old")

    def fail(*words: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("pathlib.Path.replace", fail)
    with pytest.raises(KeyboardInterrupt):
        write_whole(path, b"new")
    assert list(tmp_path.iterdir()) == [path]
    assert path.read_text() == "old"
