"""Values as messages show them."""

import datetime

from qtool.config.validation import found


def test_values_in_messages_are_short_and_never_fail() -> None:
    loop: list[object] = []
    loop.append(loop)
    for value in (loop, {(1, 2): 3}, 10**5000, "x" * 500, datetime.date(2024, 1, 1), None, True, float("inf")):
        assert 0 < len(found(value)) <= 60
    assert (found(None), found(True), found("a")) == ("null", "true", '"a"')
