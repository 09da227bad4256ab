"""Multimodal models: the text decoder is quantized, the towers stay as they are, and pictures reach every block."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import multimodal
from helpers.multimodal import FAMILIES
from torch import Tensor, nn

from qtool.blocks import driver
from qtool.blocks.job import Job
from qtool.models.loaded import LoadedModel

FAST = list(FAMILIES)


def loaded_of(name: str) -> LoadedModel:
    model = multimodal.make(name)
    dtypes = {key: torch.float32 for key, _ in model.named_parameters()}
    return LoadedModel(model, multimodal.tokenizer(), name, Path(), dtypes)


def job_of(loaded: LoadedModel, name: str, count: int = 3) -> Job:
    windows = [multimodal.prompt(name, seed) for seed in range(count)]
    tokens = torch.cat([window.pop("input_ids") for window in windows])
    return Job(loaded, (), tokens, pictures=windows)


@pytest.mark.parametrize("name", FAST)
def test_every_window_with_a_picture_gets_the_hidden_states_of_the_models_own_forward(name: str) -> None:
    loaded = loaded_of(name)
    job = job_of(loaded, name)
    expected: list[list[Tensor]] = [[] for _ in loaded.blocks()]

    def record(index: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any, out: Any) -> None:
            hidden = out[0] if isinstance(out, tuple) else out
            expected[index].append(hidden.clone())

        return hook

    hooks = [b.register_forward_hook(record(i), with_kwargs=True) for i, (_, b) in enumerate(loaded.blocks())]
    with torch.no_grad():
        for tokens, pictures in zip(job.text.split(1), job.pictures, strict=True):
            loaded.model(input_ids=tokens, **pictures, use_cache=False)
    for each in hooks:
        each.remove()
    for task in driver.walk(job):
        for hidden, own in zip(task.inputs, expected[task.index], strict=True):
            assert torch.equal(task.forward(hidden), own)
