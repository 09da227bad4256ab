"""A run with ``model.free: true`` needs the files of a model, and no class of it."""

import json
import shutil
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import tiny
from helpers.quantized_sources import DEEPSEEK, in_blocks, write, write_shards
from helpers.whole_runs import Result, left, own, refused
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from qtool.checkpoints import free
from qtool.models.folders import read_config
from qtool.models.quantized_sources import FloatTensors
from qtool.reports.report import read_report

Command = Callable[..., Result]
Recipe = Callable[..., str]
SMALL: dict[str, Any] = {
    "vocab_size": tiny.VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": tiny.CONTEXT,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
}


def qwen3(folder: Path) -> Path:
    torch.manual_seed(0)
    config = Qwen3Config(
        **SMALL,
        tie_word_embeddings=True,
    )
    tiny.moved(Qwen3ForCausalLM(config), torch.bfloat16).save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return folder


def gpt_oss(folder: Path) -> Path:
    torch.manual_seed(0)
    config = GptOssConfig(
        **SMALL,
        num_local_experts=4,
        num_experts_per_tok=2,
        layer_types=["full_attention", "sliding_attention"],
        sliding_window=16,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    )
    tiny.moved(GptOssForCausalLM(config), torch.bfloat16).save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return folder


def unknown(models: Path, to: str = "model", **changes: object) -> Path:
    """A copy of the tiny Llama of a model type that transformers does not know."""
    folder = own(models / "llama", to)
    config = read_config(folder) | {"model_type": "nonsense", "architectures": ["Nonsense"]} | changes
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def same_tensors(one: Path, other: Path) -> bool:
    a, b = tiny.stored(one), tiny.stored(other)
    return a.keys() == b.keys() and all(a[n].dtype == b[n].dtype and torch.equal(a[n], b[n]) for n in a)


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt_oss"])
@pytest.mark.parametrize(
    ("method", "symmetric"),
    [({"name": "rtn"}, True), ({"name": "rtn", "range": "search"}, False), ({"name": "hqq", "iterations": 3}, False)],
)
def test_a_known_model_gets_the_tensors_of_an_ordinary_run(
    qtool_: Command, recipe: Recipe, models: Path, family: str, method: dict[str, Any], symmetric: bool
) -> None:
    folder = {
        "llama": lambda: models / "llama",
        "qwen3": lambda: qwen3(Path("q")),
        "gpt_oss": lambda: gpt_oss(Path("g")),
    }
    path = folder[family]()
    for name in ("free", "class"):
        model = {"path": str(path), "free": name == "free"}
        quant = {"symmetric": symmetric}
        result = qtool_("ptq", recipe(model=model, method=method, quant=quant, output={"path": f"out/{name}"}))
        assert result.code == 0, result.err
    assert same_tensors(Path("out/free"), Path("out/class"))
    found, ordinary = (tiny.logits(AutoModelForCausalLM.from_pretrained(f"./out/{n}")) for n in ("free", "class"))
    assert torch.equal(found, ordinary)
    one, other = (read_report(Path(f"out/{name}")) for name in ("free", "class"))
    assert one is not None
    assert other is not None
    assert one.bits_per_weight == other.bits_per_weight
    assert one.file_bits_per_weight == pytest.approx(other.file_bits_per_weight, rel=0.05), "headers differ"
    float_tables = [each.model_copy(update={"int8_bytes": None}) for each in other.tables]
    assert list(one.tables) == float_tables, "found by name; only a run with the class can quantize them"
    errors = {each.name: each.weight_error for each in other.linears if each.num_bits}
    assert {each.name: each.weight_error for each in one.linears if each.num_bits} == pytest.approx(errors, rel=1e-5)


