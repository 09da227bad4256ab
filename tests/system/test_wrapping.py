"""Lines that are wider than a terminal are broken at blanks, and go on below their last column."""

from hypothesis import given
from hypothesis import strategies as st

from qtool.system.wrapping import folded


def test_a_line_goes_on_below_its_last_column() -> None:
    line = "  torch: int4, cpu    2, 3 and 4 bits  active; input and scales rounded to bfloat16"
    assert folded(line, 70) == (
        "  torch: int4, cpu    2, 3 and 4 bits  active; input and scales\n"
        "                                       rounded to bfloat16"
    )
    assert folded(line, 60) == (
        "  torch: int4, cpu    2, 3 and 4 bits  active; input and\n                      scales rounded to bfloat16"
    )


def test_a_line_without_columns_is_indented_by_two_more_blanks() -> None:
    assert folded("error: one two three four\n  key: one two three", 14) == (
        "error: one two\n  three four\n  key: one two\n    three"
    )


def test_words_and_a_command_at_the_end_stay_whole() -> None:
    assert folded("a word-of-hyphens /and/a/path", 10) == "a\n  word-of-hyphens\n  /and/a/path"
    assert folded('lm_eval is missing: pip install "qtool-llm[tasks]"', 40) == (
        'lm_eval is missing:\n  pip install "qtool-llm[tasks]"'
    )


@given(st.text("ab -\n", max_size=200), st.integers(1, 60))
def test_only_blanks_are_changed_and_what_fits_stays(text: str, width: int) -> None:
    found = folded(text, width)
    assert found.split() == text.split()
    if all(len(line) <= width for line in text.split("\n")):
        assert found == text
