"""End-loss weights: the gradients of the float model's loss say which tokens and channels an error costs most at.

The loss ``L`` is cross entropy, summed over tokens. To second order, an error ``dy`` of the outputs ``y`` of a linear
raises it by ``1/2 sum_t (g_t dy_t)**2`` in the mean over labels, with ``g = dL/dy`` (the Fisher information). Averaged
over the output channels it is a weight of each token, ``m_t = mean_j g_tj**2``, and GPTQ's Hessian becomes
``2/n sum_t m_t x_t x_t^T`` (arXiv 2505.07004, which averages over slices of the channels). The loss of training a block
becomes ``sum_tc r_t f_c dy_tc**2``, with the same mean ``r_t`` over the channels of the block's output, and
``f_c = sum_t g_tc**2 / r_t``.

Where we differ: labels can be drawn from the model, because the gradients of the text's labels are the Fisher
information only of a model that is right; ``m`` and ``r`` are limited to a quantile, as the first tokens of windows
otherwise outweigh the rest; in ``f`` every token counts the same; and an exponent below 1 weakens the weights, which
make the number of tokens that count smaller.

The pass goes block by block, forwards and then backwards, and has one block of a streamed model in memory at a time.
It holds the hidden states that enter each block for as many batches of windows as fit ``data.memory_budget``, and
computes a block again for its gradient. A sum over tokens, unlike a mean, has gradients of a size that bfloat16 and
squares in float32 hold. What is found of each batch is a file in the workspace, so a run that was killed goes on.
Several processes share the batches.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qtool.blocks.driver import brought_in, walk
from qtool.blocks.hidden_states import Batch, HiddenStates, beside_of
from qtool.blocks.job import Job
from qtool.blocks.shares import owner
from qtool.blocks.stages import Stage
from qtool.blocks.states import BlockStates, windows_per_batch
from qtool.blocks.task import BlockTask, Rows
from qtool.checkpoints.files import SafetensorsFolder, write_shard
from qtool.config.guided import GuidedConfig
from qtool.config.sections import IGNORED
from qtool.models.experts import num_experts
from qtool.models.linears import weight_of
from qtool.models.tables import unpacked
from qtool.system import distributed, progress
from qtool.system.errors import InputError, RunError
from qtool.system.seeds import derived_seed
from qtool.training.losses import text_loss
from qtool.training.sliced import slices_of, summed

PHASE = "guided"  # folder in the workspace
TOKENS, CHANNELS = "tokens", "channels"  # what is kept of a block's output: mean squares [b, t], sum of squares [d]


@dataclass(frozen=True)
class EndLoss:
    """Squared gradients of the loss at the outputs of linears, or of blocks, of each batch in turn."""

    config: GuidedConfig
    batches: Sequence[Callable[[str], Tensor]]  # each returns what was found of a batch of windows, by name

    def _of(self, name: str) -> list[Tensor]:
        return [batch(name) for batch in self.batches]

    def of_linear(self, name: str) -> Tensor:
        """Return the weights of tokens ``[n * t, slices]`` of a linear, in the order of its inputs; means are 1."""
        squares = torch.cat(self._of(name))
        return torch.stack([weights(column, self.config) for column in squares.unbind(1)], 1)

    def of_block(self, name: str) -> tuple[Tensor, Tensor]:
        """Return the weights of tokens ``[n, t]`` and of channels ``[d]`` of a block's output; both have mean 1."""
        squares = torch.cat(self._of(f"{name}.{TOKENS}"))
        channels = torch.stack(self._of(f"{name}.{CHANNELS}")).sum(0)
        tokens = weights(squares.flatten(), self.config).view_as(squares)
        return tokens, weights(channels, self.config.model_copy(update={"clip": 1.0}))


def weights(squares: Tensor, config: GuidedConfig) -> Tensor:
    """Return weights with mean 1 from squared gradients ``[n]``, which are limited to a quantile and raised to a power.

    Where no gradient is above zero, all weights are 1.
    """
    limit = squares.kthvalue(max(1, round(config.clip * len(squares)))).values
    limit = limit if float(limit) else squares.amax()
    if not float(limit):
        return torch.ones_like(squares)
    found = (squares / limit).clamp(max=1).pow(config.power)
    return found / found.mean()


