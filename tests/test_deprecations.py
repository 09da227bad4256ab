"""A call of ours that a library will take away fails the test that makes it."""

import warnings

import pytest
import transformers
from helpers.deprecations import Deprecations


@pytest.mark.parametrize("time", ["first", "second"])
def test_a_deprecation_that_transformers_logs_is_seen_each_time(time: str) -> None:
    logger = transformers.utils.logging.get_logger("transformers.models.llama")
    logger.warning_once("`past_key_values` is deprecated and will be removed in version 5.40")
    logger.warning_once("nothing but a remark")
    found, Deprecations.found[:] = list(Deprecations.found), []  # taken out, as the fixture fails the test for these
    assert found == ["`past_key_values` is deprecated and will be removed in version 5.40"]


@pytest.mark.parametrize("kind", [DeprecationWarning, PendingDeprecationWarning, FutureWarning])
def test_a_deprecation_that_is_warned_of_is_an_error(kind: type[Warning]) -> None:
    with pytest.raises(kind):
        warnings.warn("gone in the next version", kind, stacklevel=1)
