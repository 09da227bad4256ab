"""Evaluation tasks: each number against an independent computation, and a reason where there is no number."""

import dataclasses
import json
import random
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.local_data import needs

from qtool.config.sections import EvalConfig
from qtool.data import hub, readers
from qtool.data.windows import perplexity_windows
from qtool.evaluation import harness, local_tasks, perplexity
from qtool.evaluation.tasks import _own_tasks, check_tasks, evaluate
from qtool.models.loaded import LoadedModel
from qtool.reports.text import note_of
from qtool.system.errors import InputError


@pytest.fixture
def nothing_local(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hide all local data, and let no hub answer."""
    monkeypatch.setenv("QTOOL_DATA_DIR", "")
    monkeypatch.setattr(hub, "hub_answers", lambda: False)


@pytest.fixture
def local(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A data folder with a few rows of several data sets."""
    monkeypatch.setenv("QTOOL_DATA_DIR", str(tmp_path))
    monkeypatch.setattr(hub, "hub_answers", lambda: False)

    def write(path: str, rows: list[dict[str, Any]]) -> None:
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")

    question = {"question": "is water wet", "passage": "Water is a liquid , and wets most things ."}
    write("boolq/validation.jsonl", [question | {"idx": i, "label": i % 2} for i in range(6)])
    write("boolq/train.jsonl", [question | {"idx": i, "label": i % 2} for i in range(6)])
    choices = {"text": ["sun", "moon", "sea", "wind"], "label": ["A", "B", "C", "D"]}
    light = {"question": "What gives light?", "choices": choices, "answerKey": "A"}
    write("arc_easy/validation.jsonl", [light | {"id": str(i)} for i in range(4)])
    rows = ["", " = A = \n", "", " One two . \n", " = B = \n", " Three . \n"] * 9
    write("wikitext2/test.jsonl", [{"text": row} for row in rows])
    return tmp_path


# ------------------------------------------------------------------------------------------------ evaluate


def test_both_models_are_measured_in_one_pass_as_they_are_alone(loaded: LoadedModel, reference: LoadedModel) -> None:
    words = perplexity_windows("generated", reference, 32, 4, seed=0)
    mine = perplexity.perplexity(loaded.model, words, 2)
    other = perplexity.perplexity(reference.model, words, 2)
    rows = _own_tasks(loaded, EvalConfig(tasks=("generated",), limit=4, context=32), reference, 0)
    [row] = rows["generated"]
    assert row.value == pytest.approx(mine.value, rel=1e-6)
    assert row.float_value == pytest.approx(other.value, rel=1e-6)
    assert row.delta == pytest.approx(mine.value - other.value, rel=1e-5)
    assert row.delta_stderr is not None
    found = perplexity.divergence(loaded.model, reference.model, words, 2)
    scores = perplexity.score_windows(loaded.model, reference.model, words, 3, True, "")
    assert scores.kl is not None
    assert scores.agreement is not None
    assert scores.kl.mean().item() == pytest.approx(found["kl"].value)
    assert scores.agreement.mean().item() == pytest.approx(found["top-1 agreement"].value)


@pytest.mark.usefixtures("local")
def test_rows_come_in_the_order_of_the_tasks(loaded: LoadedModel, reference: LoadedModel) -> None:
    tasks = ("kl", "generated", "wikitext2")
    rows = evaluate(loaded, EvalConfig(tasks=tasks, limit=2, context=16), reference, seed=0)
    assert [(row.task, row.metric) for row in rows] == [
        ("kl", "kl"),
        ("kl", "median"),
        ("kl", "99th percentile"),
        ("kl", "99.9th percentile"),
        ("kl", "maximum"),
        ("kl", "top-1 agreement"),
        ("generated", "perplexity"),
        ("wikitext2", "perplexity"),
    ]
    assert "of wikitext2" in rows[0].note
    assert "that the float model wrote" in rows[6].note
    assert rows[7].note == "2 windows of 16 tokens"
    values = [row.value or 0 for row in rows[1:5]]
    assert values == sorted(values)
    assert values[0] < (rows[0].value or 0) < values[-1]
    assert [row.n for row in rows[:6]] == [30] * 6


@pytest.mark.usefixtures("nothing_local")
def test_wikitext2_out_of_reach_has_a_row_that_says_so(loaded: LoadedModel, reference: LoadedModel) -> None:
    rows = evaluate(loaded, EvalConfig(tasks=("wikitext2", "kl"), limit=2, context=16), reference, seed=0)
    assert [(row.task, row.value is None) for row in rows] == [("wikitext2", True), *[("kl", False)] * 6]
    assert rows[0].note.startswith("not measured: wikitext2 is not on this machine")
    assert "of generated" in rows[1].note


@pytest.mark.usefixtures("nothing_local")
def test_kl_without_a_float_model_is_refused(loaded: LoadedModel) -> None:
    with pytest.raises(InputError, match=r"kl compares .* with the float model .*name it with --float-model"):
        evaluate(loaded, EvalConfig(tasks=("generated", "kl")), None, seed=0)


@pytest.mark.usefixtures("local")
def test_tasks_that_are_unset_have_kl_beside_a_float_model_alone(loaded: LoadedModel, reference: LoadedModel) -> None:
    config = EvalConfig(limit=2, context=16)
    assert {row.task for row in evaluate(loaded, config, reference, seed=0)} == {"wikitext2", "kl"}
    assert {row.task for row in evaluate(loaded, config, None, seed=0)} == {"wikitext2"}


def test_a_damaged_local_file_is_a_fault_and_not_a_missing_one(loaded: LoadedModel, local: Path) -> None:
    (local / "wikitext2/test.jsonl").write_text("{")
    with pytest.raises(InputError, match="line 1 is not JSON"):
        evaluate(loaded, EvalConfig(), None, seed=0)


@pytest.mark.usefixtures("local")
def test_our_own_tasks_do_not_import_lm_eval(
    loaded: LoadedModel, reference: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    config = EvalConfig(tasks=("wikitext2", "generated", "kl"), limit=2, context=16)
    check_tasks(config)
    assert len(evaluate(loaded, config, reference, seed=0)) == 8


def test_tasks_of_lm_eval_are_refused_without_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qtool.evaluation.tasks.find_spec", lambda name: None if name == "lm_eval" else object())
    with pytest.raises(InputError) as found:
        check_tasks(EvalConfig(tasks=("kl", "boolq", "wikitex2")))
    assert str(found.value) == (
        "eval.tasks: boolq, wikitex2: only wikitext2, c4, generated, kl are measured without lm-eval, which is not "
        'installed; install it with: pip install "qtool-llm[tasks]", or name only these; instead of wikitex2, did you '
        "mean wikitext2?"
    )


def test_a_backend_whose_packages_are_missing_is_refused_before_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qtool.quant.ort_kernel.find_spec", lambda name: None)
    with pytest.raises(InputError, match=r'^backend ort: onnxruntime and onnx not installed: pip install "qtool-llm\['):
        check_tasks(EvalConfig(tasks=("kl",), backend="ort"))
    for other in ("fast", "exact", "dense", "torch"):
        check_tasks(EvalConfig(tasks=("kl",), backend=other))


# -------------------------------------------------------------------------------------------- lm-eval tasks


def directly(loaded: LoadedModel, task: str, num_fewshot: int | None, limit: int) -> Any:
    """Return the results of lm-eval's own ``simple_evaluate``; only its data is redirected."""
    import lm_eval
    from lm_eval.models.huggingface import HFLM

    with local_tasks.local_data({}):
        return lm_eval.simple_evaluate(
            model=HFLM(pretrained=loaded.model, tokenizer=loaded.tokenizer, batch_size=4),
            tasks=[task],
            num_fewshot=num_fewshot,
            limit=limit,
            task_manager=harness._manager(task),
        )["results"]


@needs("boolq/validation.jsonl")
def test_boolq_equals_simple_evaluate_called_directly(loaded: LoadedModel) -> None:
    [score] = harness.run(loaded, "boolq", None, 12, 2, "boolq")
    expected = directly(loaded, "boolq", None, 12)["boolq"]
    assert score.measured.value == expected["acc,none"]
    assert score.measured.stderr == expected["acc_stderr,none"]
    assert (score.metric, score.measured.n, score.num_fewshot) == ("acc", 12, 0)


@pytest.mark.slow
@needs("mmlu/anatomy/test.jsonl")
def test_mmlu_equals_simple_evaluate_called_directly(loaded: LoadedModel) -> None:
    scores = harness.run(loaded, "mmlu", 5, 3, "auto", "mmlu")
    expected = directly(loaded, "mmlu", 5, 3)
    assert len(scores) == 1 + 4 + 57
    for score in scores:
        assert score.measured.value == expected[score.task]["acc,none"]
        assert score.measured.stderr == expected[score.task]["acc_stderr,none"]
        assert score.num_fewshot == 5
    shown = [(score.task, score.measured.n) for score in scores if not score.detail]
    assert shown == [("mmlu", 171)]
    assert [score.task for score in scores[1:5]] == [
        "mmlu_stem",
        "mmlu_other",
        "mmlu_social_sciences",
        "mmlu_humanities",
    ]


@needs("mmlu/anatomy/test.jsonl")
def test_the_limit_of_a_group_is_said_for_each_of_its_subtasks(loaded: LoadedModel) -> None:
    rows = evaluate(loaded, EvalConfig(tasks=("mmlu", "mmlu_anatomy"), limit=1, num_fewshot=0), None, seed=0)
    shown = {row.task: (row.n, row.num_subtasks, note_of(row)) for row in rows}
    assert shown["mmlu"][:2] == (57, 57)
    assert "limit 1 for each of 57 subtasks" in shown["mmlu"][2]
    assert shown["mmlu_anatomy"][:2] == (1, None)
    assert "limit 1;" in f"{shown['mmlu_anatomy'][2]};"


@needs("mmlu/anatomy/test.jsonl", "mmlu/anatomy/dev.jsonl")
def test_a_subject_of_mmlu_equals_simple_evaluate_called_directly(loaded: LoadedModel) -> None:
    [score] = harness.run(loaded, "mmlu_anatomy", 5, 8, "auto", "mmlu_anatomy")
    assert score.measured.value == directly(loaded, "mmlu_anatomy", 5, 8)["mmlu_anatomy"]["acc,none"]
    assert "cut from the left" in score.note  # 5 examples do not fit 256 tokens


@pytest.mark.slow
@needs("wikitext2/test.jsonl", "boolq/validation.jsonl", "piqa/validation.jsonl", "mmlu/anatomy/test.jsonl")
def test_the_short_list_of_tasks_says_what_the_full_list_says() -> None:
    def parts(manager: Any, task: str) -> dict[str, str]:
        with harness._harness():
            return {name: str(part.dump_config()) for name, part in manager.load([task])["tasks"].items()}

    for task in (*harness.FOLDERS, "mmlu_anatomy"):
        assert harness._manager(task) is not harness._full_manager()
        assert parts(harness._manager(task), task) == parts(harness._full_manager(), task), task


@needs("wikitext2/test.jsonl")
def test_pages_of_wikitext_are_those_of_the_document_level_data_set(data_dir: Path) -> None:
    rows = list(readers.read_file(data_dir / "wikitext2/test.jsonl"))
    pages = local_tasks._pages(rows)
    assert len(pages) == 62
    assert pages[0].startswith(" = Robert Boulter = \n \n Robert Boulter is an English film")
    # the original file is 1,290,590 bytes: a blank first line, and a newline before each page after the first
    assert sum(len(page.encode()) for page in pages) == 1_290_590 - 2 - 61


@pytest.mark.usefixtures("local")
def test_lm_eval_tasks_stand_beside_the_float_model(loaded: LoadedModel, reference: LoadedModel) -> None:
    config = EvalConfig(tasks=("boolq", "arc_easy", "wikitext"), num_fewshot={"boolq": 1}, limit=4, batch_size=4)
    check_tasks(config)
    rows = evaluate(loaded, config, reference, seed=0)
    assert [(row.task, row.metric, row.num_fewshot) for row in rows] == [
        ("boolq", "acc", 1),
        ("arc_easy", "acc", 0),
        ("arc_easy", "acc_norm", 0),
        ("wikitext", "word_perplexity", 0),
        ("wikitext", "byte_perplexity", 0),
        ("wikitext", "bits_per_byte", 0),
    ]
    assert [row.higher_is_better for row in rows] == [True, True, True, False, False, False]
    for row in rows:
        assert row.value is not None
        assert row.float_value is not None
        assert row.delta == row.value - row.float_value
    # accuracies are means of the same items' scores; word perplexity is no mean
    assert [row.delta_stderr is not None for row in rows] == [True, True, True, False, False, False]
    assert rows[1].note == "validation split (4 examples): the test split is not below QTOOL_DATA_DIR"
    assert rows[3].value != rows[3].float_value
    [alone] = harness.run(reference, "boolq", 1, 4, 4, "boolq")
    assert rows[0].float_value == alone.measured.value


@pytest.mark.usefixtures("local")
def test_lm_eval_leaves_no_trace(loaded: LoadedModel, capfd: pytest.CaptureFixture[str]) -> None:
    from lm_eval.api.task import ConfigurableTask

    def traces() -> tuple[object, ...]:
        return (
            torch.random.get_rng_state().tolist(),
            random.getstate(),
            np.random.get_state(legacy=False)["state"]["key"].tolist(),
            ConfigurableTask.download,
            loaded.tokenizer.pad_token,
            loaded.tokenizer.model_max_length,
        )

    before = traces()
    harness.run(loaded, "boolq", None, 4, "auto", "boolq")
    with harness._harness():
        print("lm-eval prints now and then")
    assert traces() == before
    assert capfd.readouterr().out == ""


@pytest.mark.usefixtures("local")
def test_few_shot_examples_that_are_not_here_are_refused() -> None:
    with pytest.raises(InputError, match="arc_easy is asked for with 2 example"):
        check_tasks(EvalConfig(tasks=("arc_easy",), num_fewshot=2))


@pytest.mark.usefixtures("nothing_local")
def test_data_out_of_reach_is_told_before_any_work() -> None:
    with pytest.raises(InputError, match=r"the data of boolq, aps/super_glue, cannot be read.*QTOOL_DATA_DIR"):
        check_tasks(EvalConfig(tasks=("boolq",)))


def test_an_unknown_task_is_told_the_nearest_names_without_the_index(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness, "_manager", None)
    with pytest.raises(InputError, match=r"no task 'boolqq'; the nearest names are boolq, boolqa_bn"):
        check_tasks(EvalConfig(tasks=("boolq", "boolqq")))


def test_a_name_that_files_of_tasks_contain_is_looked_up_in_the_index(monkeypatch: pytest.MonkeyPatch) -> None:
    few = dataclasses.make_dataclass("Few", ["all_tasks"])(["boolq", "dataset_paths", "mmlu"])
    monkeypatch.setattr(harness, "_full_manager", lambda: few)
    monkeypatch.setattr(harness, "_manager", lambda task: few)
    with pytest.raises(InputError, match=r"no task 'dataset_path'; the nearest names are dataset_paths"):
        check_tasks(EvalConfig(tasks=("dataset_path",)))


@pytest.mark.parametrize("name", ["hellaswag", "flores_eng-afr", "tmmluplus_education_(profession_level)", "gpqa"])
def test_tasks_groups_and_tags_are_found_in_the_files(name: str) -> None:
    harness._check_written([name])


def test_faults_of_the_section_are_told() -> None:
    with pytest.raises(InputError, match="kl is named more than once"):
        check_tasks(EvalConfig(tasks=("kl", "kl")))
    with pytest.raises(InputError, match=r"'bolq' is not one of eval\.tasks.*did you mean boolq\?"):
        check_tasks(EvalConfig(tasks=("boolq",), num_fewshot={"bolq": 5}))
    with pytest.raises(InputError, match="'kl' is not one of"):
        check_tasks(EvalConfig(tasks=("kl",), num_fewshot={"kl": 5}))
