"""A model gets its KV cache under the keyword that its transformers has, and no deprecated name is used."""

import warnings

import pytest
import torch
from torch import nn
from transformers import DynamicCache, PreTrainedModel

from qtool.models.cache_argument import cache_of, with_cache
from qtool.models.loaded import LoadedModel


class Older(nn.Module):
    """A model as before transformers 5.24."""

    def forward(self, input_ids: torch.Tensor, past_key_values: object = None, use_cache: bool = False) -> None: ...


def test_an_older_model_gets_the_older_keyword() -> None:
    cache = object()
    assert with_cache(Older(), cache) == {"past_key_values": cache, "use_cache": True}
    assert cache_of({"past_key_values": cache}) is cache


def test_decoding_with_a_cache_warns_of_nothing_and_changes_no_logit(llama: LoadedModel, tokens: torch.Tensor) -> None:
    model: PreTrainedModel = llama.model
    row = tokens[:1, :12]
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("error")
        first = model(row[:, :8], **with_cache(model, None))
        cache = cache_of(first)
        assert isinstance(cache, DynamicCache)
        second = model(row[:, 8:], **with_cache(model, cache))
        whole = model(row)
    joined = torch.cat([first.logits, second.logits], 1)
    torch.testing.assert_close(joined, whole.logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["cache", "past_key_values"])
def test_the_cache_of_an_output_is_found_under_both_names(name: str) -> None:
    assert cache_of({name: 1}) == 1
