"""Seeds of the parts of a run: fixed for ever, and different from part to part."""

from hypothesis import given
from hypothesis import strategies as st

from qtool.system.seeds import derived_seed

seeds, parts = st.integers(0, 2**31), st.integers(0, 1_000_000)


def test_seeds_are_pinned_for_results_depend_on_them() -> None:
    assert [derived_seed(0, 0), derived_seed(0, 5), derived_seed(3, 7)] == [0, 5, 3_000_016]


@given(seeds, parts, seeds, parts)
def test_no_two_parts_of_any_two_runs_share_a_seed(one: int, part: int, other: int, its_part: int) -> None:
    assert (derived_seed(one, part) == derived_seed(other, its_part)) == ((one, part) == (other, its_part))
