"""Pins the surface that users rely on: commands, recipe keys, and the packages that are not imported."""

import subprocess
import sys

import pytest
import typer
from typer.core import TyperGroup

from qtool.cli import app, quantize
from qtool.config import catalog, describe, plugins, sweep
from qtool.config.sweep import LauncherConfig

HEAVY = (
    "torch",
    "transformers",
    "matplotlib",
    "jinja2",
    "pydantic",
    "datasets",
    "lm_eval",
    "ruamel.yaml",
    "yaml",
    "numpy",
    "rich.progress",
)


def group() -> TyperGroup:
    """Return the command ``qtool``."""
    made = typer.main.get_command(app.app)
    assert isinstance(made, TyperGroup)
    return made


def loaded_after(code: str) -> set[str]:
    """Return the heavy packages that a fresh Python has loaded after ``code``."""
    code += f"\nimport sys; print(); print(*[name for name in {HEAVY!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.splitlines()[-1].split())


@pytest.mark.parametrize(
    "code",
    [
        "import qtool.cli.app",
        "from qtool.cli.main import main; main(['--help'])",
        "import qtool.system.progress",
    ],
)
def test_nothing_heavy_is_loaded_to_answer_at_once(code: str) -> None:
    assert loaded_after(code) == set()


def test_reading_a_recipe_needs_no_torch_until_its_method_is_known() -> None:
    code = "from qtool.config import recipe; recipe.read_yaml('quickstart')"
    assert loaded_after(code) == {"pydantic", "ruamel.yaml"}


def test_commands() -> None:
    commands = group().commands
    others = [
        "eval",
        "export",
        "bench",
        "chat",
        "push",
        "sweep",
        "compare",
        "verify",
        "reproduce",
        "recipes",
        "schema",
        "doctor",
    ]
    assert list(commands) == ["quantize", "ptq", "qat", "efficientqat", "lrqat", "plan", *others]
    assert not any(command.hidden for command in commands.values())


def test_every_command_has_a_method_and_every_method_a_command() -> None:
    found = {name: plugins.get(name).command for name in catalog.methods()}
    assert {name: command for command, names in catalog.commands().items() for name in names} == found
    assert set(found.values()) == set(quantize.SUMMARIES)


def test_options() -> None:
    commands = group().commands
    options = {name: [param.opts[0] for param in command.params] for name, command in commands.items()}
    hub, gate = ["--push-to-hub", "--private"], ["--max-loss", "--max-kl"]
    ends = ["--set", "--overwrite", "--fresh", *gate, *hub, "--help-method", "--quiet", "--json"]
    assert options["ptq"] == options["qat"] == options["efficientqat"] == options["lrqat"] == ["recipe", *ends]
    assert options["quantize"] == ["what", "--method", "--bits", "--group-size", "--output", *ends]
    assert options["recipes"] == ["name", "--all", "--json"]
    evaluation = "target --tasks --limit --batch-size --num-fewshot --context --bos --dtype --device --backend"
    evaluation += " --max-loss --max-kl --float-model --output"
    assert options["eval"] == [*evaluation.split(), "--quiet", "--json"]
    own = ["--target", "--memory", "--context", "--probe", "--keep", "--output", "--overwrite"]
    assert options["plan"] == ["what", "--set", *own, "--quiet", "--json"]
    assert options["compare"] == ["runs", "--output", "--json"]
    others = ["--against", "--engine", "--python", "--text", "--limit", "--context", "--quiet", "--json"]
    assert options["verify"] == ["folder", *others]
    own = ["--jobs", "--output", "--max-cells", "--allow-launcher-commands"]
    assert options["sweep"] == ["file", "--set", "--fresh", *own, "--quiet", "--json"]
    assert options["export"] == ["folder", "--format", "--output", "--dtype", "--overwrite", *hub, "--quiet", "--json"]
    assert options["push"] == ["folder", "repo", "--private", "--quiet", "--json"]


def test_options_of_chat() -> None:
    own = ["--prompt", "--system", "--max-new-tokens", "--temperature", "--seed", "--device"]
    assert [param.opts[0] for param in group().commands["chat"].params] == ["model", *own, "--quiet", "--json"]


