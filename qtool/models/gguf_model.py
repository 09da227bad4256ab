"""The float model of a GGUF file, read by transformers and written as a folder with safetensors.

transformers dequantizes the tensors and undoes what llama.cpp changes of them: the order of the rows of query and key,
what it adds to norms. It drops tensors that it has no place for; here the weights are counted, so that none is lost.
"""

import json
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoConfig, modeling_gguf_pytorch_utils

from qtool.models.auto_class import auto_class
from qtool.models.gguf_config import FREQUENCIES
from qtool.models.gguf_header import read_header
from qtool.models.gguf_view import TOKENIZER, source_of
from qtool.models.quiet import without_progress_bars
from qtool.system import progress, units
from qtool.system.errors import InputError
from qtool.system.reading import read_object
from qtool.system.tensors import dtype_name
from qtool.system.writing import write_text

# dtype that is written, by the most frequent type of matrices in the file; quantized ones are written in bfloat16
DTYPES = {"F64": torch.float32, "F32": torch.float32, "F16": torch.float16}


class GGUFModel:
    """The float model of a folder that ``gguf_view.view`` has made, in the dtype that a recipe asks for."""

    def __init__(self, folder: Path, dtype: str) -> None:
        """Read the header; ``dtype`` is ``model.dtype`` of the recipe, ``auto`` or a name."""
        self.folder, self.file = folder, source_of(folder)
        self.header = read_header(self.file)
        self.num_weights = sum(tensor.num_weights for tensor in self.header.tensors if tensor.name != FREQUENCIES)
        kinds: Counter[str] = Counter()
        for tensor in self.header.tensors:
            kinds[tensor.kind] += tensor.num_weights
        most, _ = kinds.most_common(1)[0]
        self.dtype: torch.dtype = DTYPES.get(most, torch.bfloat16) if dtype == "auto" else getattr(torch, dtype)

    def status(self) -> list[object]:
        """Return what tells this model from others: file, size, time of change, and dtype."""
        status = self.file.stat()
        return [str(self.file), status.st_size, status.st_mtime_ns, dtype_name(self.dtype)]

    def note(self) -> str:
        """Return a sentence that says what is expanded, for users."""
        name = dtype_name(self.dtype)
        return f"the weights of {self.file.name} are {self.header.kinds()}; they are expanded to {name}"

    def write(self, out: Path) -> None:
        """Write weights and tokenizer into ``out``; one copy of the model is in memory.

        Raises:
            InputError: the disk has no room, weights do not fit the model, or some are not finite in the dtype.
        """
        needed = self.num_weights * self.dtype.itemsize
        if needed > (free := shutil.disk_usage(out).free):
            raise InputError(
                f"{self.file} is expanded to {units.size(needed)} in {out}, and the disk has {units.size(free)} free; "
                "free some space, or set TMPDIR, and for a run output.path, to a folder on another disk"
            )
        model = self._read()
        tensors: dict[str, Any] = dict(model.named_parameters())
        for name, tensor in tensors.items():
            if not tensor.isfinite().all():
                raise InputError(
                    f"{self.file}: {name} has values that are not finite in {dtype_name(self.dtype)}; set model.dtype "
                    "to bfloat16 or float32, or download the file again"
                )
        with without_progress_bars():
            model.save_pretrained(out)
        (out / "config.json").unlink()
        for each in TOKENIZER:
            if (self.folder / each).is_file():
                shutil.copyfile(self.folder / each, out / each)
        raw = read_object(self.folder / "config.json") | {"dtype": dtype_name(self.dtype)}
        del raw["quantization_config"]
        write_text(out / "config.json", json.dumps(raw, indent=2))  # last: it says that the folder is complete

    def _read(self) -> Any:  # Any: models have no common class
        config = AutoConfig.from_pretrained(self.folder, trust_remote_code=False)
        del config.quantization_config
        with torch.device("meta"):
            self._check(auto_class(config).from_config(config, trust_remote_code=False), ())
        options: dict[str, Any] = {}
        if hasattr(transformers, "GgufConfig"):  # of newer versions, which may keep the weights in blocks
            options["quantization_config"] = transformers.GgufConfig(dequantize=True)
        with without_progress_bars(), _shown():
            model, info = auto_class(config).from_pretrained(
                self.folder,
                config=config,
                gguf_file=self.file.name,
                dtype=self.dtype,
                output_loading_info=True,
                trust_remote_code=False,
                **options,
            )
        self._check(model, sorted(map(str, {*info["missing_keys"], *info["mismatched_keys"]})))
        model.is_quantized = False  # it is an ordinary model, which can be saved
        for owner in (model, model.config):
            for attribute in ("hf_quantizer", "quantization_method", "quantization_config"):
                if attribute in vars(owner):
                    delattr(owner, attribute)
        return model

    def _check(self, model: nn.Module, lost: Sequence[str]) -> None:
        """Refuse a ``model`` that has other weights than the file, of which it lacks ``lost``.

        transformers fills weights that are not in the file with random numbers, and drops those that it does not know.
        """
        found = sum(parameter.numel() for parameter in model.parameters())
        if lost or found != self.num_weights:
            raise InputError(
                f"{self.file} holds {self.num_weights:,} weights, and the model that its metadata describes has "
                f"{found:,}" + (f", of which {lost[0]} is not in the file" if lost else "") + "; "
                "use the model's own folder with safetensors"
            )


@contextmanager
def _shown() -> Iterator[None]:
    """Show the progress of transformers' reader as that of qtool, in the place of a bar on standard error."""
    reader: Any = modeling_gguf_pytorch_utils
    theirs = reader.tqdm
    reader.tqdm = lambda tensors, **_: progress.track(tensors, "expanding the tensors of the file", len(tensors))
    try:
        yield
    finally:
        reader.tqdm = theirs
