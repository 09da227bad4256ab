"""Text that a model writes: its content, and that a cache changes nothing, whatever cache the architecture has."""

import pytest
import torch
from helpers import tiny
from helpers.caches import OTHERS, WITHOUT, make
from helpers.notes import Notes

from qtool.config.sections import DataConfig
from qtool.data import generated
from qtool.data import windows as calibration_windows
from qtool.data.generated import generated_tokens
from qtool.models.loaded import LoadedModel
from qtool.system import progress


@pytest.fixture(scope="module")
def loaded() -> LoadedModel:
    """A tiny random Llama with the tokenizer of the built-in model."""
    return tiny.with_builtin_tokenizer(0, 128)


@pytest.mark.parametrize("name", ["llama", "gemma3", *OTHERS])
def test_the_text_is_that_of_a_model_without_a_cache(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded, sink = make(name), Notes()
    with progress.use(sink):
        tokens = generated_tokens(loaded, 3, 20, 0)
    monkeypatch.setattr(generated, "find_cache", lambda *_: None)
    assert torch.equal(tokens, generated_tokens(loaded, 3, 20, 0))
    said = [line for line in sink.texts if "with a KV cache than without one" in line]
    assert len(said) == (name in WITHOUT)


def test_the_tokens_written_so_far_are_counted(loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generated, "CACHE_BYTES", {"cpu": 1})  # one window at a time
    counts = []

    class Counts(progress.Sink):
        def advance(self, task: progress.Task) -> None:
            counts.append((task.done, task.total))

    with progress.use(Counts()):
        generated_tokens(loaded, 3, 20, 0)
    total = 3 * 19  # the first token of a window is drawn without the model
    assert counts == [(done, total) for done in range(1, total + 1)]


@pytest.mark.parametrize("name", ["llama", "xlstm"])
def test_a_cache_that_works_is_used(name: str) -> None:
    loaded = make(name)
    lengths: list[int] = []
    loaded.model.register_forward_pre_hook(lambda _, args: lengths.append(args[0].shape[1]))
    generated_tokens(loaded, 2, 20, 0)
    assert max(lengths) <= 3


def test_generated_text_is_fixed_by_its_seed_alone(loaded: LoadedModel) -> None:
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    first = generated_tokens(loaded, 6, 24, seed=1)
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.manual_seed(6)
    assert torch.equal(first, generated_tokens(loaded, 6, 24, seed=1))
    assert not torch.equal(first, generated_tokens(loaded, 6, 24, seed=2))


def test_generated_text_does_not_depend_on_the_batch(loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = generated_tokens(loaded, 6, 24, seed=1)
    monkeypatch.setattr(generated, "CACHE_BYTES", {"cpu": 1})
    assert torch.equal(whole, generated_tokens(loaded, 6, 24, seed=1))


def test_generated_text_is_greedy_for_three_to_five_tokens_and_then_sampled(loaded: LoadedModel) -> None:
    tokens = generated_tokens(loaded, 32, 40, seed=0)
    with torch.no_grad():
        logits = loaded.model(tokens).logits  # computed without a KV cache, to be independent
    logits[..., 0] = -torch.inf
    greedy = logits[:, :-1].argmax(-1) == tokens[:, 1:]
    assert greedy[:, :3].all()
    lengths = greedy.int().cumprod(-1).sum(-1)
    assert set(lengths.tolist()) == {3, 4, 5}
    assert greedy[:, 5:].float().mean() < 0.1


def test_generated_text_has_the_frequencies_of_the_model(loaded: LoadedModel) -> None:
    uniform = (torch.arange(10_000) + 0.5)[:, None] / 10_000
    allowed = torch.arange(1, 6)
    draw = generated._sampler(uniform, torch.zeros(10_000), allowed, torch.device("cpu"))
    logits = torch.tensor([9.0, 0.0, 1.0, -1.0, 0.5, 2.0]).expand(10_000, 6)
    drawn = draw(logits, 0, 9)
    assert 0 not in drawn
    shares = torch.bincount(drawn, minlength=6)[1:] / 10_000
    torch.testing.assert_close(shares, logits[0, 1:].softmax(-1), atol=2e-4, rtol=0)


def test_generated_text_has_no_special_tokens(loaded: LoadedModel) -> None:
    with torch.no_grad():
        loaded.model.get_parameter("lm_head.weight")[0] += 1  # the end token becomes likely
    try:
        assert 0 not in generated_tokens(loaded, 8, 64, seed=0)
    finally:
        with torch.no_grad():
            loaded.model.get_parameter("lm_head.weight")[0] -= 1


def test_generated_text_for_evaluation_is_other_text(loaded: LoadedModel) -> None:
    calibration = calibration_windows.calibration(
        DataConfig(source="generated", num_samples=4, seq_len=16), loaded, seed=0
    ).tokens
    for seed in (0, 1):
        windows = calibration_windows.perplexity_windows("generated", loaded, 16, 4, seed=seed)
        assert windows.shape == (4, 16)
        assert not set(map(tuple, windows.tolist())) & set(map(tuple, calibration.tolist()))
    assert not {calibration_windows.calibration_seed(s) for s in range(50)} & {
        calibration_windows.evaluation_seed(s) for s in range(50)
    }
