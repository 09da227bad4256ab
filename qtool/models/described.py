"""The model that a ``config.json`` describes, on the meta device: names, shapes and classes, without weights.

It answers what can be known before the weights are read, or where there are none: which linears a recipe quantizes and
with what grids. No weight file is opened.
"""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig

from qtool.config.quant import QuantConfig, QuantSpec
from qtool.config.sections import ModelConfig
from qtool.models import experts, quantized_sources
from qtool.models.auto_class import auto_class
from qtool.models.folders import read_config, resolve
from qtool.models.linears import decoder_blocks, linear_shapes
from qtool.models.loaded import LoadedModel
from qtool.models.tables import Tables, select_tables
from qtool.models.targets import select_targets
from qtool.models.uncalled import no_plain_linears
from qtool.system import progress
from qtool.system.errors import InputError, first_line

CONFIGS = ["config.json", "generation_config.json"]  # files of a model that are enough to describe it
KNOWN = (-1.0, 1.0)  # extremes of a weight that is not read: those of an ordinary one


def skeleton(folder: Path) -> Any:  # Any: models have no common class
    """Return the float model of a folder's ``config.json`` on the meta device.

    Raises:
        InputError: transformers makes no model of it.
    """
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        if hasattr(config, "quantization_config"):
            del config.quantization_config
        with torch.device("meta"):
            return auto_class(config).from_config(config, trust_remote_code=False)
    except Exception as error:  # transformers raises errors of many kinds for a config that it cannot use
        raise InputError(
            f"{folder}: transformers makes no model of its config.json: {first_line(error):.200}"
        ) from error


def described_model(config: ModelConfig, *, weights: bool = True) -> LoadedModel:
    """Return the model of a recipe on the meta device, without a tokenizer.

    Without ``weights``, only the configs of a model of the hub are downloaded.

    Raises:
        InputError: there is no such model, it is quantized already, or transformers makes no model of it.
    """
    folder = resolve(config.path) if weights else resolve(config.path, files=CONFIGS)
    raw = read_config(folder)
    quantized_sources.refuse_quantized(config.path, raw)
    model = skeleton(folder)
    experts.unfuse(model)
    model.eval().requires_grad_(False)
    dtype = model.config.get_text_config().dtype or model.config.dtype or torch.bfloat16
    names = [name for name, parameter in model.named_parameters(remove_duplicate=False)]
    tokenizer: Any = None
    loaded = LoadedModel(
        model,
        tokenizer,
        config.path,
        folder,
        dict.fromkeys(names, dtype),
        extremes=dict.fromkeys(names, KNOWN),
    )
    loaded.odd_linears = _odd_linears(loaded)
    return loaded


def _odd_linears(loaded: LoadedModel) -> dict[str, str]:
    """Return the linears that a packed layer cannot stand for, as far as a run without values shows them."""
    try:
        return no_plain_linears(loaded.model, loaded.blocks())
    except InputError:  # the run itself looks again, with values
        return {}


def selected(loaded: LoadedModel, quant: QuantConfig) -> tuple[dict[str, QuantSpec | None], Tables]:
    """Return the grid of each linear of the blocks (``None``: it stays in floating point), and the quantized tables.

    Nothing is said of weights that stay in floating point: the run itself says it.

    Raises:
        InputError: a linear or a table cannot be quantized with its grid.
    """
    with progress.use(progress.Sink()):
        targets, tables = select_targets(loaded, quant), select_tables(loaded, quant)
    specs: dict[str, QuantSpec | None] = dict.fromkeys(linear_shapes(loaded.blocks()))
    return specs | {target.name: target.spec for target in targets}, tables


def keep_first(loaded: LoadedModel, count: int) -> None:
    """Leave the first ``count`` decoder blocks in the model: a probe of what one block costs."""
    del decoder_blocks(loaded.model)[1][count:]
