"""Exports of mixtures of experts: each expert where the format's readers look for it, or refused with the reason."""

from pathlib import Path

import gguf
import pytest
import torch
from helpers import architectures, tiny
from helpers.native_checkpoints import exported, read_back
from torch import Tensor, nn

from qtool.blocks.job import Job
from qtool.checkpoints.native import NativeCheckpoint, PlannedCheckpoint
from qtool.config import catalog
from qtool.config.quant import QuantConfig
from qtool.config.sections import ExportConfig, ModelConfig
from qtool.exporters import _base
from qtool.exporters._folder import published_names
from qtool.models.expanded import expand
from qtool.models.folders import read_config
from qtool.models.linears import packed_weights
from qtool.models.loading import load_model
from qtool.pipelines.verify import verify
from qtool.quant.affine import QuantizedWeight, dequantize
from qtool.system.errors import InputError

ONE_TENSOR = r"experts\.gate_up_proj is one tensor, \S+, in published checkpoints of {}, .*; export dense instead"
TYPE = "its model_type is {}, and qtool writes GGUF for llama, "
STACKS = "its experts are those of {}, and qtool writes MLX stacks of experts for deepseek_v3, "
NAMED = r"experts\.gate_up_proj is \S+\.w1 in published checkpoints, and auto-round looks for experts named gate_proj"
LATENT = r"kv_b_proj is quantized, and mlx-lm cuts it in two .*: '\*\.kv_b_proj': \{skip: true\}"
FAST = ("qwen3_moe", "mixtral", "gpt_oss")
SLOW = ("deepseek_v3", "granitemoe", "qwen3_5_moe_text", "nemotron_h")
# the reason by family and format; others are exported
REFUSED = {
    ("mixtral", "auto-round"): NAMED,
    ("qwen3_moe", "gguf"): "its norm_topk_prob is False, and llama.cpp computes qwen3_moe models with True",
    ("deepseek_v3", "mlx"): LATENT,
    ("qwen3_5_moe_text", "mlx"): STACKS.format("qwen3_5_moe_text"),
    ("gpt_oss", "mlx"): STACKS.format("gpt_oss"),
    **{
        (family, format): ONE_TENSOR.format(family)
        for family in ("gpt_oss", "granitemoe")
        for format in ("compressed-tensors", "auto-round")
    },
    **{(family, "onnx"): f"its model_type is {family}, and qtool writes ONNX graphs of " for family in (*FAST, *SLOW)},
    **{(family, "gemma"): r"is w4g32, and the gemma quantizer has one scale" for family in (*FAST, *SLOW)},
    **{(family, "awq"): ONE_TENSOR.format(family) for family in ("gpt_oss", "granitemoe")},
    **{(family, "gguf"): TYPE.format(family) for family in ("deepseek_v3", "gpt_oss", "nemotron_h")},
}
SLOW_GPTQ = ("qwen3_moe", "nemotron_h")
SLOW_READ = ("qwen3_moe", "deepseek_v3", "nemotron_h")
FAMILIES = [*FAST, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)]


class Mixtures:
    """Native checkpoints of tiny mixtures, each made on first use."""

    def __init__(self, at: Path) -> None:
        self.at = at

    def __call__(self, name: str, **quant: object) -> Path:
        key = "-".join([name, *map(str, quant.values())]).translate(str.maketrans("/*{}: '", "_______"))
        floats, out = self.at / name, self.at / f"{key}-q"
        if not floats.exists():
            architectures.write(name, floats)
        if not out.exists():
            tiny.quantize(floats, out, QuantConfig.model_validate({"num_bits": 4, "group_size": 32, **quant}))
        return out


@pytest.fixture(scope="module")
def mixtures(tmp_path_factory: pytest.TempPathFactory) -> Mixtures:
    return Mixtures(tmp_path_factory.mktemp("mixtures"))


def expert(source: NativeCheckpoint, linear: str, index: int, part: str) -> QuantizedWeight:
    """Return the gate, up or down projection of an expert of the linear ``linear``, by the order of its rows."""
    codes, scale, zero_point, spec = source.quantized(linear)
    count = 4  # experts of each tiny model
    rows = torch.arange(len(codes)).reshape(count, -1)[index]
    half = len(rows) // 2
    rows = {"gate": rows[:half], "up": rows[half:], "down": rows}[part]
    return QuantizedWeight(codes[rows], scale[rows], zero_point[rows], spec)


