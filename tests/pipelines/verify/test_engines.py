"""``qtool verify --engine``: engines that compute on an export, fake ones and transformers itself."""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import tiny
from helpers.native_checkpoints import exported, plain

from qtool.cli import main
from qtool.config.quant import QuantConfig
from qtool.data.short_text import SHORT_TEXT
from qtool.exporters import _outside
from qtool.pipelines import verify_engine
from qtool.pipelines.export_manifest import VERIFIED
from qtool.pipelines.verify import verify, verify_export
from qtool.pipelines.verify_engine import EngineRun, Text
from qtool.system.errors import InputError, RunError

W4 = QuantConfig(num_bits=4, group_size=32)
SHORT = Text("built-in", 2, 64)
RUN = _outside.RUN


FAKE = '''
"""A fake engine: what a test computed before, and what it changes."""

from pathlib import Path

import numpy as np

KNOWN = dict(np.load(Path(__file__).with_name("logits.npz")))


def load(folder):
    return KNOWN


def logits(model, tokens):
    print("engines print to standard output, too")
    found = model["-".join(map(str, tokens[:8]))]
    return CHANGE


def text_tokens(model, text):
    return TOKENS
'''


@pytest.fixture(scope="module")
def known(made: Path) -> dict[str, Any]:
    """The logits of each window of 64 tokens, by its first tokens."""
    ids = torch.tensor(tiny.tokenizer()(SHORT_TEXT)["input_ids"])
    model = plain(made / "dense").eval()
    with torch.inference_mode():
        return {"-".join(map(str, w[:8].tolist())): model(w[None]).logits[0].numpy() for w in ids.split(64)[:4]}


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, known: dict[str, Any]) -> Callable[..., None]:
    """A function that puts a fake in the place of transformers."""

    def put(change: str = "found", tokens: str = "[]", packages: tuple[str, ...] = ("numpy",)) -> None:
        folder = tmp_path / "runners"
        folder.mkdir(exist_ok=True)
        shutil.copy(RUN, folder / "run.py")
        np.savez(folder / "logits.npz", **known)
        text = FAKE.replace("CHANGE", change).replace("TOKENS", tokens)
        if tokens == "[]":
            text = text.partition("def text_tokens")[0]
        (folder / "fake.py").write_text(text)
        monkeypatch.setattr(_outside, "RUN", folder / "run.py")
        monkeypatch.setitem(verify_engine.RUNS, "transformers", EngineRun("fake", packages))

    return put


def test_an_engine_that_computes_the_same_is_recorded_and_named_in_the_card(
    export: Callable[[str], Path], fake: Callable[..., None]
) -> None:
    out = export("dense")
    card = (out / "README.md").read_text()
    assert "No engine has loaded this folder yet" in card
    assert "on other folders of this format" in card
    fake("found + 3")  # a number that is added to all logits of a position changes no probability
    (check,) = verify_export(out, engine="transformers", text=SHORT).engines
    assert check.ok, check.faults
    assert check.logit_difference < 1e-5
    assert check.perplexity == pytest.approx(check.torch_perplexity, rel=1e-5)
    assert (check.windows, check.context, check.tokens_equal) == (2, 64, None)
    assert check.versions["numpy"]
    card = (out / "README.md").read_text()
    assert "## Load it with transformers" in card
    assert 'AutoModelForCausalLM.from_pretrained(".")' in card
    assert f"numpy {check.versions['numpy']}" in card
    assert card.count("## Load it with transformers") == 1
    assert "No engine has loaded" not in card
    verify(out)  # neither record nor card is a file of the manifest
    assert verify_export(out).engines == (check,)  # the record is read again