def test_an_unknown_model_is_quantized_verified_and_exported(qtool_: Command, recipe: Recipe, models: Path) -> None:
    unknown(models, auto_map={"AutoModelForCausalLM": "modeling_nonsense.Nonsense"})
    exports = [{"format": "compressed-tensors", "path": "out/ct"}, {"format": "dense", "path": "out/dense"}]
    result = qtool_("ptq", recipe(model={"path": "model", "free": True}, export=exports))
    assert result.code == 0, result.err
    assert "model.free: 14 linears are quantized, in model.layers" in result.err
    assert "auto_map in config.json is left out" in result.err
    assert "auto_map" not in read_config(Path("out/q"))
    assert "logits not compared, since transformers has no class" in Path("out/dense/README.md").read_text()
    assert qtool_("verify", "out/q").code == 0
    assert qtool_("verify", "out/ct").code == 0
    assert qtool_("reproduce", "out/q").code == 0
    assert "is complete already" in qtool_("ptq", "r.yaml").err
    assert (
        "gptq needs; export compressed-tensors or dense instead"
        in qtool_("export", "out/q", "-f", "gptq", "-o", "out/gptq").message
    )

    (config := Path("out/ct/config.json")).write_text(
        json.dumps(json.loads(config.read_text()) | {"model_type": "llama", "architectures": ["LlamaForCausalLM"]})
    )
    qtool_("ptq", recipe(output={"path": "out/known"}))
    ours = AutoModelForCausalLM.from_pretrained("./out/known", dtype=torch.float32)
    theirs = AutoModelForCausalLM.from_pretrained("./out/ct", dtype=torch.float32)
    torch.testing.assert_close(tiny.logits(theirs), tiny.logits(ours), rtol=1e-4, atol=1e-4)


def test_an_fp8_model_is_expanded_tensor_by_tensor(qtool_: Command, recipe: Recipe, models: Path) -> None:
    write(models / "llama", Path("fp8"), DEEPSEEK, lambda w: in_blocks(w, (40, 48)), "weight_scale_inv", shards=3)
    for name in ("free", "class"):
        model = {"path": "fp8", "free": name == "free"}
        assert qtool_("ptq", recipe(model=model, output={"path": f"out/{name}"})).code == 0
    assert same_tensors(Path("out/free"), Path("out/class"))


def test_gpt_oss_in_mxfp4_is_expanded_for_a_run_with_its_class_and_without(qtool_: Command, recipe: Recipe) -> None:
    folder = gpt_oss(Path("oss"))
    tensors, generator = load_file(folder / "model.safetensors"), torch.Generator().manual_seed(0)
    for block in range(2):
        for name, rows, groups in (("gate_up_proj", 192, 2), ("down_proj", 64, 3)):
            full = f"model.layers.{block}.mlp.experts.{name}"
            assert tensors.pop(full).shape == (4, 32 * groups, rows)
            tensors[f"{full}_blocks"] = torch.randint(256, (4, rows, groups, 16), generator=generator).to(torch.uint8)
            tensors[f"{full}_scales"] = torch.randint(118, 124, (4, rows, groups), generator=generator).to(torch.uint8)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = read_config(folder) | {"quantization_config": {"quant_method": "mxfp4"}}
    (folder / "config.json").write_text(json.dumps(config))
    for name in ("free", "class"):
        result = qtool_("ptq", recipe(model={"path": "oss", "free": name == "free"}, output={"path": f"out/{name}"}))
        assert result.code == 0, result.err
        assert "4 of 37 tensors are stored in MXFP4 (mxfp4); they are expanded to bfloat16: exactly" in result.err
    assert same_tensors(Path("out/free"), Path("out/class"))


