"""Reading an ONNX folder: its tensors with the ``onnx`` package, and its logits with ONNX Runtime."""

from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qtool.exporters._folder import WrittenFolder, skeleton
from qtool.exporters._published import published
from qtool.exporters.onnx.packing import unpacked
from qtool.models.folders import check_readable
from qtool.system.errors import InputError

FILE, GENAI = "model.onnx", "genai_config.json"
ENDS = ("", ".transposed", ".plus_one")  # what the builder of the graph did to a float tensor, in its name
QUANTIZED = {"MatMulNBits": 1, "GatherBlockQuantized": 0}  # operators on codes, and which input holds them
DECODED = 4  # tokens that are computed one by one


class ONNXFolder(WrittenFolder):
    """A folder with ``model.onnx``, opened once; tensors are read from the file beside it when asked for."""

    def __init__(self, folder: Path) -> None:
        """Read the graph without its tensors."""
        import onnx

        self.folder = folder
        check_readable(folder)
        graph = onnx.load(folder / FILE, load_external_data=False).graph
        self._stored: dict[str, Any] = {tensor.name: tensor for tensor in graph.initializer}
        makers = {output: node for node in graph.node for output in node.output}
        self._bits: dict[str, int] = {}  # of a code, by the name of a packed weight or a part of one
        for node in graph.node:
            if node.op_type in QUANTIZED:
                codes = node.input[QUANTIZED[node.op_type]]
                codes = makers[codes].input[0] if codes in makers else codes  # codes of a look-up are reshaped
                bits = next(each.i for each in node.attribute if each.name == "bits")
                self._bits[codes.removesuffix(".qweight")] = bits

    @cached_property
    def _parts(self) -> dict[str, list[str]]:
        """The parts that hold rows of each packed weight, in their order, by the name of the weight."""
        found: dict[str, list[tuple[int, str]]] = {}
        for stem in self._bits:
            name, _, start = stem.partition(".rows_")
            found.setdefault(name, []).append((int(start or 0), stem))
        return {name: [stem for _, stem in sorted(parts)] for name, parts in found.items()}

    def packed(self) -> set[str]:
        """Return the names of the quantized linears and embeddings."""
        return set(self._parts)

    def names(self) -> list[str]:
        """Return the published names of all tensors of the model; the builder's own, such as rotary tables, are not."""
        names = published(skeleton(self.folder))
        floats = [name for name in map(names.name, names.model.state_dict()) if self._end(name) is not None]
        return [*dict.fromkeys(floats), *(f"{name}.weight" for name in self._parts)]

    def _end(self, name: str) -> str | None:
        """Return the end of the name under which the file holds the float tensor ``name``, or ``None``."""
        return next((end for end in ENDS if f"{name}{end}" in self._stored), None)

    def _array(self, name: str) -> np.ndarray:
        from onnx import numpy_helper

        if name not in self._stored:
            raise InputError(f"{self.folder / FILE} lacks the tensor {name}")
        array: np.ndarray = numpy_helper.to_array(self._stored[name], base_dir=str(self.folder))
        return array

    def tensor(self, name: str) -> Tensor:
        """Return a float tensor as published checkpoints hold it.

        Of one that is stored plus one, that is a number which gives the stored one again when one is added in float32.
        """
        end = self._end(name)
        stored = torch.from_numpy(self._array(f"{name}{end or ''}").copy())
        if end == ".transposed":
            return stored.T.contiguous()
        return stored - 1 if end == ".plus_one" else stored

    def same(self, name: str, tensor: Tensor) -> bool:
        """Return whether the file holds ``tensor`` in float32, or one plus it where the graph multiplies by that."""
        if self._end(name) == ".plus_one":
            return torch.equal(torch.from_numpy(self._array(f"{name}.plus_one").copy()), 1 + tensor.float())
        return super().same(name, tensor)

    def weight(self, name: str) -> Tensor:
        """Return the weight float32 ``[out, in]`` of a packed linear or embedding."""
        if name not in self._parts:
            raise InputError(f"{self.folder / FILE} holds no codes of {name}")
        rows = []
        for stem in self._parts[name]:
            zeros = self._array(f"{stem}.qzeros") if f"{stem}.qzeros" in self._stored else None
            rows.append(
                unpacked(self._array(f"{stem}.qweight"), self._array(f"{stem}.scales"), zeros, self._bits[stem])
            )
        return torch.cat(rows)

    def dtype(self) -> torch.dtype:
        """Return float32, in which the graph computes."""
        return torch.float32


def logits(folder: Path, tokens: Tensor) -> Tensor:
    """Return the logits float32 ``[1, t, vocabulary]`` of ``tokens`` ``[1, t]``, computed by ONNX Runtime.

    All but the last tokens are computed at once, and the last ones by one each from the KV cache.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(str(folder / FILE), options, providers=["CPUExecutionProvider"])
    inputs = {each.name: each for each in session.get_inputs()}
    caches = {
        name: np.zeros((1, each.shape[1], 0, each.shape[3]), np.float32)
        for name, each in inputs.items()
        if name.startswith("past_key_values.")
    }
    outputs = [each.name for each in session.get_outputs()]
    count, found, done = tokens.shape[1], [], 0
    for new in (max(1, count - DECODED), *[1] * min(DECODED, count - 1)):
        fed = {"input_ids": tokens[:, done : done + new].numpy(), "attention_mask": np.ones((1, done + new), np.int64)}
        if "position_ids" in inputs:
            fed["position_ids"] = np.arange(done, done + new)[None]
        results = dict(zip(outputs, session.run(None, fed | caches), strict=True))
        found.append(torch.from_numpy(results["logits"]))
        caches = {name: results[name.replace("past_key_values.", "present.")] for name in caches}
        done += new
    return torch.cat(found, 1)