def end_loss(job: Job, config: GuidedConfig, slices: int = 0) -> EndLoss | None:
    """Return the squared gradients on the text of the job, ``None`` if ``config`` asks for no weights.

    With ``slices``, those at the outputs of the targets in decoder blocks, each the mean over a slice of the channels;
    with 0, those at the outputs of blocks. The model of the job must be the float model, but for packed embeddings.

    Raises:
        InputError: The model or the text cannot be differentiated.
        RunError: A gradient is not finite.
    """
    if not config.power:
        return None
    size = windows_per_batch(job)
    starts = range(0, len(job.text), size)
    folder = job.workspace.phase(PHASE) if job.workspace else None
    files = [folder / f"{start:06d}.safetensors" for start in starts] if folder else []
    if folder:
        folder.mkdir(exist_ok=True)
    found: list[Callable[[str], Tensor]] = []
    rank, count = distributed.place() if files else (0, 1)  # without files, each process needs all
    left = [i for i in range(len(starts)) if not files or (owner(i, count) == rank and not files[i].exists())]
    with unpacked(job.loaded.model, job.tables), progress.stage("gradients of the loss"):
        _check(job, slices > 0)
        while left:
            some = left[: _batches_at_once(job, size)]
            left = left[len(some) :]
            windows = torch.cat([torch.arange(len(job.text))[starts[i] : starts[i] + size] for i in some])
            seeds = [derived_seed(job.seed, i) for i in some]
            for number, each in zip(some, _gradients(_part(job, windows), config, slices, seeds), strict=True):
                if not all(bool(x.isfinite().all()) for x in each.values()):
                    raise RunError("a gradient of the float model's loss is not finite; set method.guided.power to 0")
                if files:
                    write_shard(each, files[number])
                else:
                    found.append(each.__getitem__)
    distributed.barrier()
    return EndLoss(config, [SafetensorsFolder(file.parent, file.name).tensor for file in files] or found)


def block_weights(guide: EndLoss | None, task: BlockTask) -> tuple[Tensor, Tensor] | None:
    """Return the weights of the loss of a block; a head, whose inputs are no tokens, has none."""
    return None if guide is None or task.is_head else guide.of_block(task.name)


def weighted(stage: Stage, weights: Tensor) -> Stage:
    """Return ``stage`` with its inputs times the root of the weights ``[tokens]`` of all batches, in float32."""

    def rooted(inputs: Iterable[Rows]) -> Iterator[Rows]:
        start = 0
        for x, _ in inputs:
            part = weights[start : start + len(x)].to(x.device).sqrt()
            start += len(x)
            yield Rows(x.float() * part.unsqueeze(1))
        assert start == len(weights), "weights are those of the tokens that the linear reads"

    floats = None if stage.float_inputs is None else rooted(stage.float_inputs)
    return Stage(stage.targets, rooted(stage.inputs), floats)


def _check(job: Job, linears: bool) -> None:
    """Refuse what has no gradients of the loss."""
    loaded = job.loaded
    if job.pictures:
        raise InputError("method.guided reads text only, and the calibration data has pictures; leave it out")
    if loaded.dtype == torch.float16:
        raise InputError(
            "method.guided: gradients do not fit float16; set model.dtype to bfloat16 or float32, or leave it out"
        )
    if linears and (mixed := [target.name for target in job.targets if num_experts(target.linear) > 1]):
        raise InputError(
            f"method.guided: {mixed[0]} holds the experts of a mixture, which get other tokens in the quantized model; "
            "leave method.guided out, or use efficientqat or signround, which weigh the outputs of blocks"
        )


def _part(job: Job, windows: Tensor) -> Job:
    """Return the job with some of its windows."""
    return replace(job, tokens=job.text[windows], labels=None if job.labels is None else job.labels[windows])


def _batches_at_once(job: Job, size: int) -> int:
    """Return the number of batches of ``size`` windows whose hidden states, of all blocks, fit the memory budget."""
    if job.workspace is None:
        return len(job.text)
    width = weight_of(job.loaded.model.get_input_embeddings()).shape[-1]
    states = len(job.loaded.blocks()) + 3  # the inputs of blocks, the last output, and two gradients
    return max(
        1, job.workspace.memory_budget // (states * size * job.text.shape[1] * width * job.loaded.dtype.itemsize)
    )


