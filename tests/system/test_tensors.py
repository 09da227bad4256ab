"""Names of dtypes, and sizes by device."""

import pytest
import torch

from qtool.system.tensors import dtype_name, size_for


@pytest.mark.parametrize("name", ["bfloat16", "float16", "float32", "int32", "uint8"])
def test_the_name_of_a_dtype_is_the_one_that_finds_it_in_torch(name: str) -> None:
    assert dtype_name(getattr(torch, name)) == name


def test_a_device_without_a_size_of_its_own_takes_that_of_the_cpu() -> None:
    sizes = {"cpu": 1, "cuda": 2}
    assert [size_for(torch.device(name), sizes) for name in ("cpu", "cuda:0", "meta")] == [1, 2, 1]
