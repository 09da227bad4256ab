"""Durations and sizes as people read them."""

import pytest

from qtool.system import units


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0.0 s"), (59.94, "59.9 s"), (59.96, "1:00"), (185, "3:05"), (3725, "1:02:05")]
)
def test_durations_read_well(seconds: float, text: str) -> None:
    assert units.duration(seconds) == text


@pytest.mark.parametrize(
    ("num_bytes", "text"), [(0, "0 MB"), (812e6, "812 MB"), (999.6e6, "1.0 GB"), (3.44e9, "3.4 GB")]
)
def test_sizes_read_well(num_bytes: float, text: str) -> None:
    assert units.size(num_bytes) == text


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [
        (0, "0.00 MB"),
        (17e3, "0.02 MB"),
        (3.374e6, "3.37 MB"),
        (45.21e6, "45.2 MB"),
        (812.3e6, "812 MB"),
        (999.6e6, "1.00 GB"),
        (5730e6, "5.73 GB"),
        (16060.52e6, "16.1 GB"),
        (141e9, "141 GB"),
    ],
)
def test_sizes_of_files_have_two_decimals_or_three_digits(num_bytes: float, text: str) -> None:
    assert units.file_size(num_bytes) == text
