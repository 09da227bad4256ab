"""Fixtures that several test files share, and the settings of torch and hypothesis."""

import copy
import logging
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import transformers
from helpers import tiny
from helpers.deprecations import Deprecations
from hypothesis import HealthCheck, settings

from qtool.models.loaded import LoadedModel

DATA = Path(__file__).parents[2] / "shared" / "data"
if "QTOOL_DATA_DIR" not in os.environ and DATA.is_dir():
    os.environ["QTOOL_DATA_DIR"] = str(DATA)

torch.set_num_threads(1)  # one order of summation everywhere, and no contention for cores
transformers.utils.logging.disable_progress_bar()
logging.getLogger("transformers").addHandler(Deprecations(logging.WARNING))

settings.register_profile(
    "qtool",
    deadline=None,  # a busy machine must not fail a test
    derandomize="CI" in os.environ,
    max_examples=40,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("qtool")


@pytest.fixture(autouse=True)
def few_figures(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Turn off the figures of reports, which take about a second a run, in all but the tests of figures."""
    if request.path.stem not in ("test_html", "test_comparison", "test_figures", "test_page_widths"):
        monkeypatch.setattr("qtool.reports.figures.DRAWERS", ())


@pytest.fixture(autouse=True)
def no_logged_deprecations() -> Iterator[None]:
    """Fail a test in which transformers logs a deprecation."""
    transformers.utils.logging.warning_once.cache_clear()  # each message is logged once in a process otherwise
    yield
    found, Deprecations.found[:] = list(Deprecations.found), []
    if found:
        pytest.fail(f"transformers logged a deprecation: {found}")


@pytest.fixture(autouse=True)
def environment_as_it_was() -> Iterator[None]:
    """Remove the environment variables that a command set for its process, as ``--quiet`` does."""
    before = set(os.environ)
    yield
    for name in set(os.environ) - before:
        del os.environ[name]


@pytest.fixture(scope="session")
def llama_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random float32 Llama of two blocks with grouped-query attention. Only read it; copy it to damage it."""
    return tiny.llama(tmp_path_factory.mktemp("models") / "llama", dtype=torch.float32)


@pytest.fixture(scope="session")
def pristine_llama(llama_folder: Path) -> LoadedModel:
    """The tiny Llama, loaded once; never change it."""
    return tiny.load(llama_folder)


@pytest.fixture
def make_llama(pristine_llama: LoadedModel) -> Callable[[], LoadedModel]:
    """A function that returns a new copy of the tiny Llama, to quantize."""
    return lambda: copy.deepcopy(pristine_llama)


@pytest.fixture
def llama(make_llama: Callable[[], LoadedModel]) -> LoadedModel:
    """A copy of the tiny Llama, to quantize."""
    return make_llama()


@pytest.fixture(scope="session")
def tokens() -> torch.Tensor:
    """Random calibration tokens ``[5, 24]``."""
    return torch.randint(2, tiny.VOCABULARY, (5, 24), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder that ``QTOOL_DATA_DIR`` names; without one the test is skipped."""
    from qtool.data import sources

    folder = sources.data_dir()
    if folder is None:
        pytest.skip("no data on this machine: set QTOOL_DATA_DIR to a folder that has it")
    return folder
