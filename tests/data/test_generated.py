"""Text that a model writes is the same with and without a cache, whatever cache the architecture has."""

import pytest
import torch
from helpers.caches import OTHERS, WITHOUT, make
from helpers.notes import Notes

from qtool.data import generated
from qtool.data.generated import generated_tokens
from qtool.system import progress


@pytest.mark.parametrize("name", ["llama", "gemma3", *OTHERS])
def test_the_text_is_that_of_a_model_without_a_cache(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded, sink = make(name), Notes()
    with progress.use(sink):
        tokens = generated_tokens(loaded, 3, 20, 0)
    monkeypatch.setattr(generated, "find_cache", lambda *_: None)
    assert torch.equal(tokens, generated_tokens(loaded, 3, 20, 0))
    said = [line for line in sink.texts if "with a KV cache than without one" in line]
    assert len(said) == (name in WITHOUT)


@pytest.mark.parametrize("name", ["llama", "xlstm"])
def test_a_cache_that_works_is_used(name: str) -> None:
    loaded = make(name)
    lengths: list[int] = []
    loaded.model.register_forward_pre_hook(lambda _, args: lengths.append(args[0].shape[1]))
    generated_tokens(loaded, 2, 20, 0)
    assert max(lengths) <= 3
