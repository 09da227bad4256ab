"""Perplexity and divergence: each number against an independent computation."""

import math

import pytest
import torch
from helpers import tiny
from helpers.local_data import needs
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from qtool.config.sections import AGREEMENT, PERCENTILES, EvalConfig
from qtool.data.windows import perplexity_windows
from qtool.evaluation import perplexity
from qtool.evaluation.tasks import evaluate
from qtool.models.loaded import LoadedModel


@pytest.fixture(scope="module")
def windows() -> Tensor:
    return torch.randint(0, 4096, (7, 40), generator=torch.Generator().manual_seed(0))


def test_perplexity_equals_the_loss_of_transformers(loaded: LoadedModel, windows: Tensor) -> None:
    with torch.no_grad():
        losses = torch.stack([loaded.model(w[None], labels=w[None]).loss for w in windows]).double()
    measured = perplexity.perplexity(loaded.model, windows, 3)
    assert measured.value == pytest.approx(losses.mean().exp().item(), rel=1e-5)
    assert measured.stderr == pytest.approx((losses.mean().exp() * losses.std() / math.sqrt(7)).item(), rel=1e-4)
    assert measured.n == 7 * 39


def test_perplexity_does_not_depend_on_batch_or_chunk(
    loaded: LoadedModel, windows: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = perplexity.perplexity(loaded.model, windows, 7).value
    assert perplexity.perplexity(loaded.model, windows, 1).value == pytest.approx(expected, rel=1e-6)
    assert perplexity.perplexity(loaded.model, windows, "auto").value == pytest.approx(expected, rel=1e-6)
    monkeypatch.setattr(perplexity, "CHUNK_NUMBERS", {"cpu": 3 * 4096})
    assert perplexity.perplexity(loaded.model, windows, 2).value == pytest.approx(expected, rel=1e-6)


def test_one_window_has_no_standard_error(loaded: LoadedModel, windows: Tensor) -> None:
    assert perplexity.perplexity(loaded.model, windows[:1], "auto").stderr is None


def test_a_model_does_not_diverge_from_itself(loaded: LoadedModel, windows: Tensor) -> None:
    found = perplexity.divergence(loaded.model, loaded.model, windows, 3)
    agreement = found.pop(AGREEMENT)
    assert (agreement.value, agreement.stderr) == (1, 0)
    assert found["kl"].stderr == 0
    assert {metric.value for metric in found.values()} == {0}


def test_divergence_is_kl_from_the_float_model_in_float64(
    loaded: LoadedModel, reference: LoadedModel, windows: Tensor
) -> None:
    found = perplexity.divergence(loaded.model, reference.model, windows, 3)
    kl, agreement = found["kl"], found[AGREEMENT]
    with torch.no_grad():
        mine, other = (m(windows).logits[:, :-1].double() for m in (loaded.model, reference.model))
    expected = torch.distributions.kl_divergence(
        torch.distributions.Categorical(logits=other), torch.distributions.Categorical(logits=mine)
    )
    assert kl.value == pytest.approx(expected.mean().item(), rel=1e-5)
    assert kl.stderr == pytest.approx((expected.mean(1).std() / math.sqrt(7)).item(), rel=1e-4)
    assert agreement.value == pytest.approx((mine.argmax(-1) == other.argmax(-1)).double().mean().item())
    assert kl.n == agreement.n == 7 * 39
    for name, share in PERCENTILES.items():
        assert found[name].value == pytest.approx(expected.flatten().quantile(share).item(), rel=1e-4)


@given(st.lists(st.floats(-1, 1e6, width=32), min_size=1, max_size=50), st.sampled_from([0.0, 0.5, 0.99, 0.999, 1.0]))
def test_a_percentile_is_interpolated_between_the_numbers_around_it(values: list[float], share: float) -> None:
    ordered = torch.tensor(values).sort().values
    expected = torch.quantile(ordered.double(), share, interpolation="linear").item()
    assert perplexity.percentile(ordered, share) == pytest.approx(expected, rel=1e-6, abs=1e-9)


def test_the_percentiles_of_kl_are_those_of_all_predictions(
    loaded: LoadedModel, reference: LoadedModel, windows: Tensor
) -> None:
    scores = perplexity.score_windows(loaded.model, reference.model, windows, 3, True, "")
    with torch.no_grad():
        mine, other = (m(windows).logits[:, :-1].double().log_softmax(-1) for m in (loaded.model, reference.model))
    expected = (other.exp() * (other - mine)).sum(-1).flatten()
    found = scores.token_kl
    assert found is not None
    assert found.shape == (7 * 39,)
    for share in PERCENTILES.values():
        wanted = torch.quantile(expected, share).item()
        assert perplexity.percentile(found, share) == pytest.approx(wanted, rel=1e-4)
    assert found.mean().item() == pytest.approx(expected.mean().item(), rel=1e-5)


@pytest.mark.parametrize("size", [1, 3, "auto"])
def test_logits_of_a_few_tokens_at_a_time_give_the_same_scores(
    loaded: LoadedModel, reference: LoadedModel, windows: Tensor, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = perplexity.score_windows(loaded.model, reference.model, windows, 3, True, "")
    seen: list[int] = []
    heads = [each.model.get_output_embeddings() for each in (loaded, reference)]
    handles = [head.register_forward_hook(lambda *args: seen.append(args[2].shape[-2])) for head in heads]
    monkeypatch.setattr(perplexity, "LOGIT_BYTES", {"cpu": 15 * 2 * 4 * 4096})
    monkeypatch.setattr(perplexity, "LEAST_PART", 1)
    monkeypatch.setattr(perplexity, "CHUNK_NUMBERS", {"cpu": 4 * 4096})
    found = perplexity.score_windows(loaded.model, reference.model, windows, size, True, "")
    for handle in handles:
        handle.remove()
    assert max(seen) <= 16, "39 predictions in three parts of up to 16"
    for ours, theirs in zip(found[:4], expected[:4], strict=True):
        assert ours is not None
        assert theirs is not None
        assert torch.allclose(ours, theirs, rtol=1e-5)
    assert found.token_kl is not None
    assert expected.token_kl is not None
    assert torch.allclose(found.token_kl, expected.token_kl, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("logit_numbers", [15 * 3 * 4096, 1 << 30])
def test_several_models_beside_one_pass_of_the_reference_have_the_scores_of_each_alone(
    loaded: LoadedModel,
    reference: LoadedModel,
    windows: Tensor,
    logit_numbers: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    models = [loaded.model, reference.model]
    expected = [perplexity.score_windows(each, reference.model, windows, 3, True, "") for each in models]
    monkeypatch.setattr(perplexity, "LOGIT_BYTES", {"cpu": 4 * logit_numbers})
    monkeypatch.setattr(perplexity, "LEAST_PART", 1)
    passes: list[int] = []
    head: list[int] = []
    handle = reference.blocks()[0][1].register_forward_hook(lambda *args: passes.append(len(args[1])))
    of_head = reference.model.get_output_embeddings().register_forward_hook(
        lambda *args: head.append(args[2].shape[-2])
    )
    found = perplexity.score_models([loaded.model], reference.model, windows, 3, True, "")
    alone, predictions, largest = len(passes), sum(head), max(head)
    found += perplexity.score_models(models, reference.model, windows, 3, True, "")[1:]
    handle.remove()
    of_head.remove()
    assert len(passes) - alone == 2 * alone, "as a model and as the reference"
    assert sum(head) == 3 * predictions, "each logit once, however many models there are"
    assert max(head) == largest, "as many logits at once as for one model"
    for ours, theirs in zip(found, expected, strict=True):
        for a, b in zip(ours[:4], theirs[:4], strict=True):
            assert a is not None
            assert b is not None
            assert torch.allclose(a, b, rtol=1e-5, atol=1e-7)
    assert found[1].kl is not None
    assert found[1].kl.abs().max() < 1e-6, "a model beside itself"


def test_a_model_of_infinities_has_a_perplexity_that_is_no_number(windows: Tensor) -> None:
    broken = tiny.with_spread_logits(0)
    with torch.no_grad():
        broken.model.get_parameter("lm_head.weight")[5] = torch.inf
    assert not math.isfinite(perplexity.perplexity(broken.model, windows, "auto").value)


@needs("wikitext2/test.jsonl")
def test_the_built_in_model_on_the_first_windows_of_wikitext2() -> None:
    """Two windows are enough to see a change; the slow test below has all 417."""
    loaded = tiny.load(tiny.BUILTIN)
    [row] = evaluate(loaded, EvalConfig(limit=2, context=512), None, seed=0)
    with torch.no_grad():
        chosen = perplexity_windows("wikitext2", loaded, 512, 2, seed=0)
        losses = torch.stack([loaded.model(w[None], labels=w[None]).loss for w in chosen])
    assert row.value == pytest.approx(losses.mean().exp().item(), rel=1e-5)
    assert (row.limit, row.n) == (2, 2 * 511)


@pytest.mark.slow
@needs("wikitext2/test.jsonl")
def test_the_built_in_model_has_a_perplexity_of_34_07_on_wikitext2() -> None:
    loaded = tiny.load(tiny.BUILTIN)
    [row] = evaluate(loaded, EvalConfig(), None, seed=0)
    assert row.value == pytest.approx(34.07, abs=0.005)
    assert row.n == 417 * 1023


def test_the_standard_error_of_the_change_is_that_of_paired_windows(loaded: LoadedModel, windows: Tensor) -> None:
    same = perplexity.score_windows(loaded.model, loaded.model, windows, 3, False, "")
    assert same.reference_nll is not None
    assert perplexity.change_stderr(same.nll, same.reference_nll) == 0