def experts(count: int, shape: tuple[int, int], seed: int = 0) -> Tensor:
    return torch.randn(count, *shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


def with_tensors(folder: Path, **tensors: Tensor) -> None:
    """Add tensors to the block 0 of a model."""
    file = folder / "model.safetensors"
    more = {f"model.layers.0.{name.replace('__', '.')}": tensor for name, tensor in tensors.items()}
    save_file(load_file(file) | more, file, {"format": "pt"})


def test_names_and_shapes_decide_and_overrides_decide_before_them(
    qtool_: Command, recipe: Recipe, models: Path
) -> None:
    folder = unknown(models)
    with_tensors(
        folder,
        mlp__gate__weight=experts(1, (64, 64))[0],
        mlp__shared__weight=experts(1, (16, 64))[0],
        mlp__experts__3__gate_proj__weight=experts(1, (96, 64))[0],
        mlp__experts__down_proj=experts(3, (64, 96)),
        conv__weight=experts(64, (1, 4)),
        vision__blocks__0__proj__weight=experts(1, (64, 64))[0],
    )
    quant = {"overrides": {"*.1.mlp.up_proj": {"skip": True}, "lm_head": {"skip": False, "num_bits": 8}}}
    result = qtool_("ptq", recipe(model={"path": "model", "free": True}, quant=quant))
    assert result.code == 0, result.err
    section = read_config(Path("out/q"))["quantization_config"]
    chosen = {name.removeprefix("model.layers.") for name in section["linears"] if name[13:14] != "1"}
    attention = {f"0.self_attn.{each}_proj" for each in "qkvo"}
    mlp = {
        "0.mlp.gate_proj",
        "0.mlp.up_proj",
        "0.mlp.down_proj",
        "0.mlp.experts.3.gate_proj",
        "0.mlp.experts.down_proj",
    }
    assert chosen == attention | mlp | {"lm_head"}
    assert "model.layers.1.mlp.up_proj" not in section["linears"]
    assert section["overrides"] == {"lm_head": {"num_bits": 8}}
    assert section["model_free"] == {"experts": {"model.layers.0.mlp.experts.down_proj": 3}}
    report = read_report(Path("out/q"))
    assert report is not None
    floats = {each.name for each in report.linears if each.num_bits is None}
    assert floats == {
        "model.layers.0.mlp.gate",
        "model.layers.0.mlp.shared",
        "model.layers.0.vision.blocks.0.proj",
        "model.layers.1.mlp.up_proj",
    }
    assert "holds the experts of a layer" in qtool_("export", "out/q", "-f", "dense", "-o", "out/d").message


SQUARE = {"mlp__experts__down_proj": experts(8, (64, 64))}  # [out, in] or [in, out]
WIDE = {"mlp__experts__w1": experts(8, (64, 96))}  # a name that says nothing


@pytest.mark.parametrize("tensors", [SQUARE, WIDE])
def test_weights_that_names_and_shapes_do_not_explain_are_refused(
    qtool_: Command, recipe: Recipe, models: Path, tensors: dict[str, Tensor]
) -> None:
    with_tensors(unknown(models), **tensors)
    name = next(iter(tensors)).replace("__", ".")
    message = refused(qtool_("ptq", recipe(model={"path": "model", "free": True})))
    assert "in tensors that names and shapes do not show to be linears" in message
    assert f"e.g. model.layers.0.{name}; run without model.free" in message
    overrides = {f"*.{name}": {"skip": True}}
    assert qtool_("ptq", recipe(model={"path": "model", "free": True}, quant={"overrides": overrides})).code == 0


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"method": {"name": "gptq"}}, "method gptq runs the model, which needs its class; use hqq or rtn"),
        ({"eval": {"tasks": ["generated"]}}, "an evaluation runs the model"),
        ({"quant": {"budget": {"average_bits": 4}, "num_bits": None}}, "quant.budget measures the model"),
        ({"quant": {"embedding": {"num_bits": 8}}}, "quant.embedding needs the model's class"),
        ({"quant": {"head": {"num_bits": 8}}}, "let quant.overrides quantize a head by its name: {lm_head: {skip: "),
        ({"quant": {"preset": "a8"}}, "quant has activations"),
        ({"quant": {"overrides": {"*q_proj": {"kv_cache": 4}}}}, r"quant.overrides '*q_proj' has kv_cache"),
        ({"quant": {"overrides": {"*q_prj": {"num_bits": 8}}}}, "no linear matches '*q_prj'"),
        ({"quant": {"overrides": {"*": {"skip": True}}}}, "nothing is left to quantize"),
        ({"quant": {"group_size": 48}}, "group_size 48 does not divide that number"),
        ({"export": [{"format": "gptq", "path": "out/g"}]}, "cannot be exported as gptq: it was made with model.free"),
    ],
)
def test_what_needs_the_class_is_refused_before_any_work(
    qtool_: Command, recipe: Recipe, models: Path, sections: dict[str, Any], words: str
) -> None:
    unknown(models)
    assert words in refused(qtool_("ptq", recipe(model={"path": "model", "free": True}, **sections)))
    assert left() == []


def test_other_commands_refuse_a_recipe_that_asks_for_it(qtool_: Command, recipe: Recipe, models: Path) -> None:
    unknown(models)
    path = recipe(model={"path": "model", "free": True}, quant={"budget": {"average_bits": 4}, "num_bits": None})
    assert "model.free: only qtool ptq works without the model's class" in qtool_("plan", path).message


def spoiled(name: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        tensors[name].view(-1)[3] = torch.nan
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})

    return change