def test_ordinary_experts_in_the_place_of_packed_ones_compute_the_same(mixtures: Mixtures) -> None:
    model = load_model(
        ModelConfig(path=str(mixtures("qwen3_moe")), dtype="float32", device="cpu"), quantized=True
    ).model
    expected = tiny.logits(model)
    expand(model, packed_weights(model), torch.float32)
    assert packed_weights(model) == {}
    assert torch.allclose(tiny.logits(model), expected, atol=1e-5)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("format", [each for each in catalog.export_formats() if not each.startswith("gptq")])
def test_a_mixture_is_exported_with_the_same_weights_or_refused_with_the_reason(
    format: str, name: str, mixtures: Mixtures, tmp_path: Path
) -> None:
    folder = mixtures(name)
    source, exporter, out = NativeCheckpoint(folder), _base.get(format), tmp_path / "out"
    if (name, format) in REFUSED:
        with pytest.raises(InputError, match=REFUSED[name, format]):
            exported(folder, format, out)
        assert not out.exists()
        return
    exported(folder, format, out)
    opened = exporter.open(out)
    names = published_names(source)
    found: dict[str, Tensor] = {}
    for key, place in exporter.places(names).items():
        if source.specs.keys() & place.linears.keys():
            place.scatter(exporter.read(opened, key.removesuffix(".weight")), found, names.rows)
    assert found.keys() == source.specs.keys()
    assert all(torch.equal(weight, dequantize(*source.quantized(name))) for name, weight in found.items())
    model, faults = architectures.load(name, folder)
    assert not faults
    if format == "dense":
        theirs, faults = architectures.load(name, out)
        assert not faults
        assert torch.equal(architectures.logits(theirs), architectures.logits(model))
        assert tiny.stored(out).keys() == tiny.stored(mixtures.at / name).keys()
    else:
        assert torch.equal(read_back(out), tiny.logits(model))
    assert verify(out).files > 0


