"""End-loss weights: gradients equal those of the whole model, and methods use them as the formulas say."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import tiny
from helpers.architectures import write
from helpers.methods import QUICK, correlated_inputs, generator, random_weight, same
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from qtool.blocks.hidden_states import HiddenStates
from qtool.blocks.job import Job
from qtool.blocks.moments import collect
from qtool.blocks.stages import Stage
from qtool.blocks.tables import pack_embeddings
from qtool.blocks.task import Rows
from qtool.checkpoints.files import write_shard
from qtool.config.guided import GuidedConfig
from qtool.config.quant import QuantConfig, QuantSpec
from qtool.config.sections import IGNORED, ModelConfig
from qtool.methods import efficientqat, gptq, signround
from qtool.models.linears import packed_linears
from qtool.models.loaded import LoadedModel
from qtool.models.loading import load_model
from qtool.quant.affine import dequantize
from qtool.system.errors import InputError
from qtool.training import guided
from qtool.training.block_loss import BlockLoss
from qtool.training.guided import TOKENS, EndLoss, end_loss, weighted, weights

QUANT = QuantConfig(num_bits=3, group_size=16)
TEXT = GuidedConfig(power=1.0, loss="text", clip=1.0)  # gradients as they are
SAMPLED = GuidedConfig(power=1.0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.llama(tmp_path_factory.mktemp("guided"), tied=True)


@pytest.fixture
def tokens(monkeypatch: pytest.MonkeyPatch) -> Tensor:
    """Five windows, which are read two at a time: the last batch has one."""
    monkeypatch.setattr("qtool.blocks.states.TOKENS_PER_BATCH", 48)
    return torch.randint(1, tiny.VOCABULARY, (5, 24), generator=generator(3))


def job_of(folder: Path, tokens: Tensor, *, streamed: bool = False, **settings: Any) -> Job:
    loaded = load_model(ModelConfig(path=str(folder), dtype="float32", device="cpu"), streamed=streamed)
    return replace(Job.select(loaded, QUANT, tokens), **settings)


class Workspace(tiny.Kept):
    def __init__(self, folder: Path, memory_budget: int = 1 << 30) -> None:
        folder.mkdir(exist_ok=True)
        super().__init__(folder)
        self.memory_budget = memory_budget


def whole_gradients(loaded: LoadedModel, names: list[str], tokens: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """Return the gradient ``[n, t, out]`` of the summed loss at the output of each module, by one plain backward."""
    outputs: dict[str, Tensor] = {}
    for name in names:

        def keep(module: object, args: object, output: Any, name: str = name) -> None:
            outputs[name] = output[0] if isinstance(output, tuple) else output
            outputs[name].retain_grad()

        loaded.model.get_submodule(name).register_forward_hook(keep)
    loaded.model.requires_grad_(True)
    logits = loaded.model(tokens).logits[:, :-1].flatten(0, 1)
    F.cross_entropy(logits, labels[:, 1:].flatten(), reduction="sum", ignore_index=IGNORED).backward()
    found = {}
    for name, output in outputs.items():
        assert output.grad is not None
        found[name] = output.grad
    return found


# ---------------------------------------------------------------------------------------------------- the pass


@pytest.mark.parametrize("streamed", [False, True])
def test_gradients_are_those_of_a_backward_pass_of_the_whole_model(
    folder: Path, tokens: Tensor, streamed: bool, tmp_path: Path
) -> None:
    labels = tokens.where(torch.arange(24) >= torch.tensor([1, 9, 4, 17, 2])[:, None], IGNORED)
    workspaces = [Workspace(tmp_path / name, memory_budget=0) if streamed else None for name in ("a", "b")]
    one, two = (job_of(folder, tokens, streamed=streamed, labels=labels, workspace=each) for each in workspaces)
    linears, blocks = end_loss(one, TEXT, 2), end_loss(two, TEXT)
    assert linears is not None
    assert blocks is not None
    loaded = job_of(folder, tokens).loaded
    names = [target.name for target in one.targets]
    expected = whole_gradients(loaded, [*names, *(name for name, _ in loaded.blocks())], tokens, labels)
    for name in names:
        squares = expected[name].flatten(0, 1).square()
        halves = torch.stack([half.mean(1) for half in squares.chunk(2, 1)], 1)
        torch.testing.assert_close(linears.of_linear(name), halves / halves.mean(0), rtol=1e-3, atol=1e-5)
    for name, _ in loaded.blocks():
        squares = expected[name].square()
        rows = squares.mean(-1, keepdim=True)
        channels = torch.where(rows > 0, squares / rows, 0).sum((0, 1))
        found = blocks.of_block(name)
        torch.testing.assert_close(found[0], rows.squeeze(-1) / rows.mean(), rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(found[1], channels / channels.mean(), rtol=1e-3, atol=1e-5)


def test_a_streamed_model_in_another_dtype_has_the_gradients_of_one_in_memory(tokens: Tensor, tmp_path: Path) -> None:
    """A layer norm after the blocks is float32 in the backward pass too, not the bfloat16 of the files."""
    folder = tiny.gpt2(tmp_path / "model", dtype=torch.bfloat16)
    one = end_loss(job_of(folder, tokens), TEXT)
    two = end_loss(job_of(folder, tokens, streamed=True, workspace=Workspace(tmp_path / "state")), TEXT)
    assert one is not None
    assert two is not None
    for name in ("transformer.h.0", "transformer.h.1"):
        assert torch.equal(one.of_block(name)[0], two.of_block(name)[0])


def test_sampled_labels_give_the_fisher_information(
    folder: Path, tokens: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the last output, where a token's gradient is that of its own label, the mean over labels can be summed."""
    monkeypatch.setattr("qtool.blocks.states.TOKENS_PER_BATCH", 2048)
    job = job_of(folder, tokens[:1, :6].expand(tiny.VOCABULARY, -1))
    name = f"{job.loaded.blocks()[-1][0]}.{TOKENS}"
    every = torch.arange(tiny.VOCABULARY).unsqueeze(1).expand(-1, 6)
    each = end_loss(replace(job, labels=every), TEXT)
    drawn = end_loss(replace(job, tokens=tokens[:1, :6].expand(2000, -1)), SAMPLED)
    assert each is not None
    assert drawn is not None
    with torch.no_grad():
        probabilities = job.loaded.model(job.text[:1]).logits[0].softmax(-1)
    exact = (probabilities.T * torch.cat(each._of(name))).sum(0)[:-1]
    torch.testing.assert_close(torch.cat(drawn._of(name)).mean(0)[:-1], exact, rtol=0.1, atol=0)


