"""Checks of one architecture; each ends in a line: ``ok``, ``refused: ...``, ``wrong: ...``, ``crash: ...``

A method is right where its command ends well, the native folder gives the logits of the dense export to the last bit,
and all of the blocks is quantized except what a note of the run names. Exports may be refused, with the reason.
"""

import contextlib
import io
import json
import re
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cached_property
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import yaml
from safetensors import safe_open
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

import qtool
from helpers import architectures, tiny
from qtool.blocks import driver
from qtool.blocks import states as block_states
from qtool.blocks.job import Job, load_method
from qtool.cli.main import main
from qtool.config.sections import ModelConfig
from qtool.data import generated
from qtool.models import experts
from qtool.models.loading import load_model
from qtool.system.errors import InputError

SYMMETRIC = {"num_bits": 4, "group_size": 32, "symmetric": True}
ASYMMETRIC = SYMMETRIC | {"symmetric": False}
SHORT = {"steps": 2, "batch_size": 2}  # end-to-end training
METHODS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {  # sections ``method`` (without its name) and ``quant``
    "rtn": ({}, SYMMETRIC),
    "gptq": ({}, SYMMETRIC),
    "awq": ({"num_ratios": 4, "clip_steps": 3}, ASYMMETRIC),
    "signround": ({"iterations": 4}, ASYMMETRIC),
    "hqq": ({}, ASYMMETRIC),
    "efficientqat": ({"min_steps": 2, "epochs": 1, "e2e": SHORT}, ASYMMETRIC),
    "lsq": (SHORT, ASYMMETRIC),
    "lrqat": ({"rank": 4} | SHORT, ASYMMETRIC),
}
STATES, GENERATED = "states", "generated"
REQUIRED = (STATES, GENERATED, *METHODS)  # the steps that a model must be right in
EXPORTS = {f"export {kind}": kind for kind in ("gptq", "compressed-tensors", "mlx", "gguf")}  # step -> format
STEPS = (*REQUIRED, *EXPORTS)
WINDOWS, LENGTH = 4, 24  # calibration text of the check of hidden states: each window is a batch
SILENT_SHARE = 0.05  # largest share of the blocks' parameters that may stay float without a note
ROUNDING = 1e-6  # largest difference of logits that is rounding, relative to the largest logit
LARGEST_ERROR = 0.5  # largest relative error of a weight of 4 bits; another weight in its place has about 1.4


class Ended(Exception):  # an outcome, not an error of the caller
    """A step that is not right; the message says why, and ``word`` in what way."""

    word = ""


class Wrong(Ended):
    """A step that ended well, and whose result is wrong."""

    word = "wrong"


class Refused(Ended):
    """A step that was refused."""

    word = "refused"


class Crashed(Ended):
    """A step that ended in an unexpected error."""

    word = "crash"


@dataclass
class Trial:
    """One architecture, and a folder for all that is made of it."""

    name: str
    folder: Path

    @cached_property
    def source(self) -> Path:
        """The folder of the float model."""
        return architectures.write(self.name, self.folder / "float")

    @cached_property
    def text(self) -> Path:
        """A file of calibration text."""
        return tiny.text(self.folder)

    @cached_property
    def model(self) -> PreTrainedModel:
        """The float model in float32, as transformers loads it."""
        model, faults = architectures.load(self.name, self.source)
        assert not faults, faults
        return model

    @cached_property
    def logits(self) -> Tensor:
        """The logits of the float model.

        Raises:
            Refused: transformers itself cannot run it.
        """
        try:
            return architectures.logits(self.model)
        except Exception as error:  # an architecture can fail in any way
            raise Refused(f"transformers cannot run the model: {type(error).__name__}: {error}") from error

    def line(self, message: str) -> str:
        """Return a message as one line, without this run's paths."""
        text = message
        for path, word in ((self.source, "MODEL"), (self.folder, "FOLDER")):
            text = text.replace(str(path), word)
        return " ".join(text.split())