@pytest.mark.parametrize(
    ("change", "tokens", "words"),
    [
        ("found * 1.01", "[]", "logits differ by 0.01"),
        ("np.roll(found, 1, axis=1)", "[]", "the perplexity is"),
        ("found", "[1, 2]", "reads the text as other tokens"),
    ],
)
def test_an_engine_that_computes_otherwise_is_a_failure_and_not_in_the_card(
    change: str,
    tokens: str,
    words: str,
    export: Callable[[str], Path],
    fake: Callable[..., None],
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = export("dense")
    fake()
    assert main.main(["verify", str(out), "--engine", "transformers", "--context", "64", "--quiet"]) == 0
    assert "## Load it with transformers" in (out / "README.md").read_text()
    fake(change, tokens)
    capsys.readouterr()
    assert main.main(["verify", str(out), "--engine", "transformers", "--context", "64", "--json"]) == 1
    printed = capsys.readouterr()
    found = json.loads(printed.out)
    assert not found["ok"]
    assert words in printed.err
    card = (out / "README.md").read_text()
    assert "## Load it with transformers" not in card
    assert "## Load it with mlx" in card, "another engine was not tried"


def test_an_engine_that_stops_is_a_run_error_with_its_last_words(made: Path, fake: Callable[..., None]) -> None:
    fake("1 / 0")
    with pytest.raises(RunError, match=r"transformers failed on .*\(exit code 1\):\n(.*\n)*ZeroDivisionError"):
        verify_export(made / "dense", engine="transformers", text=SHORT)
    fake("found[:, :-1]")
    with pytest.raises(RunError, match=r"logits of shape \[64, 319\]; \[64, 320\] was expected"):
        verify_export(made / "dense", engine="transformers", text=SHORT)


def test_an_engine_that_is_not_installed_is_refused_with_what_to_do(
    export: Callable[[str], Path], fake: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    out = export("dense")
    (out / VERIFIED).unlink(missing_ok=True)
    fake(packages=("no-such-engine",))
    assert main.main(["verify", str(out), "--engine", "transformers"]) == 2
    said = capsys.readouterr().err
    assert "has no package no-such-engine; install it with: pip install no-such-engine" in said
    assert "QTOOL_TRANSFORMERS_PYTHON" in said
    assert not (out / VERIFIED).exists()


@pytest.mark.parametrize(
    ("name", "engine", "words"),
    [
        ("dense", "mxl", "is none of transformers, mlx, .*did you mean mlx"),
        ("gptq", "mlx", "mlx does not read gptq; engines that do: transformers, gptqmodel, vllm, sglang"),
    ],
)
def test_an_engine_that_is_unknown_or_reads_another_format_is_refused(
    name: str, engine: str, words: str, made: Path
) -> None:
    with pytest.raises(InputError, match=words):
        verify_export(made / name, engine=engine)


def test_a_python_that_is_not_there_is_refused(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match=r"--python names /none, which is no file"):
        verify_export(made / "dense", engine="transformers", python=Path("/none"))
    monkeypatch.setenv("QTOOL_MLX_PYTHON", "/none")
    with pytest.raises(InputError, match=r"QTOOL_MLX_PYTHON names /none"):
        verify_export(made / "mlx", against=made / "q")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["compressed-tensors", "gguf"])
def test_transformers_itself_computes_the_same(name: str, made: Path, tmp_path: Path) -> None:
    shutil.copytree(made / name, tmp_path / name)
    (check,) = verify_export(tmp_path / name, engine="transformers", text=SHORT).engines
    assert check.ok, check.faults


@pytest.mark.slow
def test_asymmetric_compressed_tensors_are_loaded_in_transformers_dequantized(tmp_path: Path) -> None:
    tiny.quantize(tiny.llama(tmp_path / "float"), tmp_path / "q", W4.model_copy(update={"symmetric": False}))
    out = exported(tmp_path / "q", "compressed-tensors", tmp_path / "out")
    (check,) = verify_export(out, engine="transformers", text=SHORT).engines
    assert check.ok, check.faults
    assert "CompressedTensorsConfig(dequantize=True)" in (out / "README.md").read_text()


def test_runners_need_no_qtool_and_no_package_before_they_are_asked() -> None:
    for file in _outside.RUN.parent.glob("*.py"):
        text = file.read_text(encoding="utf-8")
        assert "import qtool" not in text
        assert "from qtool" not in text
    assert sys.executable == str(_outside.python_for("x", None))
