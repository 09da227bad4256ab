"""The loss in slices is the loss of all tokens at once, and no tensor grows with tokens times vocabulary."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import architectures, tiny
from helpers.notes import Notes
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from qtool.blocks.job import Job
from qtool.blocks.tables import pack_embeddings
from qtool.config.quant import QuantConfig
from qtool.config.sections import IGNORED
from qtool.config.training import EndToEndConfig
from qtool.methods import rtn
from qtool.methods.efficientqat.e2e_qp import ScaleLinear
from qtool.models.linears import replace_linear
from qtool.models.loaded import LoadedModel
from qtool.quant.packed_linear import PackedLinear
from qtool.quant.trained_linear import QuantLinear
from qtool.system import progress
from qtool.training import sliced
from qtool.training.text_loss import TextLoss

LOSSES = ("ce", "kl", "reverse-kl", "mixed", "topk-kl", "cakld")
HEADS = ("float", "float tied", "packed", "packed tied", "scales", "weights")
ROWS = {"num_bits": 8, "group_size": -1}
FEW = 4 * tiny.VOCABULARY * 7  # bytes of the logits of 7 tokens


def student(folder: Path, head: str) -> LoadedModel:
    """Return a model with linears of 3 bits and the given head; its norms and what can of its head train."""
    loaded = tiny.load(tiny.llama(folder / head, dtype=torch.float32, tied=head.endswith("tied")))
    table: dict[str, Any] = {"packed": {"head": ROWS}, "packed tied": {"embedding": ROWS}, "scales": {"head": ROWS}}
    quant = QuantConfig.model_validate({"num_bits": 3, "group_size": 32} | table.get(head, {}))
    rtn.run(pack_embeddings(Job.select(loaded, quant)), rtn.Config())
    last: Any = loaded.model.get_output_embeddings()
    if head == "scales":
        assert isinstance(last, PackedLinear)
        replace_linear(loaded.model, "lm_head", ScaleLinear.of(last, scales=True, zero_points=False))
    if head == "weights":
        replace_linear(loaded.model, "lm_head", QuantLinear(last.weight, None, quant.spec_for("lm_head") or last))
    for name, parameter in loaded.model.named_parameters():
        parameter.requires_grad_(parameter.requires_grad or "norm" in name)
    return loaded


def summed(
    loaded: LoadedModel, teacher: Any, config: EndToEndConfig, tokens: Tensor, labels: Tensor
) -> tuple[float, dict[str, Tensor]]:
    """Return the loss of some windows and its gradients."""
    total = 3.0 * TextLoss(loaded, None if config.loss == "ce" else teacher, config, tokens, labels).summed(
        tokens, labels
    )
    total.backward()
    found = {name: p.grad for name, p in loaded.model.named_parameters() if p.grad is not None}
    loaded.model.zero_grad()
    return float(total.detach()), found


@contextmanager
def few_at_a_time(patch: pytest.MonkeyPatch, size: int = FEW) -> Iterator[None]:
    with patch.context() as inner:
        inner.setattr(sliced, "SLICE_BYTES", {"cpu": size})
        inner.setattr(sliced, "LEAST_TOKENS", 1)
        yield


@pytest.mark.parametrize(
    ("vocabulary", "sizes"),
    [(1 << 15, [256, 44]), (1 << 16, [128, 128, 44]), (1 << 18, [64, 64, 64, 64, 44])],
    ids=["bytes decide", "half as many", "enough tokens to be worth a product"],
)
def test_a_slice_has_few_logits_and_not_too_few_tokens(vocabulary: int, sizes: list[int]) -> None:
    slices = sliced.slices_of(300, vocabulary, torch.device("cpu"))
    tokens = torch.arange(300)
    assert torch.equal(torch.cat([tokens[each] for each in slices]), tokens)
    assert [len(tokens[each]) for each in slices] == sizes


@pytest.mark.parametrize(("loss", "head"), [*((loss, "packed tied") for loss in LOSSES), *(("kl", h) for h in HEADS)])
def test_the_loss_in_slices_and_its_gradients_are_those_of_all_tokens_at_once(
    loss: str, head: str, tmp_path: Path, tokens: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher = tiny.load(tiny.llama(tmp_path / "float", dtype=torch.float32, tied=head.endswith("tied"))).model
    loaded = student(tmp_path, head)
    labels = tokens.where(torch.arange(tokens.shape[1]) >= torch.arange(5)[:, None] * 4, IGNORED)
    config = EndToEndConfig.model_validate({"loss": loss, "top_k": 8, "temperature": 1.5})
    whole, gradients = summed(loaded, teacher, config, tokens, labels)
    with few_at_a_time(monkeypatch):
        part, others = summed(loaded, teacher, config, tokens, labels)
    assert part == pytest.approx(whole, rel=1e-5)
    assert others.keys() == gradients.keys()
    assert any("lm_head" in name for name in gradients) == (head in ("scales", "weights"))
    for name, expected in gradients.items():
        assert torch.allclose(others[name], expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max())), name


@pytest.mark.parametrize("name", ["gemma2", "granite", "cohere", "phi", "opt_350m", "gptj"])
def test_what_a_model_does_to_its_logits_is_in_every_slice(
    name: str, tmp_path: Path, tokens: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Soft caps, scales, biases and projections; a loss of logits without them would differ."""
    loaded = tiny.load(architectures.write(name, tmp_path / "model"))
    teacher = tiny.load(tmp_path / "model").model
    for parameter in loaded.model.parameters():
        parameter.data.mul_(1.02)
        parameter.requires_grad_(parameter.dim() == 1)
    config = EndToEndConfig()
    whole, gradients = summed(loaded, teacher, config, tokens, tokens)
    notes = Notes()
    with progress.use(notes), few_at_a_time(monkeypatch):
        part, others = summed(loaded, teacher, config, tokens, tokens)
    assert not notes.texts
    assert part == pytest.approx(whole, rel=1e-4)
    largest = max(float(each.abs().max()) for each in gradients.values())
    for key, expected in gradients.items():
        assert torch.allclose(others[key], expected, rtol=1e-3, atol=1e-5 * largest), key