@pytest.mark.parametrize("name", ["mixtral", *(pytest.param(each, marks=pytest.mark.slow) for each in SLOW_GPTQ)])
@pytest.mark.parametrize("format", ["gptq", "gptq-v2"])
def test_gptq_has_the_experts_of_each_layer_one_by_one(
    format: str, name: str, mixtures: Mixtures, tmp_path: Path
) -> None:
    folder = mixtures(name)
    source, out = NativeCheckpoint(folder), exported(folder, format, tmp_path / "out")
    stored = tiny.stored(out)
    whole = {each: f"{each}_proj" for each in ("gate", "up", "down")}
    fused, at, parts = {
        "mixtral": ("mlp", "model.layers.1.block_sparse_moe", {"gate": "w1", "up": "w3", "down": "w2"}),
        "qwen3_moe": ("mlp", "model.layers.1.mlp", whole),
        "nemotron_h": ("mixer", "backbone.layers.1.mixer", {"down": "down_proj"}),
    }[name]
    for part, leaf in parts.items():
        linear = f"model.layers.1.{fused}.experts.{'down_proj' if part == 'down' else 'gate_up_proj'}"
        for index in range(4):
            codes, scale, _, spec = expert(source, linear, index, part)
            words = stored[f"{at}.experts.{index}.{leaf}.qweight"]
            assert words.shape == (codes.shape[1] * spec.num_bits // 32, len(codes))
            shifts = torch.arange(0, 32, spec.num_bits)
            own = (words.T.long().unsqueeze(-1) >> shifts & spec.qmax).flatten(1)
            assert torch.equal(own, codes.long())
            assert torch.equal(stored[f"{at}.experts.{index}.{leaf}.scales"].T.float(), scale)
    assert torch.equal(read_back(out), tiny.logits(architectures.load(name, folder)[0]))
    assert "load this one with GPTQModel, vLLM or SGLang" in (out / "README.md").read_text()


def same_as_transformers_reads(name: str, folder: Path, out: Path) -> bool:
    """Return whether transformers with compressed-tensors reads ``out`` with the weights and logits of ``folder``.

    It leaves experts in the dtype of their scales, and would round activations to that.
    """
    model, faults = architectures.load(name, out)
    assert not faults
    for linear in NativeCheckpoint(folder).specs:
        if ".experts." in linear:
            expected = dequantize(*NativeCheckpoint(folder).quantized(linear))
            assert torch.equal(model.get_parameter(linear).flatten(0, 1).float(), expected), linear
    nn.Module.float(model)
    ours = architectures.logits(architectures.load(name, folder)[0])
    return torch.allclose(architectures.logits(model), ours, rtol=0, atol=1e-6 * float(ours.abs().max()))


@pytest.mark.parametrize("name", ["mixtral", *(pytest.param(each, marks=pytest.mark.slow) for each in SLOW_READ)])
def test_transformers_reads_experts_of_compressed_tensors(name: str, mixtures: Mixtures, tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors")
    folder = mixtures(name, num_bits=2)  # -2, -1, 0 and 1 times a scale are numbers of its dtype
    out = exported(folder, "compressed-tensors", tmp_path / "out")
    assert same_as_transformers_reads(name, folder, out)
    ignored = read_config(out)["quantization_config"]["ignore"]
    assert "lm_head" in ignored
    routers = {f"{each}.weight" for each in ignored if each.endswith((".gate", ".router"))}
    stored = {*tiny.stored(out), *tiny.stored(folder)}  # published names, and those that transformers gives them
    assert routers == {each for each in stored if each.endswith((".gate.weight", ".router.weight"))}


def test_compressed_tensors_lists_experts_by_patterns_where_grids_differ(mixtures: Mixtures, tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors")
    folder = mixtures("qwen3_moe", overrides={"*.experts.*": {"num_bits": 2}})
    out = exported(folder, "compressed-tensors", tmp_path / "out")
    groups = read_config(out)["quantization_config"]["config_groups"].values()
    targets = {group["weights"]["num_bits"]: group["targets"] for group in groups}
    assert r"re:model\.layers\.1\.mlp\.experts\.\d+\.up_proj$" in targets[2]
    assert len(targets[2]) == 6
    assert "model.layers.1.self_attn.q_proj" in targets[4]
    assert same_as_transformers_reads("qwen3_moe", folder, out)


@pytest.mark.parametrize(
    ("quant", "words"),
    [
        ({"symmetric": False}, r"has an asymmetric grid, and transformers reads experts .* without zero points"),
        ({"overrides": {"*.experts.down_proj": {"num_bits": 8}}}, r"have different grids, and transformers reads all"),
        ({"overrides": {"*.experts.*": {"skip": True}}}, r"is left in floating point, and transformers reads experts"),
    ],
)
def test_compressed_tensors_refuses_experts_that_transformers_would_not_read(
    quant: dict[str, object], words: str, mixtures: Mixtures, tmp_path: Path
) -> None:
    folder = mixtures("qwen3_moe", **quant)
    with pytest.raises(InputError, match=words):
        exported(folder, "compressed-tensors", tmp_path / "out")
    out = exported(folder, "mlx", tmp_path / "mlx")
    assert torch.equal(read_back(out), tiny.logits(architectures.load("qwen3_moe", folder)[0]))


def test_compressed_tensors_refuses_experts_that_round_their_inputs(mixtures: Mixtures, tmp_path: Path) -> None:
    """The rest of the model may round: its group of the config says so."""
    grid = {"num_bits": 8, "symmetric": True}
    with pytest.raises(InputError, match=r"experts\.gate_up_proj rounds activations, and transformers reads experts"):
        exported(mixtures("qwen3_moe", activations=grid), "compressed-tensors", tmp_path / "out")
    folder = mixtures("qwen3_moe", activations=grid, overrides={"*.experts.*": {"activations": None}})
    out = exported(folder, "compressed-tensors", tmp_path / "out")
    assert torch.equal(read_back(out), tiny.logits(architectures.load("qwen3_moe", folder)[0]))
    groups = read_config(out)["quantization_config"]["config_groups"].values()
    assert {any("experts" in target for target in g["targets"]): g["input_activations"] is None for g in groups} == {
        True: True,
        False: False,
    }


def test_mlx_has_the_experts_of_a_layer_in_stacks(mixtures: Mixtures, tmp_path: Path) -> None:
    folder = mixtures("granitemoe")
    source, stored = NativeCheckpoint(folder), tiny.stored(exported(folder, "mlx", tmp_path / "out"))
    at = "model.layers.1.block_sparse_moe"
    for part in ("gate", "up", "down"):
        linear = f"{at}.experts.{'down_proj' if part == 'down' else 'gate_up_proj'}"
        for index in range(4):
            codes, scale, zero_point, spec = expert(source, linear, index, part)
            words = stored[f"{at}.switch_mlp.{part}_proj.weight"][index].view(torch.int32)
            shifts = torch.arange(0, 32, spec.num_bits)
            assert torch.equal((words.long().unsqueeze(-1) >> shifts & spec.qmax).flatten(1), codes.long())
            assert torch.equal(stored[f"{at}.switch_mlp.{part}_proj.scales"][index], scale)
            assert torch.equal(stored[f"{at}.switch_mlp.{part}_proj.biases"][index], -scale * zero_point)


@pytest.mark.parametrize("name", ["qwen2_moe", *(pytest.param(each, marks=pytest.mark.slow) for each in FAST[:2])])
def test_gguf_has_the_experts_of_a_layer_in_stacks(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    row = architectures.architectures()[name]
    wide = {"moe_intermediate_size": 64, "shared_expert_intermediate_size": 64, "intermediate_size": 64}
    if name == "qwen3_moe":
        wide["norm_topk_prob"] = True
    rows = {name: row._replace(values=row.values | wide)}
    monkeypatch.setattr(architectures, "architectures", lambda: rows)
    architectures.write(name, tmp_path / "float")
    tiny.quantize(tmp_path / "float", tmp_path / "q", QuantConfig(group_size=32))
    source, out = NativeCheckpoint(tmp_path / "q"), exported(tmp_path / "q", "gguf", tmp_path / "out")
    reader = gguf.GGUFReader(out / "model.gguf")
    stored = {tensor.name: tensor for tensor in reader.tensors}
    for part in ("gate", "up", "down"):
        tensor = stored[f"blk.1.ffn_{part}_exps.weight"]
        found = torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type))
        linear = f"model.layers.1.mlp.experts.{'down_proj' if part == 'down' else 'gate_up_proj'}"
        assert torch.equal(found, torch.stack([dequantize(*expert(source, linear, i, part)) for i in range(4)]))
    assert stored["blk.1.ffn_gate_inp.weight"].tensor_type.name == "F32"
    prefix = {"mixtral": "llama", "qwen3_moe": "qwen3moe", "qwen2_moe": "qwen2moe"}[name]
    figures = {key: reader.fields[f"{prefix}.{key}"].contents() for key in ("expert_count", "expert_used_count")}
    assert figures == {"expert_count": 4, "expert_used_count": 2}
    if name == "qwen2_moe":
        gate = stored["blk.0.ffn_gate_inp_shexp.weight"]
        assert (gate.tensor_type.name, list(gate.shape)) == ("F32", [64])
        assert reader.fields["qwen2moe.expert_shared_feed_forward_length"].contents() == 64
    model, _ = architectures.load(name, tmp_path / "q")
    assert torch.equal(read_back(out), tiny.logits(model))


def test_an_expert_that_another_tool_changed_is_found(mixtures: Mixtures, tmp_path: Path) -> None:
    out = exported(mixtures("qwen3_moe"), "mlx", tmp_path / "out")
    before = read_back(out)
    key = "model.layers.0.mlp.switch_mlp.up_proj.scales"
    scales = tiny.stored(out)[key]
    scales[2] *= 2
    tiny.change(out, **{key: scales})
    assert not torch.equal(read_back(out), before)


@pytest.mark.parametrize(("name", "formats"), [("gpt_oss", {"dense"}), ("mixtral", {*catalog.export_formats()})])
def test_an_export_of_a_mixture_is_refused_before_the_run(name: str, formats: set[str], tmp_path: Path) -> None:
    loaded = tiny.load(architectures.write(name, tmp_path / "float"))
    targets = Job.select(loaded, QuantConfig(group_size=32)).targets
    specs = {target.name: target.spec for target in targets}
    planned = PlannedCheckpoint(loaded, specs, {target.name: target.weight_shape for target in targets})
    for format in catalog.export_formats():
        reason = _base.refusal(format, planned, ExportConfig(format=format, path=tmp_path / "out"))
        assert (reason is None) == (format in formats - {"auto-round", "gemma", "onnx"}), reason
        if reason is None:
            (tmp_path / format).mkdir()
            _base.get(format).describe(planned, tmp_path / format, "bfloat16")
