"""Tiny random models in real folders, with a real tokenizer, and functions that quantize, read and damage them.

Blocks are 64 wide, so that every width packs without a remainder and GPTQ's layout can hold them.
"""

import resource
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import (
    AutoTokenizer,
    GenerationMixin,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

import qtool
from qtool.blocks.job import FinishedBlock, Job
from qtool.blocks.tables import pack_embeddings
from qtool.checkpoints import native, output_folder
from qtool.config.quant import QuantConfig, QuantSpec
from qtool.config.sections import ModelConfig
from qtool.methods import rtn
from qtool.models.linears import packed_linears
from qtool.models.loaded import LoadedModel
from qtool.models.loading import load_model

BUILTIN = Path(qtool.__file__).parent / "models" / "builtin" / "wiki-llama-3m"
END = "<|endoftext|>"
VOCABULARY = 320
HIDDEN = 64
CONTEXT = 128
PROSE = (
    "The river runs through the old town, and the mill by the bridge is still used in autumn.",
    "Every stone of the wall was carried up the hill by hand; it took eleven years and two winters.",
    "She wrote down what the instrument showed, then what she thought it meant, and kept the two apart.",
    "Nobody knew who had planted the pear trees, but everyone who passed in September took one.",
)


def tokenizer() -> PreTrainedTokenizerFast:
    """Return a byte-level BPE tokenizer with a few merges; it adds no end token by itself."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=[END], initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(PROSE, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, eos_token=END, bos_token=END, pad_token=END, model_max_length=CONTEXT
    )


def _save(model: PreTrainedModel, folder: Path, dtype: torch.dtype) -> Path:
    """Save a model whose norms and biases differ from their defaults, so that a lost one shows."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    moved(model, dtype).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def llama(
    folder: Path,
    *,
    dtype: torch.dtype = torch.bfloat16,
    tied: bool = False,
    bias: bool = False,
    intermediate: int = 96,
    blocks: int = 2,
) -> Path:
    """Write a Llama with grouped-query attention; its embeddings are shared only if ``tied``."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=intermediate,
        num_hidden_layers=blocks,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=tied,
        attention_bias=bias,
        initializer_range=0.1,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )
    return _save(LlamaForCausalLM(config), folder, dtype)


def gpt2(folder: Path, *, dtype: torch.dtype = torch.float32) -> Path:
    """Write a GPT-2 of two blocks, with tied embeddings and ``Conv1D`` linears (weights are stored transposed)."""
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=VOCABULARY,
        n_embd=HIDDEN,
        n_layer=2,
        n_head=4,
        n_positions=CONTEXT,
        initializer_range=0.1,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )
    return _save(GPT2LMHeadModel(config), folder, dtype)


def opt(folder: Path, *, dtype: torch.dtype = torch.float16) -> Path:
    """Write an OPT of two blocks, with tied embeddings and a bias in every linear."""
    torch.manual_seed(0)
    config = OPTConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        ffn_dim=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=CONTEXT,
        word_embed_proj_dim=HIDDEN,
        init_std=0.1,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )
    return _save(OPTForCausalLM(config), folder, dtype)


FAMILIES = {"llama": llama, "gpt2": gpt2, "opt": opt}


def load(folder: Path) -> LoadedModel:
    """Load the float model of ``folder``, to compute in float32."""
    return load_model(ModelConfig(path=str(folder), dtype="float32", device="cpu"))


def _rounded(folder: Path, quant: QuantConfig) -> Job:
    """Return the finished job of rounding the model of ``folder``, tables too, to nearest."""
    job = pack_embeddings(Job.select(load(folder), quant))
    rtn.run(job, rtn.Config())
    return job


def packed(folder: Path, quant: QuantConfig) -> LoadedModel:
    """Load the model of ``folder`` and round it to nearest."""
    return _rounded(folder, quant).loaded


def quantize(folder: Path, out: Path, quant: QuantConfig) -> LoadedModel:
    """Write a native checkpoint (without manifest and model card) and return the model it was written from."""
    job = _rounded(folder, quant)
    with output_folder.atomic_folder(out, overwrite=False) as partial:
        native.save(partial, job.loaded, specs(job.loaded) | job.tables.specs, job.tables)
    return job.loaded


def text(folder: Path, lines: int = 60) -> Path:
    """Write a ``.txt`` file with enough text for a few calibration windows."""
    file = folder / "prose.txt"
    file.write_text("\n".join(PROSE[i % len(PROSE)] for i in range(lines)) + "\n", encoding="utf-8")
    return file


def probe() -> Tensor:
    """Return two windows of 24 random tokens, always the same."""
    return torch.randint(VOCABULARY, (2, 24), generator=torch.Generator().manual_seed(3))


@torch.no_grad()
def specs(loaded: LoadedModel) -> dict[str, QuantSpec]:
    """Return the grid of each quantized linear, by name."""
    return {name: layer.spec for name, layer in packed_linears(loaded.model).items()}


def moved(model: PreTrainedModel, to: torch.dtype | str) -> PreTrainedModel:
    """Return ``model.to(to)``, a method that transformers wraps in a decorator without types."""
    method: Any = model.to
    result: PreTrainedModel = method(to)
    return result


def continued(model: PreTrainedModel, prompt: Tensor, count: int) -> Tensor:
    """Return ``prompt`` with ``count`` greedy tokens after it; no end token stops them."""
    assert isinstance(model, GenerationMixin)
    mask = torch.ones_like(prompt)
    out = model.generate(prompt, attention_mask=mask, max_new_tokens=count, do_sample=False, eos_token_id=None)
    assert isinstance(out, Tensor)
    return out


def logits(model: nn.Module) -> Tensor:
    """Return the logits of ``probe()``."""
    result: Tensor = model.eval()(probe()).logits
    return result


def stored(folder: Path) -> dict[str, Tensor]:
    """Return every tensor in the safetensors files of ``folder``, by name."""
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def copied(folder: Path, to: Path) -> Path:
    """Copy the files of ``folder`` to a new folder, to damage them there."""
    to.mkdir()
    for file in folder.iterdir():
        (to / file.name).write_bytes(file.read_bytes())
    return to


def change(folder: Path, **tensors: Tensor) -> None:
    """Replace tensors in the only safetensors file of ``folder``; ``__`` in a name stands for a dot."""
    file = folder / "model.safetensors"
    given = {name.replace("__", "."): tensor for name, tensor in tensors.items()}
    content = load_file(file)
    assert set(given) <= set(content), sorted(content)
    save_file(content | given, file, metadata={"format": "pt"})


@contextmanager
def files_up_to(size: int) -> Iterator[None]:
    """Limit every file to ``size`` bytes, to let writers fail as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def with_builtin_tokenizer(seed: int, context: int) -> LoadedModel:
    """Return a tiny random Llama that was never saved, with the tokenizer of the built-in model."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=4096,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=context,
    )
    model = LlamaForCausalLM(config).eval()
    dtypes = {name: torch.float32 for name, _ in model.named_parameters()}
    return LoadedModel(model, AutoTokenizer.from_pretrained(BUILTIN), f"tiny-{seed}", BUILTIN, dtypes)


def with_spread_logits(seed: int) -> LoadedModel:
    """Return ``with_builtin_tokenizer(seed, 256)`` with logits ten times as large, so that predictions differ."""
    loaded = with_builtin_tokenizer(seed, 256)
    with torch.no_grad():
        loaded.model.get_parameter("lm_head.weight").mul_(10)
    return loaded


class Kept:
    """A workspace that keeps finished blocks in memory."""

    memory_budget = 1 << 30

    def __init__(self, folder: Path) -> None:
        self.scratch = folder
        self.blocks: dict[int, FinishedBlock] = {}
        self.logged: list[tuple[str, int, dict[str, float]]] = []

    def log(self, phase: str, step: int, figures: Mapping[str, float]) -> None:
        self.logged.append((phase, step, dict(figures)))

    def phase(self, name: str) -> Path:
        return self.scratch / name

    def read(self, index: int) -> FinishedBlock | None:
        return self.blocks.get(index)

    def write(self, index: int, block: FinishedBlock) -> None:
        self.blocks[index] = block._replace(tensors={name: tensor.clone() for name, tensor in block.tensors.items()})


def several(number: int, count: int, patch: pytest.MonkeyPatch) -> None:
    """Set rank ``number`` and world size ``count`` as a launcher does; the other processes do not exist."""
    patch.setenv("RANK", str(number))
    patch.setenv("WORLD_SIZE", str(count))
