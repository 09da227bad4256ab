"""Marks for tests that need files from the data folder."""

import pytest

from qtool.data import sources


def missing(*files: str) -> bool:
    folder = sources.data_dir()
    return folder is None or not all((folder / file).exists() for file in files)


def needs(*files: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(missing(*files), reason=f"QTOOL_DATA_DIR has no {', '.join(files)}")
