"""Equal tensors of two models are held once, and neither model changes."""

import torch

from qtool.config.sections import ModelConfig
from qtool.models.folders import BUILTIN
from qtool.models.loading import load_model
from qtool.models.shared import share_equal


def test_equal_tensors_are_held_once_and_different_ones_twice() -> None:
    first, second = (load_model(ModelConfig(path=str(BUILTIN / "wiki-llama-3m"), device="cpu")) for _ in range(2))
    changed, signed = "model.layers.0.mlp.up_proj.weight", "model.layers.0.mlp.down_proj.weight"
    with torch.no_grad():
        second.model.get_parameter(changed)[0, 0] += 1
        first.model.get_parameter(signed)[0, 0] = 0.0
        second.model.get_parameter(signed)[0, 0] = -0.0  # equal to 0.0 as a number
    tokens = torch.arange(12)[None]
    before = [loaded.model(tokens).logits.clone() for loaded in (first, second)]
    assert share_equal(first, second) is second
    ours = dict(first.model.named_parameters())
    for name, tensor in second.model.named_parameters():
        assert (tensor.data_ptr() == ours[name].data_ptr()) == (name not in (changed, signed)), name
    for loaded, logits in zip((first, second), before, strict=True):
        assert torch.equal(loaded.model(tokens).logits, logits)
