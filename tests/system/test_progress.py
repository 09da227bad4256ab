"""Progress of the library: silent by default, and lazy."""

from collections.abc import Iterator

import pytest

from qtool.system import progress


def test_the_library_is_silent_by_default(capfd: pytest.CaptureFixture[str]) -> None:
    with progress.stage("loading"):
        progress.note("hello")
    assert list(progress.track([1, 2], "blocks", 2)) == [1, 2]
    assert tuple(capfd.readouterr()) == ("", "")


def test_items_are_taken_one_by_one() -> None:
    taken = []

    def items() -> Iterator[int]:
        for i in range(3):
            taken.append(i)
            yield i

    for i in progress.track(items(), "blocks", 3):
        assert taken == list(range(i + 1))
