"""Packed kernels serve the output head, tied to a packed embedding or not, and follow the table they are made of."""

import copy
from pathlib import Path

import pytest
import torch
from helpers import tiny
from helpers.packed_tables import GRID, written
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

import qtool
from qtool.models import backend
from qtool.models.expanded import expand
from qtool.models.linears import packed_weights
from qtool.quant.packed_embedding import PackedEmbedding, TiedLinear
from qtool.quant.packed_linear import PackedLinear

CASES = {  # model, grids of its tables, and the kernel of its head
    "tied, 8 bits": ("tied", {"embedding": {"num_bits": 8}}, "int8 (cpu)"),
    "tied, 4 bits": ("tied", {"embedding": GRID | {"symmetric": False}}, "int4 (cpu)"),
    "untied": ("untied", {"embedding": {"num_bits": 8}, "head": GRID}, "int4 (cpu)"),
    "gpt2": ("gpt2", {"embedding": {"num_bits": 8, "group_size": 32}}, "int4 pairs (cpu)"),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The native checkpoint of each case."""
    at = tmp_path_factory.mktemp("tables")
    return {name: written(at, family, tables) for name, (family, tables, _) in CASES.items()}


def load(folder: Path) -> PreTrainedModel:
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.eval()
    return model


def head_of(model: PreTrainedModel) -> PackedLinear:
    head = model.get_output_embeddings()
    assert isinstance(head, PackedLinear)
    return head


def table_of(model: PreTrainedModel) -> PackedEmbedding:
    table = model.get_input_embeddings()
    assert isinstance(table, PackedEmbedding)
    return table


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    found: Tensor = model(tiny.probe()[:, :9]).logits  # 18 rows
    return found.float()


@pytest.mark.parametrize("case", CASES)
def test_the_head_has_a_kernel_and_logits_differ_by_little(case: str, folders: dict[str, Path]) -> None:
    model = load(folders[case])
    before, keys, embedded = logits(model), list(model.state_dict()), table_of(model)(tiny.probe())
    found = qtool.use_backend(model, "torch")
    count = len([layer for layer in packed_weights(model).values() if isinstance(layer, PackedLinear)])
    assert found.head == CASES[case][2]
    assert found.exact == {}
    assert found.kernels.total() == count + isinstance(head_of(model), TiedLinear)
    alike = {"int4 (cpu)": f"{found.kernels['int4 (cpu)'] - 1} linears and the head by int4 (cpu)"}
    assert alike.get(found.head, f"the head by {found.head}") in str(found)
    kernel = head_of(model).kernel
    assert kernel is not None
    with_head = backend.held_bytes(model)
    head_of(model).kernels = ()
    assert found.num_bytes == with_head == backend.held_bytes(model) + kernel.num_bytes
    head_of(model).kernels = (kernel,)
    assert 0 < (logits(model) - before).abs().max() < 0.02 * before.abs().max()
    assert torch.equal(table_of(model)(tiny.probe()), embedded), "rows of the embedding are exact"
    assert list(model.state_dict()) == keys
    qtool.use_backend(model, "exact")
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize("case", CASES)
def test_a_copy_has_its_own_tie_and_its_own_kernels(case: str, folders: dict[str, Path]) -> None:
    model = load(folders[case])
    qtool.use_backend(model, "torch")
    hidden = torch.ones(1, head_of(model).in_features)
    expected = head_of(model)(hidden)
    other = copy.deepcopy(model)
    head, own = head_of(other), head_of(model)
    assert head.kernel is not None
    assert own.kernel is not None
    assert head.kernel.state[0].data_ptr() != own.kernel.state[0].data_ptr()
    if isinstance(head, TiedLinear):
        assert head.table is table_of(other)
        assert table_of(other).readers == (head,)
    table_of(other).weight_scale.mul_(2)
    table_of(other).changed()
    assert torch.equal(own(hidden), expected)
    assert torch.equal(head(hidden), expected * (2 if isinstance(head, TiedLinear) else 1))


@pytest.mark.parametrize("case", [case for case in CASES if case != "untied"])
@pytest.mark.parametrize("head_first", [False, True])
def test_kernels_of_a_tied_head_follow_the_table(
    case: str, head_first: bool, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load(folders[case])
    if head_first:  # modules are moved in their order
        (name,) = (name for name, child in model.named_children() if child is head_of(model))
        modules = model._modules
        modules |= {name: modules.pop(name)} | {other: modules.pop(other) for other in list(modules) if other != name}
        assert next(iter(modules)) == name
    qtool.use_backend(model, "torch")
    expected, kernels = logits(model), head_of(model).kernels
    nn.Module.to(model, torch.bfloat16)
    assert head_of(model).kernels is kernels, "another dtype changes no grid"
    assert (logits(model) - expected).abs().max() < 0.03 * expected.abs().max()
    state = {name: tensor.clone() for name, tensor in nn.Module.state_dict(model).items()}
    scales = next(name for name, tensor in state.items() if tensor.shape == table_of(model).weight_scale.shape)
    nn.Module.load_state_dict(model, state | {scales: 2 * table_of(model).weight_scale})
    assert head_of(model).kernels is not kernels, "a new table"
    assert head_of(model).kernel is not None
    hidden = torch.ones(1, head_of(model).in_features)
    exact = hidden @ head_of(model).dequantized().T
    assert (head_of(model)(hidden) - exact).abs().max() < 0.02 * exact.abs().max()
    model.to_empty(device=torch.device("meta"))
    assert head_of(model).kernels == ()
    assert table_of(model).weight_packed.device.type == "meta"


@pytest.mark.parametrize("case", CASES)
def test_ordinary_layers_in_the_place_of_packed_ones_compute_the_same(case: str, folders: dict[str, Path]) -> None:
    model = load(folders[case])
    expected, stored = logits(model), sum(tensor.nbytes for tensor in model.state_dict().values())
    grown = expand(model, packed_weights(model), torch.float32)
    assert packed_weights(model) == {}
    assert torch.allclose(logits(model), expected, atol=1e-4)
    head, table = model.get_output_embeddings(), model.get_input_embeddings()
    assert (head.weight is table.weight) == (case != "untied")
    assert type(table) is nn.Embedding
    tensors = {tensor.data_ptr(): tensor.nbytes for tensor in model.state_dict().values()}
    assert sum(tensors.values()) == stored + grown
