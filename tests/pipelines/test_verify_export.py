"""``qtool verify`` of exports: weights that other software re-reads, engines that compute, and what is recorded."""

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
from torch import Tensor

from qtool.cli import main
from qtool.config.quant import QuantConfig
from qtool.data.short_text import SHORT_TEXT
from qtool.exporters import _outside
from qtool.pipelines import verified, verify_engine
from qtool.pipelines.export_manifest import EXPORT_MANIFEST, VERIFIED, files_of, read_export_manifest
from qtool.pipelines.verify import verify, verify_export
from qtool.pipelines.verify_engine import EngineRun, Text
from qtool.system.errors import InputError, RunError

W4 = QuantConfig(num_bits=4, group_size=32)
LINEAR = "model.layers.1.mlp.gate_proj"
SHORT = Text("built-in", 2, 64)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a float model, ``q``, its checkpoint, and exports; only read it."""
    at = tmp_path_factory.mktemp("made")
    tiny.quantize(tiny.llama(at / "float"), at / "q", W4)
    for name in ("compressed-tensors", "gptq", "mlx", "gguf", "dense"):
        exported(at / "q", name, at / name)
    return at


@pytest.fixture(autouse=True)
def here_only(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("GPTQMODEL", "MLX", "LLAMA_CPP", "AUTO_ROUND", "COMPRESSED_TENSORS", "FAKE"):
        monkeypatch.delenv(f"QTOOL_{name}_PYTHON", raising=False)


@pytest.fixture
def export(made: Path, tmp_path: Path) -> Callable[[str], Path]:
    """A function that returns a copy of an export, to damage it."""

    def copy(name: str) -> Path:
        shutil.copytree(made / name, tmp_path / name)
        return tmp_path / name

    return copy


def listed_again(out: Path) -> None:
    """Write the hashes of the files as they are now into the manifest: only their content can show a fault."""
    manifest = read_export_manifest(out)
    assert manifest is not None
    again = manifest.model_copy(update={"files": files_of(out)})
    (out / EXPORT_MANIFEST).write_text(json.dumps(again.model_dump(mode="json")))


def changed(out: Path, change: Callable[[Tensor], Tensor], *parts: str) -> Path:
    tiny.change(out, **{f"{LINEAR}.{part}": change(tiny.stored(out)[f"{LINEAR}.{part}"]) for part in parts})
    listed_again(out)
    return out


def one_code(words: Tensor) -> Tensor:
    words[0, 0] ^= 1
    return words


def one_scale(scales: Tensor) -> Tensor:
    scales[0, 0] *= 1.5
    return scales


# weights


@pytest.mark.parametrize(
    ("name", "reader"), [("compressed-tensors", "compressed-tensors"), ("gguf", "gguf"), ("dense", "qtool")]
)
def test_weights_are_equal_as_the_formats_reader_unpacks_them(name: str, reader: str, made: Path) -> None:
    check = verify_export(made / name, against=made / "q").against
    assert check is not None
    assert check.ok
    assert (check.reader, check.by_qtool) == (reader, 0)
    assert check.versions[reader]
    assert check.weights == 14
    assert check.numbers == 2 * (64 * (64 + 32 + 32 + 64) + 3 * 64 * 96)


@pytest.mark.parametrize("name", ["gptq", "mlx"])
def test_without_the_reader_qtool_reads_itself_and_says_so(name: str, made: Path) -> None:
    check = verify_export(made / name, against=made / "q").against
    assert check is not None
    if check.missing:  # else it is installed
        assert check.ok
        assert check.reader == "qtool"
        assert "is not installed: pip install" in check.missing


BROKEN: dict[str, dict[str, tuple[Callable[[Tensor], Tensor], tuple[str, ...], int]]] = {
    "compressed-tensors": {
        "a code": (one_code, ("weight_packed",), 1),
        "a scale": (one_scale, ("weight_scale",), 31),  # some code is the zero point
        "rows": (lambda each: each.flip(0).contiguous(), ("weight_packed", "weight_scale"), 5000),
    },
    "gptq": {
        "a code": (one_code, ("qweight",), 1),
        "a scale": (one_scale, ("scales",), 31),
        "rows": (lambda each: each.flip(1).contiguous(), ("qweight", "scales"), 5000),
    },
    "mlx": {
        "a code": (one_code, ("weight",), 1),
        "a scale": (one_scale, ("scales",), 31),
        "rows": (lambda each: each.flip(0).contiguous(), ("weight", "scales", "biases"), 5000),
    },
}


@pytest.mark.parametrize("fault", ["a code", "a scale", "rows"])
@pytest.mark.parametrize("name", BROKEN)
def test_what_is_changed_in_an_export_is_found_and_named(
    name: str, fault: str, made: Path, export: Callable[[str], Path]
) -> None:
    change, parts, least = BROKEN[name][fault]
    view = torch.int32 if name == "mlx" else None  # torch has no exclusive or of uint32

    def viewed(tensor: Tensor) -> Tensor:
        seen = tensor.view(view) if view is not None and tensor.dtype == torch.uint32 else tensor
        return change(seen.clone()).view(tensor.dtype)

    out = changed(export(name), viewed, *parts)
    verify(out)  # the hashes are those of the files
    check = verify_export(out, against=made / "q").against
    assert check is not None
    assert not check.ok
    (difference,) = check.differing
    assert difference.name == LINEAR
    assert difference.numbers >= (1 if fault == "a code" else least // 2)
    assert fault != "a code" or difference.numbers == 1
    assert difference.largest > 0


def test_a_changed_byte_of_a_gguf_file_is_found(made: Path, export: Callable[[str], Path]) -> None:
    import gguf

    out = export("gguf")
    found = next(t for t in gguf.GGUFReader(out / "model.gguf").tensors if t.name == "blk.1.ffn_gate.weight")
    content = bytearray((out / "model.gguf").read_bytes())
    content[found.data_offset + 2] ^= 1  # after the scale of the first block
    (out / "model.gguf").write_bytes(content)
    listed_again(out)
    check = verify_export(out, against=made / "q").against
    assert check is not None
    assert [(each.name, each.numbers) for each in check.differing] == [(LINEAR, 1)]


def test_a_changed_norm_is_found_too(made: Path, export: Callable[[str], Path]) -> None:
    out, norm = export("compressed-tensors"), "model.layers.0.input_layernorm.weight"
    tiny.change(out, **{norm: tiny.stored(out)[norm] * 2})
    listed_again(out)
    check = verify_export(out, against=made / "q").against
    assert check is not None
    assert check.other_fault == f"{norm} differs"
    assert not check.ok


def test_a_float_model_must_resemble_the_weights(made: Path, export: Callable[[str], Path], tmp_path: Path) -> None:
    check = verify_export(made / "compressed-tensors", against=made / "float").against
    assert check is not None
    assert check.ok
    assert check.kind == "float model"
    assert check.least_cosine is not None
    assert check.least_cosine > 0.98
    out = changed(export("compressed-tensors"), BROKEN["compressed-tensors"]["rows"][0], "weight_packed")
    check = verify_export(out, against=made / "float").against
    assert check is not None
    assert [each.name for each in check.differing] == [LINEAR]
    tiny.opt(tmp_path / "other")
    with pytest.raises(InputError, match=r"has no tensor model\.layers\.0"):
        verify_export(made / "compressed-tensors", against=tmp_path / "other")


# engines

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
        shutil.copy(_outside.RUN, folder / "run.py")
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
    assert "from_pretrained" not in card
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
    assert "## Load it with" in (out / "README.md").read_text()
    fake(change, tokens)
    capsys.readouterr()
    assert main.main(["verify", str(out), "--engine", "transformers", "--context", "64", "--json"]) == 1
    printed = capsys.readouterr()
    found = json.loads(printed.out)
    assert not found["ok"]
    assert words in printed.err
    assert "## Load it with" not in (out / "README.md").read_text()


def test_an_engine_that_stops_is_a_run_error_with_its_last_words(made: Path, fake: Callable[..., None]) -> None:
    fake("1 / 0")
    with pytest.raises(RunError, match=r"transformers failed on .*\(exit code 1\):\n(.*\n)*ZeroDivisionError"):
        verify_export(made / "dense", engine="transformers", text=SHORT)
    fake("found[:, :-1]")
    with pytest.raises(RunError, match=r"logits of shape \[64, 319\]; \[64, 320\] was expected"):
        verify_export(made / "dense", engine="transformers", text=SHORT)


def test_an_engine_that_is_not_installed_is_refused_with_what_to_do(
    made: Path, fake: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    fake(packages=("no-such-engine",))
    assert main.main(["verify", str(made / "dense"), "--engine", "transformers"]) == 2
    said = capsys.readouterr().err
    assert "has no package no-such-engine; install it with: pip install no-such-engine" in said
    assert "QTOOL_TRANSFORMERS_PYTHON" in said
    assert not (made / "dense" / VERIFIED).exists()


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


# what is recorded


def test_a_record_of_other_files_is_not_believed(export: Callable[[str], Path], made: Path) -> None:
    out = export("compressed-tensors")
    verify_export(out, against=made / "q")
    assert verify_export(out).against is not None
    changed(out, one_code, "weight_packed")
    assert verify_export(out).against is None
    (out / VERIFIED).write_text("{}")
    assert verified.read(out) == verified.VerifiedRecord(manifest=verified.read(out).manifest)


def test_files_that_were_changed_are_found_before_anything_else(export: Callable[[str], Path], made: Path) -> None:
    out = export("dense")
    (out / "config.json").write_text((out / "config.json").read_text() + " ")
    with pytest.raises(RunError, match=r"config\.json was changed"):
        verify_export(out, against=made / "q")


def test_an_edited_card_keeps_what_was_edited_and_a_removed_one_stays_away(
    export: Callable[[str], Path], made: Path
) -> None:
    out = export("compressed-tensors")
    card = out / "README.md"
    card.write_text("# Mine\n\nOwn words.\n")
    verify_export(out, against=made / "q")
    first = card.read_text()
    assert first.startswith("# Mine\n\nOwn words.\n\n<!-- qtool verify: begin -->")
    assert "equal bit for bit" in first
    verify_export(out, against=made / "q")
    assert card.read_text() == first
    card.unlink()
    verify_export(out, against=made / "q")
    assert not card.exists()


def test_without_options_it_says_which_software_reads_the_export(
    made: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main.main(["verify", str(made / "mlx"), "--json"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert found["linears"] == 14
    rows = {row["name"]: row for row in found["software"]}
    assert list(rows) == ["mlx"] * (len(rows) == 1) or {"mlx"} <= set(rows)
    assert all(row["version"] or "pip install" in row["install"] for row in found["software"])
    assert main.main(["verify", str(made / "compressed-tensors")]) == 0
    said = capsys.readouterr().out
    assert "compressed-tensors | --against" in said
    assert "| vllm | --engine vllm | not installed | pip install vllm, or set QTOOL_VLLM_PYTHON |" in said


def test_runners_need_no_qtool_and_no_package_before_they_are_asked() -> None:
    for file in _outside.RUN.parent.glob("*.py"):
        text = file.read_text(encoding="utf-8")
        assert "import qtool" not in text
        assert "from qtool" not in text
    assert sys.executable == str(_outside.python_for("x", None))
