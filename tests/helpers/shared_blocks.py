"""Methods by blocks that ``test_shared_blocks`` runs in one process, and as ``shared_blocks.py FOLDER`` in two.

The two share the text, and each of them writes what it saw to ``FOLDER/<case>-<process>.pt``.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from helpers import tiny
from helpers.architectures import write
from qtool.blocks import driver, states
from qtool.blocks.job import Job, load_method
from qtool.blocks.states import BlockStates
from qtool.blocks.tables import pack_embeddings
from qtool.config.quant import QuantConfig
from qtool.config.sections import ModelConfig
from qtool.models.linears import packed_weights
from qtool.models.loading import load_model
from qtool.system import distributed
from qtool.system.errors import RunError

LENGTH = 24  # tokens of a window; two windows are a batch
NUM_WINDOWS = 7  # the last batch has one; one process holds four windows, the other three
W3 = QuantConfig(num_bits=3, group_size=16, symmetric=False, scale_dtype="float32")
W8A8 = QuantConfig.model_validate({"num_bits": 4, "group_size": 16, "activations": {"num_bits": 8}})
HEAD = QuantConfig.model_validate(W3.model_dump(exclude={"overrides", "budget"}) | {"head": {"num_bits": 4}})
# Adam and signs make much of rounding errors of small gradients; Adam with this eps does not
STEADY = {"optimizer": "adamw", "eps": 1.0}
TRAINED = {"epochs": 2, "min_steps": 8, "batch_size": 3, "e2e": {"steps": 0}, "optim": STEADY, "validation_samples": 2}


@dataclass(frozen=True)
class Case:
    """A method on a tiny model."""

    method: str
    settings: dict[str, Any] = field(default_factory=dict)
    quant: QuantConfig = W3
    family: str = "untied"
    memory: int = 1 << 30  # bytes of the memory budget


CASES = {
    "rtn": Case("rtn", {"range": "search"}),
    "hqq": Case("hqq"),
    "smoothquant": Case("smoothquant", {"weights": "rtn"}, W8A8),
    "gptq": Case("gptq"),
    "gptq on disk": Case("gptq", memory=1),
    "gptaq": Case("gptq", {"gptaq": 0.25}),
    "gptq head": Case("gptq", quant=HEAD),
    "gptq experts": Case("gptq", {"min_expert_tokens": 80}, family="qwen3_moe"),
    "awq": Case("awq", {"num_ratios": 4, "clip_steps": 3, "search_samples": 4}),
    "awq one sample": Case("awq", {"num_ratios": 4, "clip_steps": 3, "search_samples": 1}),
    "signround": Case("signround", {"iterations": 12, "range": "search", "check_samples": 5}),
    "efficientqat": Case("efficientqat", TRAINED | {"weight_lr": 0.05, "quant_lr": 0.01}),
    "gptq guided": Case("gptq", {"guided": {"power": 0.5, "slices": 2}}),
    "signround guided": Case("signround", {"iterations": 12, "guided": {"power": 0.5}}),
    "predictions": Case("signround", {"iterations": 12, "last_block_loss": "kl"}),
    "gsq": Case("gsq", {"epochs": 2, "min_steps": 6, "optim": STEADY}),
    "few windows": Case("efficientqat", TRAINED | {"batch_size": 1, "weight_lr": 0.05, "quant_lr": 0.01}),
}


def tokens() -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(2, tiny.VOCABULARY, (NUM_WINDOWS, LENGTH), generator=generator)


def models(folder: Path) -> None:
    """Write the float models of all cases."""
    tiny.llama(folder / "untied", dtype=torch.float32)
    write("qwen3_moe", folder / "qwen3_moe")


@contextmanager
def two_windows_at_once() -> Iterator[None]:
    """Put two windows into a batch, however many processes there are: so batches of trainings are the same."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(states, "TOKENS_PER_BATCH", 2 * LENGTH)
        yield


def make_job(case: Case, folder: Path, state: Path) -> Job:
    loaded = load_model(ModelConfig(path=str(folder / case.family), dtype="float32", device="cpu"), streamed=True)
    state.mkdir(parents=True, exist_ok=True)
    workspace = tiny.Kept(state)
    workspace.memory_budget = case.memory
    return pack_embeddings(replace(Job.select(loaded, case.quant, tokens()), workspace=workspace))


def run_case(case: Case, folder: Path, state: Path) -> dict[str, Any]:
    """Run a method, and return its figures, the quantized weights, and all other tensors of the blocks."""
    found: dict[str, Any] = {"held": 0}
    init = BlockStates.__init__

    def counting(self: BlockStates, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs)
        found["held"] = sum(batch.shape[0] for batch in self.inputs)

    with two_windows_at_once(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(BlockStates, "__init__", counting)
        job, method = make_job(case, folder, state), load_method(case.method)
        result = method.run(job, method.config(**case.settings))
    found["series"] = {each.name: list(each.values) for each in result.series}
    found["errors"] = result.weight_errors
    driver.gather(job)
    found["weights"] = {name: tuple(layer.quantized[:3]) for name, layer in packed_weights(job.loaded.model).items()}
    found["rest"] = {name: p.detach().clone() for name, p in job.loaded.model.named_parameters()}
    found["logits"] = tiny.logits(job.loaded.model)
    return found


def differing(folder: Path, state: Path) -> str:
    """Return the error of a run in which the second process changes a code of the second block."""
    case = CASES["gptq"]
    method = load_method(case.method)
    quantize = driver._quantize

    def changed(task: Any, *args: Any) -> Any:
        done = quantize(task, *args)
        if task.index == 1 and not distributed.is_first():
            codes = next(t for name, t in done.tensors.items() if t.dtype == torch.int32 or t.dtype == torch.uint8)
            codes.view(-1)[0] ^= 1
        return done

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(driver, "_quantize", changed)
        with pytest.raises(RunError) as raised:
            method.run(make_job(case, folder, state), method.config())
    return str(raised.value)


def main(folder: Path) -> None:
    """Run every case in this process, one of several that share the text."""
    torch.set_num_threads(1)
    distributed.start(torch.device("cpu"))
    for name, case in CASES.items():
        found = run_case(case, folder, folder / "states" / f"{name}-{distributed.world_size()}")
        torch.save(found, folder / f"{name}-{distributed.rank()}.pt")
    message = differing(folder, folder / "states" / f"differing-{distributed.rank()}")
    (folder / f"differing-{distributed.rank()}.txt").write_text(message)
    distributed.finish()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