def transposed(folder: Path) -> None:
    with_tensors(folder, attn__c_attn__weight=experts(1, (64, 192))[0], attn__c_attn__bias=torch.zeros(192))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (spoiled("model.layers.0.mlp.up_proj.weight"), "up_proj.weight holds 1 NaN or infinite value(s)"),
        (spoiled("model.embed_tokens.weight"), "embed_tokens.weight holds 1 NaN or infinite value(s)"),
        (transposed, "its bias has 192 numbers: weights are stored as [in, out]"),
        (lambda folder: (folder / "adapter_config.json").write_text("{}"), "holds an adapter"),
        (lambda folder: (folder / "config.json").write_text("[]"), "a JSON object was expected"),
        (lambda folder: (folder / "model.safetensors").unlink(), "has no *.safetensors file"),
        (
            lambda folder: (folder / "config.json").write_text('{"quantization_config": {"quant_method": "awq"}}'),
            "is already quantized (awq)",
        ),
        (lambda folder: with_tensors(folder, x=torch.zeros(3).to(torch.float8_e4m3fn)), "a part of a quantized weight"),
    ],
)
def test_a_model_that_cannot_be_used_is_refused(
    qtool_: Command, recipe: Recipe, models: Path, damage: Callable[[Path], None], words: str
) -> None:
    damage(unknown(models))
    assert words in refused(qtool_("ptq", recipe(model={"path": "model", "free": True})))


def sharded(models: Path, count: int) -> Path:
    folder = unknown(models)
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    write_shards(tensors, folder, count)
    return folder


def test_a_run_that_was_stopped_keeps_the_files_that_it_wrote(
    qtool_: Command, recipe: Recipe, models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sharded(models, 4)
    path = recipe(model={"path": "model", "free": True})
    written: list[str] = []
    write_file = free.write_file

    def stopped(file: Path, *args: Any) -> None:
        if len(written) == 2:
            raise OSError("the disk is gone")
        written.append(file.name)
        write_file(file, *args)

    with monkeypatch.context() as patched:
        patched.setattr(free, "write_file", stopped)
        assert "run the same command again" in qtool_("ptq", path).message
    again: list[str] = []

    def counted(file: Path, *args: Any) -> None:
        again.append(file.name)
        write_file(file, *args)

    with monkeypatch.context() as patched:
        patched.setattr(free, "write_file", counted)
        assert qtool_("ptq", path).code == 0
    assert written == ["model-00001-of-00004.safetensors", "model-00002-of-00004.safetensors"]
    assert again == ["model-00003-of-00004.safetensors", "model-00004-of-00004.safetensors"]
    assert qtool_("ptq", recipe(model={"path": "model", "free": True}, output={"path": "out/whole"})).code == 0
    assert same_tensors(Path("out/q"), Path("out/whole"))
    one, other = (json.loads(Path(f"out/{name}/qtool.json").read_text()) for name in ("q", "whole"))
    assert one["weight_errors"] == other["weight_errors"]
    assert one["files"]["config.json"] == other["files"]["config.json"]


def test_one_tensor_is_in_memory_at_a_time(
    qtool_: Command, recipe: Recipe, models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(models / "llama", Path("fp8"), DEEPSEEK, lambda w: in_blocks(w, (40, 48)), "weight_scale_inv", shards=4)
    alive: list[weakref.ref[Tensor]] = []
    tensor = FloatTensors.tensor

    def counted(self: FloatTensors, name: str) -> Tensor:
        assert [each for each in alive if each() is not None] == [], f"a tensor before {name} is still in memory"
        found = tensor(self, name)
        alive.append(weakref.ref(found))
        return found

    monkeypatch.setattr(FloatTensors, "tensor", counted)
    assert qtool_("ptq", recipe(model={"path": "fp8", "free": True})).code == 0
    assert len(alive) == 2 * 21


def test_weights_that_a_folder_holds_twice_are_read_once(qtool_: Command, recipe: Recipe, models: Path) -> None:
    folder = sharded(models, 2)
    shutil.copy(models / "llama" / "model.safetensors", folder / "consolidated.safetensors")
    assert qtool_("ptq", recipe(model={"path": "model", "free": True})).code == 0
    assert len(list(Path("out/q").glob("*.safetensors"))) == 2
