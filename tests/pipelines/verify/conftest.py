"""A checkpoint and its exports, which the tests of ``qtool verify`` share."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers import tiny
from helpers.native_checkpoints import exported

from qtool.config.quant import QuantConfig

W4 = QuantConfig(num_bits=4, group_size=32)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a float model, ``q``, its checkpoint, and exports, whose records a test may write."""
    at = tmp_path_factory.mktemp("made")
    tiny.quantize(tiny.llama(at / "float"), at / "q", W4)
    for name in ("compressed-tensors", "gptq", "mlx", "gguf", "dense"):
        exported(at / "q", name, at / name)
    return at


@pytest.fixture(autouse=True)
def here_only(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("GPTQMODEL", "MLX", "LLAMA_CPP", "AUTO_ROUND", "COMPRESSED_TENSORS", "FAKE"):
        monkeypatch.delenv(f"QTOOL_{name}_PYTHON", raising=False)


@pytest.fixture
def export(made: Path, tmp_path: Path) -> Callable[[str], Path]:
    """A function that returns a copy of an export, to damage it."""

    def copy(name: str) -> Path:
        shutil.copytree(made / name, tmp_path / name)
        return tmp_path / name

    return copy
