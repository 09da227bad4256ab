"""Seeds of random number generators, derived from the seed of a run."""


def derived_seed(seed: int, index: int) -> int:
    """Return the seed for part ``index`` (a block, an epoch) of a run with ``seed``; parts get different seeds."""
    return seed * 1_000_003 + index
