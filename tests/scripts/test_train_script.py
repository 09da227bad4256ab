"""``scripts/train_builtin_model.py``, run as a user runs it, on made-up text."""

from __future__ import annotations

import json
import lzma
import random
import re
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).parents[2] / "scripts" / "train_builtin_model.py"
STEPS, CHECKPOINT_EVERY, WINDOW, HELDOUT_WINDOWS, SEED = 40, 8, 32, 16, 3
SIZES = "--vocab 400 --hidden 32 --layers 2 --heads 2 --kv-heads 1 --mlp 64 --context 64 --batch-tokens 256"
LENGTHS = f"--window {WINDOW} --heldout-windows {HELDOUT_WINDOWS} --steps {STEPS} --checkpoint-every {CHECKPOINT_EVERY}"
OPTIONS = [*SIZES.split(), *LENGTHS.split(), "--threads", "1", "--seed", str(SEED), "--note", "Made-up {text}."]


def pseudo_text(num_documents: int, seed: int) -> str:
    """Return documents of made-up words, each followed by one of four others: learned in a few steps."""
    words = random.Random(0)
    syllables = ["ka", "to", "mi", "ren", "sol", "va", "ber", "ing", "un", "tra", "phö", "el", "ix", "os", "ge"]
    vocabulary = sorted({"".join(words.choices(syllables, k=words.randint(1, 4))) for _ in range(300)})
    followers = {word: words.sample(vocabulary, 4) for word in vocabulary}
    generator, documents = random.Random(seed), []
    for _ in range(num_documents):
        document = [generator.choice(vocabulary)]
        for _ in range(generator.randint(60, 200)):
            document.append(generator.choice(followers[document[-1]]))
        documents.append(" ".join(word + generator.choice(["", "", "", " 2024,"]) for word in document))
    return "\n\n\n".join(documents)


def start(*args: object) -> subprocess.Popen[str]:
    command = [sys.executable, str(SCRIPT), *map(str, args)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, encoding="utf-8")


def finish(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=300)
    return process.returncode, out, err