def test_sweep_keys() -> None:
    assert list(sweep.SweepConfig.model_fields) == [
        *("recipe", "set", "grid", "exclude", "cells", "over", "keep", "missing_models", "bench", "launcher", "output")
    ]
    assert list(LauncherConfig.model_fields) == ["name", "cluster", "address", "parameters"]
    for section in (sweep.SweepConfig, sweep.BenchConfig, LauncherConfig):
        assert all((field.description or "").endswith(".") for field in section.model_fields.values())


def test_recipe_keys() -> None:
    found = {section: [key.name for key in keys] for section, (_, keys) in describe.keys().items()}
    own = {section for section in found if section.startswith("method ")}
    assert own == {f"method {name}" for name in catalog.methods()}
    assert {section: names for section, names in found.items() if section not in own} == {
        "model": ["path", "dtype", "device", "free"],
        "method": ["name"],
        "quant": [
            *("grid", "num_bits", "group_size", "symmetric", "scale_dtype", "float_zero", "negative_scales"),
            *("activations.num_bits", "activations.symmetric", "kv_cache", "kv_group_size", "overrides"),
            *("embedding", "head"),
            *("budget.average_bits", "budget.size", "budget.share"),
            *("budget.estimator", "budget.rounding", "budget.solver"),
            *("budget.choices", "budget.floors", "budget.pins", "budget.num_samples"),
            "preset",
        ],
        "data": ["source", "num_samples", "seq_len", "bos", "memory_budget"],
        "eval": ["tasks", "num_fewshot", "limit", "batch_size", "context", "bos", "backend", "continuations"],
        "target": ["engine", "version"],
        "gate": ["max_loss", "max_kl"],
        "gguf": ["grid"],
        "export.N": ["format", "path", "dtype"],
        "expected.N": ["tasks", "metric", "value", "source"],
        "output": ["path", "overwrite", "plots"],
        "tracker": ["name", "project", "run_name"],
        "": ["seed"],
    }


def test_keys_of_efficientqat() -> None:
    """Pin the method's own keys; ``rounding``, ``optim`` and end-to-end training have tests of their own."""
    found = [key.name for key in describe.keys()["method efficientqat"][1]]
    phase_one = (
        "preset init_from last_block_loss init trains low_rank epochs min_steps batch_size travel scale_share "
        "zero_travel norm_travel weight_lr quant_lr validation_samples"
    )
    assert [name for name in found if "." not in name] == phase_one.split()
    assert {name.partition(".")[0] for name in found if "." in name} == {"rounding", "guided", "optim", "gsq", "e2e"}
    assert {"e2e.steps", "e2e.epochs", "e2e.trains", "e2e.scale_share", "e2e.zero_travel", "e2e.lr"} <= set(found)


ROUNDING = "estimator temperature temperature_end clamp gate sharpness scale_gradient forward"
OPTIM = "optimizer betas eps schedule final_share warmup_share max_grad_norm accumulation"
TRAINED = ["preset", *(f"rounding.{key}" for key in ROUNDING.split()), "init_from"]
END_TO_END = [
    *("loss", "temperature", "ce_share", "top_k", "epochs", "steps", "min_steps", "batch_size"),
    *(f"optim.{key}" for key in OPTIM.split()),
    *("gradient_checkpointing", "sharding", "validation_samples", "validate_every", "save_every"),
    *("travel", "lr", "weight_decay"),
]
GRID = ["scale_travel", "scale_lr"]


@pytest.mark.parametrize(
    ("method", "own"),
    [("lsq", ["init", *GRID]), ("paretoq", GRID), ("qat", []), ("llmqat", [])],
)
def test_keys_of_trained_methods(method: str, own: list[str]) -> None:
    found = [key.name for key in describe.keys()[f"method {method}"][1]]
    assert sorted(found) == sorted([*END_TO_END, *TRAINED, *own])


def test_every_key_is_described() -> None:
    for section, (text, keys) in describe.keys().items():
        assert text, section
        for key in keys:
            assert key.description.endswith("."), f"{section}.{key.name}"
