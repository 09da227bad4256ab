"""The loss of the whole model on windows of text: from the logits, or from the final hidden states.

Where the logits of a part of a step are larger than ``sliced.SLICE_BYTES``, they are made for a few tokens at a time
(``models/readout.py``, ``sliced.py``), those of the teacher beside them. Otherwise they are made by one forward.
"""

from collections.abc import Callable, Iterable
from functools import cached_property

import torch
from torch import Tensor, nn

from qtool.config.sections import IGNORED
from qtool.config.training import EndToEndConfig
from qtool.models.loaded import LoadedModel
from qtool.models.readout import Readout, readout_of
from qtool.system import progress
from qtool.system.errors import InputError
from qtool.training.losses import CE, HIDDEN, confidence, hidden_difference, token_losses
from qtool.training.sliced import slices_of, summed

Measure = Callable[[Tensor, Tensor, Tensor], Tensor]
MEASURED_WINDOWS = 16  # number of windows, about, on which the teacher's confidence or hidden states are measured


class TextLoss:
    """The loss ``config.loss`` of the model ``loaded`` on text, where it compares with the float model ``teacher``."""

    def __init__(
        self, loaded: LoadedModel, teacher: nn.Module | None, config: EndToEndConfig, tokens: Tensor, labels: Tensor
    ) -> None:
        """Measure what the loss needs to know of the teacher, on a few of the windows ``tokens`` ``[n, t]``.

        Raises:
            InputError: The loss compares hidden states, which the model does not show.
        """
        assert (teacher is None) == (config.loss == CE)
        self.loaded, self.teacher, self.config = loaded, teacher, config
        self._probed = tokens[:1].to(loaded.device)
        self.gamma, self.mean_square = 0.0, 1.0
        windows = range(0, len(tokens), max(1, len(tokens) // MEASURED_WINDOWS))
        if config.loss == "cakld":
            self.gamma = self._mean_over(windows, tokens, labels, self._confidence)
        if config.loss == HIDDEN:
            if not self._ends:
                raise InputError(f"loss: hidden needs the final hidden states of {loaded.path}, which it does not show")
            self.mean_square = self._mean_over(windows, tokens, labels, self._square) or 1.0

    def summed(self, tokens: Tensor, labels: Tensor) -> Tensor:
        """Return the loss of windows ``[b, t]``, summed over the learned tokens; the first of a window is not one."""
        learned = (labels[:, 1:] != IGNORED).flatten()
        wanted = labels[:, 1:].flatten()[learned]
        if self.config.loss != HIDDEN and not self._in_slices(learned):
            target = None
            if self.teacher is not None:
                with torch.no_grad():
                    target = self._logits(self.teacher, tokens, learned)
            student = self._logits(self.loaded.model, tokens, learned)
            return token_losses(self.config, student, target, wanted, self.gamma).sum()
        own, *others = self._ends
        with torch.no_grad():
            goals = [self._hidden(end, tokens, learned) for end in others]
        hidden = self._hidden(own, tokens, learned)
        if self.config.loss == HIDDEN:
            return hidden_difference(hidden, goals[0]).sum() / self.mean_square

        def part(x: Tensor, rows: slice) -> Tensor:
            with self._autocast():
                target = None
                if others:
                    with torch.no_grad():
                        target = others[0].logits(goals[0][rows])
                student = own.logits(x)
            return token_losses(self.config, student, target, wanted[rows], self.gamma).sum()

        return summed(part, hidden, self._slices(len(hidden)), own.parameters)

    def _slices(self, count: int) -> list[slice]:
        return slices_of(count, self.loaded.num_embeddings, self.loaded.device)

    def _in_slices(self, learned: Tensor) -> bool:
        """Return whether the logits of windows are made in slices; ``learned`` has an element for each of them."""
        return self.config.sharding == "none" and len(self._slices(len(learned))) > 1 and bool(self._ends)

    @cached_property
    def _ends(self) -> list[Readout]:
        """The end of the student and, if there is one, of the teacher; empty if one makes its logits in another way."""
        found = []
        for model in (self.loaded.model, *([] if self.teacher is None else [self.teacher])):
            with self._autocast():
                end = readout_of(model, self._probed)
            if end is None:
                progress.note(
                    f"the logits of {self.loaded.path} are made of more than its final hidden states; they are held "
                    "for all tokens of a step at once"
                )
                return []
            found.append(end)
        return found

    def _autocast(self) -> torch.autocast:
        dtype = self.loaded.dtype
        return torch.autocast(self.loaded.device.type, torch.bfloat16, enabled=dtype == torch.bfloat16)

    def _logits(self, model: nn.Module, tokens: Tensor, learned: Tensor) -> Tensor:
        """Return the logits ``[n, vocabulary]`` that predict the ``learned`` tokens; the first token has none."""
        with self._autocast():
            logits: Tensor = model(input_ids=tokens, use_cache=False).logits
        return _chosen(logits, learned)

    def _hidden(self, end: Readout, tokens: Tensor, learned: Tensor) -> Tensor:
        """Return the final hidden states ``[n, d]`` from which the ``learned`` tokens are predicted."""
        with self._autocast():
            return _chosen(end.hidden({"input_ids": tokens}), learned)

    @torch.no_grad()
    def _mean_over(self, windows: Iterable[int], tokens: Tensor, labels: Tensor, measure: Measure) -> float:
        """Return the mean of ``measure(tokens, labels, learned)`` over the learned tokens of some windows."""
        found = []
        for index in windows:
            own = labels[index : index + 1].to(self.loaded.device)
            learned = (own[:, 1:] != IGNORED).flatten()
            found.append(measure(tokens[index : index + 1].to(self.loaded.device), own[:, 1:].flatten(), learned))
        return float(torch.cat(found).mean())

    def _confidence(self, tokens: Tensor, labels: Tensor, learned: Tensor) -> Tensor:
        """Return the teacher's probability of each learned token of a window."""
        assert self.teacher is not None
        if not self._in_slices(learned):
            return confidence(self._logits(self.teacher, tokens, learned), labels[learned])
        end, wanted = self._ends[1], labels[learned]
        hidden = self._hidden(end, tokens, learned)
        with self._autocast():
            return torch.cat([confidence(end.logits(hidden[rows]), wanted[rows]) for rows in self._slices(len(hidden))])

    def _square(self, tokens: Tensor, labels: Tensor, learned: Tensor) -> Tensor:
        """Return the mean square of the teacher's final hidden state for each learned token of a window."""
        return self._hidden(self._ends[1], tokens, learned).float().square().mean(-1)


def _chosen(states: Tensor, learned: Tensor) -> Tensor:
    """Return the rows of ``[b, t, d]`` that predict the ``learned`` tokens; the last row of a window predicts none."""
    rows = states[:, :-1].flatten(0, 1)
    return rows if learned.all() else rows[learned]
