"""A run may be killed at any moment and goes on with the same bytes; another run never goes on with its blocks."""

import json
import os
import random
import signal
import sys
import time
import traceback
from pathlib import Path

import pytest
import tiny
import torch
import yaml

from qtool import audit, endtoend, methods, recipe, run, state
from qtool.checkpoint import file_hashes
from qtool.errors import InputError, RunError

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="needs fork")

QUANT = {"num_bits": 4, "group_size": 32}
METHODS = {
    "rtn": {"name": "rtn"},
    "gptq": {"name": "gptq"},
    "gptaq": {"name": "gptq", "gptaq": 0.25},
    "awq": {"name": "awq", "num_ratios": 3, "clip_steps": 2, "search_samples": 4},
    "signround": {"name": "signround", "iterations": 8},
    "hqq": {"name": "hqq"},
    "lsq": {"name": "lsq", "steps": 4, "save_every": 1, "validation_samples": 2, "validate_every": 2},
    "efficientqat": {"name": "efficientqat", "min_steps": 4, "epochs": 0.1, "e2e": {"steps": 3, "save_every": 1}},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A float model of three blocks and text for it."""
    path = tmp_path_factory.mktemp("models")
    tiny.llama(path / "float", blocks=3, tied=True)
    (path / "text.txt").write_text("\n".join(tiny.PROSE * 40), encoding="utf-8")
    return path


def make(folder, output, method="gptq", **changes):
    """The recipe of a run."""
    raw = {
        "model": {"path": str(folder / "float")},
        "method": METHODS[method],
        "quant": QUANT,
        "data": {"source": str(folder / "text.txt"), "num_samples": 8, "seq_len": 32},
        "output": {"path": str(output)},
    }
    for key, value in changes.items():
        section, name = key.split("__")
        raw[section] = raw[section] | {name: value}
    file = output.with_suffix(".yaml")
    file.write_text(yaml.safe_dump(raw), encoding="utf-8")
    return recipe.load(str(file))


def quantize(checked, **options):
    return run.quantize(checked, methods.get(checked.method.name).command, **options)


def hashes(output):
    return file_hashes(output, "*.safetensors")


@pytest.fixture(scope="module")
def whole(folder, tmp_path_factory):
    """Hashes of an uninterrupted run, by method."""
    made = {}

    def of(method):
        if method not in made:
            output = tmp_path_factory.mktemp("whole") / method
            quantize(make(folder, output, method))
            made[method] = hashes(output)
        return made[method]

    return of


class Killed(Exception):
    """Raised instead of a signal where the process is to live."""


def in_child(work):
    """Run ``work`` in a forked child; returns its process id."""
    child = os.fork()
    if child:
        return child
    shown = sys.stderr
    try:
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115
        os.environ["HF_DEACTIVATE_ASYNC_LOAD"] = "1"  # threads that load are not safe in a fork of a threaded process
        work()
    except BaseException:
        traceback.print_exc(file=shown)  # pytest shows it when the test fails
        shown.flush()
        os._exit(1)
    os._exit(0)


def wait(child):
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def killed_at_rename(checked, number, after):
    """Run, and die by SIGKILL at the given rename (a file or folder gets its name), before or after it."""
    rename = Path.rename
    count = 0

    def deadly(path, target):
        nonlocal count
        if count == number and not after:
            os.kill(os.getpid(), signal.SIGKILL)
        result = rename(path, target)
        if count == number:
            os.kill(os.getpid(), signal.SIGKILL)
        count += 1
        return result

    def work():
        Path.rename = deadly
        quantize(checked)

    return wait(in_child(work))


@pytest.mark.parametrize("method", ["gptq", "lsq", "efficientqat"])
@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
def test_a_run_killed_where_any_file_gets_its_name_goes_on_to_the_same_bytes(folder, tmp_path, whole, after, method):
    expected, number = whole(method), 0
    while True:
        output = tmp_path / f"out-{number}"
        checked = make(folder, output, method)
        status = killed_at_rename(checked, number, after)
        if status == 0:
            break
        assert status == -signal.SIGKILL
        if not output.exists():
            quantize(checked)
        assert hashes(output) == expected, number
        assert not output.with_name(f"{output.name}.partial").exists() or after
        number += 1
    # lock, tokens, three blocks with a record each, the rest, the folder; or four steps in place of the blocks; or both
    assert number >= {"gptq": 10, "lsq": 8, "efficientqat": 13}[method]


@pytest.mark.parametrize("method", METHODS)
def test_a_run_killed_at_a_random_moment_goes_on_to_the_same_bytes(folder, tmp_path, whole, method):
    expected = whole(method)
    start = time.monotonic()
    quantize(make(folder, tmp_path / "timed", method))
    lasts = time.monotonic() - start
    draw = random.Random(0)
    for i in range(3):
        output = tmp_path / f"out-{i}"
        checked = make(folder, output, method)
        child = in_child(lambda checked=checked: quantize(checked))
        time.sleep(draw.uniform(0, 1.2 * lasts))
        os.kill(child, signal.SIGKILL)
        wait(child)
        if not output.exists():
            quantize(checked)
        assert hashes(output) == expected


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("method", [name for name in ("gptq", "awq", "signround") if name in METHODS])
def test_ten_random_kills_each(folder, tmp_path, whole, method):
    """Thirty with all three methods; a run may be killed again and again before it is let finish."""
    expected = whole(method)
    start = time.monotonic()
    quantize(make(folder, tmp_path / "timed", method))
    lasts = time.monotonic() - start
    draw = random.Random(method)
    kills = 0
    while kills < 10:
        output = tmp_path / f"out-{kills}"
        checked = make(folder, output, method)
        while not output.exists():
            child = in_child(lambda checked=checked: quantize(checked))
            time.sleep(draw.uniform(0, 1.1 * lasts))
            os.kill(child, signal.SIGKILL)
            kills += wait(child) == -signal.SIGKILL
            if kills >= 10 and not output.exists():
                quantize(checked)
        assert hashes(output) == expected


def stop_after(monkeypatch, blocks):
    """Let the run fail when it has kept so many blocks."""
    write = state.RunState.write

    def limited(self, index, tensors, figures):
        write(self, index, tensors, figures)
        if index + 1 == blocks:
            raise Killed

    monkeypatch.setattr(state.RunState, "write", limited)


@pytest.fixture
def half_done(folder, tmp_path, monkeypatch):
    """A run of which two of three blocks are done."""
    checked = make(folder, tmp_path / "out")
    with monkeypatch.context() as patch:
        stop_after(patch, 2)
        with pytest.raises(Killed):
            quantize(checked)
    return checked


def test_finished_blocks_are_not_done_again(half_done, tmp_path, whole, monkeypatch):
    from qtool.methods import gptq

    done = []
    solve = gptq.quantize_group
    monkeypatch.setattr(gptq, "quantize_group", lambda task, *rest: (done.append(task.index), solve(task, *rest)))
    quantize(half_done)
    assert set(done) == {2}
    assert hashes(tmp_path / "out") == whole("gptq")
    manifest = json.loads((tmp_path / "out" / "qtool.json").read_text())
    assert len(manifest["series"]["block_error"]) == 3
    assert not (tmp_path / "out.partial").exists()


def test_finished_training_is_not_done_again(folder, tmp_path, whole, monkeypatch):
    """Neither its steps nor, once all are done, any forward of the model."""
    checked = make(folder, tmp_path / "out", "lsq")
    done = []
    losses = endtoend._Training.losses

    def counted(self, step):
        done.append(step)
        return losses(self, step)

    monkeypatch.setattr(endtoend._Training, "losses", counted)
    write = endtoend._Kept.write

    def stopping(kept, state):
        write(kept, state)
        if int(state["steps"][0]) in (2, 4):
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(endtoend._Kept, "write", stopping)
        for _ in range(2):
            with pytest.raises(Killed):
                quantize(checked)
        assert done == [0, 1, 2, 3]
        quantize(checked)
    assert done == [0, 1, 2, 3]
    assert hashes(tmp_path / "out") == whole("lsq")
    series = json.loads((tmp_path / "out" / "qtool.json").read_text())["series"]
    assert (len(series["loss"]), len(series["validation"])) == (4, 3)


def test_how_often_a_training_is_kept_changes_nothing(folder, tmp_path, whole):
    quantize(make(folder, tmp_path / "out", "lsq", method__save_every=3))
    assert hashes(tmp_path / "out") == whole("lsq")


def test_a_changed_recipe_is_refused_with_the_difference(half_done, folder, tmp_path):
    changed = make(folder, tmp_path / "out", quant__num_bits=3)
    with pytest.raises(InputError, match=r"--fresh to start over:\n  quant\.num_bits: 4 -> 3$"):
        quantize(changed)
    assert (tmp_path / "out.partial" / "state" / "block-00001.json").exists(), "what is done was lost"


def test_a_changed_model_is_refused(folder, tmp_path, monkeypatch):
    other = tmp_path / "models"
    other.mkdir()
    tiny.llama(other / "float", blocks=3)
    (other / "text.txt").write_text("\n".join(tiny.PROSE * 40), encoding="utf-8")
    checked = make(other, tmp_path / "out")
    with monkeypatch.context() as patch:
        stop_after(patch, 1)
        with pytest.raises(Killed):
            quantize(checked)
    tiny.llama(other / "float", blocks=3, tied=True)
    with pytest.raises(InputError, match=r"model_files\.config\.json: "):
        quantize(checked)


def test_changed_text_is_refused(half_done, folder, tmp_path):
    text = folder / "text.txt"
    before = text.read_text()
    try:
        text.write_text("Something else entirely. " * 400)
        with pytest.raises(InputError, match="the calibration text has changed"):
            quantize(half_done)
    finally:
        text.write_text(before)
    quantize(half_done)


def test_fresh_starts_over(half_done, folder, tmp_path):
    changed = make(folder, tmp_path / "out", quant__num_bits=3)
    quantize(changed, fresh=True)
    assert json.loads((tmp_path / "out" / "qtool.json").read_text())["label"].startswith("w3")


def test_a_damaged_shard_is_made_again(half_done, tmp_path, whole):
    shard = sorted((tmp_path / "out.partial" / "model").glob("*.safetensors"))[1]
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    quantize(half_done)
    assert hashes(tmp_path / "out") == whole("gptq")


def test_what_does_not_change_the_result_may_change(half_done, folder, tmp_path, whole):
    quantize(make(folder, tmp_path / "out", data__memory_budget="1kB"))
    assert hashes(tmp_path / "out") == whole("gptq")


def sharded(folder, target):
    """The float model in one file for each block."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    AutoModelForCausalLM.from_pretrained(folder / "float").save_pretrained(target / "float", max_shard_size="60KB")
    AutoTokenizer.from_pretrained(folder / "float").save_pretrained(target / "float")
    (target / "text.txt").write_text((folder / "text.txt").read_text())
    assert len(list((target / "float").glob("*.safetensors"))) > 2
    return target


def test_sharded_files_give_the_same_weights(folder, tmp_path, whole):
    quantize(make(sharded(folder, tmp_path), tmp_path / "out"))
    assert hashes(tmp_path / "out") == whole("gptq")


def test_a_shard_deleted_in_mid_run_is_named_and_the_run_goes_on_when_it_is_back(folder, tmp_path, monkeypatch, whole):
    models = sharded(folder, tmp_path)
    shard = sorted((models / "float").glob("*.safetensors"))[-1]
    kept = shard.read_bytes()
    checked = make(models, tmp_path / "out")
    write = state.RunState.write

    def losing(self, index, tensors, figures):
        write(self, index, tensors, figures)
        shard.unlink(missing_ok=True)

    with monkeypatch.context() as patch:
        patch.setattr(state.RunState, "write", losing)
        with pytest.raises(RunError, match=r"is no longer in .*; put its file back"):
            quantize(checked)
    with pytest.raises(InputError, match=f"lists {shard.name}, which is not there"):
        quantize(checked)
    shard.write_bytes(kept)
    quantize(checked)
    assert hashes(tmp_path / "out") == whole("gptq")


def test_a_full_disk_ends_the_run_and_what_is_done_stays(folder, tmp_path, monkeypatch, whole):
    from qtool import checkpoint

    save_file, count = checkpoint.save_file, 0

    def full(*args, **kwargs):
        nonlocal count
        count += 1
        if count == 4:  # tokens and two blocks are written
            raise OSError(28, "No space left on device")
        save_file(*args, **kwargs)

    checked = make(folder, tmp_path / "out")
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save_file", full)
        with pytest.raises(RunError, match=r"the disk is full; .*out\.partial holds what is done"):
            quantize(checked)
    assert len(list((tmp_path / "out.partial" / "state").glob("block-*.json"))) == 2
    quantize(checked)
    assert hashes(tmp_path / "out") == whole("gptq")


def test_two_runs_do_not_write_one_folder(half_done, tmp_path):
    from filelock import FileLock

    with FileLock(tmp_path / "out.partial" / "busy"), pytest.raises(InputError, match="another run is writing"):
        quantize(half_done)


def test_an_interrupted_run_that_has_done_nothing_leaves_nothing(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(run, "load_model", lambda *args, **kwargs: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        quantize(make(folder, tmp_path / "out"))
    assert not list(tmp_path.glob("out*/"))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("budget", ["0", "40kB"], ids=["disk", "memory without pausing"])
def test_a_memory_budget_changes_no_bit(folder, tmp_path, whole, method, budget):
    quantize(make(folder, tmp_path / "out", method, data__memory_budget=budget))
    assert hashes(tmp_path / "out") == whole(method)


def test_the_same_recipe_gives_the_same_bytes(folder, tmp_path, whole):
    quantize(make(folder, tmp_path / "out"))
    assert hashes(tmp_path / "out") == whole("gptq")


# ------------------------------------------------------------------------------------------- verify and reproduce


@pytest.fixture
def written(folder, tmp_path):
    quantize(make(folder, tmp_path / "out"))
    return tmp_path / "out"


def test_verify_accepts_what_was_written(written):
    assert audit.verify(written)["linears"] == 3 * 7


def test_verify_finds_a_changed_bit_a_missing_and_a_new_file(written):
    first, second = sorted(written.glob("*.safetensors"))[:2]
    content = bytearray(first.read_bytes())
    content[-1] ^= 1
    first.write_bytes(content)
    second.rename(written / "new.safetensors")
    with pytest.raises(RunError) as found:
        audit.verify(written)
    message = str(found.value)
    assert f"{first.name} was changed" in message
    assert f"{second.name} is missing" in message
    assert "new.safetensors is not in the manifest" in message


def test_verify_compares_the_manifest_with_the_tensors(written):
    file = written / "qtool.json"
    manifest = json.loads(file.read_text())
    file.write_text(json.dumps(manifest | {"bits_per_weight": 4.0}))
    with pytest.raises(RunError, match=r"the manifest says 4\.0"):
        audit.verify(written)


def test_reproduce_makes_the_same_bytes(written):
    assert audit.reproduce(written) == {"same": True, "changes": []}
    assert [path.name for path in written.parent.iterdir() if path.is_dir()] == ["out"]


def test_reproduce_names_the_first_block_that_differs(written):
    from safetensors.torch import load_file, save_file

    shard = sorted(written.glob("*.safetensors"))[2]  # the second block's
    tensors = load_file(shard)
    name = "model.layers.1.mlp.up_proj.weight_packed"
    tensors[name] = tensors[name] ^ 1
    save_file(tensors, shard, metadata={"format": "pt"})
    with pytest.raises(RunError, match=r"the first difference is in model\.layers\.1\.mlp\.up_proj\.weight_packed"):
        audit.reproduce(written)


def test_reproduce_refuses_another_model(written, folder):
    file = written / "qtool.json"
    manifest = json.loads(file.read_text())
    manifest["lock"]["model_files"]["config.json"] = "0" * 64
    file.write_text(json.dumps(manifest))
    with pytest.raises(InputError, match="was made from another model"):
        audit.reproduce(written)


# -------------------------------------------------------------------------------------------------- stored dtypes


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("compute", ["float32", "auto"])
def test_a_streamed_run_gives_what_a_whole_model_gives(folder, tmp_path, dtype, compute):
    """The same method on a model that is whole in memory, saved by the library call."""
    from qtool import checkpoint, data
    from qtool.methods import get
    from qtool.models import load_model

    models = tmp_path / "models"
    models.mkdir()
    tiny.llama(models / "float", blocks=2, dtype=dtype)
    (models / "text.txt").write_text((folder / "text.txt").read_text())
    checked = make(models, tmp_path / "out", model__dtype=compute)
    quantize(checked)
    loaded = load_model(checked.model)
    tokens = data.calibration_tokens(checked.data, loaded, checked.seed)
    get("gptq").run(loaded, tokens, checked.quant, checked.method, checked.seed)
    (tmp_path / "library").mkdir()
    checkpoint.save(tmp_path / "library", loaded, tiny.specs(loaded))
    streamed, whole = checkpoint.Files(tmp_path / "out"), checkpoint.Files(tmp_path / "library")
    assert set(streamed.names) == set(whole.names)
    for name in whole.names:
        assert torch.equal(streamed.tensor(name), whole.tensor(name)), name
