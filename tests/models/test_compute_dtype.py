"""A dtype of computation that a value of the model exceeds is refused, however the model is loaded."""

import re
from pathlib import Path

import pytest
import torch
from helpers import tiny

from qtool.config.quant import QuantConfig
from qtool.config.sections import ModelConfig
from qtool.models.loading import load_model
from qtool.system.errors import InputError

HUGE = 99_840.0  # a bfloat16 above the range of float16
NORM = "model.layers.0.input_layernorm.weight"


def huge(folder: Path) -> Path:
    floats = tiny.llama(folder)
    norm = tiny.stored(floats)[NORM]
    norm[3] = -HUGE
    tiny.change(floats, **{NORM: norm})
    return floats


@pytest.mark.parametrize("streamed", [True, False])
@pytest.mark.parametrize("quantized", [True, False])
def test_it_is_refused_with_the_tensor_and_its_largest_value(streamed: bool, quantized: bool, tmp_path: Path) -> None:
    config = ModelConfig(path=str(huge(tmp_path / "m")), dtype="float16", device="cpu")
    expected = f"{NORM} has values of up to {HUGE:g}, and float16, in which the model would compute, holds none above"
    with pytest.raises(InputError, match=re.escape(expected)):
        load_model(config, streamed=streamed, quantized=quantized)
    wider = config.model_copy(update={"dtype": "bfloat16"})
    assert load_model(wider, streamed=streamed, quantized=quantized).dtype == torch.bfloat16


def test_a_packed_checkpoint_is_refused_too(tmp_path: Path) -> None:
    tiny.quantize(huge(tmp_path / "m"), tmp_path / "q", QuantConfig(group_size=32))
    with pytest.raises(InputError, match=rf"{re.escape(NORM)} has values of up to {HUGE:g}"):
        load_model(ModelConfig(path=str(tmp_path / "q"), dtype="float16", device="cpu"), quantized=True)


def test_an_infinity_in_the_file_is_no_matter_of_the_dtype(tmp_path: Path) -> None:
    floats = tiny.llama(tmp_path / "m")
    norm = tiny.stored(floats)[NORM]
    norm[3] = float("inf")
    tiny.change(floats, **{NORM: norm})
    with pytest.raises(InputError, match=r"holds 1 NaN or infinite value.*repair the checkpoint"):
        load_model(ModelConfig(path=str(floats), dtype="float16", device="cpu"))
