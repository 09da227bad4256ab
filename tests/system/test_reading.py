"""Small files of others: regular ones only, bounded, and JSON of any content is a value or an input error."""

import os
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qtool.system import reading
from qtool.system.errors import InputError


def test_a_fifo_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "config.json")
    with pytest.raises(InputError, match=r"config\.json is a FIFO; a regular file is needed"):
        reading.read_object(tmp_path / "config.json")


def test_a_device_is_refused_through_a_link_too(tmp_path: Path) -> None:
    (tmp_path / "config.json").symlink_to("/dev/zero")
    with pytest.raises(InputError, match="is a device"):
        reading.read_json(tmp_path / "config.json")


def test_a_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is a folder"):
        reading.read_text(tmp_path)


def test_a_missing_file_is_told_from_one_that_cannot_be_used(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for missing in (tmp_path / "no", tmp_path / "file" / "below"):
        with pytest.raises(FileNotFoundError):
            reading.read_bytes(missing)


def test_a_loop_of_links_and_a_nul_are_input_errors(tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to("loop")
    for path in (tmp_path / "loop", Path("a\0b")):
        with pytest.raises(InputError, match="cannot be read"):
            reading.read_bytes(path)


def test_the_size_is_bounded(tmp_path: Path) -> None:
    (tmp_path / "large").write_bytes(b"12345")
    assert reading.read_bytes(tmp_path / "large", limit=5) == b"12345"
    with pytest.raises(InputError, match="larger than"):
        reading.read_bytes(tmp_path / "large", limit=4)


@pytest.mark.parametrize("text", ['{"a": ' + "[" * 200_000 + "]" * 200_000 + "}", "9" * 5000, "[" * 100_000])
def test_deep_nesting_and_long_integers_are_input_errors(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(InputError, match=r"a\.json is not JSON"):
        reading.read_json(tmp_path / "a.json")


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=40))
def test_bytes_of_any_content_are_a_value_or_an_input_error(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "any.json"
    file.write_bytes(content)
    with suppress(InputError):
        reading.read_object(file)
