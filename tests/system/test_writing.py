"""Files of reports are written whole or not at all, and never through a link."""

from pathlib import Path

import pytest

from qtool.system import writing
from qtool.system.errors import InputError


def test_a_file_is_replaced_and_nothing_is_left_beside_it(tmp_path: Path) -> None:
    for text in ("one", "two\n", ""):
        writing.write_text(tmp_path / "a", text)
        assert (tmp_path / "a").read_text() == text
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_a_link_is_replaced_and_not_followed(tmp_path: Path) -> None:
    (tmp_path / "victim").write_text("keep")
    (tmp_path / "a").symlink_to("victim")
    writing.write_text(tmp_path / "a", "new")
    assert (tmp_path / "victim").read_text() == "keep"
    assert (tmp_path / "a").read_text() == "new"
    (tmp_path / "b.partial").symlink_to("victim")
    with pytest.raises(OSError, match="symbolic link"):
        writing.write_text(tmp_path / "b", "new")
    assert (tmp_path / "victim").read_text() == "keep"


def test_a_folder_for_reports_is_refused_where_a_name_is_taken(tmp_path: Path) -> None:
    writing.make_folder(tmp_path / "deep" / "x", ("a",), ours=False)
    (tmp_path / "deep" / "x" / "a").touch()
    with pytest.raises(InputError, match="was not written by qtool"):
        writing.make_folder(tmp_path / "deep" / "x", ("a",), ours=False)
    writing.make_folder(tmp_path / "deep" / "x", ("a",), ours=True)
    (tmp_path / "deep" / "x" / "b").symlink_to("a")
    with pytest.raises(InputError, match="is a link"):
        writing.make_folder(tmp_path / "deep" / "x", ("b",), ours=True)
    with pytest.raises(InputError, match="cannot be made"):
        writing.make_folder(tmp_path / "deep" / "x" / "a", (), ours=True)
