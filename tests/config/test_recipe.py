"""A recipe is either checked and frozen, or refused with every fault at once."""

from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar, Literal

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import Field, ValidationError, model_validator

from qtool.config import catalog, describe, files, plugins, recipe
from qtool.config.quant import QuantConfig
from qtool.config.section import Section
from qtool.config.sections import MethodConfig
from qtool.config.yaml_loader import dump, parse
from qtool.system.errors import InputError


class Demo(MethodConfig):
    name: Literal["demo"] = "demo"
    damp: float = Field(0.01, gt=0, description="Added to the diagonal.")
    order: Literal["off", "full"] = Field("off", description="Order of columns.")
    static: bool = Field(False, description="Fix the grids first.")

    @model_validator(mode="after")
    def _rule(self) -> "Demo":
        if self.order == "full" and not self.static:
            raise ValueError("order: full needs static: true")
        return self


class Part(Section):
    renamed: ClassVar[Mapping[str, str]] = {"speed": "rate, in steps"}

    rate: float = 0.1


class Renamed(Demo):
    renamed: ClassVar[Mapping[str, str]] = {"damping": "damp, a share of the mean"}

    part: Part = Part()


METHODS = {"demo": SimpleNamespace(command="ptq", summary="a demonstration", config=Demo)}
GOOD = """
model: {path: somewhere}
method: {name: demo}
output: {path: out}
"""
Write = Callable[[str | bytes], Path]


