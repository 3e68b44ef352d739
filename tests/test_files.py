"""Files that are written: whole or not at all, and over nothing."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

import configs.files as module
from configs.errors import UserError
from configs.files import prepare_figure, write_atomically


def test_a_file_is_replaced_and_nothing_is_left_beside_it(tmp_path: Path) -> None:
    write_atomically(tmp_path / "a.txt", b"one")
    write_atomically(tmp_path / "a.txt", b"two")
    assert (tmp_path / "a.txt").read_bytes() == b"two"
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]


def test_a_file_that_cannot_be_replaced_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_atomically(tmp_path / "a.txt", b"one")

    def interrupted(old: Path, new: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(module.os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_atomically(tmp_path / "a.txt", b"two")
    assert (tmp_path / "a.txt").read_bytes() == b"one"
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]


def test_a_full_disk_names_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, data: bytes) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="No space left") as caught:
        write_atomically(tmp_path / "a.txt", b"one")
    assert caught.value.filename == str(tmp_path / "a.txt")


def test_the_directory_of_a_figure_is_made(tmp_path: Path) -> None:
    prepare_figure(tmp_path / "new" / "deep" / "a.svg")
    assert (tmp_path / "new" / "deep").is_dir()
    assert list((tmp_path / "new" / "deep").iterdir()) == []


@pytest.mark.parametrize(
    ("name", "problem"),
    [("a.jpg", "ends in one of .png"), ("a", "ends in one of .png"), ("mine.png", "exists")],
)
def test_figures_that_cannot_be_drawn_are_refused(tmp_path: Path, name: str, problem: str) -> None:
    (tmp_path / "mine.png").write_text("mine")
    with pytest.raises(UserError, match=problem) as caught:
        prepare_figure(tmp_path / name)
    assert str(tmp_path / name) in str(caught.value)
    (tmp_path / "file").write_text("mine")
    with pytest.raises(OSError, match="file"):
        prepare_figure(tmp_path / "file" / "a.png")
