"""What several test files share: a tiny random Llama, tokens, and how torch and hypothesis run."""

import copy
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import transformers
from helpers import tiny
from hypothesis import HealthCheck, settings

from qtool.models.loaded import LoadedModel

DATA = Path(__file__).parents[2] / "shared" / "data"
if "QTOOL_DATA_DIR" not in os.environ and DATA.is_dir():
    os.environ["QTOOL_DATA_DIR"] = str(DATA)

torch.set_num_threads(1)  # the same sums on every machine, and no fight over cores
transformers.utils.logging.disable_progress_bar()

settings.register_profile(
    "qtool",
    deadline=None,  # machines that run tests are busy
    derandomize="CI" in os.environ,
    max_examples=40,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("qtool")


@pytest.fixture(autouse=True)
def few_figures(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reports without figures, which take about a second for each run; only tests of figures draw them."""
    if request.path.stem not in ("test_html", "test_comparison"):
        monkeypatch.setattr("qtool.reports.figures.DRAWERS", ())


@pytest.fixture(autouse=True)
def environment_as_it_was() -> Iterator[None]:
    """What a command sets for its whole process, as ``--quiet`` does, ends with the test."""
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
    """Each call gives the tiny Llama anew, to quantize."""
    return lambda: copy.deepcopy(pristine_llama)


@pytest.fixture
def llama(make_llama: Callable[[], LoadedModel]) -> LoadedModel:
    """The tiny Llama, to quantize."""
    return make_llama()


@pytest.fixture(scope="session")
def tokens() -> torch.Tensor:
    """Calibration tokens ``[5, 24]``, random."""
    return torch.randint(2, tiny.VOCABULARY, (5, 24), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder with data on this machine; the test is skipped where there is none."""
    from qtool.data import sources

    folder = sources.data_dir()
    if folder is None:
        pytest.skip("no data on this machine: set QTOOL_DATA_DIR to a folder that has it")
    return folder
