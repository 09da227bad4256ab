"""Token files: windows of tokens that another program made, used unchanged."""

from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from qtool.config.sections import IGNORED
from qtool.system.errors import InputError, first_line
from qtool.system.tensors import dtype_name

SUFFIXES = (".npy", ".safetensors")
KINDS = (torch.int32, torch.int64)  # dtypes that tokens may have


def read_windows(path: Path, shape: tuple[int, int], vocabulary: int) -> tuple[Tensor, Tensor | None]:
    """Return the windows of a file in its order: ``tokens`` ``[n, t]`` int64, and ``labels`` of that shape or ``None``.

    A ``.npy`` file holds one array. A ``.safetensors`` file holds ``tokens``, or one tensor of any name, and perhaps
    ``labels``: -100, or the token at the same position.

    Raises:
        InputError: the file cannot be read, has another ``shape``, or has tokens outside ``0 .. vocabulary - 1``.
    """
    tokens, labels = _numpy(path) if path.suffix == ".npy" else _safetensors(path)
    for name, tensor in (("tokens", tokens), ("labels", labels)):
        if tensor is not None and (tensor.dtype not in KINDS or tensor.dim() != 2):
            kind = dtype_name(tensor.dtype)
            raise InputError(
                f"{path}: {name} are {kind} {list(tensor.shape)}; int32 or int64 [windows, length] was expected"
            )
    if tuple(tokens.shape) != shape:
        found = f"data.num_samples: {tokens.shape[0]} and data.seq_len: {tokens.shape[1]}"
        raise InputError(
            f"{path} holds {tokens.shape[0]} windows of {tokens.shape[1]} tokens, and the recipe asks for {shape[0]} "
            f"of {shape[1]}; a token file is used as a whole: set {found}"
        )
    outside = (tokens < 0) | (tokens >= vocabulary)
    if outside.any():
        row, column = (int(index) for index in outside.nonzero()[0])
        raise InputError(
            f"{path}: window {row}, position {column} is token {int(tokens[row, column])}; this model has "
            f"{vocabulary} tokens, from 0 on; make the file with the tokenizer of this model"
        )
    if labels is None:
        return tokens.long(), None
    if labels.shape != tokens.shape or not ((labels == IGNORED) | (labels == tokens)).all():
        raise InputError(f"{path}: labels must have the shape of tokens, and {IGNORED} or the token at each position")
    if not (labels[:, 1:] != IGNORED).any(1).all():
        raise InputError(f"{path}: a window has no token to learn: all its labels are {IGNORED}; leave that window out")
    return tokens.long(), labels.long()


def _numpy(path: Path) -> tuple[Tensor, None]:
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)  # mapped: a header may promise more than the file has
        if not isinstance(array, np.ndarray):
            raise ValueError("it is an archive of several arrays")
        return torch.from_numpy(array.astype(array.dtype.newbyteorder("="))), None
    except Exception as error:  # numpy evaluates the header: a damaged one raises errors of any kind
        raise InputError(f"{path} cannot be read as one NumPy array of integers: {first_line(error)}") from None


def _safetensors(path: Path) -> tuple[Tensor, Tensor | None]:
    try:
        with safe_open(path, framework="pt") as file:
            names = list(file.keys())
            name = names[0] if len(names) == 1 else "tokens"
            if name not in names:
                raise InputError(
                    f"{path} holds the tensors {', '.join(names) or 'none'}; one named tokens was expected"
                )
            return file.get_tensor(name), file.get_tensor("labels") if name != "labels" and "labels" in names else None
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path} cannot be read as safetensors: {error}") from None
