"""A run refuses faults before its work: in recipes, models and exports."""

import json
import os
import re
from collections.abc import Callable
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import tiny
from helpers.whole_runs import Q_PROJ, Result, digest, left, own, refused
from safetensors.torch import save_file

from qtool.checkpoints.files import write_json
from qtool.checkpoints.native import MANIFEST, NativeCheckpoint, PlannedCheckpoint
from qtool.config import catalog
from qtool.config.quant import QuantConfig
from qtool.config.sections import ExportConfig
from qtool.exporters import _base
from qtool.models.folders import read_config
from qtool.models.targets import select_targets


@pytest.fixture
def no_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let quantizing fail: a fault must be found before."""
    for name in ("rtn", "gptq"):
        module = import_module(f"qtool.methods.{name}")

        def run(*args: object) -> None:
            pytest.fail("the model was quantized")

        monkeypatch.setattr(module, "METHOD", replace(module.METHOD, run=run))


MIXED: dict[str, Any] = {"overrides": {"*.down_proj": {"num_bits": 8}}}
SKIPPED: dict[str, Any] = {"overrides": {"*.1.mlp.up_proj": {"skip": True}}}


@pytest.mark.usefixtures("no_work")
@pytest.mark.parametrize(
    ("model", "quant", "entry", "words"),
    [
        ("llama", MIXED, {"format": "gptq"}, "2 different grids"),
        ("llama", SKIPPED, {"format": "gptq-v2"}, "mlp.up_proj is left in floating point"),
        ("gpt2", {}, {"format": "gptq"}, "is a Conv1D"),
        ("gpt2", {}, {"format": "compressed-tensors"}, "is a Conv1D"),
        ("llama", {"scale_dtype": "float32"}, {"format": "gptq"}, "scale_dtype: float16"),
        ("llama", {"scale_dtype": "float32"}, {"format": "compressed-tensors", "dtype": "bfloat16"}, "scale"),
        ("gpt2", {}, {"format": "dense", "path": "r.yaml/x"}, "cannot be written"),
        (
            "llama",
            {},
            {"format": "dense", "path": "out/q"},
            "out/q overlaps output.path: out/q, which is written",
        ),
        ("llama", {}, {"format": "dense", "path": "there"}, "there exists"),
    ],
)
def test_an_export_that_cannot_be_is_refused_before_quantization(
    model: str,
    quant: dict[str, Any],
    entry: dict[str, str],
    words: str,
    qtool_: Callable[..., Result],
    recipe: Callable[..., str],
    models: Path,
) -> None:
    Path("there").mkdir()
    export = [{"path": "out/e", **entry}]
    message = refused(qtool_("ptq", recipe(model={"path": str(models / model)}, quant=quant, export=export)))
    assert words in message
    assert left() == []


def test_what_is_planned_is_refused_for_the_same_reason_as_what_is_made(models: Path) -> None:
    config = ExportConfig(format="gptq", path=Path("x"))
    long_scales = {"scale_dtype": "float32", "negative_scales": False}  # of either sign are eighths of weights: short
    for index, changes in enumerate((MIXED, SKIPPED, long_scales, {})):
        quant = QuantConfig.model_validate({"num_bits": 4, "group_size": 32, **changes})
        loaded = tiny.load(models / "llama")
        targets = select_targets(loaded, quant)
        shapes = {target.name: (target.weight.shape[0], target.weight.shape[1]) for target in targets}
        planned = PlannedCheckpoint(loaded, {target.name: target.spec for target in targets}, shapes)
        tiny.quantize(models / "llama", Path(f"q{index}"), quant)
        for name in catalog.export_formats():
            exporter = _base.get(name)
            before, after = (
                exporter.refuses(planned, config),
                exporter.refuses(NativeCheckpoint(Path(f"q{index}")), config),
            )
            assert before == after, name


Damage = Callable[[Path], object]


def edit_config(**changes: object) -> Damage:
    return lambda model: write_json(model / "config.json", read_config(model) | changes)


def edit_tensor(name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Damage:
    return lambda model: tiny.change(model, **{name: change(tiny.stored(model)[name])})


def put(name: str, content: bytes) -> Damage:
    return lambda model: (model / name).write_bytes(content)


def spoil(index: tuple[int, ...], value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    def change(tensor: torch.Tensor) -> torch.Tensor:
        tensor[index] = value
        return tensor

    return change


def without(*names: str) -> Damage:
    def drop(model: Path) -> None:
        tensors = {name: tensor for name, tensor in tiny.stored(model).items() if name not in names}
        save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})

    return drop


def cut(model: Path) -> None:
    os.truncate(model / "model.safetensors", 100_000)


def pickled(model: Path) -> None:
    (model / "model.safetensors").rename(model / "pytorch_model.bin")


def index_of(content: bytes) -> Damage:
    return put("model.safetensors.index.json", content)


DAMAGES: dict[str, tuple[Damage, str]] = {
    "no config": (lambda model: (model / "config.json").unlink(), r"model has no config\.json"),
    "config is no JSON": (put("config.json", b"{"), r"config\.json is not JSON"),
    "config is a list": (put("config.json", b"[]"), r"config\.json holds a list"),
    "unknown architecture": (edit_config(model_type="nonsense"), r"model cannot be loaded: .*nonsense"),
    "needs code": (
        edit_config(model_type="nonsense", auto_map={"AutoModelForCausalLM": "x.Y"}),
        r"needs code from its own folder",
    ),
    "adapter beside it": (put("adapter_config.json", b"{}"), r"is not merged into the model; merge it first"),
    "already quantized": (edit_config(quantization_config={"quant_method": "awq"}), r"is already quantized \(awq\)"),
    "no weights": (lambda model: (model / "model.safetensors").unlink(), r"model has no \*\.safetensors file"),
    "pickled weights": (pickled, r"only pickled weights \(pytorch_model\.bin\)"),
    "truncated": (cut, r"model\.safetensors is truncated or damaged"),
    "empty file": (put("model.safetensors", b""), r"model\.safetensors is truncated or damaged"),
    "not safetensors": (put("model.safetensors", b"PK\x03\x04" * 100), r"model\.safetensors is truncated or damaged"),
    "index lists a file that is not there": (
        index_of(b'{"weight_map": {"x": "model-00002-of-00002.safetensors"}}'),
        r"lists model-00002-of-00002\.safetensors, which is not there",
    ),
    "index is no JSON": (index_of(b"{"), r"index\.json is not "),
    "index without a map": (index_of(b"{}"), r"index\.json"),
    "wrong shape": (
        edit_tensor(f"{Q_PROJ}.weight", lambda tensor: tensor[:32].contiguous()),
        rf"{Q_PROJ}\.weight has shape \[32, 64\] in the file, and the config asks for \[64, 64\]",
    ),
    "missing tensor": (without(f"{Q_PROJ}.weight"), rf"lacks 1 tensor.*{Q_PROJ}\.weight"),
    "NaN": (edit_tensor(f"{Q_PROJ}.weight", spoil((3, 5), float("nan"))), rf"{Q_PROJ}\.weight holds 1 NaN or inf"),
    "infinity": (edit_tensor(f"{Q_PROJ}.weight", spoil((3, 5), float("-inf"))), rf"{Q_PROJ}\.weight holds 1 NaN or"),
    "NaN in a norm": (edit_tensor("model.norm.weight", spoil((3,), float("nan"))), r"model\.norm\.weight .*NaN"),
    "NaN in embeddings": (
        edit_tensor("model.embed_tokens.weight", spoil((3, 1), float("nan"))),
        r"model\.embed_tokens\.weight .*NaN",
    ),
    "no tokenizer": (lambda model: (model / "tokenizer.json").unlink(), r"tokenizer.*[a-z)]$"),
}


@pytest.mark.usefixtures("no_work")
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_model_is_refused_with_the_place_of_the_damage(
    damage: str, qtool_: Callable[..., Result], recipe: Callable[..., str], models: Path
) -> None:
    model = own(models / "llama")
    change, words = DAMAGES[damage]
    change(model)
    before = digest(model)
    message = refused(qtool_("ptq", recipe(model={"path": "./model"})))
    assert re.search(words, message), message
    assert left() == []
    assert digest(model) == before


RECIPES: dict[str, tuple[dict[str, Any], str]] = {
    "no such folder": ({"model": {"path": "./nowhere"}}, r"model\.path: there is no folder \./nowhere"),
    "model is a file": ({"model": {"path": "r.yaml"}}, r"model\.path: r\.yaml is a file"),
    "no such built-in": ({"model": {"path": "builtin:gpt-5"}}, r"no model builtin:gpt-5; built in: builtin:wiki"),
    "no such device": ({"model": {"device": "tpu9"}}, r"model\.device: 'tpu9' is no device"),
    "group size": ({"quant": {"group_size": 48}}, r"64 input channels, and group_size 48 does not divide that"),
    "override": ({"quant": {"overrides": {"*q_prj": {"num_bits": 8}}}}, r"no linear matches '\*q_prj'.*q_proj"),
    "all skipped": ({"quant": {"overrides": {"*": {"skip": True}}}}, r"skip every linear"),
    "bits": ({"quant": {"num_bits": 5}}, r"quant\.num_bits: .*2, 3, 4 or 8.*found 5"),
    "method": ({"method": {"name": "gtpq"}}, r"method\.name: no such method; the nearest is gptq"),
    "method key": (
        {"method": {"name": "gptq", "dampp": 1}},
        r"method\.dampp: unknown key; the nearest is method\.damp",
    ),
    "format": (
        {"export": [{"format": "gguff", "path": "x"}]},
        r"export\.0\.format: no such export format; .*known: .*gptq",
    ),
    "task": ({"eval": {"tasks": ["wikitext22"]}}, r"wikitext22"),
    "no text file": ({"data": {"source": "none.txt"}}, r"data\.source: there is no file none\.txt"),
    "unknown source": ({"data": {"source": "wikitex2"}}, r"neither a known name .*did you mean wikitext2\?"),
    "suffix": ({"data": {"source": "r.yaml"}}, r"has a suffix that cannot be read"),
    "empty text": ({"data": {"source": "empty.txt"}}, r"data\.source: empty\.txt is empty"),
    "little text": ({"data": {"source": "little.txt", "num_samples": 4, "seq_len": 64}}, r"too little text: \d+ wind"),
    "windows too long": ({"data": {"source": "little.txt", "seq_len": 4096}}, r"made for at most 128 tokens"),
    "output exists": ({"output": {"path": "there"}}, r"there exists"),
    "output is a file": ({"output": {"path": "r.yaml"}}, r"r\.yaml exists"),
    "output below a file": ({"output": {"path": "r.yaml/q"}}, r"r\.yaml/q cannot be written: .* is a file"),
}


@pytest.mark.usefixtures("no_work")
@pytest.mark.parametrize("fault", RECIPES)
def test_a_recipe_that_cannot_run_is_refused_with_what_to_change(
    fault: str, qtool_: Callable[..., Result], recipe: Callable[..., str], gptq: dict[str, Any]
) -> None:
    Path("empty.txt").write_text("")
    Path("little.txt").write_text("Too little text for four windows of this size.\n" * 3)
    Path("there").mkdir()
    Path("there", "mine").write_text("")
    sections, words = RECIPES[fault]
    base = {"method": gptq["method"]} if "data" in sections else {}
    message = refused(qtool_("ptq", recipe(**base | sections)))
    assert re.search(words, message, re.DOTALL), message
    assert left() == []
    assert [path.name for path in Path("there").iterdir()] == ["mine"]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"model: {path: caf\xe9}\n", r"r\.yaml is not UTF-8: byte 0xe9 in line 1"),
        (b"model: {path: [}\n", r"r\.yaml is not YAML: line 1, column"),
        (b"", r"r\.yaml is empty; qtool recipes quickstart"),
        (b"# only a comment\n", r"r\.yaml is empty"),
        (b"- a\n- b\n", r"not sections \(model:, method:"),
        (None, r"r\.yaml does not exist"),
    ],
)
def test_a_recipe_that_cannot_be_read_is_refused(
    content: bytes | None, words: str, qtool_: Callable[..., Result]
) -> None:
    if content is not None:
        Path("r.yaml").write_bytes(content)
    message = refused(qtool_("ptq", "r.yaml"))
    assert re.search(words, message), message


@pytest.mark.usefixtures("no_work")
def test_a_method_under_another_command_is_sent_to_its_own(
    qtool_: Callable[..., Result], recipe: Callable[..., str]
) -> None:
    message = refused(qtool_("qat", recipe(method={"name": "gptq"})))
    assert message == "error: method gptq runs as: qtool ptq, not qtool qat"


@pytest.mark.parametrize(
    ("start", "words"),
    [("./nowhere", r"method\.init_from: there is no folder"), ("{models}/llama", "is a float model")],
)
def test_a_start_that_is_no_checkpoint_is_refused_before_the_model_is_read(
    qtool_: Callable[..., Result], recipe: Callable[..., str], models: Path, start: str, words: str
) -> None:
    method = {"name": "lsq", "init_from": start.format(models=models)}
    result = qtool_("qat", recipe(method=method))
    assert re.search(words, refused(result)), result.err
    assert "loading" not in result.err
    assert left() == []


@pytest.mark.usefixtures("no_work")
def test_one_fault_in_every_block_does_not_hide_another(
    qtool_: Callable[..., Result], recipe: Callable[..., str], models: Path
) -> None:
    model = own(models / "llama")
    edit_tensor("model.layers.1.mlp.down_proj.weight", spoil((3, 5), 1e30))(model)
    quant = {"group_size": 48, "scale_dtype": "float16", "overrides": {"*.down_proj": {"group_size": 32}}}
    message = refused(qtool_("ptq", recipe(model={"path": "./model"}, quant=quant)))
    assert "does not divide" in message
    assert "down_proj.weight has weights up to 1e+30" in message


@pytest.mark.usefixtures("no_work")
def test_all_that_the_walk_finds_is_said_at_once(qtool_: Callable[..., Result], recipe: Callable[..., str]) -> None:
    overrides = {"*q_prj": {"num_bits": 8}, "*.v_proj": {"group_size": 24}}
    result = qtool_("ptq", recipe(quant={"overrides": overrides}))
    assert result.code == 2
    assert "no linear matches '*q_prj'" in result.message
    assert result.message.count("group_size 24 does not divide") == 1
    assert "(and 1 more like it)" in result.message


@pytest.mark.usefixtures("no_work")
def test_an_error_with_json_is_one_object_too(qtool_: Callable[..., Result], recipe: Callable[..., str]) -> None:
    result = qtool_("ptq", recipe(quant={"group_size": 48}), "--json")
    assert result.code == 2
    assert len(result.out.splitlines()) == 1
    assert set(json.loads(result.out)) == {"error", "kind", "exit_code"}
    assert json.loads(result.out)["kind"] == "input"


@pytest.mark.usefixtures("no_work")
def test_the_model_that_is_read_is_never_overwritten(
    qtool_: Callable[..., Result], recipe: Callable[..., str], models: Path
) -> None:
    model = own(models / "llama")
    before = digest(model)
    for path in ("model", "./model", str(model.absolute())):
        result = qtool_("ptq", recipe(model={"path": "./model"}, output={"path": path}), "--overwrite")
        assert digest(model) == before
        assert "model" in refused(result)


def test_an_export_never_replaces_the_checkpoint_it_reads(
    qtool_: Callable[..., Result], recipe: Callable[..., str]
) -> None:
    assert qtool_("ptq", recipe()).code == 0
    before = digest(Path("out/q"))
    for path in ("out/q", "./out/../out/q"):
        result = qtool_("export", "out/q", "--format", "dense", "-o", path, "--overwrite")
        assert digest(Path("out/q")) == before
        assert result.code == 2
        assert "out/q" in result.message


def test_tensors_wider_than_the_dtype_of_the_config_go_through_or_are_refused_before_the_work(
    qtool_: Callable[..., Result], recipe: Callable[..., str]
) -> None:
    tiny.llama(Path("model"), dtype=torch.float32)
    edit_config(dtype="bfloat16")(Path("model"))  # as many published checkpoints have it
    result = qtool_("ptq", recipe(model={"path": "./model"}))
    assert result.code in (0, 2), result.err
    if result.code == 0:
        floats, ours = tiny.stored(Path("model")), tiny.stored(Path("out/q"))
        assert torch.equal(ours["model.norm.weight"].float(), floats["model.norm.weight"])


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_computing_in_half_precision_changes_nothing_that_stays_float(
    dtype: str, qtool_: Callable[..., Result], recipe: Callable[..., str]
) -> None:
    tiny.llama(Path("model"), dtype=torch.float32)
    result = qtool_("ptq", recipe(model={"path": "./model", "dtype": dtype}))
    assert result.code == 0, result.err
    floats, ours = tiny.stored(Path("model")), tiny.stored(Path("out/q"))
    for name in NativeCheckpoint(Path("out/q")).float_names():
        assert torch.equal(ours[name], floats[name]), name


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (("export", "nowhere", "-f", "gptq", "-o", "x"), "nowhere is not a folder; give one that qtool ptq wrote"),
        (("export", "model", "-f", "gptq", "-o", "x"), "model is a float model; a qtool checkpoint is needed"),
        (("export", "model", "-f", "gptqq", "-o", "x"), "no such export format; the nearest is gptq"),
        (("eval", "./nowhere"), "TARGET: there is no folder ./nowhere"),
        (("eval", "./nowhere.gguf"), "TARGET: there is no file ./nowhere.gguf"),
        (("eval", "model", "--tasks", "generatedd"), "generatedd"),
        (("eval", "model", "--tasks", "generated", "--float-model", "./nowhere"), "there is no folder ./nowhere"),
        (("eval", "model", "--tasks", "generated", "--batch-size", "0"), "batch_size"),
        (("eval", "model", "--tasks", ""), "tasks"),
        (("eval", "model", "--tasks", "generated", "--output", "model/config.json"), "config.json"),
    ],
)
def test_export_and_eval_refuse_what_they_cannot_use(
    args: tuple[str, ...], words: str, qtool_: Callable[..., Result], models: Path
) -> None:
    model = own(models / "llama")
    before = digest(model)
    message = refused(qtool_(*args))
    assert words in message
    assert not Path("x").exists()
    assert digest(model) == before


@pytest.mark.parametrize("command", ["eval", "export"])
@pytest.mark.parametrize("content", [b"{", b"[]", b"{}", b'{"recipe": {}}'], ids=repr)
def test_a_damaged_manifest_is_named_or_not_needed(
    command: str, content: bytes, qtool_: Callable[..., Result], recipe: Callable[..., str]
) -> None:
    assert qtool_("ptq", recipe()).code == 0
    Path("out/q", MANIFEST).write_bytes(content)
    eval_ = ("eval", "out/q", "--tasks", "generated", "--limit", "1", "--context", "16")
    result = qtool_(*(eval_ if command == "eval" else ("export", "out/q", "-f", "gptq", "-o", "out/x")))
    assert result.code in (0, 2), result.err
    assert result.code == 0 or MANIFEST in result.message
