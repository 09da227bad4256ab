"""Every export is read back, by code that shares nothing with the writer, before it gets its name.

The same readers let ``qtool eval`` measure an export, ours or another tool's, without that engine being installed.
"""

from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor, nn

from qtool.checkpoints.native import Source
from qtool.config import plugins
from qtool.config.sections import ModelConfig
from qtool.exporters import _base as formats
from qtool.exporters._base import Exporter
from qtool.exporters._folder import write_folder
from qtool.models.folders import check_files, read_config, resolve
from qtool.models.linears import packed_linears, replace_linear
from qtool.models.loaded import LoadedModel, most_common
from qtool.models.loading import choose_device, compute_dtype, load_model
from qtool.quant.affine import dequantize
from qtool.system.errors import RunError
from qtool.system.tensors import dtype_name

TOLERANCE = 1e-5  # of the largest logit, float32 on CPU: the weights are equal, the order of sums may not be


@torch.no_grad()
def verify(source: Source, out: Path, exporter: Exporter, *, rounded: bool) -> dict[str, float]:
    """Compare every weight and the logits of a fixed probe; returns the largest differences.

    With ``rounded`` (a dtype that was asked for does not hold the weights) differences are returned, not refused.

    Raises:
        RunError: naming the first tensor that differs, or the logits' difference.
    """
    loaded = load_model(ModelConfig(path=str(source.folder), dtype="float32", device="cpu"), quantized=True)
    probe = torch.randint(loaded.model.config.get_text_config().vocab_size, (1, 32), generator=_seeded())
    ours = loaded.model(probe).logits
    worst = 0.0
    opened = exporter.open(out)
    for name, layer in packed_linears(loaded.model).items():
        weight = exporter.read(opened, name)
        expected = dequantize(*source.quantized(name))
        if weight.shape != expected.shape:
            raise RunError(f"{name} was exported as {list(weight.shape)}; {list(expected.shape)} was expected")
        worst = max(worst, float((weight - expected).abs().max()))
        if not rounded and not torch.equal(weight, expected):
            raise RunError(f"{name} differs after export by up to {worst:.3g}; the export was not kept")
        replace_linear(loaded.model, name, _linear(weight, layer.bias))
    for name in source.float_names():
        stored, read = source.tensor(name), opened.tensor(name)
        if not rounded and not torch.equal(stored.float(), read.float()):
            raise RunError(f"{name} differs after export; the export was not kept")
    ignored = ("quantization_config", "quantization", "dtype", "torch_dtype")
    described = opened.config, read_config(source.folder)
    theirs, mine = ({k: v for k, v in config.items() if k not in ignored} for config in described)
    if theirs != mine:
        changed = min(k for k in theirs.keys() | mine.keys() if theirs.get(k) != mine.get(k))
        raise RunError(f"config.json differs after export, in {changed}; the export was not kept")
    logits = float((loaded.model(probe).logits - ours).abs().max() / ours.abs().max())
    if not rounded and not logits <= TOLERANCE:
        raise RunError(f"logits differ after export by {logits:.3g} of the largest (allowed: {TOLERANCE:g})")
    return {"weight_difference": worst, "logit_difference": logits}


def load_exported(config: ModelConfig) -> LoadedModel | None:
    """An exported folder as a float model with its weights expanded; ``None`` when it is no such folder."""
    folder = resolve(config.path)
    exporter = next((each for each in map(formats.get, plugins.export_formats()) if each.recognises(folder)), None)
    if exporter is None:
        return None
    # expanded weights are float32, whatever the export computes in
    stored = any(folder.glob("*.safetensors"))
    own = most_common(check_files(folder)) if stored else getattr(torch, read_config(folder)["dtype"])
    dtype = compute_dtype(config.dtype, own, choose_device(config.device))
    config = config.model_copy(update={"dtype": dtype_name(dtype)})
    opened = exporter.open(folder)
    packed = opened.packed()
    with TemporaryDirectory() as temporary:
        dense = Path(temporary)
        tensors = {
            name: opened.tensor(name)
            for name in opened.names()
            if name.rpartition(".")[0] not in packed or name.endswith(".bias")
        }
        tensors |= {f"{name}.weight": exporter.read(opened, name).contiguous() for name in packed}
        write_folder(folder, dense, tensors, None, config.dtype)
        loaded = load_model(config.model_copy(update={"path": str(dense)}))
    return replace(loaded, path=config.path, folder=folder)


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias is not None)
    linear.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        linear.bias = nn.Parameter(bias.to(weight.dtype), requires_grad=False)
    return linear


def _seeded() -> torch.Generator:
    return torch.Generator().manual_seed(0)
