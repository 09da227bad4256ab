"""One contract for every method: it quantizes an untied head as a linear of its own, and reads packed embeddings."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import tables, tiny
from helpers.methods import QUICK, same
from helpers.tables import config
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from qtool.blocks.job import Job, load_method
from qtool.blocks.stages import stages
from qtool.blocks.tables import nearest
from qtool.blocks.task import BlockTask
from qtool.config import catalog
from qtool.methods import gptq, rtn
from qtool.models.linears import packed_linears
from qtool.models.loaded import LoadedModel
from qtool.quant.affine import QuantizedWeight, relative_error
from qtool.quant.packed_linear import PackedLinear
from qtool.system.errors import InputError
from qtool.training import end_to_end, linears

HEAD, TABLE = "lm_head", "model.embed_tokens"
GRIDS: dict[str, dict[str, Any]] = {
    "same": {},
    "float": {"head": "float"},
    "own": {"head": {"num_bits": 3, "group_size": 16, "symmetric": False}},
    "alone": {"embedding": "float", "head": {"num_bits": 3, "group_size": 16}},
}
TRAINED = [name for name in catalog.methods() if load_method(name).command in ("qat", "lrqat", "efficientqat")]
MOVED: dict[str, dict[str, Any]] = {  # settings that move a weight past a rounding boundary within a few steps
    name: {"travel": 2.0, "steps": 4} for name in ("qat", "llmqat", "lsq", "paretoq")
} | {"lrqat": {"travel": 2.0, "steps": 8, "rank": 8}, "efficientqat": {"min_steps": 8, "epochs": 1}}


@pytest.fixture(scope="module")
def pristine_tied(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    return tiny.load(tiny.llama(tmp_path_factory.mktemp("models") / "tied", tied=True, dtype=torch.float32))


@pytest.fixture
def make_tied(pristine_tied: LoadedModel) -> Callable[[], LoadedModel]:
    return lambda: copy.deepcopy(pristine_tied)


@pytest.fixture(params=catalog.methods())
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


# ---------------------------------------------------------------------------- the contract, for every method there is


@pytest.mark.parametrize("grid", GRIDS)
def test_an_untied_head_and_an_embedding_are_packed_on_their_grids_and_survive_the_disk(
    name: str, grid: str, llama: LoadedModel, tokens: Tensor, tmp_path: Path
) -> None:
    floats = copy.deepcopy(llama.model)
    job, result = tables.run(name, llama, config(**GRIDS[grid]), tokens)
    packed = {**packed_linears(llama.model), **tables.packed(llama.model)}
    expected = {target.name: target.spec for target in job.targets} | job.tables.specs
    assert {each: layer.spec for each, layer in packed.items()} == expected
    assert (HEAD in packed, TABLE in packed) == (grid != "float", grid != "alone")
    for each in {HEAD, TABLE} - set(packed):
        assert torch.equal(llama.model.get_parameter(f"{each}.weight"), floats.get_parameter(f"{each}.weight"))
    for each in {HEAD, TABLE} & set(packed):
        layer = packed[each]
        assert relative_error(floats.get_parameter(f"{each}.weight"), layer.quantized) < (
            0.2 if each == HEAD else 0.001
        )
        assert layer.weight.dtype == torch.float32
    if not load_method(name).end_to_end(load_method(name).config(**QUICK.get(name, {}))):
        assert set(result.weight_errors) == set(packed_linears(llama.model))
        counts = {each.name: len(each.values) for each in result.series}
        assert counts.pop("block_error", 2) == 2  # of blocks alone
        assert set(counts.values()) <= {job.num_parts}
    restored = AutoModelForCausalLM.from_pretrained(tables.written(job, tmp_path / "out"), dtype=torch.float32)
    assert torch.equal(tiny.logits(restored), tiny.logits(llama.model))


def test_a_tied_table_is_quantized_once_and_read_twice(
    name: str, make_tied: Callable[[], LoadedModel], tokens: Tensor, tmp_path: Path
) -> None:
    loaded = make_tied()
    expected = nearest(Job.select(loaded, config()).tables.embeddings[0], torch.device("cpu"))
    job, _ = tables.run(name, loaded, config(), tokens)
    assert same({TABLE: tables.packed(loaded.model)[TABLE].quantized}, {TABLE: expected})
    assert tables.tied(loaded.model)[HEAD].table is tables.packed(loaded.model)[TABLE]
    logits = tiny.logits(loaded.model)
    folder = tables.written(job, tmp_path / "out")
    assert not [tensor for tensor in tiny.stored(folder) if tensor.startswith(HEAD)]
    restored = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert torch.equal(tiny.logits(restored), logits)
    tables.expanded(loaded.model, job)
    assert torch.equal(tiny.logits(loaded.model), logits)


def test_same_arguments_same_bits(name: str, make_llama: Callable[[], LoadedModel], tokens: Tensor) -> None:
    states = []
    for seed in (1, 2):
        loaded = make_llama()
        torch.manual_seed(seed)
        tables.run(name, loaded, config(head={"num_bits": 3, "group_size": 16}), tokens)
        states.append(loaded.model.state_dict())
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


@pytest.mark.parametrize("name", TRAINED)
def test_a_head_receives_gradients(name: str, make_llama: Callable[[], LoadedModel], tokens: Tensor) -> None:
    """Its codes or its scales are other ones than those that it started with."""
    found = []
    for steps in (MOVED[name], {"epochs": 0} if name == "efficientqat" else {"steps": 0}):
        loaded = make_llama()
        keys = steps if name != "efficientqat" else steps | {"e2e": {"steps": 4 if "min_steps" in steps else 0}}
        if name == "efficientqat" and not steps.get("min_steps"):
            keys |= {"min_steps": 0}
        tables.run(name, loaded, config(head={"num_bits": 3, "group_size": 16}), tokens, **keys)
        found.append(packed_linears(loaded.model)[HEAD].quantized)
    moved, start = found
    assert not same({HEAD: moved}, {HEAD: start})
    assert not torch.equal(moved.codes, start.codes)
    assert not torch.equal(moved.codes, found[1].codes)


@pytest.mark.parametrize("name", TRAINED)
def test_the_teacher_is_the_float_model(
    name: str, tmp_path: Path, tokens: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has the float tables, tied or not, although those of the student were packed before."""
    for tie in (True, False):
        loaded = tiny.load(tiny.llama(tmp_path / f"{tie}", tied=tie, dtype=torch.float32))
        expected = tiny.logits(loaded.model)
        teachers: list[nn.Module] = []
        train = end_to_end.train_model

        def watched(
            job: Job, teacher: nn.Module, *args: Any, seen: Any = teachers, run: Any = train, **keys: Any
        ) -> Any:
            seen.append(teacher)
            return run(job, teacher, *args, **keys)

        from qtool.methods.efficientqat import e2e_qp

        for module in (linears, e2e_qp):
            monkeypatch.setattr(module, "train_model", watched)
        loss = {"loss": "kl"}
        tables.run(name, loaded, config(), tokens, **({"e2e": loss | {"steps": 2}} if name == "efficientqat" else loss))
        assert len(teachers) == 1
        assert torch.equal(tiny.logits(teachers[0]), expected)