def check(name: str, folder: Path, steps: tuple[str, ...] = STEPS) -> dict[str, str]:
    """Return the outcome of each step for one architecture; ``folder`` is an empty one for its files."""
    trial = Trial(name, folder)
    functions: dict[str, Callable[[], None]] = {STATES: lambda: states(trial), GENERATED: lambda: text(trial)}
    functions |= {method: lambda method=method: quantized(trial, method) for method in METHODS}  # type: ignore[misc]
    functions |= {step: lambda kind=kind: exported(trial, kind) for step, kind in EXPORTS.items()}  # type: ignore[misc]
    return {step: outcome(trial, functions[step]) for step in STEPS if step in steps}


def outcome(trial: Trial, step: Callable[[], None]) -> str:
    """Run a step and return its outcome in one line."""
    try:
        step()
    except Ended as error:
        return trial.line(f"{error.word}: {error}")
    except InputError as error:
        return trial.line(f"refused: {error}")
    except Exception as error:  # whatever qtool or an architecture raises
        frames = [(frame.filename, str(frame.lineno)) for frame in traceback.extract_tb(error.__traceback__)]
        return trial.line(f"crash: {type(error).__name__}: {error} ({_places(frames)})")
    return "ok"


def command(*args: str) -> tuple[dict[str, Any], list[str]]:
    """Run a command in this process; return its JSON and its notes.

    Raises:
        Refused: for what its input is.
        Crashed: it ended in another way.
    """
    out, err = io.StringIO(), io.StringIO()
    environment = mock.patch.dict("os.environ", {"QTOOL_DEBUG": "1"})
    with environment, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main([*args, "--json"])
    result: dict[str, Any] = json.loads(out.getvalue())
    if code == 0:
        notes = [each.removeprefix("note: ") for each in err.getvalue().splitlines() if each.startswith("note: ")]
        return result, notes
    if result["kind"] == "input":
        raise Refused(result["error"])
    places = _places(re.findall(r'File "([^"]+)", line (\d+)', err.getvalue()))
    message = result["error"].partition("\nThis is a bug")[0]
    raise Crashed(f"{result['kind']}: {message} ({places})")


def _places(frames: list[tuple[str, str]]) -> str:
    """Return where an error was raised, and the last places of qtool on the way there."""
    ours = [frame for frame in frames if frame[0].startswith(str(Path(qtool.__file__).parent))]
    chosen = [*ours[-2:], *([frames[-1]] if frames and frames[-1] not in ours[-2:] else [])]
    return " > ".join(f"{Path(file).name}:{number}" for file, number in chosen)


# the hidden states between blocks, and the text that a model writes


