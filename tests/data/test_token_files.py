"""Windows of tokens in ``.npy`` files: used exactly as they are, or refused with the reason."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import tiny
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from qtool.config.sections import IGNORED, DataConfig
from qtool.data import sources, windows
from qtool.data.token_files import read_windows
from qtool.models.loaded import LoadedModel
from qtool.system.errors import InputError

TOKENS = torch.arange(12).view(3, 4) + 1


@pytest.fixture(scope="module")
def loaded() -> LoadedModel:
    return tiny.with_builtin_tokenizer(0, 128)


def config(path: Path, num_samples: int = 3, seq_len: int = 4) -> DataConfig:
    return DataConfig(source=str(path), num_samples=num_samples, seq_len=seq_len)


@pytest.mark.parametrize("dtype", ["<i4", ">i4", "<i8", ">i8"])
def test_an_array_is_used_exactly_and_in_its_order_whatever_the_seed(
    loaded: LoadedModel, tmp_path: Path, dtype: str
) -> None:
    np.save(tmp_path / "a.npy", TOKENS.numpy().astype(dtype))
    sources.check_source(config(tmp_path / "a.npy"))
    for seed in (0, 1):
        tokens, labels, _ = windows.calibration(config(tmp_path / "a.npy"), loaded, seed)
        assert tokens.dtype == torch.int64
        assert torch.equal(tokens, TOKENS)
        assert labels is None


@pytest.mark.parametrize("name", ["tokens", "anything"])
def test_safetensors_hold_tokens_under_their_name_or_alone(loaded: LoadedModel, tmp_path: Path, name: str) -> None:
    save_file({name: TOKENS.int()}, tmp_path / "a.safetensors")
    assert torch.equal(windows.calibration(config(tmp_path / "a.safetensors"), loaded, 0).tokens, TOKENS)


def test_safetensors_may_hold_labels(loaded: LoadedModel, tmp_path: Path) -> None:
    labels = TOKENS.clone()
    labels[:, :2] = IGNORED
    save_file({"tokens": TOKENS, "labels": labels, "other": TOKENS[0].clone()}, tmp_path / "a.safetensors")
    found = windows.calibration(config(tmp_path / "a.safetensors"), loaded, 0)
    assert found.labels is not None
    assert torch.equal(found.labels, labels)


@given(shape=st.tuples(st.integers(1, 5), st.integers(1, 6)))
def test_every_shape_but_the_one_asked_for_is_refused_with_the_keys_to_set(
    shape: tuple[int, int], tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.getbasetemp() / "shape.npy"
    np.save(path, np.ones(shape, dtype=np.int64))
    assert read_windows(path, shape, 2)[0].shape == shape
    asked = (shape[0] + 1, shape[1])
    with pytest.raises(InputError, match=rf"set data\.num_samples: {shape[0]} and data\.seq_len: {shape[1]}"):
        read_windows(path, asked, 2)


@pytest.mark.parametrize(
    ("tensors", "fault"),
    [
        ({"tokens": TOKENS.float()}, r"tokens are float32 \[3, 4\]; int32 or int64 \[windows, length\]"),
        ({"tokens": TOKENS[0].clone()}, r"tokens are int64 \[4\]"),
        ({"tokens": TOKENS + 90}, r"window 2, position 1 is token 100; this model has 100 tokens, from 0 on"),
        ({"tokens": TOKENS - 2}, r"window 0, position 0 is token -1"),
        ({"a": TOKENS, "b": TOKENS.clone()}, "holds the tensors a, b; one named tokens was expected"),
        ({"tokens": TOKENS, "labels": TOKENS + 1}, "-100 or the token at each position"),
        ({"tokens": TOKENS, "labels": TOKENS[:2].clone()}, "labels must have the shape of tokens"),
        ({"tokens": TOKENS, "labels": TOKENS.float()}, r"labels are float32"),
        ({"tokens": TOKENS, "labels": torch.full((3, 4), IGNORED)}, "a window has no token to learn"),
    ],
)
def test_other_tensors_are_refused(tmp_path: Path, tensors: dict[str, Any], fault: str) -> None:
    save_file(tensors, tmp_path / "a.safetensors")
    with pytest.raises(InputError, match=fault):
        read_windows(tmp_path / "a.safetensors", (3, 4), 100)


@pytest.mark.parametrize("name", ["a.npy", "a.safetensors"])
def test_damaged_files_are_told(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"\x93NUMPY no more")
    with pytest.raises(InputError, match=rf"{name} cannot be read as"):
        read_windows(tmp_path / name, (3, 4), 100)


def test_an_archive_and_pickled_objects_are_refused(tmp_path: Path) -> None:
    with (tmp_path / "a.npy").open("wb") as file:
        np.savez(file, TOKENS.numpy())
    with pytest.raises(InputError, match="archive"):
        read_windows(tmp_path / "a.npy", (3, 4), 100)
    np.save(tmp_path / "b.npy", np.array([{}], dtype=object), allow_pickle=True)
    with pytest.raises(InputError, match="cannot be read as one NumPy array of integers"):
        read_windows(tmp_path / "b.npy", (3, 4), 100)
    np.save(tmp_path / "c.npy", np.array(["a"]))
    with pytest.raises(InputError, match="cannot be read as one NumPy array of integers"):
        read_windows(tmp_path / "c.npy", (3, 4), 100)


def test_a_window_longer_than_the_context_is_refused(loaded: LoadedModel, tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.ones((1, 129), dtype=np.int64))
    with pytest.raises(InputError, match="lower it to 128"):
        windows.calibration(config(tmp_path / "a.npy", 1, 129), loaded, 0)
