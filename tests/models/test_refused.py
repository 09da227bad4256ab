"""A model that cannot be used is refused in one clear line; any other is loaded unchanged."""

import json
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
import torch
import transformers
from helpers import tiny
from helpers.families import W4
from huggingface_hub import constants
from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from qtool.blocks.job import Job
from qtool.checkpoints import native, output_folder
from qtool.config.sections import ModelConfig
from qtool.methods import rtn
from qtool.models import folders
from qtool.models.auto_class import auto_class
from qtool.models.linears import decoder_blocks
from qtool.models.loaded import LoadedModel
from qtool.models.loading import load_model
from qtool.system.errors import InputError


@pytest.fixture
def folder(llama_folder: Path, tmp_path: Path) -> Path:
    """A copy of the tiny Llama, to damage."""
    return Path(shutil.copytree(llama_folder, tmp_path / "model"))


def change_config(folder: Path, **changes: object) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def shard(folder: Path) -> list[Path]:
    """Split the only weight file into two shards with an index."""
    tensors = load_file(folder / "model.safetensors")
    names = sorted(tensors)
    files = [folder / f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    for file, part in zip(files, (names[:10], names[10:]), strict=True):
        save_file({name: tensors[name] for name in part}, file, metadata={"format": "pt"})
    weight_map = {name: files[name not in names[:10]].name for name in names}
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (folder / "model.safetensors").unlink()
    return files


def refuse(path: Path | str, match: str) -> str:
    with pytest.raises(InputError, match=match) as refused:
        load_model(ModelConfig(path=str(path), device="cpu"))
    text = str(refused.value)
    assert "\n" not in text
    assert len(text) < 500
    return text


def test_a_model_in_shards_is_loaded(folder: Path, pristine_llama: LoadedModel) -> None:
    shard(folder)
    loaded = tiny.load(folder)
    for name, parameter in loaded.model.named_parameters():
        assert torch.equal(parameter, pristine_llama.model.get_parameter(name))


def test_a_loaded_model_does_not_train_and_says_what_it_is(folder: Path) -> None:
    loaded = tiny.load(folder)
    assert not loaded.model.training
    assert not any(p.requires_grad for p in loaded.model.parameters())
    assert (loaded.storage_dtype, loaded.dtype, loaded.max_length) == (torch.float32, torch.float32, tiny.CONTEXT)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_any_precision_holds_the_checkpoint_exactly(tmp_path: Path, dtype: torch.dtype) -> None:
    """``auto`` may compute in more than the checkpoint has, never in less."""
    folder = tiny.llama(tmp_path / "m", dtype=dtype)
    loaded = load_model(ModelConfig(path=str(folder), device="cpu"))
    assert loaded.storage_dtype == dtype
    assert loaded.dtype in (dtype, torch.float32)
    for name, tensor in tiny.stored(folder).items():
        assert torch.equal(loaded.model.get_parameter(name).float(), tensor.float()), name


def test_a_model_without_decoder_blocks_is_refused() -> None:
    with pytest.raises(InputError, match="Sequential has no list of decoder blocks"):
        decoder_blocks(nn.Sequential(nn.Linear(4, 4)))


def test_an_already_quantized_model_is_refused(folder: Path) -> None:
    change_config(folder, quantization_config={"quant_method": "gptq", "bits": 4})
    refuse(folder, r"is already quantized \(gptq\); start from the float model")


CODE = {"AutoConfig": "evil.EvilConfig", "AutoModelForCausalLM": "evil.Evil", "AutoTokenizer": ["evil.Evil", None]}


@pytest.fixture
def with_code(folder: Path) -> Path:
    """The model with a file of code that its config names; the code ends the process."""
    (folder / "evil.py").write_text("raise SystemExit('it ran')")
    change_config(folder, auto_map=CODE)
    return folder


def test_a_model_type_that_transformers_knows_is_loaded_by_its_own_class_whatever_code_lies_beside_it(
    with_code: Path,
) -> None:
    loaded = tiny.load(with_code)
    assert type(loaded.model) is transformers.LlamaForCausalLM
    assert "auto_map" not in loaded.model.config.to_dict()


def test_a_model_type_that_transformers_does_not_know_is_refused_because_of_its_code(with_code: Path) -> None:
    change_config(with_code, model_type="perceptron")
    refuse(with_code, r"'perceptron', which transformers \S+ does not know; it needs code from its own folder")


def test_a_known_model_type_without_a_causal_class_is_refused_because_of_its_code(with_code: Path) -> None:
    change_config(with_code, model_type="clip_text_model")
    refuse(with_code, r"'clip_text_model', of which transformers has no causal language model; the class that auto_map")


@pytest.mark.parametrize("with_peft", [False, True])
def test_an_adapter_that_is_not_merged_is_refused_the_same_with_and_without_peft(
    folder: Path, monkeypatch: pytest.MonkeyPatch, with_peft: bool
) -> None:
    monkeypatch.setattr("transformers.utils.import_utils.is_peft_available", lambda: with_peft)
    adapter = {"peft_type": "LORA", "r": 4, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"}
    (folder / "adapter_config.json").write_text(json.dumps(adapter))
    refuse(folder, r"holds an adapter \(adapter_config\.json\) that is not merged into the model; merge it first")
    (folder / "config.json").unlink()  # a folder with nothing but an adapter
    refuse(folder, r"holds an adapter \(adapter_config\.json\), not a whole model; merge it into its model")


def test_weights_of_an_adapter_without_its_config_are_refused(folder: Path) -> None:
    save_file({"q_proj.lora_A.weight": torch.zeros(4, 64)}, folder / "adapter_model.safetensors")
    refuse(folder, "merge it first")


@pytest.mark.parametrize("name", ["self_attn.q_proj.lora_A.default.weight", "self_attn.q_proj.base_layer.weight"])
def test_an_adapter_among_the_weights_is_refused(folder: Path, name: str) -> None:
    change_tensors(folder, lambda tensors: tensors.update({f"model.layers.0.{name}": torch.zeros(4, 64)}))
    refuse(folder, r"hold an adapter that is not merged into the model \(1 tensor\(s\).*merge it first")


@pytest.mark.parametrize("path", ["./nowhere", "/no/where/at/all", "~/no/such/folder", "a b"])
def test_a_missing_folder_is_refused(path: str) -> None:
    refuse(path, f"there is no folder {path}")


def test_a_name_that_the_hub_does_not_know_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(source: str, **_: object) -> None:
        raise OSError(f"{source} is not a valid model identifier\nmore lines\nof advice")

    monkeypatch.setattr(folders, "snapshot_download", fail)
    text = refuse(
        "someone/nothing", r"there is no folder someone/nothing, and the hub does not give a model of that name"
    )
    assert text.endswith("not a valid model identifier")


def test_an_unknown_builtin_is_refused_with_those_there_are() -> None:
    refuse("builtin:llama-9t", r"there is no model builtin:llama-9t; built in: builtin:wiki-llama-3m")


def test_a_file_instead_of_a_folder_is_refused(folder: Path) -> None:
    refuse(
        folder / "model.safetensors",
        r"is a file; a folder with config\.json and safetensors, or a \.gguf file, is needed",
    )


@pytest.mark.parametrize(
    ("error", "match"),
    [
        (GatedRepoError, r"the model of that name on the hub is gated: accept its licence at .*/org/name, .*HF_TOKEN"),
        (RepositoryNotFoundError, r"the hub has no model of that name, or it is private"),
    ],
)
def test_what_the_hub_refuses_says_what_to_do(
    monkeypatch: pytest.MonkeyPatch, error: type[RepositoryNotFoundError], match: str
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error.__new__(error)  # its own arguments are a response of the hub's client

    monkeypatch.setattr(folders, "snapshot_download", fail)
    refuse("org/name", match)


@pytest.mark.parametrize(
    ("offline", "why"), [(True, "HF_HUB_OFFLINE is set"), (False, r"the hub \(.*\) does not answer")]
)
def test_a_hub_that_is_not_reached_is_told_from_one_that_must_not_be_asked(
    monkeypatch: pytest.MonkeyPatch, offline: bool, why: str
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise LocalEntryNotFoundError("not in the cache")

    monkeypatch.setattr(folders, "snapshot_download", fail)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
    refuse("org/name", rf"the model is not in the cache of the hub, .*, and {why}; download it where")


@pytest.mark.parametrize(("kind", "decoder"), [("bert", False), ("bert", True), ("roberta", False)])
def test_an_encoder_is_refused_and_the_same_class_as_a_decoder_is_not(kind: str, decoder: bool) -> None:
    config = transformers.AutoConfig.for_model(kind, is_decoder=decoder)
    if decoder:
        assert auto_class(config) is transformers.AutoModelForCausalLM
        return
    with pytest.raises(InputError, match=f"the model type '{kind}' is an encoder, which reads the words after"):
        auto_class(config)


def test_a_folder_without_a_config_is_refused(folder: Path) -> None:
    (folder / "config.json").unlink()
    refuse(folder, r"has no config\.json")


@pytest.mark.parametrize(("text", "match"), [("{", "is not JSON"), ("[]", "holds a list"), ("", "is not JSON")])
def test_a_config_that_is_no_json_object_is_refused(folder: Path, text: str, match: str) -> None:
    (folder / "config.json").write_text(text)
    refuse(folder, match)


def test_an_unknown_model_type_is_refused(folder: Path) -> None:
    change_config(folder, model_type="perceptron")
    refuse(folder, "cannot be loaded: .*perceptron")


def test_pickled_weights_are_refused(folder: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    tiny.load(folder)  # the safetensors beside them are read
    (folder / "model.safetensors").unlink()
    refuse(folder, r"holds only pickled weights \(pytorch_model\.bin\), which can run code when read")
    (folder / "pytorch_model.bin").unlink()
    refuse(folder, r"has no \*\.safetensors file")


@pytest.mark.parametrize("keep", [0.5, 0.99, 0.001])
def test_truncated_weights_are_refused(folder: Path, keep: float) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[: int(keep * file.stat().st_size)])
    refuse(folder, r"model\.safetensors is truncated or damaged .*copy or download it again")


def test_weights_that_are_no_safetensors_are_refused(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n" * 20)
    refuse(folder, "is truncated or damaged")


def test_a_missing_shard_is_refused(folder: Path) -> None:
    shard(folder)[1].unlink()
    refuse(folder, r"index\.json lists model-00002-of-00002\.safetensors, which is not there \(1 file\(s\) missing\)")


def change_tensors(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    file = folder / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def test_a_tensor_of_the_wrong_shape_is_refused(folder: Path) -> None:
    name = "model.layers.0.mlp.up_proj.weight"
    change_tensors(folder, lambda tensors: tensors.update({name: torch.zeros(96, 32)}))
    refuse(folder, r"up_proj\.weight has shape \[96, 32\] in the file, and the config asks for \[96, 64\]")


def test_a_missing_tensor_is_refused(folder: Path) -> None:
    change_tensors(folder, lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight"))
    refuse(folder, r"lacks 1 tensor\(s\) that its config asks for, the first is model\.layers\.1\.mlp\.up_proj\.weight")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused_by_name(folder: Path, value: float) -> None:
    name = "model.layers.1.self_attn.v_proj.weight"
    change_tensors(folder, lambda tensors: tensors[name].view(-1)[5:8].fill_(value))
    refuse(folder, r"1\.self_attn\.v_proj\.weight holds 3 NaN or infinite value\(s\)")


@pytest.mark.parametrize("name", ["model.norm.weight", "model.embed_tokens.weight"])
def test_tensors_beside_the_targets_that_are_not_finite_are_refused_by_name(folder: Path, name: str) -> None:
    change_tensors(folder, lambda tensors: tensors[name].view(-1)[5:8].fill_(float("nan")))
    refuse(folder, name)


@pytest.mark.parametrize("text", ["{", "{}", "[]"])
def test_an_index_that_cannot_be_read_is_refused(folder: Path, text: str) -> None:
    (folder / "model.safetensors.index.json").write_text(text)
    refuse(folder, r"model\.safetensors\.index\.json")


@pytest.mark.parametrize("changes", [{"hidden_size": 65}, {"hidden_size": "wide"}], ids=str)
def test_a_config_that_transformers_refuses_is_refused(folder: Path, changes: dict[str, object]) -> None:
    change_config(folder, **changes)
    refuse(folder, "cannot be loaded: ")


def test_a_quantization_config_of_null_is_none(folder: Path) -> None:
    change_config(folder, quantization_config=None)
    tiny.load(folder)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_weights_more_exact_than_the_config_says_are_kept_or_refused_at_once(
    folder: Path, tmp_path: Path, dtype: str
) -> None:
    """Many published models have float32 files, or float32 norms, and a config that says half precision."""
    change_config(folder, dtype=dtype)
    with suppress(InputError):
        loaded = tiny.load(folder)
        rtn.run(Job.select(loaded, W4), rtn.Config())
        with output_folder.atomic_folder(tmp_path / "packed", overwrite=False) as partial:
            native.save(partial, loaded, tiny.specs(loaded))


def test_a_model_without_a_tokenizer_is_refused(folder: Path) -> None:
    for file in folder.glob("token*"):
        file.unlink()
    refuse(folder, "cannot be loaded: ")


@pytest.mark.parametrize("text", ["{", "[]", '{"version": "1.0", "model": {"type": "BPE"}}', "\0"])
def test_a_damaged_tokenizer_is_refused(folder: Path, text: str) -> None:
    (folder / "tokenizer.json").write_text(text)
    refuse(folder, r"tokenizer\.json is not JSON: |model: its tokenizer cannot be loaded: ")


@pytest.mark.parametrize("kind", ["PanicException", "KeyboardInterrupt"])
def test_a_panic_of_the_tokenizers_library_is_an_error_of_the_input_and_an_interruption_is_none(
    folder: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    error = type(kind, (BaseException,), {})

    def panic(*args: object, **kwargs: object) -> None:
        raise error("range end index 9 out of range")

    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", panic)
    if kind == "PanicException":
        refuse(folder, "its tokenizer cannot be loaded: range end index 9 out of range")
    else:
        with pytest.raises(error):
            tiny.load(folder)


@pytest.mark.parametrize("device", ["cuda:99x", "gpu"])
def test_a_device_that_is_none_is_refused(folder: Path, device: str) -> None:
    with pytest.raises(InputError, match=f"model.device: '{device}' is no device"):
        load_model(ModelConfig(path=str(folder), device=device))


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_gpu_that_is_not_there_is_refused(folder: Path) -> None:
    with pytest.raises(InputError, match=r"model\.device: cuda was asked for, but torch finds no GPU"):
        load_model(ModelConfig(path=str(folder), device="cuda"))
