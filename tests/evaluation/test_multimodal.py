"""lm-eval's tasks about pictures: run by its own class for multimodal models, and refused for models of text."""

from pathlib import Path

import lm_eval.tasks
import pytest
from helpers import multimodal, tiny

from qtool.config.sections import EvalConfig, ModelConfig
from qtool.evaluation import harness, tasks
from qtool.models.loading import load_model
from qtool.system.errors import InputError

# a task with pictures as lm-eval defines them; its data are made by its own code
TASK = """
task: tiny_pictures
dataset_path: json
custom_dataset: !function made.dataset
test_split: test
output_type: generate_until
doc_to_image: !function made.pictures
doc_to_text: "<image>What is this?"
doc_to_target: answer
generation_kwargs: {until: ["<|endoftext|>"], do_sample: false, temperature: 0.0, max_gen_toks: 4}
metric_list: [{metric: exact_match}]
"""
CODE = """
import datasets
from PIL import Image

def dataset(**kwargs):
    return {"test": datasets.Dataset.from_list([{"number": n, "answer": "noise"} for n in range(3)])}

def pictures(doc):
    return [Image.effect_noise((40 + doc["number"], 30), 50).convert("RGB")]
"""


@pytest.fixture
def task(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    folder = tmp_path / "task"
    folder.mkdir()
    (folder / "tiny_pictures.yaml").write_text(TASK)
    (folder / "made.py").write_text(CODE)
    manager = lm_eval.tasks.TaskManager(include_defaults=False, include_path=folder)
    monkeypatch.setattr(harness, "_manager", lambda task: manager)
    return "tiny_pictures"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llava", "idefics3"])
def test_a_task_about_pictures_is_measured(task: str, name: str, tmp_path: Path) -> None:
    folder = multimodal.write(name, tmp_path / name)
    loaded = load_model(ModelConfig(path=str(folder), device="cpu", dtype="float32"))
    config = EvalConfig(tasks=(task,))
    tasks.check_tasks(config)
    (row,) = tasks.evaluate(loaded, config, None, 0)
    assert (row.task, row.metric, row.n) == (task, "exact_match", 3)
    assert row.value == 0


@pytest.mark.slow
def test_pictures_reach_the_model(task: str, tmp_path: Path) -> None:
    folder = multimodal.write("llava", tmp_path / "llava")
    loaded = load_model(ModelConfig(path=str(folder), device="cpu", dtype="float32"))
    seen: list[int] = []
    loaded.model.get_submodule("model.vision_tower").register_forward_pre_hook(lambda *_: seen.append(1))
    tasks.evaluate(loaded, EvalConfig(tasks=(task,)), None, 0)
    assert len(seen) == 3


def test_a_model_of_text_is_refused(task: str, llama_folder: Path) -> None:
    loaded = tiny.load(llama_folder)
    with pytest.raises(InputError, match=r"eval\.tasks: tiny_pictures asks about pictures, and .* reads text only"):
        tasks.evaluate(loaded, EvalConfig(tasks=(task,)), None, 0)


def test_a_model_without_processor_is_refused(task: str, tmp_path: Path) -> None:
    folder = multimodal.write("llava", tmp_path / "llava")
    (folder / "processor_config.json").unlink()
    loaded = load_model(ModelConfig(path=str(folder), device="cpu", dtype="float32"))
    with pytest.raises(InputError, match="processor"):
        tasks.evaluate(loaded, EvalConfig(tasks=(task,)), None, 0)


@pytest.mark.slow
def test_tasks_about_pictures_are_told_by_their_description() -> None:
    assert harness.reads_pictures("mmmu_val")
    assert harness.reads_pictures("chartqa")
    assert not harness.reads_pictures("boolq")
