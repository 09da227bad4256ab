"""Each command reads and checks what it was given, calls one function, and prints what came out."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, Literal

import pytest

import qtool
from qtool import pipelines
from qtool.cli import main, session
from qtool.config import catalog, plugins
from qtool.config.files import packaged, tables
from qtool.config.sections import MethodConfig
from qtool.system import progress
from qtool.system.errors import RunError


class Demo(MethodConfig):
    name: Literal["demo"] = "demo"


class Report:
    results = ()
    gate = None

    def markdown(self) -> str:
        return "| perplexity |\n|---|\n| inf |"

    def model_dump(self, mode: str) -> dict[str, Any]:
        return {"perplexity": float("inf"), "mode": mode}


def outcome(path: Path | None = Path("out/x"), exports: tuple[str, ...] = ()) -> SimpleNamespace:
    return SimpleNamespace(path=path, report=Report(), exports=[Path(each) for each in exports], seconds=1.5)


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Any:  # Any: a module with attributes of our own
    """Replace the pipelines by a module that records calls, and the methods by one that loads no torch."""
    fake: Any = ModuleType("qtool.pipelines.quantize")
    fake.calls = []
    fake.quantize = lambda *args: fake.calls.append(args) or outcome(exports=("out/y",))
    fake.evaluate = lambda *args, **keys: fake.calls.append((*args, keys)) or outcome(None)
    fake.export = lambda *args: fake.calls.append(args) or args[1].path
    for name in ("quantize", "evaluate", "export"):
        monkeypatch.setitem(sys.modules, f"qtool.pipelines.{name}", fake)
        monkeypatch.setattr(pipelines, name, fake, raising=False)
    demo = {"demo": SimpleNamespace(command="ptq", summary="a demonstration", config=Demo)}
    monkeypatch.setattr(catalog, "methods", lambda: tuple(demo))
    monkeypatch.setattr(plugins, "get", demo.__getitem__)
    monkeypatch.setattr("qtool.config.catalog.export_formats", lambda: ("dense",))
    return fake


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)
    Path("r.yaml").write_text("model: {path: x}\nmethod: {name: demo}\noutput: {path: out/x}\n")
    return "r.yaml"


def test_ptq_checks_the_recipe_and_prints_report_and_paths(
    run: Any, recipe: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main.main(["ptq", recipe, "--set", "seed=3", "--set", "quant.num_bits=2", "--overwrite"]) == 0
    ((checked, fresh),) = run.calls
    assert (checked.seed, checked.quant.num_bits, checked.output.overwrite, fresh) == (3, 2, True, False)
    assert capsys.readouterr().out == "| perplexity |\n|---|\n| inf |\n\nout/x\nout/y\n"


def test_json_is_exactly_one_object_whatever_else_is_printed(
    run: Any, recipe: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def noisy(*_: object) -> SimpleNamespace:
        print("some library says hello")
        progress.note("damping raised")
        return outcome()

    run.quantize = noisy
    assert main.main(["ptq", recipe, "--json"]) == 0
    out, err = capsys.readouterr()
    report = {"perplexity": None, "mode": "json"}
    assert json.loads(out) == {"path": "out/x", "exports": [], "seconds": 1.5, "report": report}
    assert err == "some library says hello\nnote: damping raised\n"


def test_quiet_shows_notes_and_no_progress(
    run: Any, recipe: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in session.QUIET:
        monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv(name, "")  # monkeypatch then restores the variable that the command sets
        monkeypatch.delenv(name)

    def note(*_: object) -> SimpleNamespace:
        with progress.stage("loading"):
            progress.say("a block is finished")
            progress.note("damping raised")
        return outcome()

    run.quantize = note
    assert main.main(["ptq", recipe, "-q"]) == 0
    assert capsys.readouterr().err == "note: damping raised\n"
    assert os.environ["TQDM_DISABLE"] == "1"


def test_a_method_under_the_wrong_command_is_refused_before_any_work(
    run: Any, recipe: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main.main(["qat", recipe]) == 2
    assert capsys.readouterr().err == "error: method demo runs as: qtool ptq, not qtool qat\n"
    assert run.calls == []


def test_all_faults_of_a_recipe_are_printed(run: Any, recipe: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["ptq", recipe, "--set", "quant.num_bit=3", "--set", "seed=x"]) == 2
    assert capsys.readouterr().err == (
        "error: r.yaml with --set has 2 faults:\n"
        "  quant.num_bit: unknown key; the nearest is quant.num_bits; found 3\n"
        '  seed: should be a whole number; found "x"\n'
    )
    assert run.calls == []


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["ptq"], "Missing argument 'RECIPE'."),
        (["ptqq"], "No such command 'ptqq'. Did you mean 'ptq'?"),
        (["ptq", "r.yaml", "--sett", "a=b"], "No such option"),
        (["ptq", "nothing.yaml"], "nothing.yaml does not exist; qtool recipes lists those that exist"),
        (["export", "."], "Missing option '--format' / '-f'."),
        (["eval", ".", "--limit", "x"], "Invalid value for '--limit'"),
        (["recipes", "nope"], "no packaged recipe has nope in its name or description; qtool recipes lists all"),
    ],
)
def test_wrong_input_ends_with_exit_code_2(
    run: Any, recipe: str, capsys: pytest.CaptureFixture[str], args: list[str], message: str
) -> None:
    assert main.main(args) == 2
    out, err = capsys.readouterr()
    assert err.startswith(f"error: {message}")
    assert out == ""
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("error", "code", "kind", "message"),
    [
        (RunError("disk is full"), 1, "run", "disk is full"),
        (OSError(28, "No space left on device", "out/a"), 1, "run", "No space left on device: out/a"),
        (MemoryError(), 1, "run", "out of memory"),
        (KeyboardInterrupt(), 130, "interrupted", "interrupted; nothing was written under out/x"),
        (KeyError("scale"), 1, "bug", "KeyError: 'scale'\nThis is a bug in qtool"),
    ],
)
def test_what_ends_a_run_has_a_kind_an_exit_code_and_no_traceback(
    run: Any,
    recipe: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    error: BaseException,
    code: int,
    kind: str,
    message: str,
) -> None:
    def fail(*_: object) -> None:
        raise error

    run.quantize = fail
    monkeypatch.delenv("QTOOL_DEBUG", raising=False)
    assert main.main(["ptq", recipe, "--json"]) == code
    out, err = capsys.readouterr()
    found = json.loads(out)
    assert (found["kind"], found["exit_code"]) == (kind, code)
    assert found["error"].startswith(message)
    assert message in err
    assert "Traceback" not in err
    monkeypatch.setenv("QTOOL_DEBUG", "1")
    assert main.main(["ptq", recipe]) == code
    assert "Traceback" in capsys.readouterr().err


def test_json_usage_errors_are_json_too(capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["ptq", "--json"]) == 2
    assert json.loads(capsys.readouterr().out) == {
        "error": "Missing argument 'RECIPE'.",
        "kind": "usage",
        "exit_code": 2,
    }


def test_ctrl_c_after_the_checkpoint_has_its_name_does_not_deny_it(
    run: Any, recipe: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(checked: Any, *_: object) -> None:
        checked.output.path.mkdir(parents=True)
        raise KeyboardInterrupt

    run.quantize = fail
    assert main.main(["ptq", recipe]) == 130
    assert capsys.readouterr().err == "interrupted; out/x is complete, but the steps after it were not finished\n"
    run.quantize = lambda *_: (_ for _ in ()).throw(KeyboardInterrupt)
    assert main.main(["ptq", recipe, "--overwrite"]) == 130
    assert capsys.readouterr().err == "interrupted; nothing was written under out/x\n"


def test_ctrl_c_before_a_run_is_one_word(
    run: Any, recipe: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_: str) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(plugins, "get", fail)
    assert main.main(["ptq", recipe]) == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_eval_of_a_folder_takes_its_options(run: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = "--tasks boolq,mmlu --limit 5 --batch-size 8 --num-fewshot 2 --context 64 --dtype float32 --device cpu"
    args = ["eval", str(tmp_path), *options.split(), "--float-model", "org/m", "-o", "out"]
    assert main.main(args) == 0
    ((model, config, keys),) = run.calls
    assert (model.path, model.dtype, model.device) == (str(tmp_path), "float32", "cpu")
    assert (config.tasks, config.limit, config.batch_size) == (("boolq", "mmlu"), 5, 8)
    assert (config.num_fewshot, config.context) == (2, 64)
    assert not keys.pop("gate").asked
    assert keys == {"float_model": "org/m", "output": Path("out"), "seed": 0, "expected": (), "plots": False}
    assert capsys.readouterr().out.endswith("| inf |\n")


def test_eval_of_a_recipe_takes_its_sections_and_options_win(run: Any, recipe: str) -> None:
    published = "{tasks: [kl], metric: kl, value: 0.1, source: a paper}"
    Path("e.yaml").write_text(
        f"model: {{path: m}}\neval: {{tasks: [kl], limit: 3}}\nexpected: [{published}]\nseed: 4\n"
        "output: {path: o, plots: true}\n"
    )
    assert main.main(["eval", "e.yaml", "--limit", "7", "--batch-size", "auto"]) == 0
    ((model, config, keys),) = run.calls
    assert (model.path, config.tasks, config.limit, config.batch_size) == ("m", ("kl",), 7, "auto")
    assert (keys["float_model"], keys["output"], keys["seed"], keys["plots"]) == (None, Path("o"), 4, True)
    assert [each.source for each in keys["expected"]] == ["a paper"]


def test_eval_lists_what_is_wrong_with_its_options(run: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["eval", "x", "--limit", "0", "--dtype", "int8"]) == 2
    err = capsys.readouterr().err
    assert "the command line has 2 faults:\n" in err
    assert "  eval.limit: should be greater than or equal to 1; found 0\n" in err
    assert run.calls == []


def test_export_calls_the_exporter(run: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    args = ["export", str(tmp_path), "--format", "dense", "-o", "out", "--dtype", "float16", "--overwrite"]
    assert main.main([*args, "--json"]) == 0
    ((folder, config, overwrite),) = run.calls
    assert (folder, config.format, config.path, config.dtype) == (tmp_path, "dense", Path("out"), "float16")
    assert overwrite
    assert json.loads(capsys.readouterr().out) == {"path": "out", "format": "dense"}
    assert main.main(["export", str(tmp_path / "no"), "-f", "dense", "-o", "out"]) == 2
    assert "is not a folder; give one that qtool ptq wrote" in capsys.readouterr().err
    assert main.main(["export", str(tmp_path), "-f", "dens", "-o", "out"]) == 2
    assert "no such export format; the nearest is dense" in capsys.readouterr().err


def test_recipes_lists_all_and_prints_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["recipes", "--all"]) == 0
    *lines, empty, meaning = capsys.readouterr().out.splitlines()
    assert (empty, meaning[:9]) == ("", "[offline]")
    assert [line.split()[0] for line in lines] == [*packaged(), *tables()]
    assert all(len(line) <= 120 and len(line.split()) > 4 for line in lines)
    assert main.main(["recipes", "quickstart"]) == 0
    folder = Path(qtool.__file__).parent / "recipes"
    text = (folder / "quickstart.yaml").read_text()
    assert capsys.readouterr().out == text.replace("$schema=", f"$schema={folder.resolve()}/")


def test_help_of_ptq_ends_with_every_key(run: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["ptq", "--help"]) == 0
    text = capsys.readouterr().out
    for each in (
        "One of: demo.",
        "num_bits ",
        "Bits per code; 5 and 6 only in grids of GGUF. One of: 2,",
        "(top level)",
        "down_proj",
    ):
        assert each in text
    assert all(len(line) <= 110 for line in text.splitlines())


def test_no_arguments_print_the_help_and_count_as_wrong(capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main([]) == 2
    assert capsys.readouterr().out.startswith("Usage: qtool")
    assert main.main(["--version"]) == 0
    assert capsys.readouterr().out == f"qtool {qtool.__version__}\n"


def test_options_are_described_by_the_recipe_keys(capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["eval", "--help"]) == 0
    assert "Perplexity window in tokens" in capsys.readouterr().out
    assert main.main(["export", "--help"]) == 0
    text = capsys.readouterr().out
    assert "One of: dense." in text or "One of: auto-round, awq" in text
    assert "Dtype of the tensors that are stored in floating point" in text
    assert "Replace an existing folder." in text


@pytest.mark.parametrize(
    ("words", "number", "expected"),
    [("qtool ", 1, "recipes"), ("qtool ptq qui", 2, "quickstart"), ("qtool eval gptq-w3", 2, "gptq-w3g64")],
)
def test_the_shell_completes_commands_and_recipes(words: str, number: int, expected: str) -> None:
    env = {**os.environ, "COMP_WORDS": words, "COMP_CWORD": str(number), "_QTOOL_COMPLETE": "complete_bash"}
    done = subprocess.run([sys.executable, "-m", "qtool"], env=env, capture_output=True, text=True, check=True)
    assert expected in done.stdout.split()


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX pipes")
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_reader_that_leaves_changes_no_exit_code_and_sees_no_traceback(unbuffered: str) -> None:
    read, write = os.pipe()
    os.close(read)
    env = {**os.environ, "PYTHONUNBUFFERED": unbuffered}
    for arguments, code in ((["recipes"], 0), (["recipes", "nosuch"], 2)):
        command = [sys.executable, "-m", "qtool", *arguments, *(["--json"] if code else [])]
        done = subprocess.run(command, env=env, stdout=write, stderr=subprocess.PIPE, check=False)
        assert done.returncode == code
        assert bool(done.stderr) == bool(code)
        assert b"Traceback" not in done.stderr
    os.close(write)