def test_bfloat16_gives_nearly_the_gradients_of_float32(folder: Path, tokens: Tensor) -> None:
    """The loss is a sum over tokens: squares of its gradients do not vanish."""
    full, half = job_of(folder, tokens), load_model(ModelConfig(path=str(folder), dtype="bfloat16", device="cpu"))
    exact, found = end_loss(full, TEXT, 1), end_loss(Job.select(half, QUANT, tokens), TEXT, 1)
    assert exact is not None
    assert found is not None
    for target in full.targets:
        pair = torch.stack([found.of_linear(target.name).squeeze(1), exact.of_linear(target.name).squeeze(1)])
        assert float(torch.corrcoef(pair)[0, 1]) > 0.99, target.name


def test_positions_that_are_not_learned_have_no_loss_of_their_own(folder: Path, tokens: Tensor) -> None:
    labels = tokens.where(torch.arange(24) < 10, IGNORED)
    job = job_of(folder, tokens, labels=labels)
    found = end_loss(job, SAMPLED)
    assert found is not None
    for name, _ in job.loaded.blocks():
        rows, _ = found.of_block(name)
        assert not rows[:, 9:].any(), "what follows the last learned token changes no loss"
        assert rows[:, :9].all()


def test_a_killed_pass_goes_on_to_the_same_bytes_whatever_the_budget(
    folder: Path, tokens: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = end_loss(job_of(folder, tokens, streamed=True, workspace=Workspace(tmp_path / "whole")), SAMPLED, 1)
    job = job_of(folder, tokens, streamed=True, workspace=Workspace(tmp_path / "killed", memory_budget=0))
    written: list[Path] = []

    def killed(tensors: dict[str, Tensor], file: Path) -> None:
        if len(written) == 1:
            raise KeyboardInterrupt
        written.append(file)
        write_shard(tensors, file)

    with monkeypatch.context() as patch:
        patch.setattr(guided, "write_shard", killed)
        with pytest.raises(KeyboardInterrupt):
            end_loss(job, SAMPLED, 1)
    before = written[0].stat().st_mtime_ns
    again = end_loss(job, SAMPLED, 1)
    assert whole is not None
    assert again is not None
    assert written[0].stat().st_mtime_ns == before, "a batch that is done is not computed again"
    for target in job.targets:
        assert torch.equal(whole.of_linear(target.name), again.of_linear(target.name))


def test_no_power_is_no_pass(folder: Path, tokens: Tensor) -> None:
    assert end_loss(job_of(folder, tokens), GuidedConfig()) is None


# ----------------------------------------------------------------------------------------------------- weights


@given(
    st.lists(st.floats(1e-30, 1e3), min_size=1, max_size=50),
    st.floats(0.1, 1),
    st.floats(0.5, 1),
    st.floats(1e-3, 1e3),
)
def test_weights_have_mean_one_and_do_not_depend_on_the_size_of_the_loss(
    values: list[float], power: float, clip: float, factor: float
) -> None:
    squares, config = torch.tensor(values), GuidedConfig(power=power, clip=clip)
    found = weights(squares, config)
    torch.testing.assert_close(found.mean(), torch.tensor(1.0))
    torch.testing.assert_close(weights(squares * factor, config), found, rtol=1e-3, atol=1e-6)
    rising = found[squares.argsort()]
    assert bool((rising.diff() >= -1e-6 * rising[1:]).all()), "a vector and its rest can round a power differently"


def test_weights_are_powers_of_squares_up_to_the_quantile() -> None:
    squares = torch.tensor([1.0, 4.0, 9.0, 16.0, 1e6])
    found = weights(squares, GuidedConfig(power=0.5, clip=0.8))
    expected = torch.tensor([1.0, 2.0, 3.0, 4.0, 4.0])
    torch.testing.assert_close(found, expected / expected.mean())


def test_equal_squares_and_none_at_all_are_weights_of_one() -> None:
    assert torch.equal(weights(torch.full((9,), 0.3), SAMPLED), torch.ones(9))
    assert torch.equal(weights(torch.zeros(9), SAMPLED), torch.ones(9))


# ----------------------------------------------------------------------------------------------------- methods


def test_a_weighted_hessian_is_the_weighted_sum() -> None:
    x, floats = correlated_inputs(40, 12), correlated_inputs(40, 12, seed=7)
    m = torch.rand(40, generator=generator(1))
    stage = Stage([], [Rows(x[:15]), Rows(x[15:])], [Rows(floats[:15]), Rows(floats[15:])])
    found = collect(weighted(stage, m))
    assert found.drift is not None
    hessian = sum(2 / 40 * m[t] * torch.outer(x[t], x[t]) for t in range(40))
    drift = sum(2 / 40 * m[t] * torch.outer(floats[t] - x[t], x[t]) for t in range(40))
    torch.testing.assert_close(found.hessian, hessian, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.drift, drift, rtol=1e-4, atol=1e-4)


def test_weights_lower_the_weighted_error_of_outputs() -> None:
    x, weight, spec = correlated_inputs(400, 32), random_weight(24, 32), QuantSpec(num_bits=2, group_size=16)
    m = torch.where(torch.arange(400) % 10 == 0, 9.0, 1.0 / 9)
    m /= m.mean()
    plain, given = Stage([], [Rows(x)], None), weighted(Stage([], [Rows(x)], None), m)
    errors = []
    for stage in (plain, given):
        config = gptq.Config(damp=0.01)
        found = gptq.solve(weight, gptq.factorise(collect(stage), spec, config, "layer"), spec, config)
        errors.append(float((m.unsqueeze(1) * (x @ (dequantize(*found) - weight).T).square()).sum()))
    assert errors[1] < 0.9 * errors[0]


def test_the_loss_of_a_block_weighs_tokens_and_channels() -> None:
    goal = torch.randn(5, 3, 4, generator=generator(0))
    output = torch.randn(2, 3, 4, generator=generator(1))
    rows, channels = torch.rand(5, 3, generator=generator(2)), torch.rand(4, generator=generator(3))
    states = HiddenStates(None, goal.split(2))
    found = BlockLoss(states, weights=(rows, channels))
    expected = sum(
        rows[w, t] * channels[c] * (output[i, t, c] - goal[w, t, c]) ** 2
        for i, w in enumerate([4, 1])
        for t in range(3)
        for c in range(4)
    )
    torch.testing.assert_close(found.summed([4, 1], output), expected / goal.square().mean())


def flat(real: Callable[..., EndLoss | None], square: float = 1.0) -> Callable[..., EndLoss | None]:
    """Return ``end_loss`` with the same squared gradient everywhere."""

    def constant(of: Callable[[str], Tensor], name: str) -> Tensor:
        return torch.full_like(of(name), square)

    def found(job: Job, config: GuidedConfig, slices: int = 0) -> EndLoss | None:
        measured = real(job, config, slices)
        assert measured is not None
        return EndLoss(config, [partial(constant, of) for of in measured.batches])

    return found


@pytest.mark.parametrize("module", [gptq, signround, efficientqat])
def test_equal_weights_change_no_bit(
    module: Any, folder: Path, tokens: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However large they are. To GPTQ they are as plain squares; without weights tokens count by their own sizes."""
    method, found = module.METHOD, []
    name = method.config.model_fields["name"].default
    quick = QUICK.get(name, {}) | ({"e2e": {"steps": 0}} if name == "efficientqat" else {})
    none = module is gptq
    quick |= {"token_weights": "plain"} if none else {}
    for power, measured in ((0.0 if none else 1.0, flat(end_loss, 4.0)), (1.0, flat(end_loss)), (1.0, end_loss)):
        monkeypatch.setattr(module, "end_loss", measured if power else end_loss)
        job = job_of(folder, tokens)
        method.run(job, method.config(**quick | {"guided": {"power": power}}))
        found.append({name: layer.quantized for name, layer in packed_linears(job.loaded.model).items()})
    assert same(found[0], found[1])
    assert not same(found[0], found[2])


def test_a_slice_of_rows_is_quantized_with_its_own_weights(
    folder: Path, tokens: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second half of the rows is as if all rows had its weights, as rows do not affect each other."""
    config = gptq.Config.model_validate({"guided": {"power": 1.0, "slices": 2}})
    measured = end_loss(job_of(folder, tokens), config.guided, 2)
    assert measured is not None
    name = "model.layers.0.self_attn.q_proj"
    found = []
    for pick in ([0, 1], [1, 1], [0, 0]):
        batches = [lambda name, of=of, pick=pick: of(name)[:, pick] for of in measured.batches]
        monkeypatch.setattr(gptq, "end_loss", lambda *_, b=batches: EndLoss(config.guided, b))
        job = job_of(folder, tokens)
        gptq.run(job, config)
        found.append(packed_linears(job.loaded.model)[name].quantized.codes)
    half = len(found[0]) // 2
    assert torch.equal(found[0][half:], found[1][half:])
    assert torch.equal(found[0][:half], found[2][:half])
    assert not torch.equal(found[0][half:], found[2][half:])


def test_a_quantized_head_and_embedding_stay_as_they_are_and_the_blocks_are_weighed(
    tmp_path: Path, tokens: Tensor
) -> None:
    loaded = tiny.load(tiny.llama(tmp_path))
    quant = QuantConfig.model_validate(
        {
            "num_bits": 3,
            "group_size": 16,
            "embedding": {"num_bits": 2, "group_size": 16},
            "head": {"num_bits": 4, "group_size": 16},
        }
    )
    job = pack_embeddings(Job.select(loaded, quant, tokens))
    found = end_loss(job, TEXT, 1)
    plain = end_loss(Job.select(tiny.load(tmp_path), QUANT, tokens), TEXT, 1)
    assert found is not None
    assert plain is not None
    gptq.run(job, gptq.Config.model_validate({"guided": {"power": 1.0}}))
    for target in job.targets:
        if target.block < len(loaded.blocks()):
            assert torch.equal(found.of_linear(target.name), plain.of_linear(target.name)), "of the float model"


# ---------------------------------------------------------------------------------------------------- refusals


def test_what_has_no_gradient_is_refused_before_any_work(folder: Path, tokens: Tensor, tmp_path: Path) -> None:
    job = job_of(folder, tokens)
    with pytest.raises(InputError, match="reads text only, and the calibration data has pictures"):
        end_loss(replace(job, pictures=[{}]), SAMPLED)
    half = load_model(ModelConfig(path=str(folder), dtype="float16", device="cpu"))
    with pytest.raises(InputError, match="gradients do not fit float16"):
        end_loss(Job.select(half, QUANT, tokens), SAMPLED)
    shared = write("gemma3n_text", tmp_path / "shared")
    with pytest.raises(InputError, match="of earlier blocks, through which no gradient is known"):
        end_loss(job_of(shared, tokens), SAMPLED)


def test_a_mixture_is_weighed_by_blocks_and_refused_by_linears(tokens: Tensor, tmp_path: Path) -> None:
    job = job_of(write("qwen3_moe", tmp_path / "mixture"), tokens)
    with pytest.raises(InputError, match="experts of a mixture, which get other tokens"):
        end_loss(job, SAMPLED, 1)
    found = end_loss(job, SAMPLED)
    assert found is not None
    rows, channels = found.of_block(job.loaded.blocks()[0][0])
    assert rows.shape == (5, 24)
    assert channels.shape == (64,)