def read_log(path: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with train.txt, the same as train.txt.xz, and heldout.txt."""
    folder = tmp_path_factory.mktemp("texts")
    text = pseudo_text(400, seed=1)
    (folder / "train.txt").write_text(text, "utf-8")
    (folder / "train.txt.xz").write_bytes(lzma.compress(text.encode("utf-8"), preset=1))
    (folder / "heldout.txt").write_text(pseudo_text(20, seed=2), "utf-8")
    return folder


@dataclass
class Runs:
    whole: Path
    resumed: Path
    killed_after: int
    resumed_output: str
    refused: tuple[int, str, str]


@pytest.fixture(scope="module")
def runs(texts: Path, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """One model trained in one go, and one with the same settings that was killed and resumed."""
    folder = tmp_path_factory.mktemp("models")
    options = ["--heldout", texts / "heldout.txt", *OPTIONS]
    killed = start(texts / "train.txt", "--out", folder / "resumed", *options)
    whole = start(texts / "train.txt.xz", "--out", folder / "whole", *options)
    log = folder / "resumed.partial" / "train_log.jsonl"
    while killed.poll() is None and (not log.exists() or len(log.read_bytes().splitlines()) < CHECKPOINT_EVERY + 3):
        time.sleep(0.002)
    killed.send_signal(signal.SIGKILL)
    out, err = killed.communicate()
    assert killed.returncode == -signal.SIGKILL, (out, err)
    killed_after = len(log.read_bytes().splitlines())
    with log.open("a", encoding="utf-8") as stream:  # a kill can interrupt a write
        stream.write('{"step": ')
    (log.parent / "checkpoint.pt.tmp").write_bytes(b"half a checkpoint")

    refused = finish(start(texts / "train.txt", "--out", folder / "resumed", *options, "--muon-lr", "0.01"))
    code, resumed_output, err = finish(start(texts / "train.txt", "--out", folder / "resumed", *options))
    assert code == 0, err
    code, _, err = finish(whole)
    assert code == 0, err
    return Runs(folder / "whole", folder / "resumed", killed_after, resumed_output, refused)


def test_the_loss_falls(runs: Runs) -> None:
    log = read_log(runs.whole / "train_log.jsonl")
    assert [line["step"] for line in log] == list(range(1, STEPS + 1))
    assert log[0]["loss"] == pytest.approx(torch.tensor(400.0).log().item(), abs=0.1)  # uniform over 400 tokens
    heldout = [line["heldout_loss"] for line in log if "heldout_loss" in line]
    assert len(heldout) == STEPS // CHECKPOINT_EVERY
    assert heldout == sorted(heldout, reverse=True)
    assert heldout[-1] < log[0]["loss"] - 1


def test_the_learning_rate_is_constant_and_then_falls_linearly(runs: Runs) -> None:
    shares = [line["lr_share"] for line in read_log(runs.whole / "train_log.jsonl")]
    num_falling = int(0.4 * STEPS)
    assert shares[:-num_falling] == [1.0] * (STEPS - num_falling)
    assert shares[-num_falling:] == pytest.approx([(num_falling - i) / num_falling for i in range(num_falling)])


def test_a_killed_run_resumes_to_the_same_bits(runs: Runs) -> None:
    assert CHECKPOINT_EVERY < runs.killed_after < STEPS
    assert f"resuming after step {runs.killed_after // CHECKPOINT_EVERY * CHECKPOINT_EVERY}" in runs.resumed_output
    assert read_log(runs.resumed / "train_log.jsonl") == read_log(runs.whole / "train_log.jsonl")
    for name in ("model.safetensors", "tokenizer.json", "config.json"):
        assert (runs.resumed / name).read_bytes() == (runs.whole / name).read_bytes(), name
    assert not runs.resumed.with_name("resumed.partial").exists()


def test_other_settings_do_not_resume(runs: Runs) -> None:
    code, out, err = runs.refused
    assert code == 1, out
    assert "muon_lr: was 0.02, now 0.01" in err
    assert "Traceback" not in err


def test_the_folder_is_the_model_that_the_card_describes(runs: Runs, texts: Path) -> None:
    """The model card's numbers equal those that transformers alone computes from the folder."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(runs.whole, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(runs.whole)
    card = (runs.whole / "README.md").read_text("utf-8")
    assert f"{model.num_parameters():,} parameters" in card
    assert card.endswith("\nMade-up {text}.\n")
    ids = [
        t
        for text in (texts / "heldout.txt").read_text("utf-8").split("\n\n\n")
        for t in [*tokenizer(text).input_ids, 0]
    ]
    windows = torch.tensor([ids[i * WINDOW : (i + 1) * WINDOW + 1] for i in range(HELDOUT_WINDOWS)])
    with torch.no_grad():
        loss = model(input_ids=windows, labels=windows).loss.item()
    found = re.search(r"Held-out loss: ([\d.]+) nats", card)
    assert found is not None
    assert float(found[1]) == pytest.approx(loss, abs=6e-5)  # rounded to 4 digits


def test_every_parameter_moves(runs: Runs) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(runs.whole, dtype=torch.float32)
    torch.manual_seed(SEED)
    fresh = type(model)(model.config).state_dict()
    assert [
        name for name, value in model.state_dict().items() if torch.equal(value, fresh[name].bfloat16().float())
    ] == []


def test_the_tokenizer_round_trips_text(runs: Runs) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(runs.whole)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (0, 0, 0)
    assert len(tokenizer) == 400
    for text in ("Kato solren phöing, 2024!", "  two spaces , a comma\n\nand\tλ → 🦙", pseudo_text(1, seed=5)):
        ids = tokenizer(text).input_ids
        assert 0 not in ids
        assert tokenizer.decode(ids) == text
    digits = tokenizer("2024").input_ids
    assert [tokenizer.decode([token]) for token in digits] == ["2", "0", "2", "4"]


BAD_INPUT = {
    "missing text": (["{bad}/none.txt"], "none.txt as UTF-8 text: [Errno 2]"),
    "not UTF-8": (["{bad}/latin1.txt"], "can't decode byte 0xe9 in position 3"),
    "not xz": (["{bad}/broken.txt.xz"], "broken.txt.xz as UTF-8 text: Input format not supported"),
    "cut xz": (["{bad}/cut.txt.xz"], "cut.txt.xz as UTF-8 text: Compressed data ended"),
    "little text": (["{bad}/short.txt"], "short.txt has 5 bytes and 257 are needed"),
    "little held-out text": (["{texts}/train.txt", "--heldout", "{bad}/short.txt"], "5 bytes and 513 are needed"),
    "little text for the vocabulary": (
        ["{texts}/train.txt", "--vocab", "60000"],
        "and --vocab is 60000; ask for fewer",
    ),
    "no tokenizer": (["{texts}/train.txt", "--tokenizer", "{bad}"], "cannot read the tokenizer"),
    "zero": (["{texts}/train.txt", "--layers", "0"], "--layers is 0, which is too small"),
    "ends": (["{texts}/train.txt", "--window", "48"], "--batch-tokens 256: no multiple of --window 48"),
    "two faults": (
        ["{texts}/train.txt", "--kv-heads", "3", "--decay", "2"],
        "of --kv-heads 3; --decay 2.0 is not a share",
    ),
    "taken": (["{texts}/train.txt", "--out", "{bad}"], "exists already"),
}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_is_told_in_one_line(case: str, texts: Path, tmp_path: Path) -> None:
    bad = tmp_path / "bad"
    bad.mkdir()
    (bad / "latin1.txt").write_bytes("café au lait".encode("latin-1") * 100)
    (bad / "broken.txt.xz").write_bytes(b"no archive" * 100)
    (bad / "cut.txt.xz").write_bytes((texts / "train.txt.xz").read_bytes()[:-500])
    (bad / "short.txt").write_text("short", "utf-8")
    args, message = BAD_INPUT[case]
    options = ["--heldout", texts / "heldout.txt", "--out", tmp_path / "model", *OPTIONS]
    code, out, err = finish(
        start(args[0].format(bad=bad, texts=texts), *options, *(a.format(bad=bad, texts=texts) for a in args[1:]))
    )
    assert code == 1, out
    assert message in err
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert not (tmp_path / "model").exists()
    assert not (tmp_path / "model.partial" / "settings.json").exists()