@torch.no_grad()
def _gradients(job: Job, config: GuidedConfig, slices: int, seeds: Sequence[int]) -> list[dict[str, Tensor]]:
    """Return what is kept of each batch of the job's windows."""
    states = BlockStates(job, job.loaded.dtype, with_float_states=False)
    tasks: list[BlockTask] = []
    for task in walk(job, states):
        if any(call.shared or call.carried for call in task.calls.values()):
            raise InputError(
                f"method.guided: blocks of {job.loaded.path} read keys, values or results of earlier blocks, through "
                "which no gradient is known; leave method.guided out"
            )
        tasks.append(task)
    text = job.text if job.labels is None else job.labels
    labels = text.split(states.inputs[0].shape[0])
    states.ending.check("method.guided")
    gradients = states.inputs.like()
    for index, seed in enumerate(seeds):
        gradients.append(_at_last_output(states, index, labels[index], None if config.loss == "text" else seed))
    found: list[dict[str, Tensor]] = [{} for _ in seeds]
    for task in progress.track(tasks[::-1], "gradients of blocks", len(tasks)):
        before = gradients.like()
        with brought_in(task.block, job.loaded):
            for hidden, gradient, keep in zip(task.inputs, gradients, found, strict=True):
                if not slices:
                    squares = gradient.float().square()
                    tokens = squares.mean(-1)
                    keep[f"{task.name}.{TOKENS}"] = tokens.cpu()
                    shares = torch.where(tokens > 0, 1 / tokens, 0).unsqueeze(-1)
                    keep[f"{task.name}.{CHANNELS}"] = (squares * shares).flatten(0, -2).sum(0).cpu()
                before.append(_through(task, hidden, gradient, keep, slices))
        gradients, task.inputs = before, HiddenStates(None)
    return found


def _at_last_output(states: BlockStates, index: int, labels: Tensor, seed: int | None) -> Tensor:
    """Return the gradient ``[b, t, d]`` of the loss of a batch at the output of the last block.

    With a ``seed``, learned tokens are drawn from the model; ``None``: they are those of ``labels`` ``[b, t]``.
    """
    leaf = states.inputs[index].as_subclass(Tensor).detach().requires_grad_()
    following = F.pad(labels[:, 1:], (0, 1), value=IGNORED).flatten().to(leaf.device)

    def part(hidden: Tensor, rows: slice) -> Tensor:
        logits, wanted = states.ending.logits(hidden, floats=True), following[rows]
        if seed is not None:
            generator = torch.Generator(logits.device).manual_seed(derived_seed(seed, rows.start))
            drawn = logits.detach().float().softmax(-1).multinomial(1, generator=generator).squeeze(1)
            wanted = torch.where(wanted == IGNORED, wanted, drawn)
        return text_loss(logits, wanted)

    with torch.enable_grad():
        hidden = states.ending.hidden(leaf, [(index, row) for row in range(len(leaf))])
        slices = slices_of(len(hidden), states.ending.vocabulary, hidden.device)
        (gradient,) = torch.autograd.grad(summed(part, hidden, slices), leaf)
    return gradient


def _through(task: BlockTask, hidden: Tensor, gradient: Tensor, keep: dict[str, Tensor], slices: int) -> Tensor:
    """Return the gradient at the input of a block, of that at its output; keep what the linears' outputs get."""
    leaf = hidden.as_subclass(Tensor).detach().requires_grad_()
    entering = Batch.of(leaf, beside) if (beside := beside_of(hidden)) else leaf
    with torch.enable_grad(), _watched(task, keep, slices):
        output = task.forward(entering).as_subclass(Tensor)
        (found,) = torch.autograd.grad(output, leaf, gradient.as_subclass(Tensor))
    return found


@contextmanager
def _watched(task: BlockTask, keep: dict[str, Tensor], slices: int) -> Iterator[None]:
    """Keep the mean squares ``[rows, slices]`` of the gradients at the outputs of the targets' first calls."""

    def watch(name: str, output: Tensor) -> None:
        def take(gradient: Tensor) -> None:
            squares = gradient.flatten(0, -2).float().square()
            keep[name] = torch.stack([part.mean(1) for part in squares.tensor_split(slices, 1)], 1).cpu()

        if name not in keep:
            keep[name] = output.new_zeros(output.shape[:-1].numel(), slices, dtype=torch.float32).cpu()
            if output.requires_grad:
                output.register_hook(take)

    handles = []
    for target in task.targets if slices else ():

        def hook(module: nn.Module, args: Any, output: Tensor, name: str = target.name) -> None:  # Any: of any linear
            watch(name, output)

        handles.append(target.linear.register_forward_hook(hook))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