@pytest.fixture(autouse=True)
def _demo_plugins(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replace the plugins by one method and two export formats, so that no test here loads torch."""
    monkeypatch.setattr(catalog, "methods", lambda: tuple(METHODS))
    monkeypatch.setattr(plugins, "get", METHODS.__getitem__)
    monkeypatch.setattr(catalog, "export_formats", lambda: ("compressed-tensors", "dense"))


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def write(text: str | bytes) -> Path:
        path = tmp_path / "r.yaml"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    return write


def faults_of(path: Path, *overrides: str) -> list[str]:
    with pytest.raises(InputError) as caught:
        recipe.load(path, overrides)
    head, *lines = str(caught.value).splitlines()
    assert head == f"{path}{' with --set' if overrides else ''} has {len(lines)} fault{'s' * (len(lines) > 1)}:"
    assert all(line.startswith("  ") for line in lines)
    return [line.strip() for line in lines]


def test_a_small_recipe_gets_every_default(write: Write) -> None:
    checked = recipe.load(write(GOOD))
    assert checked.method == Demo()
    assert checked.quant == QuantConfig()
    assert (checked.eval, checked.export, checked.seed) == (None, (), 0)
    with pytest.raises(ValidationError, match="frozen"):
        checked.seed = 1  # type: ignore[misc]  # the refusal is what is tested


def test_a_budget_beside_the_width_that_it_chooses_is_refused(write: Write) -> None:
    path = write(GOOD + "quant: {num_bits: 3, budget: {share: 0.2}}")
    assert faults_of(path)[0].startswith("quant.num_bits: 3 beside quant.budget, which chooses the bits")
    assert recipe.load(path, ["quant.num_bits=null"]).quant.budget is not None
    with pytest.raises(InputError, match=r"quant\.num_bits: 3 beside quant\.budget"):
        recipe.load_eval(path, {})


def test_all_faults_are_listed_at_once_with_key_value_and_nearest_key(write: Write) -> None:
    path = write(
        """
model: {pth: x, device: 3}
method: {name: demo, dmp: 0.1, damp: -1}
quant: {num_bit: 4, num_bits: 5, overrides: {"*.q_proj": {num_bits: 7, foo: 1}, "b.c": 3}}
data: nope
eval: {tasks: wikitext2, num_fewshot: {boolq: x}, batch_size: many, limit: 0}
export: [{format: dens}, {format: dense, path: x, kind: 1}]
seed: -1
group_size: 4
"""
    )
    assert faults_of(path) == [
        "model.path: missing; Local folder, .gguf file, hub name (org/name), or builtin:wiki-llama-3m.",
        "model.device: should be text; found 3",
        'model.pth: unknown key; the nearest is model.path; found "x"',
        "method.damp: should be greater than 0; found -1",
        "method.dmp: unknown key; the nearest is method.damp; found 0.1",
        "quant.num_bits: should be 2, 3, 4 or 8; 5 bits are a grid of GGUF: grid: q5_k or q5_1; found 5",
        "quant.overrides.*.q_proj.num_bits: should be 2, 3, 4, 5, 6 or 8; found 7",
        "quant.overrides.*.q_proj.foo: unknown key; known: grid, num_bits, group_size, symmetric, scale_dtype, "
        "float_zero, negative_scales, activations, kv_cache, kv_group_size, skip; found 1",
        "quant.overrides.b.c: should be a mapping with keys "
        "grid, num_bits, group_size, symmetric, scale_dtype, float_zero, "
        "negative_scales, activations, kv_cache, kv_group_size, skip; found 3",
        "quant.num_bit: unknown key; the nearest is quant.num_bits; found 4",
        'data: should be a mapping with keys source, num_samples, seq_len, bos, memory_budget; found "nope"',
        'eval.tasks: should be a list, such as [wikitext2]; found "wikitext2"',
        'eval.num_fewshot.boolq: should be a whole number; found "x"',
        "eval.limit: should be greater than or equal to 1; found 0",
        "eval.batch_size: should be a whole number or 'auto'; found \"many\"",
        'export.0.format: no such export format; the nearest is dense; known: compressed-tensors, dense; found "dens"',
        "export.0.path: missing; Folder to write; must not exist unless output.overwrite is set.",
        "export.1.kind: unknown key; known: format, path, dtype; found 1",
        "output.path: missing; Folder to write; it appears under this name only when complete.",
        "seed: should be greater than or equal to 0; found -1",
        "group_size: unknown key; it belongs to quant: quant.group_size; found 4",
    ]


@pytest.mark.parametrize(
    ("value", "fault"),
    [
        ("9", ".num_bits: should be less than or equal to 8; found 9"),
        ("fast", '.num_bits: should be a whole number; found "fast"'),
        ("[8]", ".num_bits: should be a whole number; found [8]"),
        ("{num_bits: 8, sym: true}", ".sym: unknown key; known: num_bits, symmetric; found true"),
        ("{num_bits: 8, symmetric: yes please}", '.symmetric: should be true or false; found "yes please"'),
    ],
)
def test_bits_of_activations_are_a_number_or_a_grid(write: Write, value: str, fault: str) -> None:
    assert faults_of(write(f"{GOOD}\nquant: {{activations: {value}}}\n")) == [f"quant.activations{fault}"]


@pytest.mark.parametrize(
    ("method", "fault"),
    [
        ("{name: deom}", 'method.name: no such method; the nearest is demo; known: demo; found "deom"'),
        ("{name: zzzz, damp: -1}", 'method.name: no such method; known: demo; found "zzzz"'),
        ("{damp: -1}", "method.name: missing; Name of the quantization method, e.g. gptq."),
        ("{name: 3}", "method.name: should be text; found 3"),
        ("demo", 'method: should be a mapping with keys name; found "demo"'),
        ("{name: demo, order: full}", "method: order: full needs static: true"),
        ("{name: demo, 1: 2}", "method.1: a key should be text; found 1"),
    ],
)
def test_a_method_section_is_checked_by_its_own_method(write: Write, method: str, fault: str) -> None:
    assert faults_of(write(f"model: {{path: x}}\nmethod: {method}\noutput: {{path: y}}")) == [fault]


def test_a_renamed_key_names_its_successor_wherever_it_is_given(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(METHODS, "demo", SimpleNamespace(command="ptq", summary="a demonstration", config=Renamed))
    faults = [
        "method.part.speed: this key is now rate, in steps; found 3",
        "method.damping: this key is now damp, a share of the mean; found 0.1",
    ]
    path = write("model: {path: x}\nmethod: {name: demo, damping: 0.1, part: {speed: 3}}\noutput: {path: y}")
    assert faults_of(path) == faults
    assert faults_of(write(GOOD), "method.damping=0.1", "method.part.speed=3") == faults


def test_an_export_format_may_be_written_like_its_file(write: Write) -> None:
    path = write(GOOD + "export: [{format: compressed_tensors, path: a}, {format: dense, path: b}]")
    assert [entry.format for entry in recipe.load(path).export] == ["compressed-tensors", "dense"]


def test_export_formats_are_the_files_of_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    for name in ("__init__", "_private", "compressed_tensors", "dense"):
        (tmp_path / "exporters").mkdir(exist_ok=True)
        (tmp_path / "exporters" / f"{name}.py").touch()
    monkeypatch.setattr(catalog, "ROOMS", tmp_path)
    catalog.export_formats.cache_clear()
    assert catalog.export_formats() == ("compressed-tensors", "dense")
    catalog.export_formats.cache_clear()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "r.yaml is empty; qtool recipes quickstart prints a recipe to start from"),
        (b"# only a comment\n", "r.yaml is empty"),
        (b"- 1\n", "r.yaml holds [1], not sections"),
        (b"model: \xff\n", "r.yaml is not UTF-8: byte 0xff in line 1"),
        ("model: é\n".encode("utf-16"), "r.yaml is not UTF-8: byte 0xff in line 1"),
        (b"a: 1\nb: [1\n", "r.yaml is not YAML: line 3, column 1: expected"),
        (b"a: 1\n\tb: 2\n", "r.yaml is not YAML: line 2, column 1: found character '\\t'"),
        (b"seed: 1\nmodel: {path: x}\nseed: 2\n", "r.yaml is not YAML: line 3, column 1: key 'seed' is there twice"),
        (b"model: {path: x, path: y}\n", "r.yaml is not YAML: line 1, column 18: key 'path' is there twice"),
        (b"a: \x01\n", "r.yaml is not YAML: character 4: special characters are not allowed"),
        (b"a: !!python/name:os.system x\n", "r.yaml is not YAML: line 1, column 4: the tag !!python/name:os"),
        (b"a: !!bool maybe\n", "r.yaml is not YAML: a value does not fit its tag"),
        (b"? [a]\n: 1\n", "r.yaml is not YAML: line 1, column 3: found unhashable key"),
        (b"[" * 1500, "r.yaml is not YAML: nested too deeply"),
        (b"a: 1\n---\nb: 2\n", "r.yaml is not YAML: line 2, column 1: but found another document"),
        (b"a: &x 1\nb: &x 2\n", "r.yaml is not YAML: found duplicate anchor 'x'"),
        (b"%YAML 1.3\n---\na: 1\n", "r.yaml is not YAML: version minor part can only be 2 or 1"),
    ],
)
def test_a_bad_file_is_one_clear_line(write: Write, content: bytes, message: str) -> None:
    with pytest.raises(InputError) as caught:
        recipe.load(write(content))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_path_that_is_no_file_says_what_there_is(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is a folder; a recipe is a YAML file"):
        recipe.load(tmp_path)
    with pytest.raises(InputError, match="does not exist; did you mean the packaged recipe quickstart"):
        recipe.load(tmp_path / "quickstrat.yaml")
    with pytest.raises(
        InputError, match=r"recipe quickstart\? To quantize a model of that name: qtool quantize quickstrat"
    ):
        recipe.load("quickstrat")
    with pytest.raises(InputError, match="does not exist; qtool recipes lists"):
        recipe.load("zzz.yaml")


def test_a_packaged_name_is_a_recipe_unless_a_file_has_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert "generated" in files.read_yaml("quickstart")["eval"]["tasks"]
    Path("quickstart").mkdir()
    assert "eval" in files.read_yaml("quickstart")
    Path("quickstart").rmdir()
    Path("quickstart").write_text("seed: 7")
    assert files.read_yaml("quickstart") == {"seed": 7}


@given(st.text(alphabet=st.characters(blacklist_categories=["Cs"]), max_size=60) | st.binary(max_size=40))
@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_whatever_a_file_holds_nothing_but_an_input_error_comes_out(tmp_path: Path, content: str | bytes) -> None:
    path = tmp_path / "any.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(InputError):
        recipe.load(path)


@pytest.mark.parametrize("word", ["off", "on", "yes", "no"])
def test_on_and_off_are_words_and_so_are_dates(write: Write, word: str) -> None:
    assert files.read_yaml(write(f"a: {word}\nb: 2024-01-01\nc: true")) == {"a": word, "b": "2024-01-01", "c": True}
    assert recipe.load(write(GOOD), [f"quant.symmetric={word}"]).quant.symmetric == (word in ("on", "yes"))


# --set


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("seed=3", 3),
        ("quant.num_bits=2", 2),
        ("method.damp=1e-5", 1e-5),
        ("output.path=a=b", Path("a=b")),
        ("eval.tasks=[a, b]", ("a", "b")),
        ("eval.num_fewshot.boolq=5", {"boolq": 5}),
        ("export.0.path=x", Path("x")),
        ("export.0.format=compressed-tensors", "compressed-tensors"),
        ("eval=null", None),
    ],
)
def test_set_changes_one_key(write: Write, override: str, value: object) -> None:
    checked: Any = recipe.load(write(GOOD + "export: [{format: dense, path: y}]\neval:\n"), [override])
    for part in override.partition("=")[0].split("."):
        if isinstance(checked, dict):
            break
        checked = checked[int(part)] if part.isdigit() else getattr(checked, part)
    assert checked == value


def test_set_makes_the_list_entries_it_needs(write: Write) -> None:
    checked = recipe.load(
        write(GOOD), ["export.0.format=dense", "export.0.path=x", "export.1={format: dense, path: y}"]
    )
    assert [str(entry.path) for entry in checked.export] == ["x", "y"]


def test_a_pattern_with_dots_goes_up_to_the_last_key(write: Write) -> None:
    overrides = ["quant.overrides.*.mlp.down_proj.num_bits=8", "quant.overrides.model.layers.0.*={skip: true}"]
    found = recipe.load(write(GOOD), overrides).quant.overrides
    assert found["*.mlp.down_proj"].num_bits == 8
    assert found["model.layers.0.*"].skip


def test_faults_of_set_are_listed_with_the_others(write: Write) -> None:
    assert faults_of(write(GOOD), "seed") == ["--set seed: write section.key=value"]
    path = write(GOOD + "seed: -1")
    wrong = ["seed", "=3", "a..b=1", "model.path.x=1", "eval.tasks.2=a", "quant.num_bits=[1,"]
    assert faults_of(path, "eval.tasks=[]", *wrong) == [
        "--set seed: write section.key=value",
        "--set =3: write section.key=value",
        "--set a..b=1: write section.key=value",
        '--set model.path.x=1: model.path is "somewhere", which has no keys',
        "--set eval.tasks.2=a: eval.tasks is a list of 0: after eval.tasks write a number from 0 to 0",
        "--set quant.num_bits=[1,: line 1, column 4: expected the node content, but found '<stream end>'",
        "eval.tasks: Tuple should have at least 1 item after validation, not 0; found []",
        "seed: should be greater than or equal to 0; found -1",
    ]


# resolved, schema, keys


_override = st.fixed_dictionaries(
    {},
    optional={
        "num_bits": st.sampled_from([2, 3, 4, 8]),
        "group_size": st.sampled_from([-1, 32, 64]),
        "symmetric": st.booleans(),
        "skip": st.booleans(),
    },
)


@given(
    bits=st.sampled_from([2, 3, 4, 8]),
    group=st.sampled_from([-1, 1, 96]),
    overrides=st.dictionaries(st.sampled_from(["*", "*.q", "a.*", "a.q"]), _override),
    damp=st.floats(1e-9, 1e9),
)
def test_the_resolved_recipe_means_the_same(bits: int, group: int, overrides: dict[str, Any], damp: float) -> None:
    quant = {"num_bits": bits, "group_size": group, "overrides": overrides}
    raw = {"model": {"path": "x"}, "method": {"name": "demo", "damp": damp}, "quant": quant, "output": {"path": "y"}}
    first = recipe.Recipe.model_validate(raw)
    again = recipe.Recipe.model_validate(parse(dump(recipe.resolved(first))))
    assert again == first
    for name in ("a.q", "a.k", "b.q", "c"):
        assert again.quant.spec_for(name) == first.quant.spec_for(name)


def test_the_schema_ties_the_keys_of_a_method_to_its_name() -> None:
    found = describe.schema()
    (section,) = found["properties"]["method"]["oneOf"]
    assert section["properties"]["name"] == {"const": "demo", "description": "a demonstration"}
    assert section["required"] == ["name"]
    assert set(section["properties"]) == {"name", "damp", "order", "static"}
    assert section["additionalProperties"] is False
    assert found["required"] == ["model", "method", "output"]
    assert found["$defs"]["ExportConfig"]["properties"]["format"]["enum"] == ["compressed-tensors", "dense"]


def test_keys_have_a_default_and_a_description() -> None:
    table = describe.keys("ptq")
    assert table["method"][1] == [describe.Key("name", "required", "One of: demo.", "text")]
    order = describe.Key("order", "off", "Order of columns. One of: off, full.", "one of off, full")
    assert table["method demo"][1][1] == order
    assert all(key.description.endswith(".") for _, keys in table.values() for key in keys)
    assert "method demo" not in describe.keys("qat")


# eval


def test_eval_of_a_recipe_without_a_method_takes_its_model(write: Write) -> None:
    path = write("model: {path: x}\neval: {tasks: [boolq], limit: 3}\nseed: 5")
    checked = recipe.load_eval(path, {"eval": {"limit": 9}, "model": {}})
    assert (checked.model.path, checked.eval.tasks, checked.eval.limit, checked.seed) == ("x", ("boolq",), 9, 5)


def test_eval_of_a_quantization_recipe_takes_what_it_wrote(write: Write, tmp_path: Path) -> None:
    path = write(GOOD.replace("path: out", f"path: {tmp_path / 'out'}"))
    with pytest.raises(InputError, match=r"which does not exist yet; run: qtool ptq .*r\.yaml"):
        recipe.load_eval(path, {})
    (tmp_path / "out").mkdir()
    assert recipe.load_eval(path, {"eval": {"tasks": ["kl"]}}).eval.tasks == ("kl",)
    assert recipe.load_eval(path, {}).model.path == str(tmp_path / "out")


def test_options_do_not_hide_a_faulty_section(write: Write) -> None:
    with pytest.raises(InputError, match="eval: should be a mapping"):
        recipe.load_eval(write("model: {path: x}\neval: 3"), {"eval": {"limit": 9}})


def test_export_options_are_checked_together() -> None:
    with pytest.raises(InputError, match=r"(?s)has 2 fault.*export.format.*export.dtype: should be 'auto'"):
        recipe.check_export({"format": "x", "path": "y", "dtype": "z"})
    assert recipe.check_export({"format": "dense", "path": "y"}).path == Path("y")
