"""The end of a model: what it makes of its final hidden states, which its last norm gives, logits of the vocabulary.

Logits are the largest tensors of a model with a large vocabulary. A ``Readout`` gives them for a few tokens at a time,
so that they need never exist whole. It runs the model's own forward with its decoder replaced by the hidden states
that are asked about, so a bias, a soft cap, a scale and a packed head are computed by the model's own code.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils.generic import ModelOutput

from qtool.models.block_calls import Stop, hidden_of, with_hidden
from qtool.models.linears import decoder_blocks
from qtool.system.errors import InputError

NUM_COMPARED = 8  # number of tokens whose logits are compared with those of the whole model
TOLERANCE = 0.02  # largest difference of logits, as a share of the largest logit: rounding of bfloat16 stays below


class Readout:
    """The end of ``model``: the final hidden states, which its ``decoder`` returns, and the logits of any of them."""

    def __init__(self, model: nn.Module, decoder: nn.Module) -> None:
        """Watch ``decoder``, the part of ``model`` that is all but its output head."""
        self.model, self.decoder = model, decoder
        self._with_hidden: Callable[[Tensor], Any] | None = None  # makes what the decoder returns of hidden states

    def hidden(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """Return the final hidden states ``[b, t, d]`` of ``inputs``, the arguments of the model's forward."""
        found: list[Tensor] = []

        def record(module: nn.Module, args: Any, output: Any) -> None:
            found.append(_final(output))
            self._with_hidden = _maker(output)
            raise Stop

        handle = self.decoder.register_forward_hook(record)
        try:
            with suppress(Stop):
                self.model(**inputs, use_cache=False)
        finally:
            handle.remove()
        return found[0]

    def logits(self, hidden: Tensor) -> Tensor:
        """Return the logits ``[n, vocabulary]`` of final hidden states ``[n, d]``; call :meth:`hidden` once before."""
        assert self._with_hidden is not None, "the readout has seen no forward of the model"
        tokens = torch.zeros(1, hidden.shape[0], dtype=torch.int64, device=hidden.device)
        with _giving(self.decoder, self._with_hidden(hidden[None])):
            logits: Tensor = self.model(input_ids=tokens, use_cache=False).logits
        return logits[0]

    @property
    def device(self) -> torch.device:
        """The device of the model's first tensor, which reads tokens."""
        return next(self.model.parameters()).device

    @property
    def parameters(self) -> list[nn.Parameter]:
        """The parameters that train and that the logits depend on, besides the hidden states."""
        within = set(self.decoder.parameters())
        head = getattr(self.model, "get_output_embeddings", lambda: None)()
        of_head = set(head.parameters()) if isinstance(head, nn.Module) else set()
        return [p for p in self.model.parameters() if p.requires_grad and (p not in within or p in of_head)]


@torch.no_grad()
def readout_of(model: nn.Module, tokens: Tensor) -> Readout | None:
    """Return the readout that gives the logits of the forward of ``model``, on some of ``tokens`` ``[n, t]``.

    ``None`` if there is no such readout: the model makes its logits of more than its final hidden states.
    """
    few = tokens[:1, :NUM_COMPARED]
    expected: Tensor = model(input_ids=few, use_cache=False).logits[0]
    for decoder in _decoders(model):
        readout = Readout(model, decoder)
        try:
            found = readout.logits(readout.hidden({"input_ids": few})[0])
        except Exception:  # a module of another form can fail in any way
            continue
        if found.shape == expected.shape:
            difference = (found.float() - expected.float()).abs().max()
            if bool(difference <= TOLERANCE * expected.float().abs().max()):
                return readout
    return None


def _decoders(model: nn.Module) -> Iterator[nn.Module]:
    """Yield the modules that may be all of ``model`` but its head: those around the blocks, the outermost first."""
    base = getattr(model, "base_model", model)
    if base is not model:
        yield base
    with suppress(InputError):  # two stacks of blocks, which can be measured, but not quantized
        path = decoder_blocks(model)[0].split(".")
        yield from (model.get_submodule(".".join(path[:count])) for count in range(1, len(path)))


def _final(output: Any) -> Tensor:
    """Return the final hidden states in what a decoder returned."""
    return hidden_of(tuple(output.values()) if isinstance(output, ModelOutput) else output)


def _maker(output: Any) -> Callable[[Tensor], Any]:
    """Return a function that puts final hidden states into a form like ``output``, which a decoder returned."""
    if isinstance(output, ModelOutput):
        kind = type(output)
        return lambda hidden: kind(last_hidden_state=hidden)
    empty = type(output)(None for _ in output) if isinstance(output, tuple | list) else None
    return partial(with_hidden, empty)


@contextmanager
def _giving(body: nn.Module, made: Any) -> Iterator[None]:
    """Let ``body`` return ``made`` inside the ``with`` block."""
    body.forward = lambda *args, **kwargs: made  # on the instance, removed below
    try:
        yield
    finally:
        del body.forward
