"""Training with the model sharded over processes equals that of one process; each process holds its shard."""

import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from helpers import sharded_training as sharded
from helpers import tiny
from helpers.methods import recorded
from helpers.sharded_training import CASES, CLIPPED, KILLED, STEPS
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from qtool.blocks.job import Job, load_method
from qtool.checkpoints.files import write_shard
from qtool.config import recipe
from qtool.config.sections import ModelConfig
from qtool.config.training import EndToEndConfig
from qtool.models.folders import resolve
from qtool.models.linears import packed_weights
from qtool.models.loaded import LoadedModel
from qtool.models.loading import load_model
from qtool.pipelines import lock, quantize
from qtool.pipelines.run_state import run_state
from qtool.system import distributed
from qtool.system.errors import InputError, RunError
from qtool.training import end_to_end
from qtool.training.end_to_end import _Kept, _Training
from qtool.training.fit import windows_of_step
from qtool.training.text_loss import TextLoss

LAUNCH = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train all cases in two processes, and return their folder."""
    folder = tmp_path_factory.mktemp("sharded")
    sharded.models(folder)
    (folder / "states").mkdir()
    script = ["-m", "helpers.sharded_training", str(folder), "cpu"]
    done = subprocess.run([*LAUNCH, *script], cwd=Path(sharded.__file__).parents[1], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder


def distance(ours: Tensor, theirs: Tensor) -> float:
    """Return the largest difference of two tensors, as a share of the largest number."""
    assert ours.shape == theirs.shape
    return float((ours - theirs).abs().max() / theirs.abs().max().clamp(min=1e-30))


def seen(folder: Path, case: str) -> list[dict[str, Any]]:
    """Return the records of a case, one for each of the two processes."""
    return [torch.load(folder / f"{case}-{number}.pt") for number in (0, 1)]


def alone(folder: Path, case: str) -> dict[str, Any]:
    """Train a case in this process, and return its record."""
    return sharded.train_case(CASES[case], folder, folder / "states" / f"{case}-1", "none", "cpu")


@pytest.mark.parametrize("case", sorted(set(CASES) - {"worse"}))  # whose steps are far too long
def test_a_split_model_trains_as_a_whole_one_does(trained: Path, case: str) -> None:
    """Three windows for one process and two for the other; losses, masters, what is packed and all that is not."""
    one, (first, second) = alone(trained, case), seen(trained, case)
    half = CASES[case].dtype == "bfloat16"
    for name, series in one["series"].items():
        assert first["series"][name] == second["series"][name]
        if name == "block_error":  # of the first batch: of five windows two processes make smaller batches than one
            continue
        assert first["series"][name] == pytest.approx(series, abs=1e-2 if half else 1e-5), name
    assert first["weights"].keys() == second["weights"].keys() == one["weights"].keys()
    assert all(torch.equal(first["weights"][name], second["weights"][name]) for name in one["weights"])
    assert first["rest"].keys() == one["rest"].keys()
    for name, parameter in one["rest"].items():
        assert torch.equal(first["rest"][name], parameter), name
    if half or case == "signs":  # a sign has no small differences
        return
    assert len(first["masters"]) == len(one["masters"]) > 0
    for ours, theirs in zip(first["masters"], one["masters"], strict=True):
        assert ours.keys() == theirs.keys()
        for name, master in theirs.items():
            assert distance(ours[name], master) < 1e-5, name


def test_training_moved_what_is_compared(trained: Path) -> None:
    """Without this, the equalities above would say nothing."""
    for case in set(CASES) - {"worse", "still", "head still"}:
        losses = seen(trained, case)[0]["series"]["e2e_loss" if CASES[case].method == "efficientqat" else "loss"]
        assert len(losses) == STEPS
        assert len(set(losses)) == STEPS, case


def test_the_best_state_is_that_of_all_parts(trained: Path) -> None:
    """Far too long steps only do harm."""
    first, _ = seen(trained, "worse")
    still, _ = seen(trained, "still")
    assert first["series"]["validation"][0] == min(first["series"]["validation"])
    assert all(torch.equal(first["weights"][name], weight) for name, weight in still["weights"].items())


@pytest.mark.parametrize(
    "case", ["plain", "weights", "levels", "factors", "codes", "scales", "table", "places", "head", "head scales"]
)
def test_each_process_holds_its_part_of_every_matrix(trained: Path, case: str) -> None:
    """The student's trained and frozen ones, codes of few bits and embeddings included, and the teacher's."""
    first, second = seen(trained, case)
    for model in ("student", "teacher"):
        if model == "teacher" and CASES[case].settings.get("loss") == "ce":
            assert first[model] is None
            continue
        assert first[model]["whole"] == second[model]["whole"] == []
        for name, count in first[model]["all"].items():
            here = first[model]["here"][name], second[model]["here"][name]
            assert sum(here) == count, name
            assert case in ("factors", "codes") or here[0] == here[1], name  # three rows are two and one
    kinds = {name.rpartition(".")[2] for name in first["student"]["all"]}
    kept = {"codes": "kept", "factors": "kept", "scales": "weight_packed", "head scales": "weight_packed"}
    assert kept.get(case, "weight") in kinds
    if CASES[case].quant == sharded.TABLES:
        tables = {"table": "model.embed_tokens", "places": "transformer.wpe"}.get(case, "lm_head")
        assert f"{tables}.weight_packed" in first["student"]["all"] or case == "head"  # a head that trains has weights
        assert "model.embed_tokens.weight" not in first["student"]["all"]


def test_a_head_trains_in_shards_and_an_embedding_does_not(trained: Path) -> None:
    moved, still = (seen(trained, case)[0]["weights"] for case in ("head", "head still"))
    assert not torch.equal(moved["lm_head"], still["lm_head"])
    assert torch.equal(moved["model.embed_tokens"], still["model.embed_tokens"])


def test_nothing_keeps_the_whole_model(trained: Path) -> None:
    """Half of the student's float32 and of the teacher's, and neither the linears that were replaced."""
    for found in seen(trained, "plain"):
        total = 4 * sum(sum(found[model]["all"].values()) for model in ("student", "teacher"))
        assert found["live"] < 0.55 * total


@pytest.mark.parametrize("case", ["plain", "watched"])
def test_parts_of_the_state_are_the_state_of_one_process(trained: Path, case: str) -> None:
    """Parameters and moments, by rows; in one case gradients are cut in every step, by the norm of all of them."""
    alone(trained, case)
    whole = tiny.stored(trained / "states" / f"{case}-1" / "training")
    folder = trained / "states" / f"{case}-2" / "training"
    moments = sum(float(value.square().sum()) for name, value in whole.items() if name.endswith("exp_avg"))
    assert (moments**0.5 < CLIPPED["max_grad_norm"]) == (case == "watched")
    assert sorted(file.name for file in folder.iterdir()) == [
        f"step-{STEPS}-0.safetensors",
        f"step-{STEPS}-1.safetensors",
        "training.safetensors",
    ]
    first, second = (load_file(folder / f"step-{STEPS}-{number}.safetensors") for number in (0, 1))
    assert first.keys() == {name for name in whole if "." in name}
    for name, part in first.items():
        both = part if name.endswith(".step") else torch.cat([part, second[name]])
        assert distance(both, whole[name]) < 1e-5, name
        assert part.numel() < whole[name].numel() or part.dim() == 0


@pytest.mark.parametrize(("killed", "case"), KILLED.items())
def test_a_killed_training_goes_on_to_the_same_bytes(trained: Path, killed: str, case: str) -> None:
    for ours, theirs in zip(seen(trained, killed), seen(trained, case), strict=True):
        assert ours["files"] == ["step-2-0.safetensors", "step-2-1.safetensors", "training.safetensors"]
        assert ours["series"] == theirs["series"]
        assert all(torch.equal(ours["weights"][name], weight) for name, weight in theirs["weights"].items())
    folders = [trained / "states" / f"{each}-2" / "training" for each in (killed, case)]
    ours, theirs = ({file.name: file.read_bytes() for file in folder.iterdir()} for folder in folders)
    assert ours == theirs


@pytest.mark.parametrize("case", ["plain", "weights", "factors", "scales", "table", "places", "head", "head scales"])
def test_what_is_packed_is_what_was_trained(trained: Path, case: str) -> None:
    for found in seen(trained, case):
        assert torch.equal(found["packed"], found["last"])


# ------------------------------------------------------------------------------------------------ the command line


def written_recipe(
    folder: Path, name: str, sharding: str, device: str = "cpu", tables: dict[str, Any] | None = None
) -> Path:
    """Write the recipe of a run on the tiny model in ``folder``; ``tables`` are keys of its section quant."""
    if not (folder / "float").exists():
        tiny.llama(folder / "float")
        tiny.text(folder)
    method = {"name": "lsq", "batch_size": 5, "epochs": 2, "validation_samples": 3, "sharding": sharding}
    if tables:
        method["steps"] = 8  # before the order of sums lets a code go the other way
    raw = {
        "model": {"path": str(folder / "float"), "device": device, "dtype": "float32"},
        "method": method,
        "quant": {"num_bits": 2, "group_size": 16, "symmetric": False} | (tables or {}),
        "data": {"source": str(folder / "prose.txt"), "num_samples": 8, "seq_len": 32},
        "output": {"path": str(folder / name)},
    }
    file = folder / f"{name}.yaml"
    file.write_text(yaml.safe_dump(raw), encoding="utf-8")
    return file


def compare_runs(folder: Path, device: str, sharding: str = "full", tables: dict[str, Any] | None = None) -> None:
    """Run a recipe in two processes of torchrun and in one, and compare the results."""
    file = written_recipe(folder, "two", sharding, device, tables)
    done = subprocess.run([*LAUNCH, "-m", "qtool", "qat", str(file)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == str(folder / "two")
    quantize.quantize(recipe.load(written_recipe(folder, "one", "none", device, tables)))
    two, one = (recorded(folder / name / "qtool.json") for name in ("two", "one"))
    for name in ("loss", "validation"):
        assert two[name] == pytest.approx(one[name], abs=1e-5)
    restored, other = (
        load_model(ModelConfig(path=str(folder / name), dtype="float32", device="cpu"), quantized=True)
        for name in ("two", "one")
    )
    assert len(packed_weights(restored.model)) == len(packed_weights(other.model)) == (16 if tables else 14)
    torch.testing.assert_close(tiny.logits(restored.model), tiny.logits(other.model), rtol=0, atol=1e-2)
    assert not list(folder.glob("*.partial"))


def test_torchrun_writes_a_checkpoint_that_one_process_reads(tmp_path: Path) -> None:
    compare_runs(tmp_path, "cpu")


@pytest.mark.slow
@pytest.mark.parametrize("sharding", ["full", "none"])
def test_torchrun_writes_packed_tables_that_one_process_reads(tmp_path: Path, sharding: str) -> None:
    compare_runs(tmp_path, "cpu", sharding, {"embedding": {"num_bits": 8}, "head": {"num_bits": 4, "group_size": 16}})


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="two GPUs are needed")
def test_two_gpus_split_a_model(tmp_path: Path) -> None:
    compare_runs(tmp_path, "cuda")


# ---------------------------------------------------------------------------------------------------- what is refused


def test_one_process_does_not_ignore_sharding(tmp_path: Path, llama: LoadedModel, tokens: Tensor) -> None:
    message = "this is the only one; start more with torchrun --nproc-per-node N -m qtool, or set sharding: none"
    with pytest.raises(InputError, match=message):
        quantize.quantize(recipe.load(written_recipe(tmp_path, "out", "full")))
    assert not list(tmp_path.glob("out*partial")), "nothing was begun"
    file = written_recipe(tmp_path, "out", "none")
    raw = yaml.safe_load(file.read_text()) | {"method": {"name": "efficientqat", "e2e": {"sharding": "full"}}}
    file.write_text(yaml.safe_dump(raw))
    with pytest.raises(InputError, match=message):
        quantize.quantize(recipe.load(file))
    method = load_method("lsq")
    with pytest.raises(InputError, match=message):
        method.run(Job.select(llama, sharded.W2, tokens), method.config(sharding="full"))


def test_a_launcher_that_asks_for_it_is_told_where_to_ask(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(InputError, match="turn it off there, and set sharding: full in the recipe"):
        distributed.start(torch.device("cpu"))


def test_a_run_goes_on_only_in_as_many_processes_and_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def begin(sharding: str) -> None:
        checked = recipe.load(written_recipe(tmp_path, "out", sharding))
        source = resolve(checked.model.path)
        with run_state(
            checked.output.path, lock.lock_of(checked, source), overwrite=False, fresh=False, source=source
        ) as state:
            _Kept(state.folder / "training" / end_to_end.TRAINING).write({"steps": torch.tensor([2, 2])})
            raise sharded.Stopped

    with monkeypatch.context() as patch:
        tiny.several(0, 2, patch)
        with pytest.raises(sharded.Stopped):
            begin("full")
        with pytest.raises(sharded.Stopped):
            begin("full")
        with pytest.raises(InputError, match=r'method\.sharding: "full" -> "none"'):
            begin("none")
    with pytest.raises(InputError, match="processes: 2 -> 1"):
        begin("full")


# ------------------------------------------------------------------------------------------- what processes agree on


@given(
    st.integers(1, 9), st.integers(0, 9), st.integers(1, 12), st.integers(1, 4), st.integers(1, 5), st.integers(0, 3)
)
def test_processes_run_the_model_equally_often(
    num: int, held: int, batch: int, count: int, accumulation: int, step: int
) -> None:
    """Otherwise they would wait for each other forever. Each window counts once."""
    batch = max(batch, count)
    config = EndToEndConfig(batch_size=batch, validation_samples=held, optim={"accumulation": accumulation}, loss="ce")
    loaded: Any = SimpleNamespace(dtype=torch.float32, device=torch.device("cpu"))
    tokens = 1 + torch.arange(num + held).unsqueeze(1).expand(-1, 3)  # window i holds the token i + 1
    runs: list[int] = []
    losses: list[float] = []
    rows: Counter[int] = Counter()

    def summed(loss: TextLoss, tokens: Tensor, labels: Tensor) -> Tensor:
        runs[-1] += 1
        return tokens[:, 1:].float().sum()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TextLoss, "summed", summed)
        for number in range(count):
            tiny.several(number, count, patch)
            training = _Training(loaded, None, tokens, tokens, config, 0)
            runs.append(0)
            parts = list(training.losses(step))
            assert len(parts) == runs[-1] == min(accumulation, batch // count)
            losses.append(float(sum(parts)))
        chosen = windows_of_step(step, batch, num, 0)
        rows.update(chosen)
        mean = sum((1 + row) * times for row, times in rows.items()) / batch
        assert sum(losses) / count == pytest.approx(mean, rel=1e-5)
        assert len(set(runs)) == 1
        if held:
            runs, found = [], []
            for number in range(count):
                tiny.several(number, count, patch)
                runs.append(0)
                found.append(_Training(loaded, None, tokens, tokens, config, 0).validate())
            assert len(set(runs)) == 1
            mean = sum(1 + row for row in range(num, num + held)) / held
            assert sum(found) / count == pytest.approx(mean, rel=1e-5)


def state_of(step: int, number: int) -> dict[str, Tensor]:
    return {"parameter.0": torch.tensor([float(step), float(number)]), "steps": torch.tensor([step, step])}


def test_a_kill_between_the_parts_and_the_record_leaves_the_state_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keeper = _Kept(tmp_path / "phase" / end_to_end.TRAINING, sharded=True)

    def on(number: int, step: int, until: str = "") -> None:
        """Process ``number`` writes a step, and is killed when it comes to the file ``until``."""

        def killed(tensors: dict[str, Tensor], file: Path) -> None:
            if file.name == until:
                raise sharded.Stopped
            write_shard(tensors, file)

        tiny.several(number, 2, monkeypatch)
        monkeypatch.setattr(end_to_end, "write_shard", killed)
        keeper.write(state_of(step, number))

    def read(number: int) -> dict[str, Tensor]:
        tiny.several(number, 2, monkeypatch)
        found = keeper.read()
        assert found is not None
        return found

    tiny.several(0, 2, monkeypatch)
    assert keeper.read() is None
    on(1, 2)
    on(0, 2)
    with monkeypatch.context() as patch:  # the second waits for a record that does not come
        patch.setattr(Path, "unlink", lambda file: None)
        on(1, 4)
    for until in ("step-4-0.safetensors", end_to_end.TRAINING):
        with pytest.raises(sharded.Stopped):
            on(0, 4, until)
        for number in (0, 1):
            assert {name: value.tolist() for name, value in read(number).items()} == {
                "parameter.0": [2.0, number],
                "steps": [2, 2],
            }
    on(1, 4)
    on(0, 4)
    assert [read(number)["parameter.0"].tolist() for number in (0, 1)] == [[4.0, 0.0], [4.0, 1.0]]
    assert sorted(file.name for file in (tmp_path / "phase").iterdir()) == [
        "step-4-0.safetensors",
        "step-4-1.safetensors",
        end_to_end.TRAINING,
    ]
    (tmp_path / "phase" / "step-4-1.safetensors").unlink()
    with pytest.raises(RunError, match=r"step-4-1\.safetensors is missing; all processes must see one folder"):
        read(1)