# -------------------------------------------------------------------------------------------------- gptq and rtn


def of_head(loaded: LoadedModel, tokens: Tensor) -> Tensor:
    """Return what the head reads of all tokens, ``[tokens, d]``."""
    found: list[Tensor] = []
    hook = loaded.model.get_output_embeddings().register_forward_pre_hook(lambda _, args: found.append(args[0]))
    with torch.no_grad():
        loaded.model(input_ids=tokens)
    hook.remove()
    return found[0].flatten(0, 1)


def error(weight: Tensor, quantized: QuantizedWeight, x: Tensor) -> float:
    layer = PackedLinear.from_quantized(quantized, None)
    return float(((layer.dequantized() - weight) @ x.T).square().sum())


def test_gptq_lowers_the_error_of_the_logits(make_llama: Callable[[], LoadedModel], tokens: Tensor) -> None:
    loaded = make_llama()
    weight = loaded.model.get_parameter("lm_head.weight").detach().clone()
    tables.run("gptq", loaded, config(head={"num_bits": 3, "group_size": 16}), tokens, range="minmax")
    head = packed_linears(loaded.model)[HEAD].quantized
    x = of_head(loaded, tokens)
    assert error(weight, head, x) < 0.8 * error(weight, rtn.round_to_nearest(weight, head.spec, rtn.Config()), x)


