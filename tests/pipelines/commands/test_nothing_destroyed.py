"""No command replaces, removes or writes through anything that qtool did not make, or that another command reads."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers.whole_runs import Result, digest, own

from qtool.checkpoints.output_folder import OutputFolder
from qtool.exporters import _readback
from qtool.pipelines import export as exporting
from qtool.pipelines import quantize as pipeline

Command = Callable[..., Result]
EVAL = ("--tasks", "generated", "--limit", "1", "--context", "8", "-q")


@pytest.mark.parametrize("at", ["model", "p", "model/deeper", "linked"])
def test_an_export_of_a_recipe_never_replaces_the_model_that_the_run_reads(
    at: str, qtool_: Command, recipe: Callable[..., str], models: Path
) -> None:
    folder = own(models / "llama", "p/model" if at == "p" else "model")
    Path("linked").symlink_to(folder)
    (folder / "qtool.json").write_text('{"format_version": 1}')  # a mark does not help: the folder is read
    before = digest(folder)
    export = [{"format": "dense", "path": at}]
    result = qtool_("ptq", recipe(model={"path": f"./{folder}"}, export=export), "--overwrite")
    assert result.code == 2
    assert f"export.0.path: {at} overlaps model.path" in result.message
    assert digest(folder) == before


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"export": [{"format": "dense", "path": "out/q/dense"}]}, "export.0.path: out/q/dense overlaps output.path"),
        ({"export": [{"format": "dense", "path": "out/q.partial"}]}, "overlaps output.path (unfinished)"),
        ({"output": {"path": "texts"}, "method": {"name": "gptq"}}, "output.path: texts overlaps data.source"),
        (
            {"export": [{"format": "dense", "path": "a"}, {"format": "gptq", "path": "./a"}]},
            "export.1.path: a overlaps export.0.path",
        ),
    ],
)
def test_every_path_of_a_run_is_checked_against_every_other(
    keys: dict[str, Any], words: str, qtool_: Command, recipe: Callable[..., str], models: Path
) -> None:
    Path("texts").mkdir()
    Path("texts/prose.txt").write_text((models / "prose.txt").read_text())
    result = qtool_("ptq", recipe(data={"source": "texts/prose.txt", "num_samples": 8, "seq_len": 32}, **keys))
    assert result.code == 2
    assert words in result.message


def test_overwrite_replaces_no_folder_that_qtool_did_not_write(qtool_: Command, recipe: Callable[..., str]) -> None:
    Path("proj/.git").mkdir(parents=True)
    Path("proj/config.json").write_text('{"webapp": true}')
    Path("proj/main.py").write_text("code")
    for content in (None, "{}", "[", '{"format": 1}'):
        if content is not None:
            Path("proj/qtool.json").write_text(content)  # not a manifest of ours either
        result = qtool_("ptq", recipe(output={"path": "proj"}), "--overwrite")
        assert result.code == 2
        assert "proj exists and was not written by qtool" in result.message
    assert Path("proj/main.py").read_text() == "code"
    assert Path("proj/.git").is_dir()
    assert not Path("proj.partial").exists()


def make_meanwhile(monkeypatch: pytest.MonkeyPatch, make: Callable[[], object]) -> None:
    """Call ``make`` when a run has quantized its model and has not saved it yet."""
    save = pipeline.save

    def saving(*args: Any) -> None:
        make()
        save(*args)

    monkeypatch.setattr(pipeline, "save", saving)


@pytest.mark.parametrize("kind", ["folder", "empty folder", "file", "link"])
def test_what_appears_under_the_name_during_a_run_stays_and_the_run_goes_on_without_it(
    kind: str, qtool_: Command, recipe: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def make() -> None:
        if kind == "file":
            Path("out/q").write_text("my thesis")
        elif kind == "link":
            Path("out/q").symlink_to("elsewhere")
        else:
            Path("out/q").mkdir()
            if kind == "folder":
                Path("out/q/thesis.txt").write_text("my thesis")

    with monkeypatch.context() as patch:
        make_meanwhile(patch, make)
        result = qtool_("ptq", recipe())
    assert result.code == 1
    assert "out/q appeared while this command worked, and was left as it is; move it away" in result.message
    assert {"folder": Path("out/q/thesis.txt").is_file(), "file": Path("out/q").is_file()}.get(kind, True)
    assert not list(Path("out/q").glob("*.safetensors")) if kind != "file" else True
    if kind != "link":  # the next start would write the folder that the link leads to
        assert qtool_("ptq", "r.yaml").code == 2
    Path("out/q").rename("moved")
    assert qtool_("ptq", "r.yaml").code == 0
    assert [path.name for path in Path("out").iterdir()] == ["q"]


def test_what_appears_in_a_folder_that_is_overwritten_stays(
    qtool_: Command, recipe: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert qtool_("ptq", recipe()).code == 0
    with monkeypatch.context() as patch:
        make_meanwhile(patch, lambda: Path("out/q/thesis.txt").write_text("my thesis"))
        result = qtool_("ptq", "r.yaml", "--overwrite", "--set", "seed=1")
    assert result.code == 1
    assert "out/q changed while this command worked" in result.message
    assert Path("out/q/thesis.txt").read_text() == "my thesis"


def test_an_unfinished_folder_of_somebody_else_is_refused_and_stays(
    qtool_: Command, recipe: Callable[..., str]
) -> None:
    assert qtool_("ptq", recipe()).code == 0
    for name in ("out/ex", "out/other"):
        Path(f"{name}.partial").mkdir()
        Path(f"{name}.partial/thesis.txt").write_text("mine")
    export = qtool_("export", "out/q", "-f", "dense", "-o", "out/ex")
    run = qtool_("ptq", recipe(output={"path": "out/other"}), "--fresh")
    for result, name in ((export, "out/ex"), (run, "out/other")):
        assert result.code == 2
        assert f"{name}.partial exists and was not made by qtool" in result.message
        assert [path.name for path in Path(f"{name}.partial").iterdir()] == ["thesis.txt"]


def test_an_export_does_not_remove_an_unfinished_run(
    qtool_: Command, recipe: Callable[..., str], gptq: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert qtool_("ptq", recipe(output={"path": "m"})).code == 0

    def interrupt(*args: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "save", interrupt)
        assert qtool_("ptq", recipe(**gptq)).code == 130
    kept = sorted(str(path) for path in Path("out/q.partial").rglob("*"))
    result = qtool_("export", "m", "-f", "dense", "-o", "out/q")
    assert result.code == 2
    assert "out/q.partial holds an unfinished run that writes out/q" in result.message
    assert sorted(str(path) for path in Path("out/q.partial").rglob("*")) == kept


def test_two_commands_do_not_write_one_export(
    qtool_: Command, recipe: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert qtool_("ptq", recipe()).code == 0
    second: list[Result] = []
    read_back = _readback.read_back

    def meanwhile(*args: Any, **options: Any) -> dict[str, float | None]:
        if not second:
            second.append(Result(0, "", ""))
            second[0] = qtool_("export", "out/q", "-f", "gptq", "-o", "out/ex")
        return read_back(*args, **options)

    monkeypatch.setattr(exporting, "read_back", meanwhile)
    assert qtool_("export", "out/q", "-f", "dense", "-o", "out/ex").code == 0
    assert second[0].code == 2
    assert "another command is writing out/ex; wait for it" in second[0].message
    assert json.loads(Path("out/ex/qtool_export.json").read_text())["exported"]["format"] == "dense"


@pytest.mark.parametrize("name", ["report.json", "report.md", "report.html", "plots"])
@pytest.mark.parametrize("linked", [False, True])
def test_eval_writes_over_no_file_of_somebody_else_and_through_no_link(
    name: str, linked: bool, qtool_: Command, models: Path
) -> None:
    Path("victim").write_text("keep")
    Path("x").mkdir()
    if linked:
        Path("x", name).symlink_to(Path("victim").absolute())
    else:
        Path("x", name).write_text('{"my": "accounts"}')
    before = Path("x", name).read_text()
    result = qtool_("eval", models / "llama", *EVAL, "-o", "x")
    assert result.code == 2
    assert f"x/{name}" in result.message
    assert Path("x", name).read_text() == before
    assert Path("victim").read_text() == "keep"
    assert [path.name for path in Path("x").iterdir()] == [name]


def test_eval_replaces_its_own_report(qtool_: Command, models: Path) -> None:
    for _ in range(2):
        assert qtool_("eval", models / "llama", *EVAL, "-o", "x").code == 0
    assert sorted(path.name for path in Path("x").iterdir()) == ["report.html", "report.json", "report.md"]


@pytest.mark.parametrize("name", ["compare.json", "compare.md", "compare.html", "plots"])
def test_compare_writes_over_no_file_of_somebody_else_and_through_no_link(
    name: str, qtool_: Command, models: Path
) -> None:
    assert qtool_("eval", models / "llama", *EVAL, "-o", "a").code == 0
    for linked in (False, True):
        Path("victim").write_text("keep")
        Path("x").mkdir(exist_ok=True)
        Path("x", name).unlink(missing_ok=True)
        Path("x", name).symlink_to(Path("victim").absolute()) if linked else Path("x", name).write_text("mine")
        result = qtool_("compare", "a", "-o", "x")
        assert result.code == 2
        assert f"x/{name}" in result.message
        assert Path("victim").read_text() == "keep"
        assert [path.name for path in Path("x").iterdir()] == [name]
    Path("x", name).unlink()
    for _ in range(2):
        assert qtool_("compare", "a", "-o", "x").code == 0


def test_a_sweep_writes_over_no_file_of_somebody_else(qtool_: Command, models: Path) -> None:
    Path("s.yaml").write_text(
        f"recipe: {{model: {{path: {models / 'llama'}}}, method: {{name: rtn}}}}\ngrid: {{seed: [0]}}\n"
    )
    Path("x").mkdir()
    for name in ("sweep.json", "sweep.md", "compare.html"):
        Path("x", name).write_text("mine")
        for _ in range(2):
            result = qtool_("sweep", "s.yaml", "-o", "x")
            assert result.code == 2
            assert f"x/{name} exists and was not written by qtool" in result.message
        assert [path.name for path in Path("x").iterdir()] == [name]
        Path("x", name).unlink()


def test_the_same_command_after_a_complete_run_says_so_and_changes_nothing(
    qtool_: Command, recipe: Callable[..., str], gptq: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = qtool_("ptq", recipe(**gptq), "--json")
    before = {name: digest(Path(name)) for name in ("out/q", "out/gptq", "out/dense")}
    again = qtool_("ptq", "r.yaml", "--json")
    assert (first.code, again.code) == (0, 0)
    assert "out/q is complete already, made by this recipe; --overwrite makes it again" in again.err
    assert json.loads(again.out)["report"] == json.loads(first.out)["report"]
    assert {name: digest(Path(name)) for name in before} == before
    for change in ("seed=4", "eval.limit=1", "export=[]"):
        other = qtool_("ptq", "r.yaml", "--set", change)
        assert other.code == 2, change
        assert "out/q exists; choose another folder, or pass --overwrite" in other.message


def test_a_complete_run_whose_files_were_changed_is_not_called_complete(
    qtool_: Command, recipe: Callable[..., str]
) -> None:
    assert qtool_("ptq", recipe()).code == 0
    shard = next(Path("out/q").glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes() + b" ")
    result = qtool_("ptq", "r.yaml")
    assert result.code == 1
    assert f"{shard.name} was changed after it was written" in result.message


def test_an_interrupted_replacement_gives_the_old_folder_its_name_back(tmp_path: Path) -> None:
    old = OutputFolder(tmp_path / "out")
    with old.claim("taken"):
        (old.partial / "replaced").mkdir()
        (old.partial / "replaced" / "old").touch()  # killed between the two renames
    with old.claim("taken"):
        assert (tmp_path / "out" / "old").exists()
        old.remove()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