class Largest(TorchDispatchMode):
    """Remembers the number of elements of the largest tensor that is made."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.size = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        sizes = [x.untyped_storage().nbytes() // x.element_size() for x in tree_leaves(found) if isinstance(x, Tensor)]
        self.size = max(self.size, *sizes, 0)
        return found


@pytest.mark.parametrize("loss", LOSSES)
def test_no_tensor_grows_with_tokens_times_vocabulary(
    loss: str, llama: LoadedModel, tokens: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher, sizes = llama.float_copy(), []
    llama.model.get_submodule("model.norm").requires_grad_(True)
    for count, size in ((2, FEW), (5, FEW), (5, 1 << 28)):
        with few_at_a_time(monkeypatch, size), Largest() as largest:
            summed(llama, teacher, EndToEndConfig(loss=loss), tokens[:count], tokens[:count])
        sizes.append(largest.size)
    assert sizes[0] == sizes[1] <= max(8 * tiny.VOCABULARY, tiny.VOCABULARY * tiny.HIDDEN)
    assert sizes[2] >= 5 * 23 * tiny.VOCABULARY


def test_without_gradients_only_the_sum_is_made(
    llama: LoadedModel, tokens: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    with torch.no_grad():
        whole = float(TextLoss(llama, None, EndToEndConfig(loss="ce"), tokens, tokens).summed(tokens, tokens))
        with few_at_a_time(monkeypatch):
            part = TextLoss(llama, None, EndToEndConfig(loss="ce"), tokens, tokens).summed(tokens, tokens)
    assert float(part) == pytest.approx(whole, rel=1e-5)
    assert not part.requires_grad


def test_logits_of_more_than_final_hidden_states_are_made_whole_and_a_note_says_so(
    llama: LoadedModel, tokens: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    own: Any = llama.model.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        out = own(*args, **kwargs)
        out.logits = out.logits + kwargs["input_ids"][..., None] / 100
        return out

    config = EndToEndConfig(loss="ce")
    monkeypatch.setattr(llama.model, "forward", forward)
    notes = Notes()
    with progress.use(notes), few_at_a_time(monkeypatch), Largest() as largest:
        TextLoss(llama, None, config, tokens, tokens).summed(tokens, tokens)
    assert [note.split(";")[1] for note in notes.texts] == [" they are held for all tokens of a step at once"]
    assert largest.size >= tokens.numel() * tiny.VOCABULARY


def test_the_difference_of_hidden_states_is_a_share_of_their_mean_square(tmp_path: Path, tokens: Tensor) -> None:
    loaded = student(tmp_path, "float")
    teacher = tiny.load(tmp_path / "float").model
    found, gradients = summed(loaded, teacher, EndToEndConfig(loss="hidden"), tokens, tokens)
    hidden, goal = (m.base_model(tokens).last_hidden_state[:, :-1] for m in (loaded.model, teacher))
    share = (hidden - goal).square().sum() / goal.square().mean() / tiny.HIDDEN
    assert found == pytest.approx(3 * float(share.detach()), rel=1e-5)
    (expected,) = torch.autograd.grad(3 * share, loaded.model.get_parameter("model.norm.weight"))
    assert torch.allclose(gradients["model.norm.weight"], expected, rtol=1e-4)
    assert 0 < found < 3 * tokens.numel()
