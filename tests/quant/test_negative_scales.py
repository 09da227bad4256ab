"""Where scales may not be negative, a recipe or a start that asks for negative ones is refused."""

from typing import Any

import pytest
import torch
from pydantic import ValidationError

from qtool.config.quant import ActivationGrid, QuantConfig, QuantSpec
from qtool.config.recipe import Recipe
from qtool.quant.trained_linear import QuantLinear
from qtool.system.errors import InputError

ASYMMETRIC: list[dict[str, Any]] = [{"symmetric": False}, {"symmetric": False, "float_zero": True}, {"grid": "q4_k"}]


@pytest.mark.parametrize("keys", ASYMMETRIC, ids=str)
def test_negative_scales_need_a_symmetric_grid(keys: dict[str, Any]) -> None:
    for kind in (QuantSpec, QuantConfig):
        with pytest.raises(ValidationError, match="negative_scales: true needs symmetric: true; the zero point of an"):
            kind.model_validate(keys | {"negative_scales": True})
        assert not kind.model_validate(keys | {"negative_scales": False}).signed
        assert not kind.model_validate(keys).signed


def test_an_override_that_makes_a_grid_of_negative_scales_asymmetric_is_refused() -> None:
    quant = QuantConfig.model_validate({"negative_scales": True, "overrides": {"*.o_proj": {"symmetric": False}}})
    with pytest.raises(
        InputError, match=r"overrides that match a\.o_proj: .*negative_scales: true needs symmetric: tr"
    ):
        quant.spec_for("a.o_proj")
    spec = quant.spec_for("a.q_proj")
    assert spec is not None
    assert spec.signed


@pytest.mark.parametrize("name", ["llmqat", "paretoq"])
def test_methods_that_compute_positive_scales_refuse_negative_ones(name: str) -> None:
    values = {"model": {"path": "x"}, "output": {"path": "y"}, "method": {"name": name}}
    match = rf"method {name} computes scales from the largest weights, .*; leave out quant\.negative_scales"
    for quant in ({"negative_scales": True}, {"overrides": {"*.o_proj": {"negative_scales": True}}}):
        with pytest.raises(ValidationError, match=match):
            Recipe.model_validate(values | {"quant": quant})
        Recipe.model_validate(values | {"quant": quant, "method": {"name": "lsq"}})
    Recipe.model_validate(values | {"quant": {"negative_scales": False}})


def test_negative_scales_are_no_start_for_a_layer_of_positive_ones() -> None:
    """Neither recipe gives the key: they differ in the inputs, whose rounding makes positive scales the default."""
    spec = QuantSpec(num_bits=4, group_size=8)
    rounding = spec.model_copy(update={"activations": ActivationGrid(num_bits=8)})
    assert (spec.signed, rounding.signed) == (True, False)
    weight = torch.randn(3, 16, generator=torch.Generator().manual_seed(0))
    negative, positive = (QuantLinear(sign * weight.abs(), None, spec).quantized for sign in (1, -1))
    assert bool((negative.scale < 0).all())
    assert bool((positive.scale > 0).all())
    layer = QuantLinear(weight, None, rounding)
    before = layer.weight.detach().clone()
    with pytest.raises(
        InputError, match=r"have negative scales, and this run has positive .* set quant\.negative_scales: true"
    ):
        layer.start_from(negative)
    assert torch.equal(layer.weight, before)
    layer.start_from(positive)
    assert torch.equal(layer.quantized.scale, positive.scale)
    asked = QuantLinear(weight, None, rounding.model_copy(update={"negative_scales": True}))
    asked.start_from(negative)
    assert torch.equal(asked.quantized.scale, negative.scale)
    assert torch.equal(asked.quantized.codes, negative.codes)