@pytest.mark.parametrize("gptaq", [0.0, 0.25])
def test_gptq_of_the_compressed_inputs_is_gptq_of_all_tokens(
    gptaq: float, make_llama: Callable[[], LoadedModel], tokens: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The Hessian of the head, and the moment between the quantized and the float model's inputs, are the same."""
    seen: list[QuantizedWeight] = []
    pack = BlockTask.pack

    def kept(task: BlockTask, target: Any, weight: QuantizedWeight) -> None:
        seen.append(weight)
        pack(task, target, weight)

    monkeypatch.setattr(BlockTask, "pack", kept)
    weights = []
    for compressed in (True, False):
        if not compressed:
            monkeypatch.setattr("qtool.blocks.states.same_moment", lambda inputs: whole(inputs))
        loaded = make_llama()
        tables.run("gptq", loaded, config(head={"num_bits": 3, "group_size": 16}), tokens, gptaq=gptaq)
        weights.append(packed_linears(loaded.model)[HEAD].dequantized())
    assert float((weights[0] != weights[1]).float().mean()) < 0.01  # a code may fall on the other side of a boundary
    assert seen


def whole(inputs: Any) -> list[list[Tensor]]:
    """Return all tokens of all inputs, as windows in batches of four."""
    parts = [torch.cat(each) for each in zip(*inputs, strict=True)]
    return [list(part.view(-1, 10, part.shape[1]).split(4)) for part in parts]


def test_round_to_nearest_of_a_head_reads_no_text(make_llama: Callable[[], LoadedModel], tokens: Tensor) -> None:
    found = []
    for text in (tokens, None):
        loaded = make_llama()
        tables.run("rtn", loaded, config(), text)
        found.append(packed_linears(loaded.model)[HEAD].quantized)
    assert same({HEAD: found[0]}, {HEAD: found[1]})


def test_float_states_start_from_the_float_embedding(
    make_tied: Callable[[], LoadedModel], tokens: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    from qtool.blocks.driver import run_blocks
    from qtool.blocks.tables import pack_embeddings

    loaded = make_tied()
    with torch.no_grad():
        expected = loaded.model.get_input_embeddings()(tokens)
    job = pack_embeddings(Job.select(loaded, config(embedding={"num_bits": 2}), tokens))
    with torch.no_grad():
        packed = loaded.model.get_input_embeddings()(tokens)
    checked = []

    def visit(task: BlockTask) -> None:
        if task.index == 0:
            assert task.float_inputs is not None
            assert torch.equal(torch.cat(list(task.float_inputs)), expected)
            assert torch.equal(torch.cat(list(task.inputs)), packed)
            checked.append(task.index)
        for stage in stages(task):
            for target in stage.targets:
                task.pack(target, rtn.round_to_nearest(target.weight, target.spec, rtn.Config()))

    run_blocks(job, visit, with_float_states=True)
    assert checked
    assert not torch.equal(packed, expected)


# ------------------------------------------------------------------------------------------------------- init_from


@pytest.mark.parametrize("name", TRAINED)
@pytest.mark.parametrize("tie", [True, False])
def test_a_training_starts_from_the_tables_of_a_checkpoint_bit_for_bit(
    name: str, tie: bool, tmp_path: Path, tokens: Tensor
) -> None:
    """The embedding of the checkpoint has other codes than the search would find."""
    folder = tiny.llama(tmp_path / "float", tied=tie, dtype=torch.float32)
    first = tiny.load(folder)
    quant = config(embedding={"num_bits": 4, "group_size": 16})
    job, _ = tables.run("gptq", first, quant, tokens)
    table = tables.packed(first.model)[TABLE]
    table.weight_scale = table.weight_scale * 0.5
    start = tables.written(job, tmp_path / "start")
    second = tiny.load(folder)
    keys: dict[str, Any] = (
        {"steps": 0} if name != "efficientqat" else {"epochs": 0, "min_steps": 0, "e2e": {"steps": 0}}
    )
    job, result = tables.run(name, second, quant, tokens, init_from=str(start), **keys)
    ours, theirs = ({**packed_linears(m.model), **tables.packed(m.model)} for m in (second, first))
    assert ours.keys() == theirs.keys()
    assert (HEAD in ours) != tie
    found, expected = ({n: layer.quantized for n, layer in each.items()} for each in (ours, theirs))
    assert same({TABLE: found[TABLE]}, {TABLE: expected[TABLE]})
    if name not in ("qat", "llmqat"):  # whose ranges are always those of the weights
        assert same(found, expected)
        assert torch.equal(tiny.logits(second.model), tiny.logits(first.model))
    if name == "efficientqat":
        assert result.weight_errors[TABLE] == relative_error(
            tiny.load(folder).model.get_parameter(f"{TABLE}.weight"), table.quantized
        )


@pytest.mark.parametrize("name", ["lsq", "efficientqat"])
@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        (
            {},
            {"embedding": "float"},
            r"lm_head is the output head that the recipe leaves .* w8pc, and quant\.head must",
        ),
        (
            {"head": "float"},
            {"embedding": "float"},
            r"embed_tokens is an embedding that the recipe leaves in .* w8pc, and ",
        ),
        (
            {"head": "float"},
            {},
            r"is the output head that only the recipe quantizes; the checkpoint has it as float",
        ),
        (
            {"embedding": "float"},
            {"head": "float"},
            r"is an embedding that only the recipe quantizes; .* as float",
        ),
        ({}, {"embedding": {"num_bits": 4}, "head": {}}, r"has model\.embed_tokens on w8pc, the recipe asks for w4pc"),
        ({}, {"head": {"num_bits": 4}}, r"has lm_head on w8pc, the recipe asks for w4pc"),
    ],
)
def test_a_start_with_other_tables_is_refused_with_the_key(
    name: str,
    before: dict[str, Any],
    after: dict[str, Any],
    message: str,
    llama_folder: Path,
    tmp_path: Path,
    tokens: Any,
) -> None:
    job, _ = tables.run("rtn", tiny.load(llama_folder), config(**before))
    start = tables.written(job, tmp_path / "start")
    with pytest.raises(InputError, match=rf"^method\.init_from: .*{message}"):
        tables.run(name, tiny.load(llama_folder), config(**after), tokens, init_from=str(start))


def test_the_hessian_of_a_head_is_that_of_all_tokens(make_llama: Callable[[], LoadedModel], tokens: Tensor) -> None:
    seen: dict[int, Tensor] = {}
    loaded = make_llama()
    job = Job.select(loaded, config(), tokens)

    def visit(task: BlockTask) -> None:
        if task.index == 2:
            x = torch.cat([each.flatten(0, 1) for each in task.inputs]).double()
            seen[task.index] = x.T @ x / len(x)
        for target in task.targets:
            task.pack(target, rtn.round_to_nearest(target.weight, target.spec, rtn.Config()))

    from qtool.blocks.driver import run_blocks

    run_blocks(job, visit)
    x = of_head(loaded, tokens).double()
    torch.testing.assert_close(seen[2], x.T @ x / len(x), rtol=1e-5, atol=1e-6)
    assert gptq.METHOD.needs_data(gptq.Config())