def states(trial: Trial) -> None:
    """Compare the hidden states that the driver carries with those of the model's own forward, batch by batch.

    The model's own forward is compared with that of transformers, which stores experts in another layout.
    """
    theirs = trial.logits
    loaded = load_model(ModelConfig(path=str(trial.source), dtype="float32", device="cpu"))
    ours = architectures.logits(loaded.model)
    if (difference := float((ours - theirs).abs().max() / theirs.abs().max())) > ROUNDING:
        raise Wrong(f"the logits of the float model differ from those of transformers by {difference:.1e}")
    tokens = torch.randint(2, tiny.VOCABULARY, (WINDOWS, LENGTH), generator=torch.Generator().manual_seed(11))
    blocks = [block for _, block in loaded.blocks()]
    seen: dict[tuple[int, int], list[tuple[Tensor, Tensor]]] = {}
    window = 0

    def record(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        hidden = args[0] if args else kwargs["hidden_states"]
        after = out[0] if isinstance(out, tuple | list) else out
        seen.setdefault((window, blocks.index(block)), []).append((hidden.clone(), after.clone()))

    hooks = [block.register_forward_hook(record, with_kwargs=True) for block in blocks]
    with torch.no_grad():
        for window in range(WINDOWS):  # ``record`` reads it
            loaded.model(input_ids=tokens[window : window + 1], use_cache=False)
    for hook in hooks:
        hook.remove()
    with mock.patch.object(block_states, "TOKENS_PER_BATCH", LENGTH):
        for task in driver.walk(Job(loaded, (), tokens)):
            for index, hidden in enumerate(task.inputs):
                expected = seen[index, task.index]
                if len(expected) != 1:
                    raise Wrong(f"{task.name} is called {len(expected)} times in a forward, and carried once")
                before, after = expected[0]
                _same_states(f"states that enter {task.name} in window {index}", hidden, before)
                _same_states(f"states that leave {task.name} in window {index}", task.forward(hidden), after)


def _same_states(what: str, found: Tensor, own: Tensor) -> None:
    plain = found.as_subclass(Tensor)
    if plain.shape != own.shape:  # the driver puts windows first
        own = own.movedim(1, 0)
    if not torch.equal(plain, own):
        raise Wrong(f"{what} differ from the model's own by {float((plain - own).norm() / own.norm()):.1e}")


def text(trial: Trial) -> None:
    """Compare the text that a model writes for calibration with what it writes without a cache, token by token."""
    assert trial.logits.isfinite().all()
    loaded = load_model(ModelConfig(path=str(trial.source), dtype="float32", device="cpu"))
    draws: list[Callable[[Tensor, int, int], Tensor]] = []
    steps: dict[int, int] = {}
    sampler = generated._sampler

    def recorded(*args: Any) -> Callable[[Tensor, int, int], Tensor]:
        draws.append(sampler(*args))

        def draw(logits: Tensor, position: int, step: int) -> Tensor:
            steps[position] = step
            return draws[-1](logits, position, step)

        return draw

    with mock.patch.object(generated, "_sampler", recorded):
        tokens = generated.generated_tokens(loaded, 2, LENGTH, seed=5)
    assert len(draws) == 1, "one batch was expected"
    for position, step in steps.items():
        with torch.no_grad():
            logits = loaded.model(input_ids=tokens[:, :position], use_cache=False).logits
        if not torch.equal(draws[0](logits[:, -1], position, step), tokens[:, position]):
            raise Wrong(f"token {position} of {LENGTH} is not the one that the model writes without a cache")


# methods


def quantized(trial: Trial, method: str) -> None:
    """Quantize with a method through the command line, and compare the native folder with the dense export."""
    keys, quant = METHODS[method]
    out = trial.folder / method
    recipe = {
        "model": {"path": str(trial.source), "dtype": "float32", "device": "cpu"},
        "method": {"name": method, **keys},
        "quant": quant,
        "data": {"source": str(trial.text), "num_samples": 4, "seq_len": 32},
        "output": {"path": str(out)},
    }
    file = trial.folder / f"{method}.yaml"
    file.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    _, notes = command(load_method(method).command, str(file))
    linears = json.loads((out / "config.json").read_text())["quantization_config"]["linears"]
    _all_quantized(trial, set(linears), notes)
    native = architectures.logits(_loaded(trial, "native folder", out))
    dense = trial.folder / f"{method}-dense"
    command("export", str(out), "--format", "dense", "-o", str(dense))
    model = _loaded(trial, "dense export", dense)
    if method == "rtn":  # the others may change norms, and fold scales into weights
        _same_model(trial, model, set(linears))
        _same_files(trial, dense)
    _same_logits(native, model)


def _same_logits(native: Tensor, model: PreTrainedModel) -> None:
    """Compare the logits of a native folder with those of ``model``, of the dense export.

    Experts that transformers stores transposed are multiplied in another order; they are compared in qtool's order.
    """
    plain = architectures.logits(model)
    if not bool(plain.isfinite().all()):
        raise Wrong("the logits are not finite")
    if any(getattr(module, "is_transposed", False) for module in model.modules()):
        if float((native - plain).abs().max()) > ROUNDING * float(plain.abs().max()):
            raise Wrong("the logits of the native folder differ from those of the dense export by more than rounding")
        experts.unfuse(model)
        plain = architectures.logits(model)
    if not torch.equal(native, plain):
        difference = float((native - plain).abs().max() / plain.abs().max())
        raise Wrong(f"the logits of the native folder differ from those of the dense export by {difference:.1e}")


def _loaded(trial: Trial, what: str, folder: Path) -> PreTrainedModel:
    """Return the model of a folder as transformers loads it."""
    try:
        model, faults = architectures.load(trial.name, folder)
    except Exception as error:  # whatever transformers makes of the folder
        raise Wrong(f"the {what} cannot be loaded: {type(error).__name__}: {error}") from error
    if faults:
        raise Wrong(f"the {what} does not fit its class: {faults}")
    return model


def _blocks(model: PreTrainedModel) -> dict[str, nn.Module]:
    """Return the modules in the blocks of the text decoder, by name.

    Blocks are the members of its largest list, and of every other one of at least half that size.
    """
    decoder = model.get_decoder()
    inside = {name: module for name, module in model.named_modules() if module is decoder}
    prefix = next(iter(inside), "")
    named = decoder.named_modules(prefix=prefix) if inside else model.named_modules()
    lists: dict[str, dict[str, nn.Module]] = {}
    for name, module in named:
        if found := re.match(r"(.*?)\.\d+(\.|$)", name.removeprefix(prefix)):
            lists.setdefault(found[1], {})[name] = module
    sizes = {
        owner: sum(p.numel() for module in each.values() for p in module.parameters(recurse=False))
        for owner, each in lists.items()
    }
    large = [owner for owner, size in sizes.items() if 2 * size >= max(sizes.values())]
    return {name: module for owner in large for name, module in lists[owner].items()}


def _all_quantized(trial: Trial, linears: set[str], notes: list[str]) -> None:
    """Check that all matrices in the blocks are quantized, except those that a note names."""
    total, silent = 0, dict[str, int]()
    for name, module in _blocks(trial.model).items():
        for key, parameter in module.named_parameters(recurse=False):
            total += parameter.numel()
            if name in linears or f"{name}.{key}" in linears or parameter.squeeze().dim() < 2:
                continue
            if isinstance(module, _ConvNd | nn.Embedding) or _named(name, key, notes):
                continue
            if isinstance(module, nn.Linear | Conv1D):
                raise Wrong(f"{name} {list(parameter.shape)} stays float, and no note names it")
            silent[f"{name}.{key}"] = parameter.numel()
    if sum(silent.values()) > SILENT_SHARE * total:
        largest = max(silent, key=lambda name: silent[name])
        raise Wrong(f"{sum(silent.values()) / total:.0%} of the blocks stay float without a note, e.g. {largest}")


def _named(name: str, key: str, notes: list[str]) -> bool:
    """Return whether a note names a module or its parameter; blocks that differ in numbers only share a note."""
    words = {re.sub(r"\d+", "0", word.strip(".,:;()'\"")) for note in notes for word in note.split()}
    full = {re.sub(r"\d+", "0", each) for each in (name, f"{name}.{key}")}
    return any(fnmatchcase(each, word) for each in full for word in words if "." in word)


def _same_model(trial: Trial, dense: PreTrainedModel, linears: set[str]) -> None:
    """Check every tensor of a dense export: quantized ones are near those of the float model, others equal."""
    expected, found = ({n: p.detach() for n, p in model.named_parameters()} for model in (trial.model, dense))
    if expected.keys() != found.keys():
        raise Wrong(f"the export has other parameters: {sorted(expected.keys() ^ found.keys())[:3]}")
    for name, parameter in expected.items():
        owner = name.removesuffix(".weight")
        if not ({name, owner} & linears):
            if not torch.equal(parameter, found[name]):
                raise Wrong(f"{name} stayed float, and differs")
        elif float((parameter - found[name]).norm()) > LARGEST_ERROR * float(parameter.norm()):
            raise Wrong(f"{name} is not the quantized weight of this name")


def _same_files(trial: Trial, dense: Path) -> None:
    """Check that a dense export has the published names of all tensors, and the files beside the model."""
    ours, theirs = tensor_names(dense), tensor_names(trial.source)
    if ours != theirs:
        raise Wrong(f"the dense export does not have the published names: {sorted(ours ^ theirs)[:4]}")
    lost = [file for file in architectures.VISION_FILES if (trial.source / file).exists() > (dense / file).exists()]
    if lost:
        raise Wrong(f"the dense export lacks {', '.join(lost)}")


def tensor_names(folder: Path) -> set[str]:
    """Return the names of all tensors in the files of a folder."""
    names: set[str] = set()
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="pt") as opened:
            names.update(opened.keys())
    return names


def exported(trial: Trial, kind: str) -> None:
    """Export the folder of round-to-nearest; the exporter reads it back itself."""
    folder = trial.folder / "rtn"
    if not (folder / "qtool.json").exists():
        raise Refused("there is no checkpoint to export")
    command("export", str(folder), "--format", kind, "-o", str(trial.folder / f"export-{kind}"))
