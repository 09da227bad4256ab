"""Two random models to evaluate, one of them in the place of the float model."""

import pytest
from helpers import tiny

from qtool.models.loaded import LoadedModel


@pytest.fixture(scope="module")
def loaded() -> LoadedModel:
    return tiny.with_spread_logits(0)


@pytest.fixture(scope="module")
def reference() -> LoadedModel:
    return tiny.with_spread_logits(1)
